"""Rows that are longer than the model reads, and rows that teach nothing: in training, evaluation and prediction."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from transformers import AutoTokenizer, CanineTokenizer

from redpeft.errors import UserError
from redpeft.training.predict import evaluate, open_run, predict
from redpeft.training.recipe import load_recipe
from redpeft.training.train import train

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2}
BOTH = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
BOTH |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 1}


@pytest.fixture
def base(tmp_path, tiny_decoder_folder, tiny_t5_folder):
    """A model folder of any class, with the tokenizer of bytes, which sets no limit of its own."""

    def make(name, tokenizer=None, **values):
        folder = tmp_path / name
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(
            tiny_t5_folder if name.startswith("Bart") else tiny_decoder_folder  # BART wants an end behind each text
        )
        tokenizer.model_max_length = 10**30
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        model_class = getattr(transformers, name)
        ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **values}
        ids["pad_token_id"] = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        model_class(model_class.config_class(**ids)).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def run(tmp_path):
    """Two steps on these rows, which are validation rows too: the result, and the run."""

    def make(base, task, rows, folder="run", **changes):
        for split in ("train", "validation"):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        values = {"base": base, "data": str(tmp_path), "task": task, "batch_size": 4, "max_steps": 2, **changes}
        result = train(load_recipe(None, values), tmp_path / folder)
        return result, open_run(tmp_path / folder)

    return make


LONG = "x" * 100
CLASSES = [{"text": text, "label": label} for text, label in (("good", "yes"), ("bad", "no"), (LONG, "no"))] * 4
PAIRS = [{"prompt": "Say yes", "response": "yes"}, {"prompt": "Count", "response": LONG}] * 4
TAGS = [{"tokens": ["a", "b"], "tags": ["A", "B"]}, {"tokens": ["a"] * 100, "tags": ["A"] * 100}] * 4
MRS = [{"mr": "name[A]", "ref": "A is here."}, {"mr": "m" * 100, "ref": "r" * 200}] * 4
MODELS = {  # the base model, the task, rows of which every third or second is too long, and fields of the recipe
    "RoBERTa's positions begin at 3": (
        ("RobertaForMaskedLM", {**SMALL, "max_position_embeddings": 35}), "classification", CLASSES,
        "4 of 12 rows (33.3 %) are longer than the 32 positions of RobertaForSequenceClassification and are cut", {},
    ),
    "BART reads a row with its encoder and its decoder": (
        ("BartForConditionalGeneration", {**BOTH, "max_position_embeddings": 32}), "classification", CLASSES,
        "4 of 12 rows (33.3 %) are longer than the 32 positions of BartForSequenceClassification and are cut", {},
    ),
    "virtual tokens": (
        ("BertForMaskedLM", {**SMALL, "max_position_embeddings": 32}), "classification", CLASSES,
        "4 of 12 rows (33.3 %) are longer than the 32 positions of BertForSequenceClassification behind 10 virtual",
        {"method": "prompt", "method_options": {"num_virtual_tokens": 10}},
    ),
    "OPT's table has two more": (
        ("OPTForCausalLM", {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 50}),
        "instruction", PAIRS, "4 of 8 rows (50 %) are longer than the 50 positions of OPTForCausalLM and are cut", {},
    ),
    "tags": (
        ("BertForMaskedLM", {**SMALL, "max_position_embeddings": 32}), "token-classification", TAGS,
        "4 of 8 rows (50 %) are longer than the 32 positions of BertForTokenClassification and are cut", {},
    ),
    "an encoder and a decoder": (
        ("BartForConditionalGeneration", {**BOTH, "max_position_embeddings": 32}), "text-to-text", CLASSES,
        "4 of 12 rows (33.3 %) are longer than the 32 positions of BartForConditionalGeneration and are cut", {},
    ),
    "texts for meaning representations": (
        ("GPT2LMHeadModel", {**GPT, "n_positions": 80}), "e2e", MRS,
        "4 of 8 rows (50 %) are longer than the 80 positions of GPT2LMHeadModel, an MR of 64 or a text of 100 tokens",
        {},
    ),
    "the least counts": (
        ("LlamaForCausalLM", SMALL), "instruction", PAIRS, "4 of 8 rows (50 %) are longer than max_length 60 and are",
        {"max_length": 60},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_rows_end_where_the_model_does(base, run, capsys, case):
    (name, values), task, rows, says, changes = MODELS[case]
    result, finished = run(base(name, **values), task, rows, **changes)
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith(f"train.jsonl, train: {says}")]
    assert result["rows_cut"] == {"train": 4, "validation": 4}
    assert result["rows_left_out"] == {"train": 0, "validation": 0}
    if task != "e2e":
        scores = evaluate(finished, finished.recipe.data.path + "/validation.jsonl")
        metric = finished.task.metric
        assert scores[metric] == pytest.approx(result["validation"][metric], abs=1e-5)
        assert f"validation.jsonl: {says}" in capsys.readouterr().err
    assert len(list(predict(finished, rows[:2]))) == 2


def test_rows_that_teach_nothing_are_left_out(base, run, capsys):
    rows = [{"prompt": LONG if index % 4 else "Say yes", "response": "yes"} for index in range(12)]
    result, finished = run(base("LlamaForCausalLM", **SMALL), "instruction", rows, max_length=60)
    says = (
        "9 of 12 rows (75 %) are longer than max_length 60 and are cut; 9 have nothing left to learn and are left out"
    )
    assert f"train.jsonl, train: {says}\nvalidation.jsonl, validation: {says}\n" in capsys.readouterr().err
    assert result["rows"] == {"train": 12, "validation": 12}
    assert result["rows_cut"] == result["rows_left_out"] == {"train": 9, "validation": 9}
    data = finished.folder.parent / "validation.jsonl"
    assert evaluate(finished, data)["loss"] == pytest.approx(result["validation"]["loss"], abs=1e-5)
    assert f"validation.jsonl: {says}" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(3))
def test_validation_rows_of_which_nothing_is_left_are_taken_anew(base, tmp_path, seed, capsys):
    rows = [{"prompt": f"{index}{LONG if index % 4 else ''}", "response": "yes"} for index in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"base": base("LlamaForCausalLM", **SMALL), "data": str(tmp_path / "rows.jsonl"), "task": "instruction"}
    values |= {"max_length": 60, "max_steps": 1, "batch_size": 2, "data.validation_fraction": 0.05, "seed": seed}
    result = train(load_recipe(None, values), tmp_path / "run")
    taken = "1 have nothing left to learn and are left out; 1 of the training rows are taken instead\n"
    assert (taken in capsys.readouterr().err) is (result["rows_left_out"]["validation"] == 1)
    assert result["validation"]["loss"] > 0


@pytest.mark.parametrize("packing", [False, True])
def test_nothing_is_left_to_learn(base, run, packing):
    rows = [{"prompt": LONG, "response": "yes"}] * 8
    with pytest.raises(UserError) as caught:
        run(base("LlamaForCausalLM", **SMALL), "instruction", rows, max_length=30, packing=packing)
    assert str(caught.value) == (
        "train.jsonl, train: cut at max_length 30, none of 8 rows has anything left to learn: raise max_length or "
        "shorten the rows"
    )


def test_tokenizers_with_neither_a_pad_nor_an_end_token(base, run, tiny_decoder_folder, caplog):
    """Another token pads, masked: rows of a batch are answered as each is alone."""
    bare = AutoTokenizer.from_pretrained(tiny_decoder_folder)
    bare.eos_token = bare.bos_token = None
    folder = base("LlamaForCausalLM", tokenizer=bare, **SMALL)
    for task, rows in (("instruction", PAIRS), ("classification", CLASSES), ("token-classification", TAGS)):
        _, finished = run(folder, task, rows, folder=task)
        assert finished.tokenizer.pad_token == "<unk>"
        together, alone = (
            [answer for batch in batches for answer in predict(finished, batch, max_new_tokens=5)]
            for batches in ([rows[:2]], [rows[:1], rows[1:2]])
        )
        for one, other in zip(together, alone, strict=True):
            assert one.pop("probabilities", {}) == pytest.approx(other.pop("probabilities", {}))
            assert one == other
    assert "the tokenizer has no end token, so answers are learned without an end" in caplog.text


def test_a_prompt_teaches_where_prompts_are_learned(base, run):
    rows = [{"prompt": LONG, "response": "yes"}] * 8
    result, _ = run(base("LlamaForCausalLM", **SMALL), "instruction", rows, max_length=60, learn_prompt=True)
    assert result["rows_left_out"] == {"train": 0, "validation": 0}


def test_answers_end_where_the_model_does(base, run, capsys):
    """Prompts with less room than others are answered by themselves: no answer depends on the others of a batch."""
    _, finished = run(base("GPT2LMHeadModel", **GPT, n_positions=64), "instruction", PAIRS[:1] * 4)
    finished.model.generation_config.eos_token_id = None
    long = "y" * 30  # 53 tokens with the template
    together = list(predict(finished, ["Say", long, "Say", long + "z"], max_new_tokens=20))
    said = capsys.readouterr().err
    assert "the data, row 2: room for fewer than 20 new tokens\n" in said
    assert "2 of 4 rows: room for fewer than 20 new tokens\n" in said
    assert together == [
        answer for text in ("Say", long, "Say", long + "z") for answer in predict(finished, [text], max_new_tokens=20)
    ]
    with pytest.raises(
        UserError, match="^the data, row 2: a prompt of 120 tokens leaves no room for an answer: the model reads 64$"
    ):
        list(predict(finished, ["Say", LONG]))


def test_a_label_that_the_decoder_cannot_hold(base, run):
    rows = [{"text": "a", "label": "yes"}, {"text": "b", "label": "no" * 9}] * 4
    with pytest.raises(
        UserError, match="^train.jsonl, row 2: its label has 20 tokens, more than the 12 positions of B"
    ):
        run(base("BartForConditionalGeneration", **BOTH, max_position_embeddings=12), "text-to-text", rows)


def test_encoder_decoders_classify_by_the_end_of_a_text(base, run, tiny_decoder_folder):
    bytes_alone = AutoTokenizer.from_pretrained(tiny_decoder_folder)  # without an end
    with pytest.raises(UserError, match="^an encoder-decoder classifies a text by the end token after it, but this"):
        run(base("BartForConditionalGeneration", tokenizer=bytes_alone, **BOTH), "classification", CLASSES)
    rows = [*CLASSES, {"text": "not the end</s>, is it?", "label": "no"}]
    with pytest.raises(UserError, match="^train.jsonl, row 13: the text holds the end token '</s>': remove it"):
        run(base("BartForConditionalGeneration", **BOTH), "classification", rows)


def test_a_tokenizer_of_another_model(base, run, tiny_chat_tokenizer):
    tokenizer = copy.deepcopy(tiny_chat_tokenizer)
    folder = base("LlamaForCausalLM", tokenizer=tokenizer, **SMALL)
    tokenizer.add_tokens(["wonderful"])
    tokenizer.save_pretrained(folder)
    result, _ = run(folder, "classification", CLASSES)  # nobody writes it
    assert result["steps"] == 2
    with pytest.raises(
        UserError, match="^train.jsonl has the token 'wonderful', number 259, and the base model has 25"
    ):
        run(folder, "classification", [*CLASSES, {"text": "wonderful", "label": "yes"}], folder="other")


def test_characters_without_embeddings_of_their_own(base, run):
    """CANINE looks them up by a digest, and its tokenizer numbers all of Unicode."""
    values = {**SMALL, "max_position_embeddings": 32, "num_hash_buckets": 64, "hidden_size": 24}
    folder = base("CanineModel", tokenizer=CanineTokenizer(), **values)
    result, finished = run(folder, "classification", CLASSES, method="head")
    assert result["rows_cut"]["train"] == 4
    assert len(list(predict(finished, ["good", LONG]))) == 2


def test_rows_that_were_cut_are_told_of_once(base, run, capsys):
    _, finished = run(base("BertForMaskedLM", **SMALL, max_position_embeddings=32), "classification", CLASSES)
    capsys.readouterr()
    assert len(list(predict(finished, ["good", LONG, LONG], batch_size=1))) == 3
    assert capsys.readouterr().err.splitlines() == [
        "the data, row 2: longer than the 32 positions of BertForSequenceClassification, cut",
        "2 of 3 rows: longer than the 32 positions of BertForSequenceClassification, cut",
    ]
