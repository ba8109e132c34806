from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from itertools import combinations

import pytest

FOLDER = files("redpeft") / "tasks" / "support_messages"
ROWS_PER_CLASS = {"train": 37, "validation": 13, "test": 13}
CLASSES = {
    "card_lost_or_stolen",
    "card_not_arrived",
    "card_payment_declined",
    "cash_machine_problem",
    "change_personal_details",
    "charged_twice",
    "fees_and_exchange_rate",
    "login_or_password",
    "refund_missing",
    "transfer_not_received",
    "transfer_to_wrong_person",
    "unrecognised_charge",
}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, str]]]:
    def read(split: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]

    return {split: read(split) for split in ROWS_PER_CLASS}


@pytest.fixture(scope="module")
def word_sets(splits) -> list[tuple[str, frozenset[str]]]:
    return [
        (row["text"], frozenset(re.findall(r"\w+", row["text"].casefold())))
        for rows in splits.values()
        for row in rows
    ]


@pytest.mark.parametrize("split", ROWS_PER_CLASS)
def test_every_split_holds_every_class_equally_often(splits, split):
    assert Counter(row["label"] for row in splits[split]) == dict.fromkeys(CLASSES, ROWS_PER_CLASS[split])


@pytest.mark.parametrize("split", ROWS_PER_CLASS)
def test_rows_hold_a_clean_text_and_a_label(splits, split):
    for row in splits[split]:
        assert list(row) == ["text", "label"]
        assert row["text"] == " ".join(row["text"].split())
        assert 3 <= len(row["text"].split()) <= 60


def test_splits_are_not_sorted_by_class(splits):
    assert all(len({row["label"] for row in rows[:24]}) > 4 for rows in splits.values())


def test_no_message_occurs_twice_or_nearly_so(word_sets):
    """Over all the splits together, so that no message leaks from one split into another."""
    near = [
        (a, b) for (a, left), (b, right) in combinations(word_sets, 2) if len(left & right) > 0.7 * len(left | right)
    ]
    assert near == []


def test_data_card_names_every_class_and_the_counts(splits):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert {name for name in CLASSES if f"| `{name}` |" in card} == CLASSES
    for split, rows in splits.items():
        assert f"| {split} | {len(rows)} | {ROWS_PER_CLASS[split]} |" in card
