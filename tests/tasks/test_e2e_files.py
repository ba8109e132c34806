from __future__ import annotations

import json

import pytest

from helpers.data import write, write_rows
from redpeft.errors import UserError
from redpeft.tasks.e2e import E2ETask, read_predictions, read_references, score_files
from redpeft.tasks.files import read_file

ROWS = [
    {"mr": "name[Cotto]", "ref": "Cotto is a pub."},
    {"mr": "name[Zizzi], area[riverside]", "ref": "Zizzi, by the river."},
    {"mr": "name[Zizzi], area[riverside]", "ref": "By the river is Zizzi."},
    {"mr": "name[Cotto]", "ref": "There is a pub, Cotto."},
]
GROUPS = [["Cotto is a pub.", "There is a pub, Cotto."], ["Zizzi, by the river.", "By the river is Zizzi."]]
TEXT = "\n\n".join("\n".join(group) for group in GROUPS)


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_a_table_of_references_is_grouped_by_what_they_say(tmp_path, kind):
    assert read_references(write_rows(tmp_path / f"refs{kind}", ROWS)) == GROUPS


def test_the_columns_of_other_releases(tmp_path):
    rows = [{"meaning_representation": row["mr"], "human_reference": row["ref"]} for row in ROWS]
    assert read_references(write_rows(tmp_path / "refs.jsonl", rows)) == GROUPS


@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "\n\n\n", "\r\n\r\n"])
def test_groups_of_lines(tmp_path, ending):
    assert read_references(write(tmp_path / "label.txt", TEXT + ending)) == GROUPS
    assert read_references(write(tmp_path / "windows.txt", TEXT.replace("\n", "\r\n") + ending)) == GROUPS


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_predictions_one_a_line(tmp_path, ending):
    assert read_predictions(write(tmp_path / "pred.txt", "\ufeffOne.\nTwo: café." + ending)) == ["One.", "Two: café."]


def test_predictions_as_predict_writes_them(tmp_path):
    rows = [{"mr": "name[Cotto]", "text": "A pub."}, {"id": 3, "text": ""}]
    assert read_predictions(write(tmp_path / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))) == [
        "A pub.",
        "",  # what a poor model may say; it is scored
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pred.txt", "", "pred.txt is empty: it holds no rows"),
        ("pred.txt", " \n\n", "pred.txt is empty: it holds no rows"),
        ("pred.jsonl", "", "pred.jsonl is empty: it holds no rows"),
        ("pred.txt", "One.\n\nTwo.\n", "pred.txt, line 2: the line is empty"),
        ("pred.txt", "One.\nTwo.\n\n", "pred.txt, line 3: the line is empty"),
        ("pred.txt", "\nOne.", "pred.txt, line 1: the line is empty"),
        ("pred.txt", b"PK\x03\x04", "pred.txt is not a text file: it is an Excel workbook or another zip archive"),
        ("pred.jsonl", b'{"text": "Caf\0"}\n', "pred.jsonl, line 1: it holds NUL bytes"),
        ("pred.jsonl", '{"mr": "a"}\n', "pred.jsonl has no column 'text'; its columns are mr."),
        ("pred.jsonl", '{"text": "a"}\n{"text": null}\n', "pred.jsonl, row 2: column 'text' holds None, which is not"),
        ("pred.jsonl", '{"text": "a"}\n{"text"\n', "pred.jsonl, line 2: broken JSON"),
    ],
)
def test_bad_predictions(tmp_path, name, content, message):
    with pytest.raises(UserError) as caught:
        read_predictions(write(tmp_path / name, content))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("label.txt", "\n", "label.txt is empty: it holds no rows"),
        ("label.txt", "One.\n\n\nTwo.\n", "label.txt, line 3: the line is empty"),
        ("label.txt", "\nOne.\n", "label.txt, line 1: the line is empty"),
        ("label.txt", b"%PDF-1.7\n", "label.txt is not a text file: it is a PDF file"),
        ("refs.csv", "mr,text\na,b\n", "cannot tell which column of refs.csv is the response (columns: mr, text)"),
        ("refs.csv", "mr,ref\na,b\nc,\n", "refs.csv, row 2: the text in column 'ref' is empty"),
    ],
)
def test_bad_references(tmp_path, name, content, message):
    with pytest.raises(UserError) as caught:
        read_references(write(tmp_path / name, content))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_differ_in_length(tmp_path):
    references, predictions = write(tmp_path / "label.txt", TEXT), write(tmp_path / "pred.txt", "One.\nTwo.\nThree.\n")
    with pytest.raises(UserError) as caught:
        score_files(references, predictions)
    assert str(caught.value) == (
        f"{predictions} holds 3 predictions and {references} the references of 2 meaning representations: one "
        "prediction for each is needed, in their order"
    )
    for pair in ((tmp_path / "none.txt", predictions), (references, tmp_path / "none.jsonl"), (tmp_path, predictions)):
        with pytest.raises(UserError, match="^no such file: |is a folder, but a file is needed here$"):
            score_files(*pair)


def test_the_released_references_are_those_of_the_public_file(shared_data):
    official = shared_data.parent / "official_red" / "GPT-2" / "gpt2_medium" / "generation" / "label.txt"
    if not official.is_file():
        pytest.skip("no ../shared/official_red beside the repository")
    rows = read_file(shared_data / "e2e" / "test.jsonl")
    groups = read_references(shared_data / "e2e" / "test.jsonl")
    assert len(E2ETask(E2ETask.find_columns(rows)).questions(rows)) == len(groups) == 630
    released = read_references(official)
    letters = [[["".join(text.split()) for text in group] for group in each] for each in (groups, released)]
    assert letters[0] == letters[1]  # the released ones went through a tokenizer, which dropped spaces before commas
