"""The losses of a batch's rows, one by one, so that each job has the mean over its own.

They are what transformers' models compute by themselves, before the mean is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from redpeft.errors import UserError

RowLoss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(logits, labels) -> the sum of the losses in each row, and how many there are in it; both (rows,)."""


def row_loss(model: Any, task_type: str | None) -> RowLoss:
    """The loss of a task by PEFT's name for it. UserError for one that a fleet cannot train."""
    if task_type == "SEQ_CLS":
        return CLASSIFICATION[model.config.problem_type or _guess(model.config.num_labels)]
    if task_type in TOKENS:
        return TOKENS[task_type]
    raise UserError(f"a fleet cannot train a model for {task_type}: only for SEQ_CLS, {' and '.join(TOKENS)}")


def _guess(labels: int) -> str:
    return "regression" if labels == 1 else "single_label_classification"


def _one_label(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    losses = F.cross_entropy(_precise(logits), labels, reduction="none")
    return losses, torch.ones_like(losses)


def _label_sets(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = _precise(logits)
    losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(dim=1)
    return losses, torch.ones_like(losses)


def _number(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = _precise(logits)
    losses = F.mse_loss(logits.reshape(len(labels)), labels.to(logits.dtype), reduction="none")
    return losses, torch.ones_like(losses)


def _tokens(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    losses = F.cross_entropy(_precise(logits).transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(dim=1), (labels != -100).sum(dim=1)


def _next_tokens(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _tokens(logits[:, :-1], labels[:, 1:])


def _precise(logits: torch.Tensor) -> torch.Tensor:
    """At least fp32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


CLASSIFICATION = {
    "single_label_classification": _one_label,
    "multi_label_classification": _label_sets,
    "regression": _number,
}
TOKENS = {"TOKEN_CLS": _tokens, "CAUSAL_LM": _next_tokens}
