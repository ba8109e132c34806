"""What `redpeft train` says at its end: how it went, and what to do next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redpeft.console import in_words, rounded
from redpeft.storage import TASK
from redpeft.tasks.data import splits_in
from redpeft.training.recipe import Recipe

Result = Mapping[str, Any]  # what result.json holds, or for several seeds summary.json


def closing_lines(recipe: Recipe, result: Result) -> list[str]:
    """The best epoch, the time, what became of the rows, where the run is, and two commands that use it."""
    folder = recipe.run_folder()
    seeds = result.get("seeds")
    lines = [_best(result), _rows(result), f"Run: {folder}"]
    return [*filter(None, lines), "Next:", *next_calls(recipe, folder / f"seed-{seeds[0]}" if seeds else folder)]


def next_calls(recipe: Recipe, run: Path) -> list[str]:
    """Calls of `redpeft evaluate` and `redpeft predict` for a finished run, on data of the recipe: its test rows where
    it has some, else its validation rows, else all."""
    data, name = recipe.data, shlex.quote(str(run))
    labelled = data.test or data.validation or data.path or data.train or ""
    configuration = f" --config {shlex.quote(data.config_name)}" if data.config_name and labelled == data.path else ""
    file = _file(recipe)
    predict = f"redpeft predict {name} " + (shlex.quote(str(file)) if file else "-")
    return [
        f"  redpeft evaluate {name} {shlex.quote(labelled)}{configuration}",
        f"  {predict}" if file else f"  echo {shlex.quote(_example(run))} | {predict}",
    ]


def _best(result: Result) -> str:
    if "seeds" in result:
        pairs = zip(result["best_epoch"], result["seeds"], strict=True)
        best = ", ".join(f"{rounded(epoch)} (seed {seed})" for epoch, seed in pairs)
    else:
        best = f"{rounded(result['best_epoch'])} of {rounded(result['epochs'])}"
    step = result["seconds_per_step"]
    speed = f", {step:.2g} s a step" if step else ""
    return f"Best epoch by {result['metric']}: {best}. Trained in {in_words(result['seconds'])}{speed}."


def _rows(result: Result) -> str | None:
    """What there was, was cut, and was left out, by split; None for a run of before these were counted."""
    if "rows_cut" not in result:
        return None
    splits = []
    for split, rows in result["rows"].items():
        lost = {"cut": result["rows_cut"].get(split, 0), "left out": result["rows_left_out"].get(split, 0)}
        notes = ", ".join(f"{number:,} {what}" for what, number in lost.items() if number)
        splits.append(f"{split} {rows:,}" + (f" ({notes})" if notes else ""))
    whole = not any(result["rows_cut"].values()) and not any(result["rows_left_out"].values())
    return f"Rows: {', '.join(splits)}" + ("; none was cut" if whole else "")


def _file(recipe: Recipe) -> Path | None:
    """A file with rows like those of the recipe, if they lie in files."""
    data = recipe.data
    if given := data.test or data.validation:
        return Path(given)
    path = Path(data.path or data.train or "").expanduser()
    if path.is_dir():
        files = splits_in(path / (data.config_name or ""))
        return next((files[split][0] for split in ("test", "validation", "train") if split in files), None)
    return path if path.is_file() else None


def _example(run: Path) -> str:
    """A line for standard input: a text, or an object where a row needs two."""
    columns = json.loads((run / TASK).read_text(encoding="utf-8"))["columns"]
    if "text_pair" in columns:
        return json.dumps({columns["text"]: "a text", columns["text_pair"]: "another"}, ensure_ascii=False)
    return "a text"
