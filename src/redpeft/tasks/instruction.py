"""Instructions: a prompt or a chat, and the response to learn. TRL's SFTTrainer does the training."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redpeft.errors import UserError, first_line
from redpeft.models import ensure_pad_token, load_decoder
from redpeft.tasks import columns as cols
from redpeft.tasks.base import DataConfig, Task
from redpeft.tasks.chats import Chat, learned_answers, read_answer, read_chat, read_tools, tool_names
from redpeft.tasks.columns import tokens_of
from redpeft.tasks.files import with_rows
from redpeft.tasks.metrics import choose_metric
from redpeft.tasks.rows import MAY_BE_EMPTY

logger = logging.getLogger(__name__)

PLAIN_TURNS = {"system": "{}\n\n", "user": "Human: {}\n\n", "assistant": "Assistant: {}\n\n"}
"""The plain template's turns, which are the paper's of its instruction tuning: `Human: {prompt}`, an empty line,
`Assistant: {response}`.

The space after `Assistant:` belongs to the response, where tokenizers join it to the first word.
"""
PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}"
    "{% elif message.role == 'user' %}{{ 'Human: ' + message.content + '\\n\\n' }}"
    "{% else %}{{ 'Assistant: ' + message.content + (eos_token if loop.last else '\\n\\n') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The plain template as a chat template, for whoever else writes chats for an adapter, such as a server."""
BEGIN = "{{ bos_token }}"
"""How a chat template writes the token that some tokenizers put before each text."""


Tools = list[dict[str, Any]] | None
"""The tools that a chat may call, as JSON schemas."""


class Pair(NamedTuple):
    """What comes before an answer, the answer (one message; none if it is asked for), and the tools."""

    prompt: Chat
    answer: Chat
    tools: Tools


@dataclass
class InstructionTask(Task):
    """What a model is to answer. The loss counts the response alone, or every answer of a chat; of plain texts, all.

    Attributes:
        columns: "prompt" and "response", each a text or a part of a chat, and perhaps "input" (more of the prompt); or
            "messages", a chat; or "text". Beside prompts and chats perhaps "system" and "tools".
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
    max_length: ClassVar[int] = 2048
    by_trl: ClassVar[bool] = True
    default_columns: ClassVar[Mapping[str, str]] = {"prompt": "prompt", "response": "response"}
    generation: ClassVar[dict[str, Any] | None] = {"max_new_tokens": 256, "do_sample": False}
    metrics: ClassVar[str] = "texts"  # of METRICS
    # no compute_metrics: Trainer has an eval_loss of its own, and gathering logits over a vocabulary costs memory

    @classmethod
    def from_splits(
        cls, splits: dict[str, Dataset], data: DataConfig, *, metric: str | None = None, **own: Any
    ) -> InstructionTask:
        """Guesses the columns that `data` does not name and checks every row. `own`: a subclass's attributes.

        Raises:
            UserError: a column that is missing, or a row that `check` refuses.
        """
        template: Any = "plain" if data.chat_template == "plain" else "auto"
        task = cls(cls.find_columns(splits["train"], data), choose_metric(metric, cls.metrics), template, **own)
        for split in splits.values():
            task.check(split)
        return task

    @classmethod
    def find_columns(cls, train: Dataset, data: DataConfig) -> dict[str, str]:
        """The columns that `data` names, and a guess for the others. UserError: a column that is not there."""
        messages = data.messages
        pairs = [pair for pair in cols.PROMPT_PAIRS if all(cols.find_column(train, [name]) for name in pair)]
        if not (messages or data.prompt or data.response):
            messages = None if data.text else cols.find_column(train, cols.MESSAGE_COLUMNS)
            text = None if messages or pairs else cols.find_column(train, ["text"])
            if data.text or text:
                return {"text": cols.choose_column(train, data.text, ["text"], "text")}
        if messages:
            cols.require_columns(train, [messages])
            found = {"messages": messages}
        else:
            found = {
                "prompt": cols.choose_column(train, data.prompt, [pair[0] for pair in pairs], "prompt"),
                "response": cols.choose_column(train, data.response, [pair[1] for pair in pairs], "response"),
            }
        return cls._with_optional(found, train, data)

    @staticmethod
    def _with_optional(found: dict[str, str], train: Dataset, data: DataConfig) -> dict[str, str]:
        """The columns that were found, and those for Alpaca's input, a system message and tools where there are such.
        UserError: a column that is not there."""
        has_input = found.get("prompt", "").lower() == "instruction"
        optional = {
            "input": cols.find_column(train, ["input"], without=found.values()) if has_input else None,
            "system": data.system or cols.find_column(train, cols.SYSTEM_COLUMNS, without=found.values()),
            "tools": data.tools or cols.find_column(train, ["tools"], without=found.values()),
        }
        found = found | {key: name for key, name in optional.items() if name}
        cols.require_columns(train, found.values())
        return found

    @classmethod
    def in_common(cls, dataset: Dataset, columns: dict[str, Any]) -> Dataset:
        """Plain texts, or chats and tools as JSON text, whatever form the rows had."""
        if "text" in columns:
            return cols.keep_columns(dataset, columns)
        task, chats, tools = cls(columns), [], []
        for index, row in enumerate(dataset):
            try:
                task._check_chat(row, with_labels=True)
                chat, known = task._read(row, with_labels=True)
            except UserError as error:
                raise type(error)(f"{cols.where(dataset, index)}: {error}") from None
            chats.append(json.dumps(chat, ensure_ascii=False))
            tools.append(known and json.dumps(known, ensure_ascii=False))
        found = Dataset(pa.table({"messages": chats, "tools": pa.array(tools, pa.string())}))
        return with_rows(
            found, cols.source(dataset), cols.values(dataset, cols.ROW) if cols.ROW in dataset.column_names else None
        )

    def check(self, dataset: Dataset, with_labels: bool = True) -> None:
        """Raises `UserError` for a missing column, an empty text, or a value that is not a chat."""
        for key in self._needed(with_labels):
            cols.require_columns(dataset, [self.columns[key]])
            if key != "messages" and not cols.holds_objects(dataset, self.columns[key]):
                cols.check_texts(dataset, self.columns[key])
        if "text" in self.columns:
            return
        mine = [name for name in self.columns.values() if name in dataset.column_names]
        for index, row in enumerate(dataset.select_columns(mine)):
            try:
                self._check_chat(row, with_labels)
            except UserError as error:
                raise type(error)(f"{cols.where(dataset, index)}: {error}") from None

    def _check_chat(self, row: dict[str, Any], with_labels: bool) -> None:
        """Raises `UserError` if a row is no chat, or has no answer to learn, or nothing to answer."""
        chat, tools = self._read(row, with_labels)
        if not any(turn["role"] == "user" for turn in chat):
            raise UserError("the chat has no message of the user")
        if with_labels and not learned_answers(chat):
            raise UserError("the chat has no answer of the assistant to learn")
        if self.template == "plain":
            _require_plain(chat, tools)

    def _needed(self, with_labels: bool) -> list[str]:
        """The columns that each row must have, by their keys."""
        if "prompt" in self.columns:
            return ["prompt", "response"] if with_labels else ["prompt"]
        return [key for key in ("messages", "text") if key in self.columns]

    def groups(self, dataset: Dataset) -> list[str]:
        """Each row's prompt; for a chat, what comes before its first answer; for a plain text, the text."""
        if "text" in self.columns:
            return cols.values(dataset, self.columns["text"])
        return [json.dumps(self._pairs(row, with_labels=True)[0].prompt) for row in dataset]

    def describe(self, dataset: Dataset) -> list[str]:
        """For people: how many answers of chats are learned, or that texts are learned whole."""
        if "text" in self.columns:
            return ["plain texts: all their tokens are learned"]
        if "messages" not in self.columns:
            return []
        chats = [self._read(row, with_labels=True)[0] for row in dataset]
        answers = [learned_answers(chat) for chat in chats]
        note = f"answers to learn: {sum(map(len, answers)):,} in {len(dataset):,} chats"
        longer = sum(places[-1] + 1 < len(chat) for places, chat in zip(answers, chats, strict=True))
        return [f"{note}; what follows the last of them in {longer:,} chats is left out" if longer else note]

    def rows_to_dataset(self, rows: list[dict | str], first: int = 1) -> Dataset:
        """Rows to answer: objects with the prompt or a chat, or strings, which are prompts. `first` numbers them."""
        [key] = self._needed(with_labels=False)
        column = self.columns[key]
        if key == "messages":
            rows = [{column: [{"role": "user", "content": row}]} if isinstance(row, str) else row for row in rows]
        optional = [self.columns[name] for name in MAY_BE_EMPTY if name in self.columns]
        return cols.rows_to_dataset(rows, [column], None if key == "messages" else column, first, optional)

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
        end token behind the response. A chat is written once for each answer, so that the template needs no markers of
        answers. All that was written is one row if each time the earlier tokens are the same; a template that writes
        earlier answers in another way, such as the plain one, gives a row for each. A plain text is not cut: what is
        longer than `max_length` becomes several rows.

        Raises:
            UserError: a wrong row, one that the chat template or the tokenizer refuses, or a prompt to answer that
                leaves no room for an answer.
        """
        self.check(dataset, with_labels)
        changed = total = 0
        unwritten: Counter[str] = Counter()

        def tokenise(columns: dict[str, list]) -> dict[str, list]:
            nonlocal changed, total
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            if "text" in self.columns:
                texts = [row[self.columns["text"]] for row in rows]
                prompts = _without_end(tokens_of(tokenizer, texts, limit=None)["input_ids"], tokenizer)
                if with_labels:
                    return _pieces(prompts, tokenizer, max_length)
            else:
                chats = [self._pairs(row, with_labels) for row in rows]
                pairs = list(chain.from_iterable(chats))
                asked = [self.format_prompt(pair.prompt, tokenizer, pair.tools) for pair in pairs]
                prompts = self.tokens_to_continue(asked, tokenizer)
            if not with_labels:
                longest = max(map(len, prompts))
                if max_length is not None and longest >= max_length:
                    reads = f"the model reads {max_length}"
                    raise UserError(f"a prompt of {longest} tokens leaves no room for an answer: {reads}")
                return {"input_ids": prompts, cols.CUT: [False] * len(prompts)}
            texts = [self._text(pair, tokenizer) for pair in pairs]
            whole = tokens_of(tokenizer, texts, limit=None, add_special_tokens=self._is_plain(tokenizer))["input_ids"]
            starts = [common_start(prompt, ids) for prompt, ids in zip(prompts, whole, strict=True)]
            changed += sum(start < len(prompt) for start, prompt in zip(starts, prompts, strict=True))
            total += len(prompts)
            unwritten.update(name for pair, text in zip(pairs, texts, strict=True) for name in _unwritten(pair, text))
            found = zip(whole, starts, strict=True)
            learned = [row for chat in chats for row in _joined(islice(found, len(chat)))]
            return {
                "input_ids": [ids[:max_length] for ids, _ in learned],
                "completion_mask": [mask[:max_length] for _, mask in learned],
                cols.CUT: [max_length is not None and len(ids) > max_length for ids, _ in learned],
            }

        encoded = cols.tokenise(dataset, tokenise)
        if changed:
            logger.warning(
                "%s: %d of %d prompts are tokenised differently when a response follows: the model will answer "
                "after a text that it has not seen in training",
                cols.source(dataset),
                changed,
                total,
            )
        for name, count in unwritten.items():
            logger.warning(
                "%s: the chat template leaves out the field %s of messages, in %d of %d prompts with answers",
                cols.source(dataset),
                name,
                count,
                total,
            )
        if "text" in self.columns and len(encoded) > len(dataset):
            logger.info(
                "%s: %d texts become %d rows of up to %s tokens",
                cols.source(dataset),
                len(dataset),
                len(encoded),
                max_length,
            )
        return encoded

    def prompt_tokens(self, prompts: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The tokens to continue. Raises `UserError`, without a row, if the chat template refuses a chat."""
        return self.tokens_to_continue([self.format_prompt(prompt, tokenizer) for prompt in prompts], tokenizer)

    def tokens_to_continue(self, prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The tokens of texts that `format_prompt` made."""
        plain = self._is_plain(tokenizer)  # a template decides itself about special tokens
        found = tokens_of(tokenizer, prompts, limit=None, add_special_tokens=plain)["input_ids"]
        return _without_end(found, tokenizer) if plain else found

    def format_prompt(self, prompt: Chat, tokenizer: PreTrainedTokenizerBase, tools: Tools = None) -> str:
        """A chat as the text to continue. Raises `UserError`, without a row, if the chat template refuses it."""
        if self._is_plain(tokenizer):
            return _plain_prompt(prompt, tools)
        return _render(prompt, tokenizer, True, tools)

    @property
    def shape(self) -> Hashable:
        """Plain texts have no chat template, and so are not in one fleet with chats."""
        return "text" in self.columns

    def chat_template(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """What writes chats as this task does, for tokens without special ones put before them."""
        if "text" in self.columns or not self._is_plain(tokenizer):
            return tokenizer.chat_template
        begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        return (BEGIN if begins else "") + PLAIN_TEMPLATE

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
        template = tokenizer.chat_template or PLAIN_TEMPLATE
        return self.template == "plain" or str(template).removeprefix(BEGIN) == PLAIN_TEMPLATE

    def _text(self, pair: Pair, tokenizer: PreTrainedTokenizerBase) -> str:
        """A prompt with its answer."""
        if not self._is_plain(tokenizer):
            return _render(pair.prompt + pair.answer, tokenizer, False, pair.tools)
        _require_plain(pair.answer, None)
        text, end = f"{_plain_prompt(pair.prompt, pair.tools)} {pair.answer[0]['content']}", tokenizer.eos_token or ""
        return text if text.endswith(end) else text + end

    def _pairs(self, row: dict[str, Any], with_labels: bool) -> list[Pair]:
        """What comes before each answer, and the answer. Without labels: what comes before the next answer, and
        nothing."""
        chat, tools = self._read(row, with_labels)
        answers = learned_answers(chat)
        chat = [{name: value for name, value in message.items() if name != "weight"} for message in chat]
        if with_labels:
            return [Pair(chat[:index], [chat[index]], tools) for index in answers]
        return [Pair(chat[:-1] if chat[-1]["role"] == "assistant" else chat, [], tools)]

    def _read(self, row: dict[str, Any], with_labels: bool) -> tuple[Chat, Tools]:
        """The whole chat of a row, and the tools that it may call. Raises `UserError`, without the row."""
        given = {key: row.get(name) for key, name in self.columns.items()}
        if "messages" in given:
            chat = read_chat(given["messages"])
        else:
            prompt, more = cols.as_messages(given["prompt"]), given.get("input")
            if isinstance(prompt, str):
                parts = [prompt, *([] if cols.is_missing(more) else [str(more)])]
                prompt = [{"role": "user", "content": "\n\n".join(parts)}]
            chat = [message | {"weight": 0} for message in read_chat(prompt)]
            chat += read_answer(given["response"]) if with_labels else []
        if not cols.is_missing(given.get("system")) and chat[:1] and chat[0]["role"] != "system":
            chat = [*read_chat([{"role": "system", "content": given["system"]}]), *chat]
        return chat, read_tools(given.get("tools"))


def _joined(answers: Iterable[tuple[list[int], int]]) -> list[tuple[list[int], list[int]]]:
    """Rows to learn, each with the mask of its answers, from the tokens up to each answer of a chat and where it
    begins."""
    rows: list[tuple[list[int], list[int]]] = []
    for ids, start in answers:
        mask = [0] * start + [1] * (len(ids) - start)
        if rows and ids[: len(rows[-1][0])] == rows[-1][0]:
            before = rows.pop()[1]
            mask = before + mask[len(before) :]
        rows.append((ids, mask))
    return rows


def _pieces(texts: list[list[int]], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> dict[str, list]:
    """Texts in tokens as rows to learn, each text with an end token, in pieces of at most `max_length` tokens. A piece
    begins with the last token of the piece before it, so that each token is learned once."""
    if max_length is not None and max_length < 2:
        raise UserError(f"{max_length} token leaves nothing to learn: raise max_length")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = []
    for text in texts:
        ids = text + end
        step = len(ids) if max_length is None else max_length - 1
        pieces += [ids[start : start + step + 1] for start in range(0, max(1, len(ids) - 1), step)]
    return {
        "input_ids": pieces,
        "completion_mask": [[1] * len(ids) for ids in pieces],
        cols.CUT: [False] * len(pieces),
    }


def _without_end(tokens: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens to continue: a tokenizer that adds an end token to every text would end them."""
    end = [tokenizer.eos_token_id]
    return [ids[:-1] if ids[-1:] == end else ids for ids in tokens]


def _plain_prompt(chat: Chat, tools: Tools) -> str:
    _require_plain(chat, tools)
    return "".join(PLAIN_TURNS[turn["role"]].format(turn["content"]) for turn in chat) + "Assistant:"


def _require_plain(chat: Chat, tools: Tools) -> None:
    """Raises `UserError` for a chat with tools, which the plain template cannot write."""
    if tool_names(chat, tools) or any(message["role"] not in PLAIN_TURNS for message in chat):
        raise UserError(
            "the plain template writes no tools: name one that does with data.chat_template, or take a base model "
            "that has one"
        )


def _render(chat: Chat, tokenizer: PreTrainedTokenizerBase, to_answer: bool, tools: Tools) -> str:
    """A chat as text by the tokenizer's chat template. With `to_answer` it ends with what begins an answer."""
    try:
        text = tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=to_answer)
    except Exception as error:  # errors of Jinja, or of the template's own code
        raise UserError(
            f"the tokenizer's chat template rejects this chat ({first_line(error)}); change the chat or the template "
            "(data.chat_template)"
        ) from error
    if not text:
        raise UserError(
            "the tokenizer's chat template writes nothing for this chat; data.chat_template=plain needs none"
        )
    if unseen := [name for name in tool_names(chat, tools) if name not in text]:
        raise UserError(
            f"the tokenizer's chat template leaves out the tool {unseen[0]!r}: name one that writes tools with "
            "data.chat_template, such as qwen3"
        )
    written = "".join(text.split())
    for place, message in enumerate(chat):
        if message["role"] in ("system", "user") or message is chat[-1]:
            said = message["content"].rpartition("</think>")[2]  # templates write thoughts in their own way
            if message["role"] != "tool" and "".join(said.split()) not in written:
                raise UserError(
                    f"the tokenizer's chat template leaves out message {place + 1} ({message['role']}): name one that "
                    "writes it with data.chat_template, or leave such messages out"
                )
    return str(text)


def _unwritten(pair: Pair, text: str) -> set[str]:
    """Fields of messages that their text does not hold: who speaks, and the thoughts before the answer."""
    said = {("name", each.get("name")) for each in pair.prompt + pair.answer if each["role"] != "tool"}
    said |= {("reasoning_content", each.get("reasoning_content")) for each in pair.answer}
    return {name for name, value in said if isinstance(value, str) and value.strip() not in text}


def common_start(first: list[Any], second: list[Any]) -> int:
    """How many tokens, or messages, are equal at the start of both."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))
