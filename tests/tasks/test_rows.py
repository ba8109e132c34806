from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest

from helpers.data import ROWS, write_rows
from redpeft.errors import UserError
from redpeft.tasks.base import DataConfig
from redpeft.tasks.classification import ClassificationTask
from redpeft.tasks.columns import ROW, where
from redpeft.tasks.data import read_data
from redpeft.tasks.rows import choose_rows


def read(rows, tmp_path, kind="classification", seed=0, **config):
    """The splits of these rows, in one file or (a dict) in one a split."""
    files = rows if isinstance(rows, dict) else {"rows": rows}
    for name, each in files.items():
        write_rows(tmp_path / f"{name}.jsonl", each)
    path = tmp_path if isinstance(rows, dict) else tmp_path / "rows.jsonl"
    return read_data(kind, DataConfig(path=str(path), **config), seed)[1]


def lengths(splits):
    return {name: len(split) for name, split in splits.items()}


E2E = [{"mr": f"name[{mr}]", "ref": f"text {mr} {ref}"} for mr in range(12) for ref in range(1 + mr % 4)]
CHATS = [
    [
        {"role": "user", "content": f"question {index // 3}"},
        {"role": "assistant", "content": f"answer {index}"},
        *[{"role": "user", "content": "more"}, {"role": "assistant", "content": "that was all"}][: index % 3],
    ]
    for index in range(30)
]
GROUPED = {
    "e2e": (E2E, "mr"),
    "instruction": ([{"prompt": f"question {i // 3}", "response": f"answer {i}"} for i in range(30)], "prompt"),
    "classification": ([{"text": f"text {i // 3}", "label": "ab"[i // 3 % 2]} for i in range(30)], "text"),
    "token-classification": ([{"tokens": ["a", str(i // 3)], "tags": ["x", "y"]} for i in range(30)], "tokens"),
    "chats": ([{"messages": chat} for chat in CHATS], "messages"),
    "documents": ([{"text": f"row {i}", "label": "ab"[i % 2], "doc_id": i // 5} for i in range(30)], "doc_id"),
}


def keys_of(split, column):
    asked = split[column]
    return {str(value[0] if column == "messages" else value) for value in asked}


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_that_ask_the_same_are_not_parted(tmp_path, name, seed, caplog):
    rows, column = GROUPED[name]
    kind = {"chats": "instruction", "documents": "classification"}.get(name, name)
    splits = read(rows, tmp_path, kind, seed, validation_fraction=0.3)
    assert len(splits["train"]) + len(splits["validation"]) == len(rows)
    assert 0.15 * len(rows) <= len(splits["validation"]) <= 0.3 * len(rows)
    assert not keys_of(splits["train"], column) & keys_of(splits["validation"], column)
    assert "; rows with the same " in caplog.text
    limited = read(rows, tmp_path, kind, seed, max_train_rows=11, max_eval_rows=5, validation_fraction=0.5)
    assert 7 <= len(limited["train"]) <= 11
    assert 2 <= len(limited["validation"]) <= 5
    sizes = Counter(str(row[column][0] if name == "chats" else row[column]) for row in rows)
    for split in limited.values():
        assert len(split) == sum(sizes[key] for key in keys_of(split, column))


def test_a_limit_takes_all_references_of_a_meaning_representation(tmp_path, caplog):
    rows = [{"mr": f"name[{mr}]", "ref": f"text {ref}"} for ref in range(8) for mr in range(10)]
    splits = read({"train": rows, "validation": rows, "test": rows}, tmp_path, "e2e", max_eval_rows=20)
    assert lengths(splits) == {"train": 80, "validation": 16, "test": 16}
    assert set(Counter(splits["test"]["mr"]).values()) == {8}
    assert "test.jsonl: 16 of 80 rows are used (the limit is 20); rows with the same meaning repr" in caplog.text
    assert lengths(read({"train": rows, "validation": rows}, tmp_path, "e2e", max_eval_rows=3))["validation"] == 8


def test_a_group_of_ones_own(tmp_path):
    rows = [{"text": f"row {i}", "label": "ab"[i % 2], "customer": i % 6} for i in range(60)]
    rows += [{"text": f"odd {i}", "label": "ab"[i % 2], "customer": None} for i in range(4)]
    splits = read(rows, tmp_path, group="customer", validation_fraction=0.2)
    seen = [{key for key in split["customer"] if key is not None} for split in splits.values()]
    assert not seen[0] & seen[1]
    assert 10 <= len(splits["validation"]) <= 13
    with pytest.raises(UserError, match="has no column 'client'; its columns are"):
        read(rows, tmp_path, group="client")
    with pytest.raises(UserError, match="rows.jsonl: all rows have one kind: give a validation split as data.valid"):
        read([{**row, "kind": "x"} for row in rows], tmp_path, group="kind")


def test_documents_that_tell_nothing_are_not_heeded(tmp_path):
    rows = [{"text": f"row {i // 2}", "label": "ab"[i // 2 % 2], "doc_id": "one"} for i in range(20)]
    splits = read(rows, tmp_path, validation_fraction=0.3)
    assert not set(splits["train"]["text"]) & set(splits["validation"]["text"])


def test_validation_rows_are_taken_from_training_by_class_and_said_so(tmp_path, caplog):
    rows = [
        {"text": f"row {i}", "kind": "rare" if i in (3, 33) else "once" if i == 7 else "ab"[i % 2]} for i in range(100)
    ]
    with caplog.at_level(logging.INFO):
        splits = read(rows, tmp_path, validation_fraction=0.2, seed=1)
    assert "20 of 100 rows of rows.jsonl are used for it (seed 1, balanced by class)" in caplog.text
    train, validation = splits["train"], splits["validation"]
    assert len(validation) == 20
    assert sorted(train[:]["text"] + validation[:]["text"]) == sorted(row["text"] for row in rows)
    assert set(validation["kind"]) <= set(train["kind"])
    assert abs(list(validation["kind"]).count("a") - 10) <= 1
    assert where(validation, 5) == f"rows.jsonl, row {int(validation[5]['text'].split()[1]) + 1}"
    again, other = (read(rows, tmp_path, validation_fraction=0.2, seed=seed)["validation"] for seed in (1, 2))
    assert again["text"] == validation["text"]
    assert other["text"] != validation["text"]


def test_a_limit_takes_its_share_of_each_class(tmp_path):
    rows = [{"text": f"row {i}", "label": "a" if i < 80 else "b"} for i in range(100)]
    counts = Counter(read(rows, tmp_path, max_train_rows=20)["train"]["label"])
    assert counts["a"] in (15, 16, 17)


def test_rows_are_drawn_evenly(tmp_path):
    """Each of them as often as any other, in a class of one as in one of many, where no class loses its only row."""
    rows = [{"text": f"row {i}", "label": "a" if i < 9 else "b"} for i in range(10)]
    splits = read({"train": [*rows, {"text": "other", "label": "c"}], "validation": rows}, tmp_path)
    task = ClassificationTask.from_splits(splits, DataConfig(path="x"))
    drawn = Counter()
    for seed in range(60):
        config = DataConfig(path="x", max_eval_rows=5)
        drawn.update(choose_rows(splits, task, config, seed)["validation"]["text"])
    assert min(drawn.values()) > 15
    assert max(drawn.values()) < 45


@pytest.mark.parametrize("labels", [np.linspace(0, 5, 40).tolist(), ["a", "b"] * 20, [["a"], ["a", "b"]] * 20])
def test_validation_rows_of_every_problem_type(tmp_path, labels):
    rows = [{"text": f"row {i}", "unusual": label} for i, label in enumerate(labels)]
    assert lengths(read(rows, tmp_path)) == {"train": 36, "validation": 4}


def test_labels_are_those_of_all_training_rows(tmp_path):
    rows = [{"text": f"row {i}", "label": f"class {i % 15}"} for i in range(30)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    task, splits = read_data("classification", DataConfig(path=path, max_train_rows=4, max_eval_rows=2))
    assert lengths(splits) == {"train": 4, "validation": 2}
    assert len(task.label_names) == 15


def test_the_smallest_data_to_split(tmp_path):
    assert lengths(read(ROWS[:2], tmp_path)) == {"train": 1, "validation": 1}
    assert lengths(read(ROWS[:2], tmp_path, validation_fraction=0.99)) == {"train": 1, "validation": 1}
    with pytest.raises(UserError, match=r"rows.jsonl has one row: too few to take a validation split from it"):
        read([{"mr": "a", "ref": "b"}], tmp_path, "e2e")


@pytest.mark.parametrize("questions", [1, 2])
def test_one_question_or_two_for_all_rows(tmp_path, questions, caplog):
    rows = [{"prompt": f"Tell joke {i % questions}", "response": str(i)} for i in range(20)]
    splits = read(rows, tmp_path, "instruction")
    assert lengths(splits) == {"train": 18, "validation": 2}
    assert (
        f"rows.jsonl: rows with the same prompt ({questions} different ones) are split between training" in caplog.text
    )


def test_limits_draw_rows_by_the_seed_and_keep_their_numbers(tmp_path):
    rows = [{"text": f"row {i}", "label": i % 2} for i in range(50)]
    files = dict.fromkeys(("train", "validation", "test"), rows)
    draws = [read(files, tmp_path, seed=seed, max_train_rows=30, max_eval_rows=5) for seed in (3, 3, 4)]
    assert lengths(draws[0]) == {"train": 30, "validation": 5, "test": 5}
    texts = [draw["train"]["text"][:] for draw in draws]
    assert texts[0] == texts[1] != texts[2]
    assert all(row["text"] == f"row {row[ROW] - 1}" for row in draws[0]["train"])
    assert lengths(read(files, tmp_path, max_train_rows=1000))["train"] == 50


@pytest.mark.parametrize(
    ("kind", "good", "bad", "message"),
    [
        ("classification", {"text": "a", "label": "x"}, {"text": "a", "label": None}, "the label in column 'label'"),
        ("classification", {"text": "a", "label": "x"}, {"text": " ", "label": "x"}, "the text in column 'text'"),
        ("classification", {"text": "a", "label": ["x", "y"]}, {"text": "a", "label": ["x", None]}, "the label in"),
        ("e2e", {"mr": "a", "ref": "b"}, {"mr": "a", "ref": ""}, "the text in column 'ref'"),
        ("instruction", {"prompt": "a", "response": "b"}, {"prompt": None, "response": "b"}, "the text in"),
        ("token-classification", {"tokens": ["a", "b"], "tags": ["x", "y"]}, {"tokens": ["a", "b"], "tags": None},
         "column 'tags' holds an empty entry: None"),
    ],
)  # fmt: skip
def test_rows_without_a_text_or_a_label(tmp_path, kind, good, bad, message, caplog):
    other = {"classification": {"text": "b", "label": "y"}}.get(kind, good)
    if isinstance(good.get("label"), list):
        other = {"text": "b", "label": ["y"]}
    rows = [good, other, bad, good, other, bad]
    with pytest.raises(UserError, match=rf"row 3.*: {message}.*; data.drop_missing=true leaves such rows out$"):
        read(rows, tmp_path, kind)
    splits = read(rows, tmp_path, kind, drop_missing=True)
    assert sorted(row for split in splits.values() for row in split[ROW]) == [1, 2, 4, 5]
    assert "left out because a text or a label is missing: rows.jsonl, row 3 (and 1 more of 6)" in caplog.text
    with pytest.raises(UserError, match=r"rows.jsonl: no row has values in all of the columns \w+, \w+"):
        read([bad] * 3, tmp_path, kind, drop_missing=True)


def test_an_input_may_be_empty(tmp_path):
    rows = [{"instruction": f"{i}", "input": None if i % 2 else "x", "output": "y"} for i in range(10)]
    assert sum(lengths(read(rows, tmp_path, "instruction", drop_missing=True)).values()) == 10


@pytest.mark.parametrize("name", ["cola", "stsb", "ag_news", "e2e", "self_instruct_seed"])
def test_shared_data(shared_data, name):
    kind = {"e2e": "e2e", "self_instruct_seed": "instruction"}.get(name, "classification")
    config = DataConfig(path=str(shared_data / name), max_train_rows=100, max_eval_rows=20)
    _, splits = read_data(kind, config)
    assert 95 <= len(splits["train"]) <= 100
    assert 15 <= len(splits["validation"]) <= 20
