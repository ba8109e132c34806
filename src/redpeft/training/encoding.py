"""The rows of a data set as a model reads them: cut to what it takes, without those that teach nothing, counted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from redpeft.errors import UserError
from redpeft.models import Limit, end_tokens, input_limit, known_tokens, positions
from redpeft.tasks import columns as cols
from redpeft.tasks.base import Task
from redpeft.tasks.metrics import IGNORED


@dataclass(frozen=True)
class Encoded:
    """Rows in tokens, as the task's collator takes them.

    Attributes:
        rows: those that are left.
        cut: which of all rows were cut.
        limit: at which length, and why.
        left_out: how many rows were left out.
        note: a line for people, if rows were cut or left out.
    """

    rows: Dataset
    cut: list[bool]
    limit: Limit
    left_out: int = 0
    note: str | None = None


def encode(
    task: Task,
    dataset: Dataset,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    learn_prompt: bool = False,
    split: str = "",
) -> Encoded:
    """Rows with labels in tokens, cut at `max_length`, or earlier if the model or its tokenizer reads less.

    Rows that then have nothing left to learn, such as a response or a tag, are left out. `split` is the name of the
    rows in messages.

    Raises:
        UserError: as `task.encode`; no row is left; a token or a label that the model cannot read or write.
    """
    found = _teaching(task, dataset, model, tokenizer, max_length, learn_prompt, split)
    return _with_rows(found, dataset, split)


def encode_splits(
    task: Task,
    splits: dict[str, Dataset],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    learn_prompt: bool = False,
    seed: int = 0,
) -> dict[str, Encoded]:
    """`encode` for each split. If the validation rows were taken from the training rows and none of them is left, some
    of the training rows that are left become the validation rows."""
    found = {
        name: _teaching(task, rows, model, tokenizer, max_length, learn_prompt, name) for name, rows in splits.items()
    }
    train, validation = found["train"], found["validation"]
    ours = cols.source(splits["train"]) == cols.source(splits["validation"])
    if ours and not len(validation.rows) and len(train.rows) > 1:
        count = min(len(splits["validation"]), len(train.rows) - 1)
        parts = train.rows.train_test_split(count, seed=seed)
        note = f"{validation.note}; {count:,} of the training rows are taken instead"
        found["train"] = replace(train, rows=parts["train"])
        found["validation"] = replace(validation, rows=parts["test"], note=note)
    return {name: _with_rows(each, splits[name], name) for name, each in found.items()}


def _teaching(
    task: Task,
    dataset: Dataset,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    learn_prompt: bool,
    split: str,
) -> Encoded:
    """The rows that have something to learn."""
    whole = _encode(task, dataset, model, tokenizer, max_length, with_labels=True)
    _check_labels(whole.rows, dataset, model, task)
    kept = np.flatnonzero(_teaches(whole.rows, learn_prompt))
    total, cut, left_out = len(whole.rows), sum(whole.cut), len(whole.rows) - len(kept)
    notes = []
    if cut:
        share = f"{cut:,} of {total:,} rows ({100 * cut / total:.3g} %)"
        notes.append(f"{share} are longer than {whole.limit.source}{task.own_limits} and are cut")
    if left_out:
        notes.append(f"{left_out:,}{'' if cut else f' of {total:,} rows'} have nothing left to learn and are left out")
    if endless := _without_end(whole, model, tokenizer):
        ends = " or ".join(tokenizer.convert_ids_to_tokens(end_tokens(model, tokenizer)))
        notes.append(
            f"{endless:,} answers are learned without the model's end token ({ends}): generated ones will not end; a "
            "chat template can write {{ eos_token }} behind an answer"
        )
    note = f"{_place(dataset, split)}: {'; '.join(notes)}" if notes else None
    return Encoded(whole.rows.select(kept), whole.cut, whole.limit, left_out, note)


def _without_end(whole: Encoded, model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of the answers to learn that are not cut hold no token at which the model stops. Plain texts may go
    on."""
    ends = set(end_tokens(model, tokenizer)) if "completion_mask" in whole.rows.column_names else set()
    if not ends:
        return 0
    rows = zip(*(cols.values(whole.rows, name) for name in ("input_ids", "completion_mask")), whole.cut, strict=True)
    return sum(
        0 in mask and 1 in mask and not cut and not ends.intersection(compress(ids, mask)) for ids, mask, cut in rows
    )


def _with_rows(encoded: Encoded, dataset: Dataset, split: str) -> Encoded:
    if not len(encoded.rows):
        raise UserError(
            f"{_place(dataset, split)}: cut at {encoded.limit.source}, none of {encoded.left_out:,} rows has anything "
            "left to learn: raise max_length or shorten the rows"
        )
    return encoded


def _place(dataset: Dataset, split: str) -> str:
    return f"{cols.source(dataset)}, {split}" if split else cols.source(dataset)


def encode_questions(
    task: Task, dataset: Dataset, model: Any, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Rows to answer in tokens, without labels. None is left out, and prompts are not cut.

    Raises:
        UserError: as `task.encode`; a row without tokens, a prompt that leaves no room for an answer, or a token that
            the model does not have.
    """
    encoded = _encode(task, dataset, model, tokenizer, max_length, with_labels=False)
    for index, ids in enumerate(cols.values(encoded.rows, "input_ids")):
        if not ids:
            raise UserError(f"{cols.where(dataset, index)}: the tokenizer gives no token for this text")
    return encoded


def by_length(rows: Dataset) -> Dataset:
    """The longest rows first, so that batches to score have rows of similar length and less padding."""
    if "completion_mask" in rows.column_names:  # TRL's loss is a mean over batches: other batches would change it
        return rows
    lengths = [len(ids) for ids in cols.values(rows, "input_ids")]
    return rows.select(sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True))


def _encode(
    task: Task, dataset: Dataset, model: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, with_labels: bool
) -> Encoded:
    continues = task.task_type == "CAUSAL_LM" and not with_labels  # a prompt is not cut: its answer follows it
    limit = input_limit(model, tokenizer, None if continues else max_length)
    rows = task.encode(dataset, tokenizer, limit.tokens, with_labels)
    known = known_tokens(model)
    if known is not None and len(tokenizer) > known:
        most = max(max(ids, default=0) for ids in cols.values(rows, "input_ids"))
        if most >= known:
            raise UserError(
                f"{cols.source(dataset)} has the token {tokenizer.convert_ids_to_tokens(most)!r}, number {most}, and "
                f"the base model has {known}: its tokenizer is another model's"
            )
    if task.task_type == "SEQ_CLS" and model.config.is_encoder_decoder:
        _check_ends(rows, dataset, model, tokenizer)
    return Encoded(rows.remove_columns(cols.CUT), cols.values(rows, cols.CUT), limit)


def _check_ends(rows: Dataset, dataset: Dataset, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `UserError` if an encoder-decoder would not find the end token by which it classifies a text."""
    end = model.config.eos_token_id
    counts = [ids.count(end) for ids in cols.values(rows, "input_ids")]
    if 0 in counts or tokenizer.pad_token_id == end:
        raise UserError(
            "an encoder-decoder classifies a text by the end token after it, but this tokenizer adds none, or pads "
            "with it: use another base model, or the task text-to-text"
        )
    if max(counts) > min(counts):
        where = cols.where(dataset, counts.index(max(counts)))
        raise UserError(f"{where}: the text holds the end token {tokenizer.convert_ids_to_tokens(end)!r}: remove it")


def _check_labels(rows: Dataset, dataset: Dataset, model: Any, task: Task) -> None:
    """Raises `UserError` for a label that is longer than the model's decoder."""
    limit = positions(model, decoder=True) if task.task_type == "SEQ_2_SEQ_LM" else None
    lengths = [len(label) for label in cols.values(rows, "labels")] if limit else []
    if limit and max(lengths) > limit.tokens:
        longest = lengths.index(max(lengths))
        raise UserError(
            f"{cols.where(dataset, longest)}: its label has {max(lengths)} tokens, more than {limit.source} in the "
            "decoder: give it a shorter name"
        )


def _teaches(rows: Dataset, learn_prompt: bool) -> list[bool]:
    """Which rows have tokens and, if each token has a label, at least one label that counts."""
    if "labels" not in rows.column_names and "completion_mask" not in rows.column_names:  # prompts alone
        return [bool(ids) for ids in cols.values(rows, "input_ids")]
    marks, ignored = ("completion_mask", 0) if "completion_mask" in rows.column_names else ("labels", IGNORED)
    each = zip(cols.values(rows, "input_ids"), cols.values(rows, marks), strict=True)
    per_token = isinstance(rows[0][marks], list) and not learn_prompt
    return [bool(ids) and (not per_token or any(mark != ignored for mark in found)) for ids, found in each]
