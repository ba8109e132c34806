"""Several adapters with heads (`modules_to_save`): none acts, is merged or is left under the head of another."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from redpeft import RedConfig
from redpeft.errors import UserError


@pytest.fixture
def model(tiny):
    """A classifier with "a" and "b", which bring heads of their own, and "none", which brings none; "a" is active."""
    model = get_peft_model(tiny.roberta_classifier(), RedConfig(task_type="SEQ_CLS"), "a").eval()
    model.add_adapter("b", RedConfig(task_type="SEQ_CLS"))
    model.base_model.peft_config["none"] = RedConfig()  # past the door of PEFT's that adds the heads of SEQ_CLS
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
