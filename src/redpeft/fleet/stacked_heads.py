"""Heads of many jobs: one head's modules, run with each job's own weights on its own rows of a batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from redpeft.tuner.heads import has_rows


class Groups:
    """The rows of a batch gathered by job, in a grid (jobs, most rows of a job); `index` (rows,) is the job of each.

    A job with fewer rows is padded with copies of its first row, so that nothing of another job, such as a NaN,
    reaches it.
    """

    def __init__(self, index: torch.Tensor, jobs: int) -> None:
        order = index.argsort(stable=True)
        counts = index.bincount(minlength=jobs)
        starts = counts.cumsum(0) - counts
        place = torch.empty_like(index)
        place[order] = torch.arange(len(index), device=index.device) - starts[index[order]]
        self.index, self.place = index, place
        self.grid = order[starts][:, None].repeat(1, int(counts.max()))
        self.grid[index, place] = torch.arange(len(index), device=index.device)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, ...) -> (jobs, most, ...)"""
        return rows.index_select(0, self.grid.flatten()).unflatten(0, self.grid.shape)

    def scatter(self, grouped: torch.Tensor) -> torch.Tensor:
        """(jobs, most, ...) -> (rows, ...)"""
        return grouped[self.index, self.place]


class StackedHead:
    """A head that is called with weights (jobs, ...) in place of its own; jobs share those that are not trained."""

    def __init__(self, module: nn.Module) -> None:
        weights = dict(module.named_parameters())
        self.names = [name for name, weight in weights.items() if weight.requires_grad]
        self.trained = [weights[name] for name in self.names]
        self.shared = {name: weight for name, weight in weights.items() if not weight.requires_grad}
        self.shared |= dict(module.named_buffers())
        self.skeleton = copy.deepcopy(module).to("meta")

    def train(self, mode: bool) -> None:
        self.skeleton.train(mode)

    def __call__(self, weights: Sequence[torch.Tensor], groups: Groups, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`weights` are (jobs, numbers), in the order of `trained`. Arguments with one row for each row of the batch
        are split by job; the others go to every job as they are."""
        flat, shape = tree_flatten((args, kwargs))
        own = [has_rows(value, len(groups.index)) for value in flat]
        given = [groups.gather(value) if mine else value for value, mine in zip(flat, own, strict=True)]
        stacked = {
            name: row.unflatten(1, weight.shape)
            for name, weight, row in zip(self.names, self.trained, weights, strict=True)
        }

        def one(weights: dict[str, torch.Tensor], *given: Any) -> torch.Tensor:
            args, kwargs = tree_unflatten(given, shape)
            return functional_call(self.skeleton, {**self.shared, **weights}, args, kwargs)

        dims = (0, *(0 if mine else None for mine in own))
        return groups.scatter(torch.vmap(one, in_dims=dims, randomness="different")(stacked, *given))
