"""The model that the jobs of a fleet are made on, one after the other: loaded once, and as new for each."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from redpeft.models import choose_precision, draw_weights, leave_unpacked
from redpeft.tasks.base import TASKS, Task
from redpeft.training.model import build_learner
from redpeft.training.recipe import Recipe
from redpeft.training.train import TrainingRun, prepare

ADAPTER_NAME = "default"


def why_alone(recipe: Recipe) -> str | None:
    """What keeps a recipe from being trained in a fleet, or None."""
    reasons = {
        f"method {recipe.method}": recipe.method != "red",
        f"task {recipe.task}": TASKS[recipe.task].task_type not in ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM")
        or TASKS[recipe.task].score_answers is not None,
        "init_from": recipe.init_from is not None,
        "packing": recipe.packing,
        "gradient_accumulation": recipe.gradient_accumulation > 1,
        "base.load_in": recipe.base.load_in is not None,
        "report_to": bool(recipe.report_to),
        "precision fp16": recipe.precision == "fp16",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def kind_of(recipe: Recipe) -> Hashable:
    """Jobs of one kind share a base model, the sites of their edits, and how they compute."""
    options = sorted((key, repr(value)) for key, value in recipe.method_options.items())
    shared = (recipe.base.model_dump_json(), recipe.task, recipe.head, recipe.precision)
    return (*shared, recipe.gradient_checkpointing, *options)


class TemplateModel:
    """The model of jobs of one kind and shape, with RED and heads on it. `recipe` and `task` are any one's of them."""

    def __init__(self, recipe: Recipe, task: Task) -> None:
        self.kind = kind_of(recipe), task.shape
        self.learner = build_learner(recipe, task)
        self.model = self.learner.model
        self._base = self.model.get_base_model()
        leave_unpacked(self._base)
        trained = {name for name, weight in self.model.named_parameters() if weight.requires_grad}
        self._start = {
            name: tensor.clone()
            for name, tensor in self.model.state_dict().items()
            if name in trained or name.endswith(".unit")
        }
        self._new = [self._in_model(name) for name in self.learner.new]
        if recipe.gradient_checkpointing:
            self._base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def prepare(self, recipe: Recipe, folder: Path, task: Task, splits: dict[str, Dataset]) -> TrainingRun:
        """A run on the model, whose adapter is then as the run begins: identity edits, their units, a new head."""
        self.model.load_state_dict(self._start, strict=False)
        draw_weights(self.model, self._new, recipe.seed)
        forward: Any = vars(self._base).get("forward")
        try:
            return prepare(recipe, folder, task, splits, self.learner)
        finally:  # TRL wraps it for each trainer anew
            vars(self._base).pop("forward", None)
            if forward is not None:
                self._base.forward = forward

    def _in_model(self, weight: str) -> str:
        """The name that a new weight of the base has in the adapted model, which trains a copy of its module."""
        head = next(head for head in self.learner.head if weight.startswith(f"{head}."))
        return f"base_model.model.{head}.modules_to_save.{ADAPTER_NAME}{weight.removeprefix(head)}"


def autocast_dtype(recipe: Recipe) -> torch.dtype | None:
    """The number format of a fleet's forward passes: None for fp32."""
    return torch.bfloat16 if choose_precision(recipe.precision, recipe.base.dtype) == "bf16" else None
