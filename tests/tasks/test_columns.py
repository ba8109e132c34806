from __future__ import annotations

import pytest
from datasets import Dataset

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
    with pytest.raises(UserError, match=r"the data, row 2: the text in column 'text' is empty$"):
        cols.check_texts(Dataset.from_dict({"text": ["a", empty, "b"]}), "text")
    with pytest.raises(UserError, match=r"the data, row 1 \(and 2 more of 4\): the text in column 'text' is empty$"):
        cols.check_texts(Dataset.from_dict({"text": [empty, empty, "b", empty]}), "text")


def test_a_text_that_is_a_number():
    with pytest.raises(UserError, match=r"row 1: column 'text' holds 3, which is not text"):
        cols.check_texts(Dataset.from_dict({"text": [3, 4]}), "text")


def test_row_numbers_survive_a_shuffle():
    dataset = Dataset.from_dict({"text": ["a", "b", "c"], cols.ROW: [1, 2, 3]}).select([2, 0])
    assert cols.where(dataset, 0) == "the data, row 3"
    assert cols.column_names(dataset) == ["text"]


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
        (
            [{"text": "a"}, {"text": 7}],
            "text",
            "row 2: column 'text' holds a number, '7', and a text in row 1",
        ),
    ],
)
def test_rows_that_cannot_be_predicted(rows, plain, message):
    with pytest.raises(UserError, match=message):
        cols.rows_to_dataset(rows, ["text"], plain)


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"text": "a", "label": "b"}, "classification"),
        ({"review": "a", "Stars": 4}, "classification"),
        ({"prompt": "a", "response": "b", "label": "c"}, "classification"),
        ({"body": "a", "kind": "b"}, "classification"),
        ({"chat": "a text", "label": "b"}, "classification"),
        ({"tokens": ["a"], "ner_tags": ["O"]}, "token-classification"),
        ({"mr": "a", "ref": "b"}, "e2e"),
        ({"messages": [{"role": "user", "content": "a"}], "label": True}, "instruction"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "instruction"),
        ({"instruction": "a", "input": "b", "output": "c", "category": "d"}, "instruction"),
        ({"Question": "a", "answer": "b"}, "instruction"),
        ({"text": "a"}, "instruction"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}, "preference"),
        ({"prompt": "a", "completion": "b", "label": True}, "preference"),
        ({"prompt": "a", "answer": "b"}, "reward"),
    ],
)
def test_the_task_is_guessed_from_the_columns(row, task):
    assert cols.guess_task(Dataset.from_list([row]))[0] == task


def test_columns_that_nobody_reads_are_named():
    dataset = Dataset.from_list(
        [{"chat": [{"role": "user", "content": "x", "weight": 0, "id": 7}], "system": "be kind", "__row__": 1}]
    )
    assert cols.unread_columns(dataset, {"messages": "chat"}) == ["system", "chat.id"]
    assert cols.unread_columns(dataset, {"text": "system", "label": ["chat"]}) == []
