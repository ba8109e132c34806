"""The files of AlpacaEval and MT-Bench: questions in, and answers out in the form that each benchmark's own judge
reads.

AlpacaEval (https://github.com/tatsu-lab/alpaca_eval): alpaca_eval.json of its data set, or any model's
model_outputs.json, whose outputs are ignored. Its judges read a list of {instruction, output, generator, dataset} by
`alpaca_eval --model_outputs`.

MT-Bench (https://github.com/lm-sys/FastChat, fastchat/llm_judge): question.jsonl. `gen_judgment.py` reads
model_answer/<model>.jsonl, one JSON object a line: question_id, answer_id, model_id, choices [{index, turns}], tstamp.
FastChat's own gen_model_answer.py samples at a temperature that depends on the question's category (writing and
roleplay 0.7, stem and humanities 0.1, extraction, math, coding and reasoning 0, any other 0.7). The paper decodes
greedily, and so does redpeft.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redpeft.errors import UserError
from redpeft.tasks.columns import ROW, check_texts, is_missing, require_columns, where
from redpeft.tasks.files import read_file

Questions = list[dict[str, Any]]
FASTCHAT = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/lm-sys/FastChat")  # the namespace of answer ids


@dataclass(frozen=True)
class QuestionFormat:
    """How one benchmark writes questions and answers.

    Attributes:
        read: the rows of a file of questions. Raises `UserError` as `read_file`, and for a row that is no question.
        turns: what a row asks, one turn after the other.
        write: the text of the file of answers, from the questions, a dict with "answers" (one a turn) and "time" for
            each of them, and the name of the model.
    """

    read: Callable[[str | Path], Questions]
    turns: Callable[[dict[str, Any]], list[str]]
    write: Callable[[Questions, Iterable[dict[str, Any]], str], str]


def _read_alpaca_eval(path: str | Path) -> Questions:
    """Rows with an "instruction", and maybe a "dataset" that it comes from."""
    questions = read_file(path)
    check_texts(questions, "instruction")
    return list(questions.remove_columns(ROW))


def _write_alpaca_eval(questions: Questions, entries: Iterable[dict[str, Any]], name: str) -> str:
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


def _read_mt_bench(path: str | Path) -> Questions:
    """Rows with a "question_id" that no other row has, and "turns", a list of one text or more."""
    questions = read_file(path)
    require_columns(questions, ["question_id", "turns"])
    rows: Questions = list(questions.remove_columns(ROW))
    count = Counter(row["question_id"] for row in rows)
    for index, row in enumerate(rows):
        asked = row["turns"]
        if not isinstance(asked, list) or not asked or any(not isinstance(t, str) or is_missing(t) for t in asked):
            raise UserError(f"{where(questions, index)}: turns is {str(asked)[:60]}, not a list of texts")
        if row["question_id"] is None or count[row["question_id"]] > 1:
            raise UserError(
                f"{where(questions, index)}: question_id is {row['question_id']}: every row needs an id of its own"
            )
    return rows


def _write_mt_bench(questions: Questions, entries: Iterable[dict[str, Any]], name: str) -> str:
    """One line a question. An answer's id depends on model and question, so the same call writes the same file."""
    return "\n".join(
        json.dumps(
            {
                "question_id": question["question_id"],
                "answer_id": str(uuid.uuid5(FASTCHAT, f"{name} {question['question_id']}")),
                "model_id": name,
                "choices": [{"index": 0, "turns": entry["answers"]}],
                "tstamp": entry["time"],
            },
            ensure_ascii=False,
        )
        for question, entry in zip(questions, entries, strict=True)
    )


FORMATS = {
    "alpaca-eval": QuestionFormat(_read_alpaca_eval, lambda question: [question["instruction"]], _write_alpaca_eval),
    "mt-bench": QuestionFormat(_read_mt_bench, lambda question: list(question["turns"]), _write_mt_bench),
}
