"""How long runs will take, from a few steps of one of them for each task."""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redpeft.models import load_config
from redpeft.reproduce.plan import TableRun
from redpeft.training.preview import preview
from redpeft.training.recipe import Recipe
from redpeft.training.train import read_task

STEPS, ROWS = 6, 16


@dataclass(frozen=True)
class Speed:
    """Seconds of a task's runs: for a step, for a row to validate, for a row to test, and for the rest of a run."""

    step: float
    validation: float
    test: float
    rest: float


def count_rows(runs: Sequence[TableRun]) -> dict[str, dict[str, int]]:
    """The rows of each task by split. Raises `UserError` for data or a base model that is missing."""
    firsts = {run.task: run.job.recipe for run in reversed(runs)}
    rows = {task: _rows(recipe) for task, recipe in firsts.items()}
    for base in {recipe.base.model: recipe.base for recipe in firsts.values()}.values():
        load_config(base.model, base.revision)
    return rows


def estimate(runs: Sequence[TableRun], rows: Mapping[str, Mapping[str, int]]) -> float:
    """Seconds that these runs take, one after the other on this machine; `rows` are those of `count_rows`.

    The first run of each task is tried with a few steps and rows. Raises `UserError` and `RunError` as training does.
    """
    speeds: dict[str, Speed] = {}
    for run in runs:
        if run.task not in speeds:
            speeds[run.task] = _try_steps(run.job.recipe)
    return sum(_seconds(run.job.recipe, rows[run.task], speeds[run.task]) for run in runs)


def _rows(recipe: Recipe) -> dict[str, int]:
    """Rows by split; of a test split that is answered the distinct questions."""
    task: Any
    task, splits = read_task(recipe)
    counts = {name: len(split) for name, split in splits.items()}
    if task.score_answers and "test" in splits:
        counts["test"] = len(task.questions(splits["test"]))
    return counts


def _try_steps(recipe: Recipe) -> Speed:
    few = recipe.data.model_copy(update={"max_train_rows": STEPS * recipe.batch_size, "max_eval_rows": ROWS})
    began = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        found = preview(recipe.model_copy(update={"data": few, "epochs": 1, "max_steps": STEPS}))
    rest = time.perf_counter() - began - found.seconds - found.seconds_to_test
    test = found.seconds_to_test / found.rows.get("test", ROWS)
    return Speed(found.seconds_per_step, found.seconds_per_validation / found.rows["validation"], test, max(0.0, rest))


def _seconds(recipe: Recipe, rows: Mapping[str, int], speed: Speed) -> float:
    epoch = math.ceil(rows["train"] / recipe.batch_size)
    steps = min(recipe.max_steps or math.inf, math.ceil(recipe.epochs * epoch))
    validated = rows["validation"] * math.ceil(steps / epoch)
    return speed.rest + steps * speed.step + validated * speed.validation + rows.get("test", 0) * speed.test
