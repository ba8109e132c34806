"""What `--budget smoke` runs on: tiny models with random weights and generated rows, to check that a table runs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from redpeft.evaluation.language_model import Decoding
from redpeft.evaluation.lm_harness import HarnessTask
from redpeft.reproduce.external_scores import Scoring
from redpeft.tasks.rows import GLUE, HELD_OUT

SMOKE: dict[str, Any] = {
    "epochs": 1,
    "max_steps": 3,
    "batch_size": 8,
    "gradient_accumulation": 1,
    "max_length": 96,
    "data.max_train_rows": 32,
    "data.max_eval_rows": 4,
    "data.validation_fraction": 0.1,
}
"""Fields of the recipes of a smoke test."""

SPECIAL = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {  # what a family's tokenizer puts around a text, and around a pair
    "roberta": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "t5": ("$A </s>", "$A $B </s>"),
    "gpt2": ("$A", "$A $B"),
    "llama2": ("<s> $A", "<s> $A $B"),
}
WORDS = ("the", "a", "old", "small", "cat", "house", "river", "food", "reads", "sees", "finds", "near", "never")


def make_model(folder: Path, family: str) -> Path:
    """A model of random weights in the shape of `family` (width 32; six blocks in each stack, since AdapterDrop
    leaves five without), with a tokenizer of single bytes. Returns its folder, in which it is made once."""
    if not (folder / "config.json").is_file():
        tokenizer = _tokenizer(family)
        torch.manual_seed(0)
        model = MODELS[family](len(tokenizer), {key: tokenizer.convert_tokens_to_ids(SPECIAL[key]) for key in SPECIAL})
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder.resolve()


def make_data(folder: Path, tasks: Sequence[str]) -> Path:
    """`folder`, with generated train, validation and test rows of each task of the paper, in a folder each."""
    for task in tasks:
        draw = random.Random(task)
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split, rows in SIZES[task].items():
            lines = [json.dumps(ROWS[task](draw), ensure_ascii=False) + "\n" for _ in range(rows)]
            (folder / task / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def make_scoring(folder: Path, benchmark: str) -> Scoring:
    """Two generated questions, or one generated task of lm-eval, in files in `folder`."""
    folder = folder.resolve()
    draw, asked = random.Random(benchmark), folder / f"{benchmark}.jsonl"
    rows = [QUESTIONS[benchmark](draw, number) for number in range(2)]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = folder / "lm-eval.yaml"
    task.write_text(json.dumps({**LM_TASK, "dataset_kwargs": {"data_files": {"test": str(asked)}}}), encoding="utf-8")
    return Scoring(asked, Decoding(max_new_tokens=8), (HarnessTask(str(task), 0, "acc,none"),))


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    pieces = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    single, pair = TEMPLATES[family]
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, ids[token]) for token in SPECIAL.values()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


def _roberta(size: int, ids: dict[str, int]) -> Any:
    shape = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=size, max_position_embeddings=260, **shape, **_ids(ids))
    return RobertaModel(config, add_pooling_layer=False)


def _t5(size: int, ids: dict[str, int]) -> Any:
    shape = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 6, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=size, decoder_start_token_id=ids["pad_token"], **shape, **_ids(ids))
    )


def _gpt2(size: int, ids: dict[str, int]) -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=size, n_positions=256, n_embd=32, n_layer=6, n_head=2, **_ids(ids)))


def _llama(size: int, ids: dict[str, int]) -> Any:
    shape = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=size, max_position_embeddings=256, **shape, **_ids(ids)))


def _ids(ids: dict[str, int]) -> dict[str, int]:
    return {key.replace("token", "token_id"): value for key, value in ids.items() if key != "unk_token"}


MODELS: dict[str, Callable[[int, dict[str, int]], Any]] = {
    "roberta": _roberta,
    "t5": _t5,
    "gpt2": _gpt2,
    "llama2": _llama,
}


def _text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(3, 8)))


def _glue(task: str) -> Callable[[random.Random], dict[str, Any]]:
    pairs = {"mnli": ("premise", "hypothesis"), "qnli": ("question", "sentence"), "qqp": ("question1", "question2")}
    columns = pairs.get(task, ("sentence",) if task in ("sst2", "cola") else ("sentence1", "sentence2"))

    def row(draw: random.Random) -> dict[str, Any]:
        texts = {column: _text(draw) for column in columns}
        label = round(draw.uniform(0, 5), 1) if task == "stsb" else draw.randrange(3 if task == "mnli" else 2)
        return {**texts, "label": label}

    return row


def _meaning(draw: random.Random) -> dict[str, Any]:
    name, food = draw.choice(("Aromi", "Clowns", "Cotto", "Zizzi")), draw.choice(("Thai", "Indian", "English"))
    return {"meaning_representation": f"name[{name}], food[{food}]", "human_reference": f"{name} serves {food} food."}


def _chat(draw: random.Random) -> dict[str, Any]:
    turns = (("user", _text(draw) + "?"), ("assistant", _text(draw) + "."))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


QUESTIONS: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "alpaca-eval": lambda draw, number: {"instruction": _text(draw)},
    "mt-bench": lambda draw, number: {"question_id": number, "turns": [_text(draw), _text(draw)]},
    "lm-eval": lambda draw, number: {"question": _text(draw), "choices": ["yes", "no"], "answer": number},
}
LM_TASK = {
    "task": "redpeft_smoke",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
ROWS = {**{task: _glue(task) for task in GLUE}, "e2e": _meaning, "ultrafeedback": _chat}
SIZES = {task: {"train": 64, "validation": 48, "test": 16} for task in ROWS}
for _task in ("mnli", "qnli", "qqp", "sst2"):  # of which 1000 rows are taken out
    SIZES[_task] = {"train": HELD_OUT + 100, "validation": 2 * HELD_OUT + 50}
