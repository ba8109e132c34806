from __future__ import annotations

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers.training import learn
from redpeft.errors import UserError
from redpeft.training.baselines import peft_types
from redpeft.training.learner import apply_method, trainable_parameters
from redpeft.training.recipe import load_recipe

VOCAB, WIDTH, TOKENS = 50, 16, 4
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=VOCAB, max_position_embeddings=64, **SIZES, **DROPOUT))


def roberta():
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=VOCAB, max_position_embeddings=66, **SIZES, **DROPOUT)
    return RobertaForSequenceClassification(config)


def distilbert():
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=VOCAB, dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=32)
    )


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64)
    return GPT2LMHeadModel(config).eval()


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **SIZES))


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes))


def recipe(method, task="classification", max_length=48, **options):
    values = {"base": "m", "data": "d", "method": method, "task": task, "max_length": max_length}
    return load_recipe(None, {**values, "method_options": {"num_virtual_tokens": TOKENS, **options}})


CASES = [
    (bert, "classification"),
    (roberta, "classification"),
    (gpt2, "instruction"),
    (t5, "text-to-text"),
]


def test_the_names_that_are_read_from_a_file_of_peft_are_its_methods():
    assert peft_types() == {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"redpeft"}


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize(("build", "task"), CASES)
def test_what_is_trained_and_that_it_learns(build, task, method):
    model = apply_method(build(), recipe(method, task))
    length = WIDTH if method == "prompt" else 2 * 2 * WIDTH  # an embedding, or keys and values of two blocks
    counted = trainable_parameters(build(), recipe(method, task))
    assert counted.method == TOKENS * length
    assert counted.head == (0 if task != "classification" else sum(p.numel() for p in build().classifier.parameters()))
    rows = torch.randint(5, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(rows)
    mask[0, 4:] = 0
    labels = torch.tensor([0, 1, 1]) if task == "classification" else rows.masked_fill(mask == 0, -100)
    moved = learn(model, 0.01, 6, input_ids=rows, attention_mask=mask, labels=labels)
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("prompt_encoder" in name or "classifier.modules_to_save" in name for name in moved)


def test_a_prompt_begins_as_words_of_the_vocabulary():
    model = apply_method(bert(), recipe("prompt"))
    words = model.base_model.bert.embeddings.word_embeddings.weight
    [prompt] = [p for name, p in model.named_parameters() if "prompt_encoder" in name]
    assert all((words == vector).all(-1).any() for vector in prompt)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("build", [gpt2, llama])
def test_padding_does_not_change_what_is_generated(build, method):
    model = apply_method(build(), recipe(method, "instruction")).eval()
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.7)
    rows = torch.randint(5, VOCAB, (2, 9))
    mask = torch.ones_like(rows)
    mask[0, :4] = 0
    for beams in (1, 3):
        options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": 1}
        both = model.generate(input_ids=rows, attention_mask=mask, **options)[0, 9:]
        alone = model.generate(input_ids=rows[:1, 4:], attention_mask=mask[:1, 4:], **options)[0, 5:]
        assert len(set(alone.tolist())) > 1
        assert both[: len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("tokens", [0, -1, "many"])
def test_wrong_numbers_of_tokens(tokens):
    with pytest.raises(
        UserError, match="method_options: num_virtual_tokens must be a whole number of at least 1, not"
    ):
        apply_method(bert(), recipe("prompt", num_virtual_tokens=tokens))


def test_models_without_a_place_for_a_prefix():
    with pytest.raises(UserError, match="DistilBertForSequenceClassification takes none: choose another method"):
        apply_method(distilbert(), recipe("prefix"))


def test_a_projection_that_peft_does_not_save():
    with pytest.raises(UserError, match="with prefix_projection PEFT saves the projection's output and not"):
        apply_method(gpt2(), recipe("prefix", "instruction", prefix_projection=True, encoder_hidden_size=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "prompt", "task": "instruction", "packing": True},
            "packing would put several rows after one prompt",
        ),
        ({"method": "prefix", "gradient_checkpointing": True}, "prefix does not work with gradient_checkpointing"),
    ],
)
def test_what_does_not_go_together(changes, message):
    with pytest.raises(UserError, match=message):
        load_recipe(None, {"base": "m", "data": "d", **changes})
