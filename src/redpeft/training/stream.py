"""Rows that come in while others are answered: lines of standard input, in batches as large as has come so far."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from redpeft.errors import UserError
from redpeft.tasks.columns import ROW

Row = dict[str, Any] | str
CHUNK = 1 << 16


def batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """The rows in lists of `size`, the last one with what is left."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch


def read_lines(stream: BinaryIO, size: int) -> Iterator[list[Row]]:
    """The rows of a stream in lists of at most `size`, with no waiting for a list to be full.

    One read brings what is there: a line from a terminal or a slow pipe, thousands from a file. A row is a JSON
    object, which keeps the number of its line for errors, or a line of plain text; empty lines are passed over.

    Raises:
        UserError: a line that is not UTF-8, or begins with a brace and is not JSON.
    """
    numbers, rest = itertools.count(1), b""
    while chunk := stream.read1(CHUNK):  # type: ignore[attr-defined]
        *lines, rest = (rest + chunk).split(b"\n")
        yield from batched(_parse(lines, numbers), size)
    yield from batched(_parse([rest], numbers), size)


def _parse(lines: Iterable[bytes], numbers: Iterator[int]) -> Iterator[Row]:
    for line, number in zip(lines, numbers, strict=False):
        try:
            text = line.decode("utf-8").rstrip("\r")
            if text.lstrip().startswith("{"):
                yield {**json.loads(text), ROW: number}
            elif text.strip():
                yield text
        except UnicodeDecodeError:
            raise UserError(f"line {number} of standard input is not UTF-8; save it as UTF-8") from None
        except ValueError as error:
            raise UserError(f"line {number} of standard input is broken JSON ({error})") from None
