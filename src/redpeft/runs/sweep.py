"""`redpeft sweep`: a grid of recipe fields times seeds, and which of its points is best on the validation split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from redpeft.fleet.queue import Report
from redpeft.runs import pages
from redpeft.runs.batch import Batch, Row, Totals, run_batch
from redpeft.runs.batch_report import PAGE, other_scores, write_report
from redpeft.runs.grid import Point, jobs_of_grid, points_of
from redpeft.runs.pages import Inline, Link, number
from redpeft.runs.plots import plot_grid
from redpeft.runs.runner import summarise
from redpeft.runs.tally import goodness

RECORD, PICTURE = "sweep.json", "grid.png"
HALVED = "With halving most jobs were stopped early: they count with what they reached; best is the best job's point."


@dataclass(frozen=True)
class Score:
    """A grid point over its seeds: mean and standard deviation (None for one seed) by its metric."""

    point: Point
    seeds: list[int]
    failed: int
    metric: str | None = None
    validation: tuple[float | None, float | None] = (None, None)
    test: tuple[float | None, float | None] = (None, None)
    others: str = "-"  # what was scored beside the metric


@dataclass(frozen=True)
class Sweep:
    """What a sweep gave. `best` is the point with the best mean on the validation split."""

    scores: list[Score]
    best: str | None
    rows: list[Row]
    data: Mapping[str, Any]
    page: Path


def run_sweep(
    recipe: str | None,
    overrides: Sequence[str],
    grid: Mapping[str, Sequence[Any]],
    out: Path,
    seeds: Sequence[int] | None = None,
    halving: bool = False,
    slots: int | None = None,
    tokens: int | None = None,
    ray: bool = False,
    tell: Report | None = None,
) -> Sweep:
    """Train every point of the grid with every seed, in fleets where a fleet can, and write the report.

    The same call goes on with what was interrupted; more values or seeds join what is there. With `halving` all points
    and seeds compete as one group. Raises as `run_batch`, and `UserError` for a grid that is wrong.
    """
    points = points_of(grid)
    jobs = jobs_of_grid(recipe, overrides, points, seeds, out)
    identity = {"command": "sweep", "grid": sorted(grid), "halving": halving}
    groups = {job.folder: "sweep" for job in jobs}
    batch = Batch(out, RECORD, identity, jobs, groups, halving, slots, tokens, ray)
    found: dict[str, Any] = {}

    def write(batch: Batch, rows: list[Row], totals: Totals) -> None:
        scores = [_score(point, rows) for point in points]
        found.update(scores=scores, best=_best_job(rows) if halving else _best(scores))
        picture = _plot(scores, out / PICTURE)
        first: list[pages.Block] = [_grid(found["scores"], found["best"])]
        first += [pages.Paragraph([HALVED])] if halving else []
        first += [pages.Picture(picture.name, picture.stem)] if picture else []
        found["data"] = write_report(batch, rows, totals, first, _as_data(**found))

    rows, _ = run_batch(batch, write, tell)
    return Sweep(rows=rows, page=out / PAGE, **found)


def sweep_table(sweep: Sweep) -> Table:
    """The grid, for a terminal."""
    grid = _grid(sweep.scores, sweep.best)
    table = Table()
    for index, name in enumerate(grid.head):
        table.add_column(name, justify="right" if index else "left")
    for row in grid.rows:
        table.add_row(*(pages.plain(cell) for cell in row))
    return table


def _grid(scores: Iterable[Score], best: str | None) -> pages.Grid:
    head = ["point", "metric", "validation", "test", "other scores", "seeds", "failed", ""]
    rows: list[list[Inline]] = [
        [
            [Link(score.point.name, score.point.name)],
            [score.metric or "-"],
            [number(*_figures(score.validation))],
            [number(*_figures(score.test))],
            [score.others],
            [str(len(score.seeds))],
            [str(score.failed)],
            ["best" if score.point.name == best else ""],
        ]
        for score in scores
    ]
    return pages.Grid(head, rows)


def _figures(score: tuple[float | None, float | None]) -> tuple[float | None, int, float | None]:
    mean, deviation = score
    return mean, 4, deviation


def _score(point: Point, rows: Iterable[Row]) -> Score:
    mine = [row for row in rows if row.folder.parent.name == point.name]
    done = [row.result for row in mine if row.result]
    failed = sum(row.error is not None for row in mine)
    if not done:
        return Score(point, [], failed)
    summary = summarise(done)
    metric = summary["metric"]
    spreads = [(summary[split] or {}).get(metric) or {} for split in ("validation", "test")]
    validation, test = ((spread.get("mean"), spread.get("standard_deviation")) for spread in spreads)
    return Score(point, summary["seeds"], failed, metric, validation, test, other_scores(summary))


def _best(scores: Iterable[Score]) -> str | None:
    """Of points without failures, if there are any; None where they have several metrics."""
    done = [score for score in scores if score.metric and score.validation[0] is not None]
    if len({score.metric for score in done}) != 1:
        return None
    whole = [score for score in done if not score.failed] or done
    return max(whole, key=lambda score: goodness(score.metric or "", score.validation[0] or 0.0)).point.name


def _best_job(rows: Iterable[Row]) -> str | None:
    """The point of the best job: with halving, points have not trained for as long as each other."""
    done = [(row, row.result["metric"], score) for row in rows if row.result and (score := row.score("validation"))]
    if len({metric for _, metric, _ in done}) != 1:
        return None
    return max(done, key=lambda each: goodness(*each[1:]))[0].folder.parent.name


def _plot(scores: Sequence[Score], path: Path) -> Path | None:
    """Against the first key whose values are numbers."""
    done = [score for score in scores if score.validation[0] is not None]
    keys = scores[0].point.values
    numeric = [key for key in keys if all(type(score.point.values[key]) in (int, float) for score in scores)]
    if not numeric or len({score.metric for score in done}) != 1:
        return None
    curves: dict[str, list[tuple[float, float, float | None]]] = {}
    for score in done:
        others = ", ".join(f"{key}={value}" for key, value in score.point.values.items() if key != numeric[0])
        mean, deviation = score.validation
        curves.setdefault(others, []).append((score.point.values[numeric[0]], mean or 0.0, deviation))
    return plot_grid(curves, numeric[0], f"validation {done[0].metric}", path)


def _as_data(scores: Iterable[Score], best: str | None) -> dict[str, Any]:
    names = ("mean", "standard_deviation")
    points = [
        {
            "name": score.point.name,
            "values": score.point.values,
            "metric": score.metric,
            "validation": dict(zip(names, score.validation, strict=True)),
            "test": dict(zip(names, score.test, strict=True)),
            "seeds": score.seeds,
            "failed": score.failed,
        }
        for score in scores
    ]
    return {"points": points, "best": best}
