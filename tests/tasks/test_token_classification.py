from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, EvalPrediction, PreTrainedTokenizerFast

from redpeft.errors import UserError
from redpeft.tasks.base import DataConfig, task_from_dict
from redpeft.tasks.data import read_splits
from redpeft.tasks.token_classification import TokenClassificationTask

ROWS = {
    "tokens": [["the", "film", "zorro", "is", "good"], ["ann", "lee", "!"]],
    "tags": [["O", "O", "B-film", "O", "O"], ["B-who", "I-who", "O"]],
}


def make(columns: dict, features=None) -> Dataset:
    dataset = Dataset.from_dict(columns, features=features)
    dataset.info.description = "train.jsonl"
    return dataset


def task_of(columns: dict, data: dict | None = None, features=None, **options) -> TokenClassificationTask:
    splits = {"train": make(columns, features)}
    return TokenClassificationTask.from_splits(splits, DataConfig(path="x", **(data or {})), **options)


def error_of(columns: dict, data: dict | None = None, **options) -> str:
    with pytest.raises(UserError) as caught:
        task_of(columns, data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_columns_tags_and_metric_are_guessed():
    task = task_of(ROWS)
    assert task.columns == {"tokens": "tokens", "tags": "tags"}
    assert task.label_names == ["B-film", "B-who", "I-who", "O"]
    assert (task.metric, task.greater_is_better) == ("f1", True)
    assert task_of(ROWS, metric="f1_macro").metric == "f1_macro"
    words = task_of({"words": [["a", "film"]], "kind": [["DET", "NOUN"]]}, {"tags": "kind"})
    assert words.columns == {"tokens": "words", "tags": "kind"}
    assert words.metric == "accuracy"


def test_numbers_and_named_tags():
    assert task_of({"tokens": [["a", "b"]], "ner_tags": [[10, 9]]}).label_names == ["9", "10"]
    features = Features(
        {"tokens": Sequence(Value("string")), "ner_tags": Sequence(ClassLabel(names=["O", "B-x", "I-x"]))}
    )
    task = task_of({"tokens": [["a", "b"]], "ner_tags": [[1, 0]]}, features=features)
    assert task.label_names == ["O", "B-x", "I-x"]
    assert task.metric == "f1"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a b"], "tags": [["O"]]}, "cannot tell which column of train.jsonl is the tokens"),
        ({"tokens": [["a", "b"]], "tags": [["O", "O"]]}, "every word has the tag 'O', so there is nothing to learn"),
        ({"tokens": [["a", "b"]], "tags": [["x", "y", "x"]]}, "train.jsonl, row 1: 2 words and 3 tags"),
        ({"tokens": [["a", "b"]], "tags": [["x", None]]}, "row 1: column 'tags' holds an empty entry: ['x', None]"),
        ({"tokens": [["a", " "]], "tags": [["x", "y"]]}, "row 1: column 'tokens' holds an empty entry: ['a', ' ']"),
        ({"tokens": [["a", "b"], []], "tags": [["x", "y"], ["x"]]}, "row 2: column 'tokens' holds [] and not a list"),
        ({"tokens": ["a b"], "tags": [["x", "y"]]}, "(CSV cannot hold lists: use JSON lines or Parquet)"),
        ({"tokens": [["a", "b"]], "tags": ["x y"]}, "row 1: column 'tags' holds 'x y' and not a list"),
    ],
)
def test_bad_rows(columns, message):
    assert message in error_of(columns)


def test_misnamed_column_and_metric():
    assert "has no column 'tag'; its columns are tokens, tags. Did you mean 'tags'?" in error_of(ROWS, {"tags": "tag"})
    assert error_of(ROWS, metric="bleu") == (
        "no metric 'bleu' for this task; it has f1, precision, recall, accuracy, f1_macro"
    )


def test_a_tag_that_training_lacks():
    splits = {"train": make(ROWS), "validation": make({"tokens": [["a"]], "tags": [["B-place"]]})}
    with pytest.raises(UserError, match="row 1: the label 'B-place' is not among the training labels"):
        TokenClassificationTask.from_splits(splits, DataConfig(path="x"))


def test_tags_stand_on_the_first_token_of_each_word(tiny_tokenizer):
    task = task_of(ROWS)
    encoded = task.encode(make(ROWS), tiny_tokenizer, 64)
    assert tiny_tokenizer.convert_ids_to_tokens(encoded[1]["input_ids"]) == [
        "[CLS]", "a", "##n", "##n", "l", "##e", "##e", "!", "[SEP]",
    ]  # fmt: skip
    assert encoded[1]["labels"] == [-100, 1, -100, -100, 2, -100, -100, 3, -100]
    unlabelled = task.encode(make({"tokens": ROWS["tokens"]}), tiny_tokenizer, 64, with_labels=False)
    assert unlabelled[1]["labels"] == [-100, 0, -100, -100, 1, -100, -100, 2, -100]


@pytest.mark.parametrize("dropped", ["\u200b", "\ufe0f", "\u00ad", "\x07", "\u0301"])
@pytest.mark.parametrize("place", range(4))
def test_a_word_that_the_tokenizer_drops_moves_no_tag(tiny_tokenizer, dropped, place, caplog):
    words, tags = ["ann", "is", "good"], ["B-who", "O", "B-film"]
    words.insert(place, dropped)
    tags.insert(place, "I-who")
    task = task_of(ROWS)
    learned = task.encode(make({"tokens": [words], "tags": [tags]}), tiny_tokenizer, 64)
    assert [label for label in learned[0]["labels"] if label != -100] == [1, 3, 0]
    assert f"train.jsonl: this tokenizer drops 1 words, such as {dropped!r}" in caplog.text
    asked = make({"tokens": [words, ["ann", *words]]})
    encoded = task.encode(asked, tiny_tokenizer, 64, with_labels=False)
    logits = np.zeros((2, 20, 4))
    for row, labels in enumerate(encoded["labels"]):
        places = [index for index, label in enumerate(labels) if label != -100]
        for index, tag in zip(places[row:], [1, 3, 0], strict=True):
            logits[row, index, tag] = 1
    found = [dict(zip(row["tokens"], row["tags"], strict=True)) for row in task.decode(logits, asked, encoded)]
    for row in found:
        assert row == {"ann": row["ann"], "is": "O", "good": "B-film", dropped: None}


def test_words_that_are_dropped_and_words_that_are_cut_off(tiny_tokenizer, caplog):
    words = ["the", "\u200b", "film", "is", "\u200b", "good"]
    rows = {"tokens": [words], "tags": [["O", "O", "B-film", "O", "O", "O"]]}
    encoded = task_of(ROWS).encode(make(rows), tiny_tokenizer, 4)
    assert encoded[0]["labels"] == [-100, 3, 0, -100]
    assert "drops 1 words" in caplog.text


def test_a_tokenizer_that_is_not_fast():
    slow = type("Slow", (), {"is_fast": False})()
    with pytest.raises(UserError, match="needs a fast tokenizer"):
        task_of(ROWS).encode(make(ROWS), slow, 64)


def test_words_for_a_byte_level_tokenizer_of_the_roberta_kind():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64)
    task = task_of(ROWS)
    encoded = task.encode(make({"tokens": [["no", "a"]], "tags": [["O", "B-who"]]}), tokenizer, 64)
    assert tokenizer.convert_ids_to_tokens(encoded[0]["input_ids"]) == ["Ġ", "n", "o", "Ġ", "a"]
    assert encoded[0]["labels"] == [3, -100, -100, 1, -100]


def test_end_to_end(tiny_encoder_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder_folder)
    task = task_of(ROWS)
    model = task.load_model(tiny_encoder_folder, tokenizer).eval()
    assert model.config.id2label[3] == "O"
    encoded = task.encode(make(ROWS), tokenizer, 64)
    batch = task.collator(tokenizer)([encoded[0], encoded[1]])
    with torch.no_grad():
        output = model(**batch)
    assert torch.isfinite(output.loss)
    scores = task.compute_metrics(EvalPrediction(output.logits.numpy(), batch["labels"].numpy()))
    assert set(scores) == {"f1", "precision", "recall", "accuracy", "f1_macro"}
    right = np.eye(4)[batch["labels"].clamp(min=0)]
    assert task.compute_metrics(EvalPrediction(right, batch["labels"].numpy()))["f1"] == 1.0
    encoded = task.encode(make(ROWS), tokenizer, 64, with_labels=False)
    assert task.decode(right, make(ROWS), encoded) == [
        {"tokens": tokens, "tags": tags} for tokens, tags in zip(ROWS["tokens"], ROWS["tags"], strict=True)
    ]


def test_words_that_are_cut_off_have_no_tag(tiny_tokenizer):
    task = task_of(ROWS)
    dataset = task.rows_to_dataset(["the film is good", {"tokens": ["good"]}])
    encoded = task.encode(dataset, tiny_tokenizer, 4, with_labels=False)
    logits = np.zeros((2, 4, 4))
    logits[0, 2, 1] = logits[1, 1, 2] = 1
    decoded = task.decode(logits, dataset, encoded)
    assert decoded == [
        {"tokens": ["the", "film", "is", "good"], "tags": ["B-film", "B-who", None, None]},
        {"tokens": ["good"], "tags": ["I-who"]},
    ]
    json.dumps(decoded)


def test_a_task_survives_its_json():
    task = task_of(ROWS)
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_a_file_of_json_lines(tmp_path):
    rows = [dict(zip(ROWS, row, strict=True)) for row in zip(*ROWS.values(), strict=True)] * 5
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(path=str(tmp_path / "rows.jsonl"))
    task = TokenClassificationTask.from_splits(read_splits(config), config)
    assert task.label_names == ["B-film", "B-who", "I-who", "O"]
