"""Rows to answer, from a file or standard input, and a file of their answers."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from redpeft.errors import UserError
from redpeft.storage import write_atomically
from redpeft.tasks.columns import ROW
from redpeft.tasks.files import existing, extension, read_bytes, read_file
from redpeft.training.predict import BATCH, FinishedRun
from redpeft.training.stdin_rows import NAME, Row, batched, read_stream

QUESTIONS = ("text", "text_pair", "tokens", "prompt", "messages")
"""Of a task's columns, those that a row to answer has."""

WRITTEN = (".csv", ".tsv", ".jsonl")


def read_rows(run: FinishedRun, source: str, form: str | None = None) -> tuple[Iterator[list[Row]], int | None, str]:
    """The rows of a file, or of standard input for "-", in lists to be answered; how many there are, if that is known;
    and the name of the rows in messages.

    `form` is one of `stdin_rows.FORMATS` and overrides the file's extension. A .txt file is read like standard input.
    Raises `UserError` as `read_file` and `read_stream` do.
    """
    header = run.recipe.data.header or "first"
    columns = [column for key, column in run.task.columns.items() if key in QUESTIONS]
    if source == "-":
        return read_stream(sys.stdin.buffer, BATCH, columns, form, header), None, NAME
    path = existing(source)
    if form == "lines" or (form is None and extension(path) == ".txt"):
        stream = io.BytesIO(read_bytes(path))
        return read_stream(stream, BATCH, columns, form, header, path.name), None, path.name
    rows = read_file(path, header, form)
    return batched(rows, BATCH), len(rows), path.name


def check_name(path: Path) -> None:
    """Raises `UserError` for a file of answers that cannot be written or exists already."""
    if path.suffix.lower() not in WRITTEN:
        raise UserError(f"--out {path}: the extension decides the format; known are {', '.join(WRITTEN)}")
    if path.exists():
        raise UserError(f"{path} exists already: give another name, or remove it")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: no such folder: {path.parent}")


def save_answers(path: Path, answers: Iterable[tuple[Row, dict[str, Any], dict[str, Any]]]) -> int:
    """Write the rows with their answers as a table (.csv, .tsv) or JSON lines (.jsonl), and return how many there are.

    An answer's field gets "predicted_" before its name if the row has a field of that name. In a table, lists and
    objects are JSON, and each probability has a column.
    """
    table = path.suffix.lower() != ".jsonl"
    rows = []
    for row, read, answer in answers:
        fields = {name: value for name, value in (row if isinstance(row, dict) else read).items() if name != ROW}
        answer = rounded_answer(answer)
        if table:
            answer |= {f"probability {label}": value for label, value in answer.pop("probabilities", {}).items()}
        for name, value in answer.items():
            while name in fields:
                name = f"predicted_{name}"
            fields[name] = value
        rows.append(fields)
    if not table:
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    else:
        out = io.StringIO()
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        writer = csv.DictWriter(
            out, dict.fromkeys(name for row in rows for name in row), delimiter=separator, lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        text = out.getvalue().removesuffix("\n")
    try:
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return len(rows)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def rounded_answer(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer with rounded numbers: probabilities to four digits, a value to six."""
    answer = dict(answer)
    if "probabilities" in answer:
        answer["probabilities"] = {label: float(f"{p:.4g}") for label, p in answer["probabilities"].items()}
    if answer.get("value") is not None:
        answer["value"] = float(f"{answer['value']:.6g}")
    return answer
