"""A user's data: where it is, and reading it into splits with errors that say which file and which row."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset
from pydantic import BaseModel, ConfigDict, Field, model_validator

from redpeft.errors import UserError
from redpeft.tasks.columns import LABEL_COLUMNS, ROW, find_column, first_line, is_missing_label, source, values

logger = logging.getLogger(__name__)

SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "eval", "validation_matched"),
    "test": ("test",),
}


class DataConfig(BaseModel):
    """Where the data is and what its columns mean. Columns that are not named are guessed and shown."""

    model_config = ConfigDict(extra="forbid")

    path: str | None = Field(
        None,
        description="A data set's name on the Hugging Face hub, a folder with train, validation and test files, or "
        "one file (.csv, .tsv, .jsonl, .json, .parquet) that holds the training rows.",
    )
    config_name: str | None = Field(
        None, description="The hub data set's configuration, such as 'sst2' of 'nyu-mll/glue'."
    )
    train: str | None = Field(None, description="File of training rows; goes before `path`.")
    validation: str | None = Field(None, description="File of validation rows; goes before `path`.")
    test: str | None = Field(None, description="File of test rows; goes before `path`.")
    text: str | None = Field(None, description="Classification: the text's column.")
    text_pair: str | None = Field(None, description="Classification of pairs: the second text's column.")
    label: str | list[str] | None = Field(
        None,
        description="Classification: the label's column. Several labels a row: a column of lists, or the names of "
        "several columns of 0 and 1. Regression: a column of numbers.",
    )
    tokens: str | None = Field(None, description="Token classification: the column with each row's list of words.")
    tags: str | None = Field(None, description="Token classification: the column with each word's tag.")
    prompt: str | None = Field(None, description="Instruction: the prompt's column.")
    response: str | None = Field(None, description="Instruction: the response's column.")
    messages: str | None = Field(
        None, description="Instruction: the column with a chat, a list of {'role': ..., 'content': ...}."
    )
    validation_fraction: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of the training rows that becomes the validation split where there is none.",
    )
    max_train_rows: int | None = Field(None, ge=1, description="Train on at most so many rows, drawn by the seed.")
    max_eval_rows: int | None = Field(
        None, ge=1, description="Validate and test on at most so many rows each, drawn by the seed."
    )

    @model_validator(mode="after")
    def _has_a_source(self) -> DataConfig:
        if not (self.path or self.train):
            raise ValueError("no data: give `path` or `train`")
        return self


def read_splits(config: DataConfig, seed: int = 0) -> dict[str, Dataset]:
    """The splits "train", "validation" and, where there is one, "test".

    Where there is no validation split, `validation_fraction` of the training rows becomes one. The test split of a
    folder or hub data set is left out if its labels are all missing or -1 (as GLUE publishes them). The seed draws the
    rows. Each split's `info.description` says where it comes from.

    Raises:
        UserError: data that is missing, empty or unreadable.
    """
    splits = _read_path(config.path, config.config_name, config.label) if config.path else {}
    splits |= {name: read_file(file) for name in SPLIT_NAMES if (file := getattr(config, name))}
    if "train" not in splits:
        raise UserError(f"{config.path} has no training split; it has {', '.join(splits)}. Give the file as `train`.")
    if "validation" not in splits:
        splits["train"], splits["validation"] = _split_off(splits["train"], config, seed)
    limits = {"train": config.max_train_rows, "validation": config.max_eval_rows, "test": config.max_eval_rows}
    return {name: _at_most(splits[name], limits[name], seed) for name in SPLIT_NAMES if name in splits}


def read_evaluation(path: str, config_name: str | None = None) -> Dataset:
    """All rows of a file; of a folder or hub data set the test split, or where it has none the validation split."""
    splits = _read_path(path, config_name)
    return next(splits[name] for name in ("test", "validation", "train") if name in splits)


def read_file(path: str | Path) -> Dataset:
    """All rows of one file, in memory; the extension decides the format.

    Raises:
        UserError: no such file, an unknown extension, no rows, or text that is not UTF-8 or breaks its format.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"cannot read {path}: the extension decides the format, and {', '.join(READERS)} are known")
    try:
        table = reader(path)
    except (pa.ArrowException, OSError, pd.errors.ParserError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from None
    if table is None or len(table) == 0:
        raise UserError(f"{path} is empty: it holds no rows")
    return _with_rows(table, path.name)


# --- one file -------------------------------------------------------------------------------------------------------
# Read directly and not with `load_dataset`, which turns the words "None" and "NA" of a CSV file into missing values
# and dates into timestamps, guesses types block by block, hides the broken line, and copies the data into a cache.


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, line = f"0x{data[error.start]:02x}", data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8: byte {byte} at position {error.start}, line {line}; save it as UTF-8"
        ) from None


def _read_delimited(path: Path, separator: str) -> Dataset | None:
    text = _read_text(path)
    if not text.strip():
        return None
    frame = pd.read_csv(io.StringIO(text), sep=separator, keep_default_na=False, na_values=[""], low_memory=False)
    frame.columns = frame.columns.str.strip()
    if not isinstance(frame.index, pd.RangeIndex):
        raise UserError(
            f'{path}: the rows have more fields than the header; put texts that hold {separator!r} in "quotes"'
        )
    return Dataset.from_pandas(frame, preserve_index=False)


def _read_json_lines(path: Path) -> Dataset:
    return _from_objects(path, _parse_lines(path, _read_text(path)))


def _read_json(path: Path) -> Dataset:
    """A list of objects, or JSON lines under another extension."""
    text = _read_text(path)
    if not text.lstrip().startswith("["):
        return _from_objects(path, _parse_lines(path, text))
    try:
        return _from_objects(path, list(enumerate(json.loads(text), start=1)))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: broken JSON ({error.msg})") from None


def _parse_lines(path: Path, text: str) -> list[tuple[int, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: broken JSON ({error.msg} at column {error.colno})") from None
    return rows


def _from_objects(path: Path, rows: list[tuple[int, Any]]) -> Dataset:
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f'{path}, row {number}: expected an object such as {{"text": ...}}, found {str(row)[:40]!r}'
            )
    columns = {}
    for name in dict.fromkeys(name for _, row in rows for name in row):
        try:
            columns[name] = pa.array([row.get(name) for _, row in rows])
        except (pa.ArrowException, OverflowError) as error:
            raise UserError(f"{path}: column {name!r} holds values of several types: {first_line(error)}") from None
    return Dataset(pa.table(columns))


def _read_parquet(path: Path) -> Dataset | None:
    return Dataset(pq.read_table(path)) if path.stat().st_size else None


READERS = {
    ".csv": lambda path: _read_delimited(path, ","),
    ".tsv": lambda path: _read_delimited(path, "\t"),
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _with_rows(dataset: Dataset, name: str) -> Dataset:
    dataset = dataset.add_column(ROW, np.arange(1, len(dataset) + 1))
    dataset.info.description = name
    return dataset


# --- a folder or a name on the hub ----------------------------------------------------------------------------------


def _read_path(path: str, config_name: str | None, label: str | list[str] | None = None) -> dict[str, Dataset]:
    local = Path(path).expanduser()
    if local.is_file():
        return {"train": read_file(local)}
    if is_local(path) and not local.is_dir():
        raise UserError(f"no such file or folder: {path}")
    splits = _read_folder(local) if local.is_dir() else _read_hub(path, config_name)
    column = _label_column(splits["test"], label) if "test" in splits else None
    if column and all(is_missing_label(value) or value == -1 for value in values(splits["test"], column)):
        logger.warning("%s has no labels and is left out", source(splits.pop("test")))
    return splits


def _read_hub(path: str, config_name: str | None) -> dict[str, Dataset]:
    try:
        found = load_dataset(path, config_name)
    except Exception as error:  # the hub's client raises many kinds, from no network to no such configuration
        raise UserError(
            f"no file or folder {path!r}, and not read from the Hugging Face hub: {first_line(error)}"
        ) from None
    return _named_splits({name.lower(): _with_rows(split, f"{path} ({name})") for name, split in found.items()})


def is_local(path: str) -> bool:
    """Whether a name that may be a hub's is meant as a path: it exists, or looks like nothing that the hub has."""
    parts = Path(path).parts
    return (
        Path(path).expanduser().exists()
        or path.startswith((".", "/", "~"))
        or "\\" in path
        or len(parts) > 2
        or re.search(r"\.[A-Za-z]{2,8}\d?$", path) is not None
        or (len(parts) == 2 and Path(parts[0]).is_dir())
    )


def _read_folder(folder: Path) -> dict[str, Dataset]:
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in READERS:
            if file.stem.lower() in files:
                raise UserError(f"{folder} holds both {files[file.stem.lower()].name} and {file.name}: remove one")
            files[file.stem.lower()] = file
    chosen = _named_splits(files)
    if not chosen:
        seen = ", ".join(file.name for file in files.values()) or "no data file"
        raise UserError(f"{folder} holds no train, validation or test file ({', '.join(READERS)}); it holds {seen}")
    return {name: read_file(file) for name, file in chosen.items()}


def _named_splits(found: dict) -> dict:
    """Of what was found by name, the first that is known as each split."""
    chosen = {split: [found[name] for name in names if name in found] for split, names in SPLIT_NAMES.items()}
    return {split: candidates[0] for split, candidates in chosen.items() if candidates}


# --- which rows -----------------------------------------------------------------------------------------------------


def _label_column(dataset: Dataset, label: str | list[str] | None) -> str | None:
    return find_column(dataset, [label.lower()] if isinstance(label, str) else LABEL_COLUMNS)


def _split_off(train: Dataset, config: DataConfig, seed: int) -> tuple[Dataset, Dataset]:
    """Training rows without, and with only, the rows that become the validation split."""
    if len(train) < 2:
        raise UserError(f"{source(train)} has one row: too few to take a validation split from it")
    column = _label_column(train, config.label)
    strata = _strata(train, column)
    chosen = _stratified_sample(strata, config.validation_fraction, seed)
    logger.warning(
        "no validation split: %d of %d rows of %s are taken for it (seed %d%s)",
        len(chosen),
        len(train),
        source(train),
        seed,
        f", stratified by {column}" if strata.any() else "",
    )
    rest = np.setdiff1d(np.arange(len(train)), chosen)
    return train.select(rest), train.select(chosen)


def _strata(train: Dataset, column: str | None) -> np.ndarray:
    """A class number for each row, all 0 where there are no labels, or too many values for classes."""
    if column is None:
        return np.zeros(len(train), dtype=int)
    classes, strata = np.unique([str(label) for label in values(train, column)], return_inverse=True)
    return strata if 2 * len(classes) <= len(train) else np.zeros_like(strata)


def _stratified_sample(strata: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted row numbers, about `fraction` of every class and never its only row; at least one in all."""
    order = np.random.default_rng(seed).permutation(len(strata))
    grouped = order[np.argsort(strata[order], kind="stable")]
    firsts = np.unique(strata[grouped], return_index=True)[1]
    rest = np.delete(grouped, firsts)
    count = min(len(rest), max(1, round(fraction * len(strata))))
    return np.unique(rest[np.linspace(0, len(rest) - 1, count).astype(int)])


def _at_most(dataset: Dataset, rows: int | None, seed: int) -> Dataset:
    if rows is None or rows >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(rows))
