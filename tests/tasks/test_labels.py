from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset

from redpeft.errors import UserError
from redpeft.tasks import labels


@pytest.mark.parametrize(
    ("value", "name"),
    [
        *((text, text) for text in ("007", "1E3", "1.10", "NA", "null", "None", "nan", "true", "True", "+1", "1_000")),
        ("spam ", "spam"),
        (3, "3"),
        (3.0, "3"),
        (-1, "-1"),
        (2.5, "2.5"),
        (True, "true"),
    ],
)
def test_label_names(value, name):
    assert labels.label_name(value) == name


def test_class_labels_bring_their_names_and_order():
    feature = ClassLabel(names=["zebra", "ape"])
    assert labels.label_name(1, feature) == "ape"
    assert labels.label_name(-1, feature) == "-1"
    assert labels.label_name("ape", feature) == "ape"
    assert labels.sort_label_names(["ape", "zebra"], feature) == ["zebra", "ape"]


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["b", "10", "a", "a"], ["10", "a", "b"]),
        (["7", "007", "0451", "07"], ["007", "07", "7", "0451"]),
        (["\u00b2", "1", "\u0663"], ["1", "\u00b2", "\u0663"]),  # digits that are no whole numbers
        (["1.10", "1.1", "--1"], ["--1", "1.1", "1.10"]),
    ],
)
def test_order_of_label_names(names, order):
    assert labels.sort_label_names(names) == order


def ids_of(values: list, names: list[str]) -> list[int]:
    dataset = Dataset.from_dict({"label": values})
    return [row[0] for row in labels.find_labels(dataset, "label", [[value] for value in values], names)]


def test_numbers_and_truth_values_are_the_labels_that_spell_them():
    assert ids_of([1, 0], ["0.0", "1.0"]) == [1, 0]
    assert ids_of([1.0, 2.5], ["1", "2.50"]) == [0, 1]
    assert ids_of([7, 451], ["007", "0451"]) == [0, 1]
    assert ids_of([True, False], ["FALSE", "True"]) == [1, 0]
    assert ids_of(["1", "01"], ["01", "1"]) == [1, 0]


@pytest.mark.parametrize(
    ("value", "names"),
    [("1.0", ["0", "1"]), ("7", ["007", "8"]), ("TRUE", ["true", "false"]), (1, ["01", "1.0"]), (True, ["1", "0"])],
)
def test_texts_are_never_another_label_and_numbers_none_of_several(value, names):
    with pytest.raises(UserError, match="is not among the training labels"):
        ids_of([value], names)


def test_unknown_label_lists_a_few_of_those_known():
    with pytest.raises(UserError) as caught:
        ids_of(["odd"], [f"label{index}" for index in range(30)])
    assert "the data, row 1: the label 'odd' is not among the training labels (label0, " in str(caught.value)
    assert "label19, ...)" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        (["1", " 2.50 ", "-3e2", ".5", "+4."], [1, 2.5, -300, 0.5, 4]),
        ([1, 2.5, True, None, "x"], [1, 2.5, None, None, None]),
        (["nan", "inf", "1_000", "\u0663", "0x1F", "", "1e999"], [None] * 7),
        (["1,5", "2,25", "3"], [1.5, 2.25, 3]),
        (["1,5", "2.25"], [None, 2.25]),  # a comma and a point: which is which?
        (["1,500", "2,250"], [None, None]),  # thousands?
        ([float("nan"), float("inf"), [1.0]], [None] * 3),
    ],
)
def test_numbers(values, numbers):
    assert labels.as_numbers(values) == numbers


@pytest.mark.parametrize(
    ("values", "measured"),
    [
        ([index / 4 for index in range(21)], True),
        ([f"{index / 4}" for index in range(21)], True),
        ([f"{index},5" for index in range(21)], True),
        ([index * 3 for index in range(21)], True),
        ([index / 4 for index in range(20)] * 5, False),  # 20 that differ
        ([f"{index / 4}" for index in range(21)] + ["unknown"], False),
        ([f"{index:04}" for index in range(30)], False),  # codes
        ([index % 30 for index in range(90)], False),  # ids of classes
        ([f"{index % 30 + 1}" for index in range(90)], False),
        ([index + 0.0 for index in range(30)], True),
    ],
)
def test_labels_that_are_measured_numbers(values, measured):
    assert labels.are_measured(values) is measured


@pytest.mark.parametrize(
    ("text", "separator", "found"),
    [
        ("a|b", None, ["a|b"]),
        ("a | b|", "|", ["a", "b"]),
        ("b, a,b", ",", ["b", "a"]),
        ("a <sep> b", "<sep>", ["a", "b"]),
        ('["a", "b, c", "007"]', "list", ["a", "b, c", "007"]),
        ("['a', 'it''s', \"it's\"]", "list", ["a", "it's"]),
        ("[1, 1.10, null, no]", "list", ["1", "1.10", "null", "no"]),
        ("[]", "list", []),
        ("['a' 'b']", "list", None),  # numpy's
        ("a, b", "list", None),
        ("[a: b]", "list", None),
        ("[[a], b]", "list", None),
    ],
)
def test_labels_in_a_text(text, separator, found):
    assert labels.split_labels(text, separator) == found


@pytest.mark.parametrize(
    ("texts", "separator"),
    [
        (["a|urgent|vip", "a", "urgent", "b|vip"], "|"),
        (["billing|urgent", "billing", "shipping|urgent|vip", "shipping", "billing|vip"], "|"),
        (["billing|urgent", "billing", "shipping|urgent", "shipping"], "|"),
        (["a, b", "b, c", "a, c", "c, d", "a, d", "b, d"], ","),
        (["a;b", "a", "b", "b;c;a", "c"], ";"),
        (["a\nb", "a", "b"], "\n"),
        (["1,5,7", "5,7", "1,7", "5"], ","),
        (['["a", "b"]', '["a"]', "[]"], "list"),
        (["['a', 'b']", "['c']"], "list"),
        # one label each
        (["rock|pop", "jazz|blues", "classical"], None),
        (["rock|pop", "rock|metal", "jazz"], None),
        (["rock|pop", "rock|metal", "jazz|pop", "jazz|metal", "other"], None),
        (["Washington, DC", "Seattle, WA", "Spokane, WA", "Portland, OR", "Portland, ME", "Austin, TX"], None),
        (["New York, NY", "Albany, NY", "Washington", "Other"], None),
        (["Smith, John", "Smith, Jane", "Doe, John", "Doe, Jane"], None),
        (["Yes, I agree", "Yes", "No, never", "No"], None),
        (["Books|Fiction", "Books", "Books|Science", "Music", "Music|Jazz"], None),
        (["1,5", "1,0", "2,5", "2", "3", "3,5"], None),
        (["1,000", "2,000", "1,500,000"], None),
        (["[spam]", "[ham]"], None),
        (['["spam"]', '["ham"]'], None),
        (["good", "bad"], None),
        (["a|b", "b|a"], None),
    ],
)
def test_a_separator_shows_by_the_parts_that_recur(texts, separator):
    assert labels.find_separator(texts) == separator


def test_a_text_that_could_be_cut():
    assert labels.unused_separator(["good", "so, so", "rock|pop"]) == ("rock|pop", "|")
    assert labels.unused_separator(["good", "C/C++", "|"]) is None


def test_counts_for_people():
    assert labels.count_names(["b", "a", "b"]) == "labels: b 2, a 1"
    assert labels.count_names(map(str, range(30)), shown=2) == "labels: 0 1, 1 1, and 28 more"
