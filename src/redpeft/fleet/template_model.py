"""The model on which the runs of a fleet's jobs are prepared, one after the other: loaded once, reset for each."""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from redpeft import calibrate
from redpeft.models import autocast, choose_precision, draw_weights, training_device
from redpeft.tasks.base import TASKS, Task
from redpeft.tasks.metrics import IGNORED
from redpeft.training.learner import build_learner
from redpeft.training.recipe import Recipe
from redpeft.training.train import TrainingRun, prepare
from redpeft.training.trainer import CALIBRATION_ROWS

ADAPTER_NAME = "default"


def why_alone(recipe: Recipe) -> str | None:
    """The reason why a fleet cannot train a recipe, or None."""
    reasons = {
        f"method {recipe.method}": recipe.method != "red",
        f"task {recipe.task}": TASKS[recipe.task].task_type not in ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM")
        or TASKS[recipe.task].score_answers is not None
        or bool(TASKS[recipe.task].losses),
        "init_from": recipe.init_from is not None,
        "packing": recipe.packing,
        "gradient_accumulation": recipe.gradient_accumulation > 1,
        "base.load_in": recipe.base.load_in is not None,
        "report_to": bool(recipe.report_to),
        "precision fp16": recipe.precision == "fp16",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def kind_of(recipe: Recipe) -> Hashable:
    """Jobs of one kind share a base model, the sites of their edits, a chat template, and how they compute."""
    options = sorted((key, repr(value)) for key, value in recipe.method_options.items())
    shared = (recipe.base.model_dump_json(), recipe.task, recipe.head, recipe.precision)
    return (*shared, recipe.data.chat_template, recipe.gradient_checkpointing, *options)


class TemplateModel:
    """The model of jobs of one kind, with RED and heads on it, on the device that trains.

    `recipe` and `task` are those of any of the jobs.
    """

    def __init__(self, recipe: Recipe, task: Task) -> None:
        self.learner = build_learner(recipe, task)
        self.model = self.learner.model.to(training_device())
        self._base = self.model.get_base_model()
        self._base.config.get_text_config().use_cache = False  # no pass continues a text
        trained = {name for name, weight in self.model.named_parameters() if weight.requires_grad}
        self._start = {
            name: tensor.clone()
            for name, tensor in self.model.state_dict().items()
            if name in trained or name.endswith(".unit")
        }
        self._units: dict[str, torch.Tensor] = {}
        self._last: TrainingRun | None = None
        self._new = [self._in_model(name) for name in self.learner.new]
        self._precision = choose_precision(recipe.precision, recipe.base.dtype)
        self._collator = task.collator(self.learner.tokenizer) or partial(_pad_responses, self.learner.tokenizer)
        if recipe.gradient_checkpointing:
            self._base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def autocast(self) -> torch.dtype | None:
        """The number format of forward passes: None for fp32."""
        return torch.bfloat16 if self._precision == "bf16" else None

    def prepare(self, recipe: Recipe, folder: Path, task: Task, splits: dict[str, Dataset]) -> TrainingRun:
        """A run on the model, whose own adapter is then that of a new run: identity edits, their units, a new head.

        Its rows have only the columns that `collate` takes. With the `splits` of the run before it, it has that one's
        rows in tokens and units.
        """
        self.model.load_state_dict(self._start, strict=False)
        draw_weights(self.model, self._new, recipe.seed)
        if self._last is None or self._last.splits is not splits:
            run = prepare(recipe, folder, task, splits, self.learner)
            known = {*inspect.signature(self._base.forward).parameters, "labels"}
            known |= set() if recipe.learn_prompt else {"completion_mask"}
            encoded = {
                name: rows.select_columns([column for column in rows.column_names if column in known])
                for name, rows in run.encoded.items()
            }
            first = self.collate(list(encoded["train"].take(CALIBRATION_ROWS)))
            with autocast(self._precision, self.device):
                calibrate(self.model, {name: tensor.to(self.device) for name, tensor in first.items()})
            state = self.model.state_dict()
            self._units = {name: state[name].clone() for name in self._start if name.endswith(".unit")}
            self._last = replace(run, encoded=encoded)
        self.model.load_state_dict(self._units, strict=False)
        return replace(self._last, recipe=recipe, folder=folder, task=task)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch of rows, also of several jobs: they have one tokenizer, and so one way to pad."""
        return {key: value for key, value in self._collator(rows).items() if torch.is_tensor(value)}

    def _in_model(self, weight: str) -> str:
        """The name that a new weight of the base has in the adapted model, which trains a copy of its module."""
        head = next(head for head in self.learner.head if weight.startswith(f"{head}."))
        return f"base_model.model.{head}.modules_to_save.{ADAPTER_NAME}{weight.removeprefix(head)}"


def _pad_responses(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of the task instruction as TRL's trainer collates them, padded on the right. Where rows have no
    "completion_mask", the prompts are learned too."""
    tokens = [torch.tensor(row["input_ids"]) for row in rows]
    marks = [torch.tensor(row.get("completion_mask", [1] * len(row["input_ids"]))) for row in rows]
    labels = [ids.where(mask == 1, IGNORED) for ids, mask in zip(tokens, marks, strict=True)]
    padded = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        "input_ids": padded(tokens, padding_value=tokenizer.pad_token_id),
        "attention_mask": padded([torch.ones_like(ids) for ids in tokens]),
        "labels": padded(labels, padding_value=IGNORED),
    }
