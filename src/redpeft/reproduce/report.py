"""What the runs of a table gave beside what was published: a page as Markdown and HTML, pictures, and the data."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redpeft.reproduce import pages
from redpeft.reproduce.aggregate import Cell, Done, average, beside_head, cell, finished_runs, sampling_error
from redpeft.reproduce.machine import machine
from redpeft.reproduce.pages import Inline, Link
from redpeft.reproduce.plan import Request, Run
from redpeft.reproduce.plots import plot_columns, plot_parameters
from redpeft.reproduce.published import Column, Row, Table
from redpeft.reproduce.scored import what_is_left
from redpeft.reproduce.settings import base_of, source_of
from redpeft.training.loop import to_json
from redpeft.training.run_folder import write_atomically


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


def make_report(request: Request, asked: Sequence[Run], failed: Mapping[Path, str]) -> Report:
    """Gather the finished runs of the table in the output folder, and put those that failed into their cells."""
    table = request.table
    found = finished_runs(table, request.out)
    pairs = dict.fromkeys([*((run.row, run.task) for run in asked), *found])
    tasks = {task: None for _, task in pairs}
    columns = table.columns_of([*(t for t in table.tasks if t in tasks), *(t for t in tasks if t not in table.tasks)])
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
    blocks = _blocks(report, [picture for picture in pictures if picture])
    write_atomically(out / f"{name}.json", to_json(as_data(report), indent=2))
    write_atomically(out / f"{name}.md", pages.to_markdown(blocks).rstrip("\n"))
    write_atomically(out / f"{name}.html", pages.to_html(report.table.title, blocks).rstrip("\n"))
    return out / f"{name}.html"


def as_data(report: Report) -> dict[str, Any]:
    """The report for machines: each row's cells with their means, spreads, scores by seed and run folders."""
    one = len({column.task for column in report.columns}) == 1
    rows = {}
    for line in report.lines:
        rows[line.row.name] = {
            "label": line.row.label,
            "trained_parameters": line.trained,
            "published_parameters": line.row.parameters,
            "average": line.average() if report.table.average else None,
            "published_average": line.published_average(report.table) if report.table.average else None,
            "columns": {column.name(one): _cell_data(line, column) for column in report.columns},
        }
    return {
        "table": report.table.name,
        **report.request.identity(),
        "base": report.request.model or base_of(report.table.values),
        "rows": rows,
        "failed": report.failed,
        "machine": machine(),
        "versions": _versions(report),
    }


def grid(report: Report) -> tuple[list[str], list[list[Inline]]]:
    """The table itself: its head, and for each method what was measured beside what was published."""
    one, digits = len({column.task for column in report.columns}) == 1, report.table.digits
    head = ["method", "trained / published", *(column.name(one) for column in report.columns)]
    head += ["average"] if report.table.average else []
    rows: list[list[Inline]] = []
    for line in report.lines:
        trained = "-" if line.trained is None else f"{line.trained:,}"
        cells: list[Inline] = [_shown(report, line, column) for column in report.columns]
        if report.table.average:
            cells.append([f"{_number(line.average(), 1)} / {_number(line.published_average(report.table), 1)}"])
        rows.append([[line.row.label], [f"{trained} / {line.row.parameters or '-'}"], *cells])
    errors = [_sampling(report, column) for column in report.columns]
    if any(error is not None for error in errors):
        shown: list[Inline] = [["" if error is None else f"± {error:.{digits}f}"] for error in errors]
        rest: list[Inline] = [[""]] * (len(head) - 2 - len(errors))
        rows.append([["standard error of one run, by its test rows"], [""], *shown, *rest])
    return head, rows


def command_line(request: Request) -> str:
    """The call that asks for this."""
    options = {
        "--rows": request.rows and ",".join(request.rows),
        "--tasks": request.tasks and ",".join(request.tasks),
        "--seeds": request.seeds and ",".join(map(str, request.seeds)),
        "--model": request.model,
        "--base-folder": request.base_folder,
        "--data": request.data,
        "--settings": request.settings,
        "--budget": "smoke" if request.smoke else None,
        "--out": request.out,
    }
    changes = [f"{key}={json.dumps(value)}" for key, value in request.changes.items()]
    changes += [f"{row}:{key}={json.dumps(v)}" for row, more in request.row_changes.items() for key, v in more.items()]
    chosen = [word for name, value in options.items() if value for word in (name, str(value))]
    return shlex.join(["redpeft", "reproduce", request.table.name, *changes, *chosen])


def _blocks(report: Report, pictures: Sequence[Path]) -> list[pages.Block]:
    table, request = report.table, report.request
    published = base_of(table.values)
    base = f"Base model: {request.model} (the paper's: {published})." if request.model else f"Base model: {published}."
    if request.smoke:
        base = "A smoke test: a few steps, to see that everything runs. Its scores mean nothing. " + base
    head, rows = grid(report)
    blocks: list[pages.Block] = [
        pages.Heading(table.title, 1),
        pages.Paragraph([base]),
        pages.Code(command_line(request)),
        pages.Paragraph([LEGEND + _best_note(report)]),
        pages.Grid(head, rows),
        *(pages.Picture(path.name, path.stem.replace("-", " ")) for path in pictures),
    ]
    if report.failed:
        blocks += [pages.Heading("Failed runs"), pages.Grid(["run", "error"], _failures(report))]
    if report.left:
        blocks += [pages.Heading("What is left to do"), *(pages.Code(text) for text in report.left)]
    blocks += [pages.Heading("Runs"), pages.Grid(RUN_HEAD, [_run_row(report, *run) for run in report.runs])]
    sources = [[[line.row.label], [source_of(table.values, line.row.name)]] for line in report.lines]
    blocks += [pages.Heading("Where the settings come from"), pages.Grid(["method", "source"], sources)]
    facts = {**machine(), **_versions(report)}
    blocks += [pages.Heading("Machine and versions"), pages.Grid(["", ""], [[[k], [v]] for k, v in facts.items()])]
    return blocks


LEGEND = (
    "Measured: the mean over seeds ± their standard deviation, on the test split; behind the stroke: published. Each "
    "figure leads to its runs."
)
RUN_HEAD = ["run", "test", "validation", "best epoch", "learning rate", "epochs", "trained", "minutes"]


def _best_note(report: Report) -> str:
    chosen = any(cell.is_chosen for line in report.lines for cell in line.cells.values())
    note = " Where the paper averages the best of its seeds, by their test scores, the mean of all follows."
    return note if chosen else ""


def _shown(report: Report, line: Line, column: Column) -> list[str | Link]:
    cell, digits = line.cells[column], report.table.digits
    published = _number(line.row.scores.get(column), digits, line.row.deviations.get(column))
    folders = [*cell.folders.values()] or [report.request.out / line.row.name / column.task]
    target = _relative(report, folders[0] if len(folders) == 1 else folders[0].parent)
    if cell.headline is None:
        shown: list[str | Link] = [Link("failed", target)] if cell.failed else ["-"]
        return [*shown, f" / {published}"]
    text: list[str | Link] = [Link(_number(cell.headline, digits, cell.headline_deviation), target)]
    if cell.is_chosen:
        both = f"{len(cell.chosen)} of {len(cell.scores)}; all {_number(cell.mean, digits, cell.deviation)}"
        text.append(f" (best {both})")
    if cell.failed:
        text.append(f" ({len(cell.failed)} failed)")
    return [*text, f" / {published}"]


def _run_row(report: Report, row: str, task: str, run: Done) -> list[Inline]:
    digits, unit, result = report.table.digits, report.table.unit, run.result
    metrics = [column.metric for column in report.table.columns_of([task])]
    test = ", ".join(_number(score and score * unit, digits) for score in map(run.score, metrics))
    best = result["validation"].get(result["metric"])
    return [
        [Link(f"{row}, {task}, seed {run.seed}", _relative(report, run.folder))],
        [test],
        [f"{_number(best and best * (1 if result['metric'] == 'loss' else unit), 2)} ({result['metric']})"],
        [f"{result['best_epoch']:g}"],
        [f"{result['learning_rate']:g}"],
        [f"{result['epochs']:g}"],
        [f"{result['trainable_parameters']:,}"],
        [f"{result['seconds'] / 60:.1f}"],
    ]


def _failures(report: Report) -> list[list[Inline]]:
    return [[[Link(folder, _relative(report, Path(folder)))], [text]] for folder, text in report.failed.items()]


def _sampling(report: Report, column: Column) -> float | None:
    if column.metric:
        return None
    errors = [sampling_error(run) for _, task, run in report.runs if task == column.task]
    known = [error for error in errors if error is not None]
    return max(known) * report.table.unit if known else None


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


def _versions(report: Report) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for *_, run in report.runs:
        for name, version in run.result["versions"].items():
            found.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(versions)) for name, versions in found.items()}


def _relative(report: Report, path: Path) -> str:
    return Path(os.path.relpath(path, report.request.out)).as_posix()


def _number(value: float | None, digits: int, deviation: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
