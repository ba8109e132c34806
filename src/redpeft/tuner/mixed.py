"""Many adapters in one batch: which row belongs to which adapter, and each site's table of edits.

    table (adapters, 2, width)  ──gather──>  (rows, 2, width)  ──>  h'[row] = scale[row] * h[row] + bias[row]

One gather a site, whatever the number of adapters. Batches of named adapters are for inference; a fleet
(`redpeft.fleet`) trains through the same tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from redpeft.errors import UserError
from redpeft.tuner.edit import Edit, apply_edit, effective_edit

BASE = "__base__"


class RowIndex:
    """Which row of a table each sequence of a batch has: `slots`, (sequences,)."""

    def __init__(self, slots: torch.Tensor) -> None:
        self.slots = slots
        self._by_batch: dict[tuple[int, torch.device], torch.Tensor] = {}

    def repeats(self, batch: int) -> int:
        """How often each sequence stands in a batch of this size: beam search and `num_return_sequences` repeat each
        in place, and some models flatten (batch, positions) into one dimension."""
        repeats, rest = divmod(batch, len(self.slots)) if len(self.slots) else (0, 0)
        if rest or not repeats:
            raise UserError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.slots)} and {batch} respectively."
            )
        return repeats

    def rows(self, batch: int, device: torch.device) -> torch.Tensor:
        """The table row of each of a batch's sequences: (batch,)."""
        key = (batch, device)
        if key not in self._by_batch:
            self._by_batch[key] = self.slots.to(device).repeat_interleave(self.repeats(batch))
        return self._by_batch[key]


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
        self.index = RowIndex(torch.tensor([slots[name] for name in names]))


class EditTable:
    """The edits of one site that a batch needs: `rows` (edits, 2, width), each its scale and its bias as they act."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    @classmethod
    @torch.no_grad()
    def of_adapters(cls, edits: Mapping[str, Edit], adapters: Sequence[str]) -> EditTable:
        """Stacked when a forward pass or a generation starts: the edits of these adapters, and in the last row the
        identity, for `"__base__"`. An adapter without an edit here has the identity too.

        Nothing is kept from one call to the next: to find out whether an edit has changed costs as much as stacking
        it.
        """
        like = next(iter(edits.values())).bias
        rows = like.new_zeros(len(adapters) + 1, 2, len(like), dtype=torch.promote_types(like.dtype, torch.float32))
        rows[:, 0] = 1.0
        slots = [slot for slot, name in enumerate(adapters) if name in edits]
        if slots:
            used = [edits[adapters[slot]] for slot in slots]
            offsets = torch.stack([edit.offset for edit in used])
            biases = torch.stack([edit.bias for edit in used])
            units = torch.stack([edit.unit for edit in used])
            origins = rows.new_tensor([[edit.origin] for edit in used])
            rows[slots] = torch.stack(effective_edit(offsets, biases, units, origins), dim=1)
        for slot in slots:  # a table by `effective` alone would be twice the small operations
            if (edit := edits[adapters[slot]]).strength is not None:
                rows[slot] = torch.stack(edit.effective)
        return cls(rows)

    def apply(self, hidden: torch.Tensor, rows: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        """hidden (batch, ..., width), rows (batch,) -> (batch, ..., width), each sequence with its own edit."""
        edits = self.rows.index_select(0, rows).view(rows.shape[0], 2, *[1] * (hidden.dim() - 2), -1)
        scale, bias = edits[:, 0], edits[:, 1]
        return apply_edit(hidden, scale, bias if with_bias else torch.zeros_like(bias))
