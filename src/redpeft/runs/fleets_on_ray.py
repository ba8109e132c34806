"""Fleets on several machines: one in each worker of a Ray cluster, and all of them pull jobs from one queue."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from redpeft.errors import Stopped
from redpeft.fleet.queue import Event, Job, JobQueue, Report, silent
from redpeft.fleet.scheduler import SLOTS, train_fleets
from redpeft.runs.on_ray import RETRIES, connect
from redpeft.runs.runner import checked_for_fleets

PATIENCE = 0.5  # seconds between two looks at what happens


class SharedQueue:
    """A `JobQueue` in a process of its own, which knows who took what, and keeps what happens for the driver."""

    def __init__(self, jobs: Sequence[Job], halving: Mapping[Path, Hashable] | None) -> None:
        self.queue = JobQueue(jobs, halving)
        self.taken: dict[int, set[Path]] = {}
        self.events: list[Event] = []

    def take(self, worker: int) -> Job | None:
        job = self.queue.take()
        if job is not None:
            self.taken.setdefault(worker, set()).add(job.folder)
        return job

    def done(self, worker: int, folder: Path, result: dict[str, Any]) -> None:
        self.taken[worker].discard(folder)
        self.queue.done(folder, result)

    def paused(self, worker: int, folder: Path, score: float) -> None:
        self.taken[worker].discard(folder)
        self.queue.paused(folder, score)

    def left(self) -> int:
        return self.queue.left()

    def ready(self) -> int:
        return self.queue.ready()

    def tell(self, event: Event) -> None:
        self.events.append(event)

    def news(self) -> list[Event]:
        """What has happened since this was last asked."""
        news, self.events = self.events, []
        return news

    def lose(self, worker: int) -> None:
        """Put back what a worker that died had taken."""
        self.queue.give_back(sorted(self.taken.pop(worker, set())))

    def give_up(self, error: str) -> dict[Path, dict[str, Any]]:
        """The results, with an error for what has none."""
        return self.queue.give_up(error)


class RemoteSource:
    """The shared queue as a worker's fleet sees it."""

    def __init__(self, queue: Any, worker: int) -> None:
        self.queue, self.worker = queue, worker

    def take(self) -> Job | None:
        return _get(self.queue.take.remote(self.worker))

    def done(self, folder: Path, result: dict[str, Any]) -> None:
        _get(self.queue.done.remote(self.worker, folder, result))

    def paused(self, folder: Path, score: float) -> None:
        _get(self.queue.paused.remote(self.worker, folder, score))

    def left(self) -> int:
        return _get(self.queue.left.remote())

    def tell(self, event: Event) -> None:
        self.queue.tell.remote(event)


def run_fleets_on_ray(
    jobs: Iterable[Job],
    slots: int | None = None,
    tokens: int | None = None,
    halving: Mapping[Path, Hashable] | None = None,
    report: Report = silent,
) -> dict[Path, dict[str, Any]]:
    """`run_fleets` with a fleet on every GPU of a Ray cluster (where it has none, on every CPU).

    Run folders, data and base models must be at the same paths on all machines (a shared disk). What a worker had
    taken that is killed or told to stop goes back into the queue, and from its last snapshot on; after three lost
    workers for each place in the cluster what is left gets an error as its result. Raises `UserError` without Ray or
    a cluster, and as `run_fleets`.
    """
    jobs = checked_for_fleets(Job(job.recipe, job.folder.resolve()) for job in jobs)
    halving = {folder.resolve(): group for folder, group in (halving or {}).items()}
    resources = connect()
    import ray

    on_gpus = int(resources.get("GPU", 0))
    places = max(1, min(len(jobs), on_gpus or int(resources.get("CPU", 1))))
    each = min(slots or SLOTS, math.ceil(len(jobs) / places))
    queue = ray.remote(num_cpus=0)(SharedQueue).remote(jobs, halving)
    task = ray.remote(num_cpus=1, num_gpus=1 if on_gpus else 0, max_retries=0)(_work)
    workers: dict[Any, int] = {}
    started = lost = 0
    why = ""
    while _get(queue.left.remote()) and lost <= RETRIES * places:
        while len(workers) < min(places, len(workers) + _get(queue.ready.remote())):
            workers[task.remote(queue, started, each, tokens)] = started
            started += 1
        for reference in ray.wait(list(workers), timeout=PATIENCE)[0]:
            worker = workers.pop(reference)
            try:
                ray.get(reference)
            except (ray.exceptions.RayError, Stopped) as error:
                lost, why = lost + 1, " ".join(str(error).split())
                _get(queue.lose.remote(worker))
        for event in _get(queue.news.remote()):
            report(event)
    results = _get(queue.give_up.remote(f"given up after {lost} lost workers; the last one: {why}"))
    for event in _get(queue.news.remote()):
        report(event)
    ray.kill(queue)
    return results


def _work(queue: Any, worker: int, slots: int, tokens: int | None) -> None:
    source = RemoteSource(queue, worker)
    train_fleets(source, slots, tokens, source.tell)


def _get(reference: Any) -> Any:
    import ray

    return ray.get(reference)
