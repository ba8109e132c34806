"""A small two-class data set and a recipe for it."""

from __future__ import annotations

import random

import pytest

from helpers.data import sentiment_rows, write_rows


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """48 training, 16 validation and 16 test rows of uneven length; the words tell the class."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    for split, count in {"train": 48, "validation": 16, "test": 16}.items():
        write_rows(folder / f"{split}.jsonl", sentiment_rows(count, draw))
    return folder


@pytest.fixture(scope="session")
def make_recipe(tiny_encoder_folder, data_folder):
    """A recipe of 3 epochs of 6 steps on the tiny encoder, with any field changed by dotted key."""
    from redpeft.training.recipe import load_recipe

    def make(**changes):
        values = {"base": str(tiny_encoder_folder), "data": str(data_folder), "epochs": 3, "batch_size": 8}
        return load_recipe(None, {**values, **{key.replace("__", "."): value for key, value in changes.items()}})

    return make
