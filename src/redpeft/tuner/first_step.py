"""Warns at an optimiser's first step of what keeps edits from learning.

- A rate that is made for whole models. A step of Adam moves an edit by about the rate, of 1 or of a unit: at the
  default of Trainer, 5e-5, a hundred steps move a scale by about 0.005. A rate of 3e-2 suits RED.
- Units that were never measured: a loop that never calls `model.train()` would learn biases in units of 1.

There is no warning with DeepSpeed, whose optimisers hold flattened copies of the parameters, nor for a copy of a model
that has been trained already.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from redpeft.tuner.edit import Edit

LOW, USUAL = 1e-3, 3e-2
_edits: WeakSet[Edit] = WeakSet()
_handle: RemovableHandle | None = None


def check_first_step(edit: Edit) -> None:
    """Check the rate at the first step of an optimiser that holds this edit."""
    global _handle
    _edits.add(edit)
    if _handle is None:
        _handle = register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _handle
    edits = {id(vector): edit for edit in _edits for vector in (edit.offset, edit.bias)}
    groups = [group for group in optimizer.param_groups if any(id(each) in edits for each in group["params"])]
    if not groups:
        return
    if any(edits[id(each)].unit_pending for group in groups for each in group["params"] if id(each) in edits):
        warnings.warn(
            "the units of RED's biases have not been measured, since no forward pass ran in training mode: call "
            "model.train() or redpeft.calibrate(model) before training",
            stacklevel=2,
        )
    _edits.clear()
    if _handle is not None and next(reversed(_global_optimizer_pre_hooks)) == _handle.id:
        _handle.remove()  # torch is iterating over the hooks: it may remove the last one alone; others stay, and idle
        _handle = None
    rate = max(float(group.get("initial_lr", group["lr"])) for group in groups)  # a warm-up's `lr` begins at 0
    if "adam" in type(optimizer).__name__.lower() and 0 < rate < LOW:
        warnings.warn(
            f"a learning rate of {rate:g} teaches RED almost nothing: its edits learn at about {USUAL:g} "
            f"(learning_rate={USUAL:g}), whatever the model",
            stacklevel=2,
        )
