"""The arithmetic of the edit against a naive fp64 reference, per dtype, with the sizes that trained edits have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redpeft.errors import UserError
from redpeft.tuner.edit import Edit, apply_edit, fold_edit

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def vectors(width, seed=0):
    """A scale and a bias as the released checkpoints have them: scales -64..74, biases up to 147."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.empty(width).uniform_(-64, 74, generator=generator)
    bias = torch.empty(width).uniform_(-147, 147, generator=generator)
    return scale, bias


def naive(hidden, scale, bias):
    out = torch.empty(hidden.shape, dtype=torch.float64)
    for channel in range(hidden.shape[-1]):
        out[..., channel] = scale[channel].double() * hidden[..., channel].double() + bias[channel].double()
    return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_edit_is_the_papers_formula(dtype):
    scale, bias = vectors(48)
    hidden = torch.randn(3, 5, 48).to(dtype)
    if dtype == torch.float64:
        scale, bias = scale.double(), bias.double()
    edited = apply_edit(hidden, scale, bias)
    assert edited.dtype == dtype
    expected = naive(hidden, scale, bias)
    assert (edited.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_those_of_the_formula(dtype):
    scale, bias = (vector.requires_grad_() for vector in vectors(16))
    hidden = torch.randn(2, 3, 16).to(dtype).requires_grad_()
    upstream = torch.randn(2, 3, 16).to(dtype)
    apply_edit(hidden, scale, bias).backward(upstream)
    grad, value = upstream.double(), hidden.detach().double()
    torch.testing.assert_close(scale.grad.double(), (grad * value).sum((0, 1)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad.double(), grad.sum((0, 1)), rtol=1e-4, atol=1e-4)
    rtol = max(TOLERANCE[dtype], 1e-6)
    torch.testing.assert_close(hidden.grad.double(), grad * scale.detach().double(), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_only_the_activation_is_kept_for_backward(dtype, autocast):
    scale, bias = (vector.requires_grad_() for vector in vectors(64))
    hidden = torch.randn(4, 32, 64).to(dtype).requires_grad_()
    kept = []

    def pack(tensor):
        if tensor.numel() > 64:
            kept.append((tensor.data_ptr(), tensor.dtype))
        return tensor

    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), saving:
        apply_edit(hidden, scale, bias)
    assert set(kept) == {(hidden.data_ptr(), dtype)}


sizes = st.integers(1, 9)
floats = st.floats(-80, 80, allow_nan=False, width=32)


@settings(max_examples=60, deadline=None)
@given(out=sizes, inner=sizes, with_bias=st.booleans(), seed=st.integers(0, 999), data=st.data())
def test_folding_a_linear_layer_equals_editing_its_output(out, inner, with_bias, seed, data):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inner, generator=generator, dtype=torch.float64)
    bias = torch.randn(out, generator=generator, dtype=torch.float64) if with_bias else None
    inputs = torch.randn(4, inner, generator=generator, dtype=torch.float64)
    scale, shift = (torch.tensor(data.draw(st.lists(floats, min_size=out, max_size=out))).double() for _ in range(2))
    folded_weight, folded_bias = fold_edit(weight, bias, scale, shift)
    folded = torch.nn.functional.linear(inputs, folded_weight, folded_bias)
    edited = apply_edit(torch.nn.functional.linear(inputs, weight, bias), scale, shift)
    torch.testing.assert_close(folded, edited, rtol=1e-11, atol=1e-11)


def trained_edit(width=8, **kwargs):
    edit = Edit(width, **kwargs)
    edit.randomize()
    return edit


@pytest.mark.parametrize("origin", [1, 0])
def test_what_acts_is_the_origin_and_the_offset_and_the_bias_in_units(origin):
    edit = trained_edit(unit=0.3, origin=origin)
    offset, bias = (vector.detach().double() for vector in (edit.offset, edit.bias))
    hidden = torch.randn(5, 8)
    torch.testing.assert_close(edit(hidden).double(), naive(hidden, origin + offset, 0.3 * bias), rtol=1e-5, atol=1e-5)
    d, added = edit.difference
    torch.testing.assert_close(hidden + d * hidden + added, edit(hidden))


floats_of_scales = st.floats(-64, 74, allow_nan=False, width=32)


@settings(max_examples=60, deadline=None)
@given(scale=floats_of_scales, bias=floats_of_scales, unit=st.floats(2.0**-20, 2.0**20, width=32))
def test_another_origin_and_unit_change_no_more_than_rounding_does(scale, bias, unit):
    edit = Edit(1, unit=1.0, origin=0)
    edit.load_state_dict({"scale": torch.tensor([scale]), "bias": torch.tensor([bias]), "unit": torch.ones(1)})
    assert edit.effective[0].item() == scale
    edit.training_origin = 1.0
    edit.express(unit)
    assert [name for name, _ in edit.named_parameters()] == ["scale_offset", "bias"]  # in their order
    assert abs(1 + edit.offset.double().item() - scale) <= 2**-24 * max(1, abs(scale - 1))
    assert edit.effective[1].item() == pytest.approx(bias, rel=1e-6, abs=1e-37)
    assert edit.unit.item() == pytest.approx(unit, rel=1e-6)


@pytest.mark.parametrize(("own", "given"), [(1, 0), (0, 1)])
def test_values_counted_from_another_origin_are_loaded_as_what_they_are(own, given):
    values = trained_edit(origin=given, unit=0.25)
    edit = Edit(8, origin=own)
    edit.load_state_dict(values.state_dict())
    assert edit.origin == own
    torch.testing.assert_close(edit.effective, values.effective, rtol=2**-23, atol=2**-24)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"scale"):
        edit.load_state_dict({"bias": torch.zeros(8), "unit": torch.ones(1)})


def test_an_imported_adapter_takes_the_origin_of_what_it_learned_since():
    trained = trained_edit(unit=0.25)
    edit = Edit(8, origin=0)
    edit.training_origin = 1.0
    edit.load_state_dict(trained.state_dict())
    assert edit.origin == 1
    assert torch.equal(edit.scale_offset, trained.scale_offset)


def test_weight_decay_leads_to_the_identity_or_by_the_papers_rule_to_zero():
    for origin, goal in ((1, 1.0), (0, 0.0)):
        edit = Edit(4, origin=origin)
        with torch.no_grad():
            edit.offset.add_(3.0)
        optimizer = torch.optim.AdamW(edit.parameters(), lr=0.1, weight_decay=1.0)
        for _ in range(200):
            for vector in edit.parameters():
                vector.grad = torch.zeros_like(vector)
            optimizer.step()
        torch.testing.assert_close(edit.effective[0], torch.full((4,), goal))


def test_adams_path_is_the_papers_without_decay():
    generator = torch.Generator().manual_seed(0)
    hidden, target = torch.randn(2, 32, 8, generator=generator)
    paths = []
    for origin in (0, 1):
        edit = Edit(8, unit=1.0, origin=origin)
        optimizer = torch.optim.AdamW(edit.parameters(), lr=0.03, weight_decay=0)
        for _ in range(50):
            optimizer.zero_grad()
            (edit(hidden) - target).square().mean().backward()
            optimizer.step()
        paths.append(edit.effective)
    torch.testing.assert_close(*paths, rtol=0, atol=2e-6)
    assert (paths[0][0] - 1).abs().min() > 0.1


def test_offsets_in_16_bits_learn_what_offsets_in_32_do():
    """A scale would not: near 1 the step of bf16 is 2^-7 and 2^-8."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 8, generator=generator)
    target = 1.02 * hidden + 0.01
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        edit = Edit(8, unit=1.0, dtype=dtype)
        optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-3, weight_decay=0)
        for _ in range(100):
            optimizer.zero_grad()
            loss = (edit(hidden) - target).square().mean()
            loss.backward()
            optimizer.step()
        losses[dtype] = loss.item()
    assert max(losses.values()) < 0.01 * (target - hidden).square().mean()


@pytest.mark.parametrize("origin", [1, 0])
def test_a_unit_measured_late_changes_no_output(origin):
    edit = trained_edit(origin=origin)
    hidden = torch.randn(5, 8)
    before = edit(hidden)
    edit.express(0.037)
    torch.testing.assert_close(edit(hidden), before)
    assert float(edit.unit) == pytest.approx(0.037)


def test_an_adam_step_of_the_bias_moves_the_output_by_the_rate_times_the_unit():
    edit = Edit(8)
    edit.express(30.0)
    optimizer = torch.optim.AdamW(edit.parameters(), lr=0.01, weight_decay=0)
    hidden = torch.full((1, 8), 30.0)
    edit(hidden).sum().backward()
    optimizer.step()
    # scale moves the output by lr * h, bias by lr * unit: the same share of its size
    torch.testing.assert_close(edit(hidden), hidden - 0.01 * hidden - 0.01 * 30.0)


@pytest.mark.parametrize("learned", ["scale", "bias"])
def test_what_is_not_learned_is_saved_but_is_no_parameter(learned):
    edit = Edit(4, use_scale=learned == "scale", use_bias=learned == "bias")
    assert [name for name, _ in edit.named_parameters()] == [{"scale": "scale_offset", "bias": "bias"}[learned]]
    assert set(edit.state_dict()) == {"scale_offset", "bias", "unit"}
    edit(torch.randn(2, 4)).sum().backward()
    assert edit.unit_pending == (learned == "bias")


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_module_casts_leave_the_edit_alone(cast):
    edit = trained_edit()
    before = {name: tensor.clone() for name, tensor in edit.state_dict().items()}
    torch.nn.Sequential(edit).to(cast)
    for name, tensor in edit.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])
    assert edit.double().bias.dtype == torch.float64


def test_a_cast_of_the_data_ends_where_training_starts():
    """What is new loses nothing by it; what was loaded is rounded once."""
    edit = trained_edit().eval()
    loaded = Edit(8).eval()
    loaded.load_state_dict(edit.state_dict())
    for parameter in loaded.parameters():
        parameter.data = parameter.data.bfloat16()
    assert loaded(torch.randn(2, 8)).dtype == torch.float32
    loaded.train()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, edit.state_dict()[name], rtol=2**-8, atol=0)


def test_a_measured_unit_is_known_again_after_loading():
    edit = Edit(4)
    edit.express(0.5)
    again = Edit(4)
    assert again.unit_pending
    again.load_state_dict(edit.state_dict())
    assert not again.unit_pending
    edit.load_state_dict(Edit(4).state_dict())
    assert edit.unit_pending


def test_a_unit_that_was_measured_as_exactly_1_is_known():
    """Not as 1, which stands for a unit that was not measured, but as the number next to it."""
    edit, again = Edit(4), Edit(4)
    edit.express(1.0)
    assert not edit.unit_pending
    again.load_state_dict(edit.state_dict())
    assert not again.unit_pending
    assert again.unit.item() == 1 + 2**-23


@pytest.mark.parametrize("mark", ["_hp_mapping", "ds_id", "_fsdp_flattened"])
def test_what_deepspeed_and_fsdp_manage_is_left_to_them(mark):
    edit = trained_edit().eval()
    for parameter in edit.parameters():
        parameter.data = parameter.data.bfloat16()
        setattr(parameter, mark, object())
    lent = edit.offset.data_ptr()
    edit.train()
    assert edit.offset.data_ptr() == lent
    edit = trained_edit(origin=0)
    setattr(edit.scale, mark, object())
    edit.training_origin = 1.0
    with pytest.raises(UserError, match=r"sharded already: call redpeft\.calibrate\(model\) before"):
        edit.express(0.5)
