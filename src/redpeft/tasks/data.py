"""A user's data: where it is, and its splits."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)

from redpeft.errors import UserError, first_line
from redpeft.storage import is_local
from redpeft.tasks import columns
from redpeft.tasks.base import TASKS, DataConfig, Task
from redpeft.tasks.columns import LABEL_COLUMNS, ROW, Missing, find_column, is_missing, require_columns, source, values
from redpeft.tasks.files import READERS, SHARD, extension, read_file, read_parts, read_texts, stem, with_rows
from redpeft.tasks.labels import label_name
from redpeft.tasks.reasoning import PREFIX, draw_questions
from redpeft.tasks.rows import choose_rows, glue_splits, leave_out_missing

logger = logging.getLogger(__name__)

MIX = "data.mix"
"""What messages call the rows of several data sets."""
GROUP = "group"
"""The column of a mix with the values of `data.group`."""

SPLIT_NAMES = {
    "train": ("train", "trainset", "train_sft", "train_prefs"),
    "validation": ("validation", "valid", "val", "dev", "eval", "validation_matched", "devset"),
    "test": ("test", "testset_w_refs", "test_sft", "test_prefs"),
}
"""Names of the files of a split: the usual ones, and those of GLUE, the E2E challenge and UltraFeedback."""


def read_data(kind: str, data: DataConfig, seed: int = 0, **options: Any) -> tuple[Task, dict[str, Dataset]]:
    """The task of `data`, and its splits "train", "validation" and, if there is one, "test".

    The task (its columns, problem type and labels) comes from all training rows, before a validation split or a limit
    takes some of them.

    Raises:
        UserError: data that is missing, empty, unreadable, or wrong for this task.
    """
    if data.mix:
        return _read_mix(kind, data, seed, **options)
    splits = _whole_rows(kind, data, read_splits(data, seed))
    task = _make_task(kind, splits, data, **options)
    return task, choose_rows(splits, task, data, seed)


def _whole_rows(kind: str, data: DataConfig, splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """The splits without rows that lack a text or a label, if the data says so."""
    if not data.drop_missing:
        return splits
    found = TASKS[kind].find_columns(splits["train"], data)
    return {name: leave_out_missing(split, found) for name, split in splits.items()}


def _make_task(kind: str, splits: dict[str, Dataset], data: DataConfig, **options: Any) -> Task:
    try:
        return TASKS[kind].from_splits(splits, data, **options)
    except Missing as error:
        raise UserError(f"{error}; data.drop_missing=true leaves such rows out") from None


def _read_mix(kind: str, data: DataConfig, seed: int, **options: Any) -> tuple[Task, dict[str, Dataset]]:
    """`read_data` of several data sets. Each gives its own validation rows; then the training rows are interleaved by
    the weights until one data set has no more."""
    own_group, data = data.group, data.model_copy(update={"group": data.group and GROUP})
    parts: list[dict[str, Dataset]] = []
    for part in data.parts:
        splits = _whole_rows(kind, part, read_splits(part))
        parts.append({name: share_columns(kind, split, part) for name, split in splits.items()})
        if own_group:
            require_columns(splits["train"], [own_group])
            parts[-1] = {name: _with_groups(each, splits[name], own_group) for name, each in parts[-1].items()}
    added = (ROW, GROUP)
    named = [each.column_names for splits in parts for each in splits.values()]
    if different := next((names for names in named if sorted(names) != sorted(named[0])), None):
        first, other = (", ".join(name for name in names if name not in added) for names in (named[0], different))
        raise UserError(f"data.mix: one data set has {first} and another {other}: they cannot be mixed")
    keys = {name: name for name in named[0] if name not in added}
    config = data.model_copy(update={"mix": None, **keys})
    task = _make_task(kind, _joined(parts), config, **options)
    chosen = [choose_rows(splits, task, part, seed) for splits, part in zip(parts, data.parts, strict=True)]
    trains = [splits["train"] for splits in chosen]
    train = interleave_datasets(trains, probabilities=data.weights, seed=seed, stopping_strategy="first_exhausted")
    taken = Counter(row.partition(" of ")[2] for row in values(train, ROW))
    there: Counter[str] = Counter()
    for each in trains:
        there[source(each)] += len(each)
    shares = (f"{taken[name]:,} of {rows:,} rows of {name}" for name, rows in there.items())
    logger.info("data.mix: %d training rows: %s", len(train), ", ".join(shares))
    train.info.description = MIX
    return task, choose_rows(_joined(chosen) | {"train": train}, task, data, seed)


def share_columns(kind: str, split: Dataset, data: DataConfig) -> Dataset:
    """A split of one data set of a mix with the columns that all of them have."""
    cls, name = TASKS[kind], data.path or data.train or source(split)
    found = cls.in_common(split, cls.find_columns(split, data))
    rows = [f"{row} of {name}" for row in values(found, ROW)]
    found = found.remove_columns(ROW).add_column(ROW, rows)
    found.info.description = name
    return found


def _with_groups(shared: Dataset, split: Dataset, column: str) -> Dataset:
    """A split of a mix with the user's column that says which rows belong together, where it has one. Equal values in
    two data sets are two groups."""
    name, keys = source(shared), values(split, column) if column in split.column_names else [None] * len(split)
    shared = shared.add_column(GROUP, ["" if is_missing(key) else f"{key} of {name}" for key in keys])
    shared.info.description = name
    return shared


def _joined(parts: list[dict[str, Dataset]]) -> dict[str, Dataset]:
    """The rows of all parts, by split."""
    joined = {}
    for name in SPLIT_NAMES:
        if splits := [part[name] for part in parts if name in part]:
            try:
                joined[name] = concatenate_datasets(splits)
            except ValueError as error:  # from datasets: the types of the columns differ
                raise UserError(f"data.mix: columns of one name have different types: {first_line(error)}") from None
            joined[name].info.description = MIX
    return joined


def guess_task(data: DataConfig) -> str:
    """The task that a data set's columns are for, which is logged once. Where the data cannot be read it is
    classification: whoever reads it says what is wrong.

    Raises:
        UserError: the columns are for a task that this version does not have.
    """
    data = data.parts[0] if data.mix else data
    named = {
        "preference": data.chosen or data.rejected or (data.response and data.label),
        "instruction": data.messages or data.response,
        "token-classification": data.tokens or data.tags,
        "text-to-text": data.prefix,
        "classification": data.label or data.text_pair or data.label_separator or data.protocol,
    }
    if task := next((task for task, field in named.items() if field), None):
        return task
    try:
        return _guess_task(data.model_dump_json())
    except _Unreadable:
        return "classification"


class _Unreadable(Exception):
    """Data that cannot be read."""


@functools.lru_cache(maxsize=1024)
def _guess_task(data: str) -> str:
    notes = logging.getLogger("redpeft.tasks")
    level = notes.level
    notes.setLevel(logging.CRITICAL)  # what reading says is said when the data is read to learn from
    config = DataConfig.model_validate_json(data)
    try:
        train = read_splits(config)["train"]
    except UserError:
        raise _Unreadable from None
    finally:
        notes.setLevel(level)
    task, found = columns.guess_task(train)
    named = [name for name in ("tools", "system", "chat_template") if getattr(config, name) not in (None, "auto")]
    if named and not (task in TASKS and TASKS[task].by_trl):
        return "instruction"
    if not found and config.text and columns.column_names(train) == [config.text]:
        task, found = "instruction", [config.text]
    seen = f"{source(train)} has the column{'s' if len(found) > 1 else ''} {', '.join(found)}"
    if task not in TASKS:
        raise UserError(
            f"{seen}, for the task {task}, which this version does not have; name another task and its columns to use "
            "them otherwise"
        )
    if found:
        logger.info("%s: the task is %s; task=... overrides this", seen, task)
    else:
        seen = f"{source(train)} has the columns {', '.join(columns.column_names(train))}"
        logger.info("%s: the task is taken to be %s; task=... overrides this", seen, task)
    return task


def read_splits(config: DataConfig, seed: int = 0) -> dict[str, Dataset]:
    """The splits "train" and, if they exist, "validation" and "test", with all their rows.

    The test split of a folder or hub data set is left out if its labels are all missing or -1, as GLUE publishes them.
    `protocol` makes a test split (see `glue_splits`), drawn by the seed. `info.description` of a split names its
    source.

    Raises:
        UserError: data that is missing, empty or unreadable.
    """
    splits = {}
    if config.path:
        splits = _read_path(config.path, config.config_name, config.label, config.header, config.generate)
    splits |= {name: read_file(file, config.header) for name in SPLIT_NAMES if (file := getattr(config, name))}
    if "train" not in splits:
        raise UserError(f"{config.path} has no training split; it has {', '.join(splits)}. Give the file as `train`.")
    if config.protocol:
        name = config.config_name or Path(config.path or "").name
        splits = glue_splits(splits, name, config.protocol, seed)
    return {name: splits[name] for name in SPLIT_NAMES if name in splits}


def read_evaluation(
    path: str,
    config_name: str | None = None,
    header: str | None = None,
    generate: Mapping[str, Any] | None = None,
) -> Dataset:
    """All rows of a file, or of the test split of a folder, a hub data set or one of reasoning-gym, or of its
    validation split if it has no test split. `generate`: as in `DataConfig`."""
    if path == "-":
        raise UserError("standard input can only be predicted: to score rows, give them in a file")
    splits = _read_path(path, config_name, header=header, generate=generate)
    for name in ("test", "validation", "train"):
        if name in splits:
            return splits[name]
    raise UserError(f"{path} has no train, validation or test split with labels")


# --- a folder or a name on the hub ----------------------------------------------------------------------------------


def _read_path(
    path: str,
    config_name: str | None,
    label: str | list[str] | None = None,
    header: str | None = None,
    generate: Mapping[str, Any] | None = None,
) -> dict[str, Dataset]:
    if path.startswith(PREFIX):
        return draw_questions(path, generate or {})
    if generate:
        raise UserError(f"data.generate is for data of reasoning-gym, such as {PREFIX}chain_sum, not for {path}")
    local = Path(path).expanduser()
    if local.is_file():
        return {"train": read_file(local, header)}
    if local.is_dir() and config_name:
        return _read_path(str(local / config_name), None, label, header)
    if is_local(path) and not local.is_dir():
        raise UserError(f"no such file or folder: {path}")
    splits = _read_folder(local, header) if local.is_dir() else _read_hub(path, config_name)
    if "test" in splits and _is_unlabelled(splits["test"], splits.get("train"), label):
        logger.warning("%s has no labels and is left out", source(splits.pop("test")))
    return splits


def _is_unlabelled(test: Dataset, train: Dataset | None, label: str | list[str] | None) -> bool:
    """Whether all labels of a test split are missing, or are -1 and the training rows have no such label."""
    column = find_column(test, [label.lower()] if isinstance(label, str) else LABEL_COLUMNS)
    if column is None:
        return False
    found = {label_name(value) for value in values(test, column) if not is_missing(value)}
    if not found:
        return True
    learned = values(train, column) if train is not None and column in train.column_names else []
    return found == {"-1"} and "-1" not in map(label_name, learned)


def _read_hub(path: str, config_name: str | None) -> dict[str, Dataset]:
    try:
        found = load_dataset(path, config_name)
    except (
        Exception
    ) as error:  # the hub's client raises errors of many kinds, from no network to no such configuration
        raise UserError(
            f"no file or folder {path!r}, and reading it from the Hugging Face Hub failed: {first_line(error)}"
        ) from None
    named = {name.lower(): with_rows(split, f"{path} ({name})") for name, split in found.items()}
    return _named_splits(named, path)


def splits_in(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder by split, found by their names."""
    return _named_splits(_data_files(folder))


def _data_files(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if extension(file) in READERS and file.is_file():
            files.setdefault(SHARD.sub("", stem(file).lower()), []).append(file)
    return files


def _read_folder(folder: Path, header: str | None) -> dict[str, Dataset]:
    if saved := _read_saved(folder):
        return saved
    files = _data_files(folder)
    chosen = _named_splits(files, str(folder))
    if chosen:
        return {name: read_parts(parts, header) for name, parts in chosen.items()}
    if (folder / "data").is_dir():  # a snapshot from the Hub
        return _read_folder(folder / "data", header)
    inside = {child.name.lower(): child for child in sorted(folder.iterdir()) if child.is_dir()}
    if by_class := {name: _read_classes(child) for name, child in _named_splits(inside).items()}:
        if found := {name: rows for name, rows in by_class.items() if rows is not None}:
            return found
    elif (rows := _read_classes(folder)) is not None:
        return {"train": rows}
    seen = ", ".join(file.name for parts in files.values() for file in parts) or "no data file"
    raise UserError(
        f"{folder} holds no train, validation or test file ({', '.join(READERS)}), and no folders of .txt files named "
        f"after classes; it holds {seen}"
    )


def _read_saved(folder: Path) -> dict[str, Dataset]:
    """The splits that `save_to_disk` wrote, for one data set or several. Empty if it did not write this folder."""
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return {}
    try:
        found = load_from_disk(str(folder), keep_in_memory=True)
    except Exception as error:  # errors of datasets, pyarrow or json
        raise UserError(f"cannot read {folder}, which save_to_disk wrote: {first_line(error)}") from None
    splits = found if isinstance(found, DatasetDict) else {"train": found}
    named = _named_splits({str(name).lower(): rows for name, rows in splits.items()}, str(folder))
    return {name: with_rows(rows, f"{folder.name} ({name})") for name, rows in named.items()}


def _read_classes(folder: Path) -> Dataset | None:
    """The texts in folders that are named after their classes, such as `pos/1.txt`. None if this is not such a
    folder."""
    files = sorted(folder.glob("*/*.txt"))
    if len({file.parent for file in files}) < 2:
        return None
    rows = {"text": read_texts(files, str(folder)), "label": [file.parent.name for file in files]}
    return with_rows(Dataset.from_dict(rows), folder.name, [str(file.relative_to(folder)) for file in files])


def _named_splits(found: dict, place: str | None = None) -> dict:
    """For each split, the first name that is known to mean it. If `place` is given, the others are logged."""
    known = {split: next((name for name in names if name in found), None) for split, names in SPLIT_NAMES.items()}
    chosen = {split: name for split, name in known.items() if name is not None}
    if chosen and place is not None and (others := [name for name in found if name not in chosen.values()]):
        logger.info("%s: not read: %s", place, ", ".join(others))
    return {split: found[name] for split, name in chosen.items()}
