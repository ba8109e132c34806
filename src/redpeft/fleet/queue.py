"""The queue that a fleet takes its jobs from, successive halving of jobs that compete, and the loading of jobs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset

from redpeft.console import log_main
from redpeft.errors import RunError, Stopped, UserError, shorten_list
from redpeft.fleet.memory import NoRoom
from redpeft.fleet.template_model import kind_of
from redpeft.storage import RESULT
from redpeft.tasks.base import Task
from redpeft.tasks.columns import source, unread_columns
from redpeft.training.recipe import Recipe
from redpeft.training.train import check_recipe, read_task

Event = dict[str, Any]
Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """The report of callers who want none."""


@dataclass(frozen=True)
class Job:
    """One run asked for: a recipe with one seed, and its run folder.

    A fleet pauses the job after `until` epochs. With `over` it does not train it any further, but scores and saves it.
    """

    recipe: Recipe
    folder: Path
    until: float = math.inf
    over: bool = False


class Queue(Protocol):
    """Gives out jobs, and is told what became of them."""

    def take(self) -> Job | None:
        """The next job; None where there is none now."""

    def done(self, folder: Path, result: dict[str, Any]) -> None:
        """A job has ended: its result, or {"error": ..., "kind": ..., "seed": ...}."""

    def paused(self, folder: Path, score: float) -> None:
        """A job is saved after its `until` epochs, with its best validation score so far (higher is better)."""

    def left(self) -> int:
        """How many jobs have not ended."""


@dataclass
class HalvingGroup:
    """Jobs that compete: at each rung the better half continues (Jamieson and Talwalkar 2016, arXiv 1502.07943).

    The others end there, as by early stopping. `rungs` are the epochs after which jobs are compared: E/2, E/4, ... of
    E epochs, as many as it takes to leave one job, but at least one epoch each.
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
            self.rung += 1  # decided before an interrupt: the worse half is finished

    @property
    def until(self) -> float:
        return self.rungs[self.rung]

    def decide(self) -> list[Job]:
        """The jobs to continue and those to end, once every job of the group waits or has ended; before that none."""
        if not self.waiting or self.waiting.keys() != self.jobs.keys():
            return []
        ranked = sorted(self.waiting, key=self.waiting.__getitem__, reverse=True)
        self.rung += 1
        # half of all that began: jobs that failed, or ended before an interrupt, count among the worse
        stay = set(ranked[: math.ceil(self.size / 2**self.rung)])
        decided = [Job(self.jobs[folder], folder, self.until, folder not in stay) for folder in ranked]
        self.waiting.clear()
        self.jobs = {folder: recipe for folder, recipe in self.jobs.items() if folder in stay}
        return decided


class JobQueue:
    """A `Queue` in the memory of one process, which keeps the results by run folder.

    `halving` gives the group of each folder that competes with others. The jobs of a worker that died can be given out
    again: they continue from their checkpoints.
    """

    def __init__(self, jobs: Iterable[Job], halving: Mapping[Path, Hashable] | None = None) -> None:
        self.results: dict[Path, dict[str, Any]] = {}
        jobs, groups = list(jobs), halving or {}
        competing: dict[Hashable, dict[Path, Recipe]] = {}
        for job in jobs:
            if job.folder in groups:
                competing.setdefault(groups[job.folder], {})[job.folder] = job.recipe
        self._groups = {
            folder: group for recipes in competing.values() for group in [HalvingGroup(recipes)] for folder in recipes
        }
        self._ready = deque(
            Job(job.recipe, job.folder, self._groups[job.folder].until if job.folder in groups else math.inf)
            for job in jobs
        )
        self._taken: dict[Path, tuple[int, Job]] = {}  # with the number of the worker
        self._unfinished = {job.folder for job in jobs}

    def take(self, worker: int = 0) -> Job | None:
        if not self._ready:
            return None
        job = self._ready.popleft()
        self._taken[job.folder] = worker, job
        return job

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
        """How many jobs can be taken now."""
        return len(self._ready)

    def give_up(self, error: str) -> dict[Path, dict[str, Any]]:
        """The results, with an error for each job that has none."""
        for folder in sorted(self._unfinished):
            self.results[folder] = {"folder": str(folder), "error": error, "kind": "RunError", "seed": None}
        return self.results

    def give_back(self, worker: int) -> None:
        """Put back what a worker has taken and not ended; it is taken first."""
        folders = [folder for folder, (owner, _) in self._taken.items() if owner == worker]
        self._ready.extendleft(self._taken.pop(folder)[1] for folder in reversed(folders))


@dataclass(frozen=True)
class LoadedJob:
    """A job with its data, and the kind of fleet that it needs."""

    job: Job
    task: Task
    splits: dict[str, Dataset]

    @property
    def kind(self) -> Hashable:
        return kind_of(self.job.recipe), self.task.shape


ROWS_BY = {"task", "problem_type", "metric", "loss", "data", "seed", "max_length", "learn_prompt"}
"""The fields of a recipe that decide which rows a job has, also in tokens."""


class JobLoader:
    """Loads the jobs of a queue when they are asked for. A job that fails is reported, and the next one is taken.

    A job whose rows are those of the job before it has the same `splits`, which are not read again.
    """

    def __init__(self, queue: Queue, report: Report) -> None:
        self.queue, self.report = queue, report
        self._read: tuple[str, Task, dict[str, Dataset]] | None = None  # by which fields, and what
        self._later: list[tuple[Job, Hashable]] = []  # taken, but of another kind than was asked for
        self._notes: set[str] = set()  # said already

    def next(self, kind: Hashable = None) -> LoadedJob | None:
        """The next job, of this kind if one is given."""
        for index, (job, its_kind) in enumerate(self._later):
            if kind in (None, its_kind):
                del self._later[index]
                return self._load(job) or self.next(kind)
        while taken := self.queue.take():
            if loaded := self._load(taken):
                if kind in (None, loaded.kind):
                    return loaded
                self._later.append((taken, loaded.kind))
        return None

    def done(self, job: Job, result: dict[str, Any]) -> None:
        """Report a job's result, or its error, and give it to the queue."""
        result = {"folder": str(job.folder), **result}
        self.queue.done(job.folder, result)
        self.report({"event": "failed" if "error" in result else "finished", **result})

    @contextmanager
    def failing(self, job: Job) -> Iterator[None]:
        """An error inside becomes the result of this job, and the other jobs continue."""
        try:
            yield
        except (Stopped, NoRoom):
            raise
        except (UserError, RunError) as error:
            self.done(job, {"error": str(error), "kind": type(error).__name__, "seed": job.recipe.seed})

    def _load(self, job: Job) -> LoadedJob | None:
        with self.failing(job):
            if result := job.recipe.result_in(job.folder):
                self.done(job, result)
                return None
            check_recipe(job.recipe)
            fields = job.recipe.model_dump_json(include=ROWS_BY)
            if self._read is None or self._read[0] != fields:
                self._read = fields, *read_task(job.recipe)
            _, task, splits = self._read
            if unread := unread_columns(splits["train"], task.columns):
                note = f"{source(splits['train'])}: columns not read: {shorten_list(unread, 8)}"
                if note not in self._notes:  # many jobs may share a file
                    log_main(note)
                    self._notes.add(note)
            return LoadedJob(job, task, splits)
        return None
