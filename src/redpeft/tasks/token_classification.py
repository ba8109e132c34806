"""Token classification: a tag for each word, such as the names in a text."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
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
from redpeft.tasks.labels import count_names, find_labels, label_name, sort_label_names
from redpeft.tasks.metrics import IGNORED

logger = logging.getLogger(__name__)

TAG_IDS = "__tag_ids__"


@dataclass
class TokenClassificationTask(Task):
    """Which tags words get, and how that is scored.

    Attributes:
        columns: "tokens" (lists of words) and "tags" (a tag for each word).
        label_names: the tags in the order of their ids.
        metric: entity "f1" where the tags are B-..., I-... and O, else "accuracy" or "f1_macro" over words.
    """

    columns: dict[str, str]
    label_names: list[str]
    metric: str
    name: ClassVar[str] = "token-classification"
    task_type: ClassVar[str] = "TOKEN_CLS"
    group: ClassVar[str] = "words"
    default_columns: ClassVar[Mapping[str, str]] = {"tokens": "tokens", "tags": "tags"}

    @classmethod
    def from_splits(
        cls, splits: dict[str, Dataset], data: DataConfig, *, metric: str | None = None
    ) -> TokenClassificationTask:
        """Guesses the columns that `data` does not name, takes the tags from the training rows, checks every row.

        Raises:
            UserError: a column that is missing, words without a tag, one tag only, a tag that training lacks.
        """
        train = splits["train"]
        found = cls.find_columns(train, data)
        _check_lists(train, found["tags"])
        feature = cols.value_feature(train, found["tags"])
        tags = {label_name(tag, feature) for row in cols.values(train, found["tags"]) for tag in row}
        if len(tags) < 2:
            raise UserError(
                f"{cols.source(train)}: every word has the tag {min(tags)!r}, so there is nothing to learn"
            )
        names = sort_label_names(tags, feature)
        kind = "entities" if metrics.marks_entities(names) else "tags"
        task = cls(found, names, metrics.choose_metric(metric, kind))
        for split in splits.values():
            task.check(split)
        return task

    @classmethod
    def find_columns(cls, train: Dataset, data: DataConfig) -> dict[str, str]:
        """The columns that `data` names, and a guess for the others. UserError: a column that is not there."""
        return {
            "tokens": cols.choose_column(train, data.tokens, cols.WORD_COLUMNS, "tokens"),
            "tags": cols.choose_column(train, data.tags, cols.TAG_COLUMNS, "tags"),
        }

    @classmethod
    def without_run(cls, labels: Sequence[str]) -> TokenClassificationTask:
        return cls(dict(cls.default_columns), list(labels), "accuracy")

    @property
    def head_labels(self) -> list[str]:
        return self.label_names

    def check(self, dataset: Dataset, with_labels: bool = True) -> None:
        """Raises `UserError` for a missing column, a row without words, or tags that are missing, too few or
        unknown."""
        cols.require_columns(dataset, [self.columns["tokens"]])
        _check_lists(dataset, self.columns["tokens"])
        if with_labels:
            self._tag_ids(dataset)

    def groups(self, dataset: Dataset) -> list[tuple[str, ...]]:
        """Each row's words."""
        return list(map(tuple, cols.values(dataset, self.columns["tokens"])))

    def describe(self, dataset: Dataset) -> list[str]:
        """For people: how many words each tag has."""
        return [count_names(self.label_names[tag] for tags in self._tag_ids(dataset) for tag in tags)]

    def rows_to_dataset(self, rows: list[dict | str], first: int = 1) -> Dataset:
        """Rows to predict: objects with the words, or strings, which are cut at white space. `first` numbers them."""
        tokens = self.columns["tokens"]
        split = [{tokens: row.split()} if isinstance(row, str) else row for row in rows]
        return cols.rows_to_dataset(split, [tokens], None, first)

    def encode(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        with_labels: bool = True,
    ) -> Dataset:
        """Token ids, cut at `max_length`, and "labels": the tag's id on the first token of each word, -100 elsewhere.

        Without labels it is the word's place in its row instead, so that `decode` knows to which word a token belongs:
        a tokenizer may drop a whole word, such as a zero-width space.
        """
        self.check(dataset, with_labels=False)
        if not tokenizer.is_fast:
            raise UserError("token classification needs a fast tokenizer (one with a tokenizer.json)")
        _mark_word_starts(tokenizer)
        words = self.columns["tokens"]
        places = [list(range(len(row))) for row in cols.values(dataset, words)]
        tags = self._tag_ids(dataset) if with_labels else places
        dropped: list[str] = []

        def tokenise(rows: dict[str, list]) -> dict[str, list]:
            encoded = tokens_of(tokenizer, rows[words], limit=max_length, is_split_into_words=True)
            for index, row in enumerate(rows[words]):
                seen = {word for word in encoded.word_ids(index) if word is not None}
                end = max(seen, default=0) if encoded[cols.CUT][index] else len(row)
                dropped.extend(word for place, word in enumerate(row[:end]) if place not in seen)
            return {**encoded, "labels": [_align(encoded.word_ids(row), ids) for row, ids in enumerate(rows[TAG_IDS])]}

        encoded = cols.tokenise(dataset.select_columns(words).add_column(TAG_IDS, tags), tokenise)
        if dropped and with_labels:
            logger.warning(
                "%s: this tokenizer drops %d words, such as %r: they are neither learned nor scored",
                cols.source(dataset), len(dropped), dropped[0],
            )  # fmt: skip
        return encoded

    def load_model(self, base: str | Path, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> PreTrainedModel:
        """The base model with a head for these tags."""
        return load_classifier(AutoModelForTokenClassification, base, tokenizer, self.label_names, **kwargs)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorForTokenClassification:
        """Pads a batch and its labels to its longest row."""
        ensure_pad_token(tokenizer)
        return DataCollatorForTokenClassification(tokenizer)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """All scores, over the words that have a token."""
        predicted = metrics.logits_of(prediction.predictions).argmax(-1)
        expected = np.asarray(prediction.label_ids)
        return metrics.score_tags(
            [self._names(row[labels != IGNORED]) for row, labels in zip(predicted, expected, strict=True)],
            [self._names(labels[labels != IGNORED]) for labels in expected],
            with_entities=metrics.marks_entities(self.label_names),
        )

    def decode(self, predictions: np.ndarray, dataset: Dataset, encoded: Dataset) -> list[dict[str, Any]]:
        """Logits of shape (rows, tokens, tags) as {"tokens", "tags"}, with a tag for each word.

        The tag is None for words that the model did not see: they were cut off, or have no token.

        Args:
            dataset: the rows that were encoded.
            encoded: the same rows from `encode` without labels.
        """
        best = metrics.logits_of(predictions).argmax(-1)
        rows = []
        for words, places, row in zip(
            cols.values(dataset, self.columns["tokens"]), cols.values(encoded, "labels"), best, strict=True
        ):
            tags: list[str | None] = [None] * len(words)
            for place, tag in zip(places, row, strict=False):
                if place != IGNORED:
                    tags[place] = self.label_names[tag]
            rows.append({"tokens": words, "tags": tags})
        return rows

    def _names(self, ids: np.ndarray) -> list[str]:
        return [self.label_names[index] for index in ids]

    def _tag_ids(self, dataset: Dataset) -> list[list[int]]:
        column = self.columns["tags"]
        cols.require_columns(dataset, [column])
        _check_lists(dataset, column)
        rows = cols.values(dataset, column)
        for index, (words, tags) in enumerate(zip(cols.values(dataset, self.columns["tokens"]), rows, strict=True)):
            if len(words) != len(tags):
                raise UserError(f"{cols.where(dataset, index)}: {len(words)} words and {len(tags)} tags")
        return find_labels(dataset, column, rows, self.label_names)


def _check_lists(dataset: Dataset, column: str) -> None:
    """Raises `UserError` if a row of `column` is not a list, is empty, or holds a missing value."""
    for index, row in enumerate(cols.values(dataset, column)):
        if row is not None and (not isinstance(row, list) or not row):
            raise UserError(
                f"{cols.where(dataset, index)}: column {column!r} holds {row!r} and not a list with an entry for each "
                "word (CSV cannot hold lists: use JSON lines or Parquet)"
            )
        if row is None or any(map(cols.is_missing, row)):
            raise cols.Missing(f"{cols.where(dataset, index)}: column {column!r} holds an empty entry: {row!r}")


def _align(word_ids: list[int | None], tags: list[int]) -> list[int]:
    """The tag of each token that begins a word, and `IGNORED` for the other tokens."""
    previous = [None, *word_ids]
    return [
        IGNORED if word is None or word == before else tags[word]
        for word, before in zip(word_ids, previous, strict=False)
    ]


def _mark_word_starts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Byte-level tokenizers (RoBERTa, GPT-2) take words in a list only with `add_prefix_space`."""
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    if hasattr(pre_tokenizer, "add_prefix_space"):
        pre_tokenizer.add_prefix_space = True
        tokenizer.add_prefix_space = True
