from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
from datasets import ClassLabel, Dataset
from scipy.stats import pearsonr
from sklearn.metrics import matthews_corrcoef
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, EvalPrediction

from helpers import tasks as helper
from redpeft.errors import UserError
from redpeft.tasks.base import DataConfig, task_from_dict
from redpeft.tasks.data import read_data
from redpeft.tasks.text_to_text import TextToTextTask

SINGLE = {"sentence": ["a good film", "a bad film", "awful"], "label": ["good", "bad", "bad"]}
PAIRS = {"sentence1": ["one", "two"], "sentence2": ["three", "four"], "label": [0, 1]}
NUMBERS = {"sentence1": ["a", "b", "c"], "sentence2": ["d", "e", "f"], "label": [3.84, 0.0, 5.0]}

make = helper.make
task_of = partial(helper.task_of, TextToTextTask)
regression_of = partial(task_of, problem_type="regression")


@pytest.fixture
def tokenizer(tiny_t5_folder):
    return AutoTokenizer.from_pretrained(tiny_t5_folder)


def texts_of(tokenizer, rows: list[list[int]]) -> list[str]:
    return [tokenizer.decode(ids) for ids in rows]


def test_a_single_text(tokenizer):
    task = task_of(SINGLE)
    assert task.columns == {"text": "sentence", "label": "label"}
    assert (task.metric, task.greater_is_better, task.label_names) == ("accuracy", True, ["bad", "good"])
    encoded = task.encode(make(SINGLE), tokenizer, 64)
    assert texts_of(tokenizer, encoded["input_ids"])[0] == "a good film</s>"
    assert texts_of(tokenizer, encoded["labels"]) == ["good</s>", "bad</s>", "bad</s>"]
    assert "labels" not in task.encode(make(SINGLE), tokenizer, 64, with_labels=False).column_names
    with_prefix = task_of(SINGLE, {"prefix": "sst2"}).encode(make(SINGLE), tokenizer, 64)
    assert texts_of(tokenizer, with_prefix["input_ids"])[0] == "sst2 sentence: a good film</s>"


def test_a_pair_alone_and_as_t5_was_trained(tokenizer):
    published = task_of(PAIRS).encode(make(PAIRS), tokenizer, 64)
    assert texts_of(tokenizer, published["input_ids"])[1] == "two</s> four</s>"
    assert texts_of(tokenizer, published["labels"]) == ["0</s>", "1</s>"]
    named = task_of(PAIRS, {"prefix": "mrpc"}).encode(make(PAIRS), tokenizer, 64)
    assert texts_of(tokenizer, named["input_ids"])[1] == "mrpc sentence1: two sentence2: four</s>"
    assert named["labels"] == published["labels"]
    cut = task_of(PAIRS).encode(make(PAIRS), tokenizer, 8)
    assert max(map(len, cut["input_ids"])) == 8


@pytest.mark.parametrize(
    ("written", "end", "label"),
    [("$A", "</s>", "good</s>"), ("$A </s> <unk>", "</s>", "good</s><unk>"), ("$A <unk>", None, "good<unk>")],
    ids=["no end", "an end and a language code, as mBART", "no end token, as BERT"],
)
def test_labels_end_once(tokenizer, written, end, label):
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("</s>", "<unk>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=written, special_tokens=special)
    tokenizer.eos_token = end
    labels = task_of(SINGLE).encode(make(SINGLE), tokenizer, 64)["labels"]
    assert texts_of(tokenizer, labels)[0] == label


def test_labels_are_words_where_the_data_has_words(tokenizer):
    names = ClassLabel(names=["entailment", "not_entailment"])
    dataset = Dataset.from_dict(PAIRS).cast_column("label", names)
    task = TextToTextTask.from_splits({"train": dataset}, DataConfig(path="x"))
    labels = task.encode(dataset, tokenizer, 64)["labels"]
    assert texts_of(tokenizer, labels) == ["entailment</s>", "not_entailment</s>"]


def test_numbers_have_one_decimal(tokenizer):
    task = regression_of(NUMBERS)
    assert (task.problem_type, task.metric) == ("regression", "pearson")
    labels = task.encode(make(NUMBERS), tokenizer, 64)["labels"]
    assert texts_of(tokenizer, labels) == ["3.8</s>", "0.0</s>", "5.0</s>"]


def test_the_loss_is_that_of_the_labels_tokens(tiny_t5_folder, tokenizer):
    import torch

    task = task_of(SINGLE)
    model = task.load_model(tiny_t5_folder, tokenizer).eval()
    rows = list(task.encode(make(SINGLE), tokenizer, 64))
    batch = task.collator(tokenizer)(rows)
    learned = [[token for token in row.tolist() if token != -100] for row in batch["labels"]]
    assert learned == [row["labels"] for row in rows]
    losses = []
    with torch.no_grad():
        for row in rows:  # alone, without padding
            decoder = torch.tensor([[tokenizer.pad_token_id, *row["labels"][:-1]]])
            logits = model(torch.tensor([row["input_ids"]]), decoder_input_ids=decoder).logits[0].log_softmax(-1)
            losses += [-logits[at, token] for at, token in enumerate(row["labels"])]
        together = model(**batch).loss
    assert together == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_generated_labels_are_compared_as_texts():
    task = task_of(PAIRS)
    generated, expected = ["0", " 1 ", "1", "", "0 0", "2"], ["0", "1", "0", "1", "0", "1"]
    scores = task.compute_metrics(EvalPrediction(generated, expected))
    assert scores["accuracy"] == pytest.approx(2 / 6)
    assert scores["matthews"] == matthews_corrcoef([0, 1, 0, 1, 0, 1], [0, 1, 1, 2, 2, 2])
    assert scores["unreadable"] == pytest.approx(3 / 6)
    perfect = task.compute_metrics(EvalPrediction(expected, expected))
    assert perfect == {"accuracy": 1.0, "f1_macro": 1.0, "matthews": 1.0, "unreadable": 0.0}
    assert task.compute_metrics(EvalPrediction(["x"] * 6, expected))["accuracy"] == 0


@pytest.mark.parametrize("text", ["", "good", "3.8.", "nan", "inf", "1e3", "3,8", ".5", "3 8", "٣"])
def test_texts_that_are_no_number_are_as_wrong_as_can_be(text):
    expected = ["0.0", "1.0", "4.0", "5.0"]
    scores = regression_of(NUMBERS).compute_metrics(EvalPrediction(["0.2", text, text, "4.9"], expected))
    assert scores["pearson"] == pytest.approx(pearsonr([0.2, 5.0, 0.0, 4.9], [0, 1, 4, 5])[0])
    assert scores["unreadable"] == 0.5


def test_numbers_are_taken_as_they_are():
    expected = ["0.0", "1.0", "4.0", "5.0"]
    scores = regression_of(NUMBERS).compute_metrics(EvalPrediction(["-0.5", "1", " 3.75", "+7.0"], expected))
    assert scores["pearson"] == pytest.approx(pearsonr([-0.5, 1, 3.75, 7], [0, 1, 4, 5])[0])
    assert scores["unreadable"] == 0
    constant = regression_of(NUMBERS).compute_metrics(EvalPrediction(["1.0"] * 4, expected))
    assert constant["pearson"] == 0


def test_answers():
    assert task_of(SINGLE).decode([" good", "gooood", ""]) == [
        {"label": "good", "generated": "good"},
        {"label": None, "generated": "gooood"},
        {"label": None, "generated": ""},
    ]
    assert regression_of(NUMBERS).decode(["3.8", "three"]) == [
        {"value": 3.8, "generated": "3.8"},
        {"value": None, "generated": "three"},
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", "b"], "label": [["x"], ["y"]]}, "the task text-to-text has one label a row; for several"),
        ({"text": ["a", "b"], "label": ["x", "x"]}, "train.csv: every row has the label 'x'"),
        ({"text": ["a", ""], "label": ["x", "y"]}, "train.csv, row 2: the text in column 'text' is empty"),
    ],
)
def test_bad_rows(columns, message):
    with pytest.raises(UserError, match=message):
        task_of(columns)


@pytest.mark.parametrize("label", ["{x}", "x" * 40])
def test_a_label_that_the_tokenizer_cannot_write(tokenizer, label):
    rows = {"text": ["a", "b"], "label": ["y", label]}
    with pytest.raises(UserError, match=r"^train.csv: the label '.*' is '.*' in this model's tokens \(at most 32\)"):
        task_of(rows).encode(make(rows), tokenizer, 64)


def test_a_base_that_is_no_encoder_decoder(tiny_encoder_folder, tokenizer):
    with pytest.raises(UserError, match="with AutoModelForSeq2SeqLM: .* needs an encoder-decoder, such as T5"):
        task_of(SINGLE).load_model(tiny_encoder_folder, tokenizer)


def test_a_task_survives_its_json():
    task = regression_of(NUMBERS, {"prefix": "stsb"})
    again = task_from_dict(json.loads(json.dumps(task.to_dict())))
    assert again == task
    assert (type(again), again.prefix) == (TextToTextTask, "stsb")


def test_shared_data(shared_data, tokenizer):
    config = DataConfig(path=str(shared_data / "stsb"), max_train_rows=40, max_eval_rows=10)
    task, splits = read_data("text-to-text", config)
    labels = texts_of(tokenizer, task.encode(splits["train"], tokenizer, 128)["labels"])
    numbers = np.array([float(text.removesuffix("</s>")) for text in labels])
    assert np.abs(numbers - np.array(splits["train"]["label"])).max() <= 0.05 + 1e-9
