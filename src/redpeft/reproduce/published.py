"""The paper's tables as they were printed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from redpeft.errors import UserError

FILE = Path(__file__).parent / "published.yaml"


@dataclass(frozen=True)
class Column:
    """A column of a table: a task, and which of its scores; None is the run's own metric."""

    task: str
    metric: str | None = None

    def name(self, of_one_task: bool) -> str:
        """What stands above the column."""
        return self.task if self.metric is None else self.metric if of_one_task else f"{self.task} {self.metric}"


@dataclass(frozen=True)
class TableRow:
    """A method in a table; `scores` and `deviations` in the paper's unit, where they were printed."""

    name: str
    label: str
    parameters: str | None = None
    scores: dict[Column, float] = field(default_factory=dict)
    deviations: dict[Column, float] = field(default_factory=dict)
    average: float | None = None

    @property
    def is_published(self) -> bool:
        return bool(self.scores) or self.average is not None

    @property
    def parameter_count(self) -> float | None:
        """`parameters` as a number: 0.3M is 300,000."""
        return float(self.parameters.removesuffix("M")) * 1e6 if self.parameters else None


@dataclass(frozen=True)
class Table:
    """One of the paper's tables; the fields are those of published.yaml."""

    name: str
    title: str
    values: str
    columns: tuple[Column, ...]
    rows: dict[str, TableRow]
    seeds: dict[str, list[int]]
    needs: str
    unit: float = 1
    best: dict[str, int] = field(default_factory=dict)
    average: bool = False
    scored: str | None = None

    @property
    def tasks(self) -> list[str]:
        """The tasks to train on, in the table's order."""
        return list(dict.fromkeys(column.task for column in self.columns))

    @property
    def digits(self) -> int:
        """The decimals with which the table is printed."""
        printed = [str(score) for row in self.rows.values() for score in row.scores.values()]
        return max((len(text.partition(".")[2]) for text in printed), default=1)

    def seeds_of(self, task: str) -> list[int]:
        """The seeds that the paper ran a task with."""
        return self.seeds.get(task, self.seeds["default"])

    def columns_of(self, tasks: Iterable[str]) -> list[Column]:
        """The columns of these tasks; a task that is not in the table is a column of its own."""
        known = {task: [column for column in self.columns if column.task == task] for task in tasks}
        metrics = [column.metric for column in self.columns if column.metric]
        one = len(self.tasks) == 1 and metrics  # a table of one task's scores: another data set has the same scores
        return [
            column
            for task, columns in known.items()
            for column in columns or ([Column(task, metric) for metric in metrics] if one else [Column(task)])
        ]


@cache
def tables() -> dict[str, Table]:
    """Every table by its name, in the paper's order."""
    return {name: _table(name, values) for name, values in yaml.safe_load(FILE.read_text(encoding="utf-8")).items()}


def find_table(name: str) -> Table:
    """The table of that name. Raises `UserError` that names the nearest."""
    return tables()[nearest(name, tables(), "table", "; `redpeft reproduce --list` shows what each is")]


def nearest(name: str, known: Iterable[str], what: str, hint: str = "") -> str:
    """`name` if it is known. Raises `UserError` with the nearest of `known`, or all of them."""
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    found = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    raise UserError(f"there is no {what} {name}: {found}{hint}")


def _table(name: str, values: dict[str, Any]) -> Table:
    columns = tuple(Column(task, metric or None) for task, _, metric in (c.partition(".") for c in values["columns"]))
    seeds = {task: _seeds(said) for task, said in values["seeds"].items()}
    rows = {key: _row(key, row, columns) for key, row in values["rows"].items()}
    return Table(name=name, **{**values, "columns": columns, "seeds": seeds, "rows": rows})


def _row(name: str, values: dict[str, Any], columns: tuple[Column, ...]) -> TableRow:
    by_column: dict[str, dict[Column, float]] = {
        key: dict(zip(columns, values[key], strict=True)) for key in ("scores", "deviations") if key in values
    }
    return TableRow(name=name, **{**values, **by_column})


def _seeds(said: int | str) -> list[int]:
    first, _, last = str(said).partition("-")
    return list(range(int(first), int(last or first) + 1))
