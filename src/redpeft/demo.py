"""`redpeft demo`: RED beside four other methods on real text with a real encoder; no account and no download.

The encoder is all-MiniLM-L6-v2 (22M parameters) from a PyPI package, and the texts are the support messages that come
with redpeft. The runs are ordinary ones, as `redpeft train` makes them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from redpeft import tasks
from redpeft.console import counted
from redpeft.errors import RunError, UserError
from redpeft.models import find_base
from redpeft.plots import MethodScore, plot_parameters
from redpeft.runs.runner import jobs_of, run_jobs
from redpeft.storage import locked
from redpeft.training.predict import load_run, predict
from redpeft.training.recipe import Recipe

METHODS = ("red", "lora", "ia3", "head", "full")
SEEDS = (0, 1)
SCHEDULE = {"batch_size": 8, "epochs": 3}  # what two cores do in five minutes, for all methods and seeds
PLOT = "accuracy.png"
MESSAGES = Path(tasks.__file__).parent / "support_messages"
NEW_MESSAGES = (
    "ordered my card two weeks ago and the postman still hasnt brought anything",
    "Why was I charged 2.99 extra for paying in euros?",
    "HELP i typed the wrong sort code and my rent went to a stranger",
)


@dataclass(frozen=True)
class Score:
    """One method over its seeds: accuracy on the test split in per cent, and what training it takes."""

    method: str
    seeds: int
    accuracy: float
    spread: float | None  # standard deviation over the seeds
    trained_parameters: int  # with the head, which every method trains
    file_bytes: int
    seconds_per_step: float


def run_demo(
    folder: str | Path, methods: Sequence[str] = METHODS, seeds: Sequence[int] = SEEDS
) -> tuple[dict[str, Any], list[Any]]:
    """Train, compare and use: the results as data, and the same as tables and lines to print.

    Runs go to `folder`/<method>/seed-<n>; what is finished there is not done again. Raises `UserError` where the
    encoder's package is missing or `folder` holds something else, and `RunError` where a run failed.
    """
    folder = Path(folder)
    encoder = find_encoder()
    _check_folder(folder)
    recipes = {method: _recipe(encoder, method, seeds) for method in methods}
    with locked(folder):
        results = run_jobs(job for method in methods for job in jobs_of(recipes[method], folder / method))
        failed = next((result for result in results if "error" in result), None)
        if failed:
            raise RunError(f"{failed['folder']}: {failed['error']}")
        scores = [_score([result for result in results if result["method"] == method]) for method in methods]
        points = [MethodScore(each.method, each.trained_parameters, each.accuracy, each.spread) for each in scores]
        plot = plot_parameters(points, "trained parameters, with the head", "test accuracy (%)", folder / PLOT)
    run = folder / "red" / f"seed-{seeds[0]}"
    answers = list(predict(load_run(run), NEW_MESSAGES))
    predictions = [
        {"text": text, "label": answer["label"], "probability": answer["probabilities"][answer["label"]]}
        for text, answer in zip(NEW_MESSAGES, answers, strict=True)
    ]
    data = {"scores": [asdict(score) for score in scores], "predictions": predictions, "plot": plot, "run": run}
    return data, [_table(scores), f"Drew {plot}", _predictions(predictions), _by_hand(encoder, run)]


def find_encoder() -> str:
    """The folder of the packaged encoder. UserError where the package is missing."""
    return str(find_base("minilm").folder)


def _check_folder(folder: Path) -> None:
    """Raises `UserError` for a folder that holds something else than a demo."""
    if folder.exists():
        found = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
        if other := sorted(name for name in found if name not in (*METHODS, PLOT) and not name.startswith(".")):
            raise UserError(f"{folder} holds {other[0]}, which is no part of a demo: choose another output folder")


def _recipe(encoder: str, method: str, seeds: Sequence[int]) -> Recipe:
    data = {"path": str(MESSAGES), "text": "text", "label": "label"}
    return Recipe(base=encoder, task="classification", data=data, method=method, seeds=list(seeds), **SCHEDULE)


def _score(results: Sequence[dict[str, Any]]) -> Score:
    accuracies = [100 * result["test"]["accuracy"] for result in results]
    return Score(
        method=results[0]["method"],
        seeds=len(results),
        accuracy=statistics.fmean(accuracies),
        spread=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        trained_parameters=results[0]["trainable_parameters"],
        file_bytes=results[0]["adapter_bytes"],
        seconds_per_step=statistics.median(result["seconds_per_step"] for result in results),
    )


def _table(scores: Sequence[Score]) -> Table:
    """The comparison; each cost also as a share of full fine-tuning's, where that was run."""
    full = next((score for score in scores if score.method == "full"), None)

    def share(name: str, score: Score) -> str:
        if full is None or score is full:
            return ""
        value = getattr(score, name) / getattr(full, name)
        return f" ({value:.2g}x)" if value > 0.1 else f" (1/{1 / value:,.0f})"

    table = Table(title="Support messages in 12 classes (beside full fine-tuning)")
    table.add_column("method")
    for name in (f"accuracy, {counted(scores[0].seeds, 'seed')}", "trained parameters", "file", "seconds a step"):
        table.add_column(name, justify="right")
    for score in scores:
        spread = "" if score.spread is None else f" ± {score.spread:.1f}"
        table.add_row(
            score.method,
            f"{score.accuracy:.1f}{spread}",
            f"{score.trained_parameters:,}{share('trained_parameters', score)}",
            f"{score.file_bytes / 1024:,.0f} KiB{share('file_bytes', score)}",
            f"{score.seconds_per_step:.3f}{share('seconds_per_step', score)}",
        )
    return table


def _predictions(predictions: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="The RED adapter on new messages")
    for name in ("message", "label", "probability"):
        table.add_column(name)
    for row in predictions:
        table.add_row(row["text"], row["label"], f"{row['probability']:.2f}")
    return table


def _by_hand(encoder: str, run: Path) -> str:
    schedule = " ".join(f"{key}={value}" for key, value in SCHEDULE.items())
    return f"""The same by hand:
  redpeft train base={encoder} data.path={MESSAGES} {schedule} --out runs/mine
  redpeft evaluate {run} {MESSAGES / "test.jsonl"}
  echo "{NEW_MESSAGES[0]}" | redpeft predict {run} -
  redpeft inspect {run} --plot red.png"""
