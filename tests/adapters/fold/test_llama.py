"""Models that are Llama by another name, by their logits; and those that only look so."""

from __future__ import annotations

import pytest
import transformers

from redpeft.adapters.fold import fold
from redpeft.adapters.fold.llama import FAMILIES, as_llama
from redpeft.errors import UserError

from .models import CAUSAL, LABELS, SIZES, load_folded, logits, relative, save_both, tiny, token_ids

# Nine layers: SmolLM3 leaves something out of every fourth, and looks right on three.
DEEP = {"num_hidden_layers": 9}
PLAIN = {
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "seed_oss": {},
    "internlm3": {"attention_bias": True, "mlp_bias": True},
    "iquestcoder": {},
}
CLASS = {
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "internlm3": "LlamaForCausalLM",
    "iquestcoder": "LlamaForCausalLM",
}

ROPE = {"rope_type": "default", "rope_theta": 1e4}


def config_of(family, **changes):
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    own = {name: value for name, value in SIZES.items() if name in transformers.LlamaConfig().to_dict()}
    return transformers.CONFIG_MAPPING[family](**{**own, **DEEP, "num_labels": 4, **changes})


def test_every_family_has_a_test():
    assert PLAIN.keys() == FAMILIES.keys()


@pytest.mark.parametrize("sites", ["ffn", "red+"])
@pytest.mark.parametrize("family", PLAIN)
def test_written_as_llama_it_says_the_same(family, sites, tmp_path):
    model = tiny(CLASS[family], config_of(family, **PLAIN[family]))
    expected = save_both(tmp_path, model, CAUSAL, sites)
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base", llama=True)
    assert result.architecture == "LlamaForCausalLM"
    folded = load_folded(result)
    assert type(folded) is transformers.LlamaForCausalLM
    assert folded.config.mlp_bias
    assert relative(logits(folded, token_ids()), expected) <= 1e-5


def test_a_classifier_becomes_a_llama_classifier(tmp_path):
    model = tiny("Qwen2ForSequenceClassification", config_of("qwen2"))
    expected = save_both(tmp_path, model, LABELS)
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base", llama=True)
    assert result.architecture == "LlamaForSequenceClassification"
    assert relative(logits(load_folded(result), token_ids()), expected) <= 1e-5


def test_long_contexts_keep_their_rotary_embedding(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
    model = tiny("Qwen2ForCausalLM", config_of("qwen2", rope_parameters=rope))
    expected = save_both(tmp_path, model, CAUSAL)
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base", llama=True)
    assert relative(logits(load_folded(result), token_ids()), expected) <= 1e-5


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("smollm3", {}, "model type smollm3"),
        ("granite", {}, "model type granite"),
        ("phi3", {}, "model type phi3"),
        ("gemma2", {}, "model type gemma2"),
        ("qwen3", {}, "model type qwen3"),
        ("ernie4_5", {}, "model type ernie4_5"),
        ("mistral", {"sliding_window": 32}, "sliding_window = 32"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 4},
            "use_sliding_window = True",
        ),
        ("qwen2", {"query_scale": 2.0}, "query_scale = 2.0"),
        ("mistral", {"sliding_window": None, "no_rope_layers": [1, 0]}, "no_rope_layers"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
            "rotary",
        ),
        ("qwen2", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rotary embedding: propo"),
    ],
)
def test_what_is_not_known_to_be_the_same_is_refused(family, changes, reason):
    config = config_of(family, **changes)
    with pytest.raises(UserError, match=f"not known to be Llama by another name: .*{reason}"):
        as_llama(config, f"{family}ForCausalLM")


def test_a_window_that_no_sequence_outgrows_is_none():
    name, config = as_llama(config_of("mistral", sliding_window=64), "MistralForCausalLM")
    assert (name, config.model_type) == ("LlamaForCausalLM", "llama")


def test_a_head_that_llama_lacks_is_refused():
    with pytest.raises(UserError, match="its head is another"):
        as_llama(config_of("qwen2"), "Qwen2ForRewardModelling")
