"""Which modules get a table, and a path in another model's names."""

from __future__ import annotations

import pytest
from transformers import BertConfig, GPT2Config, LlamaConfig, MixtralConfig

from redpeft.errors import UserError
from redpeft.serving.options import Options
from redpeft.serving.sites import find_module, widths_of_sites

LLAMA = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)


def named(config, architecture):
    config.architectures = [architecture]
    return config


def test_the_ffn_is_found_in_the_model_of_the_configuration():
    llama = named(LLAMA, "LlamaForCausalLM")
    ffn = {f"model.layers.{layer}.mlp.down_proj": 32 for layer in range(2)}
    assert widths_of_sites(llama, ["ffn"]) == (ffn, {})
    both, _ = widths_of_sites(llama, ["ffn", "attention"])
    assert set(both) == {
        f"model.layers.{i}.{name}" for i in range(2) for name in ("mlp.down_proj", "self_attn.o_proj")
    }
    gpt2 = named(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50), "GPT2LMHeadModel")
    assert widths_of_sites(gpt2, ["ffn"]) == ({"transformer.h.0.mlp.c_proj": 32}, {})


def test_of_a_mixture_of_experts_it_is_the_block():
    size = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "vocab_size": 50}
    config = MixtralConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, **size)
    (site,) = widths_of_sites(named(config, "MixtralForCausalLM"), ["ffn"])[0]
    assert site in ("model.layers.0.block_sparse_moe", "model.layers.0.mlp")  # older and newer transformers


def test_paths_are_taken_as_they_are_even_from_the_model_without_its_head():
    llama = named(LLAMA, "LlamaForCausalLM")
    paths = ["model.layers.1.self_attn.o_proj", "layers.0.mlp.down_proj"]
    none = "model.layers.2.mlp.down_proj"
    assert widths_of_sites(llama, [*paths, none]) == (
        dict.fromkeys(paths, 32),
        {none: f"LlamaForCausalLM has no module {none} to edit"},
    )


def test_a_model_that_transformers_lacks_is_named():
    config = BertConfig(num_attention_heads=5, hidden_size=32)  # 32 has no 5 heads
    with pytest.raises(UserError, match=r"transformers cannot build \['BertModel'\]: The hidden size"):
        widths_of_sites(named(config, "BertModel"), ["ffn"])


NAMES = ["roberta", "roberta.encoder.layer.0.output.dense", "classifier.dense", "roberta.encoder.layer.0"]


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("roberta.encoder.layer.0.output.dense", NAMES[1]),
        ("encoder.layer.0.output.dense", NAMES[1]),
        ("model.roberta.encoder.layer.0.output.dense", NAMES[1]),
        ("encoder.layer.1.output.dense", None),
        ("dense", None),  # could be anything
        ("encoder.layer.1.classifier.dense", None),  # the classifier's is another
        ("layer.0", NAMES[3]),
    ],
)
def test_a_path_means_the_only_module_that_ends_with_it(path, found):
    assert find_module(path, NAMES) == found


def test_of_two_towers_none_is_meant():
    assert find_module("layers.0.fc2", ["encoder.layers.0.fc2", "decoder.layers.0.fc2"]) is None


def test_options_are_checked():
    assert Options.of({}) == Options.of(None) == Options(sites=["ffn"], only=False, folder=None)
    assert Options.of({"redpeft": {"sites": ["attention"], "only": True}}).sites == ["attention"]
    with pytest.raises(UserError, match=r"--additional-config: redpeft\.slots: Extra inputs are not permitted"):
        Options.of({"redpeft": {"slots": 3}})
