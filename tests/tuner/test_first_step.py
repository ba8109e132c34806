"""The warnings at an optimiser's first step: rates at which an edit stays where it is, units that are missing."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

from redpeft import RedConfig


def rate_warnings(model: nn.Module, make=torch.optim.AdamW, schedule=None, steps: int = 1, **options) -> list[str]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(trained, **options)
    scheduler = schedule and torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            sum(p.square().sum() for p in trained).backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
    return [str(each.message) for each in caught if "teaches RED" in str(each.message)]


@pytest.fixture
def adapted(tiny):
    return lambda **options: get_peft_model(tiny.llama(), RedConfig(**options))


def test_trainers_default_rates_get_one_warning(adapted):
    model = adapted()
    [message] = rate_warnings(model, lr=5e-5, steps=3)
    assert message.startswith("a learning rate of 5e-05 teaches RED almost nothing: its edits learn at about 0.03")
    assert not _global_optimizer_pre_hooks
    assert rate_warnings(model, lr=5e-5) == []
    assert rate_warnings(adapted(), lr=5e-5)  # another model


def test_the_rate_is_that_after_the_warm_up(adapted):
    assert rate_warnings(adapted(), lr=3e-2, schedule=lambda step: step / 100) == []
    assert rate_warnings(adapted(), lr=2e-5, schedule=lambda step: step / 100)


def test_nothing_is_said_of_other_rates_rules_optimisers_and_models(adapted):
    assert rate_warnings(adapted(), lr=3e-2) == []
    assert rate_warnings(adapted(), lr=0.0) == []
    assert rate_warnings(adapted(unit=1), lr=2e-5) == []
    assert rate_warnings(adapted(), torch.optim.SGD, lr=1e-4) == []
    model = adapted()
    assert rate_warnings(nn.Linear(2, 2), lr=1e-5) == []
    assert rate_warnings(copy.deepcopy(model), lr=3e-2) == []
    assert rate_warnings(model, lr=1e-5)  # still, after steps that were not its own


def test_a_loop_in_evaluation_mode_is_warned_that_units_are_missing(tiny, adapted):
    def step(model: nn.Module) -> None:
        model(**tiny.batch()).loss.backward()
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2).step()

    with pytest.warns(
        UserWarning, match=r"units of RED's biases have not been measured.* call model.train\(\) or red"
    ):
        step(adapted())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*units of RED")
        step(adapted().train())


def test_a_copy_of_a_model_is_watched_too(tiny, adapted):
    model = copy.deepcopy(adapted()).train()
    model(**tiny.batch()).loss.backward()
    assert len(rate_warnings(model, lr=5e-5, steps=2)) == 1


def test_other_hooks_on_steps_run_too(adapted):
    model, seen = adapted(), []
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append(1))
    try:
        assert len(rate_warnings(model, lr=5e-5, steps=2)) == 1
        assert seen == [1, 1]
    finally:
        handle.remove()
    assert rate_warnings(adapted(), lr=5e-5)
    assert not _global_optimizer_pre_hooks
