"""Many adapters in one batch: which row belongs to which adapter, and each site's table of edits.

    table (adapters + 1, 2, width)  ──gather──>  (rows, 2, width)  ──>  h'[row] = scale[row] * h[row] + bias[row]

The last row of a table is the identity: it serves `"__base__"` and adapters that have no edit at the site. One gather
a site, whatever the number of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from redpeft.errors import UserError
from redpeft.method.edit import Edit, apply_edit

BASE = "__base__"


class MixedBatch:
    """The adapters of a batch, one name per sequence; `"__base__"` stands for no adapter.

    `adapters` are all that the model holds, in the order of the tables' rows. Raises `UserError` for an unknown name.
    """

    @torch.compiler.disable  # or every other mix of names would be compiled anew
    def __init__(self, names: Sequence[str], adapters: Sequence[str]) -> None:
        slots = {name: slot for slot, name in enumerate(adapters)} | {BASE: len(adapters)}
        unknown = sorted(set(names) - set(slots))
        if unknown:
            raise UserError(f"unknown adapters in adapter_names: {', '.join(unknown)}; loaded: {', '.join(adapters)}")
        self.names = list(names)
        self.adapters = tuple(adapters)
        self.used = sorted(set(names) - {BASE})
        self._slots = torch.tensor([slots[name] for name in names])
        self._by_batch: dict[tuple[int, torch.device], torch.Tensor] = {}

    def repeats(self, batch: int) -> int:
        """How often each name stands in a batch of this size: beam search and `num_return_sequences` repeat each
        sequence in place, and some models flatten (batch, positions) into one dimension."""
        repeats, rest = divmod(batch, len(self.names))
        if rest or not repeats:
            raise UserError(
                f"adapter_names has {len(self.names)} names for a batch of {batch}: give one name per sequence"
            )
        return repeats

    def rows(self, batch: int, device: torch.device) -> torch.Tensor:
        """The table row of each of a batch's sequences: (batch,)."""
        key = (batch, device)
        if key not in self._by_batch:
            self._by_batch[key] = self._slots.to(device).repeat_interleave(self.repeats(batch))
        return self._by_batch[key]


class EditTable:
    """All edits of one site, stacked; a row is made again when its edit has changed."""

    def __init__(self, edits: Mapping[str, Edit], adapters: tuple[str, ...]) -> None:
        self.adapters = adapters
        self._slots = {name: slot for slot, name in enumerate(adapters)}
        first = next(iter(edits.values())).scale
        self.rows = torch.zeros(len(adapters) + 1, 2, first.shape[0], dtype=first.dtype, device=first.device)
        self.rows[:, 0] = 1.0
        self._states: dict[str, tuple] = {}
        self.refresh(edits, adapters)

    def serves(self, edits: Mapping[str, Edit], adapters: tuple[str, ...]) -> bool:
        """Whether the table has the rows that are asked for, on the device where the edits are now."""
        device = next(iter(edits.values())).scale.device
        return self.adapters == adapters and self.rows.device == device and self._states.keys() <= edits.keys()

    @torch.no_grad()
    def refresh(self, edits: Mapping[str, Edit], names: Sequence[str]) -> None:
        for name in names:
            if name not in edits:
                continue
            edit, state = edits[name], _state(edits[name])
            if self._states.get(name) != state:
                self.rows[self._slots[name], 0] = edit.scale
                self.rows[self._slots[name], 1] = edit.shift
                self._states[name] = state

    def apply(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """hidden (batch, ..., width), rows (batch,) -> (batch, ..., width), each sequence with its own edit."""
        edits = self.rows[rows].view(rows.shape[0], 2, *[1] * (hidden.dim() - 2), -1)
        return apply_edit(hidden, edits[:, 0], edits[:, 1])


def _state(edit: Edit) -> tuple:
    """Changes whenever the values of an edit do: autograd's version counters, and where the values lie."""
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in (edit.scale, edit.bias, edit.unit))


@torch.compiler.disable
def run_by_adapter(
    modules: Mapping[str, nn.Module], batch: MixedBatch, hidden: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Run each sequence through its adapter's copy of a module (`modules_to_save`, such as a head).

    hidden is (batch, ...); the outputs are put back into its order. An adapter without a copy uses the base's.
    """
    repeats = batch.repeats(hidden.shape[0])
    names = [name for name in batch.names for _ in range(repeats)]
    parts, order = [], []
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        parts.append(modules[name if name in modules else BASE](hidden[rows], *args, **kwargs))
        order += rows
    return torch.cat(parts)[torch.tensor(order, device=hidden.device).argsort()]
