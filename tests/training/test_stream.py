from __future__ import annotations

import io
import os

import pytest

from redpeft.errors import UserError
from redpeft.tasks.columns import ROW
from redpeft.training.stream import batched, read_lines


@pytest.fixture
def pipe():
    """The two ends of a pipe: a function that writes bytes, and the stream that reads them."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream, os.fdopen(writing, "wb", buffering=0) as end:
        yield end.write, stream


def of(text):
    return io.BytesIO(text if isinstance(text, bytes) else text.encode())


@pytest.mark.timeout(60)
def test_lines_are_answered_as_they_come(pipe):
    """Nothing here waits for the writer, who has not come to the end."""
    write, stream = pipe
    batches = read_lines(stream, 32)
    write(b"one\n")
    assert next(batches) == ["one"]
    write(b"two\nthree\nfo")
    assert next(batches) == ["two", "three"]
    write(b"ur\n")
    assert next(batches) == ["four"]


def test_a_fast_source_fills_its_batches():
    text = "".join(f"line {number}\n" for number in range(1000)) + "the end"
    sizes = [len(batch) for batch in read_lines(of(text), 32)]
    assert sum(sizes) == 1001
    assert sizes.count(32) >= 1000 // 32
    assert [row for batch in read_lines(of(text), 7) for row in batch] == text.split("\n")


def test_objects_keep_the_number_of_their_line():
    [batch] = read_lines(of('\n{"text": "é"}\r\n \n  plain, with blanks \n'), 32)
    assert batch == [{"text": "é", ROW: 2}, "  plain, with blanks "]
    assert list(read_lines(of(""), 32)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('good\n\n{"text": \n', r"^line 3 of standard input is broken JSON \("),
        ("good\nnext\ncafé\n".encode("latin-1"), "^line 3 of standard input is not UTF-8"),
        (b"good\nnext\n\xff", "^line 3 of standard input is not UTF-8"),
    ],
)
def test_what_cannot_be_read(text, message):
    with pytest.raises(UserError, match=message) as caught:
        list(read_lines(of(text), 1))
    assert "\n" not in str(caught.value)


def test_batched():
    assert list(batched(iter("abcde"), 2)) == [["a", "b"], ["c", "d"], ["e"]]
