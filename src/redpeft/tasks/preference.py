"""Preferences: a better and a worse answer to a prompt, or answers that are good or not. TRL's DPOTrainer and
KTOTrainer do the training."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from redpeft.errors import UserError
from redpeft.tasks import columns as cols
from redpeft.tasks.base import DataConfig
from redpeft.tasks.chats import ROLES, Chat, read_answer
from redpeft.tasks.columns import tokens_of
from redpeft.tasks.files import with_rows
from redpeft.tasks.instruction import InstructionTask, Pair, Tools, common_start

PROMPT_COLUMNS = ["prompt", "question", "instruction"]
VERDICTS = {"true": True, "false": False, "yes": True, "no": False}
VERDICTS |= {"1": True, "0": False, "1.0": True, "0.0": False}


@dataclass
class PreferenceTask(InstructionTask):
    """Which answers a model is to prefer. Prompts become text as in the task instruction, and are answered as there.

    Attributes:
        columns: "chosen" and "rejected", each a text, a message, messages or a whole chat, and "prompt" unless they
            are whole chats; or "response", likewise, and "label", whether it is good. Perhaps "system" and "tools".
        metric: "loss", TRL's.
        loss: one of `losses`. With "kto" a pair becomes two rows.
    """

    loss: str = "dpo"
    name: ClassVar[str] = "preference"
    recipe_fields: ClassVar[Collection[str]] = ("loss", "beta", "trainer_options")
    recipe_defaults: ClassVar[Mapping[str, Any]] = {"loss": "dpo", "beta": 0.1}
    losses: ClassVar[Sequence[str]] = ("dpo", "ipo", "kto")
    rate_divisor: ClassVar[float] = 10
    default_columns: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def find_columns(cls, train: Dataset, data: DataConfig) -> dict[str, str]:
        """The columns that `data` names, and a guess for the others. UserError: a column that is not there."""
        chats = cols.find_column(train, cols.MESSAGE_COLUMNS)
        if data.response or data.label or not (data.chosen or cols.find_column(train, ["chosen"])):
            label = data.label if isinstance(data.label, str) else None
            answers = data.response or cols.find_column(train, ["completion", "response"]) or chats
            found = {"response": cols.choose_column(train, answers, [], "response")}
            if data.prompt or answers != chats:
                found["prompt"] = cols.choose_column(train, data.prompt, PROMPT_COLUMNS, "prompt")
            found["label"] = cols.choose_column(train, label, ["label"], "label")
        else:
            found = {
                "chosen": cols.choose_column(train, data.chosen, ["chosen"], "chosen"),
                "rejected": cols.choose_column(train, data.rejected, ["rejected"], "rejected"),
            }
            if prompt := data.prompt or cols.find_column(train, PROMPT_COLUMNS):
                found["prompt"] = prompt
            elif chats and not _asks(cols.values(train, found["chosen"])[0]):
                found["prompt"] = chats
            elif not cols.holds_chats(train, found["chosen"]):
                raise UserError(f"{cols.source(train)} has answers without a prompt: name its column with data.prompt")
        return cls._with_optional(found, train, data)

    @classmethod
    def in_common(cls, dataset: Dataset, columns: dict[str, Any]) -> Dataset:
        """Prompts, answers and tools as JSON text, whatever form the rows had, and labels as they mean."""
        task = cls(columns)
        named = ("response",) if "label" in columns else ("chosen", "rejected")
        found: dict[str, list] = {name: [] for name in ("prompt", *named, "tools", *{"label"}.intersection(columns))}
        for index, row in enumerate(dataset):
            try:
                task._check_chat(row, with_labels=True)
            except UserError as error:
                raise type(error)(f"{cols.where(dataset, index)}: {error}") from None
            pairs = task._pairs(row, with_labels=True)
            cells = {"prompt": pairs[0].prompt, **{name: pair.answer for name, pair in zip(named, pairs, strict=True)}}
            for name, messages in cells.items():
                found[name].append(json.dumps(messages, ensure_ascii=False))
            found["tools"].append(pairs[0].tools and json.dumps(pairs[0].tools, ensure_ascii=False))
            if "label" in columns:
                found["label"].append(_verdict(row[columns["label"]]))
        table = pa.table(
            {name: pa.array(cells, pa.string()) if name == "tools" else cells for name, cells in found.items()}
        )
        return with_rows(
            Dataset(table),
            cols.source(dataset),
            cols.values(dataset, cols.ROW) if cols.ROW in dataset.column_names else None,
        )

    def describe(self, dataset: Dataset) -> list[str]:
        """For people: how many answers are good and how many are not, if they have labels; pairs that teach
        nothing."""
        if "label" not in self.columns:
            pairs = (self._pairs(row, with_labels=True) for row in dataset)
            equal = sum(chosen.answer == rejected.answer for chosen, rejected in pairs)
            return [f"pairs of equal answers, which teach nothing: {equal:,}"] if equal else []
        good = sum(map(_verdict, cols.values(dataset, self.columns["label"])))
        return [f"answers: {good:,} desirable, {len(dataset) - good:,} undesirable"]

    def check(self, dataset: Dataset, with_labels: bool = True) -> None:
        """Raises `UserError` for a missing column, an empty text, a chat without an answer, a wrong label, or labels
        with a loss that needs pairs."""
        if not with_labels:
            self._asking.check(dataset, with_labels=False)
            return
        super().check(dataset)
        if self.loss != "kto" and "label" in self.columns:
            raise UserError(
                f"loss {self.loss} needs pairs in columns chosen and rejected; loss=kto takes answers with labels"
            )

    def rows_to_dataset(self, rows: list[dict | str], first: int = 1) -> Dataset:
        """As the task instruction does."""
        return self._asking.rows_to_dataset(rows, first)

    def encode(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        with_labels: bool = True,
    ) -> Dataset:
        """Tokens as TRL's trainers take them: "prompt_ids", and "chosen_ids" and "rejected_ids", or "completion_ids"
        and "label". A prompt with an answer is cut at `max_length`. "input_ids" and "completion_mask" hold the prompt
        with its longest answer. Without labels as in the task instruction.

        Raises:
            UserError: a wrong row, or one that the chat template or the tokenizer refuses.
        """
        if not with_labels:
            return self._asking.encode(dataset, tokenizer, max_length, with_labels=False)
        self.check(dataset)

        def tokenise(columns: dict[str, list]) -> dict[str, list]:
            found = []
            for values in zip(*columns.values(), strict=True):
                row = dict(zip(columns, values, strict=True))
                pairs = self._pairs(row, with_labels=True)
                [prompt] = self.tokens_to_continue(
                    [self.format_prompt(pairs[0].prompt, tokenizer, pairs[0].tools)], tokenizer
                )
                texts, plain = [self._text(pair, tokenizer) for pair in pairs], self._is_plain(tokenizer)
                whole = tokens_of(tokenizer, texts, limit=None, add_special_tokens=plain)["input_ids"]
                start = min(common_start(prompt, ids) for ids in whole)
                prompt, answers = prompt[:start], [ids[start:] for ids in whole]
                if self.loss == "kto":
                    label = self.columns.get("label")
                    verdicts = [True, False] if label is None else [_verdict(row[label])]
                    for answer, verdict in zip(answers, verdicts, strict=True):
                        found.append(_in_tokens(prompt, max_length, completion_ids=answer) | {"label": verdict})
                else:
                    found.append(_in_tokens(prompt, max_length, chosen_ids=answers[0], rejected_ids=answers[1]))
            return {name: [each[name] for each in found] for name in found[0]}

        return cols.tokenise(dataset, tokenise)

    @property
    def _asking(self) -> InstructionTask:
        """The task of answering the prompts."""
        kept = {key: name for key, name in self.columns.items() if key in ("input", "system", "tools")}
        names = {"prompt": self.columns.get("prompt", "prompt"), "response": "response"}
        return InstructionTask(names | kept, template=self.template)

    def _needed(self, with_labels: bool) -> list[str]:
        return [key for key in self.columns if key in ("prompt", "chosen", "rejected", "response")]

    def _check_chat(self, row: dict[str, Any], with_labels: bool) -> None:
        super()._check_chat(row, with_labels)
        for pair in self._pairs(row, with_labels):
            roles = [message["role"] for message in pair.answer]
            if not roles:
                raise UserError("an answer is a list without messages")
            if roles[0] != "assistant":
                raise UserError("the chats differ before the assistant's answer, so they have no prompt in common")
            for before, role in pairwise(roles):
                if role in ("system", "user") or before == role == "assistant":
                    raise UserError(
                        f"an answer goes on with a message of the {role}: two chats may differ in the last answer only"
                    )
        if "label" in self.columns:
            _verdict(row[self.columns["label"]])

    def _read(self, row: dict[str, Any], with_labels: bool) -> tuple[Chat, Tools]:
        pair = self._pairs(row, with_labels)[0]
        return [*pair.prompt, *pair.answer], pair.tools

    def _pairs(self, row: dict[str, Any], with_labels: bool) -> list[Pair]:
        """The prompt with each of its answers. The prompt of whole chats is what they have in common."""
        keys = [key for key in ("chosen", "rejected", "response") if key in self.columns]
        answers = [read_answer(row[self.columns[key]]) for key in keys]
        asking = self._asking
        prompt = row.get(asking.columns["prompt"])
        if all(any(message["role"] == "user" for message in answer) for answer in answers):
            before_last = min(len(answer) - 1 for answer in answers)
            shared = min(before_last, common_start(answers[0], answers[-1]))
            prompt, answers = answers[0][:shared], [answer[shared:] for answer in answers]
        elif prompt is None:
            raise UserError("there is no prompt: give it in a column, or write both answers as whole chats")
        chat, tools = asking._read(row | {asking.columns["prompt"]: prompt}, with_labels=False)
        chat = [{name: value for name, value in message.items() if name != "weight"} for message in chat]
        return [Pair(chat, answer, tools) for answer in answers]


def _asks(answer: Any) -> bool:
    """Whether an answer is a whole chat, with a message of the user."""
    found = cols.as_messages(answer)
    roles = [message.get("role") or message.get("from") for message in found] if isinstance(found, list) else []
    return "user" in map(ROLES.get, roles)


def _in_tokens(prompt: list[int], max_length: int | None, **answers: list[int]) -> dict[str, Any]:
    """A prompt with its answers as TRL takes them, cut at `max_length`; and as `encoding` counts them."""
    room = None if max_length is None else max(0, max_length - len(prompt))
    cut, prompt = {name: ids[:room] for name, ids in answers.items()}, prompt[:max_length]
    longest = max(cut.values(), key=len)
    return {
        "prompt_ids": prompt,
        **cut,
        "input_ids": prompt + longest,
        "completion_mask": [0] * len(prompt) + [1] * len(longest),
        cols.CUT: any(len(cut[name]) < len(ids) for name, ids in answers.items()),
    }


def _verdict(label: Any) -> bool:
    """Whether an answer is good."""
    if cols.is_missing(label):
        raise cols.Missing("the label is empty")
    found = VERDICTS.get(str(label).strip().lower())
    if found is None:
        raise UserError(f"the label {label!r} is neither true nor false: write true or false, or 1 or 0")
    return found
