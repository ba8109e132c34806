from __future__ import annotations

import pytest
from transformers import TrainingArguments

from redpeft.tasks import ClassificationTask
from redpeft.training.recipe import load_recipe
from redpeft.training.trainer import arguments


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.06, 60), (1, 1), (500, 500)])
def test_warm_up_is_a_share_of_the_steps_or_their_number(tmp_path, warmup, steps):
    recipe = load_recipe(None, {"base": "m", "data": "d", "warmup": warmup, "learning_rate": 1e-3})
    task = ClassificationTask({}, "single_label_classification", ["a", "b"], "accuracy")
    assert arguments(recipe, tmp_path, task, TrainingArguments, {}).get_warmup_steps(1000) == steps
