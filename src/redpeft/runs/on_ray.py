"""Jobs and fleets spread over machines by Ray, which places them; the work of a killed worker is started again."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from redpeft.console import log_main
from redpeft.errors import Stopped, UserError, first_line
from redpeft.fleet.queue import Event, Job, JobQueue, Report, silent
from redpeft.fleet.scheduler import SLOTS, train_fleets
from redpeft.runs.runner import checked_for_fleets, run_jobs

RETRIES = 3
POLL = 0.5  # seconds between two looks at the events of the workers


def require_ray() -> None:
    """Raises `UserError` where Ray is not installed."""
    try:
        import ray  # noqa: F401
    except ImportError:
        raise UserError("--ray needs Ray: pip install redpeft[ray]") from None


def run_on_ray(jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """`run_jobs`, each job a task of a Ray cluster with one CPU and, where the cluster has GPUs, one GPU.

    The cluster is that of `connect`. Run folders, data and base models must be at the same paths on all its machines
    (a shared disk). A job whose worker is killed or told to stop is started again, up to three times, and goes on from
    its last checkpoint; after that its result is {"error": ...} as for any job that fails. Raises `UserError` without
    Ray or a cluster, and as `run_jobs`.
    """
    require_ray()
    import ray

    jobs = [Job(job.recipe, job.folder.resolve()) for job in jobs]
    for job in jobs:
        job.recipe.result_in(job.folder)
    gpus = 1 if connect().get("GPU", 0) >= 1 else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES, retry_exceptions=[Stopped])(run_jobs)
    waiting = {task.remote([job]): index for index, job in enumerate(jobs)}
    results: list[dict[str, Any]] = [{} for _ in jobs]
    while waiting:
        [reference], _ = ray.wait(list(waiting))
        index = waiting.pop(reference)
        try:
            [results[index]] = ray.get(reference)
        except (ray.exceptions.RayError, Stopped) as error:
            text = " ".join(str(error).split())
            failed = {"error": text, "kind": "RunError", "seed": jobs[index].recipe.seed}
            results[index] = {"folder": str(jobs[index].folder), **failed}
        log_main(
            f"job {len(jobs) - len(waiting)} of {len(jobs)}: {jobs[index].folder} {results[index].get('error', '')}"
        )
    return results


def connect() -> dict[str, float]:
    """The resources of the cluster that RAY_ADDRESS names or that runs on this machine, or else of one of this machine
    alone, started now. Raises `UserError` without Ray or a cluster."""
    require_ray()
    import ray

    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise UserError(f"no Ray cluster can be reached or started: {first_line(error)}") from None
    return ray.cluster_resources()


class SharedQueue(JobQueue):
    """A `JobQueue` in a process of its own, which keeps events for the driver."""

    def __init__(self, jobs: Sequence[Job], halving: Mapping[Path, Hashable] | None) -> None:
        super().__init__(jobs, halving)
        self.events: list[Event] = []

    def report(self, event: Event) -> None:
        self.events.append(event)

    def take_events(self) -> list[Event]:
        """The events since the last call."""
        events, self.events = self.events, []
        return events


class RemoteQueue:
    """The shared queue, as the scheduler of a worker calls it."""

    def __init__(self, queue: Any, worker: int) -> None:
        self.queue, self.worker = queue, worker

    def take(self) -> Job | None:
        return _get(self.queue.take.remote(self.worker))

    def done(self, folder: Path, result: dict[str, Any]) -> None:
        _get(self.queue.done.remote(folder, result))

    def paused(self, folder: Path, score: float) -> None:
        _get(self.queue.paused.remote(folder, score))

    def left(self) -> int:
        return _get(self.queue.left.remote())

    def report(self, event: Event) -> None:
        self.queue.report.remote(event)


def run_fleets_on_ray(
    jobs: Iterable[Job],
    slots: int | None = None,
    tokens: int | None = None,
    halving: Mapping[Path, Hashable] | None = None,
    report: Report = silent,
) -> dict[Path, dict[str, Any]]:
    """`run_fleets` with a fleet on every GPU of a Ray cluster (where it has none, on every CPU).

    Run folders, data and base models must be at the same paths on all machines (a shared disk). The jobs of a worker
    that is killed or told to stop go back into the queue, and continue from their last checkpoints; after three lost
    workers for each GPU (or CPU) the jobs that are left get an error as their result. Raises `UserError` without Ray
    or a cluster, and as `run_fleets`.
    """
    jobs = checked_for_fleets(Job(job.recipe, job.folder.resolve()) for job in jobs)
    halving = {folder.resolve(): group for folder, group in (halving or {}).items()}
    resources = connect()
    import ray

    on_gpus = int(resources.get("GPU", 0))
    places = max(1, min(len(jobs), on_gpus or int(resources.get("CPU", 1))))
    each = min(slots or SLOTS, math.ceil(len(jobs) / places))
    queue = ray.remote(num_cpus=0)(SharedQueue).remote(jobs, halving)
    task = ray.remote(num_cpus=1, num_gpus=1 if on_gpus else 0, max_retries=0)(_train_from)
    workers: dict[Any, int] = {}
    started = lost = 0
    why = ""
    while _get(queue.left.remote()) and lost <= RETRIES * places:
        while len(workers) < min(places, len(workers) + _get(queue.ready.remote())):
            workers[task.remote(queue, started, each, tokens)] = started
            started += 1
        for reference in ray.wait(list(workers), timeout=POLL)[0]:
            worker = workers.pop(reference)
            try:
                ray.get(reference)
            except (ray.exceptions.RayError, Stopped) as error:
                lost, why = lost + 1, " ".join(str(error).split())
                _get(queue.give_back.remote(worker))
        for event in _get(queue.take_events.remote()):
            report(event)
    results = _get(queue.give_up.remote(f"given up after {lost} lost workers; the last one: {why}"))
    for event in _get(queue.take_events.remote()):
        report(event)
    ray.kill(queue)
    return results


def _train_from(queue: Any, worker: int, slots: int, tokens: int | None) -> None:
    remote = RemoteQueue(queue, worker)
    train_fleets(remote, slots, tokens, remote.report)


def _get(reference: Any) -> Any:
    import ray

    return ray.get(reference)
