"""Composed edits: their algebra, agreement with running the edits one after another, and adapters made in a model."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model

from redpeft import RedConfig
from redpeft.errors import UserError
from redpeft.tuner.compose import combine_configs, inverse, sequence, weighted_sum
from redpeft.tuner.edit import Edit, apply_edit

WIDTH = 4
IDENTITY = (torch.zeros(WIDTH).double(), torch.zeros(WIDTH).double())


def vectors(low, high, zero=None):
    """Values of fp32, none of them near `zero`."""
    values = st.floats(low, high, allow_nan=False, width=32).filter(lambda x: zero is None or abs(x - zero) >= 0.01)
    return st.lists(values, min_size=WIDTH, max_size=WIDTH).map(lambda values: torch.tensor(values).double())


edits = st.tuples(vectors(-65, 73), vectors(-147, 147))  # differences: scales from -64 to 74
invertible = st.tuples(vectors(-65, 73, zero=-1), vectors(-147, 147))
weights = st.floats(-2, 2, width=32)
hiddens = vectors(-50, 50)
every_edit = settings(max_examples=60, deadline=None)


def close(left, right):
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-6)


def apply(hidden, edit):
    return apply_edit(hidden, 1 + edit[0], edit[1])


def in_sequence(*edits):
    return sequence(edits, [1.0] * len(edits))


@every_edit
@given(a=edits, b=edits, c=edits, hidden=hiddens)
def test_a_sequence_is_running_one_after_another(a, b, c, hidden):
    close([apply(hidden, in_sequence(a, b, c))], [apply(apply(apply(hidden, a), b), c)])


@every_edit
@given(a=edits, b=edits, c=edits)
def test_sequences_are_associative_with_an_identity(a, b, c):
    close(in_sequence(in_sequence(a, b), c), in_sequence(a, in_sequence(b, c)))
    close(in_sequence(IDENTITY, a), a)
    close(in_sequence(a, IDENTITY), a)


@every_edit
@given(a=invertible, b=invertible)
def test_an_inverse_undoes_from_both_sides(a, b):
    close(in_sequence(a, inverse(a)), IDENTITY)
    close(in_sequence(inverse(a), a), IDENTITY)
    close(inverse(inverse(a)), a)
    together = in_sequence(a, b)
    close(in_sequence(together, in_sequence(inverse(b), inverse(a))), IDENTITY)


@every_edit
@given(a=edits, b=edits, u=weights, v=weights, hidden=hiddens)
def test_a_weighted_sum_adds_what_the_edits_change(a, b, u, v, hidden):
    changes = [apply(hidden, edit) - hidden for edit in (a, b)]
    close([apply(hidden, weighted_sum([a, b], [u, v]))], [hidden + u * changes[0] + v * changes[1]])


@every_edit
@given(a=edits, b=edits, u=weights, v=weights, w=weights)
def test_weighted_sums_are_linear(a, b, u, v, w):
    close(weighted_sum([a, b], [u, v]), weighted_sum([b, a], [v, u]))
    nested = weighted_sum([weighted_sum([a, b], [u, v])], [w])
    close(nested, weighted_sum([a, b], [w * u, w * v]))
    close(weighted_sum([weighted_sum([a], [u]), weighted_sum([b], [v])], [1, 1]), weighted_sum([a, b], [u, v]))
    close(weighted_sum([a, b, IDENTITY], [u, v, w]), weighted_sum([a, b], [u, v]))


@every_edit
@given(a=edits, b=edits)
def test_strengths_0_and_1_and_the_average(a, b):
    for one, same in zip(weighted_sum([a], [1.0]), a, strict=True):
        assert torch.equal(one, same)
    close(weighted_sum([a], [0.0]), IDENTITY)
    close(weighted_sum([a, b], [0.3, 0.7]), [0.3 * a[i] + 0.7 * b[i] for i in (0, 1)])
    close(weighted_sum([a, weighted_sum([a], [-1.0])], [1.0, 1.0]), IDENTITY)


def test_sums_keep_small_changes_in_fp32():
    small = (torch.full((WIDTH,), 1e-9), torch.ones(WIDTH))
    torch.testing.assert_close(weighted_sum([small, small], [3.0, 0.7])[0], 3.7 * small[0])


def test_weights_are_strengths_in_a_sequence():
    a, b = (torch.tensor([1.0]), torch.tensor([10.0])), (torch.tensor([2.0]), torch.tensor([4.0]))
    d, bias = sequence([a, b], [0.5, -1.0])  # h -> 1.5 h + 5 -> -(1.5 h + 5) - 4
    assert (d.item(), bias.item()) == (-2.5, -9.0)


def test_configurations():
    a = {"target_modules": ["x", "y"], "sites": "ffn", "base_fingerprint": None, "use_bias": False}
    b = {"target_modules": {"y", "x"}, "sites": ["ffn"], "base_fingerprint": {"samples": [1]}, "use_bias": False}
    c = {"target_modules": ["z"], "sites": "qkv", "base_fingerprint": {"samples": [2]}, "use_bias": False}
    same = combine_configs([a, b, c], {"x", "y"})
    assert (same["sites"], same["base_fingerprint"]) == (["ffn"], {"samples": [1]})
    assert (same["use_scale"], same["use_bias"]) == (True, False)
    assert combine_configs([a, {**b, "use_bias": True}], {"x", "y"})["use_bias"] is True
    more = combine_configs([a, b, c], {"x", "y", "z"})
    assert (more["sites"], more["base_fingerprint"], more["target_modules"]) == (None, None, ["x", "y", "z"])


# In a model


@pytest.fixture
def llama(tiny):
    """A Llama with the adapters "a" (FFN and attention) and "b" (FFN, another unit), "a" active."""
    model = get_peft_model(tiny.llama(), RedConfig(task_type="CAUSAL_LM", sites=["ffn", "attention"]), "a").eval()
    model.add_adapter("b", RedConfig(task_type="CAUSAL_LM"))
    tiny.far(model, "a", seed=1)
    tiny.far(model, "b", seed=2)
    for edit in tiny.edits(model, "b"):
        edit.express(unit=0.125)
    return model


@torch.no_grad()
def logits(model, tiny, adapter=None, **options):
    if adapter:
        model.set_adapter(adapter)
    return model(input_ids=tiny.tokens(), **options).logits


def by_formula(model, weights):
    """Scale and shift of each site: the weighted sum of the differences, by hand."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "redpeft_edit"):
            scale, bias = torch.ones(layer.width), torch.zeros(layer.width)
            for adapter, weight in weights.items():
                if adapter in layer.redpeft_edit:
                    edit = layer.redpeft_edit[adapter]
                    scale = scale + weight * edit.offset  # counted from 1
                    bias = bias + weight * edit.unit * edit.bias
            found[name] = (scale, bias)
    return found


def test_add_weighted_adapter_by_formula(llama, tiny):
    trainable = [name for name, parameter in llama.named_parameters() if parameter.requires_grad]
    llama.add_weighted_adapter(["b", "a"], [0.7, -0.4], "mix")
    assert [name for name, parameter in llama.named_parameters() if parameter.requires_grad] == trainable
    assert llama.active_adapters == ["a"]
    for name, (scale, bias) in by_formula(llama, {"a": -0.4, "b": 0.7}).items():
        edits = llama.get_submodule(name).redpeft_edit
        torch.testing.assert_close(edits["mix"].effective, (scale, bias), rtol=1e-5, atol=1e-5)
        assert edits["mix"].unit == (edits["b"].unit if "b" in edits else edits["a"].unit)
    assert llama.peft_config["mix"].target_modules == llama.peft_config["a"].target_modules


def test_a_sequence_is_several_active_adapters(llama, tiny):
    llama.base_model.set_adapter(["a", "b"])
    expected = logits(llama, tiny)
    llama.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both", combination_type="sequence")
    torch.testing.assert_close(logits(llama, tiny, "both"), expected, rtol=1e-4, atol=1e-4)
    llama.add_weighted_adapter(["b", "a"], [1.0, 1.0], "turned", combination_type="sequence")
    assert (logits(llama, tiny, "turned") - expected).abs().max() > 0.01


def test_a_composed_adapter_is_saved_and_loaded(llama, tiny, tmp_path):
    llama.add_weighted_adapter(["b"], [0.5], "halved")
    expected = logits(llama, tiny, "halved")
    llama.save_pretrained(tmp_path, selected_adapters=["halved"])
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "halved").eval()
    assert torch.equal(logits(again, tiny), expected)
    assert again.peft_config["default"].base_fingerprint == llama.peft_config["b"].base_fingerprint is not None


def test_strength_in_forward_mixed_batches_and_merges(llama, tiny):
    stored = tiny.values(llama, "b")
    llama.add_weighted_adapter(["b"], [-0.6], "weaker")
    expected = logits(llama, tiny, "weaker")
    full = logits(llama, tiny, "b")
    llama.set_scale("b", -0.6)
    tiny.assert_same(tiny.values(llama, "b"), stored)
    torch.testing.assert_close(logits(llama, tiny, "b"), expected, rtol=1e-5, atol=1e-5)
    names = ["a", "b", "weaker", "__base__"]
    mixed = logits(llama, tiny, adapter_names=names)
    torch.testing.assert_close(mixed[1], expected[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[0], logits(llama, tiny, "a")[0], rtol=1e-4, atol=1e-4)
    llama.set_adapter("b")
    llama.merge_adapter()
    torch.testing.assert_close(logits(llama, tiny), expected, rtol=1e-4, atol=1e-4)
    llama.unmerge_adapter()
    llama.set_scale("b", 0)
    with llama.disable_adapter():
        base = logits(llama, tiny)
    assert torch.equal(logits(llama, tiny), base)
    llama.set_scale("b", 1)
    assert torch.equal(logits(llama, tiny), full)
    assert (full - expected).abs().max() > 0.01


def test_strength_counts_in_compositions_and_is_not_saved(llama, tiny, tmp_path):
    llama.set_scale("b", 0.5)
    llama.add_weighted_adapter(["b"], [0.5], "quarter")
    expected = by_formula(llama, {"b": 0.25})
    for name, (scale, _) in expected.items():
        edits = llama.get_submodule(name).redpeft_edit
        if "b" in edits:
            torch.testing.assert_close(edits["quarter"].effective[0], scale, rtol=1e-5, atol=1e-5)
            assert edits["quarter"].strength is None
            assert copy.deepcopy(edits["b"]).strength == 0.5
    llama.save_pretrained(tmp_path, selected_adapters=["b"])
    llama.set_scale("b", 1)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "b").eval()
    torch.testing.assert_close(logits(again, tiny), logits(llama, tiny, "b"))


def test_strength_scales_the_gradient_too():
    edit = Edit(4)
    edit.set_strength(0.5)
    edit.randomize()
    upstream, hidden = torch.randn(3, 4), torch.randn(3, 4)
    edit(hidden).backward(upstream)
    torch.testing.assert_close(edit.offset.grad, 0.5 * (upstream * hidden).sum(0))


def test_refusals_leave_the_model_as_it_was(llama):
    before = list(llama.state_dict())

    def refusal(*arguments, **options):
        with pytest.raises(UserError) as error:
            llama.add_weighted_adapter(*arguments, **options)
        assert list(llama.state_dict()) == before
        assert list(llama.peft_config) == ["a", "b"]
        return str(error.value)

    assert refusal(["a", "x"], [1, 1], "mix") == "unknown adapters: x; loaded: a, b"
    assert refusal(["a"], [1], "mix", head="y") == "unknown adapters: y; loaded: a, b"
    assert "there is an adapter 'b' already" in refusal(["a"], [1], "b")
    assert "an adapter cannot be called 'half'" in refusal(["a"], [1], "half")
    assert "an adapter cannot be called 'a.b'" in refusal(["a"], [1], "a.b")
    assert "one finite weight for each adapter, not [1] for ['a', 'b']" in refusal(["a", "b"], [1], "mix")
    assert "one finite weight" in refusal(["a"], [float("nan")], "mix")
    assert "one finite weight" in refusal([], [], "mix")
    assert "unknown combination_type 'svd': choose linear or sequence" in refusal(["a"], [1], "mix", "svd")
    with pytest.raises(UserError, match="unknown adapters: x"):
        llama.set_scale("x", 1)
    with pytest.raises(UserError, match="must be a finite number, not inf"):
        llama.set_scale("a", float("inf"))
    llama.merge_adapter()
    with pytest.raises(UserError, match="the strength of a merged adapter is fixed: call model.unmerge_adapter"):
        llama.set_scale("a", 2)


def test_heads_in_a_model(tiny):
    model = tiny.with_edits(tiny.roberta_classifier(), "SEQ_CLS")
    model.add_adapter("other", RedConfig(task_type="SEQ_CLS"))
    tiny.far(model, "other", seed=3)
    wrapper = model.base_model.model.classifier
    with torch.no_grad():
        for parameter in wrapper.modules_to_save["other"].parameters():
            parameter.add_(torch.randn_like(parameter))
    heads = {name: wrapper.modules_to_save[name].out_proj.weight for name in ("default", "other")}
    with pytest.warns(UserWarning, match="head .* of 'average' is the average of those of default, other"):
        model.add_weighted_adapter(["default", "other"], [0.25, 0.75], "average")
    average = wrapper.modules_to_save["average"].out_proj.weight
    torch.testing.assert_close(average, 0.25 * heads["default"] + 0.75 * heads["other"])
    assert not average.requires_grad
    with pytest.raises(UserError, match="default and other bring different heads .* cannot act one after another"):
        model.add_weighted_adapter(["default", "other"], [1, 1], "both", combination_type="sequence")
    model.add_weighted_adapter(["default", "other"], [1, 1], "both", combination_type="sequence", head="other")
    assert torch.equal(wrapper.modules_to_save["both"].out_proj.weight, heads["other"])
    model.set_adapter("both")
    both = model(input_ids=tiny.tokens()).logits
    model.add_weighted_adapter(["other"], [0.5], "halved")  # a head of its own, not the same tensor
    with torch.no_grad():
        wrapper.modules_to_save["halved"].out_proj.weight.zero_()
    torch.testing.assert_close(model(input_ids=tiny.tokens()).logits, both)
