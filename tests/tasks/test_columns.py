from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset

from redpeft.errors import UserError
from redpeft.tasks import columns as cols


def test_a_misnamed_column_names_the_columns_and_the_nearest():
    dataset = Dataset.from_dict({"Sentence": ["a"], "label": [1]})
    with pytest.raises(UserError) as caught:
        cols.require_columns(dataset, ["label", "sentnce"])
    assert str(caught.value) == (
        "the data has no column 'sentnce'; its columns are Sentence, label. Did you mean 'Sentence'?"
    )
    with pytest.raises(UserError, match="label.$"):
        cols.require_columns(dataset, ["xyz"])


@pytest.mark.parametrize("empty", [None, "", "  \n"])
def test_an_empty_text_names_its_row(empty):
    with pytest.raises(UserError, match=r"the data, row 2: the text in column 'text' is empty"):
        cols.check_texts(Dataset.from_dict({"text": ["a", empty, "b"]}), "text")


def test_a_text_that_is_a_number():
    with pytest.raises(UserError, match=r"row 1: column 'text' holds 3, which is not text"):
        cols.check_texts(Dataset.from_dict({"text": [3, 4]}), "text")


def test_row_numbers_survive_a_shuffle():
    dataset = Dataset.from_dict({"text": ["a", "b", "c"], cols.ROW: [1, 2, 3]}).select([2, 0])
    assert cols.where(dataset, 0) == "the data, row 3"
    assert cols.column_names(dataset) == ["text"]


@pytest.mark.parametrize(
    ("value", "name"), [("spam ", "spam"), (3, "3"), (3.0, "3"), (-1, "-1"), (True, "True"), (2.5, "2.5")]
)
def test_label_names(value, name):
    assert cols.label_name(value) == name


def test_class_labels_bring_their_names_and_order():
    feature = ClassLabel(names=["zebra", "ape"])
    assert cols.label_name(1, feature) == "ape"
    assert cols.label_name(-1, feature) == "-1"
    assert cols.label_name("ape", feature) == "ape"
    assert cols.sort_label_names(["ape", "zebra"], feature) == ["zebra", "ape"]


def test_order_of_label_names():
    assert cols.sort_label_names(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert cols.sort_label_names(["b", "10", "a", "a"]) == ["10", "a", "b"]


def test_unknown_label_lists_a_few_of_those_known():
    dataset = Dataset.from_dict({"text": ["a"]})
    with pytest.raises(UserError) as caught:
        cols.label_id(dataset, 0, cols.label_ids([f"label{i}" for i in range(30)]), "odd")
    assert "the label 'odd' is not among the training labels (label0, " in str(caught.value)
    assert "label19, ...)" in str(caught.value)


def test_rows_to_dataset():
    rows = ["one", {"text": "two", "more": 1, "id": 7}]
    dataset = cols.rows_to_dataset(rows, ["text"], "text", first=33, optional=["more"])
    assert dataset[:] == {"text": ["one", "two"], "more": [None, 1], cols.ROW: [33, 34]}
    assert cols.where(dataset, 1) == "the data, row 34"
    with pytest.raises(UserError, match="row 34 has no 'text'"):
        cols.rows_to_dataset(["one", {"txt": "two"}], ["text"], "text", first=33)


@pytest.mark.parametrize(
    ("rows", "plain", "message"),
    [
        ([], "text", "there are no rows to predict"),
        ([{"text": "a"}, {"txt": "b", "id": 3}], "text", "row 2 has no 'text'; it has 'txt', 'id'"),
        ([{}], "text", "row 1 has no 'text'; it has nothing"),
        (["a"], None, "row 1: expected an object with 'text', found 'a'"),
        ([7], "text", "row 1: expected an object with 'text', found 7"),
        ([{"text": "a"}, {"text": 7}], "text", "the rows do not hold the same types"),
    ],
)
def test_rows_that_cannot_be_predicted(rows, plain, message):
    with pytest.raises(UserError, match=message):
        cols.rows_to_dataset(rows, ["text"], plain)
