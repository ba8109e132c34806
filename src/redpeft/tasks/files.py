"""A user's rows, read in one way from files and from streams: what is wrong is said in one line, with the row.

    bytes ── decode ──> lines ── a format ──> rows, dicts by column ──> Dataset     (read_file)
                                                                   └──> batches     (redpeft.training.stream)

A cell of CSV, TSV or a spreadsheet is the text as it is written, and an empty one is missing: `007`, `1E3`, `NA` and
`None` are texts. JSON and parquet have types, which are kept. pandas and `load_dataset` would guess types, turn some
words into missing values, hide the broken line, and copy the data into a cache.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import logging
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import chardet
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets

from redpeft.errors import UserError, first_line
from redpeft.tasks.columns import ROW

logger = logging.getLogger(__name__)

SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
"""How the Hub ends the names (but for the extension) of the parts of a large file."""

READERS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
READERS |= {".parquet": "parquet", ".xlsx": "xlsx"}
"""The format of a file by its extension; each may have `.gz` behind it."""

DELIMITERS = {"csv": ",;\t|", "tsv": "\t,;|"}
ALONE = "\x1f"  # between the columns of a table that has one; no text holds it

Records = Iterator[list[str]]
Rows = Iterator[tuple[int, dict[str, Any]]]  # each with its number, for errors


def read_file(path: str | Path, header: str | None = None, form: str | None = None) -> Dataset:
    """All rows of one file, in memory. Fields within fields have dotted names, such as `message.body`.

    Args:
        header: of a table: "first", its first row holds the names of the columns; "none", there are none, and they
            are called column_1, column_2, ...; None, the first row does, unless it looks like a row of data.
        form: the format, one of the values of `READERS`; by default the extension's.

    Raises:
        UserError: no such file, an unknown extension, no rows, or text that breaks its format.
    """
    path = existing(path)
    known = READERS.get(extension(path)) if form is None else form
    if known is None:
        raise UserError(f"cannot read {path}: the extension decides the format, and {', '.join(READERS)} are known")
    try:
        if known == "parquet":
            data = _read_bytes(path)
            dataset = Dataset(pq.read_table(io.BytesIO(data))) if data else None
        elif known in DELIMITERS:
            dataset = _table(path.name, delimited(path, read_text(path), known), header)
        elif known == "xlsx":
            dataset = _table(path.name, _sheet(path), header)
        else:
            dataset = _from_objects(path, objects(path, read_text(path)))
    except (pa.ArrowException, OSError, EOFError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from None
    if dataset is None or len(dataset) == 0:
        raise UserError(f"{path} is empty: it holds no rows")
    return with_rows(dataset, path.name)


def existing(path: str | Path) -> Path:
    """The path of a file that is there. UserError where there is none."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    return path


def extension(path: Path) -> str:
    """`.csv` of `rows.csv` and of `rows.csv.gz`."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def read_parts(files: Sequence[Path], header: str | None = None) -> Dataset:
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
        return read_file(first, header)
    try:
        rows = concatenate_datasets([read_file(file, header).remove_columns(ROW) for file in files])
    except ValueError as error:  # of datasets: the columns do not agree
        raise UserError(f"{first.parent}: the parts of {first.name} do not agree: {first_line(error)}") from None
    return with_rows(rows, f"{SHARD.sub('', first.stem)} ({total} parts)")


def with_rows(dataset: Dataset, name: str) -> Dataset:
    """The dataset with what errors say of a row: its number, and the name of where it comes from. What it holds in
    fields within fields gets columns of its own."""
    if any(isinstance(feature, dict) for feature in dataset.features.values()):
        dataset = dataset.flatten()
    dataset = dataset.add_column(ROW, np.arange(1, len(dataset) + 1))
    dataset.info.description = name
    return dataset


# --- text -----------------------------------------------------------------------------------------------------------

MARKS = [(b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32")]
MARKS += [(b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")]
NOT_TEXT = {
    b"PK\x03\x04": "an Excel workbook or another zip archive (.xlsx)",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: save it as .xlsx",
    b"PAR1": "a parquet file (.parquet)",
    b"\x1f\x8b": "compressed (.gz)",
    b"%PDF": "a PDF file",
}


def _read_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix.lower() == ".gz" else data


def read_text(path: Path) -> str:
    """A file's text, in whatever encoding it is. UserError for a file that holds none."""
    data = _read_bytes(path)
    encoding = encoding_of(data, str(path))
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not {encoding}, as its first bytes say; save it as UTF-8") from None


def encoding_of(data: bytes, name: str) -> str:
    """How bytes encode text: as their first ones say, else UTF-8, else a guess, which is logged.

    Raises:
        UserError: they are no text.
    """
    if kind := next((kind for mark, kind in NOT_TEXT.items() if data.startswith(mark)), None):
        raise UserError(f"{name} is no text: it is {kind}")
    if re.match(rb"\s*<(!doctype|html)", data[:200], re.IGNORECASE):
        raise UserError(f"{name} is a web page and no data: look at it, and download the file itself")
    if marked := next((encoding for mark, encoding in MARKS if data.startswith(mark)), None):
        return marked
    if b"\0" in data[:200]:
        zeros = [data[:200][start::2].count(0) for start in (0, 1)]
        encoding = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
        if 3 * max(zeros) < len(data[:200]):
            raise UserError(f"{name} is no text: it holds NUL bytes")
    else:
        try:
            data.decode("utf-8")
            return "utf-8"
        except UnicodeDecodeError as error:
            if error.end == len(data) and error.reason == "unexpected end of data":
                return "utf-8"  # the rest of the last character is to come
        encoding = (chardet.detect(data)["encoding"] or "").lower()
        if not encoding:
            raise UserError(f"{name} is neither UTF-8 nor another encoding of text that is known: save it as UTF-8")
    logger.info("%s is not UTF-8; it is read as %s", name, encoding)
    return encoding


LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+$")


def lines_of(text: str) -> Iterator[str]:
    """The lines of a text with their ends, of Unix, Windows or an old Mac."""
    return (match[0] for match in LINE.finditer(text))


# --- tables ---------------------------------------------------------------------------------------------------------


def delimited(path: Path, text: str, form: str) -> Records:
    """The records of CSV or TSV text. What separates its cells is found out, and logged where the extension says
    another."""
    sample = list(itertools.islice(lines_of(text), 200))
    delimiter = _find_delimiter(sample, DELIMITERS[form])
    if delimiter not in (ALONE, DELIMITERS[form][0]):
        logger.info("%s: its cells are separated by %r", path, delimiter)
    return records(lines_of(text), delimiter, path.name)


def _find_delimiter(sample: list[str], delimiters: str) -> str:
    """The first delimiter by which all records have as many cells, and more than one; else the first by which the
    header has several: the records that differ are errors. Else there is one column."""
    by_header = ALONE
    for delimiter in delimiters:
        try:
            found = [record for record in csv.reader(sample, delimiter=delimiter) if record]
        except csv.Error:
            continue
        whole = found[:-1] if len(sample) == 200 else found  # the last one may go on
        if found and len(found[0]) > 1:
            if len({len(record) for record in whole}) == 1:
                return delimiter
            by_header = delimiter if by_header == ALONE else by_header
    return by_header


def records(lines: Iterable[str], delimiter: str, name: str) -> Records:
    """The cells of each record, as lines bring them: quoted cells may hold line ends. Empty lines are passed over.

    Raises:
        UserError: quotation marks that do not fit.
    """
    csv.field_size_limit(2**31 - 1)  # a text may be long
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    number = 0  # the header
    while True:
        try:
            record = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):
                reason = "a quotation mark is opened and never closed"
            else:
                reason = f"{first_line(error)}: within a quoted cell, write a quotation mark twice"
            raise UserError(f"{_place(name, number)}: {reason}") from None
        if record is None:
            return
        if record:
            yield record
            number += 1


def _place(name: str, number: int) -> str:
    return f"{name}, row {number}" if number else f"{name}, first row"


def table_rows(found: Records, name: str, header: str | None = None) -> Rows:
    """The rows of a table, by the names of their columns. An empty cell is None.

    Raises:
        UserError: two columns of one name, a row with more or fewer cells than the first, the header once more.
    """
    first = next(found, None)
    if first is None:
        return
    if header == "none":
        names = [f"column_{number}" for number in range(1, len(first) + 1)]
        found = itertools.chain([first], found)
    else:
        names = [cell.strip() or f"Unnamed: {number}" for number, cell in enumerate(first)]
        if twice := [cell for cell, count in Counter(names).items() if count > 1]:
            raise UserError(f"{name}: two columns are called {twice[0]!r}: rename or remove one")
    for number, record in enumerate(found, start=1):
        if len(record) != len(names):
            cells = f"{len(record)} cell{'s' if len(record) > 1 else ''}"
            raise UserError(
                f"{_place(name, number)}: it has {cells}, and the first row has {len(names)}; a text that holds the "
                'separator belongs in "quotes"'
            )
        if header != "none" and record == first:
            raise UserError(f"{_place(name, number)}: it is the header again: remove that line")
        yield number, {name: cell if cell else None for name, cell in zip(names, record, strict=True)}


def _table(name: str, found: Records, header: str | None) -> Dataset | None:
    rows = [row for _, row in table_rows(found, name, header)]
    if not rows:
        return None
    columns = {column: [row[column] for row in rows] for column in rows[0]}
    if header is None and (cell := _looks_like_data(columns)):
        raise UserError(
            f"{name}: its first row looks like data and not like the names of the columns: it holds {cell[:40]!r}. "
            "data.header=none takes it as a row, data.header=first as names"
        )
    return Dataset(pa.table({column: pa.array(cells, pa.string()) for column, cells in columns.items()}))


def _looks_like_data(columns: dict[str, list[str | None]]) -> str | None:
    """A name that no column has: a number, a long text, or what stands in the column more than once."""
    for name, cells in columns.items():
        number = re.fullmatch(r"[-+]?\d+([.,]\d+)?", name)
        if number or len(name) > 60 or sum(cell is not None and cell.strip() == name for cell in cells) > 1:
            return name
    return None


def _sheet(path: Path) -> Records:
    """The cells of a workbook's first sheet, as text."""
    import openpyxl

    try:
        book = openpyxl.load_workbook(io.BytesIO(_read_bytes(path)), read_only=True, data_only=True)
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UserError(f"cannot read {path}: it is no Excel workbook ({first_line(error)})") from None
    if len(book.sheetnames) > 1:
        logger.info("%s has %d sheets; the first one, %r, is read", path, len(book.sheetnames), book.sheetnames[0])
    rows = [[_written(cell) for cell in row] for row in book.worksheets[0].iter_rows(values_only=True)]
    width = max((place + 1 for row in rows for place, cell in enumerate(row) if cell), default=0)
    return ([*row, *[""] * width][:width] for row in rows if any(row))


def _written(cell: Any) -> str:
    """A cell of a workbook as a person sees it."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return "" if cell is None else str(cell)


# --- JSON -----------------------------------------------------------------------------------------------------------


def objects(path: Path, text: str) -> list[tuple[int, Any]]:
    """The values of JSON lines, or of a JSON list, each with the number of its line or its place."""
    if not text.lstrip().startswith("["):
        return parse_lines(path, text)
    try:
        return list(enumerate(json.loads(text), start=1))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: broken JSON ({error.msg})") from None


def parse_lines(path: Path, text: str) -> list[tuple[int, Any]]:
    """The values in JSON lines, with the number of each line; empty ones are passed over. UserError: a broken one."""
    rows = []
    for number, line in enumerate(lines_of(text), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line.rstrip("\r\n"))))
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
