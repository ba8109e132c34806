"""Where a served base model can be edited, and which adapters were trained on it."""

from __future__ import annotations

import logging
import shutil

import pytest
from transformers import AutoConfig, BertConfig, GPT2Config, LlamaConfig, MixtralConfig

from redpeft.adapters import read_adapter
from redpeft.errors import UserError
from redpeft.serving.served_base import ServedBase, find_module, widths_of_sites

from .tiny_adapters import SITES, adapter

NAMED = {site: site for site in SITES}


@pytest.fixture
def check(base, tmp_path):
    def check(saved, sites=NAMED, name=None, **options):
        folder = adapter(tmp_path / "edit", 1, list(sites), base_fingerprint=saved)
        config = AutoConfig.from_pretrained(base)
        config.quantization_config = options.pop("quantised", None)
        ServedBase(str(name or base), config, **options).check(read_adapter(folder), sites)

    return check


def test_its_own_base_and_none_named_are_let_through(check, own_fingerprint):
    check(own_fingerprint)
    check(None)


def test_other_weights_are_refused(check, other_fingerprint, base):
    with pytest.raises(UserError, match=f"edit is for another base model than {base}: the weights differ"):
        check(other_fingerprint)


def test_other_shapes_are_refused(check, own_fingerprint):
    with pytest.raises(UserError, match="the edited modules have other names or shapes"):
        check({**own_fingerprint, "shapes": "0" * 16})


def test_modules_may_have_other_names_in_the_adapter(base, check):
    """As where it was trained on the model without its head."""
    from transformers import AutoModel

    from redpeft.models import fingerprint

    own = {site.removeprefix("model."): site for site in SITES}
    saved = fingerprint(AutoModel.from_pretrained(base), own)
    check(saved, own)
    with pytest.raises(UserError, match="the weights differ"):
        check({**saved, "samples": saved["samples"][::-1]}, own)


def test_of_a_name_on_the_hub_the_files_are_those_that_the_engine_has_downloaded(
    check, base, own_fingerprint, other_fingerprint, tmp_path
):
    cached = tmp_path / "cache" / "models--some--base"
    shutil.copytree(base, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "v1").write_text("abc")
    hub = {"name": "some/base", "revision": "v1", "cache": str(tmp_path / "cache")}
    check(own_fingerprint, **hub)
    with pytest.raises(UserError, match="is for another base model than some/base: the weights differ"):
        check(other_fingerprint, **hub)


@pytest.mark.parametrize("kind", ["no weights", "no such model", "quantised"])
def test_where_there_is_nothing_to_compare_it_is_let_through_with_a_word(
    check, base, other_fingerprint, tmp_path, caplog, kind
):
    shutil.copytree(base, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    options = {
        "no weights": {"name": tmp_path / "empty"},
        "no such model": {"name": "nobody/no-such-model"},
        "quantised": {"quantised": {"quant_method": "gptq"}},
    }
    with caplog.at_level(logging.INFO, "vllm.redpeft"):
        check(other_fingerprint, **options[kind])
    assert "adapters of another base model than " in caplog.text
    assert " cannot be detected: " in caplog.text


# --- sites ---

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
