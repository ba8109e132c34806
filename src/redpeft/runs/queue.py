"""A queue of jobs for fleets, with successive halving where groups of them compete."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redpeft.fleet.source import Assignment
from redpeft.storage import RESULT
from redpeft.training.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """One run asked for: a recipe with one seed, and its run folder."""

    recipe: Recipe
    folder: Path


@dataclass
class Group:
    """Jobs of which the better half goes on at each rung (Jamieson and Talwalkar 2016, arXiv 1502.07943).

    The others end there, as if they had been stopped early. `rungs` are the epochs after which they are compared: of E
    epochs E/2, E/4, ... as often as it takes to leave one job, as far as these are whole and different.
    """

    jobs: dict[Path, Recipe]
    waiting: dict[Path, float] = field(default_factory=dict)  # their scores at this rung
    rung: int = 0

    def __post_init__(self) -> None:
        count = math.ceil(math.log2(max(1, len(self.jobs))))
        epochs = min((recipe.epochs for recipe in self.jobs.values()), default=0.0)
        rungs = [max(1.0, math.floor(epochs / 2 ** (count - number))) for number in range(count)]
        self.size = len(self.jobs)
        self.rungs = [*(rung for rung in dict.fromkeys(rungs) if rung < epochs), math.inf]
        alive = sum(not (folder / RESULT).is_file() for folder in self.jobs)
        while self.rung < len(self.rungs) - 1 and alive <= math.ceil(len(self.jobs) / 2 ** (self.rung + 1)):
            self.rung += 1  # it was decided before an interrupt: the worse half is finished

    @property
    def until(self) -> float:
        return self.rungs[self.rung]

    def decide(self) -> list[Assignment]:
        """What becomes of those that wait, once all others have come to their end or wait too."""
        if not self.waiting or self.waiting.keys() != self.jobs.keys():
            return []
        ranked = sorted(self.waiting, key=self.waiting.__getitem__, reverse=True)
        self.rung += 1
        # of all that began: those that ended or failed before an interruption are among the others
        stay = set(ranked[: math.ceil(self.size / 2**self.rung)])
        assignments = [Assignment(self.jobs[folder], folder, self.until, folder not in stay) for folder in ranked]
        self.waiting.clear()
        self.jobs = {folder: recipe for folder, recipe in self.jobs.items() if folder in stay}
        return assignments


class JobQueue:
    """Gives out jobs and collects their results, by run folder. A fleet's `Source`.

    `halving` gives the group of each folder that competes with others. What is given to a worker that dies can be
    given out again (`give_back`): jobs go on from their snapshots.
    """

    def __init__(self, jobs: Iterable[Job], halving: Mapping[Path, Hashable] | None = None) -> None:
        self.results: dict[Path, dict[str, Any]] = {}
        jobs, groups = list(jobs), halving or {}
        members: dict[Hashable, dict[Path, Recipe]] = {}
        for job in jobs:
            if job.folder in groups:
                members.setdefault(groups[job.folder], {})[job.folder] = job.recipe
        self._groups = {folder: group for each in members.values() for group in [Group(each)] for folder in each}
        self._ready = deque(
            Assignment(job.recipe, job.folder, self._groups[job.folder].until if job.folder in groups else math.inf)
            for job in jobs
        )
        self._taken: dict[Path, Assignment] = {}
        self._unfinished = {job.folder for job in jobs}

    def take(self) -> Assignment | None:
        if not self._ready:
            return None
        assignment = self._ready.popleft()
        self._taken[assignment.folder] = assignment
        return assignment

    def done(self, folder: Path, result: dict[str, Any]) -> None:
        self._taken.pop(folder, None)
        self._unfinished.discard(folder)
        self.results[folder] = result
        if group := self._groups.get(folder):
            group.jobs.pop(folder, None)
            self._ready.extend(group.decide())

    def paused(self, folder: Path, score: float) -> None:
        self._taken.pop(folder, None)
        group = self._groups[folder]
        group.waiting[folder] = score
        self._ready.extend(group.decide())

    def left(self) -> int:
        return len(self._unfinished)

    def ready(self) -> int:
        """Jobs that can be taken now."""
        return len(self._ready)

    def give_up(self, error: str) -> dict[Path, dict[str, Any]]:
        """The results, with an error for each job that has none."""
        for folder in sorted(self._unfinished):
            self.results[folder] = {"folder": str(folder), "error": error, "kind": "RunError", "seed": None}
        return self.results

    def give_back(self, folders: Sequence[Path]) -> None:
        """Put what was taken and not ended back, to be taken first."""
        self._ready.extendleft(self._taken.pop(folder) for folder in folders if folder in self._taken)
