"""One data file, in memory: what is wrong with it is said in one line, with the file and the row."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets

from redpeft.errors import UserError, first_line
from redpeft.tasks.columns import ROW

SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
"""How the Hub ends the names (but for the extension) of the parts of a large file."""


def read_file(path: str | Path) -> Dataset:
    """All rows of one file, in memory; the extension decides the format.

    Raises:
        UserError: no such file, an unknown extension, no rows, or text that is not UTF-8 or breaks its format.
    """
    path = existing(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"cannot read {path}: the extension decides the format, and {', '.join(READERS)} are known")
    try:
        table = reader(path)
    except (pa.ArrowException, OSError, pd.errors.ParserError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from None
    if table is None or len(table) == 0:
        raise UserError(f"{path} is empty: it holds no rows")
    return with_rows(table, path.name)


def existing(path: str | Path) -> Path:
    """The path of a file that is there. UserError where there is none."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    return path


def read_parts(files: Sequence[Path]) -> Dataset:
    """All rows of one file or, where it was cut into parts named as the Hub names them, of all its parts in order.

    Raises:
        UserError: files of two kinds for the same rows, parts that are missing, or what `read_file` raises.
    """
    first, parts = files[0], [SHARD.search(file.stem) for file in files]
    if len(files) > 1 and None in parts:
        raise UserError(f"{first.parent} holds both {first.name} and {files[1].name}: remove one")
    numbers = [int(part[1]) for part in parts if part]
    total = max((int(part[2]) for part in parts if part), default=0)
    if numbers != list(range(total)):
        raise UserError(f"{first.parent} holds {len(files)} of {total} parts of one file, such as {first.name}")
    if len(files) == 1:
        return read_file(first)
    try:
        rows = concatenate_datasets([read_file(file).remove_columns(ROW) for file in files])
    except ValueError as error:  # of datasets: the columns do not agree
        raise UserError(f"{first.parent}: the parts of {first.name} do not agree: {first_line(error)}") from None
    return with_rows(rows, f"{SHARD.sub('', first.stem)} ({total} parts)")


def with_rows(dataset: Dataset, name: str) -> Dataset:
    """The dataset with what errors say of a row: its number, and the name of where it comes from."""
    dataset = dataset.add_column(ROW, np.arange(1, len(dataset) + 1))
    dataset.info.description = name
    return dataset


# --- the formats ----------------------------------------------------------------------------------------------------
# Read directly and not with `load_dataset`, which turns the words "None" and "NA" of a CSV file into missing values
# and dates into timestamps, guesses types block by block, hides the broken line, and copies the data into a cache.


def read_text(path: Path) -> str:
    """A file's text. UserError, with the first byte and line that are wrong, where it is not UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, line = f"0x{data[error.start]:02x}", data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8: byte {byte} at position {error.start}, line {line}; save it as UTF-8"
        ) from None


def _read_delimited(path: Path, separator: str) -> Dataset | None:
    text = read_text(path)
    if not text.strip():
        return None
    frame = pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, na_values=[""])
    frame.columns = frame.columns.str.strip()
    if not isinstance(frame.index, pd.RangeIndex):
        raise UserError(
            f'{path}: the rows have more fields than the header; put texts that hold {separator!r} in "quotes"'
        )
    return Dataset.from_pandas(frame, preserve_index=False)


def _read_json_lines(path: Path) -> Dataset:
    return _from_objects(path, parse_lines(path, read_text(path)))


def _read_json(path: Path) -> Dataset:
    """A list of objects, or JSON lines under another extension."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return _from_objects(path, parse_lines(path, text))
    try:
        return _from_objects(path, list(enumerate(json.loads(text), start=1)))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: broken JSON ({error.msg})") from None


def parse_lines(path: Path, text: str) -> list[tuple[int, Any]]:
    """The values in JSON lines, with the number of each line; empty ones are passed over. UserError: a broken one."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: broken JSON ({error.msg} at column {error.colno})") from None
    return rows


def _from_objects(path: Path, rows: list[tuple[int, Any]]) -> Dataset:
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f'{path}, row {number}: expected an object such as {{"text": ...}}, found {str(row)[:40]!r}'
            )
    columns = {}
    for name in dict.fromkeys(name for _, row in rows for name in row):
        try:
            columns[name] = pa.array([row.get(name) for _, row in rows])
        except (pa.ArrowException, OverflowError) as error:
            raise UserError(f"{path}: column {name!r} holds values of several types: {first_line(error)}") from None
    return Dataset(pa.table(columns))


def _read_parquet(path: Path) -> Dataset | None:
    return Dataset(pq.read_table(path)) if path.stat().st_size else None


READERS = {
    ".csv": lambda path: _read_delimited(path, ","),
    ".tsv": lambda path: _read_delimited(path, "\t"),
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
