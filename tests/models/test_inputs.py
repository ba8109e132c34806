"""Padding, digests of tokenizers, and how long a row may be."""

import pytest
import torch
import transformers
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from redpeft.errors import UserError
from redpeft.models import ensure_pad_token, input_limit, pad_prompts, positions, tokenizer_digest


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


def test_a_tokenizers_digest_tells_other_tokens_and_not_its_use(tiny_encoder_folder):
    def digest(change=lambda tokenizer: None):
        tokenizer = AutoTokenizer.from_pretrained(tiny_encoder_folder)
        change(tokenizer)
        return tokenizer_digest(tokenizer)

    def use(tokenizer):
        tokenizer(["a", "a long text"], truncation=True, max_length=5, padding="max_length")

    own = digest()
    assert digest(use) == own
    for change in (
        lambda tokenizer: tokenizer.add_tokens(["<mine>"]),
        lambda tokenizer: setattr(tokenizer, "pad_token", "a"),
        lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
        lambda tokenizer: setattr(tokenizer, "model_max_length", 17),
        lambda tokenizer: setattr(tokenizer, "padding_side", "left" if tokenizer.padding_side == "right" else "right"),
    ):
        assert digest(change) != own


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
