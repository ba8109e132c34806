"""Folds of models with tied weights, of which the adapter has some for itself."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

from redpeft.adapters import read_adapter
from redpeft.adapters.fold import fold, preview_fold
from redpeft.adapters.fold.plan import LEFT, Parts, plan_fold
from redpeft.errors import UserError
from redpeft.models import on_meta

from .models import CAUSAL, LABELS, SEQ2SEQ, edited, load_folded, logits, relative, tiny, tiny_config, token_ids


def save_both(folder, model_class, kind, saved, task, shards="1GB", **options):
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
    expected = save_both(tmp_path, model_class, kind, saved, task, shards)
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
    expected = save_both(tmp_path, model_class, kind, saved, task)
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    assert "tie_word_embeddings" not in result.changes
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert relative(logits(load_folded(result), token_ids()), expected) < 1e-5


@pytest.mark.parametrize(
    ("model_class", "kind"), [("T5ForConditionalGeneration", "t5"), ("UMT5ForConditionalGeneration", "umt5")]
)
def test_a_model_that_is_another_without_its_ties_is_refused(model_class, kind, tmp_path):
    """It scales what its decoder puts out, or not, by the same switch."""
    save_both(tmp_path, model_class, kind, ["lm_head"], SEQ2SEQ, use_bias=False)
    message = (
        f"has a lm_head.weight of its own .* one tensor with shared.weight, .* stock {model_class}: a checkpoint can"
    )
    with pytest.raises(UserError, match=message):
        fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_the_plan_says_it(tmp_path):
    save_both(tmp_path, "LlamaForCausalLM", "llama", ["embed_tokens"], CAUSAL)
    preview = preview_fold(str(tmp_path / "base"), adapter=read_adapter(tmp_path / "adapter"))
    assert preview.changes == {"mlp_bias": True, "tie_word_embeddings": False}


def test_a_site_whose_weight_is_another_module_s_too_stays_an_edit():
    """As in Zamba's shared blocks."""
    model = on_meta(transformers.AutoModel, tiny_config("bert"))
    first, second = (model.encoder.layer[index].output.dense for index in (0, 1))
    first.weight = second.weight
    sites = {f"encoder.layer.{index}.output.dense": Parts() for index in (0, 1, 2)}
    assert list(plan_fold(model, sites).forms.values()) == [LEFT, LEFT, "weight and bias"]
    bias_alone = dict.fromkeys(sites, Parts(scale=False))
    assert set(plan_fold(model, bias_alone).forms.values()) == {"weight and bias"}
