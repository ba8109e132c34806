from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from redpeft.errors import UserError
from redpeft.tasks.base_model import (
    ensure_pad_token,
    input_limit,
    load_base,
    load_decoder,
    load_tokenizer,
    pad_prompts,
    positions,
)


def error_of(auto_class, base) -> str:
    with pytest.raises(UserError) as caught:
        load_base(auto_class, base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_such_model_folder(tmp_path):
    for auto_class in (AutoTokenizer, AutoModelForCausalLM):
        assert error_of(auto_class, tmp_path / "none") == f"no such model folder: {tmp_path / 'none'}"
        assert error_of(auto_class, "./none") == "no such model folder: ./none"
    file = tmp_path / "model.bin"
    file.touch()
    assert "no such model folder" in error_of(AutoTokenizer, file)


def test_a_folder_that_holds_no_model(tmp_path):
    assert f"cannot load {tmp_path} with AutoModelForCausalLM: " in error_of(AutoModelForCausalLM, tmp_path)


def test_a_hub_name_that_does_not_load():
    class Offline:
        @staticmethod
        def from_pretrained(name):
            raise OSError(f"We couldn't connect for {name}\nlong story")

    assert error_of(Offline, "owner/model") == (
        "cannot load owner/model, a name on the Hugging Face hub since there is no such folder, with Offline: "
        "We couldn't connect for owner/model"
    )


def test_an_architecture_without_such_a_head(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    for auto_class, advice in (
        (AutoModelForSequenceClassification, "choose another task"),
        (AutoModelForCausalLM, "the task needs a decoder, such as Llama or GPT-2"),
    ):
        message = error_of(auto_class, tmp_path)
        assert message.endswith(
            f" with {auto_class.__name__}: transformers has no such class for this architecture; {advice}"
        )


def test_truncated_weights(tiny_encoder_folder, tmp_path):
    shutil.copytree(tiny_encoder_folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"cannot load {tmp_path} with " in error_of(AutoModelForSequenceClassification, tmp_path)


def test_a_model_is_loaded(tiny_encoder_folder):
    assert load_base(AutoModelForSequenceClassification, str(tiny_encoder_folder), num_labels=3).num_labels == 3


def test_an_encoder_cannot_write(tiny_encoder_folder, tiny_tokenizer):
    with pytest.raises(
        UserError, match="is an encoder .BertLMHeadModel., which .* cannot write one: the task needs a"
    ):
        load_decoder(tiny_encoder_folder, tiny_tokenizer)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_a_tokenizer_without_a_vocabulary(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=f"^the tokenizer of {tmp_path} has no vocabulary: its files"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("broken", ["{}", "{", '{"model": {"type": "X"}}', ""])
def test_a_tokenizer_with_a_broken_file(tiny_encoder_folder, tmp_path, broken):
    shutil.copytree(tiny_encoder_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text(broken)
    assert f"cannot load {tmp_path} with AutoTokenizer: " in error_of(AutoTokenizer, tmp_path)


def test_any_token_pads_where_none_is_meant_to():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<s>": 2, "<u>": 3}, unk_token="<u>"))
    for special, pad in (
        ({"bos_token": "<s>", "unk_token": "<u>"}, "<s>"),
        ({"unk_token": "<u>"}, "<u>"),
        ({}, "a"),
    ):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        ensure_pad_token(tokenizer)
        assert tokenizer.pad_token == pad
        batch = pad_prompts(tokenizer, [[1, 1], [1]], "left")
        assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]


# --- how long a row may be ------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
ENCODER = {**SIZES, "max_position_embeddings": 40}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2}
BOTH = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
BOTH |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
DEBERTA = {**ENCODER, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p"]}
LIMITS = [  # class of model, its configuration, how many tokens it reads, and how many more it is known to read
    ("BertForSequenceClassification", ENCODER, 40, 0),
    ("RobertaForSequenceClassification", {**ENCODER, "max_position_embeddings": 42}, 40, 0),  # counts from 2
    ("MPNetForTokenClassification", {**ENCODER, "max_position_embeddings": 42}, 40, 0),
    ("NystromformerModel", {**ENCODER, "segment_means_seq_len": 40, "num_landmarks": 8}, 40, 0),
    ("DebertaV2Model", DEBERTA, None, 60),
    ("GPT2LMHeadModel", {**GPT, "n_positions": 40}, 40, 0),
    ("GPTJForCausalLM", {**GPT, "n_positions": 40, "rotary_dim": 4}, 40, 0),
    ("OPTForCausalLM", {**ENCODER, "ffn_dim": 32, "word_embed_proj_dim": 16}, 40, 0),
    ("MptForCausalLM", {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 40}, 40, 0),
    ("BloomForCausalLM", {"hidden_size": 16, "n_layer": 1, "n_head": 2}, None, 60),
    ("LlamaForCausalLM", ENCODER, 40, 60),  # computes positions, and knows those that it was trained with
    ("T5ForConditionalGeneration", {**T5, "n_positions": 40}, None, 60),
    ("BartForConditionalGeneration", {**BOTH, "max_position_embeddings": 40}, 40, 0),
    ("BartForSequenceClassification", {**BOTH, "max_position_embeddings": 40}, 40, 0),
    ("PegasusForConditionalGeneration", {**BOTH, "max_position_embeddings": 40}, 40, 0),
]


def tiny(name, values):
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(vocab_size=50, pad_token_id=1, eos_token_id=2, **values)).eval()


def reads(model, length) -> bool:
    ids = torch.full((1, length), 5)
    ids[0, -1] = 2
    decoder = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder and model.can_generate() else {}
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize(("name", "values", "limit", "more"), LIMITS)
def test_how_long_a_row_may_be(name, values, limit, more):
    model = tiny(name, values)
    found = positions(model)
    assert found == (None if limit is None else (limit, f"the {limit} positions of {name}"))
    assert reads(model, limit or 40)
    assert reads(model, (limit or 40) + (more or 1)) is bool(more)


def test_an_encoder_and_a_decoder_of_other_lengths():
    lengths = {"max_encoder_position_embeddings": 48, "max_decoder_position_embeddings": 24, "attention_window": 8}
    model = tiny("LEDForConditionalGeneration", {**BOTH, **lengths})
    assert positions(model).tokens == 48
    assert positions(model, decoder=True).tokens == 24


def test_the_least_limit_counts(tiny_tokenizer):
    model = tiny("BertModel", ENCODER)
    assert input_limit(model, tiny_tokenizer, 30) == (30, "max_length 30")
    assert input_limit(model, tiny_tokenizer, 40) == (40, "max_length 40")
    assert input_limit(model, tiny_tokenizer) == (40, "the 40 positions of BertModel")
    long = tiny("BertModel", {**SIZES, "max_position_embeddings": 100})
    assert input_limit(long, tiny_tokenizer, 200) == (64, "the tokenizer's model_max_length 64")


@pytest.mark.parametrize(
    ("name", "values", "task_type", "reads", "writes"),
    [
        ("RobertaForSequenceClassification", {**ENCODER, "max_position_embeddings": 42}, "SEQ_CLS", 30, None),
        ("GPT2LMHeadModel", {**GPT, "n_positions": 40}, "CAUSAL_LM", 30, None),
        ("BartForConditionalGeneration", {**BOTH, "max_position_embeddings": 40}, "SEQ_2_SEQ_LM", 30, 40),
    ],
)
def test_virtual_tokens_take_positions(name, values, task_type, reads, writes):
    options = {"task_type": task_type, "num_virtual_tokens": 10}
    prompt = get_peft_model(tiny(name, values), PromptTuningConfig(num_transformer_submodules=1, **options))
    assert positions(prompt) == (reads, f"the 40 positions of {name} behind 10 virtual tokens")
    prefix = get_peft_model(tiny(name, values), PrefixTuningConfig(**options))
    if writes is None:
        assert positions(prefix).tokens == reads
    else:  # the keys and values stand in the decoder
        assert positions(prompt, decoder=True).tokens == writes
        assert (positions(prefix).tokens, positions(prefix, decoder=True).tokens) == (writes, reads)
    full = get_peft_model(tiny(name, values), PromptTuningConfig(**{**options, "num_virtual_tokens": 40}))
    with pytest.raises(UserError, match="^40 virtual tokens do not fit into the 40 positions of"):
        positions(full)
