"""Plans on real configurations, on the meta device: what each family's stock checkpoint can carry."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    RobertaConfig,
    T5Config,
)

from redpeft.adapters.fold import preview_fold
from redpeft.adapters.fold.plan import Parts, plan_fold
from redpeft.errors import UserError
from redpeft.models import on_meta

HOW_TO = Path(__file__).parents[3] / "docs" / "how-to" / "fold.md"

LLAMA_2 = LlamaConfig(architectures=["LlamaForCausalLM"])
MISTRAL = MistralConfig(architectures=["MistralForCausalLM"], sliding_window=None)
QWEN_2 = Qwen2Config(
    architectures=["Qwen2ForCausalLM"], num_hidden_layers=28, hidden_size=3584, num_attention_heads=28
)
GPT2_MEDIUM = GPT2Config(architectures=["GPT2LMHeadModel"], n_embd=1024, n_layer=24, n_head=16)
T5_BASE = T5Config(architectures=["T5ForConditionalGeneration"], d_model=768, d_ff=3072, num_layers=12, num_heads=12)


@pytest.mark.parametrize(
    ("config", "forms", "changes", "llama"),
    [
        (RobertaConfig(architectures=["RobertaForMaskedLM"]), {"weight and bias"}, {}, False),
        (
            GPT2Config(architectures=["GPT2LMHeadModel"], n_embd=1024, n_layer=24, n_head=16),
            {"weight and bias"},
            {},
            False,
        ),
        (LLAMA_2, {"weight, and a bias by mlp_bias=True"}, {"mlp_bias": True}, False),
        (MISTRAL, {"weight; its bias stays an edit"}, {}, True),
        (QWEN_2, {"weight; its bias stays an edit"}, {}, True),
        (T5_BASE, {"weight; its bias stays an edit"}, {}, False),
        (MixtralConfig(architectures=["MixtralForCausalLM"], num_hidden_layers=2), {"stays an edit"}, {}, False),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_real_configurations(config, forms, changes, llama, tmp_path):
    config.save_pretrained(tmp_path)
    found = preview_fold(str(tmp_path))
    assert set(found.forms.values()) == forms
    assert found.changes == changes
    assert (found.not_llama is None) is llama
    bundle = any("stays an edit" in form for form in forms)
    assert ("--format bundle" in found.notes[0]) is bundle
    assert any("--as llama" in note for note in found.notes) is bundle


def test_llama_gets_the_fewest_switches_that_the_sites_need(tmp_path):
    LLAMA_2.save_pretrained(tmp_path)
    assert preview_fold(str(tmp_path), "attention").changes == {"attention_bias": True}
    assert preview_fold(str(tmp_path), "red+").changes == {"attention_bias": True, "mlp_bias": True}


def test_zero_parts_of_an_edit_need_no_place():
    model = on_meta(transformers.AutoModelForCausalLM, LLAMA_2)
    name = "model.layers.0.mlp.down_proj"
    assert plan_fold(model, {name: Parts(bias=False)}).forms == {name: "weight and bias"}


@pytest.mark.parametrize("scale", [True, False])
def test_quantised_weights_take_a_bias_and_no_scale(scale):
    config = LlamaConfig(num_hidden_layers=2, mlp_bias=True)
    config.quantization_config = BitsAndBytesConfig(load_in_4bit=True).to_dict()
    name = "model.layers.1.mlp.down_proj"
    plan = plan_fold(on_meta(transformers.AutoModelForCausalLM, config), {name: Parts(scale=scale)})
    assert plan.forms == {name: "stays an edit" if scale else "weight and bias"}


def test_layers_that_quantisation_skipped_are_plain():
    config = LlamaConfig(num_hidden_layers=2, mlp_bias=True)
    config.quantization_config = BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_skip_modules=["layers.1.mlp"]
    ).to_dict()
    names = [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    plan = plan_fold(on_meta(transformers.AutoModelForCausalLM, config), dict.fromkeys(names, Parts()))
    assert list(plan.forms.values()) == ["stays an edit", "weight and bias"]


def test_a_module_that_the_model_lacks():
    model = on_meta(transformers.AutoModelForCausalLM, LLAMA_2)
    with pytest.raises(UserError, match=r"\(LlamaForCausalLM\) has no module model.layers.99.mlp"):
        plan_fold(model, {"model.layers.99.mlp": Parts()})


def test_no_such_model(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        preview_fold(str(tmp_path / "nothing"))


# What the default configuration of a family lacks
NEEDED = {"nemotron": {"head_dim": 128, "num_key_value_heads": 8}, "seed_oss": {"num_attention_heads": 64}}


def documented_families():
    """The table of families in the how-to: (model type, the form that it says)."""
    rows = re.findall(r"^\| [^|]+ \| ([^|]*`[^|]+) \| ([^|]+) \|", HOW_TO.read_text(encoding="utf-8"), re.M)
    return [(family, form.strip()) for families, form in rows for family in re.findall(r"`([\w-]+)`", families)]


@pytest.mark.parametrize(("family", "form"), documented_families())
def test_the_table_of_families_in_the_how_to_is_true(family, form, tmp_path):
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    config = transformers.CONFIG_MAPPING[family](**NEEDED.get(family, {}))
    for depth in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"):
        if isinstance(getattr(config, depth, None), int):
            setattr(config, depth, 2)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    config.save_pretrained(tmp_path)
    found = preview_fold(str(tmp_path))
    forms = " ".join(found.forms.values())
    if "bundle" in form:
        assert "stays an edit" in forms
    else:
        assert "stays an edit" not in forms
        assert list(found.changes) == re.findall(r"`(\w+)`", form)
