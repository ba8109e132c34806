"""`redpeft sweep`: a grid of recipe fields times seeds, and which of its points is best on the validation split."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from redpeft.errors import UserError
from redpeft.fleet.queue import Job, Report
from redpeft.plots import plot_grid
from redpeft.runs import pages
from redpeft.runs.experiment import Experiment, FleetOptions, JobResult, Usage, run_experiment
from redpeft.runs.pages import Inline, Link, number
from redpeft.runs.progress import sort_score
from redpeft.runs.reports import PAGE, other_scores, write_report
from redpeft.runs.runner import summarise
from redpeft.training.recipe import Recipe, dotted_fields, load_recipe, parse_override
from redpeft.training.train import check_recipe

RECORD, PICTURE = "sweep.json", "grid.png"
HALVED = (
    "With halving most jobs were stopped early and count with the scores that they had then; best is the point of the "
    "best job."
)
OTHER_OPTIONS = {"seed": "--seeds", "seeds": "--seeds", "output": "--out"}


class Point(NamedTuple):
    """One combination of values, and the name of its folder."""

    name: str
    values: dict[str, Any]


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Values by dotted key of `key=value,value,...`. UserError for another form, a key twice, seeds or the output."""
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, _, listed = text.partition("=")
        key, values = parse_override(f"{name.strip() or '-'}=[{listed}]")
        if key == "-" or not isinstance(values, list) or not values:
            raise UserError(f"--grid takes a field and its values, such as lr=3e-3,1e-2, not {text!r}")
        if key in OTHER_OPTIONS:
            raise UserError(f"--grid {key}: use {OTHER_OPTIONS[key]} instead")
        if key in grid:
            raise UserError(f"--grid {key} is given twice; put its values into one list, such as {key}=1,2,3")
        grid[key] = values
    return grid


def parse_seeds(text: str) -> list[int]:
    """0 to N - 1 for "N"; those named for "a,b,c" ("a," names one). UserError for something else."""
    try:
        numbers = [int(number) for number in text.split(",") if number.strip()]
    except ValueError:
        numbers = []
    if "," not in text and numbers:
        numbers = list(range(numbers[0]))
    if not numbers or min(numbers) < 0:
        raise UserError(f"--seeds takes a number of seeds such as 5, or a list such as 1,2,3, not {text!r}")
    return list(dict.fromkeys(numbers))


def points_of(grid: Mapping[str, Sequence[Any]]) -> list[Point]:
    """All combinations of values. UserError where two would have the same folder name."""
    points: dict[str, Point] = {}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        name = ",".join(f"{key}={_folder_name(value)}" for key, value in point.items())
        if points.setdefault(name, Point(name, point)).values != point:
            raise UserError(f"--grid: two values would need the same folder {name}: use a sweep for each")
    return list(points.values())


def jobs_of_grid(
    recipe: str | None, overrides: Sequence[str], points: Sequence[Point], seeds: Sequence[int] | None, out: Path
) -> list[Job]:
    """The jobs in `out`/<point>/seed-<n>: the first seed of every point, then the second, and so on.

    `seeds`: by default the recipe's own. Raises `UserError` for fields that no recipe has, and for values that are
    wrong whatever the data is.
    """
    fields = dotted_fields(recipe, overrides)
    recipes = [load_recipe(None, {**fields, **point.values}).resolved() for point in points]
    for each in recipes:
        check_recipe(each)
    return [
        Job(_with_seed(each, seed), out / point.name / f"seed-{seed}")
        for seed in seeds or recipes[0].seeds or [recipes[0].seed]
        for point, each in zip(points, recipes, strict=True)
    ]


def _with_seed(recipe: Recipe, seed: int) -> Recipe:
    return recipe.model_copy(update={"seed": seed, "seeds": None, "output": None})


def _folder_name(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")


@dataclass(frozen=True)
class PointScore:
    """The scores of a grid point by its metric: mean and standard deviation over its seeds (None for one seed)."""

    point: Point
    seeds: list[int]
    failed: int
    metric: str | None = None
    validation: tuple[float | None, float | None] = (None, None)
    test: tuple[float | None, float | None] = (None, None)
    others: str = "-"  # what was scored beside the metric


@dataclass(frozen=True)
class Sweep:
    """The results of a sweep. `best` is the point with the best mean on the validation split."""

    scores: list[PointScore]
    best: str | None
    results: list[JobResult]
    data: Mapping[str, Any]
    page: Path


def run_sweep(
    recipe: str | None,
    overrides: Sequence[str],
    grid: Mapping[str, Sequence[Any]],
    out: Path,
    seeds: Sequence[int] | None = None,
    options: FleetOptions | None = None,
    report: Report | None = None,
) -> Sweep:
    """Train every point of the grid with every seed, in fleets where a fleet can, and write the report.

    The same call continues what was interrupted; more values or seeds join the others. With halving all points
    and seeds compete as one group. Raises as `run_experiment`, and `UserError` for a grid that is wrong.
    """
    options = options or FleetOptions()
    points = points_of(grid)
    jobs = jobs_of_grid(recipe, overrides, points, seeds, out)
    identity = {"command": "sweep", "grid": sorted(grid), "halving": options.halving}
    groups = {job.folder: "sweep" for job in jobs}
    experiment = Experiment(out, RECORD, identity, jobs, groups, options)
    found: dict[str, Any] = {}

    def write(results: list[JobResult], usage: Usage) -> None:
        scores = [_score(point, results) for point in points]
        found.update(scores=scores, best=_best_job(results) if options.halving else _best(scores))
        picture = _plot(scores, out / PICTURE)
        first: list[pages.Block] = [_grid(found["scores"], found["best"])]
        first += [pages.Paragraph([HALVED])] if options.halving else []
        first += [pages.Picture(picture.name, picture.stem)] if picture else []
        found["data"] = write_report(experiment, results, usage, first, _as_data(**found))

    results, _ = run_experiment(experiment, write, report)
    return Sweep(results=results, page=out / PAGE, **found)


def sweep_table(sweep: Sweep) -> Table:
    """The grid, for a terminal."""
    return pages.to_table(_grid(sweep.scores, sweep.best))


def _grid(scores: Iterable[PointScore], best: str | None) -> pages.Grid:
    head = ["point", "metric", "validation", "test", "other scores", "seeds", "failed", ""]
    rows: list[list[Inline]] = [
        [
            [Link(score.point.name, score.point.name)],
            [score.metric or "-"],
            *([number(mean, 4, deviation)] for mean, deviation in (score.validation, score.test)),
            [score.others],
            [str(len(score.seeds))],
            [str(score.failed)],
            ["best" if score.point.name == best else ""],
        ]
        for score in scores
    ]
    return pages.Grid(head, rows)


def _score(point: Point, results: Iterable[JobResult]) -> PointScore:
    own = [each for each in results if each.folder.parent.name == point.name]
    done = [each.result for each in own if each.result]
    failed = sum(each.error is not None for each in own)
    if not done:
        return PointScore(point, [], failed)
    summary = summarise(done)
    metric = summary["metric"]
    spreads = [(summary[split] or {}).get(metric) or {} for split in ("validation", "test")]
    validation, test = ((spread.get("mean"), spread.get("standard_deviation")) for spread in spreads)
    return PointScore(point, summary["seeds"], failed, metric, validation, test, other_scores(summary))


def _best(scores: Iterable[PointScore]) -> str | None:
    """The best point, among those without failures if there are any; None where points have several metrics."""
    done = [score for score in scores if score.metric and score.validation[0] is not None]
    if len({score.metric for score in done}) != 1:
        return None
    whole = [score for score in done if not score.failed] or done
    return max(whole, key=lambda score: sort_score(score.metric or "", score.validation[0] or 0.0)).point.name


def _best_job(results: Iterable[JobResult]) -> str | None:
    """The point of the best job: with halving, points have trained for different times, so means say little."""
    scores = [(each, score) for each in results if (score := each.score("validation")) is not None]
    if len({each.metric for each, _ in scores}) != 1:
        return None
    return max(scores, key=lambda found: sort_score(found[0].metric, found[1]))[0].folder.parent.name


def _plot(scores: Sequence[PointScore], path: Path) -> Path | None:
    """The scores over the first key whose values are numbers; None where there is no such key, or several metrics."""
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


def _as_data(scores: Iterable[PointScore], best: str | None) -> dict[str, Any]:
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
