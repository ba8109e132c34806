"""Answers to the questions of AlpacaEval and MT-Bench, in the files that those projects' own judges read."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from redpeft.console import Progress
from redpeft.errors import UserError
from redpeft.evaluation.language_model import Decoding, LanguageModel, open_language_model, weights_digest
from redpeft.evaluation.question_files import FORMATS
from redpeft.storage import explaining_full_disk, find_run, locked, write_atomically
from redpeft.tasks.instruction import Chat


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

    `benchmark` is "alpaca-eval" or "mt-bench" and decides the format of both files. `model` and `adapter` are as in
    `open_language_model`. `name` is what the benchmark calls the model; default: the name of the run, adapter or
    model.

    Answers are kept in `out`.journal batch by batch, so the same call continues after a kill. `out` itself is written
    once all answers are there, in the order of the questions. The batch size changes answers by rounding only, so a
    resumed call may use another one.

    Raises `UserError`, with nothing written, for questions that cannot be read, a model that cannot be loaded, an
    `out` that exists already or has a journal with other settings, and while another process writes it.
    """
    form, out, decoding = FORMATS[benchmark], Path(out), decoding or Decoding()
    rows = form.read(questions)
    name = name or find_run(adapter or model).resolve().name
    settings = {
        "benchmark": benchmark,
        "questions": hashlib.sha256(Path(questions).expanduser().read_bytes()).hexdigest()[:16],
        "model": model,
        "adapter": None if adapter is None else str(adapter),
        "adapter_weights": weights_digest(adapter or model),
        **asdict(decoding),
    }
    with locked(out.parent, f".{out.name}.lock"):
        journal = Journal(out.with_name(f"{out.name}.journal"), settings)
        if out.exists() and not journal.entries:
            raise UserError(f"{out} exists already and has no journal to continue: choose another --out, or remove it")
        done = {entry["question"] for entry in journal.entries}
        todo = [index for index in range(len(rows)) if index not in done]
        if todo:
            speaker = open_language_model(model, adapter)
            places = {index: f"{questions}, question {index + 1}" for index in todo}
            for index in todo:  # the first turns are checked before any is answered
                with _naming(places[index]):
                    speaker.prompt([{"role": "user", "content": form.turns(rows[index])[0]}], decoding)
            lines = Progress(len(done))
            with tqdm(total=len(rows), initial=len(done), unit="question", disable=None) as bar:
                for start in range(0, len(todo), batch_size):
                    batch = todo[start : start + batch_size]
                    answers = converse(speaker, {places[index]: form.turns(rows[index]) for index in batch}, decoding)
                    now = time.time()
                    journal.append(
                        {"question": index, "answers": texts, "time": now}
                        for index, texts in zip(batch, answers, strict=True)
                    )
                    bar.update(len(batch))
                    lines.show("question", len(done) + start + len(batch), len(rows))
        entries = sorted(journal.entries, key=lambda entry: entry["question"])
        with explaining_full_disk(out.parent):
            write_atomically(out, form.write(rows, entries, name))
    return {"benchmark": benchmark, "model": name, "questions": len(rows), "generated": len(todo), "out": str(out)}


def converse(speaker: LanguageModel, questions: dict[str, list[str]], decoding: Decoding) -> list[list[str]]:
    """The answers to each question's turns. A later turn sees what was asked and answered before it.

    `questions`: the turns of each, by the name that errors give to the question.
    """
    chats: dict[str, Chat] = {place: [] for place in questions}
    for turn in range(max(map(len, questions.values()))):
        asked = [place for place, turns in questions.items() if turn < len(turns)]
        for place in asked:
            chats[place].append({"role": "user", "content": questions[place][turn]})
            with _naming(place):
                speaker.prompt(chats[place], decoding)
        for place, answer in zip(asked, speaker.answer([chats[place] for place in asked], decoding), strict=True):
            chats[place].append({"role": "assistant", "content": answer})
    return [[turn["content"] for turn in chat if turn["role"] == "assistant"] for chat in chats.values()]


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Put `place` before the message of an error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


class Journal:
    """What was answered so far, in a file, so that a killed command continues from there.

    The first line holds the settings of the work, every further line one entry. Lines are appended and flushed to the
    disk before the next batch begins. A kill or a full disk leaves at most one incomplete last line, which is dropped.

    Attributes:
        entries: what was done, in that order; `append` adds to it.

    Raises `UserError` for a journal with other settings, or a file that is no journal.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = Path(path), settings
        self.entries: list[dict[str, Any]] = []
        self._end = 0  # of the last whole line
        if self.path.is_file():
            self._read()

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Keep `entries`. Raises `UserError` where the file cannot be written, `RunError` for a full disk."""
        entries = list(entries)
        lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
        if not self._end:
            lines.insert(0, json.dumps({"settings": self.settings}, ensure_ascii=False))
        try:
            with explaining_full_disk(self.path.parent), self.path.open("r+b" if self._end else "wb") as file:
                file.seek(self._end)
                file.truncate()
                file.write("".join(f"{line}\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
                self._end = file.tell()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None
        self.entries += entries

    def _read(self) -> None:
        data = self.path.read_bytes()
        self._end = data.rfind(b"\n") + 1
        if not self._end:
            return
        try:
            first, *rest = [json.loads(line) for line in data[: self._end].splitlines()]
            before = first["settings"]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{self.path} is damaged, or is no journal of unfinished work: remove it") from None
        differing = [key for key in {**before, **self.settings} if before.get(key) != self.settings.get(key)]
        if differing:
            raise UserError(
                f"{self.path} belongs to a call with other settings ({', '.join(differing)}): choose another "
                "--out, or remove it"
            )
        self.entries = rest
