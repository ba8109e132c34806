"""Rewards: prompts, to which the model's own answers are scored by functions. TRL's GRPOTrainer does the training."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from redpeft.errors import RunError, UserError, did_you_mean, first_line
from redpeft.tasks import columns as cols
from redpeft.tasks import reasoning
from redpeft.tasks.base import DataConfig
from redpeft.tasks.instruction import InstructionTask
from redpeft.tasks.metrics import is_right

PROMPT_COLUMNS, RESPONSE_COLUMNS = (list(dict.fromkeys(names)) for names in zip(*cols.PROMPT_PAIRS, strict=True))
GIVEN = "given."
"""What stands before the name of a data set's column in encoded rows."""

Score = Callable[..., Sequence[float | None]]
"""A reward as TRL calls it: a list of prompts, a list of completions, and the columns of the data by name, each a
list. A completion is a text if its prompt is one, and otherwise a list with one message."""


def _match(text: str, row: Mapping[str, Any]) -> float:
    return float(is_right(text, str(row["response"])))


BUILT_IN: dict[str, Callable[[str, Mapping[str, Any]], float]] = {
    "exact_match": _match,
    reasoning.REWARD: reasoning.score_answer,
}
"""Rewards that score one answer by the row's right one: what they get is the answer and the row."""


@dataclass
class RewardTask(InstructionTask):
    """Which answers a model is to give more often. Prompts become text as in the task instruction, and are answered as
    there.

    Attributes:
        columns: "prompt" (perhaps with "input") or "messages", whose last answer is not read; perhaps "response", the
            right answer, "system" and "tools". The functions get every column of the data.
        metric: "reward", the mean of the rewards' weighted sum, of one greedy answer to each prompt.
        reward: the functions, as a recipe names them.
        max_completion_length: the longest answer in tokens.
    """

    metric: str = "reward"
    loss: str = "grpo"
    reward: list[str] = field(default_factory=list)
    max_completion_length: int = 512
    name: ClassVar[str] = "reward"
    recipe_fields: ClassVar[Collection[str]] = (
        *("loss", "reward", "beta", "num_generations", "temperature", "max_completion_length", "trainer_options"),
    )
    recipe_defaults: ClassVar[Mapping[str, Any]] = {
        **{"loss": "grpo", "beta": 0.0, "num_generations": 8, "temperature": 1.0, "max_completion_length": 512}
    }
    losses: ClassVar[Sequence[str]] = ("grpo",)
    rate_divisor: ClassVar[float] = 10
    default_columns: ClassVar[Mapping[str, str]] = {}
    metrics: ClassVar[str] = "rewards"

    @classmethod
    def find_columns(cls, train: Dataset, data: DataConfig) -> dict[str, str]:
        """The columns that `data` names, and a guess for the others. UserError: a column that is not there."""
        messages = None if data.prompt else data.messages or cols.find_column(train, cols.MESSAGE_COLUMNS)
        if messages:
            found = {"messages": messages}
        else:
            found = {"prompt": cols.choose_column(train, data.prompt, PROMPT_COLUMNS, "prompt")}
        response = data.response or cols.find_column(train, RESPONSE_COLUMNS, without=found.values())
        return cls._with_optional(found | ({"response": response} if response else {}), train, data)

    @classmethod
    def in_common(cls, dataset: Dataset, columns: dict[str, Any]) -> Dataset:
        """All columns, those of the task under the names of their keys."""
        return dataset.rename_columns({name: key for key, name in columns.items() if name != key})

    def unread(self, dataset: Dataset) -> list[str]:
        """None: the functions get every column."""
        return []

    def describe(self, dataset: Dataset) -> list[str]:
        """For people: the functions, and which columns they get beside the task's."""
        more = ", ".join(name for name in cols.column_names(dataset) if name not in self.columns.values())
        return [f"reward: {', '.join(self.reward)}{'; it also gets the columns ' + more if more else ''}"]

    def check(self, dataset: Dataset, with_labels: bool = True) -> None:
        """Raises `UserError` for a missing column, an empty text, a value that is not a chat, no right answer where
        one is needed, or a data set whose own answers reasoning-gym does not find right."""
        super().check(dataset, with_labels=False)
        if not with_labels or not BUILT_IN.keys() & set(self.reward):
            return
        column = cols.choose_column(dataset, self.columns.get("response"), [], "response")
        empty = [row for row, answer in enumerate(cols.values(dataset, column)) if cols.is_missing(answer)]
        if empty and "exact_match" in self.reward:
            raise cols.Missing(f"{cols.first_of(dataset, empty)}: the answer in column {column!r} is empty")
        if reasoning.REWARD in self.reward and not cols.is_missing((first := self._by_keys(dataset[0]))["response"]):
            score = reasoning.score_answer(first["response"], first)
            if score != 1:  # some metadata is not the same after being JSON
                raise UserError(
                    f"{cols.where(dataset, 0)}: reasoning-gym gives {score:g} of 1 point for the data's own answer: "
                    "its scores of this data set cannot be used, take another"
                )

    def _by_keys(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with the task's columns under the names of their keys too."""
        return {**row, **{key: row[column] for key, column in self.columns.items()}}

    def _needed(self, with_labels: bool) -> list[str]:
        return ["messages" if "messages" in self.columns else "prompt"]

    def groups(self, dataset: Dataset) -> list[str]:
        """Each row's prompt."""
        return [repr(self._pairs(row, with_labels=False)[0].prompt) for row in dataset]

    @property
    def generation(self) -> dict[str, Any]:  # type: ignore[override]
        """Answers are as long as in training."""
        return {"max_new_tokens": self.max_completion_length, "do_sample": False}

    @property
    def own_limits(self) -> str:  # type: ignore[override]
        return f" less the {self.max_completion_length} of an answer"

    def encode(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        with_labels: bool = True,
    ) -> Dataset:
        """The text to continue as "prompt", its tokens as "input_ids", and the data's columns, named after `GIVEN`. A
        prompt that leaves no room for an answer within `max_length` has no tokens. Without labels as in the task
        instruction.

        Raises:
            UserError: a wrong row, one that the chat template or the tokenizer refuses, or an answer's length that
                leaves no room for prompts.
        """
        if not with_labels:
            return super().encode(dataset, tokenizer, max_length, with_labels=False)
        self.check(dataset)
        room = None if max_length is None else max_length - self.max_completion_length
        if room is not None and room < 1:
            answers = f"max_completion_length {self.max_completion_length}"
            raise UserError(f"{answers} leaves no room for prompts: the model reads {max_length} tokens")

        def tokenise(columns: dict[str, list]) -> dict[str, list]:
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            pairs = [self._pairs(row, with_labels=False)[0] for row in rows]
            texts = [self.format_prompt(pair.prompt, tokenizer, pair.tools) for pair in pairs]
            prompts = self.tokens_to_continue(texts, tokenizer)
            cut = [room is not None and len(prompt) > room for prompt in prompts]
            kept = [[] if long else prompt for prompt, long in zip(prompts, cut, strict=True)]
            return {"prompt": texts, "input_ids": kept, cols.CUT: cut}

        given = dataset.select_columns(cols.column_names(dataset))
        given = given.rename_columns({name: GIVEN + name for name in given.column_names})
        return concatenate_datasets([cols.tokenise(dataset, tokenise), given], axis=1)

    def reward_functions(self) -> list[Score]:
        """The rewards as TRL calls them with rows that `encode` made. Raises `UserError` as `load_reward`; they raise
        `RunError` if a function fails or gives no number for an answer."""
        return [self._for_encoded_rows(name, load_reward(name)) for name in self.reward]

    def _for_encoded_rows(self, name: str, function: Score | None) -> Score:
        def score(completions: list[str], **columns: Any) -> list[float | None]:
            given = {key.removeprefix(GIVEN): each for key, each in columns.items() if key.startswith(GIVEN)}
            rows = [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]
            if function is None:
                return [BUILT_IN[name](text, self._by_keys(row)) for text, row in zip(completions, rows, strict=True)]
            prompts: Any = given.get(self.columns.get("prompt", ""))
            answers: list[Any] = completions
            if prompts is None or not isinstance(prompts[0], str):
                prompts = [self._pairs(row, with_labels=False)[0].prompt for row in rows]
                answers = [[{"role": "assistant", "content": text}] for text in completions]
            ours = ("prompts", "input_ids")
            of_trl = {key: each for key, each in columns.items() if not key.startswith(GIVEN) and key not in ours}
            return _called(name, function, prompts=prompts, completions=answers, **(of_trl | given))

        short = name.rpartition(":")[2]  # what TRL calls the reward's mean, so each needs another
        alike = [each for each in self.reward if each.rpartition(":")[2] == short]
        score.__name__ = short if len(alike) == 1 else name
        return score


def _called(name: str, function: Score, **arguments: Any) -> list[float | None]:
    """What a user's function gives. Raises `RunError` if it fails, or gives something else than a number or None for
    each completion."""
    try:
        found = function(**arguments)
    except Exception as error:
        inside = traceback.extract_tb(error.__traceback__)[1:]  # none where the call itself is wrong
        place = f" at {Path(inside[-1].filename).name}, line {inside[-1].lineno}" if inside else ""
        raise RunError(f"reward {name} fails{place}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(found, Sized) or not isinstance(found, Iterable):
        raise RunError(f"reward {name} gives {found!r} instead of a list of scores")
    if len(found) != (wanted := len(arguments["completions"])):
        raise RunError(f"reward {name} gives {len(found)} scores for {wanted} completions: one is needed for each")
    scores: list[float | None] = []
    for each in found:
        try:
            scores.append(None if each is None else float(each))
        except (TypeError, ValueError):
            scores.append(math.nan)
        if scores[-1] is not None and not math.isfinite(scores[-1]):
            raise RunError(f"reward {name} gives {each!r}: a score is a finite number, or None, which adds nothing")
    return scores


def load_reward(name: str) -> Score | None:
    """The function that a recipe names; None for what is built in.

    Raises:
        UserError: a name that is neither, a module that cannot be imported, or no such function in it.
    """
    if name in BUILT_IN:
        return None
    place, colon, wanted = name.partition(":")
    if not colon or not place or not wanted:
        raise UserError(f"reward {name!r} is neither {' nor '.join(BUILT_IN)}, and not of the form module:function")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(place)
    except Exception as error:  # whatever a user's module raises
        if isinstance(error, ModuleNotFoundError) and error.name and f"{place}.".startswith(f"{error.name}."):
            raise UserError(f"reward {name}: no module {place!r} is installed or in the folder {folder}") from None
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"reward {name}: importing {place} fails: {why}") from None
    function = getattr(module, wanted, None)
    if not callable(function):
        hint = did_you_mean(wanted, [each for each, _ in inspect.getmembers(module, callable)])
        raise UserError(f"reward {name}: {getattr(module, '__file__', place)} has no function {wanted!r}{hint}")
    return function
