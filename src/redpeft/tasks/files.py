"""A user's rows, read in one way from files and from streams: what is wrong is said in one line, with the row.

    bytes ── decode ──> lines ── a format ──> rows, dicts by column ──> Dataset     (read_file)
                                                                   └──> batches     (redpeft.training.stdin_rows)

A cell of CSV, TSV or a spreadsheet is the text as it is written, and an empty one is missing: `007`, `1E3`, `NA` and
`None` are texts. JSON and parquet have types, which are kept. pandas and `load_dataset` would guess types, turn some
words into missing values, hide the broken line, and copy the data into a cache.
"""

from __future__ import annotations

import codecs
import csv
import datetime
import io
import itertools
import json
import logging
import re
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
from redpeft.tasks.columns import ROW, as_array, is_message

logger = logging.getLogger(__name__)

SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
"""How the Hub ends the names (but for the extension) of the parts of a large file."""

READERS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
READERS |= {".parquet": "parquet", ".xlsx": "xlsx"}
"""The format of a file by its extension, which may be followed by one of `COMPRESSED`."""

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}

DELIMITERS = {"csv": ",;\t|", "tsv": "\t,;|"}
ALONE = "\x1f"  # stands for the delimiter of a table with one column; no text holds it

Records = Iterator[list[str]]
Rows = Iterable[tuple[int, dict[str, Any]]]  # each with its number, for messages


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
        texts = "; texts without labels (.txt) can only be predicted" if extension(path) == ".txt" else ""
        raise UserError(f"cannot read {path}: the extension decides the format; known are {', '.join(READERS)}{texts}")
    try:
        if known == "parquet":
            data = read_bytes(path)
            dataset = with_rows(_typed(pq.read_table(io.BytesIO(data))), path.name) if data else None
        elif known in DELIMITERS:
            dataset = _table(path.name, delimited(path, read_text(path), known), header)
        elif known == "xlsx":
            dataset = _table(path.name, _sheet(path), header)
        else:
            dataset = _from_objects(path.name, objects(str(path), read_text(path)))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from None
    if dataset is None or len(dataset) == 0:
        raise UserError(f"{path} is empty: it holds no rows")
    return dataset


def existing(path: str | Path) -> Path:
    """The path of a file. Raises `UserError` if it does not exist."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder, but a file is needed here")
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    return path


def extension(path: Path) -> str:
    """`.csv` of `rows.csv` and of `rows.csv.gz`."""
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).suffix.lower()


def stem(path: Path) -> str:
    """`rows` of `rows.csv` and of `rows.csv.gz`."""
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSED else path.stem


def read_parts(files: Sequence[Path], header: str | None = None) -> Dataset:
    """All rows of a file, or of all its parts in order if it was split into parts with the Hub's names.

    Raises:
        UserError: files of two kinds for the same rows, parts that are missing, or what `read_file` raises.
    """
    first, parts = files[0], [SHARD.search(stem(file)) for file in files]
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
    except ValueError as error:  # from datasets: the columns differ
        raise UserError(f"{first.parent}: the parts of {first.name} do not agree: {first_line(error)}") from None
    return with_rows(rows, f"{SHARD.sub('', stem(first))} ({total} parts)")


def with_rows(dataset: Dataset, name: str, numbers: Sequence[int | str] | None = None) -> Dataset:
    """The dataset with what messages need: the number of each row (default: its place), and the name of its source.
    A message of a chat becomes a list of one; other nested fields become columns of their own."""
    nested = {column: set(feature) for column, feature in dataset.features.items() if isinstance(feature, dict)}
    messages = [column for column, fields in nested.items() if is_message(fields)]
    order = dataset.column_names
    for column in messages:
        lists = [cell and [cell] for cell in dataset[column]]
        dataset = dataset.remove_columns(column).add_column(column, lists)
    dataset = dataset.select_columns(order)
    if len(nested) > len(messages):
        dataset = dataset.flatten()
    dataset = dataset.add_column(ROW, np.arange(1, len(dataset) + 1) if numbers is None else list(numbers))
    dataset.info.description = name
    return dataset


# --- text -----------------------------------------------------------------------------------------------------------

MARKS = [(b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32")]
MARKS += [(b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")]
NOT_TEXT = {
    rb"PK\x03\x04": "an Excel workbook or another zip archive (.xlsx)",
    rb"\xd0\xcf\x11\xe0": "an old or encrypted Excel workbook: save it as .xlsx",
    rb"PAR1": "a parquet file (.parquet)",
    rb"\x1f\x8b": "compressed (.gz)",
    rb"BZh[1-9]1AY": "compressed (.bz2)",
    rb"\x28\xb5\x2f\xfd": "compressed (.zst)",
    rb"\xfd7zXZ": "compressed by xz: unpack it",
    rb"%PDF-": "a PDF file",
    rb"SQLite format 3": "an SQLite data base",
    rb"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with `git lfs pull`",
    rb"\s*(?i:<!doctype|<html|<head|<body|<table|<\?xml)": "a web page or XML: download the data itself",
}
"""How bytes begin that are no rows in text, and what they are."""


def read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed if it is compressed."""
    data = path.read_bytes()
    codec = COMPRESSED.get(path.suffix.lower())
    return pa.CompressedInputStream(pa.BufferReader(data), codec).read() if codec else data


def read_text(path: Path) -> str:
    """A file's text, whatever its encoding. Raises `UserError` for a file without text."""
    data = read_bytes(path)
    encoding = encoding_of(data, str(path))
    say_encoding(encoding, str(path))
    return _decode(data, encoding, str(path))


def read_texts(paths: Sequence[Path], name: str) -> list[str]:
    """The texts of many files, one each. If some are not UTF-8, all of them together show in which encoding they
    are."""
    found = [read_bytes(path) for path in paths]
    others = b"\n".join(data for data in found if not _is_utf8(data))
    encoding = encoding_of(others, name)
    say_encoding(encoding, name)
    return [
        _decode(data, "utf-8-sig" if _is_utf8(data) else encoding, str(path))
        for path, data in zip(paths, found, strict=True)
    ]


def _decode(data: bytes, encoding: str, name: str) -> str:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}, line {line}: not {encoding}, unlike the rest of the file; save it as UTF-8"
        ) from None
    check_text(text, name)
    return text


def check_text(text: str, name: str, first: int = 1) -> None:
    """Raises UserError for a text with NUL bytes. `first` is the number of its first line."""
    if "\0" in text:
        line = sum(1 for _ in lines_of(text[: text.index("\0") + 1])) + first - 1
        raise UserError(f"{name}, line {line}: it holds NUL bytes: the file is damaged or not a text")


def say_encoding(encoding: str, name: str) -> None:
    """Log an encoding that is not UTF-8."""
    if not encoding.startswith("utf-8"):
        logger.info("%s is not UTF-8; it is read as %s", name, encoding)


def encoding_of(data: bytes, name: str, whole: bool = True) -> str:
    """The encoding of a text in bytes: by its byte order mark, else UTF-8, else a guess.

    Args:
        whole: whether this is all; otherwise the rest of the last character may follow.

    Raises:
        UserError: the bytes are not a text, or some lines are UTF-8 and others are not.
    """
    if kind := next((kind for mark, kind in NOT_TEXT.items() if re.match(mark, data)), None):
        raise UserError(f"{name} is not a text file: it is {kind}")
    if marked := next((encoding for mark, encoding in MARKS if data.startswith(mark)), None):
        return marked
    zeros = [data[:200][start::2].count(0) for start in (0, 1)]
    if 3 * max(zeros) > len(data[:200]):
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    if _is_utf8(data, whole):
        return "utf-8"
    lines = [(number, line) for number, line in enumerate(data.splitlines(), start=1) if not line.isascii()]
    odd = [(number, line) for number, line in lines if not _is_utf8(line)]
    if len(lines) >= 2 * len(odd):
        raise UserError(f"{name}, line {odd[0][0]}: not UTF-8, unlike the rest of the file; save it as UTF-8")
    sample = b"\n".join(line for _, line in odd[:500])[:50_000]  # more would take chardet seconds
    guess = (chardet.detect(sample, encoding_era=chardet.EncodingEra.MODERN_WEB)["encoding"] or "").lower()
    little = guess == "windows-1250" and len({byte for byte in sample if byte > 127}) < 3
    return (
        "windows-1252" if little or guess in ("", "ascii", "utf-8") else guess
    )  # the most common one, if there is little to tell by


def _is_utf8(data: bytes, whole: bool = True) -> bool:
    try:
        codecs.utf_8_decode(data, "strict", whole)
    except UnicodeDecodeError:
        return False
    return True


LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+$")


def lines_of(text: str) -> Iterator[str]:
    """The lines of a text with their ends: of Unix, Windows or an old Mac."""
    return (match[0] for match in LINE.finditer(text))


# --- tables ---------------------------------------------------------------------------------------------------------


SEPARATOR = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
"""The line by which Excel is told what separates the cells below it."""


def delimited(path: Path, text: str, form: str) -> Records:
    """The records of CSV or TSV text. The delimiter is found out, and logged if it is not the extension's."""
    if re.match(r'\s*(\[\s*)?{\s*"', text):
        raise UserError(f"{path} holds JSON, not a table: rename it to .jsonl")
    sample = list(itertools.islice(lines_of(text), 200))
    said = SEPARATOR.fullmatch(sample[0]) if sample else None
    delimiter = said[1] if said else _find_delimiter(sample, DELIMITERS[form])
    if delimiter not in (ALONE, DELIMITERS[form][0]):
        logger.info("%s: its cells are separated by %r", path, delimiter)
    return records(itertools.islice(lines_of(text), 1 if said else 0, None), delimiter, path.name)


def _find_delimiter(sample: list[str], delimiters: str) -> str:
    """The first delimiter that gives all records the same number of cells, more than one; else the first that gives
    the header several cells, so that records that differ are errors; else none: there is one column."""
    by_header = ALONE
    for delimiter in delimiters:
        try:
            found = [record for record in csv.reader(sample, delimiter=delimiter) if record]
        except csv.Error:
            continue
        whole = found[:-1] if len(sample) == 200 else found  # the last one may continue
        if found and len(found[0]) > 1:
            if len({len(record) for record in whole}) == 1:
                return delimiter
            by_header = delimiter if by_header == ALONE else by_header
    return by_header


def records(lines: Iterable[str], delimiter: str, name: str) -> Records:
    """The cells of each record, from lines: quoted cells may hold line ends. Empty lines are skipped.

    Raises:
        UserError: quotation marks that do not match.
    """
    csv.field_size_limit(2**31 - 1)  # a text may be long
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    number = 0  # the header
    while True:
        try:
            record = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):
                reason = "a quotation mark is never closed"
            elif "expected after" in str(error):
                reason = "a quoted cell continues after its closing quotation mark: inside a cell, write it twice"
            else:
                reason = first_line(error)
            raise UserError(f"{_place(name, number)}: {reason}") from None
        if record is None:
            return
        if record:
            yield record
            number += 1


def _place(name: str, number: int) -> str:
    return f"{name}, row {number}" if number else f"{name}, first row"


def table_rows(found: Records, name: str, header: str | None = None) -> Rows:
    """The rows of a table by the names of their columns. An empty cell is None. Records without any text are skipped,
    and logged.

    Raises:
        UserError: two columns of one name, a row with more or fewer cells than the first, the header once more.
    """
    blank = 0
    names: list[str] = []
    number = 0
    for record in found:
        cells = [cell.strip() for cell in record]
        if not any(cells):
            blank += len(record) > 1
            number += bool(names)
            continue
        if not names and header == "none":
            names = [f"column_{place}" for place in range(1, len(record) + 1)]
        elif not names:
            names = [cell or f"Unnamed: {place}" for place, cell in enumerate(cells)]
            if twice := [cell for cell, count in Counter(names).items() if count > 1]:
                raise UserError(f"{name}: two columns are called {twice[0]!r}: rename or remove one")
            continue
        number += 1
        if len(record) != len(names):
            seen = f"{len(record)} cell{'s' if len(record) > 1 else ''}"
            raise UserError(
                f"{_place(name, number)}: it has {seen}, but the first row has {len(names)}; a text that holds the "
                'separator belongs in "quotes"'
            )
        if header != "none" and cells == names:
            raise UserError(
                f"{_place(name, number)}: it repeats the first row. Remove that line, or give data.header=none if "
                "the first row is no header"
            )
        yield number, {name: cell if cell else None for name, cell in zip(names, record, strict=True)}
    if blank:
        logger.info("%s: %d rows without any text are skipped", name, blank)


def _table(name: str, found: Records, header: str | None) -> Dataset | None:
    numbered = list(table_rows(found, name, header))
    if not numbered:
        return None
    columns = {column: [row[column] for _, row in numbered] for column in numbered[0][1]}
    if header is None and (cell := _looks_like_data(columns)):
        raise UserError(
            f"{name}: its first row looks like data, not like column names: it holds {cell[:40]!r}. "
            "data.header=none takes it as a row, data.header=first as names"
        )
    table = pa.table({column: pa.array(cells, pa.string()) for column, cells in columns.items()})
    return with_rows(Dataset(table), name, [number for number, _ in numbered])


def _looks_like_data(columns: dict[str, list[str | None]]) -> str | None:
    """Whether this is not the name of a column: a number, a long text, or a value of the column itself."""
    for name, cells in columns.items():
        if re.fullmatch(r"[-+]?\d+([.,]\d+)?", name) or len(name) > 60 or name in cells:
            return name
    return None


def _sheet(path: Path) -> Records:
    """The cells of a workbook's first sheet, as text."""
    import openpyxl

    try:
        book = openpyxl.load_workbook(io.BytesIO(read_bytes(path)), read_only=True, data_only=True)
        rows = [list(row) for row in book.worksheets[0].iter_rows()]
    except Exception as error:  # errors of zip files, XML and openpyxl
        raise UserError(f"cannot read {path}: it is not an Excel workbook ({first_line(error)})") from None
    if len(book.sheetnames) > 1:
        logger.info("%s has %d sheets; the first one, %r, is read", path, len(book.sheetnames), book.sheetnames[0])
    if wrong := next((cell for row in rows for cell in row if cell.value is not None and cell.data_type == "e"), None):
        raise UserError(f"{path}, cell {wrong.coordinate}: it holds the error {wrong.value}; fix its formula")
    written = [[_written(cell.value, cell) for cell in row] for row in rows]
    width = max((place + 1 for row in written for place, text in enumerate(row) if text), default=0)
    return ([*row, *[""] * width][:width] for row in written)


def _written(value: Any, cell: Any) -> str:
    """A cell of a workbook as a person sees it: a number in a format such as 000 or 0.00, a date without a time."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return str(value.date())
    if isinstance(value, int | float) and (form := re.fullmatch(r"(0+)(?:\.(0+))?", cell.number_format)):
        decimals = len(form[2] or "")
        return f"{value:0{len(form[1]) + decimals + bool(decimals)}.{decimals}f}"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


# --- what has types -------------------------------------------------------------------------------------------------


def objects(name: str, text: str) -> list[tuple[int, Any]]:
    """The values of JSON lines, or of a JSON list, each with the number of its line or its place."""
    try:
        whole = _from_json(text, name)
    except json.JSONDecodeError as error:
        if not text.lstrip().startswith("["):
            return parse_lines(name, text)
        raise UserError(f"{name}, line {error.lineno}: broken JSON ({error.msg})") from None
    return list(enumerate(whole, start=1)) if isinstance(whole, list) else [(1, whole)]


def parse_lines(name: str | Path, text: str) -> list[tuple[int, Any]]:
    """The values in JSON lines, with the number of each line. Empty lines are skipped. Raises `UserError` for a broken
    one."""
    return [(number, parse_line(name, number, line)) for number, line in numbered_lines(text)]


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers."""
    return ((number, line) for number, line in enumerate(lines_of(text), start=1) if line.strip())


def parse_line(name: str | Path, number: int, line: str) -> Any:
    """The value of a line of JSON. Raises `UserError` if it is broken."""
    try:
        return _from_json(line.rstrip("\r\n"), f"{name}, line {number}")
    except json.JSONDecodeError as error:
        raise UserError(f"{name}, line {number}: broken JSON ({error.msg} at column {error.colno})") from None


def _from_json(text: str, place: str) -> Any:
    """The value of JSON text. Raises `UserError` for an object with a key twice, of which json keeps the last."""
    repeated = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated.append(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
        return found

    value = json.loads(text, object_pairs_hook=unique)
    if repeated:
        raise UserError(f"{place}: an object has the key {repeated[0]!r} twice: rename or remove one")
    return value


def checked(name: str, rows: Rows) -> list[tuple[int, dict[str, Any]]]:
    """The rows. Raises `UserError` for one that is not an object."""
    rows = list(rows)
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f'{name}, row {number}: expected an object such as {{"text": ...}}, found {str(row)[:40]!r}'
            )
    return rows


def _from_objects(name: str, rows: Rows) -> Dataset | None:
    numbered = checked(name, rows)
    columns = {
        column: as_array([row.get(column) for _, row in numbered], column, [f"{name}, row {n}" for n, _ in numbered])
        for column in dict.fromkeys(column for _, row in numbered for column in row)
    }
    numbers = [number for number, _ in numbered]
    return with_rows(Dataset(pa.table(columns)), name, numbers) if columns else None


def _typed(table: pa.Table) -> Dataset:
    """A parquet table. A category that pandas wrote becomes a column of texts."""
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(place, field.name, table[place].cast(field.type.value_type))
    return Dataset(table)
