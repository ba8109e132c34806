"""A chat in the terminal: a language model, with the adapters on it and weighted sums of them, which take turns."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase, TextStreamer

from redpeft.adapters.arithmetic import compose
from redpeft.adapters.folder import read_config
from redpeft.console import counted
from redpeft.errors import UserError
from redpeft.evaluation.language_model import GREEDY, attach, detach, open_language_model, prompt_form
from redpeft.models import end_tokens, input_limit, load_tokenizer, pad_prompts, quiet
from redpeft.storage import CONFIG_NAME, find_adapter, find_run
from redpeft.tasks.instruction import Chat, InstructionTask
from redpeft.training.trainer import new_tokens

BASE, MIX = "base", "mix"
COMMANDS = {
    "/help": "list these commands",
    "/base": "the base model answers",
    "/adapter NAME": "this adapter answers",
    "/strength 0.5": "how strongly the adapter or mix acts: 0 as the base model, 1 as trained",
    "/mix NAME=0.7 NAME=0.3": "the weighted sum of adapters answers",
    "/side-by-side [NAME ...]": "others answer each question too (default: the base model); again: no longer",
    "/set [NAME=VALUE ...]": "show or change how answers are drawn, such as temperature=0",
    "/save FOLDER": "write the adapter or mix that answers, at its strength, as an adapter",
    "/again": "draw another answer to the last question",
    "/clear": "begin a new chat",
    "/quit": "end, as Ctrl-D does; Ctrl-C stops an answer",
}

Weights = Mapping[str, float]  # of a sum of adapters by their names; the base model where it is empty


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


def chat(
    model: str,
    adapters: Sequence[str | Path] = (),
    sampling: Mapping[str, Any] | None = None,
    *,
    system: str | None = None,
    out: TextIO | None = None,
    on_answer: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Answer the lines of standard input until it ends; returns the chat as `messages`, and who took part.

    `model` is a run folder, an adapter folder, or a base model, on which the `adapters` are put. A line is a question,
    or a command of `COMMANDS`. Answers are written word by word to `out`, by default standard output; `on_answer`, if
    given, gets the question and its answers instead. A wrong command is a line on a terminal. From a pipe nobody would
    read it, so there it raises `UserError`, as do a model and adapters that cannot be loaded or do not fit each other.
    """
    settings = Sampling().changed(sampling or {})
    adapted = open_adapted_model(model, adapters)
    conversation = Conversation(adapted, settings, system, out or sys.stdout, on_answer)
    conversation.run(on_terminal=sys.stdin.isatty())
    return {"model": model, "adapters": list(adapted.folders), "messages": conversation.messages}


# --- a model with adapters that take turns ---------------------------------------------------------------------------


class AdaptedModel:
    """A language model and adapters by name, of which a weighted sum acts at a time.

    Those of one PEFT type are on the model together. Of RED adapters any sum is computed in memory, exactly. `forms`
    say how each adapter is asked, as in its training, and "base" how the base model is.
    """

    def __init__(
        self, model: Any, context: Callable[[], Any], folders: dict[str, Path], forms: dict[str, Any]
    ) -> None:
        self.model, self.context, self.folders, self.forms = model, context, folders, forms
        self.kinds = {name: read_config(folder)["peft_type"] for name, folder in folders.items()}
        self._loaded = dict(zip(folders, ["default"], strict=False))  # PEFT's names of those on the model

    def check_known(self, names: Sequence[str]) -> None:
        """Raises `UserError` for a name that no adapter has."""
        for name in names:
            if name not in self.folders:
                there = ", ".join(self.folders) or "none; give them with --adapter"
                raise UserError(f"there is no adapter {name!r}. The adapters are: {there}")

    @contextlib.contextmanager
    def acting(self, weights: Weights) -> Iterator[Any]:
        """The model with the weighted sum of these adapters.

        Raises `UserError` for unknown adapters, and for a sum that cannot be computed.
        """
        self.check_known(list(weights))
        if not weights:
            if not isinstance(self.model, PeftModel):
                yield self.model
                return
            with self.model.disable_adapter():
                yield self.model.get_base_model()
            return
        as_trained = list(weights.values()) == [1.0]
        other = next((name for name in weights if self.kinds[name] != "REDPEFT"), None)
        if other is not None and not as_trained:
            raise UserError(
                f"{other} is a {self.kinds[other]} adapter, which answers as it is: only RED adapters have a strength "
                "and can be mixed"
            )
        self._load(list(weights))
        names = [self._loaded[name] for name in weights]
        self.model.set_adapter(names[0])
        if not as_trained:
            if MIX in self.model.peft_config:
                self.model.delete_adapter(MIX)
            self.model.add_weighted_adapter(names, list(weights.values()), MIX)
            self.model.set_adapter(MIX)
        yield self.model

    def _load(self, names: list[str]) -> None:
        """Put adapters of one type on the model, after taking off those of another."""
        if any(self.kinds[name] != self.kinds[names[0]] for name in self._loaded):
            self.model, self._loaded = detach(self.model), {}
        for name in names:
            if name not in self._loaded:
                own = f"adapter_{list(self.folders).index(name)}"
                self.model = attach(self.model, self.folders[name], own)
                self._loaded[name] = own


def open_adapted_model(model: str, adapters: Sequence[str | Path] = ()) -> AdaptedModel:
    """A model and its adapters, all of which were put on it once. Raises `UserError` as `open_language_model`."""
    is_adapter = (find_adapter(model) / CONFIG_NAME).is_file()
    opened = open_language_model(model, None if is_adapter or not adapters else adapters[0])
    given = list(dict.fromkeys(find_adapter(each).resolve() for each in [*([model] if is_adapter else []), *adapters]))
    folders = dict(zip(short_names(given), given, strict=True))
    if not folders:
        return AdaptedModel(opened.model, opened.context, {}, {BASE: (opened.task, opened.tokenizer)})
    base = opened.model.get_base_model() if isinstance(opened.model, PeftModel) else opened.model
    tokenizer = load_tokenizer(base.name_or_path)
    forms = {name: prompt_form(folder, tokenizer) for name, folder in folders.items()}
    forms[BASE] = InstructionTask({"messages": "messages"}), tokenizer
    adapted = AdaptedModel(opened.model, opened.context, folders, forms)
    for name in folders:
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


# --- an answer -------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What was answered, and whether Ctrl-C stopped it. `note`: why it is not whole; None if it is."""

    text: str
    stopped: bool
    note: str | None


def answer(
    adapted: AdaptedModel, weights: Weights, messages: Chat, sampling: Sampling, write: Callable[[str], None]
) -> Answer:
    """The next answer of a chat. `write` gets its words as they come.

    Raises `UserError` for a chat that is too long or that the chat template refuses, and for outputs that are not
    finite.
    """
    task, tokenizer = adapted.forms[next(iter(weights), BASE)]
    [prompt] = task.prompt_tokens([messages], tokenizer)
    with adapted.acting(weights) as model:
        room = new_tokens(model, tokenizer, sampling.max_new_tokens, len(prompt))
        if room < 1:
            limit = input_limit(model, tokenizer)
            raise UserError(f"the chat has {len(prompt)} tokens, as many as {limit.source}: /clear begins a new one")
        settings = dict(GREEDY)
        if sampling.temperature > 0:
            settings |= {"do_sample": True, **sampling.model_dump(include={"temperature", "top_p", "top_k"})}
        ends = end_tokens(model, tokenizer)
        streamer = AnswerStreamer(tokenizer, write)
        torch.manual_seed(sampling.seed)
        stopped = True
        with torch.inference_mode(), adapted.context(), quiet(), contextlib.suppress(KeyboardInterrupt):
            model.generate(
                **pad_prompts(tokenizer, [prompt], "left").to(model.device),
                **settings,
                repetition_penalty=sampling.repetition_penalty,
                no_repeat_ngram_size=0,
                max_new_tokens=room,
                logits_processor=LogitsProcessorList([OnlyFinite(expression(weights))]),
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
                streamer=streamer,
            )
            stopped = False
    note = None
    if stopped:
        streamer.end()
        note = "stopped"
    elif streamer.tokens[-1] not in ends:
        full = room < sampling.max_new_tokens
        more = (
            "the model reads no longer chat, /clear begins a new one"
            if full
            else "/set max_new_tokens=... allows more"
        )
        note = f"cut at {counted(room, 'token')}: {more}"
    return Answer(tokenizer.decode(streamer.tokens, skip_special_tokens=True).strip(), stopped, note)


class AnswerStreamer(TextStreamer):
    """transformers' streamer of words, which also keeps the `tokens` of the answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.tokens, self._began = write, list[int](), False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt's tokens at first, then each new one."""
        if not self.next_tokens_are_prompt:
            self.tokens += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write the words that are whole, without spaces before the first."""
        text = text if self._began else text.lstrip()
        self._began = self._began or bool(text)
        if text:
            self.write(text)


class OnlyFinite(LogitsProcessor):
    """Refuses outputs that are not finite, of which no token can be drawn. `who`: answers so."""

    def __init__(self, who: str) -> None:
        self.who = who

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if bool(scores.isnan().any()) or bool((scores == math.inf).any()):
            raise UserError(f"the model's outputs are not finite with {self.who}: choose a smaller strength")
        return scores


# --- the conversation ------------------------------------------------------------------------------------------------


class Conversation:
    """The lines that a person types, and what is answered.

    `weights` say who answers now, and `beside` who answers too. `messages` hold the chat with the answers of the
    former; they stay when another takes over.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        sampling: Sampling,
        system: str | None,
        out: TextIO,
        on_answer: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.adapted, self.sampling, self.out, self.on_answer = adapted, sampling, out, on_answer
        self.beginning: Chat = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.beginning)
        self.whole: Weights = dict.fromkeys(list(adapted.folders)[:1], 1.0)  # at strength 1
        self.strength = 1.0
        self.beside: list[Weights] = []
        self.turns = 0

    @property
    def weights(self) -> Weights:
        """Who answers now."""
        return {name: self.strength * weight for name, weight in self.whole.items()}

    def run(self, on_terminal: bool) -> None:
        """Read lines until there are no more. Raises `UserError` for a wrong one if they do not come `on_terminal`."""
        if on_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # arrow keys, and earlier lines
            adapters = ", ".join(self.adapted.folders) or "none"
            self.note(f"adapters: {adapters}; /help lists the commands, Ctrl-D ends")
        while True:
            try:
                with contextlib.redirect_stdout(self.out):
                    line = input(f"{expression(self.weights)}> " if on_terminal else "").rstrip()
                if line.startswith("/"):
                    self.obey(line)
                elif line:
                    self.ask(line.lstrip())
            except EOFError:
                if on_terminal:
                    self.note("")
                return
            except UnicodeDecodeError:
                raise UserError("standard input is not UTF-8: save it as UTF-8") from None
            except UserError as error:
                if not on_terminal:
                    raise
                self.note(str(error))
            except KeyboardInterrupt:
                if not on_terminal:
                    raise
                self.note("\n/quit or Ctrl-D ends the chat")

    def ask(self, question: str) -> None:
        """Answer a question and keep both. A question without an answer is dropped."""
        asked: Chat = [*self.messages, {"role": "user", "content": question}]
        sampling = self.sampling.model_copy(update={"seed": self.sampling.seed + self.turns})
        self.turns += 1
        answers: dict[str, str] = {}
        for weights in [*(each for each in self.beside if each != self.weights), self.weights]:
            who = expression(weights)
            if self.beside and self.on_answer is None:
                Console(file=self.out).print(f"{who}:", style="bold", markup=False, highlight=False, soft_wrap=True)
            found = answer(self.adapted, weights, asked, sampling, self.write)
            self.write("\n")
            answers[who] = found.text
            if found.note:
                self.note(found.note)
            if found.stopped:
                break
        if text := answers.get(expression(self.weights)):
            self.messages = [*asked, {"role": "assistant", "content": text}]
        if self.on_answer is not None:
            self.on_answer({"question": question, "answers": answers})

    def obey(self, line: str) -> None:
        """Do what a command says. Raises `UserError` for one that cannot be done, and `EOFError` for the last."""
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise UserError(f"cannot read {line!r}: {error}") from None
        match words:
            case ["/help"]:
                width = max(map(len, COMMANDS))
                self.note("\n".join(f"{usage:{width}}  {what}" for usage, what in COMMANDS.items()))
            case ["/base"]:
                self.choose({})
            case ["/adapter", name]:
                self.choose({name: 1.0})
            case ["/strength", number]:
                if not self.whole:
                    raise UserError("the base model has no strength: choose an adapter first, with /adapter NAME")
                self.choose(self.whole, _number(number))
            case ["/mix", _, *_]:
                pairs = [word.rpartition("=") for word in words[1:]]
                names = [name for name, _, _ in pairs]
                if "" in names or len(set(names)) < len(names):
                    raise UserError("give each adapter one weight, such as /mix formal=0.7 brief=0.3")
                self.choose({name: _number(weight) for name, _, weight in pairs})
            case ["/side-by-side", *names]:
                self.adapted.check_known([name for name in names if name != BASE])
                others: list[Weights] = [{} if name == BASE else {name: 1.0} for name in names]
                self.beside = others or ([] if self.beside else [{}])
                self.note(f"answering too: {', '.join(map(expression, self.beside)) or 'nobody'}")
            case ["/set", *settings]:
                self.sampling = self.sampling.changed(
                    {name: value for name, _, value in (each.partition("=") for each in settings)}
                )
                self.note(str(self.sampling))
            case ["/save", folder]:
                if not self.whole:
                    raise UserError("the base model is no adapter: choose one first, with /adapter NAME")
                compose(
                    " + ".join(f"{w!r} * {str(self.adapted.folders[n])!r}" for n, w in self.weights.items()), folder
                )
                self.note(f"wrote {expression(self.weights)} to {folder}")
            case ["/again"]:
                if self.messages == self.beginning:
                    raise UserError("nothing was asked yet")
                self.messages, question = self.messages[:-2], self.messages[-2]["content"]
                self.ask(question)
            case ["/clear"]:
                self.messages = list(self.beginning)
            case ["/quit"]:
                raise EOFError
            case [name, *_]:
                usage = next((usage for usage in COMMANDS if usage.split()[0] == name), None)
                unknown = f"there is no command {name}; /help lists them, and a space before it makes it a question"
                raise UserError(f"write {usage}" if usage else unknown)

    def choose(self, whole: Weights, strength: float = 1.0) -> None:
        """Let a weighted sum of adapters answer from now on. Nothing changes where it cannot be computed."""
        with self.adapted.acting({name: strength * weight for name, weight in whole.items()}):
            pass
        self.whole, self.strength = whole, strength

    def write(self, text: str) -> None:
        """Show a part of an answer."""
        if self.on_answer is None:
            print(text, end="", file=self.out, flush=True)

    def note(self, text: str) -> None:
        """Show what is not an answer."""
        print(text, file=sys.stderr, flush=True)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"a strength or weight is a finite number, such as 0.5, not {text!r}")
    return number
