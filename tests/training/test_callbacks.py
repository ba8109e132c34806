from __future__ import annotations

import json

import torch

from redpeft.storage import checkpoint_state, last_checkpoint, to_json
from redpeft.training.callbacks import EpochOrder


def test_an_epochs_order_depends_on_seed_and_epoch_alone():
    order = EpochOrder(50, 8, seed=3)
    first = list(order)
    assert sorted(first) == list(range(50))
    assert list(order) == first
    order.set_epoch(1)
    assert list(order) != first
    again = EpochOrder(50, 8, seed=3)
    again.set_epoch(1)
    assert list(again) == list(order)
    assert list(EpochOrder(50, 8, seed=4)) != first


def test_batches_hold_rows_of_like_length_in_random_order():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (1003,), generator=generator).tolist()
    order = list(EpochOrder(1003, 10, seed=0, lengths=lengths))
    assert sorted(order) == list(range(1003))
    batches = [[lengths[row] for row in order[start : start + 10]] for start in range(0, 1000, 10)]
    padding = sum(max(batch) * len(batch) - sum(batch) for batch in batches)
    plain = list(EpochOrder(1003, 10, seed=0))
    loose = [[lengths[row] for row in plain[start : start + 10]] for start in range(0, 1000, 10)]
    assert padding < 0.2 * sum(max(batch) * len(batch) - sum(batch) for batch in loose)
    longest = [max(batch) for batch in batches]
    assert longest != sorted(longest, reverse=True)


def test_few_rows():
    assert sorted(EpochOrder(3, 8, seed=0, lengths=[5, 1, 2])) == [0, 1, 2]
    assert sorted(EpochOrder(8, 8, seed=0, lengths=list(range(8)))) == list(range(8))


def test_a_checkpoint_that_was_cut_short_does_not_count(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global_st'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert checkpoint_state(tmp_path / "checkpoint-12") is None


def test_numbers_that_json_lacks_become_null():
    assert json.loads(to_json({"a": float("nan"), "b": {"c": float("inf")}, "d": 1.5})) == {
        "a": None, "b": {"c": None}, "d": 1.5,
    }  # fmt: skip
