"""What people read of finished runs: the last lines of `redpeft train`, and the report of an experiment as a page
(Markdown and HTML), with pictures, and as data."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from redpeft.console import counted, in_words, machine, rounded
from redpeft.plots import plot_finished, plot_scores
from redpeft.runs import pages
from redpeft.runs.experiment import USAGE, Experiment, JobResult, Usage
from redpeft.runs.pages import Inline, Link, number, relative
from redpeft.runs.progress import sort_score
from redpeft.storage import RESULT, TASK, read_json, write_atomically
from redpeft.tasks.data import splits_in
from redpeft.training.recipe import Recipe

SPLITS = ("validation", "test")
PAGE = "report.html"
HEAD = ["job", "metric", "validation", "test", "other scores", "best epoch", "steps", "trained parameters", "seconds"]
SHOWN_JOBS = 50  # on a terminal

Result = Mapping[str, Any]  # the content of result.json, or for several seeds of summary.json


# --- the last lines of redpeft train ---------------------------------------------------------------------------------


def closing_lines(recipe: Recipe, result: Result) -> list[str]:
    """The best epoch, the time, the rows, the run folder, and two commands that use it."""
    folder = recipe.run_folder()
    seeds = result.get("seeds")
    lines = [_best(result), rows_line(result), f"Run: {folder}"]
    return [*filter(None, lines), "Next:", *next_calls(recipe, folder / f"seed-{seeds[0]}" if seeds else folder)]


def next_calls(recipe: Recipe, run: Path) -> list[str]:
    """Calls of `redpeft evaluate` and `redpeft predict` for a finished run, on data of the recipe: its test rows where
    it has some, else its validation rows, else all."""
    data, name = recipe.data.parts[0] if recipe.data.mix else recipe.data, shlex.quote(str(run))
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


def rows_line(result: Result) -> str | None:
    """How many rows there were, were cut and were left out, by split; None for an old run without counts."""
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
    """A file with rows like those of the recipe; None where they do not come from files."""
    data = recipe.data
    if data.mix:
        return None  # its files may have other columns than the run
    if given := data.test or data.validation:
        return Path(given)
    path = Path(data.path or data.train or "").expanduser()
    if path.is_dir():
        files = splits_in(path / (data.config_name or ""))
        return next((files[split][0] for split in ("test", "validation", "train") if split in files), None)
    return path if path.is_file() else None


def _example(run: Path) -> str:
    """A line for standard input: a text, or an object where a row needs two."""
    columns = read_json(run / TASK)["columns"]
    if "text_pair" in columns:
        return json.dumps({columns["text"]: "a text", columns["text_pair"]: "another"}, ensure_ascii=False)
    return "a text"


# --- the report of an experiment -------------------------------------------------------------------------------------


def write_report(
    experiment: Experiment,
    results: Sequence[JobResult],
    usage: Usage,
    first: Sequence[pages.Block] = (),
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write report.md, report.html, their pictures and the record into the output folder; returns the record's data.

    `first` comes first on the page, and `more` goes into the data.
    """
    versions = versions_of(each.result for each in results if each.result)
    ends = [(each.folder / RESULT).stat().st_mtime - usage.began for each in results if each.result]
    pictures = [
        plot_scores(scores_by_job(results), experiment.out / "scores.png"),
        plot_finished(ends, experiment.out / "finished.png"),
    ]
    title = f"redpeft {experiment.identity['command']}"
    failed: list[list[Inline]] = [
        [[Link(each.name, relative(each.folder, experiment.out))], [each.error]] for each in results if each.error
    ]
    failures = (pages.Heading("Failed jobs"), pages.Grid(["job", "why"], failed, numbers=False)) if failed else ()
    blocks: list[pages.Block] = [
        pages.Heading(title, 1),
        *first,
        _facts_grid(facts(results, usage)),
        *(pages.Picture(picture.name, picture.stem) for picture in pictures if picture),
        *failures,
        pages.Heading("Jobs"),
        pages.Grid(HEAD, [_cells(each, experiment.out) for each in results if each.result]),
        pages.Heading("Machine and versions"),
        _facts_grid({**machine(), **versions}),
    ]
    data = {
        **experiment.identity,
        **(more or {}),
        "jobs": [as_data(each) for each in results],
        USAGE: asdict(usage),
        "machine": machine(),
        "versions": versions,
    }
    write_atomically(experiment.out / "report.md", pages.to_markdown(blocks).rstrip("\n"))
    write_atomically(experiment.out / PAGE, pages.to_html(title, blocks).rstrip("\n"))
    write_atomically(experiment.out / experiment.record, json.dumps(data, indent=2, ensure_ascii=False))
    return data


def scores_by_job(results: Iterable[JobResult]) -> list[tuple[str, dict[str, float]]]:
    """The jobs with a validation score, from the worst to the best, each with its scores by split and metric."""
    scored = [job for job in results if job.result and job.score("validation") is not None]
    scored.sort(key=lambda job: sort_score(job.metric, job.score("validation") or 0.0))
    return [
        (job.name, {f"{split} {job.metric}": score for split in SPLITS if (score := job.score(split)) is not None})
        for job in scored
    ]


def facts(results: Sequence[JobResult], usage: Usage) -> dict[str, str]:
    """The usage of an experiment as people read it."""
    failed = sum(each.error is not None for each in results)
    done = sum(each.result is not None for each in results)
    found = {
        "jobs": f"{len(results)}: {done} done, {failed} failed, {len(results) - done - failed} not finished",
        "wall time": in_words(usage.seconds),
    }
    if usage.examples:
        speed = f"{usage.examples / usage.seconds:,.0f} a second"
        found["examples in fleets, trained on or scored"] = f"{usage.examples:,}, {speed}"
    if usage.plan:
        found["last fleet"] = f"{counted(usage.slots or 0, 'slot')}, passes of {counted(usage.tokens or 0, 'token')}"
        found["its memory"] = usage.plan
    return found


def as_data(job: JobResult) -> dict[str, Any]:
    """A job for machines."""
    known = {"name": job.name, "folder": str(job.folder)}
    if job.result is None:
        return {**known, "error": job.error}
    same = ("task", "metric", "seed", "best_epoch", "steps", "epochs", "trainable_parameters", "seconds")
    scores = {split: job.score(split) for split in SPLITS}
    return {**known, **scores, **{key: job.result[key] for key in same}}


def jobs_table(results: Sequence[JobResult], out: Path) -> Table:
    """The first jobs, for a terminal."""
    rows = [
        _cells(each, out) if each.result else [[each.name], ["failed" if each.error else "not finished"]]
        for each in results[:SHOWN_JOBS]
    ]
    table = pages.to_table(pages.Grid(HEAD, rows))
    if len(results) > SHOWN_JOBS:
        table.caption = f"and {len(results) - SHOWN_JOBS} more"
    return table


def _cells(job: JobResult, out: Path) -> list[Inline]:
    result = job.result
    assert result is not None
    return [
        [Link(job.name, relative(job.folder, out))],
        [f"{result['metric']}"],
        [number(job.score("validation"), 4)],
        [number(job.score("test"), 4)],
        [other_scores(result)],
        [rounded(result["best_epoch"])],
        [f"{result['steps']:,}"],
        [f"{result['trainable_parameters']:,}"],
        [f"{result['seconds']:,.1f}"],
    ]


def other_scores(result: Mapping[str, Any]) -> str:
    """The scores beside the metric, of the test rows or else of the validation rows. `result` may be a summary of
    seeds, of which the means are shown."""
    scores = {**(result["validation"] or {}), **(result["test"] or {})}
    means = {name: score["mean"] if isinstance(score, dict) else score for name, score in scores.items()}
    return ", ".join(f"{name} {number(mean, 4)}" for name, mean in means.items() if name != result["metric"]) or "-"


def _facts_grid(facts: Mapping[str, str]) -> pages.Grid:
    return pages.Grid(["", ""], [[[name], [value]] for name, value in facts.items()], numbers=False)


# --- what the numbers were measured on -------------------------------------------------------------------------------


def versions_of(results: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The versions of libraries that runs were made with, by their results."""
    found: dict[str, set[str]] = {}
    for result in results:
        for name, version in result["versions"].items():
            found.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(versions)) for name, versions in found.items()}
