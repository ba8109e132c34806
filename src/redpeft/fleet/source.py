"""Where a fleet's jobs come from: a queue of assignments, and the jobs among them that can be begun now."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset

from redpeft.errors import RunError, Stopped, UserError
from redpeft.fleet.memory import NoRoom
from redpeft.fleet.template_model import kind_of, shape_of
from redpeft.tasks import Task
from redpeft.training.recipe import Recipe
from redpeft.training.run import check_recipe, read_task

Event = dict[str, Any]
Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """The report of those who do not want one."""


@dataclass(frozen=True)
class Assignment:
    """A job to work on: until so many epochs, or, with `over`, without any more training."""

    recipe: Recipe
    folder: Path
    until: float = math.inf
    over: bool = False


class Source(Protocol):
    """Who gives out jobs, and is told what became of them."""

    def take(self) -> Assignment | None:
        """The next job; None: there is none now."""

    def done(self, folder: Path, result: dict[str, Any]) -> None:
        """A job came to its end: its result, or {"error": ..., "kind": ..., "seed": ...}."""

    def paused(self, folder: Path, score: float) -> None:
        """A job is saved after its `until` epochs, with the best validation score so far (higher is better)."""

    def left(self) -> int:
        """Jobs that have not come to their end."""


@dataclass(frozen=True)
class Ready:
    """A job with its data, and the kind of fleet that it needs."""

    assignment: Assignment
    task: Task
    splits: dict[str, Dataset]

    @property
    def key(self) -> Hashable:
        return kind_of(self.assignment.recipe), shape_of(self.task)


class Jobs:
    """The jobs of a source, read and checked when they are asked for. One that fails is reported and passed over."""

    def __init__(self, source: Source, report: Report) -> None:
        self.source, self.report = source, report
        self._later: list[tuple[Assignment, Hashable]] = []  # of other kinds than the fleet that was asked for

    def next(self, key: Hashable = None) -> Ready | None:
        """The next job, of this kind if one is given."""
        for place, (assignment, its) in enumerate(self._later):
            if key in (None, its):
                del self._later[place]
                if ready := self._read(assignment):
                    return ready
                return self.next(key)
        while taken := self.source.take():
            if ready := self._read(taken):
                if key in (None, ready.key):
                    return ready
                self._later.append((taken, ready.key))
        return None

    def done(self, assignment: Assignment, result: dict[str, Any]) -> None:
        result = {"folder": str(assignment.folder), **result}
        self.source.done(assignment.folder, result)
        self.report({"event": "failed" if "error" in result else "finished", **result})

    @contextmanager
    def failing(self, assignment: Assignment) -> Iterator[None]:
        """A job's own error is its result, and the others go on."""
        try:
            yield
        except (Stopped, NoRoom):
            raise
        except (UserError, RunError) as error:
            failure = {"error": str(error), "kind": type(error).__name__, "seed": assignment.recipe.seed}
            self.done(assignment, failure)

    def _read(self, assignment: Assignment) -> Ready | None:
        with self.failing(assignment):
            if result := assignment.recipe.result_in(assignment.folder):
                self.done(assignment, result)
                return None
            check_recipe(assignment.recipe)
            return Ready(assignment, *read_task(assignment.recipe))
        return None
