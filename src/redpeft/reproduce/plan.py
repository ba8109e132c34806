"""A table becomes runs: rows x tasks x seeds, each with a recipe from recipes/paper and a folder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from redpeft.errors import UserError
from redpeft.fleet.queue import Job
from redpeft.reproduce.published import Table, nearest
from redpeft.reproduce.smoke import SMOKE, make_data, make_model
from redpeft.runs import experiment
from redpeft.tasks.rows import GLUE
from redpeft.training.recipe import Recipe, full_name, load_recipe, parse_override, read_yaml

IDENTITY = "reproduce.json"
OWN = ("learning_rate", "head_lr")  # the fields that the settings "default" leave to the method
PAPER_RULE = ("unit", "scale_origin")  # and the options of RED


@dataclass(frozen=True)
class Request:
    """Which runs of a table are asked for, and on which models and data.

    Attributes:
        rows, tasks, seeds: None: those of the paper (of its tasks, those that `data` has).
        model: a base model (a folder, or a name on the Hub) instead of the paper's.
        base_folder: the folder of the paper's base models, by their names on the Hub or the last parts of these.
        data: a folder with a folder for each task; None: the Hub.
        questions: the questions of AlpacaEval or MT-Bench, for the tables that they score.
        settings: whose values: "paper" (as published), "released" (those of the authors' released scripts where they
            differ), or "default" (this library's own learning rates and units, for a base model that the published
            ones were not chosen for).
        changes: fields of all recipes; `row_changes`: of the recipes of one row.
        smoke: a few steps of a tiny model on generated data, unless `model` or `data` is given.
    """

    table: Table
    out: Path
    rows: Sequence[str] | None = None
    tasks: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    model: str | None = None
    base_folder: Path | None = None
    data: Path | None = None
    questions: Path | None = None
    settings: str = "paper"
    changes: Mapping[str, Any] = field(default_factory=dict)
    row_changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    smoke: bool = False

    def identity(self) -> dict[str, Any]:
        """What every run in one folder has in common."""
        return {
            "values": self.table.values,
            "model": self.model,
            "base_folder": self.base_folder and str(self.base_folder),
            "data": self.data and str(self.data),
            "settings": self.settings,
            "budget": "smoke" if self.smoke else "full",
            "changes": dict(self.changes),
        }


@dataclass(frozen=True)
class TableRun:
    """One run of a table."""

    row: str
    task: str
    job: Job

    @property
    def seed(self) -> int:
        return self.job.recipe.seed


def parse_changes(texts: Sequence[str], table: Table) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """`key=value` for every recipe and `row:key=value` for those of one row. UserError for another form or row."""
    changes: dict[str, Any] = {}
    by_row: dict[str, dict[str, Any]] = {}
    for text in texts:
        key, value = parse_override(text)
        row, colon, name = key.partition(":")
        if colon:
            by_row.setdefault(nearest(row, table.rows, f"row of {table.name}"), {})[full_name(name)] = value
        else:
            changes[key] = value
    return changes, by_row


def plan(request: Request, assets: Path) -> list[TableRun]:
    """The runs of a request: the first seed of every row and task, then the second, so that all grow at the same time.

    A smoke test's tiny model and data are written into the folder `assets`. Raises `UserError` for a row, a task or a
    data set that is not there, and for a field that no recipe has.
    """
    table = request.table
    asked = request.rows or [name for name, row in table.rows.items() if row.is_published]
    rows = [nearest(row, table.rows, f"row of {table.name}") for row in dict.fromkeys(asked)]
    tasks = _tasks(request)
    base = _base(request, assets)
    data = make_data(assets / "data", tasks) if request.smoke and request.data is None else request.data
    turns = zip_longest(*(_seeds(request, task) for task in tasks))
    return [
        _run(request, row, task, seed, {"base.model": base, **_data(table, task, data)})
        for seeds in turns
        for task, seed in zip(tasks, seeds, strict=True)
        if seed is not None
        for row in rows
    ]


def _run(request: Request, row: str, task: str, seed: int, sources: dict[str, Any]) -> TableRun:
    changes = {
        **sources,
        **(SMOKE if request.smoke else {}),
        **request.changes,
        **request.row_changes.get(row, {}),
        "seed": seed,
    }
    recipe = recipe_for(request.table.values, row, task, request.settings, changes)
    return TableRun(row, task, Job(recipe, request.out / row / task / f"seed-{seed}"))


def _seeds(request: Request, task: str) -> list[int]:
    """The seeds asked for; the paper's, or the first of them in a smoke test, where none are."""
    paper = request.table.seeds_of(task)
    return list(dict.fromkeys(request.seeds or (paper[:1] if request.smoke else paper)))


def check_folder(request: Request) -> None:
    """Raises `UserError` for an output folder of something else, or of runs with other settings."""
    experiment.check_folder(request.out / IDENTITY, request.identity(), "reproduction")


def claim(request: Request) -> None:
    """Record in the output folder what all its runs have in common."""
    experiment.claim(request.out / IDENTITY, request.identity())


def _tasks(request: Request) -> list[str]:
    """The tasks asked for; the paper's, or those of them that the data has, where none are."""
    table, data = request.table, request.data
    if data is None:
        if not request.tasks:
            return list(dict.fromkeys([table.tasks[0], table.tasks[-1]])) if request.smoke else table.tasks
        hint = "; other data sets need --data FOLDER"
        return [nearest(task, table.tasks, f"task of {table.name}", hint) for task in dict.fromkeys(request.tasks)]
    if not data.is_dir():
        raise UserError(f"no such data folder: {data}")
    there = sorted(path.name for path in data.iterdir() if path.is_dir())
    if request.tasks:
        return [nearest(task, there, f"data set in {data}") for task in dict.fromkeys(request.tasks)]
    found = [task for task in table.tasks if task in there]
    if not found:
        raise UserError(
            f"{data} has none of the data sets of {table.name} ({', '.join(table.tasks)}): add them as folders, "
            f"or choose with --tasks from what it has: {', '.join(there) or 'nothing'}"
        )
    return found


def _base(request: Request, assets: Path) -> str:
    name = base_of(request.table.values)
    if request.model:
        local = Path(request.model).expanduser()
        return str(local.resolve()) if local.is_dir() else request.model
    if request.smoke:
        return str(make_model(assets / "model", family_of(request.table.values)))
    if request.base_folder is None:
        return name
    places = [request.base_folder / name, request.base_folder / name.rpartition("/")[2]]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise UserError(f"no base model {name} in {request.base_folder}: expected {' or '.join(map(str, places))}")
    return str(found.resolve())


def _data(table: Table, task: str, data: Path | None) -> dict[str, Any]:
    """Where a task's rows are: in a folder of that name in `data`, or where the recipe says on the Hub."""
    one = len(table.tasks) == 1
    if data is None:
        return {} if one else {"data.config_name": task}
    return {
        "data.path": str((data / task).resolve()),
        "data.config_name": None,
        **({} if one or task in GLUE else {"data.protocol": None}),
    }


# --- recipes/paper: the recipe of a model, completed by the values of a row and a task ------------------------------


def recipes_folder() -> Path:
    """The folder of the paper's recipes: in the package, or in a checkout beside it."""
    packaged = Path(__file__).parent / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "recipes" / "paper"


@cache
def values() -> dict[str, Any]:
    """What values.yaml holds."""
    return read_yaml(recipes_folder() / "values.yaml")


def base_of(model: str) -> str:
    """The base model of a block of values.yaml, as the Hub calls it."""
    return values()[model]["base"]


def family_of(model: str) -> str:
    """The family of a block of values.yaml: the name of its recipe."""
    return Path(values()[model]["recipe"]).stem


def source_of(model: str, row: str) -> str:
    """Where a row's values come from."""
    return values()[model]["rows"][row]["source"]


def row_values(model: str, row: str, task: str, settings: str = "paper") -> dict[str, Any]:
    """The fields of a recipe that the values of one row set for one task.

    A task that is not in the paper gets the fields that are the same for all tasks, the recipe's epochs and the
    method's default learning rate.
    """
    block = values()[model]
    released = block["rows"][row].get("released", {}) if settings == "released" else {}
    fields = {**block, **block["rows"][row]}
    for name in ("recipe", "base", "rows", "source", "released"):
        fields.pop(name, None)
    found = {"learning_rate": None} | _of_task(fields, task) | _of_task(released, task)
    if settings == "default":
        found = {key: value for key, value in found.items() if key not in OWN}
        found["learning_rate"] = None
        options = found["method_options"].items()
        found["method_options"] = {key: value for key, value in options if key not in PAPER_RULE}
    return found


def recipe_for(model: str, row: str, task: str, settings: str, changes: Mapping[str, Any]) -> Recipe:
    """The recipe of one run. `changes` override the other values; keys may have dots. Raises `UserError` as
    `load_recipe` does."""
    overrides = copy.deepcopy({**row_values(model, row, task, settings), **changes})
    return load_recipe(recipes_folder() / values()[model]["recipe"], overrides)


def _of_task(fields: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Fields with the task's own value where they have one for each task."""
    tasks = values()["tasks"]
    found = {}
    for key, value in fields.items():
        if isinstance(value, list):
            value = dict(zip(tasks, value, strict=True))
        if isinstance(value, dict) and value and set(value) <= set(tasks):
            if task in value:
                found[key] = value[task]
        else:
            found[key] = value
    return found
