"""K edits of one base model, each with its head, trained in one forward and backward pass.

    values (slots, numbers)  ──rows of this batch──>  live (jobs, numbers)  ──>  the model: each sequence has the edit
         ^                                              │                        and the head of its job
         └──────────── AdamW, row by row <── gradient ──┘

A row of the table holds everything that one job trains, flattened: | scales and biases | heads |. What a step costs
depends on the rows of its batch and not on the number of slots: only the rows in use are gathered, differentiated and
updated. Training changes nothing in the base model itself, so jobs do not affect each other.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from redpeft.errors import UserError
from redpeft.fleet.adamw import Rates, adamw, clip
from redpeft.fleet.losses import row_loss
from redpeft.fleet.stacked_heads import Groups, StackedHead
from redpeft.models import keep_modes_and_rng
from redpeft.tasks.metrics import IGNORED
from redpeft.tuner.edit import effective_edit
from redpeft.tuner.layer import red_layers, replaced
from redpeft.tuner.mixed import RowIndex, edit_rows


class MustTrainAlone(UserError):
    """A model that a fleet cannot train and `redpeft train` can."""


class SlotState(NamedTuple):
    """The content of a slot: the trained values, AdamW's moments, the units of the biases, the steps so far."""

    values: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    units: torch.Tensor
    steps: torch.Tensor


class Fleet:
    """A model with RED, and `slots` jobs that train its edits and heads side by side.

    `model` is a PeftModel with RED, for classification of texts or tokens or for causal language modelling. Each slot
    has a copy of what it trains (`requires_grad`): `fill` copies the model's own adapter into a slot, and
    `copy_to_model` copies a slot into the model's own adapter, which can then be saved and used like any other.
    `autocast` is the number format of forward passes (None: the model's own).

    Raises `UserError` for a model without RED, one that trains more than edits and heads, and a task that a fleet
    cannot train.
    """

    def __init__(
        self, model: PeftModel, slots: int, adapter: str = "default", autocast: torch.dtype | None = None
    ) -> None:
        base = model.get_base_model()
        self.model, self.autocast = model, autocast
        kind = model.peft_config[adapter].task_type
        self.loss = row_loss(base, kind)
        self._can_leave_out = kind == "CAUSAL_LM" and "logits_to_keep" in inspect.signature(base.forward).parameters
        self.layers = [layer for layer in red_layers(base).values() if adapter in layer.redpeft_edit]
        self.edits = [layer.redpeft_edit[adapter] for layer in self.layers]
        wrappers = [module for module in base.modules() if isinstance(module, ModulesToSaveWrapper)]
        self.wrappers = [wrapper for wrapper in wrappers if adapter in wrapper.modules_to_save]
        self.heads = [StackedHead(wrapper.modules_to_save[adapter]) for wrapper in self.wrappers]
        edits = [vector for edit in self.edits for vector in edit.parameters() if vector.requires_grad]
        heads = [weight for head in self.heads for weight in head.trained]
        self.parameters = [*edits, *heads]
        _check_trained(model, self.parameters, self.layers)
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.edit_numbers = sum(vector.numel() for vector in edits)
        like = self.parameters[0].new_zeros(slots, sum(self.sizes))
        self.state = SlotState(
            values=like,
            exp_avg=torch.zeros_like(like),
            exp_avg_sq=torch.zeros_like(like),
            units=like.new_ones(slots, len(self.edits)),
            steps=torch.zeros(slots, 1, dtype=torch.long, device=like.device),
        )
        self._decayed = torch.zeros_like(like[0])

    @property
    def slots(self) -> int:
        return len(self.state.values)

    @property
    def device(self) -> torch.device:
        return self.state.values.device

    def decay(self, names: Sequence[str]) -> None:
        """Let weight decay act on the parameters of the model with these names, and on no others."""
        chosen = {id(parameter) for name, parameter in self.model.named_parameters() if name in set(names)}
        marks = [
            parameter.new_full((parameter.numel(),), float(id(parameter) in chosen)) for parameter in self.parameters
        ]
        self._decayed = torch.cat(marks)

    @torch.no_grad()
    def fill(self, slot: int, state: SlotState | None = None) -> None:
        """Begin a job in a slot, as the model's own adapter is now; or continue one from `state`."""
        if state is None:
            values = torch.cat([parameter.flatten() for parameter in self.parameters])
            units = torch.cat([edit.unit for edit in self.edits])
            state = SlotState(values, torch.zeros_like(values), torch.zeros_like(values), units, torch.tensor([0]))
        for table, row in zip(self.state, state, strict=True):
            table[slot] = row.to(table)

    def read(self, slot: int) -> SlotState:
        """A copy of a slot's content, on the CPU."""
        return SlotState(*(table[slot].to("cpu", copy=True) for table in self.state))

    @torch.no_grad()
    def copy_to_model(self, slot: int) -> None:
        """Copy a slot's edits, units and heads into the model's own adapter."""
        rows = self.state.values[slot].split(self.sizes)
        for parameter, row in zip(self.parameters, rows, strict=True):
            parameter.copy_(row.view_as(parameter))
        for edit, unit in zip(self.edits, self.state.units[slot], strict=True):
            edit.load_state_dict({**edit.state_dict(), "unit": unit.reshape(1)})

    def step(self, batch: Mapping[str, Any], slots: Sequence[int], rates: Mapping[int, Rates]) -> dict[int, float]:
        """One training step of each slot that has rows in the batch; returns their losses before the step.

        `batch` holds the model's arguments and `labels`, `slots` the slot of each row, `rates` those of each slot. A
        slot's loss is the mean over its own rows (or their tokens), and its gradient is clipped by its own norm. A
        slot whose loss is not finite is left as it was.
        """
        self._set_mode(True)
        used, index = self._index(slots)
        live = self.state.values[used].requires_grad_()
        with self._with_edits(live, used, index):
            logits, labels = self._logits(batch, learned=True)
            losses = self._losses(logits, labels, index, len(used))
            [gradient] = torch.autograd.grad(losses.sum(), live)
        finite = losses.isfinite()
        chosen, order = used[finite], [slot for slot, good in zip(used.tolist(), finite.tolist(), strict=True) if good]
        if order:
            self._update(chosen, gradient[finite], Rates.stack([rates[slot] for slot in order], live))
        return dict(zip(used.tolist(), losses.tolist(), strict=True))

    @torch.no_grad()
    def evaluate(self, batch: Mapping[str, Any], slots: Sequence[int]) -> tuple[dict[int, float], torch.Tensor]:
        """The loss of each slot that has rows in the batch, and the logits of all rows."""
        self._set_mode(False)
        used, index = self._index(slots)
        with self._with_edits(self.state.values[used], used, index):
            logits, labels = self._logits(batch)
            losses = self._losses(logits, labels, index, len(used))
        return dict(zip(used.tolist(), losses.tolist(), strict=True)), logits

    @torch.no_grad()
    def check_loss(self, batch: Mapping[str, Any]) -> None:
        """Raise `MustTrainAlone` where the model adds something to the loss of the labels in training, such as a loss
        of its experts: jobs that share a batch would not learn what they learn alone.

        The model is left as it was: its modes, its weights, and the random numbers.
        """
        inputs = {key: value.to(self.device) for key, value in batch.items()}
        base = self.model.get_base_model()
        with keep_modes_and_rng(self.model), self._precision():
            self._set_mode(True)
            output = base(**inputs)
            sums, counts = self.loss(output.logits, inputs["labels"])
        of_labels, own = float(sums.sum() / counts.sum()), float(output.loss)
        tolerance = 1e-4 if output.loss.element_size() >= 4 else 1e-2
        if math.isfinite(own) and not math.isclose(of_labels, own, rel_tol=tolerance, abs_tol=1e-6):
            raise MustTrainAlone(
                f"a fleet cannot train {type(base).__name__}: its loss of a batch is {own:.6g}, but that of its "
                f"labels is {of_labels:.6g}; train it alone"
            )

    def _set_mode(self, training: bool) -> None:
        """Before each pass, as a Trainer does: a `PeftModel` is in training mode even where its base model is not."""
        self.model.train(training)
        for head in self.heads:
            head.train(training)

    def _index(self, slots: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The slots in use, (jobs,), and the place among them of each row's slot, (rows,)."""
        used, index = torch.tensor(slots).unique(return_inverse=True)
        return used.to(self.device), index.to(self.device)

    def _logits(self, batch: Mapping[str, Any], learned: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of a pass and their labels. `learned`: without the first positions, those that no row learns to
        predict (as long as the shortest prompt), where the model can leave them out."""
        labels, keep = batch["labels"], dict[str, int]()
        if learned and self._can_leave_out:
            first = int((labels != IGNORED).any(dim=0).int().argmax())
            kept = labels.shape[1] - max(0, first - 1)  # the token before the first label predicts it
            labels, keep = labels[:, -kept:], {"logits_to_keep": kept}
        inputs = {key: value.to(self.device) for key, value in batch.items() if key != "labels"}
        with self._precision():
            logits = self.model.get_base_model()(**inputs, **keep).logits
        return logits, labels.to(self.device)

    def _losses(self, logits: torch.Tensor, labels: torch.Tensor, index: torch.Tensor, jobs: int) -> torch.Tensor:
        """(jobs,): the mean loss over each job's rows, or over their tokens that have a label."""
        with self._precision():
            sums, counts = self.loss(logits, labels)
        zeros = sums.new_zeros(jobs)
        return zeros.index_add(0, index, sums) / zeros.index_add(0, index, counts.to(sums)).clamp(min=1)

    def _precision(self) -> Any:
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    @contextmanager
    def _with_edits(self, live: torch.Tensor, used: torch.Tensor, index: torch.Tensor) -> Iterator[None]:
        """While inside, each sequence passes through the model with the edits and the heads of its job's row in
        `live` (jobs, numbers)."""
        parts = iter(live.split(self.sizes, dim=1))
        units = self.state.units[used]
        rows, editors = RowIndex(index), {}
        for number, (layer, edit) in enumerate(zip(self.layers, self.edits, strict=True)):
            offset, bias = (
                next(parts) if vector.requires_grad else vector.expand(len(live), -1)
                for vector in (edit.offset, edit.bias)
            )
            effective = effective_edit(offset, bias, units[:, number, None], edit.origin)
            editors[layer] = partial(edit_rows, torch.stack(effective, dim=1), rows)
        groups = Groups(index, len(live))
        heads = {
            wrapper: partial(head, [next(parts) for _ in head.trained], groups)
            for wrapper, head in zip(self.wrappers, self.heads, strict=True)
        }
        with replaced("editor", editors), replaced("forward", heads):
            yield

    @torch.no_grad()
    def _update(self, slots: torch.Tensor, gradient: torch.Tensor, rates: Rates) -> None:
        values, first, second, _, steps = (table[slots] for table in self.state)
        steps += 1
        gradient = clip(gradient, rates.max_grad_norm)
        parts = (slice(0, self.edit_numbers), rates.edit), (slice(self.edit_numbers, None), rates.head)
        for part, rate in parts:
            decay = rates.weight_decay * self._decayed[part] if bool(rates.weight_decay.any()) else None
            adamw(values[:, part], first[:, part], second[:, part], gradient[:, part], steps, rate, decay)
        updated = SlotState(values, first, second, self.state.units[slots], steps)
        for table, rows in zip(self.state, updated, strict=True):
            table[slots] = rows


def _check_trained(model: PeftModel, parameters: Sequence[nn.Parameter], layers: Sequence[nn.Module]) -> None:
    known = {id(parameter) for parameter in parameters}
    others = [name for name, weight in model.named_parameters() if weight.requires_grad and id(weight) not in known]
    if not layers or not known:
        raise UserError("a fleet trains RED: the model has no RED adapter that is being trained")
    if others:
        raise UserError(f"a fleet trains only edits and heads, but this model also trains {others[0]}")
    base: Any = model.get_base_model()
    if any(getattr(config, "output_router_logits", False) for config in (base.config, base.config.get_text_config())):
        raise MustTrainAlone(
            f"a fleet cannot train {type(base).__name__} with output_router_logits: it adds a loss of its experts to "
            "that of a batch. Train it alone, or set that to false in the model's config.json"
        )
