"""The page of a report: the table beside what was published, what is around it, its pictures and its files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from redpeft.console import machine, rounded
from redpeft.plots import Bar, MethodScore, plot_bars, plot_parameters
from redpeft.reproduce.plan import Request, base_of, source_of
from redpeft.reproduce.published import Column
from redpeft.reproduce.report import Report, ReportRow, ScoredRun, as_data, sampling_error
from redpeft.runs import pages
from redpeft.runs.pages import Inline, Link, number, relative
from redpeft.storage import to_json, write_atomically

LEGEND = (
    "Each cell: measured / published. Measured is the mean over seeds ± their standard deviation, on the test split, "
    "with a link to the runs."
)
RUN_HEAD = ["run", "test", "validation", "best epoch", "learning rate", "epochs", "trained", "minutes"]


def write_report(report: Report) -> Path:
    """Write <table>.md, .html, .json and pictures into the output folder; returns the HTML page's path."""
    out, name = report.request.out, report.table.name
    pictures = [
        _plot_parameters(report, out / f"{name}-parameters.png"),
        _plot_columns(report, out / f"{name}-columns.png"),
    ]
    blocks = page_blocks(report, [picture for picture in pictures if picture])
    write_atomically(out / f"{name}.json", to_json(as_data(report), indent=2))
    write_atomically(out / f"{name}.md", pages.to_markdown(blocks).rstrip("\n"))
    write_atomically(out / f"{name}.html", pages.to_html(report.table.title, blocks).rstrip("\n"))
    return out / f"{name}.html"


def grid(report: Report) -> tuple[list[str], list[list[Inline]]]:
    """The table itself: its head, and for each method what was measured beside what was published."""
    digits = report.table.digits
    head = ["method", "trained / published", *map(report.column_name, report.columns)]
    head += ["average"] if report.table.average else []
    rows: list[list[Inline]] = []
    for line in report.lines:
        trained = "-" if line.trained is None else f"{line.trained:,}"
        cells: list[Inline] = [_shown(report, line, column) for column in report.columns]
        if report.table.average:
            averages = (line.average(), line.published_average(report.table))
            cells.append([" / ".join(number(value, digits) for value in averages)])
        rows.append([[line.row.label], [f"{trained} / {line.row.parameters or '-'}"], *cells])
    errors = [_sampling(report, column) for column in report.columns]
    if any(error is not None for error in errors):
        shown: list[Inline] = [["" if error is None else f"± {error:.{digits}f}"] for error in errors]
        rest: list[Inline] = [[""]] * (len(head) - 2 - len(errors))
        rows.append([["standard error of one run, from its test rows"], [""], *shown, *rest])
    return head, rows


def page_blocks(report: Report, pictures: Sequence[Path]) -> list[pages.Block]:
    """The whole page."""
    table, request = report.table, report.request
    published = base_of(table.values)
    base = (
        f"Base model: {request.model}. The published figures are {published}'s."
        if request.model
        else f"On {published}."
    )
    if request.smoke:
        base = "A smoke test: a few steps of a tiny model, to check that everything runs. The scores mean nothing."
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
        blocks += [pages.Heading("Failed runs"), pages.Grid(["run", "error"], _failures(report), numbers=False)]
    if report.left:
        blocks += [pages.Heading("What is left to do"), *(pages.Code(text) for text in report.left)]
    blocks += [pages.Heading("Runs"), pages.Grid(RUN_HEAD, [_run_row(report, *run) for run in report.runs])]
    sources = [[[line.row.label], [source_of(table.values, line.row.name)]] for line in report.lines]
    blocks += [pages.Heading("Where the settings come from"), pages.Grid(["method", "source"], sources, numbers=False)]
    facts = {**machine(), **report.versions()}
    blocks += [
        pages.Heading("Machine and versions"),
        pages.Grid(["", ""], [[[k], [v]] for k, v in facts.items()], numbers=False),
    ]
    return blocks


def command_line(request: Request) -> str:
    """The call that asks for this."""
    options = {
        "--rows": request.rows and ",".join(request.rows),
        "--tasks": request.tasks and ",".join(request.tasks),
        "--seeds": request.seeds and ",".join(map(str, request.seeds)),
        "--model": request.model,
        "--base-folder": request.base_folder,
        "--data": request.data,
        "--questions": request.questions,
        "--settings": request.settings,
        "--budget": "smoke" if request.smoke else None,
        "--out": request.out,
    }
    changes = [f"{key}={json.dumps(value)}" for key, value in request.changes.items()]
    changes += [f"{row}:{key}={json.dumps(v)}" for row, more in request.row_changes.items() for key, v in more.items()]
    chosen = [word for name, value in options.items() if value for word in (name, str(value))]
    return shlex.join(["redpeft", "reproduce", request.table.name, *changes, *chosen])


def _best_note(report: Report) -> str:
    chosen = any(cell.is_chosen for line in report.lines for cell in line.cells.values())
    note = " Where the paper averages the best of its seeds by test score, the mean of all seeds follows."
    return note if chosen else ""


def _shown(report: Report, line: ReportRow, column: Column) -> list[str | Link]:
    cell, digits = line.cells[column], report.table.digits
    published = number(line.row.scores.get(column), digits, line.row.deviations.get(column))
    folders = [*cell.folders.values()] or [report.request.out / line.row.name / column.task]
    target = _relative(report, folders[0] if len(folders) == 1 else folders[0].parent)
    if cell.headline is None:
        shown: list[str | Link] = [Link("failed", target)] if cell.failed else ["-"]
        return [*shown, f" / {published}"]
    text: list[str | Link] = [Link(number(cell.headline, digits, cell.headline_deviation), target)]
    if cell.is_chosen:
        both = f"{len(cell.chosen)} of {len(cell.scores)}; all {number(cell.mean, digits, cell.deviation)}"
        text.append(f" (best {both})")
    if cell.failed:
        text.append(f" ({len(cell.failed)} failed)")
    return [*text, f" / {published}"]


def _run_row(report: Report, row: str, task: str, run: ScoredRun) -> list[Inline]:
    digits, unit, result = report.table.digits, report.table.unit, run.result
    metrics = [column.metric for column in report.table.columns_of([task])]
    test = ", ".join(number(score and score * unit, digits) for score in map(run.score, metrics))
    best = result["validation"].get(result["metric"])
    return [
        [Link(f"{row}, {task}, seed {run.seed}", _relative(report, run.folder))],
        [test],
        [f"{number(best and best * (1 if result['metric'] == 'loss' else unit), 2)} ({result['metric']})"],
        [rounded(result["best_epoch"])],
        [f"{result['learning_rate']:g}"],
        [rounded(result["epochs"])],
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


def _relative(report: Report, path: Path) -> str:
    return relative(path, report.request.out)


def _plot_parameters(report: Report, path: Path) -> Path | None:
    """The average (or the first column) of each method against the parameters that it trains; hollow: published, where
    that is of the same base model."""
    first = report.columns[0]
    points = []
    for line in report.lines:
        cell, of_paper = line.cells[first], line.row.scores.get(first)
        score, deviation = cell.headline, cell.headline_deviation
        if report.table.average:
            score, deviation, of_paper = line.average(), None, line.published_average(report.table)
        published = None
        if report.is_papers_model and of_paper is not None and line.row.parameter_count:
            published = line.row.parameter_count, of_paper
        points.append(MethodScore(line.row.label, line.trained, score, deviation, published))
    name = "average" if report.table.average else report.column_name(first)
    hollow = " (hollow: published)" if report.is_papers_model else ""
    return plot_parameters(points, "trained parameters, without the head", name + hollow, path)


def _plot_columns(report: Report, path: Path) -> Path | None:
    """A panel for each column with a bar for each method, and a line across it at what was published, where that is of
    the same base model."""
    lines = [line for line in report.lines if any(cell.headline is not None for cell in line.cells.values())]
    panels = {
        report.column_name(column): [
            Bar(
                line.cells[column].headline,
                line.cells[column].headline_deviation,
                line.row.scores.get(column) if report.is_papers_model else None,
            )
            for line in lines
        ]
        for column in report.columns
    }
    title = "axes do not begin at 0" + ("; lines: published" if report.is_papers_model else "")
    return plot_bars([line.row.label for line in lines], panels, title, path)
