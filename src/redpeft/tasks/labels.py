"""Labels: the texts as they are written. Which names there are, in which order, and which texts hold several."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from datasets import ClassLabel, Dataset

from redpeft.errors import UserError
from redpeft.tasks.columns import value_feature, where

LIST, WHOLE = "list", "none"
"""What may stand in place of a separator: labels are written as a list in brackets, or a text is one label."""

SEPARATORS = ("|", ";", ",", "\n")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)
DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+", re.ASCII)
THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+", re.ASCII)


# --- names ----------------------------------------------------------------------------------------------------------


def label_name(value: Any, feature: Any = None) -> str:
    """The name of a label: the text itself, or what JSON writes for a number (1 and 1.0 are one label) or true and
    false. White space around a text is removed.

    Args:
        feature: the column's type in `dataset.features`; a `ClassLabel` has names of its own.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(feature, ClassLabel) and isinstance(value, int):
        return feature.names[value] if value in range(feature.num_classes) else str(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def sort_label_names(names: Iterable[str], feature: Any = None) -> list[str]:
    """The names in the order of their ids: as the data set declares them, else as numbers, else by alphabet."""
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    names = set(names)
    if all(re.fullmatch("-?[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def count_names(names: Iterable[str], shown: int = 20) -> str:
    """How often each label occurs, for people: `labels: good 120, bad 80`."""
    counts = Counter(names)
    more = f", and {len(counts) - shown} more" if len(counts) > shown else ""
    return f"labels: {', '.join(f'{name} {count}' for name, count in counts.most_common(shown))}{more}"


def label_ids(names: Sequence[str]) -> dict[str, int]:
    """The id of each label."""
    return {name: index for index, name in enumerate(names)}


def find_labels(dataset: Dataset, column: str, rows: Sequence[Sequence[Any]], names: Sequence[str]) -> list[list[int]]:
    """The ids of each row's labels, by their `names`.

    A number or a truth value can be written in several ways, so it also means the one label that has the same value: 1
    means "1.0" if training read that from a CSV file.

    Raises:
        UserError: a label that training does not have.
    """
    feature, ids = value_feature(dataset, column), label_ids(names)
    found: dict[Any, int] = {}
    for index, row in enumerate(rows):
        for value in row:
            if value in found:
                continue
            name = label_name(value, feature)
            if name not in ids:
                same = [] if isinstance(value, str) else [known for known in names if _spells(known, value)]
                if len(same) != 1:
                    known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
                    raise UserError(
                        f"{where(dataset, index)}: the label {name!r} is not among the training labels ({known})"
                    )
                name = same[0]
            found[value] = ids[name]
    return [[found[value] for value in row] for row in rows]


def _spells(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return name.lower() == label_name(value)
    return NUMBER.fullmatch(name) is not None and float(name) == value


# --- numbers --------------------------------------------------------------------------------------------------------


def as_numbers(values: Sequence[Any]) -> list[float | None]:
    """Each value as a number, or None if it is not a number.

    Texts may have decimal commas, if none has a point and the commas cannot separate thousands.
    """
    texts = {value.strip() for value in values if isinstance(value, str)}
    commas = [text for text in texts if DECIMAL_COMMA.fullmatch(text)]
    if commas and not any("." in text for text in texts) and not all(map(THOUSANDS.fullmatch, commas)):
        values = [value.replace(",", ".", 1) if isinstance(value, str) else value for value in values]
    return [_as_number(value) for value in values]


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool) or (isinstance(value, str) and not NUMBER.fullmatch(value.strip())):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None


def are_measured(values: Sequence[Any], most_classes: int = 20) -> bool:
    """Whether labels are measured numbers, not classes: all are numbers, and more than `most_classes` of them differ.

    Texts with leading zeros are codes. Whole numbers that start from 0 or 1, without gaps and with at least two rows
    each on average, are the ids of classes.
    """
    if any(isinstance(value, str) and re.match(r"\s*[-+]?0\d", value) for value in values):
        return False
    numbers = as_numbers(values)
    distinct = sorted({number for number in numbers if number is not None})
    if None in numbers or len(distinct) <= most_classes:
        return False
    are_ids = distinct[0] in (0, 1) and distinct == [distinct[0] + index for index in range(len(distinct))]
    return not (are_ids and len(values) >= 2 * len(distinct))


# --- several labels in one text -------------------------------------------------------------------------------------


def split_labels(text: str, separator: str | None) -> list[str] | None:
    """The labels in a text, each once. None with `LIST` for a text that is not a list."""
    if separator is None:
        return [text.strip()]
    parts = _read_list(text) if separator == LIST else text.split(separator)
    return None if parts is None else list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _read_list(text: str) -> list[str] | None:
    """The entries of a list in the notation of JSON, Python or YAML, each as it is written."""
    if not re.fullmatch(r"\s*\[.*\]\s*", text, re.DOTALL):
        return None
    try:
        entries = yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError:
        return None
    return entries if all(isinstance(entry, str) for entry in entries) else None


def find_separator(texts: Iterable[str]) -> str | None:
    """What separates the labels in texts that hold several. None if nothing shows that they do.

    A text such as `rock|pop` or `Washington, DC` may be one label. Labels that recur show a separator: more than half
    of the parts of combinations also occur in another combination or alone, and some part stands at two places or in
    combinations of two sizes.
    """
    texts = set(texts)
    lists = [split_labels(text, LIST) for text in texts]
    if None not in lists and any(entries is not None and len(entries) != 1 for entries in lists):
        return LIST
    return next((separator for separator in SEPARATORS if _separates(separator, texts)), None)


def unused_separator(texts: Iterable[str]) -> tuple[str, str] | None:
    """A text that could be split, and the separator that would split it."""
    return next(
        (
            (text, mark)
            for text in sorted(set(texts))
            for mark in SEPARATORS
            if len(split_labels(text, mark) or []) > 1
        ),
        None,
    )


def _separates(separator: str, texts: set[str]) -> bool:
    if separator == "," and all(
        any(form.fullmatch(text) for form in (NUMBER, DECIMAL_COMMA, THOUSANDS)) for text in texts
    ):
        return False
    combinations = {tuple(split_labels(text, separator) or ()) for text in texts}
    parts = {part for combination in combinations if len(combination) > 1 for part in combination}
    company, places, sizes = defaultdict(set), defaultdict(set), defaultdict(set)
    for combination in combinations:
        for place, part in enumerate(combination):
            company[part].add(frozenset(combination))
            places[part].add(place)
            sizes[part].add(len(combination))
    recurring = [part for part in parts if len(company[part]) > 1]
    return 2 * len(recurring) > len(parts) and any(len(places[part]) > 1 or len(sizes[part]) > 1 for part in parts)
