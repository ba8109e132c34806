"""Where edits go in a stock checkpoint: real configurations on the meta device, and models with tied weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
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

from redpeft.adapters import read_adapter
from redpeft.adapters.fold import fold, preview_fold
from redpeft.adapters.fold.placement import LEFT, Parts, plan_fold
from redpeft.errors import UserError
from redpeft.models import on_meta

from .models import CAUSAL, LABELS, SEQ2SEQ, edited, load_folded, logits, relative, tiny, tiny_config, token_ids

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
    assert set(found.placements.values()) == forms
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
    assert plan_fold(model, {name: Parts(bias=False)}).placements == {name: "weight and bias"}


@pytest.mark.parametrize("scale", [True, False])
def test_quantised_weights_take_a_bias_and_no_scale(scale):
    config = LlamaConfig(num_hidden_layers=2, mlp_bias=True)
    config.quantization_config = BitsAndBytesConfig(load_in_4bit=True).to_dict()
    name = "model.layers.1.mlp.down_proj"
    plan = plan_fold(on_meta(transformers.AutoModelForCausalLM, config), {name: Parts(scale=scale)})
    assert plan.placements == {name: "stays an edit" if scale else "weight and bias"}


def test_layers_that_quantisation_skipped_are_plain():
    config = LlamaConfig(num_hidden_layers=2, mlp_bias=True)
    config.quantization_config = BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_skip_modules=["layers.1.mlp"]
    ).to_dict()
    names = [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    plan = plan_fold(on_meta(transformers.AutoModelForCausalLM, config), dict.fromkeys(names, Parts()))
    assert list(plan.placements.values()) == ["stays an edit", "weight and bias"]


def test_a_module_that_the_model_lacks():
    model = on_meta(transformers.AutoModelForCausalLM, LLAMA_2)
    with pytest.raises(UserError, match=r"\(LlamaForCausalLM\) has no module model.layers.99.mlp"):
        plan_fold(model, {"model.layers.99.mlp": Parts()})


def test_no_such_model(tmp_path):
    with pytest.raises(UserError, match=r"no such model folder"):
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
    forms = " ".join(found.placements.values())
    if "bundle" in form:
        assert "stays an edit" in forms
    else:
        assert "stays an edit" not in forms
        assert list(found.changes) == re.findall(r"`(\w+)`", form)


# --- tied weights ---


def save_tied(folder, model_class, kind, saved, task, shards="1GB", **options):
    """Write a tied base and an adapter that has `saved` for itself; what the adapted model says."""
    model = tiny(model_class, tiny_config(kind, tie_word_embeddings=True))
    model.save_pretrained(folder / "base", max_shard_size=shards)
    adapted = edited(type(model).from_pretrained(folder / "base"), task, modules_to_save=saved, **options)
    with torch.no_grad():
        for seed, (_, parameter) in enumerate((n, p) for n, p in adapted.named_parameters() if "modules_to_save" in n):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    adapted.save_pretrained(folder / "adapter")
    return logits(adapted, token_ids())


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
@pytest.mark.parametrize(
    ("model_class", "kind", "saved", "task"),
    [
        ("LlamaForCausalLM", "llama", ["embed_tokens"], CAUSAL),
        ("LlamaForCausalLM", "llama", ["lm_head"], CAUSAL),
        ("GPT2LMHeadModel", "gpt2", ["wte"], CAUSAL),
        ("BertForMaskedLM", "bert", ["word_embeddings"], None),
        ("BartForConditionalGeneration", "bart", ["lm_head"], SEQ2SEQ),
    ],
)
def test_a_saved_module_is_untied(model_class, kind, saved, task, shards, tmp_path):
    expected = save_tied(tmp_path, model_class, kind, saved, task, shards)
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    assert result.changes["tie_word_embeddings"] is False
    folded, info = type(load_folded(result)).from_pretrained(result.out, output_loading_info=True)
    assert relative(logits(folded.eval(), token_ids()), expected) < 1e-5
    assert not [name for name, found in info.items() if found]
    plain = {id(parameter) for parameter in folded.parameters()}
    assert len(plain) == len(list(folded.named_parameters(remove_duplicate=False)))


@pytest.mark.parametrize(
    ("model_class", "kind", "saved", "task"),
    [
        ("GPT2LMHeadModel", "gpt2", ["wpe"], CAUSAL),  # tied to nothing
        ("LlamaForSequenceClassification", "llama", ["embed_tokens"], LABELS),  # there is nothing to be tied to
    ],
)
def test_what_is_not_tied_stays_as_it_is(model_class, kind, saved, task, tmp_path):
    expected = save_tied(tmp_path, model_class, kind, saved, task)
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    assert "tie_word_embeddings" not in result.changes
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert relative(logits(load_folded(result), token_ids()), expected) < 1e-5


@pytest.mark.parametrize(
    ("model_class", "kind"), [("T5ForConditionalGeneration", "t5"), ("UMT5ForConditionalGeneration", "umt5")]
)
def test_a_model_that_is_another_without_its_ties_is_refused(model_class, kind, tmp_path):
    """It scales what its decoder puts out, or not, by the same switch."""
    save_tied(tmp_path, model_class, kind, ["lm_head"], SEQ2SEQ, use_bias=False)
    message = (
        f"has a lm_head.weight of its own .* one tensor with shared.weight, .* stock {model_class}: a checkpoint can"
    )
    with pytest.raises(UserError, match=message):
        fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_the_plan_says_it(tmp_path):
    save_tied(tmp_path, "LlamaForCausalLM", "llama", ["embed_tokens"], CAUSAL)
    preview = preview_fold(str(tmp_path / "base"), adapter=read_adapter(tmp_path / "adapter"))
    assert preview.changes == {"mlp_bias": True, "tie_word_embeddings": False}


def test_a_site_whose_weight_is_another_module_s_too_stays_an_edit():
    """As in Zamba's shared blocks."""
    model = on_meta(transformers.AutoModel, tiny_config("bert"))
    first, second = (model.encoder.layer[index].output.dense for index in (0, 1))
    first.weight = second.weight
    sites = {f"encoder.layer.{index}.output.dense": Parts() for index in (0, 1, 2)}
    assert list(plan_fold(model, sites).placements.values()) == [LEFT, LEFT, "weight and bias"]
    bias_alone = dict.fromkeys(sites, Parts(scale=False))
    assert set(plan_fold(model, bias_alone).placements.values()) == {"weight and bias"}
