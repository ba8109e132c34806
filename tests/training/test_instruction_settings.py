"""The paper's instruction tuning of Llama-2, said in a recipe, is what TRL's trainer does."""

from __future__ import annotations

import json
import math

import pytest

from redpeft.tasks.base import TASKS
from redpeft.tasks.data import read_splits
from redpeft.training.learner import apply_method, load_base
from redpeft.training.recipe import load_recipe
from redpeft.training.trainer import make_trainer

pytest.importorskip("trl")

PUBLISHED = """\
task: instruction
data: {{path: {data}, chat_template: plain}}
base: {base}
method: red
method_options: {{unit: 1}}
learning_rate: 1e-3
batch_size: 128
gradient_accumulation: 64
schedule: cosine
warmup: 0.1
weight_decay: 0.01
epochs: 10
max_length: 768
seed: 42
"""


@pytest.fixture
def trainer(tiny_decoder_folder, tiny_chat_tokenizer, tmp_path):
    """The trainer of the published settings on 256 rows, with any field changed; the base has a chat template."""
    rows = [{"prompt": f"Question {i}", "response": f"answer {i}"} for i in range(256)]
    rows[0] = {"prompt": "Long", "response": "x" * 900}
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "published.yaml"
    path.write_text(PUBLISHED.format(data=tmp_path, base=tiny_decoder_folder))

    def make(*changes):
        recipe = load_recipe(path, list(changes)).resolved()
        splits = read_splits(recipe.data, recipe.seed)
        task = TASKS["instruction"].from_splits(splits, recipe.data)
        base, _ = load_base(recipe, task)
        model = apply_method(base, recipe)
        encoded = {name: task.encode(split, tiny_chat_tokenizer, recipe.max_length) for name, split in splits.items()}
        return make_trainer(recipe, tmp_path / "run", task, model, tiny_chat_tokenizer, encoded, [])

    return make


def test_batches_and_rates(trainer):
    args = trainer().args
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 64)
    assert (args.num_train_epochs, args.seed, args.weight_decay) == (10, 42, 0.01)
    built = trainer()
    built.create_optimizer_and_scheduler(num_training_steps=100)
    rates = []
    for _ in range(101):
        rates.append(built.lr_scheduler.get_last_lr()[0])
        built.optimizer.step()
        built.lr_scheduler.step()
    assert rates[5] == pytest.approx(1e-3 * 5 / 10)
    assert rates[10] == pytest.approx(1e-3)
    assert rates[40] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 30 / 90)) / 2)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert {group["weight_decay"] for group in built.optimizer.param_groups if group["params"]} <= {0, 0.01}
    assert 0.01 in {group["weight_decay"] for group in built.optimizer.param_groups if group["params"]}


def labelled(trainer, row):
    """The text of a row, and of what of it is learned."""
    tokenizer = trainer.processing_class
    batch = trainer.data_collator([trainer.train_dataset[row]])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    return tokenizer.decode(ids), tokenizer.decode(ids[labels != -100])


def test_template_and_what_is_learned(trainer):
    text, learned = labelled(trainer(), 7)
    assert text == "<s>Human: Question 7\n\nAssistant: answer 7</s>"
    assert learned == " answer 7</s>"
    assert labelled(trainer("learn_prompt=true"), 7) == (text, text)
    chat, _ = labelled(trainer("data.chat_template=auto"), 7)
    assert "<|user|>\nQuestion 7" in chat


def test_rows_are_cut_at_768_tokens(trainer):
    assert len(trainer().train_dataset[0]["input_ids"]) == 768
