"""Which rows of a user's data are learned from, and which are scored on."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from redpeft.errors import UserError
from redpeft.tasks.base import DataConfig
from redpeft.tasks.columns import DOCUMENT_COLUMNS, find_column, first_of, is_missing, require_columns, source, values

logger = logging.getLogger(__name__)

MAY_BE_EMPTY = ("input", "system", "tools")
"""Of a task's columns, those that a row may leave empty."""


def leave_out_missing(dataset: Dataset, columns: Mapping[str, Any]) -> Dataset:
    """The rows with a value in each of a task's columns, but for those that may be empty (`MAY_BE_EMPTY`)."""
    needed = [
        name for key, names in columns.items() if key not in MAY_BE_EMPTY for name in np.atleast_1d(names).tolist()
    ]
    require_columns(dataset, needed)
    empty = {index for name in needed for index, value in enumerate(values(dataset, name)) if _lacks(value)}
    if not empty:
        return dataset
    if len(empty) == len(dataset):
        raise UserError(f"{source(dataset)}: no row has values in all of the columns {', '.join(needed)}")
    logger.warning("left out because a text or a label is missing: %s", first_of(dataset, sorted(empty)))
    return dataset.select([index for index in range(len(dataset)) if index not in empty])


def _lacks(value: Any) -> bool:
    return any(map(is_missing, value)) if isinstance(value, list) else is_missing(value)


def choose_rows(splits: dict[str, Dataset], task: Any, config: DataConfig, seed: int) -> dict[str, Dataset]:
    """The splits, limited to their numbers of rows, with a validation split made of training rows if there is none.

    Rows that ask the same (`task.groups`, such as one text), or have the same value in `data.group`, stay together: no
    answer to a validation row is seen in training, and no limit removes some of the references. The rows are drawn by
    the seed, with each class (`task.strata`) in proportion.

    Raises:
        UserError: there is one row, or one group, to take a validation split from.
    """
    splits = dict(splits)
    if "validation" not in splits:
        splits["train"], splits["validation"] = _split_off(splits["train"], task, config, seed)
    limits = {"train": config.max_train_rows, "validation": config.max_eval_rows, "test": config.max_eval_rows}
    for name, limit in limits.items():
        if limit is not None and name in splits and limit < len(splits[name]):
            splits[name] = _at_most(splits[name], limit, task, config, seed)
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


def _split_off(train: Dataset, task: Any, config: DataConfig, seed: int) -> tuple[Dataset, Dataset]:
    """The training rows that stay, and those that become the validation split."""
    if len(train) < 2:
        raise UserError(f"{source(train)} has one row: too few to take a validation split from it")
    what, groups = _groups(train, task, config)
    number = groups.max() + 1
    if number == 1 and config.group:
        raise UserError(f"{source(train)}: all rows have one {what}: give a validation split as data.validation")
    if number == 1 or (number == 2 and what == task.group):  # whole groups would leave nothing, or half, to learn
        logger.warning(
            "%s: rows with the same %s (%d different ones) are split between training and validation",
            source(train),
            what,
            number,
        )
        what, groups = "row", np.arange(len(train))
    strata = task.strata(train) if task.strata else None
    rows = min(max(1, round(config.validation_fraction * len(train))), len(train) - 1)
    chosen = _draw(groups, strata, rows, seed, leave_singles=True)
    logger.warning(
        "no validation split: %d of %d rows of %s are used for it (seed %d%s%s)",
        len(chosen), len(train), source(train), seed,
        ", balanced by class" if strata else "",
        f"; rows with the same {what} stay together" if groups.max() + 1 < len(train) else "",
    )  # fmt: skip
    rest = np.setdiff1d(np.arange(len(train)), chosen)
    return train.select(rest), train.select(chosen)


def _at_most(dataset: Dataset, limit: int, task: Any, config: DataConfig, seed: int) -> Dataset:
    what, groups = _groups(dataset, task, config)
    chosen = _draw(groups, task.strata(dataset) if task.strata else None, limit, seed)
    if groups.max() + 1 < len(dataset):
        logger.warning(
            "%s: %d of %d rows are used (the limit is %d); rows with the same %s stay together",
            source(dataset), len(chosen), len(dataset), limit, what,
        )  # fmt: skip
    return dataset.select(chosen)


def _groups(dataset: Dataset, task: Any, config: DataConfig) -> tuple[str, np.ndarray]:
    """What the rows of a group share, and the number of each row's group, from 0."""
    if config.group:
        require_columns(dataset, [config.group])
        return config.group, _number(values(dataset, config.group))
    document = find_column(dataset, DOCUMENT_COLUMNS, without=task.columns.values())
    if document:
        groups = _number(values(dataset, document))
        if 0 < groups.max() < len(dataset) - 1:
            return document, groups
    return task.group, _number(task.groups(dataset))


def _number(keys: list[Hashable]) -> np.ndarray:
    """Equal keys get equal numbers, from 0. Each missing key gets a number of its own."""
    seen: dict[Hashable, int] = {}
    return np.array(
        [seen.setdefault((index,) if is_missing(key) else key, len(seen)) for index, key in enumerate(keys)]
    )


def _draw(
    groups: np.ndarray, strata: list[int] | None, rows: int, seed: int, leave_singles: bool = False
) -> np.ndarray:
    """The sorted numbers of at most `rows` rows, in whole groups. If no group is small enough, those of the smallest
    group.

    The groups come in random order, with each class spread evenly. With `leave_singles` the only group of a class
    comes last.
    """
    random = np.random.default_rng(seed)
    sizes, firsts = np.bincount(groups), np.unique(groups, return_index=True)[1]
    order = random.permutation(len(sizes))
    classes = np.zeros(len(order), dtype=int) if strata is None else np.asarray(strata)[firsts[order]]
    before = pd.Series(order).groupby(classes).cumcount().to_numpy()
    counts = np.bincount(classes)[classes]
    place = (before + random.random(classes.max() + 1)[classes]) / counts
    if leave_singles:
        place[counts == 1] = 1
    taken, total = [], 0
    for group in order[np.argsort(place, kind="stable")]:
        if total + sizes[group] <= rows:
            taken.append(group)
            total += sizes[group]
    return np.flatnonzero(np.isin(groups, taken or [sizes.argmin()]))


# --- GLUE -----------------------------------------------------------------------------------------------------------
#
# The splits that the paper scores on: the labels of GLUE's own test sets are not public.
#
# A test split is made of the public validation set, in the order of numpy's `RandomState(seed).permutation`. Half and
# half, the odd row going to validation; of the large sets 1000 rows validate and the rest is the test split. CoLA is
# the other way round: its first half is the test split. For T5 the large sets and SST-2 validate on 1000 rows of the
# training set instead, and the whole public validation set is the test split.

GLUE = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
LARGE = {"glue": ("mnli", "qnli", "qqp"), "glue-t5": ("mnli", "qnli", "qqp", "sst2")}
"""By protocol, the tasks of which `HELD_OUT` rows validate."""
HELD_OUT = 1000


def glue_splits(splits: dict[str, Dataset], task: str, protocol: str, seed: int) -> dict[str, Dataset]:
    """The splits train, validation and test of one GLUE task, from its public train and validation sets.

    Args:
        splits: the public sets; a test set among them is left out.
        task: one of `GLUE`, in any case and with or without a hyphen (SST-2).
        protocol: "glue" (RoBERTa), or "glue-t5".
        seed: of the permutation.

    Raises:
        UserError: another task, no validation set, or too few rows.
    """
    name = task.lower().replace("-", "")
    if name not in GLUE:
        raise UserError(
            f"data.protocol {protocol} splits {', '.join(GLUE)}, and not {task!r}: name one of them as "
            "data.config_name, or leave the protocol out"
        )
    if "validation" not in splits:
        raise UserError(f"data.protocol {protocol} needs the public validation set of {task}, which is missing")
    train, public = splits["train"], splits["validation"]
    if protocol == "glue-t5" and name in LARGE[protocol]:
        validation, rest = _cut(train, HELD_OUT, seed)
        return {"train": rest, "validation": validation, "test": public}
    if name == "cola":
        test, validation = _cut(public, len(public) // 2, seed)
    else:
        validation, test = _cut(public, _validation_rows(public, name, protocol), seed)
    return {"train": train, "validation": validation, "test": test}


def _validation_rows(public: Dataset, name: str, protocol: str) -> int:
    half = len(public) - len(public) // 2
    if name not in LARGE[protocol]:
        return half
    if half < HELD_OUT:  # a part of the set; the public sets have 5463 rows and more
        logger.warning(
            "%s has %d rows: half of them are used for validation, not %d", source(public), len(public), HELD_OUT
        )
    return min(half, HELD_OUT)


def _cut(dataset: Dataset, rows: int, seed: int) -> tuple[Dataset, Dataset]:
    """The first `rows` of the permuted rows, and the rest."""
    if not 0 < rows < len(dataset):
        raise UserError(f"{source(dataset)} has {len(dataset)} rows: too few to take {rows or 1} of them out")
    order = np.random.RandomState(seed).permutation(len(dataset))
    return dataset.select(order[:rows]), dataset.select(order[rows:])
