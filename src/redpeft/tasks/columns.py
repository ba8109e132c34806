"""Finding columns in a user's data, and checking their rows: what every task needs."""

from __future__ import annotations

import difflib
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import pyarrow as pa
from datasets import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from redpeft.console import Progress
from redpeft.errors import UserError, first_line

ROW = "__row__"
"""A column that `redpeft.tasks.data` adds: the row's number in its source, which errors name even after a shuffle."""

CUT = "__cut__"
"""A column of encoded rows: whether the row was longer than it may be."""

# --- guesses --------------------------------------------------------------------------------------------------------
#
# Usual names of columns, in lower case. If the user names no column, the first of these that exists is taken.

LABEL_COLUMNS = ["label", "labels", "class", "category", "intent", "target", "sentiment", "topic"]
LABEL_COLUMNS += ["score", "rating", "stars"]
TEXT_PAIRS = [
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("question", "sentence"),
    ("question", "passage"),
]
TEXT_COLUMNS = [
    "sentence",
    "text",
    "content",
    "review",
    "message",
    "utterance",
    "tweet",
    "comment",
    "body",
    "question",
]
NUMBER_COLUMNS = {"idx", "id", "index", "guid", "uid", "unnamed: 0"}  # they only number the rows
WORD_COLUMNS = ["tokens", "words"]
TAG_COLUMNS = ["ner_tags", "tags", "labels", "pos_tags", "upos", "label"]
MESSAGE_COLUMNS = ["messages", "conversations", "conversation", "chat"]
MESSAGE_FIELDS = {"role", "content", "from", "value", "weight", "tool_calls", "tool_call_id", "name"}
MESSAGE_FIELDS |= {"reasoning_content", "function_call"}
PROMPT_PAIRS = [
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("question", "answer"),
    ("input", "output"),
    ("query", "response"),
    ("question", "response"),
]
SYSTEM_COLUMNS = ["system", "system_prompt"]
MEANING_COLUMNS = ["mr", "meaning_representation"]
REFERENCE_COLUMNS = ["ref", "reference", "human_reference", "target"]
DOCUMENT_COLUMNS = ["document_id", "doc_id", "docid", "document", "doc"]  # they name the document of a row


COLUMNS_OF_TASKS = [
    ("preference", [["chosen"], ["rejected"]]),
    ("preference", [["prompt"], ["completion"], ["label"]]),
    ("token-classification", [WORD_COLUMNS, TAG_COLUMNS]),
    ("instruction", [MESSAGE_COLUMNS]),
    ("classification", [["label", "labels"]]),
    *(("instruction", [[prompt], [response]]) for prompt, response in PROMPT_PAIRS),
    ("e2e", [MEANING_COLUMNS, REFERENCE_COLUMNS]),
    ("classification", [LABEL_COLUMNS]),
    ("instruction", [["text"]]),
    ("reward", [["prompt"]]),
    ("instruction", [["messages", "conversations"]]),
]
"""By what columns a task is recognised: the first one counts of which the data has one of each list of names."""


# --- columns --------------------------------------------------------------------------------------------------------


class Missing(UserError):
    """A row lacks a text or a label."""


def column_names(dataset: Dataset) -> list[str]:
    """The user's columns."""
    return [name for name in dataset.column_names if name != ROW]


def values(dataset: Dataset, column: str) -> list:
    """One column as a list."""
    return dataset.select_columns([column])[:][column]


def source(dataset: Dataset) -> str:
    """What a person calls this data, such as `train.csv`."""
    return dataset.info.description or "the data"


def where(dataset: Dataset, index: int) -> str:
    """`train.csv, row 17`: the place of row `index` in its source. The first row of data is row 1."""
    row = dataset[index][ROW] if ROW in dataset.column_names else index + 1
    return f"{source(dataset)}, row {row}"


def first_of(dataset: Dataset, rows: Sequence[int]) -> str:
    """`train.csv, row 17 (and 3 more of 200)`: the place of the first of some rows, and how many more there are."""
    more = f" (and {len(rows) - 1} more of {len(dataset)})" if len(rows) > 1 else ""
    return where(dataset, rows[0]) + more


def find_column(dataset: Dataset, names: Iterable[str], without: Iterable[str] = ()) -> str | None:
    """The first of `names` (in lower case) that is a column, in any case, and is not in `without`."""
    present = {name.lower(): name for name in reversed(column_names(dataset)) if name not in without}
    return next((present[name] for name in names if name in present), None)


def guess_task(dataset: Dataset) -> tuple[str, list[str]]:
    """The task that these columns are for, and the columns that say so; classification if none does."""
    for task, wanted in COLUMNS_OF_TASKS:
        found = [name for names in wanted if (name := find_column(dataset, names)) is not None]
        if len(found) < len(wanted) or (wanted == [MESSAGE_COLUMNS] and not holds_chats(dataset, found[0])):
            continue
        return task, found
    return "classification", []


def with_columns(dataset: Dataset, columns: Mapping[str, Any]) -> Dataset:
    """The dataset with a task's `columns` under the task's names. Columns are renamed that differ in case alone."""
    present = column_names(dataset)
    for wanted in _names(columns):
        alike = [name for name in present if name.lower() == wanted.lower()]
        if wanted not in present and len(alike) == 1:
            dataset = dataset.rename_column(alike[0], wanted)
    return dataset


def keep_columns(dataset: Dataset, columns: Mapping[str, Any]) -> Dataset:
    """A task's `columns` alone, under the names of their keys. Raises `UserError` for a key of several columns."""
    for key, names in columns.items():
        if not isinstance(names, str):
            raise UserError(f"{source(dataset)}: several columns as {key} cannot be mixed: name one")
    kept = dataset.select_columns([*columns.values(), *([ROW] if ROW in dataset.column_names else [])])
    kept = kept.rename_columns({name: key for key, name in columns.items() if name != key})
    kept.info.description = source(dataset)
    return kept


def _names(columns: Mapping[str, Any]) -> list[str]:
    return [name for names in columns.values() for name in ([names] if isinstance(names, str) else names)]


def unread_columns(dataset: Dataset, columns: Mapping[str, Any]) -> list[str]:
    """The user's columns that are not among a task's `columns`. For a column of chats also the fields of its messages
    that are not read, such as `messages.id`."""
    read = _names(columns)
    unread = [name for name in column_names(dataset) if name not in read]
    fields = value_feature(dataset, columns["messages"]) if "messages" in columns else {}
    inner = [name for name in fields if name not in MESSAGE_FIELDS] if isinstance(fields, dict) else []
    return unread + [f"{columns['messages']}.{name}" for name in inner]


def require_columns(dataset: Dataset, columns: Iterable[str]) -> None:
    """Raises `UserError` if one of `columns` is missing. The message names the columns that exist and the nearest
    one."""
    present = column_names(dataset)
    for column in columns:
        if column not in present:
            near = difflib.get_close_matches(column.lower(), [name.lower() for name in present], n=1, cutoff=0.5)
            nearest = [f" Did you mean {name!r}?" for name in present if name.lower() in near][:1]
            raise UserError(
                f"{source(dataset)} has no column {column!r}; its columns are {', '.join(present)}.{''.join(nearest)}"
            )


def text_columns(dataset: Dataset) -> list[str]:
    """The columns that hold text."""
    return [name for name in column_names(dataset) if "string" in getattr(dataset.features[name], "dtype", "")]


def choose_column(dataset: Dataset, named: str | None, known: Iterable[str], what: str) -> str:
    """The column that is named, or else the first of those known.

    Raises:
        UserError: the named column does not exist, or none is named or known; `what` is the field that names it.
    """
    column = named or find_column(dataset, known)
    if column is None:
        raise UserError(
            f"cannot tell which column of {source(dataset)} is the {what} (columns: "
            f"{', '.join(column_names(dataset))}); name it with `{what}`"
        )
    require_columns(dataset, [column])
    return column


def check_texts(dataset: Dataset, column: str) -> None:
    """Raises `UserError` if the column does not exist, or a row's text is missing, empty (`Missing`), or not a
    text."""
    require_columns(dataset, [column])
    texts = values(dataset, column)
    if empty := [index for index, text in enumerate(texts) if is_missing(text)]:
        raise Missing(f"{first_of(dataset, empty)}: the text in column {column!r} is empty")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{where(dataset, index)}: column {column!r} holds {text!r}, which is not text")


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: null, NaN, or white space alone."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def value_feature(dataset: Dataset, column: str) -> Any:
    """The type of a column's values, or of their elements if they are lists."""
    feature = dataset.features[column]
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)


def holds_objects(dataset: Dataset, column: str) -> bool:
    """Whether a column holds lists of objects, such as messages."""
    return isinstance(value_feature(dataset, column), dict)


def holds_chats(dataset: Dataset, column: str) -> bool:
    """Whether a column holds lists of objects, or texts of which the first is the JSON of messages, as in a table."""
    if holds_objects(dataset, column):
        return True
    first = next((value for value in values(dataset, column) if not is_missing(value)), None)
    return _are_messages(as_messages(first))


def tokenise(dataset: Dataset, function: Callable[[dict[str, list]], dict[str, list]]) -> Dataset:
    """`function`, applied to batches of rows. Its columns replace all others.

    The result stays in memory under a random fingerprint: hashing a tokenizer for the cache takes longer than
    predicting a batch.

    Raises:
        UserError: `function` fails; the message names the first row on which it does.
    """

    progress = Progress()

    def explained(rows: dict[str, list], indices: list[int]) -> dict[str, list]:
        progress.show("tokenising: row", indices[0], len(dataset))
        try:
            return function(rows)
        except Exception as error:  # tokenizers and chat templates raise errors of many kinds
            for place, index in enumerate(indices):
                try:
                    function({name: column[place : place + 1] for name, column in rows.items()})
                except Exception as reason:
                    says = "" if isinstance(reason, UserError) else f"the tokenizer fails: {type(reason).__name__}: "
                    raise UserError(f"{where(dataset, index)}: {says}{first_line(reason)}") from error
            raise  # no single row fails

    return dataset.map(
        explained,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        keep_in_memory=True,
        new_fingerprint=secrets.token_hex(8),
        desc="tokenising",
    )


def rows_to_dataset(
    rows: Sequence[dict | str],
    required: Sequence[str],
    plain: str | None,
    first: int = 1,
    optional: Sequence[str] = (),
) -> Dataset:
    """Rows that a user wants predictions for, as a dataset of the task's columns.

    Args:
        rows: objects with the task's columns; a plain string is the value of the column `plain`.
        required: columns that every row must have.
        plain: the column that a plain string fills, None if a string is not enough for this task.
        first: the number of the first row, for errors; a row that has a number of its own keeps it.
        optional: columns that a row may have.

    Raises:
        UserError: no rows, or a row that is neither, lacks a column, or holds another type than the rest.
    """
    if not rows:
        raise UserError("there are no rows to predict")
    found = []
    for number, row in enumerate(rows, start=first):
        if isinstance(row, str) and plain:
            row = {plain: row}
        if not isinstance(row, dict):
            raise UserError(f"row {number}: expected an object with {', '.join(map(repr, required))}, found {row!r}")
        number = row.get(ROW, number)
        fields = {column: _field(row, column) for column in (*required, *optional)}
        missing = [column for column in required if fields[column] is _NONE]
        if missing:
            seen = ", ".join(repr(name) for name in row if name != ROW)
            raise UserError(f"row {number} has no {missing[0]!r}; it has {seen or 'nothing'}")
        found.append({name: None if value is _NONE else value for name, value in fields.items()} | {ROW: number})
    places = [f"row {row[ROW]}" for row in found]
    return Dataset(pa.table({name: as_array([row[name] for row in found], name, places) for name in found[0]}))


KINDS = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def as_array(cells: list, column: str, places: Sequence[str]) -> pa.Array:
    """The cells of a column. Raises `UserError`, with the place of the cell, for mixed kinds and broken texts.

    In lists of objects, which may be messages or tools, the fields of `OPEN_FIELDS` become JSON text, and parts of a
    text one text.
    """
    cells = [[_as_stored(item) for item in cell] if isinstance(cell, list) else cell for cell in cells]
    try:
        return pa.array(cells)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        seen: dict[str, tuple[str, int]] = {}  # of a column and of each field in it, the first kind, and where it is
        for index, cell in enumerate(cells):
            for name, value in _named(column, cell):
                kind = KINDS.get(type(value), type(value).__name__)
                first, place = seen.setdefault(name, (kind, index))
                if kind != first:
                    raise UserError(
                        f"{places[index]}: column {name!r} holds {kind}, {str(value)[:40]!r}, and {first} in "
                        f"{places[place].rpartition(', ')[2]}: write values of one kind"
                    ) from None
            try:
                pa.array([cell])
            except (pa.ArrowException, ValueError, TypeError, OverflowError) as reason:
                raise UserError(f"{places[index]}: column {column!r}: {first_line(reason)}") from None
        raise UserError(f"column {column!r}: {first_line(error)}") from None


OPEN_FIELDS = ("tool_calls", "function_call", "function", "arguments", "parameters")
"""Fields of messages and tools that hold other fields in each row. Arrow would give every row the fields of all rows,
and has no type for a field that is a text in one row and a number in another."""


def _as_stored(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    opened = {name: item[name] for name in OPEN_FIELDS if isinstance(item.get(name), dict | list)}
    texts = {name: join_parts(item[name]) for name in ("content", "value") if name in item}
    return item | texts | {name: json.dumps(value, ensure_ascii=False) for name, value in opened.items()}


def join_parts(content: Any) -> Any:
    """The text of a list of parts of text, as OpenAI's messages may have it. Any other value as it is."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text")) for part in content)
    return content


def _named(column: str, cell: Any) -> Iterator[tuple[str, Any]]:
    """A cell and, if it is a list of objects, their fields, but for what is null."""
    if cell is not None:
        yield column, cell
    for item in cell if isinstance(cell, list) else ():
        if isinstance(item, dict):
            yield from ((f"{column}.{name}", value) for name, value in item.items() if value is not None)


def parse_json(value: Any) -> Any:
    """A value of a message or a tool, with what the JSON texts in it hold: `as_array` undone. A text that is not JSON
    of an object or a list stays as it is."""
    return _parse_fields(_parse_text(value) if isinstance(value, str) else _without_nulls(value))


def _parse_fields(value: Any) -> Any:
    if isinstance(value, list):
        return [_parse_fields(item) for item in value]
    if not isinstance(value, dict):
        return value
    opened = {name: _parse_text(value[name]) for name in OPEN_FIELDS if name in value}
    inner = {name: _parse_fields(opened[name]) for name in opened.keys() - {"arguments", "parameters"}}
    return value | opened | inner


def _parse_text(value: Any) -> Any:
    try:
        found = json.loads(value)
    except (TypeError, json.JSONDecodeError):
        return value
    return found if isinstance(found, dict | list) else value


def as_messages(value: Any) -> Any:
    """A text that is the JSON of messages as those messages, as `as_array` has them. Any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    found = _parse_text(value)
    return [_as_stored(message) for message in found] if _are_messages(found) else value


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and _has_role_and_content(each.keys()) for each in value)
    )


def _has_role_and_content(fields: Set[str]) -> bool:
    return bool(fields & {"role", "from"} and fields & {"content", "value", "tool_calls"})


def is_message(fields: Set[str]) -> bool:
    """Whether these are the fields of a message of a chat, and no others."""
    return fields <= MESSAGE_FIELDS and _has_role_and_content(fields)


def _without_nulls(value: Any) -> Any:
    """A value from arrow, which gives an object the fields of all others in its column."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return value


_NONE = object()


def _field(row: dict, column: str) -> Any:
    """A row's value in a column: by its name in any case, or by a dotted name for an object in an object."""
    if column in row:
        return row[column]
    if len(alike := [name for name in row if name.lower() == column.lower()]) == 1:
        return row[alike[0]]
    outer, dot, inner = column.partition(".")
    return _field(row[outer], inner) if dot and isinstance(row.get(outer), dict) else _NONE


def tokens_of(tokenizer: PreTrainedTokenizerBase, *texts: list, limit: int | None, **options: Any) -> BatchEncoding:
    """A batch of texts, or pairs of texts, in tokens, each cut at `limit` tokens. The column `CUT` says which were
    longer.

    Raises:
        UserError: `limit` leaves no room for a text.
    """
    if limit is None:
        encoded = tokenizer(*texts, verbose=False, **options)
        encoded[CUT] = [False] * len(texts[0])
        return encoded
    special = tokenizer.num_special_tokens_to_add(pair=len(texts) > 1)
    if limit < special + len(texts):  # tokenizers ignore this
        raise UserError(f"{limit} tokens leave no room for a text after {special} special ones: raise max_length")
    encoded = tokenizer(*texts, truncation=True, max_length=limit, **options)
    full = [row for row, ids in enumerate(encoded["input_ids"]) if len(ids) >= limit]
    cut = [False] * len(texts[0])
    if full:
        whole = tokenizer(*([column[row] for row in full] for column in texts), verbose=False, **options)
        for row, ids in zip(full, whole["input_ids"], strict=True):
            cut[row] = len(ids) > limit
    encoded[CUT] = cut
    return encoded
