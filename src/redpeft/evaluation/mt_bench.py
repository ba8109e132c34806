"""MT-Bench's files: FastChat's question.jsonl in, its model_answer/<model>.jsonl out.

https://github.com/lm-sys/FastChat, fastchat/llm_judge. There `gen_judgment.py` reads the answers, one JSON object a
line: question_id, answer_id, model_id, choices [{index, turns}], tstamp.

FastChat's own gen_model_answer.py draws answers at a temperature that goes by the question's category (writing and
roleplay 0.7, stem and humanities 0.1, extraction, math, coding and reasoning 0, any other 0.7). The paper decodes
greedily, and so does redpeft.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from redpeft.errors import UserError
from redpeft.tasks.columns import ROW, is_missing, require_columns, where
from redpeft.tasks.files import read_file

Rows = list[dict[str, Any]]
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/lm-sys/FastChat")


def read_questions(path: str | Path) -> Rows:
    """The rows of a JSON lines file, each with a "question_id" of its own and "turns", a list of one text or more.

    Raises `UserError` as `read_file`, and for a row without turns or with an id that another row has.
    """
    questions = read_file(path)
    require_columns(questions, ["question_id", "turns"])
    rows: Rows = list(questions.remove_columns(ROW))
    count = Counter(row["question_id"] for row in rows)
    for index, row in enumerate(rows):
        asked = row["turns"]
        if not isinstance(asked, list) or not asked or any(not isinstance(t, str) or is_missing(t) for t in asked):
            raise UserError(f"{where(questions, index)}: turns is {str(asked)[:60]}, not a list of texts")
        if row["question_id"] is None or count[row["question_id"]] > 1:
            raise UserError(f"{where(questions, index)}: the question_id {row['question_id']} is not one of its own")
    return rows


def turns(question: dict[str, Any]) -> list[str]:
    """What is asked, one turn after the other."""
    return list(question["turns"])


def text(questions: Rows, entries: Iterable[dict[str, Any]], name: str) -> str:
    """FastChat's file of the answers of the model `name`. Answers' ids go by model and question, and not by chance."""
    return "\n".join(
        json.dumps(
            {
                "question_id": question["question_id"],
                "answer_id": str(uuid.uuid5(NAMESPACE, f"{name} {question['question_id']}")),
                "model_id": name,
                "choices": [{"index": 0, "turns": entry["answers"]}],
                "tstamp": entry["time"],
            },
            ensure_ascii=False,
        )
        for question, entry in zip(questions, entries, strict=True)
    )
