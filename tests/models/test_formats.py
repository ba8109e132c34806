"""bitsandbytes' packing of 4-bit weights, on any machine, and how slow bf16 is."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from redpeft.errors import UserError
from redpeft.models import PACKS, bf16_slowdown, leave_unpacked


class Packing(nn.Linear):
    """A linear layer with bitsandbytes' switch."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__(4, 4)
        setattr(self, PACKS, True)
        self.weight.quant_state = SimpleNamespace(packing_format_for_cpu=packed)


def test_weights_stay_unpacked():
    model = nn.Sequential(Packing(), nn.Linear(4, 4))
    leave_unpacked(model)
    assert not getattr(model[0], PACKS)
    assert not hasattr(model[1], PACKS)


def test_packed_weights_are_refused_and_nothing_is_changed():
    model = nn.Sequential(Packing(), Packing(packed=True))
    with pytest.raises(UserError, match=r"packed for inference \(at 1: .*load the base model again and add the ad"):
        leave_unpacked(model)
    assert all(getattr(linear, PACKS) for linear in model)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no instructions for bf16")
def test_bf16_is_slow_without_instructions_for_it():
    with_them = bf16_slowdown()
    with torch.backends.mkldnn.flags(enabled=False):  # every CPU is then as if it had none
        assert bf16_slowdown() > 2 * with_them
