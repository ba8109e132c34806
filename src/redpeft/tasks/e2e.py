"""Data to text with a decoder, as on the E2E NLG challenge: a meaning representation, and a text that says it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from redpeft.errors import UserError
from redpeft.models import ensure_pad_token, load_decoder, pad_prompts
from redpeft.tasks import columns as cols
from redpeft.tasks.base import DataConfig, Task
from redpeft.tasks.columns import tokens_of
from redpeft.tasks.files import READERS, existing, extension, read_file, read_text
from redpeft.tasks.metrics import IGNORED, choose_metric, require_scorers, score_texts

MR_TOKENS, REFERENCE_TOKENS = 64, 100  # as published, each with its end token


@dataclass
class E2ETask(Task):
    """A text for a meaning representation (MR), learned as `MR <eos> text <eos>` with the loss on what follows the MR.

    The best epoch is the one with the least validation loss, as in the authors' script: the official scores would need
    a beam search over the validation MRs each epoch. They are taken of the test split, at the end.

    Attributes:
        columns: "prompt", the MR's column, and "response", the text's.
        metric: "loss", the mean over the tokens of the texts.
    """

    columns: dict[str, str]
    metric: str = "loss"
    name: ClassVar[str] = "e2e"
    task_type: ClassVar[str] = "CAUSAL_LM"
    group: ClassVar[str] = "meaning representation"
    default_columns: ClassVar[Mapping[str, str]] = {"prompt": "mr", "response": "ref"}
    generation: ClassVar[dict[str, Any] | None] = {
        "num_beams": 10,
        "length_penalty": 0.9,
        "no_repeat_ngram_size": 4,
        "do_sample": False,
        "max_new_tokens": REFERENCE_TOKENS,  # training has no longer texts
    }
    own_limits: ClassVar[str] = f", an MR of {MR_TOKENS} or a text of {REFERENCE_TOKENS} tokens"

    @classmethod
    def from_splits(cls, splits: dict[str, Dataset], data: DataConfig, *, metric: str | None = None) -> E2ETask:
        """Guesses the columns that `data` does not name and checks every row.

        Raises:
            UserError: a column that is missing, an empty MR or text; with a test split, a missing package for scores.
        """
        task = cls(cls.find_columns(splits["train"], data), choose_metric(metric, "texts"))
        for split in splits.values():
            task.check(split)
        if "test" in splits:
            require_scorers()
        return task

    @classmethod
    def find_columns(cls, dataset: Dataset, data: DataConfig | None = None) -> dict[str, str]:
        """The columns that `data` names, or those of the public files. Raises `UserError` if they do not exist."""
        prompt, response = (data.prompt, data.response) if data else (None, None)
        return {
            "prompt": cols.choose_column(dataset, prompt, cols.MEANING_COLUMNS, "prompt"),
            "response": cols.choose_column(dataset, response, cols.REFERENCE_COLUMNS, "response"),
        }

    def check(self, dataset: Dataset, with_labels: bool = True) -> None:
        """Raises UserError for a missing column, or an empty MR or text."""
        for key in ("prompt", "response") if with_labels else ("prompt",):
            cols.check_texts(dataset, self.columns[key])

    def groups(self, dataset: Dataset) -> list[str]:
        """Each row's MR."""
        return cols.values(dataset, self.columns["prompt"])

    def describe(self, dataset: Dataset) -> list[str]:
        """For people: how many MRs there are."""
        return [f"meaning representations: {len(set(self.groups(dataset)))} in {len(dataset)} rows"]

    def rows_to_dataset(self, rows: list[dict | str], first: int = 1) -> Dataset:
        """Rows to answer: objects with the MR, or strings, which are MRs. `first` numbers them."""
        return cols.rows_to_dataset(rows, [self.columns["prompt"]], self.columns["prompt"], first)

    def encode(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        with_labels: bool = True,
    ) -> Dataset:
        """The columns "input_ids", `MR <eos> text <eos>`, and "labels", the same with MR and <eos> ignored.

        Without labels "input_ids" alone, `MR <eos>`.

        The MR is cut so that with its end it has at most 64 tokens. (The authors' script cuts off the end itself, and
        then nothing says where the text begins.) The text is cut at 100 tokens, and has no end then. Both together are
        cut at `max_length`, and `CUT` says where any of this happened.

        Raises:
            UserError: a tokenizer without end token, or a `max_length` that leaves no room for a text.
        """
        self.check(dataset, with_labels)
        if max_length is not None and max_length <= MR_TOKENS:
            raise UserError(
                f"{max_length} tokens leave no room for a text after an MR of up to {MR_TOKENS}: raise max_length, "
                "or take a base model that reads longer rows"
            )
        if tokenizer.eos_token_id is None:
            raise UserError("the task e2e needs a tokenizer with an end token (eos_token)")
        end = [tokenizer.eos_token_id]

        def tokenise(rows: dict[str, list]) -> dict[str, list]:
            found = tokens_of(tokenizer, rows[self.columns["prompt"]], limit=None)["input_ids"]
            mrs = [ids[:-1] if ids[-1:] == end else ids for ids in found]
            prompts = [ids[: MR_TOKENS - 1] + end for ids in mrs]
            if not with_labels:
                return {"input_ids": prompts, cols.CUT: [len(ids) >= MR_TOKENS for ids in mrs]}
            texts = tokens_of(tokenizer, rows[self.columns["response"]], limit=None, add_special_tokens=False)
            learned, cut = [], []
            for mr, prompt, ids in zip(mrs, prompts, texts["input_ids"], strict=True):
                room = REFERENCE_TOKENS if max_length is None else min(REFERENCE_TOKENS, max_length - len(prompt))
                learned.append((ids + end)[:room])
                cut.append(len(mr) >= MR_TOKENS or len(ids) >= room)
            return {
                "input_ids": [prompt + text for prompt, text in zip(prompts, learned, strict=True)],
                "labels": [[IGNORED] * len(prompt) + text for prompt, text in zip(prompts, learned, strict=True)],
                cols.CUT: cut,
            }

        return cols.tokenise(dataset, tokenise)

    def load_model(self, base: str | Path, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> PreTrainedModel:
        """The base model as a language model that stops at the tokenizer's end token, as it learns to."""
        model = load_decoder(base, tokenizer, **kwargs)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, list[int]]]], BatchEncoding]:
        """Pads rows with labels on the right, and rows to continue on the left, whatever side the tokenizer pads."""
        ensure_pad_token(tokenizer)
        return partial(_pad, tokenizer)

    def questions(self, dataset: Dataset) -> Dataset:
        """The first row of each distinct MR. UserError where a package for scores is missing."""
        require_scorers()
        return dataset.select(self.unanswered(dataset, set()))

    def unanswered(self, dataset: Dataset, answered: set[str]) -> list[int]:
        """The first row of each MR that is not in `answered`. The MRs are added to `answered`."""
        rows = []
        for index, mr in enumerate(cols.values(dataset, self.columns["prompt"])):
            if mr not in answered:
                answered.add(mr)
                rows.append(index)
        return rows

    def references(self, dataset: Dataset) -> list[list[str]]:
        """The texts of each distinct MR, in the order of their first rows."""
        groups: dict[str, list[str]] = {}
        for mr, text in zip(*(cols.values(dataset, self.columns[key]) for key in ("prompt", "response")), strict=True):
            groups.setdefault(mr, []).append(text)
        return list(groups.values())

    def score_answers(self, texts: Collection[str], dataset: Dataset) -> dict[str, float | None]:
        """The official scores (`metrics.score_texts`) of one generated text for each row of `questions(dataset)`."""
        return score_texts([row["text"] for row in self.decode(list(texts))], self.references(dataset))

    def decode(
        self, predictions: list[str], dataset: Dataset | None = None, encoded: Dataset | None = None
    ) -> list[dict[str, str]]:
        """Generated texts as {"text"}: up to the first empty line, on one line, as published."""
        return [{"text": " ".join(text.strip().split("\n\n")[0].split())} for text in predictions]


def _pad(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, list[int]]]) -> BatchEncoding:
    if "labels" not in rows[0]:
        return pad_prompts(tokenizer, [row["input_ids"] for row in rows], "left")
    batch = pad_without_fast_tokenizer_warning(
        tokenizer, [{"input_ids": row["input_ids"]} for row in rows], padding_side="right", return_tensors="pt"
    )
    width = batch["input_ids"].shape[1]
    batch["labels"] = torch.tensor([row["labels"] + [IGNORED] * (width - len(row["labels"])) for row in rows])
    return batch


# --- files of predictions and references, for `redpeft score e2e` ---------------------------------------------------


def score_files(references: str | Path, predictions: str | Path) -> dict[str, float | None]:
    """The scores (`metrics.score_texts`) of a file of predictions: one for each group of references, in their order.

    Raises:
        UserError: a file that is missing, empty or not UTF-8, an empty line, or files of different lengths.
    """
    require_scorers()
    texts, groups = read_predictions(predictions), read_references(references)
    if len(texts) != len(groups):
        raise UserError(
            f"{predictions} holds {len(texts)} predictions and {references} the references of {len(groups)} meaning "
            "representations: one prediction for each is needed, in their order"
        )
    return score_texts(texts, groups)


def read_predictions(path: str | Path) -> list[str]:
    """One text a line, or the texts of the rows that `redpeft predict` writes (.jsonl), which may be empty."""
    if extension(existing(path)) not in READERS:
        return _lines(path)
    rows = read_file(path)
    cols.require_columns(rows, ["text"])
    texts = cols.values(rows, "text")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{cols.where(rows, index)}: column 'text' holds {text!r}, which is not text")
    return texts


def read_references(path: str | Path) -> list[list[str]]:
    """Groups of lines with an empty line after each, or a table of meaning representations and references. In a table,
    the references of one meaning representation are a group, in the order of its first row."""
    if extension(existing(path)) in READERS:
        rows = read_file(path)
        task = E2ETask(E2ETask.find_columns(rows))
        task.check(rows)
        return task.references(rows)
    text = "\n".join(_lines(path, separators=True))
    return [group.split("\n") for group in text.split("\n\n")]


def _lines(path: str | Path, separators: bool = False) -> list[str]:
    """A file's lines without white space around them. An empty line is an error; with `separators`, two in a row
    are."""
    text = read_text(existing(path))
    if not text.strip():
        raise UserError(f"{path} is empty: it holds no rows")
    lines = [line.strip() for line in (text.rstrip() if separators else text.removesuffix("\n")).split("\n")]
    for number, (before, line) in enumerate(zip(["", *lines], lines, strict=False), start=1):
        if not line and not (separators and before):
            raise UserError(f"{path}, line {number}: the line is empty")
    return lines
