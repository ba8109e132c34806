"""How long runs will take, from a few steps of one of them for each task."""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from redpeft.models import load_pretrained
from redpeft.reproduce.plan import TableRun
from redpeft.storage import read_metrics
from redpeft.tasks.base import TASKS
from redpeft.training.recipe import Recipe
from redpeft.training.train import read_task, train

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
        load_pretrained(AutoConfig, base.model, revision=base.revision)
    return rows


def estimate(runs: Sequence[TableRun], rows: Mapping[str, Mapping[str, int]]) -> float:
    """Seconds that these runs take, one after the other on this machine; `rows` are those of `count_rows`.

    The first run of each task is tried with a few steps and rows, in a temporary folder. Raises `UserError` and
    `RunError` as training does.
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
    quick: dict[str, Any] = {"data": few, "epochs": 1, "max_steps": STEPS, "save_steps": None, "report_to": []}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(name) / "run"
        result = train(recipe.model_copy(update=quick), folder)
        entries = read_metrics(folder)
    wall = time.perf_counter() - began
    step = result["seconds_per_step"] or 0.0
    evaluation = next(entry["eval_runtime"] for entry in entries if "eval_runtime" in entry)
    validation = evaluation / result["rows"]["validation"]
    rest = max(0.0, wall - result["steps"] * step - evaluation)
    if TASKS[recipe.task].score_answers:  # answers and their scores take nearly all of the rest
        return Speed(step, validation, rest / result["rows"].get("test", ROWS), 0.0)
    return Speed(step, validation, validation, max(0.0, rest - validation * result["rows"].get("test", 0)))


def _seconds(recipe: Recipe, rows: Mapping[str, int], speed: Speed) -> float:
    epoch = math.ceil(rows["train"] / recipe.batch_size)
    steps = min(recipe.max_steps or math.inf, math.ceil(recipe.epochs * epoch))
    validated = rows["validation"] * math.ceil(steps / epoch)
    return speed.rest + steps * speed.step + validated * speed.validation + rows.get("test", 0) * speed.test
