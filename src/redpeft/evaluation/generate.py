"""Answers to the questions of AlpacaEval and MT-Bench, in the files that those projects' own judges read."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from redpeft.console import Progress
from redpeft.errors import UserError
from redpeft.evaluation import alpaca_eval, mt_bench
from redpeft.evaluation.journal import journal_of
from redpeft.evaluation.language_model import Decoding, LanguageModel, open_language_model, weights_digest
from redpeft.storage import explaining_full_disk, find_run, write_atomically
from redpeft.tasks.instruction import Chat

BENCHMARKS: dict[str, Any] = {"alpaca-eval": alpaca_eval, "mt-bench": mt_bench}


def generate(
    benchmark: str,
    model: str,
    questions: str | Path,
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    name: str | None = None,
    decoding: Decoding | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Let a model answer every question in the file `questions` and write the answers to `out`; returns a summary.

    `benchmark` is "alpaca-eval" or "mt-bench" and decides both files' formats, `model` and `adapter` are as in
    `open_language_model`, and `name` is what the benchmark is to call the model (the run's, adapter's or model's own
    name when not given).

    Answers are kept in `out`.journal batch by batch, so that the same call after a kill goes on from there; `out`
    itself is written when all are there, in the questions' order. Batches change no answer but for rounding, so a
    resumed call may have another `batch_size`.

    Raises `UserError`, with nothing written, for questions that cannot be read, a model that cannot be loaded, an
    `out` that is there already or has a journal of other settings, and another process that is at it.
    """
    kind, out, decoding = BENCHMARKS[benchmark], Path(out), decoding or Decoding()
    rows = kind.read_questions(questions)
    name = name or find_run(adapter or model).resolve().name
    settings = {
        "benchmark": benchmark,
        "questions": hashlib.sha256(Path(questions).expanduser().read_bytes()).hexdigest()[:16],
        "model": model,
        "adapter": None if adapter is None else str(adapter),
        "adapter_weights": weights_digest(adapter or model),
        **asdict(decoding),
    }
    with journal_of(out, settings) as journal:
        done = {entry["question"] for entry in journal.entries}
        todo = [index for index in range(len(rows)) if index not in done]
        if todo:
            speaker = open_language_model(model, adapter)
            places = {index: f"{questions}, question {index + 1}" for index in todo}
            for index in todo:  # the first turns are checked before any is answered
                with _at(places[index]):
                    speaker.prompt([{"role": "user", "content": kind.turns(rows[index])[0]}], decoding)
            lines = Progress(len(done))
            with tqdm(total=len(rows), initial=len(done), unit="question", disable=None) as bar:
                for start in range(0, len(todo), batch_size):
                    batch = todo[start : start + batch_size]
                    turns = {places[index]: kind.turns(rows[index]) for index in batch}
                    answers = converse(speaker, turns, decoding)
                    journal.append(_entries(batch, answers))
                    bar.update(len(batch))
                    lines.show("question", len(done) + start + len(batch), len(rows))
        entries = sorted(journal.entries, key=lambda entry: entry["question"])
        with explaining_full_disk(out.parent):
            write_atomically(out, kind.text(rows, entries, name))
    return {"benchmark": benchmark, "model": name, "questions": len(rows), "generated": len(todo), "out": str(out)}


def _entries(questions: list[int], answers: list[list[str]]) -> list[dict[str, Any]]:
    now = time.time()
    return [{"question": index, "answers": said, "time": now} for index, said in zip(questions, answers, strict=True)]


def converse(speaker: LanguageModel, questions: dict[str, list[str]], decoding: Decoding) -> list[list[str]]:
    """The answers to each question's turns, by what errors are to call it; a later turn sees what was asked and
    answered before it."""
    chats: dict[str, Chat] = {place: [] for place in questions}
    for turn in range(max(map(len, questions.values()))):
        asked = [place for place, turns in questions.items() if turn < len(turns)]
        for place in asked:
            chats[place].append({"role": "user", "content": questions[place][turn]})
            with _at(place):
                speaker.prompt(chats[place], decoding)
        for place, answer in zip(asked, speaker.answer([chats[place] for place in asked], decoding), strict=True):
            chats[place].append({"role": "assistant", "content": answer})
    return [[turn["content"] for turn in chat if turn["role"] == "assistant"] for chat in chats.values()]


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Errors of the question at `place` name it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
