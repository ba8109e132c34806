"""Data sets and tasks from columns in memory."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import Any

import pytest
from datasets import Dataset

from redpeft.errors import UserError
from redpeft.tasks.base import DataConfig


def make(columns: dict, source: str = "train.csv", features: Any = None) -> Dataset:
    """A data set that errors name as `source`."""
    dataset = Dataset.from_dict(columns, features=features)
    dataset.info.description = source
    return dataset


def task_of(
    task_class: Any,
    columns: dict,
    data: dict | None = None,
    *,
    source: str = "train.csv",
    features: Any = None,
    **options: Any,
) -> Any:
    """The task that `task_class` makes of these columns."""
    train = make(columns, source, features)
    return task_class.from_splits({"train": train}, DataConfig(path="x", **(data or {})), **options)


def error_of(task_class: Any, columns: dict, data: dict | None = None, **options: Any) -> str:
    """The one line that refuses these columns."""
    with pytest.raises(UserError) as caught:
        task_of(task_class, columns, data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def parts(encoded: Dataset, tokenizer: Any) -> list[tuple[str, ...]]:
    """What each row holds: in turns what is read, and what is learned."""
    rows = []
    for row in encoded:
        spans = groupby(zip(row["completion_mask"], row["input_ids"], strict=True), key=itemgetter(0))
        rows.append(tuple(tokenizer.decode([token for _, token in span]) for _, span in spans))
        assert row["completion_mask"][0] == 0
    return rows
