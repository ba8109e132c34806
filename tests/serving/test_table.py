"""The table of a site, against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from redpeft.adapters import EffectiveEdit
from redpeft.serving.table import SlotTable

WIDTH = 6
VALUES = st.floats(-74, 74, width=32)


def random_edit(seed: int, width: int = WIDTH) -> EffectiveEdit:
    generator = torch.Generator().manual_seed(seed)
    scale = 20 * torch.randn(width, generator=generator)
    scale[:2] = torch.tensor([-64.0, 74.0])
    return EffectiveEdit(scale, 30 * torch.randn(width, generator=generator))


def by_loop(hidden, slots, edits):
    """In fp64, token by token; slots without an edit leave the token as it is."""
    rows = []
    for row, slot in zip(hidden.double(), slots.tolist(), strict=False):
        edit = edits.get(slot)
        rows.append(row if edit is None else edit.scale.double() * row + edit.bias.double())
    return torch.stack(rows)


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=9), st.integers(0, 99))
def test_each_token_gets_the_edit_in_its_slot(slots, seed):
    token_slots = torch.full((16,), -1)  # the engine's buffer is longer than the batch
    token_slots[: len(slots)] = torch.tensor(slots)
    table = SlotTable(4, WIDTH, token_slots)
    edits = {slot: random_edit(seed + slot) for slot in (0, 1, 3)}  # slot 2 stays empty
    for slot, edit in edits.items():
        table.fill(slot, edit)
    hidden = torch.randn(len(slots), WIDTH, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(table(hidden).double(), by_loop(hidden, token_slots, edits), rtol=1e-6, atol=1e-4)


def test_a_batch_dimension_before_the_tokens_is_none_of_its_business():
    table = SlotTable(2, WIDTH, torch.tensor([1, -1, 0]))
    for slot in (0, 1):
        table.fill(slot, random_edit(slot))
    hidden = torch.randn(3, WIDTH)
    assert torch.equal(table(hidden[None]), table(hidden)[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_without_an_adapter_keeps_every_bit(dtype):
    hidden = torch.tensor([[0.0, -0.0, 1e-30, -3.0, float("inf"), 65504.0]]).to(dtype)
    table = SlotTable(1, WIDTH, torch.tensor([-1]))
    table.fill(0, random_edit(0))
    edited = table(hidden)
    assert edited.dtype == dtype
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(edited.view(bits), hidden.view(bits))  # -0.0 too, which == would not see


def test_16_bit_outputs_are_edited_in_fp32_and_rounded_once():
    hidden = torch.randn(3, WIDTH).bfloat16()
    table, edit = SlotTable(1, WIDTH, torch.zeros(3, dtype=torch.long)), random_edit(1)
    table.fill(0, edit)
    assert torch.equal(table(hidden), (hidden.float() * edit.scale + edit.bias).bfloat16())


def test_a_slot_filled_anew_forgets_what_it_held_and_the_table_stays_in_its_place():
    table = SlotTable(2, WIDTH, torch.tensor([0, 1]))
    place = table.rows.data_ptr()
    hidden = torch.randn(2, WIDTH)
    table.fill(0, random_edit(1))
    table.fill(0, random_edit(2))
    table.fill(1, random_edit(3))
    table.fill(1, None)
    expected = by_loop(hidden, torch.tensor([0, 1]), {0: random_edit(2)})
    torch.testing.assert_close(table(hidden).double(), expected, rtol=1e-6, atol=1e-4)
    assert table.rows.data_ptr() == place


def test_of_partial_sums_one_rank_adds_the_bias():
    edit, slots = random_edit(5), torch.zeros(3, dtype=torch.long)
    parts = torch.randn(2, 3, WIDTH)
    tables = [SlotTable(1, WIDTH, slots, partial=rank > 0) for rank in range(2)]
    for table in tables:
        table.fill(0, edit)
    summed = tables[0](parts[0]) + tables[1](parts[1])
    torch.testing.assert_close(summed, edit.scale * parts.sum(0) + edit.bias, rtol=1e-5, atol=1e-3)


def test_as_a_hook_it_edits_the_output_and_leaves_the_rest():
    class Linear(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden), None

    edit, hidden = random_edit(7), torch.randn(2, 3)
    for kind, output in ((nn.Linear, lambda out: out), (Linear, lambda out: out[0])):
        module = kind(3, WIDTH)
        plain = output(module(hidden))
        table = SlotTable(1, WIDTH, torch.zeros(2, dtype=torch.long))
        table.fill(0, edit)
        module.register_forward_hook(table.hook)
        torch.testing.assert_close(output(module(hidden)), edit.scale * plain + edit.bias)


def test_it_compiles_without_a_break_and_follows_the_table():
    table = SlotTable(2, WIDTH, torch.tensor([1, -1, 0]))
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    hidden = torch.randn(3, WIDTH)
    for seed in (1, 2):
        table.fill(1, random_edit(seed))
        torch.testing.assert_close(compiled(hidden), table(hidden))
