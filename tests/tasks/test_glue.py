"""The splits against numpy, with the sizes that the paper prints."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import Dataset

from redpeft.errors import UserError
from redpeft.tasks.base import DataConfig
from redpeft.tasks.data import read_data, read_splits
from redpeft.tasks.rows import GLUE, glue_splits

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
        ("sst2", "glue", {"train": 9}, "needs the public validation set of sst2, and there is none"),
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
