"""What the runs of a table gave beside what was published: a page as Markdown and HTML, pictures, and the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redpeft.reproduce.aggregate import Cell, Done, average, beside_head, cell, finished_runs
from redpeft.reproduce.layout import page_blocks
from redpeft.reproduce.plan import Request, Run
from redpeft.reproduce.plots import plot_columns, plot_parameters
from redpeft.reproduce.published import Column, Row, Table
from redpeft.reproduce.scored import what_is_left
from redpeft.reproduce.settings import base_of
from redpeft.runs import pages
from redpeft.runs.machine import machine, versions_of
from redpeft.storage import to_json, write_atomically


@dataclass(frozen=True)
class Line:
    """A row of the report: a method, what it trained, and its cells."""

    row: Row
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
    lines: list[Line]
    runs: list[tuple[str, str, Done]]  # row, task
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


def make_report(request: Request, asked: Sequence[Run], failed: Mapping[Path, str]) -> Report:
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
        lines.append(Line(table.rows[name], beside_head(done[0].result) if done else None, cells))
    runs = [(row, task, run) for (row, task), runs in sorted(found.items()) for run in runs]
    left = [said for *_, run in runs if table.scored and (said := what_is_left(run.folder, table.scored))]
    return Report(request, columns, lines, runs, {str(path): text for path, text in failed.items()}, left)


def write_report(report: Report) -> Path:
    """Write <table>.md, .html, .json and pictures into the output folder; returns the HTML page's path."""
    out, name = report.request.out, report.table.name
    pictures = [
        plot_parameters(report, out / f"{name}-parameters.png"),
        plot_columns(report, out / f"{name}-columns.png"),
    ]
    blocks = page_blocks(report, [picture for picture in pictures if picture])
    write_atomically(out / f"{name}.json", to_json(as_data(report), indent=2))
    write_atomically(out / f"{name}.md", pages.to_markdown(blocks).rstrip("\n"))
    write_atomically(out / f"{name}.html", pages.to_html(report.table.title, blocks).rstrip("\n"))
    return out / f"{name}.html"


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


def _cell_data(line: Line, column: Column) -> dict[str, Any]:
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
