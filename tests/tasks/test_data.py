from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from pydantic import ValidationError

from redpeft.errors import UserError
from redpeft.tasks import data as data_module
from redpeft.tasks.columns import ROW, column_names, where
from redpeft.tasks.data import DataConfig, is_local, read_evaluation, read_file, read_splits

ROWS = [{"text": "a good film, really", "label": "good"}, {"text": 'a "bad" film', "label": "bad"}] * 10


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_rows(path: Path, rows: list[dict]) -> str:
    frame = pd.DataFrame(rows)
    writers = {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        ".jsonl": lambda: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
        ".json": lambda: path.write_text(json.dumps(rows)),
        ".parquet": lambda: frame.to_parquet(path, index=False),
    }
    writers[path.suffix]()
    return str(path)


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


def test_csv_infers_types_over_the_whole_column(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\n" + "".join(f"{i},{i}\n" for i in range(15_000)) + "many words,0\n")
    dataset = read_file(path)
    assert dataset[0]["text"] == "0"
    assert dataset[15_000]["label"] == 0


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


def test_folder_with_splits_under_their_usual_names(tmp_path):
    write_rows(tmp_path / "Train.csv", ROWS)
    write_rows(tmp_path / "dev.jsonl", ROWS[:4])
    write_rows(tmp_path / "test.tsv", ROWS[:2])
    (tmp_path / "README.md").write_text("notes")
    splits = read_splits(DataConfig(path=str(tmp_path)))
    assert {name: len(split) for name, split in splits.items()} == {"train": 20, "validation": 4, "test": 2}
    assert where(splits["validation"], 2) == "dev.jsonl, row 3"


def test_files_that_are_named_go_before_the_folder(tmp_path):
    for name in ("train", "validation", "other"):
        write_rows(tmp_path / f"{name}.csv", ROWS[: len(name)])
    splits = read_splits(
        DataConfig(path=str(tmp_path), validation=str(tmp_path / "train.csv"), test=str(tmp_path / "other.csv"))
    )
    assert {name: len(split) for name, split in splits.items()} == {"train": 5, "validation": 5, "test": 5}
    assert splits["validation"].info.description == "train.csv"


def test_folder_errors(tmp_path):
    config = DataConfig(path=str(tmp_path))
    write_rows(tmp_path / "rows.csv", ROWS)
    with pytest.raises(UserError, match=r"holds no train, validation or test file .* it holds rows.csv"):
        read_splits(config)
    write_rows(tmp_path / "test.csv", ROWS)
    with pytest.raises(UserError, match="has no training split; it has test"):
        read_splits(config)
    write_rows(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(UserError, match=r"holds both test.csv and test.jsonl: remove one"):
        read_splits(config)


@pytest.mark.parametrize("name", ["none.csv", "./none", "data/none.csv", "a/b/c", "/none", "~/none"])
def test_no_such_file_or_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^no such file or folder: {name}$"):
        read_splits(DataConfig(path=name))


def test_a_missing_file_in_a_folder_that_exists_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_local("owner/rows")
    (tmp_path / "owner").mkdir()
    assert is_local("owner/rows")


def test_hub_splits_and_errors(monkeypatch):
    rows = Dataset.from_dict({"sentence": ["a", "b"] * 4, "label": [0, 1] * 4})
    unlabelled = Dataset.from_dict({"sentence": ["a"], "label": [-1]}).cast_column(
        "label", ClassLabel(names=["n", "p"])
    )
    found = DatasetDict(train=rows, validation_matched=rows.select(range(4)), test=unlabelled)
    asked = []
    monkeypatch.setattr(data_module, "load_dataset", lambda *names: asked.append(names) or found)
    splits = read_splits(DataConfig(path="owner/rows", config_name="mnli"))
    assert asked == [("owner/rows", "mnli")]
    assert {name: len(split) for name, split in splits.items()} == {"train": 8, "validation": 4}  # test has no labels
    assert where(splits["train"], 6) == "owner/rows (train), row 7"
    assert len(read_evaluation("owner/rows")) == 4

    def offline(*names):
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(data_module, "load_dataset", offline)
    with pytest.raises(UserError) as caught:
        read_splits(DataConfig(path="owner/rows"))
    assert str(caught.value) == (
        "no file or folder 'owner/rows', and not read from the Hugging Face hub: Couldn't reach the Hub"
    )


def test_validation_rows_are_taken_from_training_by_class_and_said_so(tmp_path, caplog):
    rows = [
        {"text": f"row {i}", "label": "rare" if i in (3, 33) else "once" if i == 7 else "ab"[i % 2]}
        for i in range(100)
    ]
    path = write_rows(tmp_path / "rows.csv", rows)
    with caplog.at_level(logging.INFO):
        splits = read_splits(DataConfig(path=path, validation_fraction=0.2), seed=1)
    assert "20 of 100 rows of rows.csv are taken for it (seed 1, stratified by label)" in caplog.text
    train, validation = splits["train"], splits["validation"]
    assert len(validation) == 20
    assert sorted(train[:]["text"] + validation[:]["text"]) == sorted(row["text"] for row in rows)
    assert set(validation["label"]) <= set(train["label"])
    assert abs(list(validation["label"]).count("a") - 10) <= 2
    assert where(validation, 5) == f"rows.csv, row {int(validation[5]['text'].split()[1]) + 1}"
    again = read_splits(DataConfig(path=path, validation_fraction=0.2), seed=1)["validation"]
    other = read_splits(DataConfig(path=path, validation_fraction=0.2), seed=2)["validation"]
    assert again["text"] == validation["text"]
    assert other["text"] != validation["text"]


@pytest.mark.parametrize("labels", [np.linspace(0, 5, 40), ["a", "b"] * 20])
def test_validation_rows_of_regression_and_of_an_unnamed_label(tmp_path, labels):
    column = "label" if isinstance(labels, np.ndarray) else "unusual"
    path = write_rows(tmp_path / "a.csv", [{"text": f"row {i}", column: label} for i, label in enumerate(labels)])
    assert {name: len(split) for name, split in read_splits(DataConfig(path=path)).items()} == {
        "train": 36,
        "validation": 4,
    }


def test_the_smallest_data_to_split(tmp_path):
    splits = read_splits(DataConfig(path=write_rows(tmp_path / "two.csv", ROWS[:2])))
    assert {name: len(split) for name, split in splits.items()} == {"train": 1, "validation": 1}
    with pytest.raises(UserError, match="one.csv has one row: too few to take a validation split from it"):
        read_splits(DataConfig(path=write_rows(tmp_path / "one.csv", ROWS[:1])))


def test_limits_draw_rows_by_the_seed_and_keep_their_numbers(tmp_path):
    rows = [{"text": f"row {i}", "label": i % 2} for i in range(50)]
    for name in ("train", "validation", "test"):
        write_rows(tmp_path / f"{name}.csv", rows)
    config = DataConfig(path=str(tmp_path), max_train_rows=30, max_eval_rows=5)
    splits = read_splits(config, seed=3)
    assert {name: len(split) for name, split in splits.items()} == {"train": 30, "validation": 5, "test": 5}
    assert splits["train"]["text"] == read_splits(config, seed=3)["train"]["text"]
    assert splits["train"]["text"] != read_splits(config, seed=4)["train"]["text"]
    assert all(row["text"] == f"row {row[ROW] - 1}" for row in splits["train"])
    assert len(read_splits(DataConfig(path=str(tmp_path), max_train_rows=1000))["train"]) == 50


def test_read_evaluation_prefers_test(tmp_path):
    assert len(read_evaluation(write_rows(tmp_path / "rows.csv", ROWS))) == 20
    write_rows(tmp_path / "train.csv", ROWS)
    write_rows(tmp_path / "val.csv", ROWS[:6])
    assert len(read_evaluation(str(tmp_path))) == 6
    write_rows(tmp_path / "test.csv", ROWS[:4])
    assert len(read_evaluation(str(tmp_path))) == 4


def test_config_refuses_unknown_fields_and_no_data():
    with pytest.raises(ValidationError, match="tekst"):
        DataConfig(path="x", tekst="sentence")
    with pytest.raises(ValidationError, match="no data: give `path` or `train`"):
        DataConfig(text="sentence")
    assert all(field.description for field in DataConfig.model_fields.values())


@pytest.mark.parametrize("name", ["cola", "stsb", "ag_news", "e2e", "self_instruct_seed"])
def test_shared_data(shared_data, name):
    splits = read_splits(DataConfig(path=str(shared_data / name), max_train_rows=100, max_eval_rows=20))
    assert len(splits["train"]) == 100
    assert len(splits["validation"]) == 20
