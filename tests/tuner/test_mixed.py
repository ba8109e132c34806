"""Mixed batches against one adapter at a time: identical, distinct, uneven, repeated and unknown names."""

import pytest
import torch
from torch import nn

from redpeft.errors import UserError
from redpeft.tuner.edit import Edit, apply_edit
from redpeft.tuner.mixed import BASE, MixedBatch, edit_rows, stack_edits

NAMES = ["a", "b", "c"]


def edits(width=6, names=("a", "b")):
    made = nn.ModuleDict()
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        made[name] = Edit(width)
        made[name].randomize()
        made[name].express(unit=0.3)
        with torch.no_grad():
            made[name].offset.mul_(30)
    return made


def one_by_one(edits, names, hidden):
    rows = [
        apply_edit(hidden[i], *edits[name].effective) if name in edits else hidden[i] for i, name in enumerate(names)
    ]
    return torch.stack(rows).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)], ids=str)
@pytest.mark.parametrize(
    "names", [["a"] * 4, ["a", "b", BASE, "c"], ["b", "a", "a", "a"], [BASE] * 4, ["c", "b", "c", "b"]], ids=",".join
)
def test_each_row_gets_its_own_edit(names, shape, dtype):
    some = edits()  # "c" has no edit at this site: the identity
    hidden = torch.randn(4, *shape).to(dtype)
    batch = MixedBatch(names, NAMES)
    mixed = edit_rows(stack_edits(some, batch.adapters), batch.index, hidden)
    assert mixed.dtype == dtype
    assert torch.equal(mixed, one_by_one(some, names, hidden))


def test_beams_stand_beside_each_other():
    batch = MixedBatch(["a", "b"], NAMES)
    assert batch.index.rows(6, torch.device("cpu")).tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.index.rows(2, torch.device("cpu")).tolist() == [0, 1]


def test_wrong_names_and_counts_are_errors():
    with pytest.raises(UserError, match="unknown adapters in adapter_names: x; loaded: a, b, c"):
        MixedBatch(["a", "x"], NAMES)
    for names in (["a", "b"], []):
        message = f"the same as the number of inputs, but got {len(names)} and 3 respectively"
        with pytest.raises(UserError, match=message):
            MixedBatch(names, NAMES).index.rows(3, torch.device("cpu"))
