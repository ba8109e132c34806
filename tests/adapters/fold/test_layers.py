"""One layer folded, beside a naive reference in fp64; and what rounding costs, beside outputs computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redpeft.adapters.fold.layers import fold_layer
from redpeft.adapters.folder import EffectiveEdit
from redpeft.errors import UserError


def layer(width=24, inner=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, inner, generator=generator), torch.randn(width, generator=generator)


def edit_of(width=24, low=-64.0, high=74.0, size=147.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return EffectiveEdit(
        torch.empty(width).uniform_(low, high, generator=generator),
        torch.empty(width).uniform_(-size, size, generator=generator),
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), with_bias=st.booleans(), dtype=st.sampled_from(["float32", "bfloat16", "float64"]))
def test_the_bias_is_the_edit_of_the_bias(seed, with_bias, dtype):
    weight, bias = layer(seed=seed)
    weight, bias = weight.to(getattr(torch, dtype)), bias.to(getattr(torch, dtype)) if with_bias else None
    edit = edit_of(seed=seed)
    found, exactness = fold_layer("site", weight, bias, edit, 1.0, torch.float64)
    expected = edit.bias.double() if bias is None else edit.scale.double() * bias.double() + edit.bias.double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-4)
    assert exactness.error < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", [2**-4, 2**-7, 2**-10])
@pytest.mark.parametrize("unit", [1.0, 0.05])
def test_the_figures_are_those_of_outputs(dtype, distance, unit):
    """`error` and `lost` against the outputs of many random inputs, of the size that gives outputs of the unit."""
    weight, _ = layer(width=64, inner=256)
    weight = (weight / 30).to(dtype)
    edit = edit_of(64, 1 - distance, 1 + distance, size=distance * (1 if unit == 1 else unit))
    bias, exactness = fold_layer("site", weight, None, edit, unit, dtype)
    wide = weight.double()
    size = 1.0 if unit == 1 else unit / wide.norm(dim=1).median().item()
    inputs = size * torch.randn(20_000, 256, dtype=torch.float64)
    plain = inputs @ wide.T
    exact = plain * edit.scale.double() + edit.bias.double()
    stored = inputs @ (edit.scale[:, None] * weight.float()).to(dtype).double().T + bias.double()
    assert exactness.error == pytest.approx(((stored - exact).norm() / exact.norm()).item(), rel=0.05)
    assert exactness.lost == pytest.approx(((stored - exact).norm() / (exact - plain).norm()).item(), rel=0.05)


def test_scales_within_2_to_the_minus_9_vanish_in_bf16():
    weight = torch.ones(6, 8).to(torch.bfloat16)
    scale = torch.tensor([1.0, 1 + 2**-10, 1 - 2**-10, 1 + 2**-7, -1.0, 3.0])
    _, exactness = fold_layer("site", weight, None, EffectiveEdit(scale, torch.zeros(6)), 1.0, torch.bfloat16)
    assert exactness.vanished == pytest.approx(2 / 5)  # one of the six is exactly 1
    assert exactness.is_poor
    _, exactness = fold_layer("site", weight, None, EffectiveEdit(scale, torch.zeros(6)), 1.0, torch.float32)
    assert exactness.vanished == 0
    assert not exactness.is_poor


def test_an_edit_of_the_bias_alone_loses_no_scale():
    """The released Llama-2 checkpoint: every scale is exactly 1."""
    weight, _ = layer()
    edit = EffectiveEdit(torch.ones(24), edit_of().bias)
    _, exactness = fold_layer("site", weight.to(torch.bfloat16), None, edit, 1.0, torch.bfloat16)
    assert exactness.vanished == 0
    assert exactness.lost < 2**-8


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_values_beyond_the_range_are_an_error_with_the_site_s_name(part):
    weight, _ = layer()
    scale, bias = torch.full((24,), 2.0), torch.zeros(24)
    (scale if part == "weight" else bias)[5] = 1e6
    with pytest.raises(
        UserError, match=r"a\.site: the folded layer has values up to .*torch.float16 ends at 6.55e\+04"
    ):
        fold_layer("a.site", weight, None, EffectiveEdit(scale, bias), 1.0, torch.float16)
