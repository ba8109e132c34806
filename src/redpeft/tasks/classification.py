"""Classification of a text or a pair of texts: one label, several labels, or a number (regression)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from scipy.special import expit, softmax
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from redpeft.errors import UserError
from redpeft.tasks import columns as cols
from redpeft.tasks import metrics
from redpeft.tasks.base_model import ensure_pad_token, load_base, set_pad_token, tokens_of
from redpeft.tasks.data import DataConfig

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
METRICS = {
    SINGLE: ["accuracy", "f1_macro", "matthews"],
    MULTI: ["f1_micro", "f1_macro", "exact_match"],
    REGRESSION: ["pearson", "spearman", "mse"],
}
SCORES = {SINGLE: metrics.score_classes, MULTI: metrics.score_label_sets, REGRESSION: metrics.score_values}
TEXT_PAIRS = [
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("question", "sentence"),
    ("question", "passage"),
]
TEXTS = ["sentence", "text", "content", "review", "message", "utterance", "tweet", "comment", "body", "question"]
NUMBERING = {"idx", "id", "index", "guid", "uid", "unnamed: 0"}


@dataclass
class ClassificationTask:
    """What a text is to be labelled with, and how that is scored.

    Attributes:
        columns: "text", for pairs "text_pair", and "label": a column's name, or a list of columns of 0 and 1.
        problem_type: transformers' name for one label, several labels or a number.
        label_names: the labels' names in the order of their ids; empty for regression.
        metric: the score that picks the best checkpoint, one of those that `compute_metrics` gives.
    """

    columns: dict[str, Any]
    problem_type: str
    label_names: list[str]
    metric: str
    generation: ClassVar[dict[str, Any] | None] = None
    unanswered: ClassVar[None] = None
    score_answers: ClassVar[None] = None
    own_limits: ClassVar[str] = ""
    name: ClassVar[str] = "classification"
    task_type: ClassVar[str] = "SEQ_CLS"

    @classmethod
    def from_splits(
        cls,
        splits: dict[str, Dataset],
        data: DataConfig,
        *,
        problem_type: str | None = None,
        metric: str | None = None,
    ) -> ClassificationTask:
        """Guesses the columns that `data` does not name, takes the labels from the training rows, checks every row.

        Raises:
            UserError: a column that is missing, a row without text or label, one class only, a label that training
                lacks.
        """
        if problem_type is not None and problem_type not in METRICS:
            raise UserError(f"no problem type {problem_type!r}; there are {', '.join(METRICS)}")
        train = splits["train"]
        found = _find_columns(train, data)
        labels = _label_values(train, found["label"])
        kind = problem_type or _guess_problem_type(labels)
        names = [] if kind == REGRESSION else _label_names(train, found["label"], labels)
        task = cls(found, kind, names, metrics.choose_metric(metric, METRICS[kind]))
        if len(set(map(str, task.labels(train)))) < 2:
            raise UserError(
                f"{cols.source(train)}: every row has the label {labels[0]!r}, so there is nothing to learn"
            )
        for split in splits.values():
            task.check(split)
        return task

    @property
    def greater_is_better(self) -> bool:
        """Whether a larger `metric` is better."""
        return self.metric not in metrics.LOWER_IS_BETTER

    def check(self, dataset: Dataset, with_labels: bool = True) -> None:
        """Raises UserError for a missing column, an empty text, or a label that is missing or unknown."""
        for column in self._text_columns:
            cols.check_texts(dataset, column)
        if with_labels:
            self.labels(dataset)

    def labels(self, dataset: Dataset) -> list:
        """Each row's label as the model wants it: an id, a list of 0.0 and 1.0 by label, or a float."""
        column = self.columns["label"]
        raw = _label_values(dataset, column)
        if self.problem_type == REGRESSION:
            return [_number(dataset, index, value) for index, value in enumerate(raw)]
        if isinstance(column, list):
            return [[_flag(dataset, index, value) for value in row] for index, row in enumerate(raw)]
        ids, feature = cols.label_ids(self.label_names), cols.value_feature(dataset, column)
        rows = [
            [cols.label_id(dataset, index, ids, cols.label_name(label, feature)) for label in _as_list(row)]
            for index, row in enumerate(raw)
        ]
        if self.problem_type == MULTI:
            return [[float(label in row) for label in range(len(ids))] for row in rows]
        for index, row in enumerate(rows):
            if len(row) != 1:
                raise UserError(f"{cols.where(dataset, index)}: {len(row)} labels, and this task has one label a row")
        return [row[0] for row in rows]

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
        """The base model with a head for these labels; a decoder without a pad token gets the tokenizer's."""
        names = self.label_names or ["LABEL_0"]
        model = load_base(
            AutoModelForSequenceClassification,
            base,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id=cols.label_ids(names),
            problem_type=self.problem_type,
            ignore_mismatched_sizes=True,  # a base that was trained for other labels: its head is replaced
            **kwargs,
        )
        set_pad_token(model, tokenizer)
        return model

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """Pads a batch to its longest row."""
        ensure_pad_token(tokenizer)
        return DataCollatorWithPadding(tokenizer)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """All scores of this problem type, `metric` among them."""
        return SCORES[self.problem_type](self._logits(prediction.predictions), np.asarray(prediction.label_ids))

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

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"task": self.name, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClassificationTask:
        """The task that `to_dict` described."""
        return cls(**{key: value for key, value in values.items() if key != "task"})

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


def _find_columns(train: Dataset, data: DataConfig) -> dict[str, Any]:
    """The columns that `data` names, and a guess for the others."""
    if data.text_pair and not data.text:
        raise UserError("`text_pair` is named without `text`: name both columns")
    named = [name for name in (data.text, data.text_pair) if name]
    label = data.label or cols.find_column(train, cols.LABEL_COLUMNS, without=named)
    texts = named or _guess_texts(train, _as_list(label))
    if label is None:
        others = [name for name in cols.column_names(train) if name not in texts and name.lower() not in NUMBERING]
        label = cols.choose_column(train, others[0] if len(others) == 1 else None, [], "label")
    cols.require_columns(train, [*texts, *_as_list(label)])
    return {**dict(zip(("text", "text_pair"), texts, strict=False)), "label": label}


def _guess_texts(train: Dataset, labels: list) -> list[str]:
    """A pair of columns with well-known names, else one such column, else the column with the longest texts."""
    for pair in TEXT_PAIRS:
        found = [column for name in pair if (column := cols.find_column(train, [name], without=labels))]
        if len(found) == 2:
            return found
    if column := cols.find_column(train, TEXTS, without=labels):
        return [column]
    strings = [name for name in cols.text_columns(train) if name not in labels]
    strings.sort(key=lambda name: sum(len(text or "") for text in cols.values(train, name)), reverse=True)
    return [cols.choose_column(train, next(iter(strings), None), [], "text")]


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _label_values(dataset: Dataset, column: str | list[str]) -> list:
    """Each row's label as it stands in the data, a list where there are several.

    Raises:
        UserError: a row without a label.
    """
    cols.require_columns(dataset, _as_list(column))
    if isinstance(column, list):
        rows = [list(row) for row in zip(*(cols.values(dataset, name) for name in column), strict=True)]
    else:
        rows = cols.values(dataset, column)
    for index, row in enumerate(rows):
        if any(map(cols.is_missing_label, _as_list(row))):
            raise UserError(f"{cols.where(dataset, index)}: the label in column {column!r} is empty")
    return rows


def _guess_problem_type(labels: list) -> str:
    """Lists are several labels; numbers that are not all whole, or written ones of which more than 20 differ, are
    regression; everything else is one label."""
    if any(isinstance(label, list) for label in labels):
        return MULTI
    try:
        numbers = set(map(float, labels))
    except ValueError:
        return SINGLE
    written = any(isinstance(label, str) for label in labels)
    return REGRESSION if (len(numbers) > 20 if written else any(number % 1 != 0 for number in numbers)) else SINGLE


def _label_names(train: Dataset, column: str | list[str], labels: list) -> list[str]:
    if isinstance(column, list):
        return column
    feature = cols.value_feature(train, column)
    return cols.sort_label_names(
        (cols.label_name(label, feature) for row in labels for label in _as_list(row)), feature
    )


def _number(dataset: Dataset, index: int, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not np.isfinite(number):
        raise UserError(f"{cols.where(dataset, index)}: the label {value!r} is not a number, as regression needs it")
    return number


def _flag(dataset: Dataset, index: int, value: Any) -> float:
    if value not in (0, 1, "0", "1"):
        raise UserError(f"{cols.where(dataset, index)}: {value!r} where a column of labels holds 0 or 1")
    return float(value)
