"""The arithmetic of the edit against a naive fp64 reference, per dtype, with the sizes that trained edits have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redpeft.method.edit import Edit, apply_edit, fold_edit

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
    edit.reset(identity=False)
    return edit


def test_a_unit_measured_late_changes_no_output():
    edit = trained_edit()
    hidden = torch.randn(5, 8)
    before = edit(hidden)
    edit.set_unit(torch.tensor(0.037))
    torch.testing.assert_close(edit(hidden), before)
    assert float(edit.unit) == pytest.approx(0.037)
    torch.testing.assert_close(edit.shift, edit.unit * edit.bias)


def test_an_adam_step_of_the_bias_moves_the_output_by_the_rate_times_the_unit():
    edit = Edit(8)
    edit.set_unit(30.0)
    optimizer = torch.optim.AdamW(edit.parameters(), lr=0.01, weight_decay=0)
    hidden = torch.full((1, 8), 30.0)
    edit(hidden).sum().backward()
    optimizer.step()
    # scale moves the output by lr * h, bias by lr * unit: the same share of its size
    torch.testing.assert_close(edit(hidden), hidden - 0.01 * hidden - 0.01 * 30.0)


@pytest.mark.parametrize("learned", ["scale", "bias"])
def test_what_is_not_learned_is_saved_but_is_no_parameter(learned):
    edit = Edit(4, use_scale=learned == "scale", use_bias=learned == "bias")
    assert [name for name, _ in edit.named_parameters()] == [learned]
    assert set(edit.state_dict()) == {"scale", "bias", "unit"}
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
    assert edit.double().scale.dtype == torch.float64


@pytest.mark.parametrize("start", ["at .train()", "at the first forward"])
def test_a_cast_of_the_data_is_undone_without_loss_when_training_starts(start):
    edit = trained_edit().eval()
    loaded = Edit(8).eval()
    loaded.load_state_dict(edit.state_dict())
    for parameter in loaded.parameters():
        parameter.data = parameter.data.bfloat16()
    loaded.training = start == "at the first forward"
    if start == "at .train()":
        loaded.train()
    else:
        loaded(torch.randn(2, 8))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, edit.state_dict()[name]), name


def test_a_cast_after_learning_is_an_error():
    edit = Edit(8)
    optimizer = torch.optim.SGD(edit.parameters(), lr=0.1)
    edit(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    for parameter in edit.parameters():
        parameter.data = parameter.data.bfloat16()
    with pytest.raises(RuntimeError, match=r"cast to torch.bfloat16 after it had learned .* cast the base model only"):
        edit(torch.randn(2, 8))
    edit.eval()(torch.randn(2, 8))  # inference with it stays possible


def test_a_measured_unit_is_known_again_after_loading():
    edit = Edit(4)
    edit.set_unit(0.5)
    again = Edit(4)
    assert again.unit_pending
    again.load_state_dict(edit.state_dict())
    assert not again.unit_pending
    fresh = Edit(4)
    fresh.load_state_dict(Edit(4).state_dict())
    assert fresh.unit_pending


def test_what_deepspeed_manages_is_left_to_it():
    edit = trained_edit().eval()
    for parameter in edit.parameters():
        parameter.data = parameter.data.bfloat16()
        parameter._hp_mapping = object()
    lent = edit.scale.data_ptr()
    edit.train()
    assert edit.scale.data_ptr() == lent
