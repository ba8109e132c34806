"""How long runs will take, from a few steps of one of them for each task."""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redpeft.reproduce.plan import Run
from redpeft.tasks import read_splits
from redpeft.training.recipe import Recipe
from redpeft.training.train import train

STEPS, ROWS = 6, 16


@dataclass(frozen=True)
class Speed:
    """Seconds of a task's runs: for a step, for a row to validate or test, and for loading."""

    step: float
    row: float
    loading: float


def estimate(runs: Sequence[Run]) -> float:
    """Seconds that these runs take, one after the other on this machine.

    The first run of each task is tried with a few steps and rows, in a temporary folder. Raises `UserError` and
    `RunError` as training does: a base model or data that is missing is found out here, before anything is written.
    """
    speeds: dict[str, Speed] = {}
    rows: dict[str, dict[str, int]] = {}
    for run in runs:
        if run.task not in speeds:
            rows[run.task] = {name: len(split) for name, split in read_splits(run.job.recipe.data, run.seed).items()}
            speeds[run.task] = _probe(run.job.recipe)
    return sum(_seconds(run.job.recipe, rows[run.task], speeds[run.task]) for run in runs)


def _probe(recipe: Recipe) -> Speed:
    few = recipe.data.model_copy(update={"max_train_rows": STEPS * recipe.batch_size, "max_eval_rows": ROWS})
    quick: dict[str, Any] = {"data": few, "epochs": 1, "max_steps": STEPS, "save_steps": None, "report_to": []}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        result = train(recipe.model_copy(update=quick), Path(folder) / "probe")
    wall = time.perf_counter() - began
    step = result["seconds_per_step"] or 0.0
    rest = max(0.0, result["seconds"] - result["steps"] * step)
    row = rest / min(ROWS, result["rows"]["validation"])
    return Speed(step, row, max(0.0, wall - result["seconds"] - row * result["rows"].get("test", 0)))


def _seconds(recipe: Recipe, rows: dict[str, int], speed: Speed) -> float:
    epoch = math.ceil(rows["train"] / recipe.batch_size)
    steps = min(recipe.max_steps or math.inf, math.ceil(recipe.epochs * epoch))
    evaluated = rows["validation"] * math.ceil(steps / epoch) + rows.get("test", 0)
    return speed.loading + steps * speed.step + evaluated * speed.row


def in_words(seconds: float) -> str:
    """A duration for people: 40 s, 12 min, 3 h 20 min."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
