"""Adapters with heads (`modules_to_save`): none acts, is merged or is left under the head of another."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from redpeft import RedConfig
from redpeft.errors import UserError
from redpeft.tuner.heads import combine_heads, run_by_adapter
from redpeft.tuner.mixed import BASE, MixedBatch


@pytest.fixture
def model(tiny):
    """A classifier with "a" and "b", which bring heads of their own, and "none", which brings none; "a" is active."""
    model = get_peft_model(tiny.roberta_classifier(), RedConfig(task_type="SEQ_CLS"), "a").eval()
    model.add_adapter("b", RedConfig(task_type="SEQ_CLS"))
    model.base_model.peft_config["none"] = RedConfig()  # not by PeftModel, which adds the heads of SEQ_CLS
    model.base_model.inject_adapter(model.base_model.model, "none")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.base_model.model.classifier.modules_to_save.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator))
    for seed, name in enumerate(("a", "b", "none")):
        tiny.far(model, name, seed=seed)
    assert set(model.base_model.model.classifier.modules_to_save) == {"a", "b"}
    return model


@torch.no_grad()
def by_hand(model, tiny, edits, head):
    """The logits with these adapters' edits one after another under the head of `head`, or of the base."""
    roberta, wrapper = model.base_model.model.roberta, model.base_model.model.classifier
    for layer in tiny.layers(model):
        layer._active_adapter = list(edits)
    hidden = roberta(tiny.tokens()).last_hidden_state
    return (wrapper.modules_to_save[head] if head else wrapper.original_module)(hidden)


@torch.no_grad()
def logits(model, tiny):
    tuner = model.base_model if isinstance(model, PeftModel) else model  # PeftModel knows of one active adapter alone
    return tuner(input_ids=tiny.tokens()).logits


def close(left, right):
    torch.testing.assert_close(left, right, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("names", "head", "expected"),
    [
        (["b"], None, "b"),  # not that of the active "a"
        (["none"], None, None),
        (["none", "b"], None, "b"),
        (["a", "b"], "a", "a"),
        (["a", "b"], "b", "b"),
        (None, None, "a"),
    ],
)
def test_a_merged_model_has_the_head_of_its_adapters(model, tiny, names, head, expected):
    wanted = by_hand(model, tiny, names or ["a"], expected)
    model.set_adapter("a")
    merged = model.merge_and_unload(adapter_names=names, head=head)
    close(logits(merged, tiny), wanted)
    assert not [key for key in merged.state_dict() if "modules_to_save" in key or "original_module" in key]


def test_merged_adapters_count_when_others_are_merged_beside_them(model, tiny):
    wanted = by_hand(model, tiny, ["none", "b"], "b")
    model.set_adapter("none")
    model.merge_adapter()
    close(logits(model.merge_and_unload(adapter_names=["b"]), tiny), wanted)


def test_different_heads_are_not_merged_unless_one_is_named(model, tiny):
    before = logits(model, tiny)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UserError, match="a and b bring different heads .* say whose head to keep: .* head=... in"):
            merge(adapter_names=["a", "b"])
    with pytest.raises(UserError, match=r"unknown adapters: x; loaded: a, b, none"):
        model.merge_and_unload(adapter_names=["x"])  # PEFT merges nothing
    assert torch.equal(logits(model, tiny), before)
    model.base_model.model.classifier.modules_to_save["b"].load_state_dict(
        model.base_model.model.classifier.modules_to_save["a"].state_dict()
    )
    wanted = by_hand(model, tiny, ["a", "b"], "a")
    close(logits(model.merge_and_unload(adapter_names=["a", "b"]), tiny), wanted)  # equal heads leave no doubt


def test_an_adapter_is_not_merged_under_the_head_of_another(model, tiny):
    for name in ("b", "none"):
        with pytest.raises(UserError, match="the active classifier .* is not that of the adapters to merge: call"):
            model.merge_adapter(adapter_names=[name])
    model.set_adapter("b")
    wanted = by_hand(model, tiny, ["b"], "b")
    model.merge_adapter(adapter_names=["b"])
    close(logits(model, tiny), wanted)
    with pytest.raises(UserError, match="is not that of the adapters"):
        model.merge_adapter(adapter_names=["a"], head="a")
    model.merge_adapter(adapter_names=["a"], head="b")
    model.unmerge_adapter()
    close(logits(model, tiny), wanted)


def test_two_heads_are_not_set_at_once_and_nothing_changes_then(model, tiny):
    before = logits(model, tiny)
    with pytest.raises(UserError, match="a and b bring a classifier each. Make one adapter of them: add_weighted_"):
        model.base_model.set_adapter(["a", "b"])
    assert torch.equal(logits(model, tiny), before)
    model.base_model.set_adapter(["none", "b"])
    acting = logits(model, tiny)
    close(acting, by_hand(model, tiny, ["none", "b"], "b"))


def test_the_base_gets_its_own_head_and_weights_back(model, tiny):
    own = tiny.roberta_classifier()
    model.merge_adapter()
    unloaded = model.unload()
    for key, tensor in own.state_dict().items():
        assert torch.equal(unloaded.state_dict()[key], tensor), key
    assert torch.equal(logits(unloaded, tiny), logits(own, tiny))


def test_after_a_deletion_one_adapter_acts_everywhere(tiny):
    model = get_peft_model(tiny.bert_classifier(), RedConfig(task_type="SEQ_CLS"), "z").eval()
    model.add_adapter("first", RedConfig(task_type="SEQ_CLS", layers_to_transform=[0]))
    model.add_adapter("second", RedConfig(task_type="SEQ_CLS", layers_to_transform=[1]))
    for seed, name in enumerate(("first", "second", "z")):
        tiny.far(model, name, seed=seed)
        model.base_model.model.classifier.modules_to_save[name].weight.data.add_(seed + 1)
    model.set_adapter("first")
    wanted = logits(model, tiny)
    model.set_adapter("z")
    with pytest.warns(UserWarning, match="Adapter z was active which is now deleted. Setting active adapter to first"):
        model.delete_adapter("z")  # PEFT: "first" in block 0, "second" in block 1
    assert torch.equal(logits(model, tiny), wanted)
    assert model.active_adapters == ["first"]

    model.set_adapter("second")
    model.merge_adapter()
    with pytest.raises(UserError, match="while they are merged. Please unmerge them first"):
        model.delete_adapter("second")


def test_without_any_adapter_the_base_acts(tiny):
    model = tiny.with_edits(tiny.bert_classifier(), "SEQ_CLS").base_model
    model.model.classifier.modules_to_save["default"].weight.data.add_(1)
    model.delete_adapter("default")
    assert torch.equal(logits(model, tiny), logits(tiny.bert_classifier(), tiny))


def test_an_idle_adapter_is_deleted_beside_two_active_ones(model, tiny):
    model.base_model.set_adapter(["none", "b"])
    wanted = logits(model, tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.delete_adapter("a")  # PEFT: "Attempted to set multiple adapters at once", half deleted
    assert torch.equal(logits(model, tiny), wanted)
    assert not [key for key in model.state_dict() if ".a." in key]


def test_rows_of_a_batch_have_their_own_heads(model, tiny):
    ids, rows = tiny.tokens(), ["b", "none", "a", "__base__"]
    mixed = model(input_ids=ids, adapter_names=rows).logits
    for row, (edits, head) in enumerate(zip((["b"], ["none"], ["a"], []), ("b", None, "a", None), strict=True)):
        close(mixed[row], by_hand(model, tiny, edits, head)[row])


# Heads alone

NAMES = ["a", "b", "c"]


def tensors(value=0.0, classes=3):
    return {"classifier.weight": torch.full((classes, 2), value), "classifier.bias": torch.full((classes,), value)}


def test_heads_that_are_kept_and_averaged():
    assert combine_heads(["a", "b"], [{}, {}], [1.0, 2.0]) == {}
    for some in (None, [0.5, 7.0]):
        assert combine_heads(["a", "b"], [{}, tensors(2)], some)["classifier.bias"].tolist() == [2, 2, 2]
        assert combine_heads(["a", "b"], [tensors(2), tensors(2)], some)["classifier.bias"].tolist() == [2, 2, 2]
    # the weights of those that bring one count
    averaged = combine_heads(["a", "b", "c"], [tensors(2), {}, tensors(10)], [0.25, 3.0, 0.75])
    assert averaged["classifier.weight"].tolist() == [[8, 8]] * 3


@pytest.mark.parametrize(
    ("other", "weights", "message"),
    [
        (
            tensors(1),
            None,
            "a and c bring different heads (modules_to_save), and heads cannot act one after another; say",
        ),
        (tensors(1), [0.5, 0.4], "and their weights sum to 0.9, not to 1; say whose head to keep: --head"),
        (tensors(1, classes=2), [0.5, 0.5], "of other names or shapes; say whose head to keep"),
        ({"score.weight": torch.ones(3)}, [0.5, 0.5], "of other names or shapes"),
    ],
)
def test_heads_that_are_refused(other, weights, message):
    with pytest.raises(UserError) as error:
        combine_heads(["a", "b", "c"], [tensors(), {}, other], weights and [weights[0], 5.0, weights[1]])
    assert message in str(error.value)


def test_heads_follow_the_row():
    heads = {"a": nn.Linear(4, 2), "b": nn.Linear(4, 2), BASE: nn.Linear(4, 2)}
    hidden = torch.randn(4, 4)
    names = ["b", BASE, "a", "c"]  # "c" brought no head of its own
    out = run_by_adapter(heads, MixedBatch(names, NAMES), hidden)
    expected = [heads[name if name in heads else BASE](hidden[i]) for i, name in enumerate(names)]
    torch.testing.assert_close(out, torch.stack(expected))


class Scorer(nn.Module):
    """A head that takes keywords: rows and a mask of them, and what is the same for all."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, states, mask=None, factor=1.0, table=None):
        return self.linear(states * mask[:, None]) * factor + table.sum()


def test_heads_that_are_called_by_keyword_follow_the_row_with_all_their_tensors():
    heads = {"a": Scorer(), "b": Scorer(), BASE: Scorer()}
    states, mask, table = torch.randn(4, 4), torch.tensor([1.0, 2.0, 0.0, 3.0]), torch.randn(7)
    names = ["b", BASE, "a", "b"]
    out = run_by_adapter(heads, MixedBatch(names, NAMES), states=states, mask=mask, factor=2.0, table=table)
    rows = [slice(i, i + 1) for i in range(4)]
    expected = [
        heads[name](states=states[i], mask=mask[i], factor=2.0, table=table)
        for i, name in zip(rows, names, strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(expected))
