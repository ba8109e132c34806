"""Rows that come in while others are answered: standard input, in batches as large as has come so far."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from redpeft.errors import UserError
from redpeft.tasks.columns import ROW
from redpeft.tasks.files import ALONE, DELIMITERS, LINE, encoding_of, lines_of, records, table_rows

Row = dict[str, Any] | str
CHUNK = 1 << 16
NAME = "standard input"
FORMATS = ("csv", "tsv", "jsonl", "json", "lines")


def batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """The rows in lists of `size`, the last one with what is left."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch


def read_stream(
    stream: BinaryIO, size: int, columns: Sequence[str] = (), form: str | None = None, header: str | None = None
) -> Iterator[list[Row]]:
    """The rows of a stream in lists of at most `size`, with no waiting for a list to be full.

    One read brings what is there: a line from a terminal or a slow pipe, thousands from a file. Its first line decides
    the format: a header that holds `columns` (in any case) is that of a table, a bracket begins a JSON list, and
    everything else is lines, each a JSON object or a text. `form`, one of `FORMATS`, overrides that. A row that is an
    object has the number that errors give it.

    Raises:
        UserError: bytes that are no text, a record of a table or a JSON object that is broken.
    """
    lines = _Lines(stream)
    batch: list[Row] = []
    for row in _rows(lines, columns, form, header):
        batch.append(row)
        if len(batch) == size or not lines.ready:
            yield batch
            batch = []
    if batch:
        yield batch


def _rows(lines: _Lines, columns: Sequence[str], form: str | None, header: str | None) -> Iterator[Row]:
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        return
    delimiter = _delimiter(first, columns, form)
    if delimiter is not None:
        found = records(itertools.chain([first], lines), delimiter, NAME)
        yield from ({**row, ROW: number} for number, row in table_rows(found, NAME, header))
    elif form == "json" or (form is None and re.match(r"\s*\[\s*({|$)", first)):
        try:
            entries = json.loads(first + "".join(lines))
        except ValueError as error:
            raise UserError(f"{NAME} is broken JSON ({error})") from None
        yield from ({**row, ROW: number} for number, row in enumerate(entries, start=1))
    else:
        rows = (_row(line, lines.count, form) for line in itertools.chain([first], lines))
        yield from (row for row in rows if row is not None)


def _delimiter(first: str, columns: Sequence[str], form: str | None) -> str | None:
    """What separates the cells of a table whose first line this is; None for what is no table."""
    if form not in (None, "csv", "tsv"):
        return None
    headers = {mark: _cells(first, mark) for mark in (*DELIMITERS[form or "csv"], ALONE)}
    asked = {column.lower() for column in columns}
    found = (mark for mark, cells in headers.items() if len(cells) > 1 and asked and asked <= set(cells))
    if (delimiter := next(found, None)) is not None:
        return delimiter
    if form is None:
        return ALONE if asked and asked == set(headers[ALONE]) else None
    return max(headers, key=lambda mark: len(headers[mark]))


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return [cell.strip().lower() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _row(line: str, number: int, form: str | None) -> Row | None:
    """A line as a row; None for an empty one."""
    text = line.rstrip("\r\n")
    if not text.strip():
        return None
    if form != "jsonl" and (form == "lines" or not text.lstrip().startswith("{")):
        return text
    try:
        return {**json.loads(text), ROW: number}
    except (ValueError, TypeError) as error:
        raise UserError(f"line {number} of {NAME} is broken JSON ({error})") from None


class _Lines:
    """The lines of a stream with their ends, as they come. `ready`: those that are there already, `count`: how many
    have been taken. The encoding is found out from what comes first, and anew where that turns out to be wrong; of a
    stream that is a file, from all of it, as in `read_file`."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.ready, self.count = stream, deque[str](), 0
        self._decoder: io.IncrementalNewlineDecoder | None = None
        self._rest, self._ended = "", False
        if stream.seekable():
            data = stream.read()
            try:
                self.ready.extend(lines_of(data.decode(encoding_of(data, NAME))))
            except UnicodeDecodeError as error:
                raise UserError(f"{NAME} is not {error.encoding}, as its first bytes say; save it as UTF-8") from None
            self._ended = True

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        while not self.ready:
            if self._ended:
                raise StopIteration
            self._read()
        self.count += 1
        return self.ready.popleft()

    def _read(self) -> None:
        chunk = self.stream.read1(CHUNK)  # type: ignore[attr-defined]
        self._ended = not chunk
        if self._decoder is None:
            self._decoder = _decoder(encoding_of(chunk, NAME))
        state = self._decoder.getstate()
        try:
            text = self._decoder.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            undecoded = state[0] + chunk
            self._decoder = _decoder(encoding_of(undecoded, NAME))
            try:
                text = self._decoder.decode(undecoded, final=self._ended)
            except UnicodeDecodeError:
                raise UserError(f"line {self.count + 1} of {NAME} is not {error.encoding}; save it as UTF-8") from None
        *lines, self._rest = _split(self._rest + text)
        self.ready.extend(lines)
        if self._ended and self._rest:
            self.ready.append(self._rest)


def _decoder(encoding: str) -> io.IncrementalNewlineDecoder:
    """It keeps the first half of a Windows line end back until the other half comes."""
    return io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=False)


def _split(text: str) -> list[str]:
    """The whole lines of a text, and what is behind them."""
    lines = [match[0] for match in LINE.finditer(text)]
    return lines if lines and not lines[-1].endswith(("\r", "\n")) else [*lines, ""]
