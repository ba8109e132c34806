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

    `loaded` are all that the model holds. Raises `UserError` for an unknown name.
    """

    @torch.compiler.disable  # or every other mix of names would be compiled anew
    def __init__(self, names: Sequence[str], loaded: Sequence[str]) -> None:
        unknown = sorted(set(names) - {*loaded, BASE})
        if unknown:
            raise UserError(f"unknown adapters in adapter_names: {', '.join(unknown)}; loaded: {', '.join(loaded)}")
        self.names = list(names)
        self.adapters = [name for name in dict.fromkeys(names) if name != BASE]
        slots = {name: slot for slot, name in enumerate([*self.adapters, BASE])}
        self._slots = torch.tensor([slots[name] for name in names])
        self._by_batch: dict[tuple[int, torch.device], torch.Tensor] = {}

    def repeats(self, batch: int) -> int:
        """How often each name stands in a batch of this size: beam search and `num_return_sequences` repeat each
        sequence in place, and some models flatten (batch, positions) into one dimension."""
        repeats, rest = divmod(batch, len(self.names)) if self.names else (0, 0)
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
    """The edits of one site that a batch needs, stacked when a forward pass or a generation starts.

    Nothing is kept from one call to the next: to find out whether an edit has changed costs as much as stacking it.
    """

    @torch.no_grad()
    def __init__(self, edits: Mapping[str, Edit], adapters: Sequence[str]) -> None:
        like = next(iter(edits.values())).scale
        self.rows = like.new_zeros(len(adapters) + 1, 2, len(like))
        self.rows[:, 0] = 1.0
        slots = [slot for slot, name in enumerate(adapters) if name in edits]
        if slots:
            used = [edits[adapters[slot]] for slot in slots]
            self.rows[slots, 0] = torch.stack([edit.scale for edit in used])
            self.rows[slots, 1] = torch.stack([edit.bias for edit in used]) * torch.stack([edit.unit for edit in used])
        for slot in slots:  # a table by `acting` alone would be twice the small operations
            if (edit := edits[adapters[slot]]).strength != 1.0:
                self.rows[slot] = torch.stack(edit.acting)

    def apply(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """hidden (batch, ..., width), rows (batch,) -> (batch, ..., width), each sequence with its own edit."""
        edits = self.rows[rows].view(rows.shape[0], 2, *[1] * (hidden.dim() - 2), -1)
        return apply_edit(hidden, edits[:, 0], edits[:, 1])


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
