"""Many adapters in one batch: which row belongs to which adapter, and each site's table of edits.

    table (adapters, 2, width)  ──gather──>  (rows, 2, width)  ──>  h'[row] = scale[row] * h[row] + bias[row]

One gather a site, whatever the number of adapters. Batches of named adapters are for inference; a fleet
(`redpeft.fleet`) trains through the same tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch

from redpeft.errors import UserError
from redpeft.tuner.edit import Edit, apply_edit, effective_edit
from redpeft.tuner.layer import Editor, RedLayer

BASE = "__base__"


class RowIndex:
    """Which row of a table each sequence of a batch has: `slots`, (sequences,)."""

    def __init__(self, slots: torch.Tensor) -> None:
        self.slots = slots
        self._by_batch: dict[tuple[int, torch.device], torch.Tensor] = {}

    def rows(self, batch: int, device: torch.device) -> torch.Tensor:
        """The table row of each row of a batch of this size: (batch,). There may be several of each sequence: beam
        search and `num_return_sequences` repeat each in place, and some models flatten (batch, positions)."""
        key = (batch, device)
        if key not in self._by_batch:
            repeats, rest = divmod(batch, len(self.slots)) if len(self.slots) else (0, 0)
            if rest or not repeats:
                raise UserError(
                    "Length of `adapter_names` should be the same as the number of inputs, but got "
                    f"{len(self.slots)} and {batch} respectively."
                )
            self._by_batch[key] = self.slots.to(device).repeat_interleave(repeats)
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
        self.adapters = list(dict.fromkeys(names))
        self.index = RowIndex(torch.tensor([self.adapters.index(name) for name in names]))

    @torch.compiler.disable  # likewise
    def editors(self, layers: Iterable[RedLayer]) -> dict[RedLayer, Editor]:
        """The layers' editors: each sequence of the batch has the edits of its own adapter."""
        return {
            layer: partial(edit_rows, stack_edits(layer.redpeft_edit, self.adapters), self.index)
            for layer in layers
            if layer.redpeft_edit and not layer.disable_adapters
        }


@torch.no_grad()
def stack_edits(edits: Mapping[str, Edit], adapters: Sequence[str]) -> torch.Tensor:
    """A site's table for these adapters: (adapters, 2, width), each row a scale and a bias as they act.

    An adapter without an edit here has the identity, and so has `"__base__"`. Nothing is kept from one forward pass or
    generation to the next: to find out whether an edit has changed costs as much as stacking it.
    """
    like = next(iter(edits.values())).bias
    table = like.new_zeros(len(adapters), 2, len(like), dtype=torch.promote_types(like.dtype, torch.float32))
    table[:, 0] = 1.0
    slots = [slot for slot, name in enumerate(adapters) if name in edits]
    if slots:
        used = [edits[adapters[slot]] for slot in slots]
        offsets, biases, units = (
            torch.stack([getattr(edit, name) for edit in used]) for name in ("offset", "bias", "unit")
        )
        origins = table.new_tensor([[edit.origin] for edit in used])
        table[slots] = torch.stack(effective_edit(offsets, biases, units, origins), dim=1)
    for slot in slots:  # a table by `effective` alone would be twice the small operations
        if (edit := edits[adapters[slot]]).strength is not None:
            table[slot] = torch.stack(edit.effective)
    return table


def edit_rows(table: torch.Tensor, index: RowIndex, hidden: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
    """Edit each sequence of a batch by its row of a site's table: hidden (batch, ..., width) -> the same."""
    rows = table.index_select(0, index.rows(hidden.shape[0], hidden.device))
    scale, bias = rows.view(len(rows), 2, *[1] * (hidden.dim() - 2), -1).unbind(1)
    return apply_edit(hidden, scale, bias if with_bias else torch.zeros_like(bias))
