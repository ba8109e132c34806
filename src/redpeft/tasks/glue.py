"""The splits of GLUE that the paper scores on: the labels of GLUE's own test sets are not public.

A test split is made of the public validation set, in the order of numpy's `RandomState(seed).permutation`. Half and
half, the odd row going to validation; of the large sets 1000 rows validate and the rest is the test split. CoLA is
the other way round: its first half is the test split. For T5 the large sets and SST-2 validate on 1000 rows of the
training set instead, and the whole public validation set is the test split.
"""

from __future__ import annotations

import logging

import numpy as np
from datasets import Dataset

from redpeft.errors import UserError
from redpeft.tasks.columns import source

logger = logging.getLogger(__name__)

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
        raise UserError(f"data.protocol {protocol} needs the public validation set of {task}, and there is none")
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
    """The first `rows` of the permuted rows, and the others."""
    if not 0 < rows < len(dataset):
        raise UserError(f"{source(dataset)} has {len(dataset)} rows: too few to take {rows or 1} of them out")
    order = np.random.RandomState(seed).permutation(len(dataset))
    return dataset.select(order[:rows]), dataset.select(order[rows:])
