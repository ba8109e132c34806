"""Data files of every kind, for the tests of this room."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

ROWS = [{"text": "a good film, really", "label": "good"}, {"text": 'a "bad" film', "label": "bad"}] * 10


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_rows(path: Path, rows: list[dict]) -> str:
    frame = pd.DataFrame(rows)
    writers = {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        ".jsonl": lambda: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
        ".json": lambda: path.write_text(json.dumps(rows)),
        ".parquet": lambda: frame.to_parquet(path, index=False),
        ".xlsx": lambda: frame.to_excel(path, index=False),
    }
    writers[path.suffix]()
    return str(path)
