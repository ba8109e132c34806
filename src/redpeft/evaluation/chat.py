"""A chat in the terminal: a language model, with the adapters on it and weighted sums of them, which take turns."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from redpeft.console import counted
from redpeft.errors import UserError
from redpeft.evaluation.answers import (
    BASE,
    AdaptedModel,
    Sampling,
    Weights,
    answer_chat,
    expression,
    open_adapted_model,
    save_sum,
)
from redpeft.tasks.instruction import Chat

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
    conversation.run()
    return {"model": model, "adapters": list(adapted.folders), "messages": conversation.messages}


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
        self.on_terminal = sys.stdin.isatty()

    @property
    def weights(self) -> Weights:
        """Who answers now."""
        return {name: self.strength * weight for name, weight in self.whole.items()}

    def run(self) -> None:
        """Read lines until there are no more. Raises `UserError` for a wrong one that is not from a terminal."""
        if self.on_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # arrow keys, and earlier lines
            adapters = ", ".join(self.adapted.folders) or "none"
            self.note(f"adapters: {adapters}; /help lists the commands, Ctrl-D ends")
        while True:
            try:
                with contextlib.redirect_stdout(self.out):
                    line = input(f"{expression(self.weights)}> " if self.on_terminal else "").rstrip()
                line = line.removeprefix("\ufeff")  # a byte order mark, with which a file may begin
                if line.startswith("/"):
                    self.obey(line)
                elif line:
                    self.ask(line.lstrip())
            except EOFError:
                if self.on_terminal:
                    self.note("")
                return
            except UnicodeDecodeError:
                raise UserError("standard input is not UTF-8: save it as UTF-8") from None
            except UserError as error:
                if not self.on_terminal:
                    raise
                self.note(str(error))
            except KeyboardInterrupt:
                if not self.on_terminal:
                    raise
                self.note("\n/quit or Ctrl-D ends the chat")

    def ask(self, question: str) -> None:
        """Answer a question and keep both. A question without an answer is dropped, with a line. From a pipe Ctrl-C
        ends the whole chat."""
        asked: Chat = [*self.messages, {"role": "user", "content": question}]
        sampling = self.sampling.model_copy(update={"seed": self.sampling.seed + self.turns})
        self.turns += 1
        answers: dict[str, str] = {}
        for weights in [*(each for each in self.beside if each != self.weights), self.weights]:
            who = expression(weights)
            if self.beside and self.on_answer is None:
                Console(file=self.out).print(f"{who}:", style="bold", markup=False, highlight=False, soft_wrap=True)
            [found] = answer_chat(self.adapted, [weights], asked, sampling, lambda row, text: self.write(text))
            self.write("\n")
            answers[who] = found.text
            if found.cut:
                full = "the model reads no longer chat, /clear begins a new one"
                more = full if found.full else "/set max_new_tokens=... allows more"
                self.note(f"cut at {counted(found.tokens, 'token')}: {more}")
            if found.stopped:
                if not self.on_terminal:
                    raise KeyboardInterrupt
                self.note("stopped")
                break
        if text := answers.get(expression(self.weights)):
            self.messages = [*asked, {"role": "assistant", "content": text}]
        else:
            self.note("there is no answer, so the question is not kept")
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
                self.choose({} if name == BASE else {name: 1.0})
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
                save_sum(self.adapted.folders, self.weights, folder)
                self.note(f"wrote {expression(self.weights)} to {folder}")
            case ["/again"]:
                if self.messages == self.beginning:
                    raise UserError("nothing was asked yet")
                before = self.messages
                self.messages = before[:-2]
                try:
                    self.ask(before[-2]["content"])
                finally:  # without another answer the last one stays
                    if len(self.messages) < len(before):
                        self.messages = before
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
        forms = [self.adapted.form({name: 1.0}) for name in whole]
        if len({(task.template, str(tokenizer.chat_template)) for task, tokenizer in forms}) > 1:
            first = next(iter(whole))
            self.note(f"these adapters were trained with different chat templates: the mix is asked as {first}")

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
