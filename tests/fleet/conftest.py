"""Small jobs for fleets: bases without dropout, data sets, and a queue that counts."""

from __future__ import annotations

import json
import random
from collections import deque

import pytest
import torch

from helpers.data import sentiment_rows, write_rows


def write_data(folder, rows, seed=0, **options):
    """A data set whose words tell the class: so many training rows, 8 for validation and 8 for test."""
    draw = random.Random(seed)
    for split, count in {"train": rows, "validation": 8, "test": 8}.items():
        write_rows(folder / f"{split}.jsonl", sentiment_rows(count, draw, **options))
    return folder


@pytest.fixture(scope="session")
def data_sets(tmp_path_factory):
    """Folders of data by name: uneven in rows and lengths, one of a single training row for each class."""
    folder = tmp_path_factory.mktemp("fleet_data")
    return {
        "small": write_data(folder / "small", 10, seed=1),
        "large": write_data(folder / "large", 37, seed=2, longest=30),
        "short": write_data(folder / "short", 21, seed=3, longest=2),
        "tiny": write_data(folder / "tiny", 2, seed=4),
        "three": write_data(folder / "three", 18, seed=5, labels=("negative", "positive", "neutral")),
    }


@pytest.fixture
def in_float64(monkeypatch):
    """Runs compute in float64, alone and in fleets."""
    from redpeft.training import learner

    load = learner.load_base

    def load_double(*args):
        model, tokenizer = load(*args)
        return model.double(), tokenizer

    monkeypatch.setattr(learner, "load_base", load_double)


@pytest.fixture
def make_job(still_encoder, data_sets, tmp_path):
    """A job: 3 epochs with 4 rows a batch on one of the data sets, with any field changed."""
    from redpeft.fleet.queue import Job
    from redpeft.training.recipe import load_recipe

    def make(name, data_set, **changes):
        data = data_sets.get(data_set, data_set)
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        values = {"base": str(still_encoder), "data": str(data), "epochs": 3, "batch_size": 4, **changes}
        return Job(load_recipe(None, values).alone(), tmp_path / name)

    return make


class ListQueue:
    """Gives out jobs in their order, and keeps what became of them by folder name."""

    def __init__(self, jobs):
        self.ready, self.results, self.scores = deque(jobs), {}, {}
        self.count = len(self.ready)

    def take(self):
        return self.ready.popleft() if self.ready else None

    def done(self, folder, result):
        self.results[folder.name] = result
        self.count -= 1

    def paused(self, folder, score):
        self.scores[folder.name] = score

    def left(self):
        return self.count


@pytest.fixture
def queue_of():
    return ListQueue


@pytest.fixture
def adapter_tensors():
    """All tensors of a run folder's adapter."""
    from safetensors.torch import load_file

    def read(folder):
        return load_file(folder / "adapter" / "adapter_model.safetensors")

    return read


@pytest.fixture
def assert_same(adapter_tensors):
    """That two run folders hold the same adapter and scores."""

    def check(one, other, atol, scores=1e-6):
        left, right = adapter_tensors(one), adapter_tensors(other)
        assert left.keys() == right.keys()
        for key in left:
            torch.testing.assert_close(left[key].double(), right[key].double(), rtol=0, atol=atol, msg=key)
        results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
        for key in (
            "steps",
            "epochs",
            "best_epoch",
            "trainable_parameters",
            "head_parameters",
            "rows",
            "learning_rate",
        ):
            assert results[0][key] == results[1][key], key
        for split in ("validation", "test"):
            mine, its = (result[split] or {} for result in results)
            assert bool(mine) == bool(its), split
            assert mine == pytest.approx({name: its[name] for name in mine}, abs=scores)  # TRL has more for people

    return check
