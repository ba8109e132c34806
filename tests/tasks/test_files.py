from __future__ import annotations

import datetime
import gzip
import io
import logging
from pathlib import Path

import openpyxl
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from helpers.data import ROWS, write, write_rows
from redpeft.errors import UserError
from redpeft.tasks.base import DataConfig
from redpeft.tasks.columns import ROW, column_names, where
from redpeft.tasks.data import read_splits
from redpeft.tasks.files import COMPRESSED, read_file


def error_of(path: str | Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        read_file(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows_of(dataset: Dataset) -> list[dict]:
    return [{name: row[name] for name in column_names(dataset)} for row in dataset]


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="redpeft")
    return caplog


@pytest.mark.parametrize("extension", ["csv", "tsv", "jsonl", "json", "parquet", "xlsx"])
def test_every_format_gives_the_same_rows_and_writes_nothing(tmp_path, extension):
    path = write_rows(tmp_path / f"rows.{extension}", ROWS)
    dataset = read_file(path)
    assert column_names(dataset) == ["text", "label"]
    assert [{key: row[key] for key in ("text", "label")} for row in dataset] == ROWS
    assert dataset[ROW] == list(range(1, 21))
    assert [file.name for file in tmp_path.iterdir()] == [f"rows.{extension}"]


@pytest.mark.parametrize(("extension", "codec"), [("csv", "gz"), ("jsonl", "bz2"), ("parquet", "gz"), ("csv", "zst")])
def test_a_compressed_file_is_its_content(tmp_path, extension, codec):
    plain = Path(write_rows(tmp_path / f"rows.{extension}", ROWS))
    packed = tmp_path / f"train.{extension}.{codec}"
    with pa.output_stream(str(packed), compression=COMPRESSED[f".{codec}"]) as stream:
        stream.write(plain.read_bytes())
    assert rows_of(read_file(packed)) == rows_of(read_file(plain))
    plain.unlink()
    assert "train" in read_splits(DataConfig(path=str(tmp_path)))


def test_json_lines_under_the_extension_json(tmp_path):
    assert read_file(write(tmp_path / "a.json", '{"text": "a"}\n{"text": "b"}\n'))["text"] == ["a", "b"]


def test_csv_keeps_words_that_look_like_missing_values(tmp_path):
    dataset = read_file(write(tmp_path / "a.csv", "text, label\nNone,NA\nnull,yes\n,no\nyes,\n"))
    assert dataset["text"] == ["None", "null", None, "yes"]
    assert dataset["label"] == ["NA", "yes", "no", None]


def test_rows_without_any_text_are_passed_over_and_counted(tmp_path, said):
    """As Excel writes them below a table."""
    dataset = read_file(write(tmp_path / "a.csv", "\n ,\ntext,label\na,x\n,\n  \nb,y\n,\n"))
    assert (dataset["text"], dataset[ROW]) == (["a", "b"], [1, 4])
    assert "a.csv: 3 rows without any text are skipped" in said.text


@pytest.mark.parametrize("cell", ["007", "1E3", "1.10", "2020-01-01", "NaN", "nan", "null", "True", "1,5", "1e400"])
def test_a_cell_is_the_text_as_it_is_written(tmp_path, cell):
    path = write(tmp_path / "a.csv", f'text,label\n1,1\n"{cell}","{cell}"\n')
    assert read_file(path)["label"] == ["1", cell]
    assert read_file(path)["text"] == ["1", cell]


def test_json_fields_may_be_missing_in_some_rows_and_dates_stay_text(tmp_path):
    dataset = read_file(write(tmp_path / "a.jsonl", '{"a": "2020-01-01"}\n\n{"a": "2021-01-01", "b": 1}\n'))
    assert dataset["a"] == ["2020-01-01", "2021-01-01"]
    assert dataset["b"] == [None, 1]


def test_fields_within_fields_have_dotted_names(tmp_path):
    rows = [{"message": {"body": "hello", "from": {"name": "ann"}}, "chat": [{"role": "user", "content": "x"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", '{"message": {"body": "hello", "from": {"name": "ann"}}, "chat": '
          '[{"role": "user", "content": "x"}]}\n')  # fmt: skip
    for name in ("a.parquet", "a.jsonl"):
        dataset = read_file(tmp_path / name)
        assert (dataset["message.body"], dataset["message.from.name"]) == (["hello"], ["ann"])
        assert dataset["chat"] == [[{"role": "user", "content": "x"}]]


# --- tables as people have them --------------------------------------------------------------------------------------

TWO = [{"text": "hello, w1", "label": "good"}, {"text": "bad; w2", "label": "bad"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text;label\nhello, w1;good\n"bad; w2";bad\n'),
        ("a.csv", "text\tlabel\nhello, w1\tgood\nbad; w2\tbad\n"),
        ("a.csv", "text|label\nhello, w1|good\nbad; w2|bad\n"),
        ("a.csv", '\ufefftext,label\r\n"hello, w1",good\r\nbad; w2,bad\r\n'),
        ("a.csv", 'text,label\r"hello, w1",good\rbad; w2,bad\r'),
        ("a.csv", 'text,label\n"hello, w1",good\n\nbad; w2,bad'),
        ("a.tsv", 'text,label\n"hello, w1",good\nbad; w2,bad\n'),
        ("a.tsv", "text\tlabel\nhello, w1\tgood\nbad; w2\tbad\n"),
    ],
    ids=["semicolons", "tabs", "bars", "mark and CRLF", "old Mac", "no last line end", "commas in TSV", "TSV"],
)
def test_separators_and_line_ends(tmp_path, said, name, content):
    assert rows_of(read_file(write(tmp_path / name, content.encode()))) == TWO
    other = (name == "a.csv" and "text,label" not in content) or (name == "a.tsv" and "\t" not in content)
    assert ("its cells are separated by" in said.text) == other


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "déjà vu, très bien, café crème à l'hôtel"),
        ("latin-1", "Grüße aus München, schöne Straße"),
        ("utf-16", "naïve"),
        ("utf-16-le", "text without a mark"),
        ("utf-16-be", "text without a mark"),
        ("utf-8-sig", "naïve"),
        ("cp1251", "Привет, как дела? Это очень хороший день для всех нас"),
        ("shift_jis", "これは日本語の文章です。とても良い天気ですね。"),
    ],
)
@pytest.mark.parametrize("extension", ["csv", "jsonl"])
def test_encodings_are_found_out_and_said(tmp_path, said, encoding, text, extension):
    content = f'text;label\n"{text}";a\n"{text} 2";b\n' if extension == "csv" else f'{{"text": "{text}"}}\n'
    path = write(tmp_path / f"a.{extension}", content.encode(encoding))
    assert read_file(path)["text"][0] == text
    assert ("is not UTF-8; it is read as" in said.text) == (encoding != "utf-8-sig")


def test_one_foreign_character_far_down_is_seen(tmp_path, said):
    content = "text,label\n" + "plain,a\n" * 40_000 + "c'est très bon,b"
    path = write(tmp_path / "a.csv", content.encode("cp1252"))
    assert read_file(path)["text"][-1] == "c'est très bon"
    assert "a.csv is not UTF-8; it is read as windows-1252" in said.text
    path = write(tmp_path / "b.csv", "text,label\ngood,café".encode("latin-1"))
    assert read_file(path)["label"] == ["café"]
    assert "b.csv is not UTF-8; it is read as windows-1252" in said.text


def test_a_file_that_is_utf8_but_for_a_line(tmp_path):
    content = "text\ncafé\nnaïve\n".encode() + "déjà\n".encode("latin-1") + b"end\n"
    assert "a.csv, line 4: not UTF-8, unlike the rest of the file; save it as UTF-8" in error_of(
        write(tmp_path / "a.csv", content)
    )


def test_the_line_that_tells_excel_the_separator(tmp_path):
    path = write(tmp_path / "a.csv", 'sep=;\r\ntext;label\r\nhello, w1;good\r\n"bad; w2";bad\r\n')
    assert rows_of(read_file(path)) == TWO


def test_a_table_of_one_column_may_hold_separators(tmp_path):
    path = write(tmp_path / "a.csv", 'text\nhello, you\n"quoted, too"\nnothing\n')
    assert read_file(path)["text"] == ["hello, you", "quoted, too", "nothing"]


def test_quoted_cells_may_hold_line_ends_and_quotes(tmp_path):
    path = write(tmp_path / "a.csv", b'text,label\r\n"two\r\nlines, ""quoted""",a\r\nit is 5" long,b\r\n')
    assert read_file(path)["text"] == ['two\r\nlines, "quoted"', 'it is 5" long']


def test_a_column_without_a_name_gets_one(tmp_path):
    assert column_names(read_file(write(tmp_path / "a.csv", ",text,label\n0,a,b\n1,c,d\n"))) == [
        "Unnamed: 0",
        "text",
        "label",
    ]


def test_a_table_without_a_header(tmp_path):
    path = write(tmp_path / "a.csv", "hello there,good\nbad stuff,bad\nso bad,bad\nwell,good\nfine,good\n")
    message = error_of(path)
    assert "a.csv: its first row looks like data, not like column names: it holds 'good'" in message
    assert "data.header=none takes it as a row, data.header=first as names" in message
    assert read_file(path, header="none")["column_1"][0] == "hello there"
    assert len(read_file(path, header="first")) == 4
    splits = read_splits(DataConfig(path=str(path), header="none", validation_fraction=0.5))
    assert sum(map(len, splits.values())) == 5
    for first in ("0.5,text", "an opinion that somebody wrote down in many words more than a name has,b"):
        assert "looks like data" in error_of(write(tmp_path / "b.csv", f"{first}\n1,a\n2,c\n"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,b\na,b,c\n", 'a.csv, row 2: it has 3 cells, but the first row has 2; a text that holds the'),
        ("text,label\na\n", "a.csv, row 1: it has 1 cell, but the first row has 2"),
        ("text,label\na,b\ntext,label\nc,d\n", "a.csv, row 2: it repeats the first row. Remove that line, or"),
        ("text, label\na,b\n text,label\nc,d\n", "a.csv, row 2: it repeats the first row."),
        ("hello,x\nbad,y\nhello,x\n", "row 2: it repeats the first row. Remove that line, or give data.header=none"),
        ("text,label,label\na,b,c\n", "a.csv: two columns are called 'label': rename or remove one"),
        ('text,label\na,b\n"c,d\ne,f\n', "a.csv, row 2: a quotation mark is never closed"),
        ('text,label\n"a" b,c\n', "a.csv, row 1: a quoted cell continues after its closing quotation mark"),
        ('text\tlabel\n"a" b\tc\n', "a.csv, row 1: a quoted cell continues after its closing quotation mark"),
    ],
)  # fmt: skip
def test_a_broken_table_names_the_row(tmp_path, content, message):
    assert message in error_of(write(tmp_path / "a.csv", content))


def test_a_workbook_is_read_as_a_person_sees_it(tmp_path, said):
    book = openpyxl.Workbook()
    for row in (
        ["text", "label", None],
        ["hello", 7, None],
        [None, None, None],
        ["007", 2.5, None],
        [1.0, "NA", None],
    ):
        book.active.append(row)
    book.create_sheet("more")
    book.save(tmp_path / "a.xlsx")
    dataset = read_file(tmp_path / "a.xlsx")
    assert rows_of(dataset) == [
        {"text": "hello", "label": "7"},
        {"text": "007", "label": "2.5"},
        {"text": "1", "label": "NA"},
    ]
    assert "has 2 sheets; the first one, 'Sheet', is read" in said.text


def test_numbers_and_dates_of_a_workbook(tmp_path):
    book = openpyxl.Workbook()
    cells = [(7, "000"), (451, "000"), (1.1, "0.00"), (2, "0.00"), (datetime.datetime(2020, 1, 2), "yyyy-mm-dd")]
    cells += [(datetime.datetime(2020, 1, 2, 3, 4), "yyyy-mm-dd hh:mm"), (True, "General"), (0.5, "General")]
    for row, (value, form) in enumerate([("code", "General"), *cells], start=1):
        book.active.cell(row, 1, value).number_format = form
    book.save(tmp_path / "a.xlsx")
    expected = ["007", "451", "1.10", "2.00", "2020-01-02", "2020-01-02 03:04:00", "TRUE", "0.5"]
    assert read_file(tmp_path / "a.xlsx")["code"] == expected
    book.active.cell(3, 1, "#DIV/0!")
    book.save(tmp_path / "a.xlsx")
    assert "a.xlsx, cell A3: it holds the error #DIV/0!; fix its formula" in error_of(tmp_path / "a.xlsx")


def test_categories_of_parquet_are_texts(tmp_path):
    pd.DataFrame({"text": ["a", "b"], "label": pd.Categorical(["x", "y"])}).to_parquet(tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet")["label"] == ["x", "y"]


def test_a_format_that_is_named_overrides_the_extension(tmp_path):
    assert read_file(write(tmp_path / "a.dat", "text;label\na;b\nc;d\n"), form="csv")["label"] == ["b", "d"]


# --- folders ---------------------------------------------------------------------------------------------------------


def test_folders_that_save_to_disk_wrote(tmp_path):
    both = DatasetDict(train=Dataset.from_list(TWO), test=Dataset.from_list(TWO[:1]))
    both.save_to_disk(str(tmp_path / "both"))
    both["train"].save_to_disk(str(tmp_path / "one"))
    splits = read_splits(DataConfig(path=str(tmp_path / "both"), validation_fraction=0.5))
    assert rows_of(splits["test"]) == TWO[:1]
    assert "label" in column_names(read_splits(DataConfig(path=str(tmp_path / "one")))["train"])


@pytest.mark.parametrize("split", ["", "train"])
def test_a_folder_of_texts_for_each_class(tmp_path, split):
    for name, texts in {"pos": ["good one", "a good\ntwo"], "neg": ["bad", "worse"]}.items():
        for number, text in enumerate(texts):
            (folder := tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            write(folder / f"{number}.txt", text)
    splits = read_splits(DataConfig(path=str(tmp_path), validation_fraction=0.25))
    rows = sorted(row["label"] + ": " + row["text"] for name in splits for row in splits[name])
    assert rows == ["neg: bad", "neg: worse", "pos: a good\ntwo", "pos: good one"]


def test_texts_in_files_are_named_and_share_their_encoding(tmp_path, said):
    texts = {"pos": ["el niño comió una piña", "plain"], "neg": ["el señor está enojado", " "]}
    for name, found in texts.items():
        (tmp_path / name).mkdir()
        for number, text in enumerate(found):
            write(tmp_path / name / f"{number}.txt", text.encode("cp1252"))
    train = read_splits(DataConfig(path=str(tmp_path)))["train"]
    assert set(train["text"]) == {text for found in texts.values() for text in found}
    assert said.text.count("is not UTF-8; it is read as windows-1252") == 1
    assert where(train, train["text"].index(" ")) == f"{tmp_path.name}, row neg/1.txt"


# --- what is no data -------------------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    assert error_of(tmp_path / "none.csv") == f"no such file: {tmp_path / 'none.csv'}"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet"])
def test_empty_file(tmp_path, name):
    assert "is empty: it holds no rows" in error_of(write(tmp_path / name, ""))


@pytest.mark.parametrize(("name", "content"), [("a.csv", "text,label\n"), ("a.jsonl", "\n\n"), ("a.json", "[]")])
def test_file_without_rows(tmp_path, name, content):
    assert "is empty: it holds no rows" in error_of(write(tmp_path / name, content))


def test_unknown_extension(tmp_path):
    message = error_of(write(tmp_path / "rows.doc", "x"))
    assert "rows.doc" in message
    assert ".csv, .tsv, .jsonl, .ndjson, .json, .parquet, .xlsx" in message


def workbook() -> bytes:
    openpyxl.Workbook().save(out := io.BytesIO())
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", workbook(), "a.csv is not a text file: it is an Excel workbook or another zip archive (.xlsx)"),
        ("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1", "an old or encrypted Excel workbook: save it as .xlsx"),
        ("a.csv", b"<!DOCTYPE html><html>", "a.csv is not a text file: it is a web page or XML"),
        ("a.csv", b"\n <?xml version='1.0'?>", "it is a web page or XML: download the data itself"),
        ("a.csv", gzip.compress(b"text,label\n", mtime=0), "a.csv is not a text file: it is compressed (.gz)"),
        ("a.jsonl", b"PAR1....", "a.jsonl is not a text file: it is a parquet file (.parquet)"),
        ("a.csv", b"text,label\na\0b,c\n", "a.csv, line 2: it holds NUL bytes: the file is damaged or not a text"),
        ("a.jsonl", b'{"a": 1}\n' * 99 + b'{"a": "\0"}', "a.jsonl, line 100: it holds NUL bytes"),
        ("a.csv", b'{"text": "a"}\n', "a.csv holds JSON, not a table: rename it to .jsonl"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid 1\n", "it is a pointer of Git LFS"),
        ("a.xlsx", b"text,label\n", "a.xlsx: it is not an Excel workbook"),
        ("a.csv.gz", b"text,label\n", "cannot read"),
        ("a.csv", b"\xff\xfet\0\x00\xd8", "a.csv, line 1: not utf-16, unlike the rest of the file; save it as UTF-8"),
    ],
)
def test_another_kind_of_file_is_called_by_its_name(tmp_path, name, content, message):
    assert message in error_of(write(tmp_path / name, content))


def test_broken_json_line(tmp_path):
    message = error_of(write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"\n{"text": "c"}\n'))
    assert "a.jsonl, line 2: broken JSON" in message


def test_broken_json_list(tmp_path):
    assert "a.json, line 3: broken JSON" in error_of(write(tmp_path / "a.json", '[{"text": "a"},\n{"text": "b"}\n{}]'))


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("rows.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', "line 2"),
        ("chats.jsonl", '{"messages": [{"role": "user", "role": "system"}]}', None),
        ("rows.json", '[{"text": "a"}, {"text": "b", "text": "c"}]', None),
    ],
)
def test_json_with_a_key_twice(tmp_path, name, content, place):
    path = write(tmp_path / name, content)
    key = "role" if "role" in content else "text"
    where = f"{path}, {place}" if place else path
    assert error_of(path) == f"{where}: an object has the key {key!r} twice: rename or remove one"


def test_json_that_is_no_object(tmp_path):
    assert "a.jsonl, row 2: expected an object" in error_of(write(tmp_path / "a.jsonl", '{"text": "a"}\n"b"\n'))


def test_json_column_of_several_types(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "label": 1}\n\n{"text": "b", "label": "x"}\n')
    assert error_of(path) == (
        "a.jsonl, row 3: column 'label' holds a text, 'x', and a number in row 1: write values of one kind"
    )


def test_half_a_character_is_no_text(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}\n')
    assert "a.jsonl, row 2: column 'text': 'utf-8' codec can't encode character '\\ud83d'" in error_of(path)


def test_broken_parquet(tmp_path):
    assert "cannot read" in error_of(write(tmp_path / "a.parquet", "PAR1 and no more"))
