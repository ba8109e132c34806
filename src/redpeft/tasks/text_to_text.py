"""Classification as text to text, for encoder-decoders such as T5: the label is a text that the model generates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from redpeft.errors import UserError
from redpeft.models import ensure_pad_token, load_pretrained
from redpeft.tasks import columns as cols
from redpeft.tasks import metrics
from redpeft.tasks.base import DataConfig
from redpeft.tasks.classification import MULTI, REGRESSION, ClassificationTask
from redpeft.tasks.labels import label_ids

LABEL_TOKENS = 32
NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]+)?")


@dataclass
class TextToTextTask(ClassificationTask):
    """A label, generated as text. Columns, labels and metrics are classification's; several labels a row are not.

    A number is learned, and compared, rounded to one decimal. A generated text that is no label (no number) is wrong:
    it counts as one class more, which no row has, or as that end of the numbers to learn which is farther from the
    row's own. The score "unreadable" is the share of such texts.

    Attributes:
        prefix: None for the texts alone, a pair as the tokenizer joins it, which is what the RED paper's script does.
            Otherwise T5's own form: the prefix, and each text behind its column's name, as in
            `mrpc sentence1: ... sentence2: ...`.
    """

    prefix: str | None = None
    generation: ClassVar[dict[str, Any] | None] = {
        "max_new_tokens": LABEL_TOKENS,
        "num_beams": 1,
        "do_sample": False,
    }
    name: ClassVar[str] = "text-to-text"
    task_type: ClassVar[str] = "SEQ_2_SEQ_LM"
    default_columns: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def from_splits(
        cls,
        splits: dict[str, Dataset],
        data: DataConfig,
        *,
        problem_type: str | None = None,
        metric: str | None = None,
    ) -> TextToTextTask:
        """As in classification, with the prefix of `data`. Raises `UserError` also for several labels a row."""
        task: Any = super().from_splits(splits, data, problem_type=problem_type, metric=metric)
        if task.problem_type == MULTI:
            raise UserError(
                "the task text-to-text has one label a row; for several use the task classification, or "
                "data.label_separator=none to take each text as one label"
            )
        task.prefix = data.prefix
        return task

    def load_model(self, base: str | Path, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> PreTrainedModel:
        """The base model as an encoder-decoder with the head of its language model."""
        return load_pretrained(AutoModelForSeq2SeqLM, base, **kwargs)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Pads a batch and its labels to their longest rows."""
        ensure_pad_token(tokenizer)
        return DataCollatorForSeq2Seq(tokenizer)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """All scores of this problem type, `metric` among them, and "unreadable". Takes texts, not token ids."""
        if self.problem_type == REGRESSION:
            generated, expected = ([text.strip() for text in texts] for texts in prediction)
            return _score_numbers(generated, np.array(expected, dtype=np.float64))
        matrix = self._confusion(prediction)
        return metrics.score_matrix(matrix) | {"unreadable": float(matrix[:, -1].sum() / matrix.sum())}

    def _confusion(self, prediction: EvalPrediction) -> np.ndarray:
        """As in classification, with one more class: texts that are not a label."""
        ids = label_ids(self.label_names)
        expected, generated = (
            np.array([ids.get(text.strip(), len(ids)) for text in texts])
            for texts in (prediction.label_ids, prediction.predictions)
        )
        return metrics.count_classes(expected, generated, len(ids) + 1)

    def decode(
        self, predictions: Any, dataset: Dataset | None = None, encoded: Dataset | None = None
    ) -> list[dict[str, Any]]:
        """Texts as {"label", "generated"} or {"value", "generated"}; None for a text that is not a label or a
        number."""
        texts = [text.strip() for text in predictions]
        if self.problem_type == REGRESSION:
            return [{"value": _number(text), "generated": text} for text in texts]
        return [{"label": text if text in self.label_names else None, "generated": text} for text in texts]

    def _texts(self, rows: dict[str, list]) -> list[list[str]]:
        texts = super()._texts(rows)
        if self.prefix is None:
            return texts
        named = zip(*([f"{name}: {text}" for text in rows[name]] for name in self._text_columns), strict=True)
        return [[" ".join([self.prefix, *parts]) for parts in named]]

    def _targets(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The tokens of each row's label, and an end token. Raises `UserError` for a label that the tokenizer cannot
        write.

        T5's tokenizer writes the end token; others leave it to the caller. A tokenizer without an end token (BERT's,
        in a pair of encoder and decoder) is used as it is.
        """
        labels = self.labels(dataset)
        numbers = self.problem_type == REGRESSION
        texts = [f"{label:.1f}" if numbers else self.label_names[label] for label in labels]
        tokens = {}
        for text in {*texts, *self.label_names}:
            tokens[text] = tokenizer(text_target=text, truncation=True, max_length=LABEL_TOKENS)["input_ids"]
            again = tokenizer.decode(tokens[text], skip_special_tokens=True).strip()
            if again != text:
                raise UserError(
                    f"{cols.source(dataset)}: the label {text!r} is {again!r} in this model's tokens (at most "
                    f"{LABEL_TOKENS}): give it another name"
                )
            end = tokenizer.eos_token_id
            if end is not None and end not in tokens[text]:  # mBART puts a language code after it
                tokens[text].append(end)
        return [tokens[text] for text in texts]


def _number(text: str) -> float | None:
    return float(text) if NUMBER.fullmatch(text) else None


def _score_numbers(generated: list[str], expected: np.ndarray) -> dict[str, float]:
    values = np.array([_number(text) for text in generated], dtype=np.float64)  # None becomes NaN
    low, high = expected.min(), expected.max()
    wrong = np.where(expected - low > high - expected, low, high)
    unreadable = np.isnan(values)
    return metrics.score_values(np.where(unreadable, wrong, values), expected) | {
        "unreadable": float(unreadable.mean())
    }
