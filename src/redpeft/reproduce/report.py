"""What the runs of a table gave, beside what was published: run folders become cells, and cells a report.

A cell has scores by seed, their mean, the mean of the best k, and their spread. page.py shows a report.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redpeft.console import machine
from redpeft.reproduce.external_scores import extra_scores, what_is_left
from redpeft.reproduce.plan import Request, TableRun, base_of
from redpeft.reproduce.published import Column, Table, TableRow
from redpeft.runs.reports import versions_of
from redpeft.storage import RESULT, read_result

SEED = "seed-"


@dataclass(frozen=True)
class ScoredRun:
    """A finished run: what its result.json holds, and the scores of the table's benchmark, if that has one."""

    folder: Path
    result: Mapping[str, Any]
    extra: Mapping[str, float]

    @property
    def seed(self) -> int:
        return self.result["seed"]

    def score(self, metric: str | None) -> float | None:
        """A score (the run's own metric for None) on the test split, or on validation where there is no other."""
        name = metric or self.result["metric"]
        value = self.extra.get(name, (self.result["test"] or self.result["validation"]).get(name))
        return None if value is None else float(value)


@dataclass(frozen=True)
class Cell:
    """One method on one column: scores by seed in the table's unit, and what the failed runs said.

    `best` is k where the paper averages the best k of its seeds.
    """

    scores: Mapping[int, float]
    folders: Mapping[int, Path]
    failed: Mapping[int, str]
    best: int | None = None

    @property
    def mean(self) -> float | None:
        """Of all seeds."""
        return statistics.fmean(self.scores.values()) if self.scores else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation (of the sample) over all seeds."""
        return _deviation(list(self.scores.values()))

    @property
    def chosen(self) -> list[float]:
        """The scores that the paper would average: the k highest test scores, or all."""
        return sorted(self.scores.values(), reverse=True)[: self.best]

    @property
    def is_chosen(self) -> bool:
        """Whether some of the scores are left out of the paper's mean."""
        return len(self.chosen) < len(self.scores)

    @property
    def headline(self) -> float | None:
        """The mean as the paper takes it."""
        return statistics.fmean(self.chosen) if self.scores else None

    @property
    def headline_deviation(self) -> float | None:
        """The standard deviation of the scores in the headline."""
        return _deviation(self.chosen)


def finished_runs(table: Table, out: Path) -> dict[tuple[str, str], list[ScoredRun]]:
    """The finished runs of a table in its output folder, by row and task, in the order of their seeds."""
    found: dict[tuple[str, str], list[ScoredRun]] = {}
    for path in out.glob(f"*/*/{SEED}*/{RESULT}"):
        row, task, _ = path.relative_to(out).parts[:-1]
        if row in table.rows:
            extra = extra_scores(path.parent, table.scored) if table.scored else {}
            found.setdefault((row, task), []).append(ScoredRun(path.parent, read_result(path.parent), extra))
    return {key: sorted(runs, key=lambda run: run.seed) for key, runs in found.items()}


def cell(table: Table, column: Column, runs: Iterable[ScoredRun], failed: Mapping[int, str]) -> Cell:
    """The cell of the runs of one row and task."""
    runs = list(runs)
    scores = {run.seed: value * table.unit for run in runs if (value := run.score(column.metric)) is not None}
    return Cell(scores, {run.seed: run.folder for run in runs}, failed, table.best.get(column.task))


def average(cells: Collection[Cell]) -> float | None:
    """The mean of the headlines of one row; None where a cell has none."""
    values = [cell.headline for cell in cells]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def sampling_error(run: ScoredRun) -> float | None:
    """The standard error of a score from the number of its test rows, as a share of 1.

    Of an accuracy p on n rows sqrt(p (1 - p) / n), of a Pearson correlation r (1 - r^2) / sqrt(n - 1), else None.
    """
    score, rows = run.score(None), run.result.get("rows", {}).get("test", 0)
    if score is None or rows < 2:
        return None
    if run.result["metric"] == "accuracy":
        return math.sqrt(score * (1 - score) / rows)
    return (1 - score**2) / math.sqrt(rows - 1) if run.result["metric"] == "pearson" else None


def beside_head(result: Mapping[str, Any]) -> int:
    """The parameters that a run trained but for the head, as the paper counts them."""
    head = 0 if result["method"] == "full" else result["head_parameters"]
    return result["trainable_parameters"] - head


@dataclass(frozen=True)
class ReportRow:
    """A row of the report: a method, what it trained, and its cells."""

    row: TableRow
    trained: int | None
    cells: dict[Column, Cell]

    def average(self) -> float | None:
        return average(self.cells.values())

    def published_average(self, table: Table) -> float | None:
        """The paper's, over the columns that are shown."""
        if set(self.cells) == set(table.columns):
            return self.row.average
        shown = [self.row.scores.get(column) for column in self.cells]
        known = [score for score in shown if score is not None]
        return sum(known) / len(known) if known and len(known) == len(shown) else None


@dataclass(frozen=True)
class Report:
    """The report on everything that lies in an output folder, and the failures of the call that made it."""

    request: Request
    columns: list[Column]
    lines: list[ReportRow]
    runs: list[tuple[str, str, ScoredRun]]  # row, task
    failed: dict[str, str]  # by run folder
    left: list[str]  # what is to be done by hand

    @property
    def table(self) -> Table:
        return self.request.table

    @property
    def is_papers_model(self) -> bool:
        """Whether what was measured can be held against what was published."""
        return self.request.model is None and not self.request.smoke

    def versions(self) -> dict[str, str]:
        """The versions that the runs were made with."""
        return versions_of(run.result for *_, run in self.runs)

    def column_name(self, column: Column) -> str:
        """What stands above a column."""
        return column.name(len({column.task for column in self.columns}) == 1)


def make_report(request: Request, asked: Sequence[TableRun], failed: Mapping[Path, str]) -> Report:
    """Gather the table's finished runs in the output folder, and put those that failed into their cells.

    Shown are the rows and tasks asked for, and whatever else of the table was run before.
    """
    table = request.table
    tasks = dict.fromkeys([*table.tasks, *(run.task for run in asked)])
    found = {key: runs for key, runs in finished_runs(table, request.out).items() if key[1] in tasks}
    pairs = {*((run.row, run.task) for run in asked), *found}
    columns = table.columns_of(task for task in tasks if any(task == other for _, other in pairs))
    broken: dict[tuple[str, str], dict[int, str]] = {}
    for run in asked:
        if run.job.folder in failed:
            broken.setdefault((run.row, run.task), {})[run.seed] = failed[run.job.folder]
    lines = []
    for name in (name for name in table.rows if any(row == name for row, _ in pairs)):
        cells = {
            column: cell(table, column, found.get((name, column.task), ()), broken.get((name, column.task), {}))
            for column in columns
        }
        done = [run for (row, _), runs in found.items() if row == name for run in runs]
        lines.append(ReportRow(table.rows[name], beside_head(done[0].result) if done else None, cells))
    runs = [(row, task, run) for (row, task), runs in sorted(found.items()) for run in runs]
    left = [said for *_, run in runs if table.scored and (said := what_is_left(run.folder, table.scored))]
    return Report(request, columns, lines, runs, {str(path): text for path, text in failed.items()}, left)


def as_data(report: Report) -> dict[str, Any]:
    """The report for machines: each row's cells with their means, spreads, scores by seed and run folders."""
    rows = {}
    for line in report.lines:
        rows[line.row.name] = {
            "label": line.row.label,
            "trained_parameters": line.trained,
            "published_parameters": line.row.parameters,
            "average": line.average() if report.table.average else None,
            "published_average": line.published_average(report.table) if report.table.average else None,
            "columns": {report.column_name(column): _cell_data(line, column) for column in report.columns},
        }
    return {
        "table": report.table.name,
        **report.request.identity(),
        "base": report.request.model or base_of(report.table.values),
        "rows": rows,
        "failed": report.failed,
        "machine": machine(),
        "versions": report.versions(),
    }


def _cell_data(line: ReportRow, column: Column) -> dict[str, Any]:
    cell = line.cells[column]
    return {
        "published": line.row.scores.get(column),
        "headline": cell.headline,
        "headline_deviation": cell.headline_deviation,
        "mean": cell.mean,
        "standard_deviation": cell.deviation,
        "best": len(cell.chosen) if cell.is_chosen else None,
        "scores": {str(seed): score for seed, score in cell.scores.items()},
        "runs": {str(seed): str(folder) for seed, folder in cell.folders.items()},
        "failed": {str(seed): text for seed, text in cell.failed.items()},
    }


def _deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
