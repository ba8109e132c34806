"""Classification of a text or a pair of texts: one label, several labels, or a number (regression)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset
from scipy.special import expit, softmax
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from redpeft.errors import UserError
from redpeft.models import ensure_pad_token, load_classifier
from redpeft.tasks import columns as cols
from redpeft.tasks import metrics
from redpeft.tasks.base import DataConfig, Task
from redpeft.tasks.columns import tokens_of
from redpeft.tasks.labels import (
    LIST,
    SEPARATORS,
    WHOLE,
    are_measured,
    as_numbers,
    count_names,
    find_labels,
    find_separator,
    label_name,
    sort_label_names,
    split_labels,
    unused_separator,
)

logger = logging.getLogger(__name__)

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
SCORES = {MULTI: metrics.score_label_sets, REGRESSION: metrics.score_values}
FLAGS = {"0": 0.0, "0.0": 0.0, "false": 0.0, "1": 1.0, "1.0": 1.0, "true": 1.0}


@dataclass
class ClassificationTask(Task):
    """What a text is to be labelled with, and how that is scored.

    Attributes:
        columns: "text", for pairs "text_pair", and "label": a column's name, or a list of columns of 0 and 1.
        problem_type: transformers' name for one label, several labels or a number.
        label_names: the labels' names in the order of their ids; empty for regression.
        metric: the score that picks the best checkpoint, one of those that `compute_metrics` gives.
        label_separator: what stands between the labels where several are written in one text, or `labels.LIST`.
    """

    columns: dict[str, Any]
    problem_type: str
    label_names: list[str]
    metric: str
    label_separator: str | None = None
    name: ClassVar[str] = "classification"
    task_type: ClassVar[str] = "SEQ_CLS"
    group: ClassVar[str] = "text"
    recipe_fields: ClassVar[Collection[str]] = ("problem_type",)
    default_columns: ClassVar[Mapping[str, str]] = {"text": "text", "label": "label"}

    @classmethod
    def from_splits(
        cls,
        splits: dict[str, Dataset],
        data: DataConfig,
        *,
        problem_type: str | None = None,
        metric: str | None = None,
    ) -> ClassificationTask:
        """Guesses what `data` and `problem_type` leave open and says so, takes the labels from the training rows, and
        checks every row.

        Raises:
            UserError: a column that is missing, a row without text or label, one class only or one for each row, a
                label that training lacks, labels that contradict the problem type.
        """
        if problem_type not in (None, SINGLE, MULTI, REGRESSION):
            raise UserError(f"unknown problem type {problem_type!r}; there are {SINGLE}, {MULTI}, {REGRESSION}")
        train = splits["train"]
        columns = cls.find_columns(train, data)
        raw = _label_values(train, columns["label"])
        kind, separator = _problem_type(train, columns["label"], raw, data.label_separator, problem_type)
        task = cls(columns, kind, [], metrics.choose_metric(metric, kind), separator)
        if kind != REGRESSION:
            task.label_names = task._names(train, raw)
        _check_variety(train, columns["label"], raw[0], task.labels(train), kind)
        for split in splits.values():
            task.check(split)
        return task

    @classmethod
    def find_columns(cls, train: Dataset, data: DataConfig) -> dict[str, Any]:
        """The columns that `data` names, and a guess for the others. UserError: a column that is not there."""
        if data.text_pair and not data.text:
            raise UserError("`text_pair` is set without `text`: set both")
        named = [name for name in (data.text, data.text_pair) if name]
        label = data.label or cols.find_column(train, cols.LABEL_COLUMNS, without=named)
        texts = named or _guess_texts(train, _as_list(label))
        if label is None:
            others = [
                name
                for name in cols.column_names(train)
                if name not in texts and name.lower() not in cols.NUMBER_COLUMNS
            ]
            label = cols.choose_column(train, others[0] if len(others) == 1 else None, [], "label")
        cols.require_columns(train, [*texts, *_as_list(label)])
        return {**dict(zip(("text", "text_pair"), texts, strict=False)), "label": label}

    @classmethod
    def without_run(cls, labels: Sequence[str]) -> ClassificationTask:
        """One label a row, or a number for a head of one row."""
        if len(labels) == 1:
            return cls(dict(cls.default_columns), REGRESSION, [], "pearson")
        return cls(dict(cls.default_columns), SINGLE, list(labels), "accuracy")

    def check(self, dataset: Dataset, with_labels: bool = True) -> None:
        """Raises UserError for a missing column, an empty text, or a label that is missing or unknown."""
        for column in self._text_columns:
            cols.check_texts(dataset, column)
        if with_labels:
            self.labels(dataset)

    def labels(self, dataset: Dataset) -> list:
        """Each row's label in the form that the model needs: an id, a list of 0.0 and 1.0 by label, or a float."""
        column = self.columns["label"]
        raw = _label_values(dataset, column)
        if self.problem_type == REGRESSION:
            return _numbers(dataset, raw)
        if isinstance(column, list):
            return [[_flag(dataset, index, value) for value in row] for index, row in enumerate(raw)]
        rows = find_labels(dataset, column, self._label_lists(dataset, raw), self.label_names)
        if self.problem_type == MULTI:
            return [[float(label in row) for label in range(len(self.label_names))] for row in rows]
        for index, row in enumerate(rows):
            if len(row) != 1:
                raise UserError(
                    f"{cols.where(dataset, index)}: {len(row)} labels, but this task takes one label a row"
                )
        return [row[0] for row in rows]

    @property
    def head_labels(self) -> list[str]:
        return self.label_names

    @property
    def shape(self) -> Hashable:
        return self.problem_type, len(self.label_names)

    def groups(self, dataset: Dataset) -> list[tuple[str, ...]]:
        """Each row's text, or pair of texts."""
        return list(zip(*(cols.values(dataset, name) for name in self._text_columns), strict=True))

    @property
    def strata(self) -> Callable[[Dataset], list[int]] | None:
        """Gives each row's class, if a row has one label."""
        return self.labels if self.problem_type == SINGLE else None

    def describe(self, dataset: Dataset) -> list[str]:
        """For people: the problem type, and how many rows each label has."""
        labels = self.labels(dataset)
        if self.problem_type == REGRESSION:
            counts = f"labels: {min(labels):g} to {max(labels):g}"
        else:
            sets = np.array(labels) if self.problem_type == MULTI else np.eye(len(self.label_names))[labels]
            counts = count_names(self.label_names[label] for _, label in zip(*sets.nonzero(), strict=True))
        return [f"problem type: {self.problem_type}", counts]

    def rows_to_dataset(self, rows: list[dict | str], first: int = 1) -> Dataset:
        """Rows to predict: objects with the text columns or, for single texts, plain strings. `first` numbers them."""
        plain = None if "text_pair" in self.columns else self.columns["text"]
        return cols.rows_to_dataset(rows, self._text_columns, plain, first)

    def encode(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        with_labels: bool = True,
    ) -> Dataset:
        """Token ids, cut at `max_length`, and "labels". Checks the rows first."""
        self.check(dataset, with_labels=False)
        encoded = cols.tokenise(dataset, lambda rows: tokens_of(tokenizer, *self._texts(rows), limit=max_length))
        return encoded.add_column("labels", self._targets(dataset, tokenizer)) if with_labels else encoded

    def load_model(self, base: str | Path, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> PreTrainedModel:
        """The base model with a head for these labels. A decoder without a pad token gets the tokenizer's."""
        labels = self.label_names or ["LABEL_0"]
        kwargs["problem_type"] = self.problem_type
        return load_classifier(AutoModelForSequenceClassification, base, tokenizer, labels, **kwargs)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """Pads a batch to its longest row."""
        ensure_pad_token(tokenizer)
        return DataCollatorWithPadding(tokenizer)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """All scores of this problem type, `metric` among them."""
        if self.confusion is not None:
            return metrics.score_matrix(self.confusion(prediction))
        return SCORES[self.problem_type](self._logits(prediction.predictions), np.asarray(prediction.label_ids))

    @property
    def confusion(self) -> Callable[[EvalPrediction], np.ndarray] | None:
        """Counts rows by their label, in the order of `label_names`, and by the predicted one. None without
        classes."""
        return self._confusion if self.problem_type == SINGLE else None

    def _confusion(self, prediction: EvalPrediction) -> np.ndarray:
        predicted = self._logits(prediction.predictions).argmax(-1)
        return metrics.count_classes(np.asarray(prediction.label_ids), predicted, len(self.label_names))

    def decode(
        self, predictions: np.ndarray, dataset: Dataset | None = None, encoded: Dataset | None = None
    ) -> list[dict[str, Any]]:
        """Logits of shape (rows, labels) as {"label", "probabilities"}, {"labels", "probabilities"} or {"value"}."""
        logits = self._logits(predictions)
        if self.problem_type == REGRESSION:
            return [{"value": float(value)} for value in logits]
        probabilities = expit(logits) if self.problem_type == MULTI else softmax(logits, axis=-1)
        rows = [dict(zip(self.label_names, map(float, row), strict=True)) for row in probabilities]
        if self.problem_type == MULTI:
            return [{"labels": [name for name, p in row.items() if p > 0.5], "probabilities": row} for row in rows]
        return [{"label": max(row, key=row.__getitem__), "probabilities": row} for row in rows]

    def _names(self, train: Dataset, raw: list) -> list[str]:
        """The labels of the training rows in the order of their ids."""
        column = self.columns["label"]
        if isinstance(column, list):
            return column
        feature = cols.value_feature(train, column)
        rows = self._label_lists(train, raw)
        if changed := [label for row in rows for label in row if isinstance(label, str) and label != label.strip()]:
            logger.warning(
                "%s: labels are taken without the white space around them, such as %r", cols.source(train), changed[0]
            )
        return sort_label_names({label_name(label, feature) for row in rows for label in row}, feature)

    def _label_lists(self, dataset: Dataset, raw: list) -> list[Any]:
        """Each row's labels in a list. Texts that hold several labels are split.

        The files of a task may write labels in different ways: if the training rows' separator gives unknown labels,
        another separator that gives none is taken.
        """
        texts = {label for label in raw if isinstance(label, str)}
        if self.problem_type == SINGLE or not texts:
            return [_as_list(label) for label in raw]
        known, own = set(self.label_names), self.label_separator
        separators = (own, None, LIST, *SEPARATORS) if known else (own,)
        cuts = [{text: split_labels(text, separator) for text in texts} for separator in separators]
        fitting = (cut for cut in cuts if all(parts is not None and known.issuperset(parts) for parts in cut.values()))
        cut = next(fitting, cuts[0])
        rows = [cut[label] if isinstance(label, str) else _as_list(label) for label in raw]
        for index, row in enumerate(rows):
            if row is None:
                raise UserError(f"{cols.where(dataset, index)}: the label {raw[index]!r} is not a list in brackets")
        return rows

    @property
    def _text_columns(self) -> list[str]:
        return [self.columns[key] for key in ("text", "text_pair") if key in self.columns]

    def _texts(self, rows: dict[str, list]) -> list[list[str]]:
        """The texts that the tokenizer gets, as one column or two."""
        return [rows[name] for name in self._text_columns]

    def _targets(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list:
        """Each row's "labels"."""
        return self.labels(dataset)

    def _logits(self, predictions: Any) -> np.ndarray:
        logits = metrics.logits_of(predictions).astype(np.float64)
        return logits.reshape(len(logits)) if self.problem_type == REGRESSION else logits


def _guess_texts(train: Dataset, labels: list) -> list[str]:
    """A pair of columns with well-known names, else one such column, else the column with the longest texts."""
    for pair in cols.TEXT_PAIRS:
        found = [column for name in pair if (column := cols.find_column(train, [name], without=labels))]
        if len(found) == 2:
            return found
    if column := cols.find_column(train, cols.TEXT_COLUMNS, without=labels):
        return [column]
    strings = [name for name in cols.text_columns(train) if name not in labels]
    strings.sort(key=lambda name: sum(len(text or "") for text in cols.values(train, name)), reverse=True)
    return [cols.choose_column(train, next(iter(strings), None), [], "text")]


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _label_values(dataset: Dataset, column: str | list[str]) -> list:
    """Each row's label as it is in the data; a list if there are several.

    Raises:
        UserError: a row without a label, or with something that is not a label.
    """
    cols.require_columns(dataset, _as_list(column))
    if isinstance(column, list):
        rows = [list(row) for row in zip(*(cols.values(dataset, name) for name in column), strict=True)]
    else:
        rows = cols.values(dataset, column)
    if empty := [index for index, row in enumerate(rows) if any(map(cols.is_missing, _as_list(row)))]:
        raise cols.Missing(f"{cols.first_of(dataset, empty)}: the label in column {column!r} is empty")
    for index, row in enumerate(rows):
        if any(isinstance(label, (list, dict)) for label in _as_list(row)):
            raise UserError(f"{cols.where(dataset, index)}: column {column!r} holds {row!r}, which is not a label")
    return rows


def _problem_type(
    train: Dataset, column: str | list[str], labels: list, separator: str | None, asked: str | None
) -> tuple[str, str | None]:
    """The problem type, as asked for or guessed, and what separates several labels in one text, if anything does.

    Raises:
        UserError: labels that contradict what is asked for.
    """
    name = f"{cols.source(train)}: column {column!r}"
    texts = [label for label in labels if isinstance(label, str)]
    cut = separator if separator != WHOLE else None
    if cut is not None:
        if asked not in (None, MULTI):
            raise UserError(f"data.label_separator is for several labels a row, and problem_type is {asked}")
        if all(len(split_labels(text, cut) or [text]) == 1 for text in texts):
            raise UserError(f"{name} holds no label with data.label_separator {cut!r}, such as {labels[0]!r}")
    elif separator is None and texts and asked in (None, MULTI):
        cut = find_separator(texts)
        if cut is not None:
            logger.warning(
                "%s holds several labels a row, %s; data.label_separator=none takes each text as one label",
                name, "as lists in brackets" if cut == LIST else f"separated by {cut!r}",
            )  # fmt: skip
        elif asked is None and None in as_numbers(texts) and (unused := unused_separator(texts)):
            logger.warning("%s: %r is taken as one label; data.label_separator=%r splits such texts", name, *unused)
    several = cut is not None or any(isinstance(label, list) for label in labels)
    if asked == MULTI and not several:
        raise UserError(
            f"{name} holds one label a row, and problem_type is {MULTI}: that needs lists, several columns of 0 and 1 "
            "as data.label, or texts with a data.label_separator"
        )
    if asked == SINGLE and isinstance(column, list):
        raise UserError(f"data.label names {len(column)} columns of 0 and 1, and problem_type is {SINGLE}")
    if asked is not None or several:
        return asked or MULTI, cut
    if isinstance(column, list) or isinstance(cols.value_feature(train, column), ClassLabel):
        return SINGLE, None
    numbers: set[Any] = set(as_numbers(labels))
    measured = are_measured(labels)
    if measured or (None not in numbers and any(number % 1 for number in numbers)):
        logger.warning(
            "%s holds numbers of which %d differ, so %s",
            name, len(numbers), f"the task is regression; problem_type={SINGLE} takes them as classes" if measured
            else "they are classes; problem_type=regression learns them as numbers",
        )  # fmt: skip
    return REGRESSION if measured else SINGLE, None


def _check_variety(train: Dataset, column: str | list[str], first: Any, labels: list, kind: str) -> None:
    """Raises `UserError` if there is nothing to learn: all rows have one label, or each row has its own."""
    distinct = len(set(map(str, labels)))
    if distinct < 2:
        raise UserError(f"{cols.source(train)}: every row has the label {first!r}, so there is nothing to learn")
    if kind == SINGLE and distinct == len(labels) > 2:
        raise UserError(
            f"{cols.source(train)}: column {column!r} has a different value in each of the {len(labels)} rows, such "
            f"as {str(first)[:60]!r}, like an identifier or a text, so it holds no classes: name the label's column "
            "with data.label, or for numbers give problem_type=regression"
        )


def _numbers(dataset: Dataset, values: list) -> list[float]:
    numbers: list[Any] = as_numbers(values)
    if None in numbers:
        index = numbers.index(None)
        raise UserError(
            f"{cols.where(dataset, index)}: the label {values[index]!r} is not a number, which regression needs"
        )
    return numbers


def _flag(dataset: Dataset, index: int, value: Any) -> float:
    flag = FLAGS.get(str(value).strip().lower())
    if flag is None:
        raise UserError(f"{cols.where(dataset, index)}: {value!r}, but a column of labels holds 0 or 1")
    return flag
