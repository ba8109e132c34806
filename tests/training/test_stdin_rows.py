from __future__ import annotations

import io
import os

import pytest

from redpeft.errors import UserError
from redpeft.tasks.columns import ROW
from redpeft.tasks.files import read_file
from redpeft.training.stdin_rows import batched, read_stream


@pytest.fixture
def pipe():
    """The two ends of a pipe: a function that writes bytes, and the stream that reads them."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream, os.fdopen(writing, "wb", buffering=0) as end:
        yield end.write, stream


class Pipe(io.BytesIO):
    """A stream that cannot be read whole, and brings a few bytes at a time."""

    def seekable(self):
        return False

    def read1(self, size=-1):
        return super().read1(7)


def of(text):
    return io.BytesIO(text if isinstance(text, bytes) else text.encode())


def rows(stream, *columns, **options):
    return [row for batch in read_stream(stream, 32, columns, **options) for row in batch]


@pytest.mark.timeout(60)
def test_lines_are_answered_as_they_come(pipe):
    """Nothing here waits for the writer, who has not come to the end."""
    write, stream = pipe
    batches = read_stream(stream, 32, ["text"])
    write(b"one\n")
    assert next(batches) == ["one"]
    write(b"two\nthree\nfo")
    assert next(batches) == ["two", "three"]
    write(b"ur\n")
    assert next(batches) == ["four"]


@pytest.mark.timeout(60)
def test_records_of_a_table_are_answered_as_they_come(pipe):
    write, stream = pipe
    batches = read_stream(stream, 32, ["text"])
    write(b"id,text\n1,one\n")
    assert next(batches) == [{"id": "1", "text": "one", ROW: 1}]
    write(b'2,"two,\nstill two"\n3,thr')
    assert next(batches) == [{"id": "2", "text": "two,\nstill two", ROW: 2}]
    write(b'ee\n4,"begun\n')
    assert next(batches) == [{"id": "3", "text": "three", ROW: 3}]  # and does not wait for the end of the fourth
    write(b'and ended"\n')
    assert next(batches) == [{"id": "4", "text": "begun\nand ended", ROW: 4}]


def test_a_fast_source_fills_its_batches():
    text = "".join(f"line {number}\n" for number in range(1000)) + "the end"
    sizes = [len(batch) for batch in read_stream(of(text), 32)]
    assert sum(sizes) == 1001
    assert sizes.count(32) >= 1000 // 32
    assert rows(of(text)) == rows(Pipe(text.encode())) == text.split("\n")


def test_objects_keep_the_number_of_their_line():
    text = '\n{"text": "é"}\r\n \n{"text": "b"}\n'
    for stream in (of(text), Pipe(text.encode())):
        assert rows(stream, "text") == [{"text": "é", ROW: 2}, {"text": "b", ROW: 4}]
    assert rows(of("\n  plain, with blanks \r\n{name} is here\n")) == ["  plain, with blanks ", "{name} is here"]


TABLES = {
    "commas": 'id,text\n1,"hello, ""you"""\n2,bad\n',
    "quoted line ends": 'text,id\r\n"two\r\nlines",1\r\nbad,2\r\n',
    "semicolons": "text;label\nhello, you;good\nbad;bad",
    "tabs": "id\ttext\n1\thello, you\n",
    "an old Mac": "id,text\r1,hello\r2,bad\r",
    "one column": 'text\nhello, you\n"quoted, too"\n',
    "missing cells": "id,text\n,hello\n2,NA\n",
    "a line for Excel": "sep=;\nid;text\n1;hello, you\n",
    "empty rows": "id,text\n1,a\n,\n2,b\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_gives_what_its_file_gives(tmp_path, name, encoding):
    content = TABLES[name].encode(encoding)
    (tmp_path / "a.csv").write_bytes(content)
    expected = list(read_file(tmp_path / "a.csv"))
    assert rows(of(content), "text") == expected
    assert rows(Pipe(content), "text") == expected


def test_other_encodings_are_found_out():
    text = "très bien\nun café crème\ndéjà vu à l'hôtel\n".encode("cp1252")
    assert rows(of(text)) == ["très bien", "un café crème", "déjà vu à l'hôtel"]
    assert rows(Pipe(b"only later\n" * 3 + text))[:3] == ["only later"] * 3
    with pytest.raises(UserError, match="standard input, line 2: not utf-8, unlike the rest of the file"):
        rows(Pipe("tschüß, naïve\n".encode() + "très\n".encode("cp1252")))
    assert rows(Pipe("a\nb".encode("utf-16"))) == ["a", "b"]
    assert rows(Pipe("only at the end: é".encode("cp1252"))) == ["only at the end: é"]
    characters = "日本語 é 😀\n" * 3
    assert rows(Pipe(characters.encode())) == characters.split("\n")[:-1]  # cut within characters


@pytest.mark.parametrize(
    ("text", "columns", "expected"),
    [
        ("hello, you\nbad, too\n", ["text"], ["hello, you", "bad, too"]),
        ("message,label\nhello\n", ["text"], ["message,label", "hello"]),
        ("text,label\nhello,x\n", ["text", "other"], ["text,label", "hello,x"]),
        ("[sarcasm] great\n", ["text"], ["[sarcasm] great"]),
        ('[{"text": "a"},\n {"text": "b"}]', ["text"], [{"text": "a", ROW: 1}, {"text": "b", ROW: 2}]),
        ("Text,id\nhello,1\n", ["text"], [{"Text": "hello", "id": "1", ROW: 1}]),
    ],
)
def test_the_first_line_decides(text, columns, expected):
    assert rows(of(text), *columns) == expected


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("text,label\nhello,x\n", {"form": "lines"}, ["text,label", "hello,x"]),
        ('{"text": "a"}\n', {"form": "lines"}, ['{"text": "a"}']),
        ("a;b\nhello, you;x\n", {"form": "csv"}, [{"a": "hello, you", "b": "x", ROW: 1}]),
        ("a,b\tc\nd\te\n", {"form": "tsv"}, [{"a,b": "d", "c": "e", ROW: 1}]),
        ("hello,x\n", {"form": "csv", "header": "none"}, [{"column_1": "hello", "column_2": "x", ROW: 1}]),
    ],
)
def test_a_format_that_is_named_decides(text, options, expected):
    assert rows(of(text), "text", **options) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "^standard input is empty: it holds no rows"),
        ("id,text\n", "^standard input is empty: it holds no rows"),
        ('good\n\n{"text": \n', "^standard input, line 3: this line looks like JSON, but the first line is a text"),
        ('{"text": "a"}\n{"text": \n', "^standard input, line 2: broken JSON .*; --format lines takes each line"),
        ("{name} is here\n", "^standard input, line 1: broken JSON .*; --format lines takes each line as a text"),
        ('[{"text": "a"},\n', "^standard input, line 2: broken JSON"),
        ("[\n1, 2]", "^standard input, row 1: expected an object .* found '1'"),
        ("hello\n" * 99 + "b\0d\n", "^standard input, line 100: it holds NUL bytes"),
        ('id,text\n1,a\n2,b,c\n', "^standard input, row 2: it has 3 cells, but the first row has 2"),
        ('id,text\n1,"a\n2,b\n', "^standard input, row 1: a quotation mark is never closed"),
        ("id,text\n1,a\nid,text\n", "^standard input, row 2: it repeats the first row"),
        (b"PK\x03\x04....", "^standard input is not a text file: it is an Excel workbook"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [of, lambda text: Pipe(text if isinstance(text, bytes) else text.encode())])
def test_what_cannot_be_read(text, message, kind):
    with pytest.raises(UserError, match=message) as caught:
        rows(kind(text), "text")
    assert "\n" not in str(caught.value)


def test_json_lines_that_are_asked_for_are_objects():
    with pytest.raises(UserError, match=r"^standard input, line 2: broken JSON \(.*\)$"):
        rows(of('{"text": "a"}\nplain\n'), "text", form="jsonl")


def test_a_run_of_a_table_without_header_asks_which():
    """The file is a table by its extension; of a stream nothing tells a row of it from a text with commas."""
    options = {"header": "none"}
    with pytest.raises(UserError, match="'hello, you' may be a row of a table without header, as in training, or a t"):
        rows(of("hello, you\n"), "column_1", **options)
    assert rows(of("hello you\n"), "column_1", **options) == ["hello you"]
    assert rows(of("hello, you\n"), "column_1", form="lines", **options) == ["hello, you"]


def test_batched():
    assert list(batched(iter("abcde"), 2)) == [["a", "b"], ["c", "d"], ["e"]]
