"""Instructions: a prompt or a chat, and the response to learn. TRL's SFTTrainer does the training."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redpeft.errors import UserError, first_line
from redpeft.models import ensure_pad_token, load_decoder
from redpeft.tasks import columns as cols
from redpeft.tasks.base import DataConfig, Task
from redpeft.tasks.columns import tokens_of
from redpeft.tasks.metrics import choose_metric

logger = logging.getLogger(__name__)

PLAIN_TURNS = {"system": "{}\n\n", "user": "Human: {}\n\n", "assistant": "Assistant: {}\n\n"}
"""The plain template, which is the paper's of its instruction tuning: `Human: {prompt}`, an empty line,
`Assistant: {response}`.

The space after `Assistant:` belongs to the response, where tokenizers join it to the first word.
"""


Chat = list[dict[str, str]]


@dataclass
class InstructionTask(Task):
    """What a model is to answer. The loss counts the response alone; a chat's every answer is one row.

    Attributes:
        columns: "prompt", "response" and perhaps "input" (more of the prompt), or "messages".
        metric: "loss", the mean over the responses' tokens (over all tokens where the recipe learns the prompts too).
        template: "auto", the tokenizer's chat template or the plain one where it has none; or "plain".
    """

    columns: dict[str, str]
    metric: str = "loss"
    template: Literal["auto", "plain"] = "auto"
    name: ClassVar[str] = "instruction"
    task_type: ClassVar[str] = "CAUSAL_LM"
    group: ClassVar[str] = "prompt"
    recipe_fields: ClassVar[Collection[str]] = ("packing", "learn_prompt")
    by_trl: ClassVar[bool] = True
    default_columns: ClassVar[Mapping[str, str]] = {"prompt": "prompt", "response": "response"}
    generation: ClassVar[dict[str, Any] | None] = {"max_new_tokens": 256, "do_sample": False}
    # no compute_metrics: Trainer has an eval_loss of its own, and gathering logits over a vocabulary costs memory

    @classmethod
    def from_splits(
        cls, splits: dict[str, Dataset], data: DataConfig, *, metric: str | None = None
    ) -> InstructionTask:
        """Guesses the columns that `data` does not name and checks every row.

        Raises:
            UserError: a column that is missing, an empty prompt or response, a chat without an answer.
        """
        task = cls(cls.find_columns(splits["train"], data), choose_metric(metric, "texts"), data.template)
        for split in splits.values():
            task.check(split)
        return task

    @classmethod
    def find_columns(cls, train: Dataset, data: DataConfig) -> dict[str, str]:
        """The columns that `data` names, and a guess for the others. UserError: a column that is not there."""
        if data.messages or not (data.prompt or data.response):
            messages = data.messages or cols.find_column(train, cols.MESSAGE_COLUMNS)
            if messages:
                cols.require_columns(train, [messages])
                return {"messages": messages}
        pairs = [pair for pair in cols.PROMPT_PAIRS if all(cols.find_column(train, [name]) for name in pair)]
        found = {
            "prompt": cols.choose_column(train, data.prompt, [pair[0] for pair in pairs], "prompt"),
            "response": cols.choose_column(train, data.response, [pair[1] for pair in pairs], "response"),
        }
        more = cols.find_column(train, ["input"]) if found["prompt"].lower() == "instruction" else None
        return {**found, "input": more} if more else found

    def check(self, dataset: Dataset, with_labels: bool = True) -> None:
        """Raises `UserError` for a missing column, an empty prompt or response, or a value that is not a chat."""
        if "messages" in self.columns:
            cols.require_columns(dataset, [self.columns["messages"]])
            for index, messages in enumerate(cols.values(dataset, self.columns["messages"])):
                if problem := _problem(messages, with_answer=with_labels):
                    raise UserError(f"{cols.where(dataset, index)}: {problem}")
            return
        for key in ("prompt", "response") if with_labels else ("prompt",):
            cols.check_texts(dataset, self.columns[key])

    def groups(self, dataset: Dataset) -> list[str]:
        """Each row's prompt; for a chat, what comes before its first answer."""
        chats = (self._pairs(row, with_labels=True)[0][0] for row in dataset)
        return [json.dumps(chat) for chat in chats]

    def rows_to_dataset(self, rows: list[dict | str], first: int = 1) -> Dataset:
        """Rows to answer: objects with the prompt or a chat, or strings, which are prompts. `first` numbers them."""
        if "messages" in self.columns:
            column = self.columns["messages"]
            chats = [{column: [{"role": "user", "content": row}]} if isinstance(row, str) else row for row in rows]
            return cols.rows_to_dataset(chats, [column], None, first)
        optional = [self.columns["input"]] if "input" in self.columns else []
        return cols.rows_to_dataset(rows, [self.columns["prompt"]], self.columns["prompt"], first, optional)

    def encode(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        with_labels: bool = True,
    ) -> Dataset:
        """Tokens as TRL's trainer takes them: "input_ids", a prompt with its response, cut at `max_length`, and
        "completion_mask", 1 on the response. Without labels "input_ids" alone, the prompts.

        Chats are written by the tokenizer's chat template if that is used, else by `PLAIN_TURNS`, with the tokenizer's
        end token behind the response. A chat with several answers becomes one row an answer, so that the loss on the
        responses needs no markers in the chat template.

        Raises:
            UserError: a wrong row, one that the chat template or the tokenizer refuses, or a prompt to answer that
                leaves no room for an answer.
        """
        self.check(dataset, with_labels)
        changed = 0

        def tokenise(columns: dict[str, list]) -> dict[str, list]:
            nonlocal changed
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            pairs = [pair for row in rows for pair in self._pairs(row, with_labels)]
            prompts = self.prompt_tokens([prompt for prompt, _ in pairs], tokenizer)
            if not with_labels:
                longest = max(map(len, prompts))
                if max_length is not None and longest >= max_length:
                    reads = f"the model reads {max_length}"
                    raise UserError(f"a prompt of {longest} tokens leaves no room for an answer: {reads}")
                return {"input_ids": prompts, cols.CUT: [False] * len(prompts)}
            texts = [self._text(prompt, answer, tokenizer) for prompt, answer in pairs]
            whole = tokens_of(tokenizer, texts, limit=None, add_special_tokens=self._is_plain(tokenizer))["input_ids"]
            starts = [_common(prompt, ids) for prompt, ids in zip(prompts, whole, strict=True)]
            changed += sum(start < len(prompt) for start, prompt in zip(starts, prompts, strict=True))
            return {
                "input_ids": [ids[:max_length] for ids in whole],
                "completion_mask": [
                    ([0] * start + [1] * (len(ids) - start))[:max_length]
                    for start, ids in zip(starts, whole, strict=True)
                ],
                cols.CUT: [max_length is not None and len(ids) > max_length for ids in whole],
            }

        encoded = cols.tokenise(dataset, tokenise)
        if changed:
            logger.warning(
                "%s: %d of %d prompts are tokenised differently when a response follows: the model will answer "
                "after a text that it has not seen in training",
                cols.source(dataset),
                changed,
                len(encoded),
            )
        return encoded

    def prompt_tokens(self, prompts: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The tokens to continue. Raises `UserError`, without a row, if the chat template refuses a chat."""
        plain, end = self._is_plain(tokenizer), [tokenizer.eos_token_id]
        texts = [self.format_prompt(prompt, tokenizer) for prompt in prompts]
        found = tokens_of(tokenizer, texts, limit=None, add_special_tokens=plain)["input_ids"]
        # a template decides itself; a tokenizer that adds an end token to every text would end the prompt
        return [ids[:-1] if plain and ids[-1:] == end else ids for ids in found]

    def format_prompt(self, prompt: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
        """A chat as the text to continue. Raises `UserError`, without a row, if the chat template refuses it."""
        return _plain_prompt(prompt) if self._is_plain(tokenizer) else _render(prompt, tokenizer, True)

    def load_model(self, base: str | Path, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> PreTrainedModel:
        """The base model as a language model. Without a pad token it gets the tokenizer's."""
        if tokenizer.eos_token_id is None:
            logger.warning(
                "the tokenizer has no end token, so answers are learned without an end and run to the maximum length"
            )
        return load_decoder(base, tokenizer, **kwargs)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """None: TRL brings its own."""
        ensure_pad_token(tokenizer)

    def decode(
        self, predictions: list[str], dataset: Dataset | None = None, encoded: Dataset | None = None
    ) -> list[dict[str, str]]:
        """Generated texts as {"text"}."""
        return [{"text": text.strip()} for text in predictions]

    def _is_plain(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        return self.template == "plain" or not tokenizer.chat_template

    def _text(self, prompt: Chat, answer: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
        """A prompt with its answer."""
        if not self._is_plain(tokenizer):
            return _render(prompt + answer, tokenizer, False)
        text, end = f"{_plain_prompt(prompt)} {answer[0]['content']}", tokenizer.eos_token or ""
        return text if text.endswith(end) else text + end

    def _pairs(self, row: dict[str, Any], with_labels: bool) -> list[tuple[Chat, Chat]]:
        """What comes before each answer, and the answer. Without labels: what comes before the next answer, and
        nothing."""
        if "messages" in self.columns:
            chat = [{"role": turn["role"], "content": turn["content"]} for turn in row[self.columns["messages"]]]
        else:
            parts = [row.get(self.columns[key]) for key in ("prompt", "input") if key in self.columns]
            chat = [{"role": "user", "content": "\n\n".join(str(part) for part in parts if not cols.is_missing(part))}]
            if with_labels:
                chat.append({"role": "assistant", "content": row[self.columns["response"]]})
        if with_labels:
            return [(chat[:index], [chat[index]]) for index in _answers(chat)]
        return [(chat[:-1] if chat[-1]["role"] == "assistant" else chat, [])]


def _answers(chat: Chat) -> list[int]:
    """The places of the assistant's answers to something that the user said."""
    roles = [turn["role"] for turn in chat]
    return [index for index, role in enumerate(roles) if role == "assistant" and "user" in roles[:index]]


def _plain_prompt(chat: Chat) -> str:
    return "".join(PLAIN_TURNS[turn["role"]].format(turn["content"]) for turn in chat) + "Assistant:"


def _render(chat: Chat, tokenizer: PreTrainedTokenizerBase, to_answer: bool) -> str:
    """A chat as text by the tokenizer's chat template. With `to_answer` it ends with what begins an answer."""
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=to_answer)
    except Exception as error:  # errors of Jinja, or of the template's own code
        raise UserError(
            f"the tokenizer's chat template rejects this chat ({first_line(error)}); change the chat or the template, "
            "or set data.template to plain"
        ) from error
    if not text:
        raise UserError("the tokenizer's chat template writes nothing for this chat; data.template: plain needs none")
    return str(text)


def _common(prompt: list[int], whole: list[int]) -> int:
    """How many tokens are equal at the start of both."""
    pairs = enumerate(zip(prompt, whole, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(prompt), len(whole)))


def _problem(messages: Any, with_answer: bool) -> str | None:
    """What is wrong with `messages`: it is not a chat, or has no answer to learn, or nothing to answer. None if it is
    fine."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        return f"expected a list of {{'role': ..., 'content': ...}}, found {str(messages)[:60]}"
    for turn in messages:
        if turn.get("role") not in PLAIN_TURNS:
            return f"a message has the role {turn.get('role')!r}; roles are {', '.join(PLAIN_TURNS)}"
        if not isinstance(turn.get("content"), str) or cols.is_missing(turn["content"]):
            return "a message's content is empty or not text"
    if not any(turn["role"] == "user" for turn in messages):
        return "the chat has no message of the user"
    if with_answer and not _answers(messages):
        return "the chat has no answer of the assistant to learn"
    return None
