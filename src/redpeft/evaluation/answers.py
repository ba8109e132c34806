"""Answers of a language model and its adapters, word by word: several to one chat are rows of one `generate`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from redpeft.adapters.arithmetic import compose
from redpeft.adapters.folder import read_config
from redpeft.errors import UserError
from redpeft.evaluation.language_model import (
    GREEDY,
    Decoding,
    WithoutPadding,
    attach,
    detach,
    open_language_model,
    penalties,
    prompt_form,
)
from redpeft.models import end_tokens, input_limit, load_tokenizer, pad_prompts, quiet
from redpeft.storage import CONFIG_NAME, find_adapter, find_run
from redpeft.tasks.instruction import Chat, InstructionTask
from redpeft.training.trainer import new_tokens
from redpeft.tuner import mixed

BASE, MIX = "base", "mix"
IN_ONE_BATCH = ("REDPEFT", "LORA")  # PEFT types of which a batch may hold several adapters

Weights = Mapping[str, float]  # of a sum of adapters by their names; the base model where it is empty
Form = tuple[InstructionTask, PreTrainedTokenizerBase]  # how a chat becomes a prompt


# --- a model with adapters -------------------------------------------------------------------------------------------


class AdaptedModel:
    """A language model and adapters by name, of which weighted sums answer.

    Those of one PEFT type are on the model together. Of RED adapters any sum is computed in memory, exactly.

    Attributes:
        base_form: how the base model is asked.
        context: in which the model computes.
        folders: of the adapters.
        forms: how each adapter is asked, as in its training.
        kinds: the adapters' PEFT types.
    """

    def __init__(self, model: Any, base_form: Form, context: Callable[[], Any] = contextlib.nullcontext) -> None:
        self.model, self.base_form, self.context = model, base_form, context
        self.folders: dict[str, Path] = {}
        self.forms: dict[str, Form] = {}
        self.kinds: dict[str, str] = {}
        self._loaded: dict[str, str] = {}  # PEFT's names of those on the model

    def add(self, name: str, folder: Path, loaded_as: str | None = None) -> None:
        """One more adapter, which is put on the model before it first answers, unless it is there already.

        Raises `UserError` for a folder that holds none, and for a run of another task than chats.
        """
        self.kinds[name] = read_config(folder)["peft_type"]
        self.forms[name] = prompt_form(folder, self.base_form[1])
        self.folders[name] = folder
        if loaded_as is not None:
            self._loaded[name] = loaded_as

    def form(self, weights: Weights) -> Form:
        """How a weighted sum is asked: as its first adapter. Raises `UserError` for unknown adapters."""
        self.check_known(list(weights))
        return self.forms[next(iter(weights))] if weights else self.base_form

    def check_known(self, names: Sequence[str]) -> None:
        """Raises `UserError` for a name that no adapter has."""
        for name in names:
            if name not in self.folders:
                there = ", ".join(self.folders) or "none; give them with --adapter"
                raise UserError(f"there is no adapter {name!r}. The adapters are: {there}")

    @contextlib.contextmanager
    def acting(self, *rows: Weights) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The model, and the arguments of `generate` by which each row of a batch is answered by its sum of adapters.

        Raises `UserError` for unknown adapters, for a sum that cannot be computed, and for several rows with adapters
        that cannot be in one batch.
        """
        used = list(dict.fromkeys(name for weights in rows for name in weights))
        self.check_known(used)
        if not used:
            if not isinstance(self.model, PeftModel):
                yield self.model, {}
                return
            with self.model.disable_adapter():
                yield self.model.get_base_model(), {}
            return
        other = next((name for name in used if self.kinds[name] != "REDPEFT"), None)
        if other and any(other in weights and not _as_trained(weights) for weights in rows):
            raise UserError(
                f"{other} is a {self.kinds[other]} adapter, which answers as it is: only RED adapters have a strength "
                "and can be mixed"
            )
        kinds = {self.kinds[name] for name in used}
        if len(rows) > 1 and (len(kinds) > 1 or not kinds.issubset(IN_ONE_BATCH)):
            raise UserError(
                f"adapters that answer together are all of one type, {' or '.join(IN_ONE_BATCH)}, not "
                f"{', '.join(f'{name} ({self.kinds[name]})' for name in used)}"
            )
        self._load(used)
        self.model.set_adapter(self._loaded[used[0]])
        for name in [name for name in self.model.peft_config if name.startswith(MIX)]:
            self.model.delete_adapter(name)
        names = [self._on_model(weights, f"{MIX}_{row}") for row, weights in enumerate(rows)]
        if len(rows) > 1:
            yield self.model, {"adapter_names": names}
        else:
            self.model.set_adapter(names[0])
            yield self.model, {}

    def _on_model(self, weights: Weights, mix: str) -> str:
        """PEFT's name of what answers. A sum is put on the model under the name `mix`."""
        if not weights:
            return mixed.BASE
        names = [self._loaded[name] for name in weights]
        if _as_trained(weights):
            return names[0]
        self.model.add_weighted_adapter(names, list(weights.values()), mix)
        return mix

    def _load(self, names: list[str]) -> None:
        """Put adapters of one type on the model, after taking off those of another."""
        if any(self.kinds[name] != self.kinds[names[0]] for name in self._loaded):
            self.model, self._loaded = detach(self.model), {}
        for name in names:
            if name not in self._loaded:
                own = f"adapter_{list(self.folders).index(name)}"
                self.model = attach(self.model, self.folders[name], own)
                self._loaded[name] = own


def _as_trained(weights: Weights) -> bool:
    """Whether this is the base model, or one adapter at strength 1."""
    return not weights or list(weights.values()) == [1.0]


def open_adapted_model(model: str, adapters: Sequence[str | Path] = ()) -> AdaptedModel:
    """A model and its adapters, all of which were put on it once. Raises `UserError` as `open_language_model`."""
    is_adapter = (find_adapter(model) / CONFIG_NAME).is_file()
    opened = open_language_model(model, None if is_adapter or not adapters else adapters[0])
    given = list(dict.fromkeys(find_adapter(each).resolve() for each in [*([model] if is_adapter else []), *adapters]))
    if not given:
        return AdaptedModel(opened.model, (opened.task, opened.tokenizer), opened.context)
    base = opened.model.get_base_model() if isinstance(opened.model, PeftModel) else opened.model
    form = InstructionTask({"messages": "messages"}), load_tokenizer(base.name_or_path)
    adapted = AdaptedModel(opened.model, form, opened.context)
    for at, (name, folder) in enumerate(zip(short_names(given), given, strict=True)):
        adapted.add(name, folder, loaded_as=None if at else "default")
    for name in adapted.folders:
        with adapted.acting({name: 1.0}):
            pass
    return adapted


def short_names(adapters: Sequence[Path]) -> list[str]:
    """A name for each adapter: the end of its path, or of its run's, as long as it takes to tell them apart."""
    parts = [find_run(adapter).parts for adapter in adapters]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len({*names, BASE}) > len(names):
            return names
    return []


def expression(weights: Weights) -> str:
    """A weighted sum as `redpeft compose` writes it, for people: `0.7 * formal + 0.3 * brief`."""
    return " + ".join(name if weight == 1 else f"{weight:g} * {name}" for name, weight in weights.items()) or BASE


def save_sum(folders: Mapping[str, Path], weights: Weights, out: str | Path) -> None:
    """Write a weighted sum as an adapter into the folder `out`. Raises `UserError` as `compose` does."""
    if not weights:
        raise UserError("the base model is no adapter: choose one first")
    compose(" + ".join(f"{weight!r} * {str(folders[name])!r}" for name, weight in weights.items()), out)


# --- answers ---------------------------------------------------------------------------------------------------------


class Sampling(BaseModel):
    """How answers are drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    temperature: float = Field(0.7, ge=0)  # 0: always the most likely token
    top_p: float = Field(0.9, gt=0, le=1)
    top_k: int = Field(0, ge=0)  # 0: no limit
    repetition_penalty: float = Field(1.0, gt=0)
    max_new_tokens: int = Field(512, ge=1)
    seed: int = Field(0, ge=0)

    def changed(self, values: Mapping[str, Any]) -> Sampling:
        """With other values, which may be texts. Raises `UserError` for an unknown name or a wrong value."""
        try:
            return Sampling.model_validate({**self.model_dump(), **values})
        except ValidationError as error:
            problem = error.errors()[0]
            name = problem["loc"][0]
            if problem["type"] == "extra_forbidden":
                raise UserError(f"there is no setting {name}: there are {self}") from None
            raise UserError(f"{name}: {problem['msg']}, not {problem['input']!r}") from None

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.model_dump().items())


class Answer(NamedTuple):
    """What was answered.

    Attributes:
        tokens: how many were generated.
        stopped: whether somebody stopped it.
        cut: whether there was no room for its end: `max_new_tokens`, or the model's limit.
        full: whether that was the model's limit.
    """

    text: str
    tokens: int
    stopped: bool = False
    cut: bool = False
    full: bool = False


def answer_chat(
    adapted: AdaptedModel,
    rows: Sequence[Weights],
    messages: Chat,
    sampling: Sampling,
    write: Callable[[int, str], None],
    stop: Callable[[], bool] = lambda: False,
) -> list[Answer]:
    """The next answers of a chat, one by each weighted sum of adapters, as rows of one `generate`.

    Each is the answer that it would be alone. Where tokens are drawn, all rows draw with the same noise: answers
    differ by their adapters, not by chance. `write` gets the number of a row and its words as they come. Ctrl-C and
    `stop`, which is asked before each token, end the answers early.

    Raises `UserError` for a chat that is too long or that the chat template refuses, for outputs that are not finite,
    and as `AdaptedModel.acting` does.
    """
    forms = [adapted.form(weights) for weights in rows]
    with adapted.acting(*rows) as (model, by_row):
        prompts = [task.prompt_tokens([messages], tokenizer)[0] for task, tokenizer in forms]
        rooms = []
        for (_, tokenizer), prompt in zip(forms, prompts, strict=True):
            rooms.append(new_tokens(model, tokenizer, sampling.max_new_tokens, len(prompt)))
            if rooms[-1] < 1:
                limit = input_limit(model, tokenizer)
                raise UserError(f"the chat has {len(prompt)} tokens, as many as {limit.source}: begin a new chat")
        room, tokenizer = min(rooms), forms[0][1]
        inputs = pad_prompts(tokenizer, prompts, "left").to(model.device)
        padding = (inputs["attention_mask"] == 0).sum(1).tolist()
        ends = {token for _, each in forms for token in end_tokens(model, each)}
        streams = [AnswerStreamer(each, partial(write, row)) for row, (_, each) in enumerate(forms)]
        streamer = RowStreamer(streams, ends)
        interrupted = True
        with torch.inference_mode(), adapted.context(), quiet(), contextlib.suppress(KeyboardInterrupt):
            model.generate(
                **inputs,
                **by_row,
                **GREEDY,  # tokens are drawn by `draws`
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                max_new_tokens=room,
                logits_processor=LogitsProcessorList(
                    [OnlyFinite([expression(weights) for weights in rows]), *draws(sampling, padding)]
                ),
                stopping_criteria=StoppingCriteriaList([StopWhen(stop)]),
                eos_token_id=sorted(ends),
                pad_token_id=tokenizer.pad_token_id,
                streamer=streamer,
            )
            interrupted = False
        streamer.end()
    found = []
    for stream in streams:
        ended = bool(stream.tokens) and stream.tokens[-1] in ends
        cut = not ended and len(stream.tokens) >= room
        text = stream.tokenizer.decode(stream.tokens, skip_special_tokens=True).strip()
        stopped = not ended and not cut and (interrupted or stop())
        found.append(Answer(text, len(stream.tokens), stopped, cut, cut and room < sampling.max_new_tokens))
    return found


def draws(sampling: Sampling, padding: list[int]) -> LogitsProcessorList:
    """What turns the scores of tokens into others of which the largest is the drawn one. `padding`: the number of
    tokens of padding on the left of each row."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        seen = penalties(Decoding(repetition_penalty=sampling.repetition_penalty, no_repeat_ngrams=0))
        processors.append(WithoutPadding(seen, padding))
    if sampling.temperature == 0:
        return processors
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList([*processors, SharedNoise(sampling.seed)])


class SharedNoise(LogitsProcessor):
    """Adds Gumbel noise: the largest score is then a token that was drawn by its probability.

    At each step all rows get the same noise, and so does a row alone. scores (rows, vocabulary).
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = -torch.empty(scores.shape[-1]).exponential_(generator=self.generator).log()
        return scores + noise.to(scores.device)


class OnlyFinite(LogitsProcessor):
    """Refuses outputs that are not finite, of which no token can be drawn. `who`: answers in each row."""

    def __init__(self, who: Sequence[str]) -> None:
        self.who = who

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wrong = (scores.isnan() | (scores == math.inf)).any(-1).tolist()
        if True in wrong:
            who = self.who[wrong.index(True)]
            raise UserError(f"the model's outputs are not finite with {who}: choose a smaller strength")
        return scores


class StopWhen(StoppingCriteria):
    """Ends all rows once `asked` says so."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self.asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked(), dtype=torch.bool, device=input_ids.device)


class AnswerStreamer(TextStreamer):
    """transformers' streamer of one row's words, which also keeps the `tokens` of the answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.write, self.tokens, self.ended, self._began = write, list[int](), False, False

    def put(self, value: torch.Tensor) -> None:
        """Take the next token."""
        self.tokens += value.tolist()
        super().put(value)

    def end(self) -> None:
        """Write the last words."""
        self.ended = True
        super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write the words that are whole, without spaces before the first."""
        text = text if self._began else text.lstrip()
        self._began = self._began or bool(text)
        if text:
            self.write(text)


class RowStreamer(BaseStreamer):
    """Hands each row's tokens to a streamer of its own, until one of the tokens `ends`: those of transformers take one
    row."""

    def __init__(self, rows: Sequence[AnswerStreamer], ends: set[int]) -> None:
        self.rows, self.ends, self._has_prompt = rows, ends, False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompts at first, then the next token of each row, which is padding after its end."""
        if self._has_prompt:
            for row, token in zip(self.rows, value.flatten(), strict=True):
                if not row.ended:
                    row.put(token[None])
                    if int(token) in self.ends:
                        row.end()
        self._has_prompt = True

    def end(self) -> None:
        """End the rows that have not ended."""
        for row in self.rows:
            if not row.ended:
                row.end()
