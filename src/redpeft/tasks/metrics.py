"""Scores by kind of task. Each takes logits and labels as arrays and gives all the usual scores of its kind."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, mean_squared_error

from redpeft.errors import RunError, UserError

LOWER_IS_BETTER = {"mse", "loss"}
IGNORED = -100
"""The label of a token that is neither learned nor scored; also what pads predictions and labels of uneven length."""


def choose_metric(asked: str | None, offered: list[str]) -> str:
    """The metric asked for, else the first offered. Raises UserError if it is not offered."""
    if asked is not None and asked not in offered:
        raise UserError(f"no metric {asked!r} for this task; it has {', '.join(offered)}")
    return asked or offered[0]


def logits_of(predictions: Any) -> np.ndarray:
    """The logits of a Trainer's predictions, which may come with hidden states. Raises RunError if not finite."""
    logits = np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
    if not np.isfinite(logits).all():
        raise RunError("the model's predictions are not finite: lower the learning rate")
    return logits


def count_classes(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """The confusion matrix: how many rows of each class (first axis) were given each class (second axis)."""
    matrix = np.zeros((classes, classes), dtype=int)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


def score_matrix(matrix: np.ndarray) -> dict[str, float]:
    """Scores of a confusion matrix, all 0 without rows; "f1_macro" is the mean over the classes that occur, and
    "matthews" 0 where all rows are of one class, or were given one.

    Not by scikit-learn's functions, which warn of a single class, and of many classes in few rows.
    """
    rows, true, given, right = matrix.sum(), matrix.sum(1), matrix.sum(0), matrix.diagonal()
    if not rows:
        return {"accuracy": 0.0, "f1_macro": 0.0, "matthews": 0.0}
    occur = true + given > 0
    spread = np.sqrt(float(rows**2 - (true**2).sum()) * float(rows**2 - (given**2).sum()))
    return {
        "accuracy": float(right.sum() / rows),
        "f1_macro": float((2 * right[occur] / (true + given)[occur]).mean()),
        "matthews": float((rows * right.sum() - true @ given) / spread) if spread else 0.0,
    }


def score_label_sets(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Several labels a row, each predicted where its logit is positive. Shape: both (rows, labels)."""
    predicted, labels = logits > 0, labels > 0.5
    return {
        "f1_micro": float(f1_score(labels, predicted, average="micro", zero_division=0)),
        "f1_macro": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        "exact_match": float((labels == predicted).all(-1).mean()),
    }


def score_values(values: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Regression. A constant prediction correlates with nothing: 0, not NaN. Shape: both (rows,)."""
    values, labels = values.astype(np.float64), labels.astype(np.float64)
    constant = np.ptp(values) == 0 or np.ptp(labels) == 0
    return {
        "pearson": 0.0 if constant else float(pearsonr(values, labels)[0]),
        "spearman": 0.0 if constant else float(spearmanr(values, labels)[0]),
        "mse": float(mean_squared_error(labels, values)),
    }


def score_tags(predicted: list[list[str]], expected: list[list[str]], with_entities: bool) -> dict[str, float]:
    """Token classification, a list of tags a row: scores of the words' tags and, if asked, of the entities (micro)."""
    flat_predicted, flat_expected = ([tag for row in rows for tag in row] for rows in (predicted, expected))
    names, ids = np.unique(flat_expected + flat_predicted, return_inverse=True)
    labels, given = np.split(ids, 2)
    scores = score_matrix(count_classes(labels, given, len(names)))
    del scores["matthews"]
    if not with_entities:
        return scores
    found, true = (entities(rows) for rows in (predicted, expected))
    hits = len(found & true)
    precision, recall = hits / max(len(found), 1), hits / max(len(true), 1)
    f1 = 2 * hits / max(len(found) + len(true), 1)
    return {"f1": f1, "precision": precision, "recall": recall, **scores}


def marks_entities(tags: list[str]) -> bool:
    """Whether all tags are O, B-... or I-..., and not all are O."""
    return all(re.fullmatch(r"O|[BI]-.+", tag) for tag in tags) and any(tag != "O" for tag in tags)


def entities(rows: list[list[str]]) -> set[tuple[int, int, int, str]]:
    """The entities (row, start, end, type) of BIO tags, read as CoNLL's script does: a stray I- begins one."""
    found = set()
    for row, tags in enumerate(rows):
        start, kind = 0, None
        for index, tag in enumerate([*tags, "O"]):
            if kind is not None and tag != f"I-{kind}":
                found.add((row, start, index, kind))
                kind = None
            if kind is None and tag != "O":
                start, kind = index, tag[2:]
    return found
