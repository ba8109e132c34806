"""Rows to learn from, and files of every format."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROWS = [{"text": "a good film, really", "label": "good"}, {"text": 'a "bad" film', "label": "bad"}] * 10
WORDS = {"negative": ["bad", "awful"], "positive": ["good", "great"], "neutral": ["shop", "not"]}


def sentiment_rows(
    count: int, draw: random.Random, labels: Sequence[str] = ("negative", "positive"), longest: int = 12
) -> list[dict[str, str]]:
    """Texts of up to `longest` words and one more, which tells the label."""
    rows = []
    for index in range(count):
        label = labels[index % len(labels)]
        words = [draw.choice(["the", "film", "is", "very", "in"]) for _ in range(draw.randint(1, longest))]
        words.insert(draw.randint(0, len(words)), draw.choice(WORDS[label]))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def e2e_rows(names: Iterable[str]) -> list[dict[str, str]]:
    """Meaning representations as in the E2E challenge, with two texts each, in the columns of the public files."""
    return [
        {"mr": f"name[{name}], food[{food}], area[{area}]", "ref": text.format(name, food, area)}
        for name in names
        for food in ("Thai", "English")
        for area in ("riverside", "city centre")
        for text in ("{} serves {} food in the {} area.", "There is a place called {0} in the {2}, with {1} food.")
    ]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """The path of a new file, in the format that its extension names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        return write(path, "".join(json.dumps(row) + "\n" for row in rows))
    if path.suffix == ".json":
        return write(path, json.dumps(rows))
    import pandas as pd

    frame = pd.DataFrame(rows)
    writers = {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        ".parquet": lambda: frame.to_parquet(path, index=False),
        ".xlsx": lambda: frame.to_excel(path, index=False),
    }
    writers[path.suffix]()
    return str(path)
