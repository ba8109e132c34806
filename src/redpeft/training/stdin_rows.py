"""Rows that come in while others are answered: standard input, in batches as large as has come so far."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from redpeft.errors import UserError
from redpeft.tasks.columns import ROW
from redpeft.tasks.files import (
    ALONE,
    DELIMITERS,
    LINE,
    SEPARATOR,
    check_text,
    checked,
    encoding_of,
    objects,
    parse_line,
    records,
    say_encoding,
    table_rows,
)

Row = dict[str, Any] | str
CHUNK = 1 << 16
NAME = "standard input"
FORMATS = ("csv", "tsv", "jsonl", "json", "lines")


def batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """The rows in lists of `size`; the last list may be shorter."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch


def read_stream(
    stream: BinaryIO,
    size: int,
    columns: Sequence[str] = (),
    form: str | None = None,
    header: str | None = None,
    name: str = NAME,
) -> Iterator[list[Row]]:
    """The rows of a stream in lists of at most `size`, with no waiting for a list to be full.

    One read brings what is there: a line from a terminal or a slow pipe, all of a file. The first line decides the
    format: a header that holds `columns` (in any case) is that of a table, a brace begins JSON lines, a bracket a JSON
    list, and everything else is texts, one a line. `form`, one of `FORMATS`, overrides that. A row that is an object
    has the number that errors give it. `name` is what they call the stream.

    Raises:
        UserError: no rows, bytes that are no text, a record of a table or a JSON object that is broken.
    """
    lines = _Lines(stream, name)
    batch: list[Row] = []
    empty = True
    for row in _rows(lines, columns, form, header):
        batch.append(row)
        empty = False
        if len(batch) == size or lines.would_wait:
            yield batch
            batch = []
    if batch:
        yield batch
    if empty:
        raise UserError(f"{name} is empty: it holds no rows")


def _rows(lines: _Lines, columns: Sequence[str], form: str | None, header: str | None) -> Iterator[Row]:
    first = next((line for line in lines if line.strip()), "")
    said = SEPARATOR.fullmatch(first) if form in (None, "csv", "tsv") else None
    if said:
        first = next(lines, "")
    seen = form or _seen_format(first)
    delimiter = said[1] if said else _delimiter(lines.name, first, columns, seen, header)
    if delimiter is not None:
        found = records(itertools.chain([first], lines), delimiter, lines.name)
        yield from ({**row, ROW: number} for number, row in table_rows(found, lines.name, header))
    elif seen == "json":
        rows = checked(lines.name, objects(lines.name, first + "".join(lines)))
        yield from ({**row, ROW: number} for number, row in rows)
    else:
        for line in itertools.chain([first], lines):
            text = line.rstrip("\r\n")
            if text.strip():
                yield _object(lines, text, form) if seen == "jsonl" else _text(lines, text, form)


def _seen_format(first: str) -> str | None:
    """The format that the first line shows. None: a table if the line is its header, or else texts."""
    if first.lstrip().startswith("{"):
        return "jsonl"
    return "json" if re.match(r"\s*\[\s*({|$)", first) else None


def _object(lines: _Lines, text: str, form: str | None) -> Row:
    try:
        [(number, row)] = checked(lines.name, [(lines.count, parse_line(lines.name, lines.count, text))])
    except UserError as error:
        raise UserError(f"{error}{'' if form else '; --format lines takes each line as a text'}") from None
    return {**row, ROW: number}


def _text(lines: _Lines, text: str, form: str | None) -> Row:
    """A line as a text. Raises `UserError` for a line of JSON unless `form` asks for texts: the first line sets the
    format."""
    if form is None and re.match(r'\s*{\s*"', text):
        raise UserError(
            f"{lines.name}, line {lines.count}: this line looks like JSON, but the first line is a text; --format "
            "jsonl takes each line as JSON, --format lines as a text"
        )
    return text


def _delimiter(name: str, first: str, columns: Sequence[str], form: str | None, header: str | None) -> str | None:
    """What separates the cells of a table with this first line. None if it is not a table."""
    if form not in (None, "csv", "tsv"):
        return None
    headers = {mark: _cells(first, mark) for mark in (*DELIMITERS[form or "csv"], ALONE)}
    asked = {column.lower() for column in columns}
    found = (mark for mark, cells in headers.items() if len(cells) > 1 and asked and asked <= set(cells))
    if (delimiter := next(found, None)) is not None:
        return delimiter
    widest = max(headers, key=lambda mark: len(headers[mark]))
    if form is None and header == "none" and widest != ALONE and len(headers[widest]) > 1:
        raise UserError(
            f"{name}: {first.strip()[:40]!r} may be a row of a table without header, as in training, or a text: say "
            "which with --format csv or --format lines"
        )
    if form is None:
        return ALONE if asked and asked == set(headers[ALONE]) else None
    return widest


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return [cell.strip().lower() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


class _Lines:
    """The lines of a stream with their ends, as they come. `ready`: those that are there already, `count`: how many
    have been taken.

    The encoding is found out from what comes first, and where that was plain ASCII, from the first that is not. Of a
    stream that is a file, it is found out from all of it, as in `read_file`.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.stream, self.name, self.ready, self.count = stream, name, deque[str](), 0
        self._decoder: io.IncrementalNewlineDecoder | None = None
        self._rest, self._ended, self._ascii = "", False, True

    @property
    def would_wait(self) -> bool:
        """Whether the next record may have to be waited for: no line is there, or one that a quoted cell goes on
        behind."""
        return not self._ended and (not self.ready or self.ready[0].count('"') % 2 == 1)

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
        chunk = self._bytes()
        self._ended = not chunk
        if self._decoder is None:
            while 0 < len(chunk) < 4 and (more := self._bytes()):  # a mark of up to four bytes may begin it
                chunk += more
            self._decoder = self._new_decoder(chunk)
        state = self._decoder.getstate()[0]
        try:
            text = self._decoder.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            line = self.count + 1 + error.object.count(b"\n", 0, error.start)
            if not self._ascii:
                raise UserError(
                    f"{self.name}, line {line}: not {error.encoding}, unlike the rest of the file; save it as UTF-8"
                ) from None
            self._decoder = self._new_decoder(state + chunk)
            text = self._decoder.decode(state + chunk, final=self._ended)
        self._ascii = self._ascii and text.isascii()
        check_text(text, self.name, self.count + 1)
        *lines, self._rest = _split(self._rest + text)
        self.ready.extend(lines)
        if self._ended and self._rest:
            self.ready.append(self._rest)

    def _bytes(self) -> bytes:
        return self.stream.read() if self.stream.seekable() else self.stream.read1(CHUNK)  # type: ignore[attr-defined]

    def _new_decoder(self, data: bytes) -> io.IncrementalNewlineDecoder:
        """It keeps the first half of a Windows line end back until the other half comes."""
        encoding = encoding_of(data, self.name, whole=self._ended or self.stream.seekable())
        say_encoding(encoding, self.name)
        return io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=False)


def _split(text: str) -> list[str]:
    """The whole lines of a text, and the rest after them."""
    lines = [match[0] for match in LINE.finditer(text)]
    return lines if lines and not lines[-1].endswith(("\r", "\n")) else [*lines, ""]
