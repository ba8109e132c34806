"""Jobs spread over machines by Ray: its scheduler places them, and starts those of a killed worker again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from redpeft.console import log_main
from redpeft.errors import Stopped, UserError, first_line
from redpeft.fleet.queue import Job
from redpeft.runs.runner import run_jobs

RETRIES = 3


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
            results[index] = _lost(jobs[index], error)
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


def _lost(job: Job, error: Exception) -> dict[str, Any]:
    text = " ".join(str(error).split())
    return {"folder": str(job.folder), "error": text, "kind": "RunError", "seed": job.recipe.seed}
