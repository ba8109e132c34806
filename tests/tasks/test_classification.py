from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features, Sequence, Value
from transformers import AutoTokenizer, EvalPrediction

from helpers import tasks as helper
from redpeft.errors import UserError
from redpeft.tasks.base import TASKS, DataConfig, task_from_dict
from redpeft.tasks.classification import ClassificationTask
from redpeft.tasks.data import read_splits

TEXTS = ["the film is good", "the film is awful", "a very bad shop", "great"]

make = helper.make
task_of = partial(helper.task_of, ClassificationTask)
error_of = partial(helper.error_of, ClassificationTask)


# --- columns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (["sentence", "label"], {"text": "sentence", "label": "label"}),
        (["idx", "Text", "Class"], {"text": "Text", "label": "Class"}),
        (["sentence2", "sentence1", "label"], {"text": "sentence1", "text_pair": "sentence2", "label": "label"}),
        (["premise", "hypothesis", "label"], {"text": "premise", "text_pair": "hypothesis", "label": "label"}),
        (["question", "sentence", "label"], {"text": "question", "text_pair": "sentence", "label": "label"}),
        (["id", "remark", "verdict"], {"text": "remark", "label": "verdict"}),
        (["remark", "intent"], {"text": "remark", "label": "intent"}),
    ],
)
def test_columns_are_guessed(columns, found):
    texts = [name for key, name in found.items() if key != "label"]
    rows = {name: TEXTS if name in texts else [3, 4, 5, 6] for name in columns}
    rows[found["label"]] = ["a", "b", "a", "b"]
    assert task_of(rows).columns == found


def test_the_longest_text_is_the_text():
    rows = {"who": ["ann", "bob"], "what": ["a long remark", "another remark"], "label": [0, 1]}
    assert task_of(rows).columns["text"] == "what"


def test_columns_that_are_named_are_taken():
    rows = {"sentence": ["x", "y"], "label": [0, 0], "b": TEXTS[:2], "a": TEXTS[2:], "kind": ["p", "q"]}
    task = task_of(rows, {"text": "b", "label": "kind"})
    assert task.columns == {"text": "b", "label": "kind"}
    task = task_of(rows, {"text": "b", "text_pair": "a", "label": "kind"})
    assert task.columns == {"text": "b", "text_pair": "a", "label": "kind"}
    rows = {"topic": TEXTS[:2], "review": ["p", "q"], "stars": [1, 2]}
    assert task_of(rows, {"text": "topic"}).columns == {"text": "topic", "label": "stars"}
    assert task_of(rows, {"label": "review"}).columns == {"text": "topic", "label": "review"}


def test_columns_that_cannot_be_guessed():
    assert error_of({"text": TEXTS, "x": [0, 1, 0, 1], "y": [0, 1, 0, 1]}) == (
        "cannot tell which column of train.csv is the label (columns: text, x, y); name it with `label`"
    )
    assert "is the text (columns: number, label)" in error_of({"number": [1, 2], "label": [0, 1]})
    assert "`text_pair` is set without `text`" in error_of({"a": TEXTS, "label": [0, 1, 0, 1]}, {"text_pair": "a"})


def test_misnamed_column():
    message = error_of({"sentence": TEXTS, "label": [0, 1, 0, 1]}, {"text": "sentense"})
    assert message == "train.csv has no column 'sentense'; its columns are sentence, label. Did you mean 'sentence'?"


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        (["no", "yes", "no", "maybe"], ["maybe", "no", "yes"], [1, 2, 1, 0]),
        ([0, 1, 0, 2], ["0", "1", "2"], [0, 1, 0, 2]),
        ([10, 9, 10, 9], ["9", "10"], [1, 0, 1, 0]),
        ([1.0, 0.0, 1.0, 0.0], ["0", "1"], [1, 0, 1, 0]),
        ([True, False, True, False], ["false", "true"], [1, 0, 1, 0]),
        (["007", "0451", "7", "007"], ["007", "7", "0451"], [0, 2, 1, 0]),
        (["1.1", "1.10", "2.3", "1.1"], ["1.1", "1.10", "2.3"], [0, 1, 2, 0]),
        (["NA", "null", "nan", "None"] * 2, ["NA", "None", "nan", "null"], [0, 3, 2, 1] * 2),
        ([0.5, 1.5, 0.5, 1.5], ["0.5", "1.5"], [0, 1, 0, 1]),
    ],
)
def test_single_labels(labels, names, ids):
    rows = {"text": TEXTS * (len(labels) // 4), "label": labels}
    task = task_of(rows)
    assert task.problem_type == "single_label_classification"
    assert (task.metric, task.greater_is_better) == ("accuracy", True)
    assert task.label_names == names
    assert task.labels(make(rows)) == ids


def test_labels_that_the_data_set_names_keep_its_order_and_meet_their_names_again():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zebra", "ape", "unseen"])})
    task = task_of({"text": TEXTS, "label": [0, 1, 0, 1]}, features=features)
    assert task.label_names == ["zebra", "ape", "unseen"]
    assert task.labels(make({"label": ["ape", "zebra"]})) == [1, 0]


def test_multi_label_from_lists():
    rows = {"text": TEXTS, "labels": [["fun", "art"], [], ["art"], ["war"]]}
    task = task_of(rows)
    assert task.problem_type == "multi_label_classification"
    assert task.metric == "f1_micro"
    assert task.label_names == ["art", "fun", "war"]
    assert task.labels(make(rows)) == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_multi_label_from_lists_of_named_labels():
    features = Features({"text": Value("string"), "label": Sequence(ClassLabel(names=["z", "a"]))})
    task = task_of({"text": TEXTS, "label": [[0], [1], [0, 1], []]}, features=features)
    assert task.label_names == ["z", "a"]


def test_multi_label_from_columns():
    rows = {"text": TEXTS, "rude": [1, 0, 1, 0], "kind": [0.0, 0.0, 0.0, 1.0]}
    task = task_of(rows, {"label": ["rude", "kind"]})
    assert task.problem_type == "multi_label_classification"
    assert task.columns["label"] == task.label_names == ["rude", "kind"]
    assert task.labels(make(rows)) == [[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]


def test_columns_of_labels_as_files_write_them():
    rows = {"text": TEXTS, "rude": ["1", "0", "1", "0"], "kind": ["False", "false", "0.0", "True"]}
    task = task_of(rows, {"label": ["rude", "kind"]})
    assert task.labels(make(rows)) == [[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("data", [{}, {"label_separator": "|"}])
def test_multi_label_from_texts(data, caplog):
    rows = {"text": TEXTS, "label": ["a|urgent", "vip", "a | vip", "urgent|vip|a"]}
    task = task_of(rows, data)
    assert (task.problem_type, task.label_names) == ("multi_label_classification", ["a", "urgent", "vip"])
    assert task.labels(make(rows)) == [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]
    assert ("train.csv: column 'label' holds several labels a row, separated by '|'" in caplog.text) is not bool(data)
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task
    # as other files write them
    for labels in (
        ["a; vip", "urgent"],
        [["a", "vip"], ["urgent"]],
        ['["a", "vip"]', "['urgent']"],
        ["vip,a", "urgent"],
    ):
        assert task.labels(make({"label": labels})) == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    with pytest.raises(UserError, match=r"row 2: the label 'new' is not among the training labels \(a, urgent, vip\)"):
        task.labels(make({"label": ["a|vip", "new|a"]}))


def test_a_task_from_lists_reads_texts():
    task = task_of({"text": TEXTS, "label": [["a"], ["b"], ["a", "b"], []]})
    assert task.labels(make({"label": ["a", "b;a"]})) == [[1.0, 0.0], [1.0, 1.0]]
    assert task.labels(make({"label": ["['a']", "[]"]})) == [[1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    "off", [{"problem_type": "single_label_classification"}, {"data": {"label_separator": "none"}}]
)
def test_the_separator_can_be_switched_off(off, caplog):
    rows = {"text": TEXTS, "label": ["a|urgent", "vip", "a|vip", "vip"]}
    task = task_of(rows, **off)
    assert (task.problem_type, task.label_separator) == ("single_label_classification", None)
    assert task.label_names == ["a|urgent", "a|vip", "vip"]
    assert not caplog.text


def test_names_with_a_separator_in_them_stay_whole_and_are_shown(caplog):
    task = task_of({"text": TEXTS, "label": ["rock|pop", "jazz", "jazz", "rock|pop"]})
    assert task.label_names == ["jazz", "rock|pop"]
    assert (
        "column 'label': 'rock|pop' is taken as one label; data.label_separator='|' splits such texts" in caplog.text
    )


def test_white_space_around_labels(caplog):
    task = task_of({"text": TEXTS, "label": ["good", " good", "bad ", "bad"]})
    assert task.label_names == ["bad", "good"]
    assert "train.csv: labels are taken without the white space around them, such as ' good'" in caplog.text


def test_what_is_said_of_the_labels():
    assert task_of({"text": TEXTS, "label": ["a", "b", "a", "a"]}).describe(make({"label": ["a", "b", "a", "a"]})) == [
        "problem type: single_label_classification",
        "labels: a 3, b 1",
    ]
    rows = {"text": TEXTS, "label": [["a", "b"], ["b"], [], ["b"]]}
    assert task_of(rows).describe(make(rows))[1] == "labels: b 3, a 1"
    rows = {"text": TEXTS, "label": [1, 2.5, -3, 4]}
    assert task_of(rows, problem_type="regression").describe(make(rows)) == [
        "problem type: regression",
        "labels: -3 to 4",
    ]


@pytest.mark.parametrize("write", [float, str, lambda number: f"{number:.2f}".replace(".", ",")])
def test_regression(write, caplog):
    numbers = [index / 4 for index in range(21)]
    task = task_of({"text": TEXTS * 5 + ["x"], "score": list(map(write, numbers))})
    assert task.problem_type == "regression"
    assert "train.csv: column 'score' holds numbers of which 21 differ, so the task is regression; pro" in caplog.text
    assert "label_separator" not in caplog.text  # a decimal comma separates nothing
    assert (task.metric, task.greater_is_better) == ("pearson", True)
    assert task.label_names == []
    assert task.labels(make({"score": list(map(write, numbers[:3]))})) == numbers[:3]
    assert task.labels(make({"score": [2, 3]})) == [2.0, 3.0]


def test_few_numbers_are_classes_unless_regression_is_asked_for(caplog):
    rows = {"text": TEXTS * 2, "label": [0.5, 1.5, 1.5, 0.5] * 2}
    assert task_of(rows).label_names == ["0.5", "1.5"]
    assert (
        "column 'label' holds numbers of which 2 differ, so they are classes; problem_type=regression" in caplog.text
    )
    asked = task_of({"text": TEXTS, "score": [1, 2, 3, 4]}, problem_type="regression", metric="mse")
    assert (asked.problem_type, asked.metric, asked.greater_is_better) == ("regression", "mse", False)


def test_metric_and_problem_type_that_do_not_exist():
    rows = {"text": TEXTS, "label": [0, 1, 0, 1]}
    assert task_of(rows, metric="matthews").metric == "matthews"
    assert error_of(rows, metric="pearson") == (
        "no metric 'pearson' for this task; it has accuracy, f1_macro, matthews"
    )
    assert "unknown problem type 'ranking'; there are single_label_classification, " in error_of(
        rows, problem_type="ranking"
    )


# --- bad rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "a", "a", "a"], "train.csv: every row has the label 'a', so there is nothing to learn"),
        (["a", "b", None, "a"], "train.csv, row 3: the label in column 'label' is empty"),
        (["a", None, "b", ""], "train.csv, row 2 (and 1 more of 4): the label in column 'label' is empty"),
        (["a", "b", "a", " "], "train.csv, row 4: the label in column 'label' is empty"),
        ([1.0, float("nan"), 2.5, 0.0], "train.csv, row 2: the label in column 'label' is empty"),
        (
            [{"name": "a"}, {"name": "b"}, {"name": "a"}, {"name": "b"}],
            "train.csv, row 1: column 'label' holds {'name': 'a'}, which is not a label",
        ),
        (
            ["a", "b", "c", "d"],
            "train.csv: column 'label' has a different value in each of the 4 rows, such as 'a', like an identifier "
            "or a text, so it holds no classes: name the label's column with data.label, or for numbers give "
            "problem_type=regression",
        ),
        ([2.5, 2.5, 2.5, 2.5], "train.csv: every row has the label 2.5, so there is nothing to learn"),
        ([["a"], ["b", None], [], []], "train.csv, row 2: the label in column 'label' is empty"),
        ([["a"], ["a"], ["a"], ["a"]], "train.csv: every row has the label ['a'], so there is nothing to learn"),
    ],
)
def test_bad_labels(labels, message):
    assert error_of({"text": TEXTS, "label": labels}) == message


def test_labels_that_do_not_fit_the_problem_type():
    for label in ("good", "1_000", "nan", "True", float("inf"), True):
        labels = [label, label] + (["1", "2"] if isinstance(label, str) else [label, label])
        assert error_of({"text": TEXTS, "label": labels}, problem_type="regression") == (
            f"train.csv, row 1: the label {label!r} is not a number, which regression needs"
        )
    multi = {"problem_type": "multi_label_classification"}
    assert error_of({"text": TEXTS, "label": ["a", "b", "rock|pop", "a"]}, **multi) == (
        "train.csv: column 'label' holds one label a row, and problem_type is multi_label_classification: that needs "
        "lists, several columns of 0 and 1 as data.label, or texts with a data.label_separator"
    )
    assert error_of({"text": TEXTS, "label": ["a", "b", "a|b", "a"]}, {"label_separator": ";"}) == (
        "train.csv: column 'label' holds no label with data.label_separator ';', such as 'a'"
    )
    single = {"problem_type": "single_label_classification"}
    assert error_of({"text": TEXTS, "label": ["a", "b", "a|b", "a"]}, {"label_separator": "|"}, **single) == (
        "data.label_separator is for several labels a row, and problem_type is single_label_classification"
    )
    assert error_of(
        {"text": TEXTS, "rude": [0, 1, 0, 0], "kind": [0, 1, 0, 1]}, {"label": ["rude", "kind"]}, **single
    ) == ("data.label names 2 columns of 0 and 1, and problem_type is single_label_classification")
    assert error_of({"text": TEXTS, "label": ["[a, b]", "[a]", "b", "[]"]}, {"label_separator": "list"}) == (
        "train.csv, row 3: the label 'b' is not a list in brackets"
    )
    assert error_of(
        {"text": TEXTS, "label": [["a"], ["a", "b"], [], []]}, problem_type="single_label_classification"
    ) == ("train.csv, row 2: 2 labels, but this task takes one label a row")
    assert error_of({"text": TEXTS, "rude": [0, 1, 2, 0], "kind": [0, 1, 0, 1]}, {"label": ["rude", "kind"]}) == (
        "train.csv, row 3: 2, but a column of labels holds 0 or 1"
    )


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_empty_text(empty):
    message = error_of({"sentence1": TEXTS, "sentence2": ["a", empty, "c", "d"], "label": [0, 1, 0, 1]})
    assert message == "train.csv, row 2: the text in column 'sentence2' is empty"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_split_is_checked(split):
    train = make({"text": TEXTS, "label": ["a", "b", "a", "b"]})
    bad = {
        "the label 'c' is not among the training labels (a, b)": {"text": TEXTS[:2], "label": ["a", "c"]},
        "row 1: the text in column 'text' is empty": {"text": ["", "x"], "label": ["a", "b"]},
        "row 2: the label in column 'label' is empty": {"text": TEXTS[:2], "label": ["a", None]},
        "has no column 'label'": {"text": TEXTS[:2], "lable": ["a", "b"]},
        "has no column 'text'": {"txt": TEXTS[:2], "label": ["a", "b"]},
    }
    for message, columns in bad.items():
        with pytest.raises(UserError) as caught:
            ClassificationTask.from_splits({"train": train, split: make(columns)}, DataConfig(path="x"))
        assert message in str(caught.value)


# --- model and encoding ---------------------------------------------------------------------------------------------


def run(task, dataset, tokenizer, model, max_length=32):
    encoded = task.encode(dataset, tokenizer, max_length)
    batch = task.collator(tokenizer)([encoded[index] for index in range(len(encoded))])
    with torch.no_grad():
        output = model(**batch)
    assert torch.isfinite(output.loss)
    return output.logits.numpy(), batch["labels"].numpy()


def test_single_label_end_to_end(tiny_encoder_folder):
    rows = {"sentence": TEXTS, "label": ["no", "yes", "maybe", "yes"]}
    task = task_of(rows)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder_folder)
    model = task.load_model(tiny_encoder_folder, tokenizer).eval()
    assert model.config.id2label == {0: "maybe", 1: "no", 2: "yes"}
    assert model.config.label2id == {"maybe": 0, "no": 1, "yes": 2}
    logits, labels = run(task, make(rows), tokenizer, model)
    scores = task.compute_metrics(EvalPrediction(logits, labels))
    assert set(scores) == {"accuracy", "f1_macro", "matthews"}
    for decoded, row in zip(task.decode(logits), logits, strict=True):
        assert decoded["label"] == task.label_names[row.argmax()]
        assert sum(decoded["probabilities"].values()) == pytest.approx(1)
        assert decoded["probabilities"]["yes"] == pytest.approx(np.exp(row[2]) / np.exp(row).sum())
    json.dumps(task.decode(logits))


def test_multi_label_and_regression_end_to_end(tiny_encoder_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder_folder)
    rows = {"text": TEXTS, "label": [["a"], ["b"], ["a", "b"], []]}
    task = task_of(rows)
    model = task.load_model(tiny_encoder_folder, tokenizer).eval()
    logits, labels = run(task, make(rows), tokenizer, model)
    assert labels.tolist() == [[1, 0], [0, 1], [1, 1], [0, 0]]
    assert set(task.compute_metrics(EvalPrediction(logits, labels))) == {"f1_micro", "f1_macro", "exact_match"}
    assert task.decode(np.array([[0.0, 1.0], [2.0, 3.0]])) == [
        {"labels": ["b"], "probabilities": {"a": 0.5, "b": pytest.approx(0.7310586)}},
        {"labels": ["a", "b"], "probabilities": {"a": pytest.approx(0.8807971), "b": pytest.approx(0.9525741)}},
    ]

    rows = {"text": TEXTS, "label": [0.5, 1.0, 3.0, 2.0]}
    task = task_of(rows, problem_type="regression")
    model = task.load_model(tiny_encoder_folder, tokenizer).eval()
    assert model.config.num_labels == 1
    logits, labels = run(task, make(rows), tokenizer, model)
    assert set(task.compute_metrics(EvalPrediction(logits, labels))) == {"pearson", "spearman", "mse"}
    assert task.decode(np.array([[0.25], [-2.0]])) == [{"value": 0.25}, {"value": -2.0}]
    assert task.decode(np.array([[0.25]])) == [{"value": 0.25}]


def test_encoding_cuts_pairs_and_keeps_only_what_models_take(tiny_tokenizer):
    rows = {"sentence1": ["the film is good"] * 2, "sentence2": ["a very bad shop", "great"], "label": [0, 1]}
    task = task_of(rows)
    encoded = task.encode(make(rows), tiny_tokenizer, 6)
    assert set(encoded.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels", "__cut__"}
    assert [len(ids) for ids in encoded["input_ids"]] == [6, 6]
    assert encoded[:]["__cut__"] == [True, True]
    assert encoded[1]["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    long = task_of({"text": ["film " * 500, "good"], "label": [0, 1]})
    texts = make({"text": ["film " * 500, "film " * 62]})  # with the two special tokens, the second is just 64 long
    encoded = long.encode(texts, tiny_tokenizer, 64, with_labels=False)
    assert [len(ids) for ids in encoded["input_ids"]] == [64, 64]
    assert encoded[:]["__cut__"] == [True, False]
    assert "labels" not in encoded.column_names
    assert len(long.encode(texts, tiny_tokenizer, with_labels=False)[0]["input_ids"]) == 502
    for one, data, length, special in ((long, texts, 2, 2), (task, make(rows), 4, 3)):
        with pytest.raises(
            UserError, match=f": {length} tokens leave no room for a text after {special} special ones: "
        ):
            one.encode(data, tiny_tokenizer, length, with_labels=False)


def test_a_decoder_without_pad_token_gets_one(tiny_decoder_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder_folder)
    assert tokenizer.pad_token is None
    rows = {"text": TEXTS, "label": [0, 1, 0, 1]}
    task = task_of(rows)
    model = task.load_model(tiny_decoder_folder, tokenizer).eval()
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
    logits, _ = run(task, make(rows), tokenizer, model)
    alone, _ = run(task, make({"text": TEXTS[3:], "label": [1]}), tokenizer, model)
    np.testing.assert_allclose(logits[3], alone[0], atol=1e-5)  # padding changes nothing


def test_a_base_with_a_head_for_other_labels(tiny_encoder_folder, tiny_tokenizer, tmp_path):
    two = task_of({"text": TEXTS, "label": [0, 1, 0, 1]}).load_model(tiny_encoder_folder, tiny_tokenizer)
    two.save_pretrained(tmp_path)
    three = task_of({"text": TEXTS, "label": [0, 1, 2, 1]}).load_model(tmp_path, tiny_tokenizer)
    assert three.classifier.weight.shape == (3, 32)
    torch.testing.assert_close(
        three.bert.embeddings.word_embeddings.weight, two.bert.embeddings.word_embeddings.weight
    )


# --- saving and predicting ------------------------------------------------------------------------------------------


def test_a_task_survives_its_json():
    task = task_of({"text": TEXTS, "x": [0, 1, 0, 1], "y": [1, 0, 0, 0]}, {"label": ["x", "y"]}, metric="exact_match")
    again = task_from_dict(json.loads(json.dumps(task.to_dict())))
    assert again == task
    assert isinstance(again, TASKS["classification"])
    with pytest.raises(UserError, match="not a saved task: 'task' is 'ranking', and the tasks are classification, "):
        task_from_dict({"task": "ranking"})


def test_rows_to_predict(tiny_tokenizer):
    task = task_of({"sentence": TEXTS, "label": [0, 1, 0, 1]})
    rows = task.rows_to_dataset(["the film", {"sentence": "good", "more": 1}])
    assert rows["sentence"] == ["the film", "good"]
    assert len(task.encode(rows, tiny_tokenizer, 32, with_labels=False)) == 2
    with pytest.raises(UserError, match="row 2: the text in column 'sentence' is empty"):
        task.encode(task.rows_to_dataset(["the film", ""]), tiny_tokenizer, 32, with_labels=False)


def test_a_plain_string_is_not_enough_for_pairs():
    task = task_of({"sentence1": TEXTS, "sentence2": TEXTS, "label": [0, 1, 0, 1]})
    assert task.rows_to_dataset([{"sentence1": "a", "sentence2": "b"}])["sentence2"] == ["b"]
    with pytest.raises(UserError, match="row 1: expected an object with 'sentence1', 'sentence2', found 'the film'"):
        task.rows_to_dataset(["the film"])


@pytest.mark.parametrize(
    ("name", "columns", "problem_type", "labels"),
    [
        ("cola", {"text": "sentence"}, "single_label_classification", ["0", "1"]),
        ("ag_news", {"text": "sentence"}, "single_label_classification", ["0", "1", "2", "3"]),
        ("qnli", {"text": "sentence1", "text_pair": "sentence2"}, "single_label_classification", ["0", "1"]),
        ("stsb", {"text": "sentence1", "text_pair": "sentence2"}, "regression", []),
    ],
)
def test_shared_data(shared_data, tiny_tokenizer, name, columns, problem_type, labels):
    config = DataConfig(path=str(shared_data / name), max_train_rows=200, max_eval_rows=50)
    splits = read_splits(config)
    task = ClassificationTask.from_splits(splits, config)
    assert task.columns == {**columns, "label": "label"}
    assert (task.problem_type, task.label_names) == (problem_type, labels)
    encoded = task.encode(splits["validation"], tiny_tokenizer, 64)
    assert encoded["labels"] == splits["validation"]["label"]
