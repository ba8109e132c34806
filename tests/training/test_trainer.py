from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from redpeft.tasks.classification import ClassificationTask
from redpeft.training.recipe import load_recipe
from redpeft.training.trainer import EpochOrder, arguments


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.06, 60), (1, 1), (500, 500)])
def test_warm_up_is_a_share_of_the_steps_or_their_number(tmp_path, warmup, steps):
    recipe = load_recipe(None, {"base": "m", "data": "d", "warmup": warmup, "learning_rate": 1e-3})
    task = ClassificationTask({}, "single_label_classification", ["a", "b"], "accuracy")
    assert arguments(recipe, tmp_path, task, TrainingArguments, {}).get_warmup_steps(1000) == steps


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
