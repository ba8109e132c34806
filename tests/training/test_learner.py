from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ErnieConfig,
    ErnieForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from redpeft.errors import UserError
from redpeft.training.baselines import DEFAULT_RATES, METHODS
from redpeft.training.learner import apply_method, head_modules, head_parameters, trainable_parameters
from redpeft.training.recipe import load_recipe

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def bert():
    return BertForSequenceClassification(BertConfig(**SMALL))


def llama(cls=LlamaForCausalLM):
    return cls(LlamaConfig(**SMALL))


def recipe(method, **more):
    return load_recipe(None, {"base": "m", "data": "d", "method": method, **more})


def small(method):
    """A recipe with options that fit a model of two narrow blocks."""
    options = {
        "adapter": {"bottleneck": 3},
        "adapter_ffn": {"bottleneck": 3},
        "adapter_drop": {"bottleneck": 3, "drop_layers": 1},
        "prompt": {"num_virtual_tokens": 5},
        "prefix": {"num_virtual_tokens": 5},
        "top_layers": {"layers": 1},
    }
    return recipe(method, method_options=options.get(method, {}))


def test_every_method_can_be_named_in_a_recipe():
    assert all(recipe(method).resolved().learning_rate == rate for method, rate in DEFAULT_RATES.items())


def test_a_resolved_recipe_says_what_the_method_chose():
    resolved = recipe("adapter_drop", method_options={"drop_layers": 2, "bottleneck": 8}).resolved()
    assert resolved.method_options == {"layer_norms": True, "drop_layers": 2, "bottleneck": 8}
    assert recipe("red").resolved().method_options == {}


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_heads_of_the_families():
    assert head_modules(bert(), "classification") == ["classifier"]
    roberta = RobertaForSequenceClassification(RobertaConfig(**SMALL))
    new = ["classifier.dense.weight", "classifier.out_proj.bias"]
    assert head_modules(roberta, "classification", new) == ["classifier"]
    distilbert = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    )
    assert head_modules(distilbert, "classification") == ["pre_classifier", "classifier"]
    assert head_modules(llama(LlamaForSequenceClassification), "classification") == ["score"]
    assert head_modules(llama(), "instruction") == []


def test_a_pooler_is_trained_only_if_the_checkpoint_lacks_it():
    model = bert()
    new = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "not.a.parameter"]
    assert head_modules(model, "classification", new) == ["classifier", "bert.pooler.dense"]
    for method in set(METHODS) - {"full"}:
        model = apply_method(bert(), small(method), new)
        names = trained(model)
        assert any("pooler.dense" in name and name.endswith("weight") for name in names), method
        assert any("classifier" in name and name.endswith("weight") for name in names), method
        assert not any(
            "pooler" in name and name.endswith("weight") for name in trained(apply_method(bert(), small(method)))
        )


def test_what_each_method_trains_beside_the_head():
    head = 2 * 16 + 2
    counts = {}
    for method in METHODS:
        model = apply_method(bert(), small(method))
        counts[method] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found = head_parameters(model, ["classifier"])
        assert sum(p.numel() for p in found.values()) == head, method
        for config in getattr(model, "peft_config", {}).values():
            heads = getattr(config, "modules_to_save", None) or []
            assert len(heads) == len(set(heads)), method
        assert trainable_parameters(bert(), small(method)) == (counts[method] - head, head), method
    whole = bert()
    encoder = {name: p for name, p in whole.named_parameters() if not name.startswith("classifier")}
    assert counts["red"] == 2 * 2 * 16 + head
    assert counts["head"] == head
    assert counts["bitfit"] == sum(p.numel() for name, p in encoder.items() if name.endswith("bias")) + head
    assert counts["full"] == sum(p.numel() for p in whole.parameters())
    assert counts["lora"] == 2 * 2 * 2 * 8 * 16 + head
    assert counts["ia3"] == 2 * (16 + 16 + 16 + 32) + head
    bottleneck, norms = 2 * 16 * 3 + 3 + 16, 2 * 16
    assert counts["adapter"] == 4 * bottleneck + 5 * norms + head
    assert counts["adapter_ffn"] == 2 * bottleneck + head
    assert counts["adapter_drop"] == 2 * bottleneck + 2 * norms + head
    assert counts["prompt"] == 5 * 16 + head
    assert counts["prefix"] == 5 * 2 * 2 * 16 + head
    assert counts["top_layers"] == sum(p.numel() for name, p in encoder.items() if "encoder.layer.1." in name) + head


def test_options_reach_the_configuration():
    model = apply_method(bert(), recipe("red", method_options={"sites": "red+", "unit": 1}))
    assert sum(".scale_offset" in name for name in trained(model)) == 5 * 2
    model = apply_method(bert(), recipe("lora", method_options={"r": 3, "modules_to_save": ["bert.pooler.dense"]}))
    assert any(parameter.shape[0] == 3 for parameter in model.parameters())
    assert {"pooler", "classifier"} <= {part for name in trained(model) for part in name.split(".")}


def test_everything_trained_is_fp32_on_a_half_precision_base():
    for method in ("red", "lora", "adapter", "prompt", "prefix", "head"):
        model = apply_method(bert().to(torch.bfloat16), small(method))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, method
        assert torch.bfloat16 in {p.dtype for p in model.parameters()}


def test_a_model_that_peft_has_no_table_for():
    def ernie():
        return ErnieForSequenceClassification(ErnieConfig(**SMALL))

    names = trained(apply_method(ernie(), recipe("lora")))
    assert any("intermediate.dense" in name for name in names)
    with pytest.raises(UserError, match=r"no IA3 target modules for ernie .*method_options.target_modules"):
        apply_method(ernie(), recipe("ia3"))


@pytest.mark.parametrize(
    ("model", "chosen", "message"),
    [
        (bert, recipe("red", method_options={"site": "ffn"}), "RedConfig has no 'site'; did you mean 'sites'"),
        (bert, recipe("red", method_options={"unit": -1}), "unit must be"),
        (
            bert,
            recipe("lora", method_options={"target_modules": ["nothing"]}),
            "method_options: No modules were targeted",
        ),
        (bert, recipe("lora", method_options={"r": 0}), "method_options: .*positive"),
        (bert, recipe("full", method_options={"r": 8}), "method full has no options: leave out r"),
        (llama, recipe("bitfit", task="instruction"), "trains biases, and LlamaForCausalLM has none"),
        (llama, recipe("head", task="instruction"), "needs a task with a head"),
    ],
)
def test_wrong_choices(model, chosen, message):
    with pytest.raises(UserError, match=message) as caught:
        apply_method(model(), chosen)
    assert "\n" not in str(caught.value)
