from __future__ import annotations

from pathlib import Path

import pytest
from writing import ROWS, write, write_rows

from redpeft.errors import UserError
from redpeft.tasks.columns import ROW, column_names
from redpeft.tasks.files import read_file


def error_of(path: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        read_file(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("extension", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_format_gives_the_same_rows_and_writes_nothing(tmp_path, extension):
    path = write_rows(tmp_path / f"rows.{extension}", ROWS)
    dataset = read_file(path)
    assert column_names(dataset) == ["text", "label"]
    assert [{key: row[key] for key in ("text", "label")} for row in dataset] == ROWS
    assert dataset[ROW] == list(range(1, 21))
    assert [file.name for file in tmp_path.iterdir()] == [f"rows.{extension}"]


def test_json_lines_under_the_extension_json(tmp_path):
    assert read_file(write(tmp_path / "a.json", '{"text": "a"}\n{"text": "b"}\n'))["text"] == ["a", "b"]


def test_csv_keeps_words_that_look_like_missing_values(tmp_path):
    dataset = read_file(write(tmp_path / "a.csv", "text, label\nNone,NA\nnull,yes\n,\n"))
    assert dataset["text"] == ["None", "null", None]
    assert dataset["label"] == ["NA", "yes", None]


@pytest.mark.parametrize("cell", ["007", "1E3", "1.10", "2020-01-01", "NaN", "nan", "null", "True", "1,5", "1e400"])
def test_a_cell_is_the_text_as_it_is_written(tmp_path, cell):
    path = write(tmp_path / "a.csv", f'text,label\n1,1\n"{cell}","{cell}"\n')
    assert read_file(path)["label"] == ["1", cell]
    assert read_file(path)["text"] == ["1", cell]


def test_json_fields_may_be_missing_in_some_rows_and_dates_stay_text(tmp_path):
    dataset = read_file(write(tmp_path / "a.jsonl", '{"a": "2020-01-01"}\n\n{"a": "2021-01-01", "b": 1}\n'))
    assert dataset["a"] == ["2020-01-01", "2021-01-01"]
    assert dataset["b"] == [None, 1]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    assert column_names(read_file(write(tmp_path / "a.csv", "\ufefftext,label\na,b\n"))) == ["text", "label"]


def test_missing_file(tmp_path):
    assert error_of(tmp_path / "none.csv") == f"no such file: {tmp_path / 'none.csv'}"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet"])
def test_empty_file(tmp_path, name):
    assert "is empty: it holds no rows" in error_of(write(tmp_path / name, ""))


@pytest.mark.parametrize(("name", "content"), [("a.csv", "text,label\n"), ("a.jsonl", "\n\n"), ("a.json", "[]")])
def test_file_without_rows(tmp_path, name, content):
    assert "is empty: it holds no rows" in error_of(write(tmp_path / name, content))


def test_unknown_extension(tmp_path):
    message = error_of(write(tmp_path / "rows.xlsx", "x"))
    assert "rows.xlsx" in message
    assert ".csv, .tsv, .jsonl, .json, .parquet" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "text,label\ngood,1\ncafé,2\n"), ("a.jsonl", '{"text": "a"}\n\n{"text": "café"}\n')],
)
def test_not_utf8_names_line_and_byte(tmp_path, name, content):
    raw = content.encode("latin-1")
    message = error_of(write(tmp_path / name, raw))
    assert f"is not UTF-8: byte 0xe9 at position {raw.index(0xE9)}, line 3" in message


def test_broken_json_line(tmp_path):
    message = error_of(write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"\n{"text": "c"}\n'))
    assert "a.jsonl, line 2: broken JSON" in message


def test_broken_json_list(tmp_path):
    assert "a.json, line 3: broken JSON" in error_of(write(tmp_path / "a.json", '[{"text": "a"},\n{"text": "b"}\n{}]'))


def test_json_that_is_no_object(tmp_path):
    assert "a.jsonl, row 2: expected an object" in error_of(write(tmp_path / "a.jsonl", '{"text": "a"}\n"b"\n'))


def test_json_column_of_several_types(tmp_path):
    message = error_of(write(tmp_path / "a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n'))
    assert "column 'label' holds values of several types" in message


def test_csv_with_more_fields_than_the_header(tmp_path):
    assert "Expected 2 fields in line 3, saw 3" in error_of(write(tmp_path / "a.csv", "text,label\na,b\na,b,c\n"))
    assert "more fields than the header" in error_of(write(tmp_path / "a.csv", "text,label\na,b,c\na,b,c\n"))


def test_broken_parquet(tmp_path):
    assert "cannot read" in error_of(write(tmp_path / "a.parquet", "PAR1 and no more"))
