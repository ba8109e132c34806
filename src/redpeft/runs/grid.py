"""A grid of recipe fields and seeds, and the jobs that it asks for."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from redpeft.errors import UserError
from redpeft.fleet.queue import Job
from redpeft.training.recipe import Recipe, dotted_fields, load_recipe, parse_override
from redpeft.training.train import check_recipe

OPTIONS = {"seed": "--seeds", "seeds": "--seeds", "output": "--out"}


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
        if key in OPTIONS:
            raise UserError(f"--grid {key}: leave that to {OPTIONS[key]}")
        if key in grid:
            raise UserError(f"--grid {key} is given twice; put its values into one list, such as {key}=1,2,3")
        grid[key] = values
    return grid


def parse_seeds(text: str) -> list[int]:
    """The seeds 0 to N - 1 of "N", or those of "a,b,c" ("a," is one). UserError for something else."""
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
    """The cross product. UserError for two values that one folder's name would stand for."""
    points: dict[str, Point] = {}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        name = ",".join(f"{key}={_in_a_name(value)}" for key, value in point.items())
        if points.setdefault(name, Point(name, point)).values != point:
            raise UserError(f"--grid: two values would need the same folder {name}: use a sweep for each")
    return list(points.values())


def jobs_of_grid(
    recipe: str | None, overrides: Sequence[str], points: Sequence[Point], seeds: Sequence[int] | None, out: Path
) -> list[Job]:
    """The jobs in `out`/<point>/seed-<n>: the first seed of every point, then the second, so that all grow together.

    `seeds` are the recipe's own when not given. Raises `UserError` for what no recipe has, and for what can be seen to
    be wrong before data is read.
    """
    fields = dotted_fields(recipe, overrides)
    recipes = [load_recipe(None, {**fields, **point.values}) for point in points]
    for each in recipes:
        check_recipe(each)
    return [
        Job(_with_seed(each, seed), out / point.name / f"seed-{seed}")
        for seed in seeds or recipes[0].seeds or [recipes[0].seed]
        for point, each in zip(points, recipes, strict=True)
    ]


def _with_seed(recipe: Recipe, seed: int) -> Recipe:
    return recipe.model_copy(update={"seed": seed, "seeds": None, "output": None})


def _in_a_name(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")
