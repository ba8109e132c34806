"""Many adapters in one batch: which row belongs to which adapter, and each site's table of edits.

    table (adapters, 2, width)  ──gather──>  (rows, 2, width)  ──>  h'[row] = scale[row] * h[row] + bias[row]

One gather a site, whatever the number of adapters. Batches of named adapters are for inference; a fleet
(`redpeft.fleet`) trains through the same tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

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


@torch.compiler.disable
def run_by_adapter(modules: Mapping[str, nn.Module], batch: MixedBatch, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run each sequence through its adapter's copy of a module (`modules_to_save`, such as a head).

    The first tensor among the arguments is (batch, ...), as others may be; others go to each copy as they are. The
    outputs are put back into its order. An adapter without a copy uses the base's.
    """
    hidden = next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
    repeats = batch.index.repeats(hidden.shape[0])
    names = [name for name in batch.names for _ in range(repeats)]
    parts, order = [], []
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        own_args, own_kwargs = tree_map(partial(_rows_of, rows, len(names)), (args, kwargs))
        parts.append(modules[name if name in modules else BASE](*own_args, **own_kwargs))
        order += rows
    return torch.cat(parts)[torch.tensor(order, device=hidden.device).argsort()]


def _rows_of(rows: list[int], count: int, value: Any) -> Any:
    """These rows of a tensor that has one for each of the batch's; anything else as it is."""
    return value[rows] if has_rows(value, count) else value


def has_rows(value: Any, count: int) -> bool:
    return torch.is_tensor(value) and value.dim() > 0 and value.shape[0] == count
