"""AlpacaEval's files: a list of instructions in, a list of {instruction, output, generator, dataset} out.

https://github.com/tatsu-lab/alpaca_eval: alpaca_eval.json of its data set, or any model's model_outputs.json (the
outputs in it are not looked at). Its judges read the other file by `alpaca_eval --model_outputs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from redpeft.tasks.columns import ROW, check_texts
from redpeft.tasks.files import read_file

Rows = list[dict[str, Any]]


def read_questions(path: str | Path) -> Rows:
    """The rows of a JSON or JSON lines file, each with an "instruction" and perhaps a "dataset", where it came from.

    Raises `UserError` as `read_file`, and for a row without an instruction.
    """
    questions = read_file(path)
    check_texts(questions, "instruction")
    return list(questions.remove_columns(ROW))


def turns(question: dict[str, Any]) -> list[str]:
    """What is asked: one instruction."""
    return [question["instruction"]]


def text(questions: Rows, entries: Iterable[dict[str, Any]], name: str) -> str:
    """The file that `alpaca_eval --model_outputs` reads: each row's `entries`' first answer, by `name`."""
    rows = [
        {
            "instruction": question["instruction"],
            "output": entry["answers"][0],
            "generator": name,
            "dataset": question.get("dataset"),
        }
        for question, entry in zip(questions, entries, strict=True)
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False)
