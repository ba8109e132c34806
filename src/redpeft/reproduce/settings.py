"""recipes/paper: the recipe of a model, completed by the values of a row and a task."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from redpeft.training.recipe import Recipe, load_recipe, read_yaml

SETTINGS = ("paper", "released", "default")
"""Whose values: as published, as in the authors' released scripts where they differ, or with this library's own
learning rates and units for a base model that the published ones were not chosen for."""
OWN = ("learning_rate", "head_lr")  # what `default` leaves to the method's default; of RED also
PAPER_RULE = ("unit", "scale_origin")  # these options


def recipes_folder() -> Path:
    """Where the paper's recipes lie: in the package, or in a checkout beside it."""
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

    A task that the paper has not takes what is no list: the recipe's epochs, the method's default learning rate.
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
    """The recipe of one run. `changes` go last; keys may have dots. Raises `UserError` as `load_recipe` does."""
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
