"""The report on a batch of jobs: a page as Markdown and HTML, two pictures, and the same as data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from redpeft.console import counted, in_words, rounded
from redpeft.runs import pages
from redpeft.runs.batch import TOTALS, Batch, Row, Totals
from redpeft.runs.machine import machine, versions_of
from redpeft.runs.pages import Inline, Link, number, relative
from redpeft.runs.plots import plot_finished, plot_scores
from redpeft.storage import RESULT, write_atomically

PAGE = "report.html"
HEAD = ["job", "metric", "validation", "test", "other scores", "best epoch", "steps", "trained parameters", "seconds"]
MOST = 50  # rows of a table on a terminal


def write_report(
    batch: Batch,
    rows: Sequence[Row],
    totals: Totals,
    first: Sequence[pages.Block] = (),
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write report.md, report.html, their pictures and the record into the output folder; returns the record's data.

    `first` goes on top of the page, and `more` into the data.
    """
    ends = [(row.folder / RESULT).stat().st_mtime - totals.began for row in rows if row.result]
    pictures = [plot_scores(rows, batch.out / "scores.png"), plot_finished(ends, batch.out / "finished.png")]
    title = f"redpeft {batch.identity['command']}"
    blocks = [
        pages.Heading(title, 1),
        *first,
        pages.Grid(["", ""], [[[name], [value]] for name, value in facts(rows, totals).items()], numbers=False),
        *(pages.Picture(picture.name, picture.stem) for picture in pictures if picture),
        *_failed(batch, rows),
        pages.Heading("Jobs"),
        pages.Grid(HEAD, [_cells(row, batch.out) for row in rows if row.result]),
        pages.Heading("Machine and versions"),
        pages.Grid(["", ""], [[[name], [value]] for name, value in _versions(rows).items()], numbers=False),
    ]
    data = {
        **batch.identity,
        **(more or {}),
        "jobs": [as_data(row) for row in rows],
        TOTALS: asdict(totals),
        "machine": machine(),
        "versions": versions_of(row.result for row in rows if row.result),
    }
    write_atomically(batch.out / "report.md", pages.to_markdown(blocks).rstrip("\n"))
    write_atomically(batch.out / PAGE, pages.to_html(title, blocks).rstrip("\n"))
    write_atomically(batch.out / batch.record, json.dumps(data, indent=2, ensure_ascii=False))
    return data


def facts(rows: Sequence[Row], totals: Totals) -> dict[str, str]:
    """The totals as people read them."""
    failed = sum(row.error is not None for row in rows)
    done = sum(row.result is not None for row in rows)
    found = {
        "jobs": f"{len(rows)}: {done} done, {failed} failed, {len(rows) - done - failed} not finished",
        "wall time": in_words(totals.seconds),
    }
    if totals.examples:
        speed = f"{totals.examples / totals.seconds:,.0f} a second"
        found["examples in fleets, trained on or scored"] = f"{totals.examples:,}, {speed}"
    if totals.plan:
        found["last fleet"] = f"{counted(totals.slots or 0, 'slot')}, passes of {counted(totals.tokens or 0, 'token')}"
        found["its memory"] = totals.plan
    return found


def as_data(row: Row) -> dict[str, Any]:
    """A job for machines."""
    known = {"name": row.name, "folder": str(row.folder)}
    if row.result is None:
        return {**known, "error": row.error}
    same = ("task", "metric", "seed", "best_epoch", "steps", "epochs", "trainable_parameters", "seconds")
    scores = {split: row.score(split) for split in ("validation", "test")}
    return {**known, **scores, **{key: row.result[key] for key in same}}


def jobs_table(rows: Sequence[Row], out: Path) -> Table:
    """The first jobs, for a terminal."""
    table = Table()
    for index, name in enumerate(HEAD):
        table.add_column(name, justify="right" if index > 1 else "left")
    for row in rows[:MOST]:
        cells = _cells(row, out) if row.result else [[row.name], ["failed" if row.error else "not finished"]]
        table.add_row(*map(pages.plain, cells))
    if len(rows) > MOST:
        table.caption = f"and {len(rows) - MOST} more"
    return table


def _cells(row: Row, out: Path) -> list[Inline]:
    result = row.result
    assert result is not None
    return [
        [Link(row.name, relative(row.folder, out))],
        [f"{result['metric']}"],
        [number(row.score("validation"), 4)],
        [number(row.score("test"), 4)],
        [other_scores(result)],
        [rounded(result["best_epoch"])],
        [f"{result['steps']:,}"],
        [f"{result['trainable_parameters']:,}"],
        [f"{result['seconds']:,.1f}"],
    ]


def other_scores(result: Mapping[str, Any]) -> str:
    """What was scored beside the metric: of the test rows, or else of the validation rows. `result` may be a summary
    of seeds, of which the means are shown."""
    scores = {**(result["validation"] or {}), **(result["test"] or {})}
    means = {name: score["mean"] if isinstance(score, dict) else score for name, score in scores.items()}
    return ", ".join(f"{name} {number(mean, 4)}" for name, mean in means.items() if name != result["metric"]) or "-"


def _failed(batch: Batch, rows: Sequence[Row]) -> list[pages.Block]:
    failed: list[list[Inline]] = [
        [[Link(row.name, relative(row.folder, batch.out))], [row.error]] for row in rows if row.error
    ]
    return [pages.Heading("Failed jobs"), pages.Grid(["job", "why"], failed, numbers=False)] if failed else []


def _versions(rows: Sequence[Row]) -> dict[str, str]:
    return {**machine(), **versions_of(row.result for row in rows if row.result)}
