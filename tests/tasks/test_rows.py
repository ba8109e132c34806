from __future__ import annotations

import json
import logging
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from helpers.data import ROWS, write_rows
from redpeft.errors import UserError
from redpeft.tasks.base import DataConfig
from redpeft.tasks.classification import ClassificationTask
from redpeft.tasks.columns import ROW, where
from redpeft.tasks.data import read_data, read_splits
from redpeft.tasks.rows import GLUE, choose_rows, glue_splits


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


# --- GLUE -----------------------------------------------------------------------------------------------------------

# GLUE's public validation sets, and what the paper makes of them: rows, validation, test.
SIZES = {
    "mnli": (9815, 1000, 8815),
    "sst2": (872, 436, 436),
    "mrpc": (408, 204, 204),
    "cola": (1043, 522, 521),
    "qnli": (5463, 1000, 4463),
    "qqp": (40430, 1000, 39430),
    "rte": (277, 139, 138),
    "stsb": (1500, 750, 750),
}


def rows(count, first=0):
    return Dataset.from_dict({"row": list(range(first, first + count))})


def public(task, train=3000):
    return {"train": rows(train), "validation": rows(SIZES[task][0], first=10**6), "test": rows(5, first=9 * 10**6)}


def numbers(dataset):
    return dataset["row"][:]


@pytest.mark.parametrize("task", GLUE)
@pytest.mark.parametrize("seed", [42, 7])
def test_roberta_splits_are_numpys_permutation(task, seed):
    total, validation, test = SIZES[task]
    found = glue_splits(public(task), task, "glue", seed)
    assert (len(found["validation"]), len(found["test"])) == (validation, test)
    order = (10**6 + np.random.RandomState(seed).permutation(total)).tolist()
    if task == "cola":  # the other way round
        assert numbers(found["test"]) == order[:test]
        assert numbers(found["validation"]) == order[test:]
    else:
        assert numbers(found["validation"]) == order[:validation]
        assert numbers(found["test"]) == order[validation:]
    assert numbers(found["train"]) == list(range(3000))
    assert list(found) == ["train", "validation", "test"]


@pytest.mark.parametrize("task", GLUE)
def test_t5_takes_the_validation_rows_of_large_sets_out_of_train(task):
    found = glue_splits(public(task), task, "glue-t5", 42)
    if task not in ("mnli", "qnli", "qqp", "sst2"):
        same = glue_splits(public(task), task, "glue", 42)
        assert {name: numbers(split) for name, split in found.items()} == {k: numbers(v) for k, v in same.items()}
        return
    order = np.random.RandomState(42).permutation(3000).tolist()
    assert numbers(found["validation"]) == order[:1000]
    assert numbers(found["train"]) == order[1000:]
    assert numbers(found["test"]) == list(range(10**6, 10**6 + SIZES[task][0]))


def test_another_seed_draws_other_rows():
    first, second = (numbers(glue_splits(public("rte"), "rte", "glue", seed)["test"]) for seed in (42, 43))
    assert first != second
    assert first == numbers(glue_splits(public("rte"), "RTE", "glue", 42)["test"])


def test_a_part_of_a_large_set_is_halved_and_says_so(caplog):
    found = glue_splits({"train": rows(9), "validation": rows(1000)}, "qnli", "glue", 1)
    assert (len(found["validation"]), len(found["test"])) == (500, 500)
    assert "has 1000 rows: half of them are used for validation, not 1000" in caplog.text


@pytest.mark.parametrize(
    ("task", "protocol", "splits", "message"),
    [
        ("ag_news", "glue", {"train": 9, "validation": 9}, "splits mnli, sst2.*not 'ag_news': name one of them"),
        ("sst2", "glue", {"train": 9}, "needs the public validation set of sst2, which is missing"),
        ("rte", "glue", {"train": 9, "validation": 1}, "has 1 rows: too few to take 1 of them out"),
        ("sst2", "glue-t5", {"train": 1000, "validation": 9}, "has 1000 rows: too few to take 1000 of them out"),
    ],
)
def test_what_cannot_be_split(task, protocol, splits, message):
    with pytest.raises(UserError, match=message):
        glue_splits({name: rows(count) for name, count in splits.items()}, task, protocol, 42)


def write(folder, name, count):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"sentence": f"{name} {row}", "label": row % 2}) for row in range(count)]
    (folder / f"{name}.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("by", ["path", "config_name", "files"])
def test_a_recipe_asks_for_the_protocol(tmp_path, by):
    folder = tmp_path / "data" / "SST-2"
    for name, count in (("train", 30), ("validation", 20), ("test", 6)):
        write(folder, name, count)
    source = {
        "path": {"path": str(folder)},
        "config_name": {"path": str(folder.parent), "config_name": "SST-2"},
        "files": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "config_name": "sst2",
        },
    }[by]
    splits = read_splits(DataConfig(protocol="glue", **source), seed=42)
    order = np.random.RandomState(42).permutation(20).tolist()
    assert splits["validation"]["sentence"][:] == [f"validation {row}" for row in order[:10]]
    assert splits["test"]["sentence"][:] == [f"validation {row}" for row in order[10:]]
    _, limited = read_data("classification", DataConfig(protocol="glue", max_eval_rows=4, **source), seed=42)
    assert set(limited["test"]["sentence"]) < set(splits["test"]["sentence"])
    assert len(limited["validation"]) == 4


def test_the_shared_sets_have_the_papers_sizes(shared_data):
    for task in ("sst2", "cola", "rte", "stsb"):
        splits = read_splits(DataConfig(path=str(shared_data / task), protocol="glue"), seed=42)
        assert (len(splits["validation"]), len(splits["test"])) == SIZES[task][1:]
