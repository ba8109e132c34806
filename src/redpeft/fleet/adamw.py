"""AdamW for many jobs at once: every row of a table is a run of its own, with its own rate and its own step count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch's and transformers' defaults


class Rates(NamedTuple):
    """How a job's next step is taken: numbers, or columns (jobs, 1) of those of several jobs.

    `edit` and `head` are learning rates at this step; a `max_grad_norm` of 0 clips nothing.
    """

    edit: Any
    head: Any
    weight_decay: Any = 0.0
    max_grad_norm: Any = 0.0

    @classmethod
    def stack(cls, rates: Sequence[Rates], like: torch.Tensor) -> Rates:
        """Columns (jobs, 1), with the dtype and device of `like`."""
        table = torch.tensor(rates, dtype=torch.float64).to(like)
        return cls(*table.unsqueeze(-1).unbind(dim=1))


def clip(gradient: torch.Tensor, max_norm: torch.Tensor) -> torch.Tensor:
    """Each row (jobs, numbers) scaled to at most its norm (jobs, 1), as `torch.nn.utils.clip_grad_norm_` does."""
    norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    factor = torch.where(max_norm > 0, (max_norm / (norm + 1e-6)).clamp(max=1.0), torch.ones_like(norm))
    return gradient * factor


def adamw(
    values: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    gradient: torch.Tensor,
    steps: torch.Tensor,
    rate: torch.Tensor,
    decay: torch.Tensor | None = None,
) -> None:
    """One step of `torch.optim.AdamW` for each row, in place.

    Shapes: values, moments and gradient (jobs, numbers); steps, counted from 1, and rate (jobs, 1); decay
    (jobs, numbers), the weight decay of each number.
    """
    if decay is not None:
        values.mul_(1 - rate * decay)
    first.lerp_(gradient, 1 - BETA1)
    second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    count = steps.to(values)
    step_size = rate / (1 - BETA1**count)
    denominator = second.sqrt() / (1 - BETA2**count).sqrt() + EPS
    values.sub_(step_size * first / denominator)
