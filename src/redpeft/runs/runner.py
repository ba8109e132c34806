"""Many runs: a list of jobs, side by side or one after the other, each resumed or skipped as its folder says."""

from __future__ import annotations

import os
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from redpeft.console import is_first_process, log_main
from redpeft.errors import RunError, Stopped, UserError
from redpeft.fleet.fleet import MustTrainAlone
from redpeft.fleet.queue import Event, Job, JobQueue, Report, silent
from redpeft.fleet.scheduler import train_fleets
from redpeft.fleet.template_model import kind_of, why_alone
from redpeft.runs.progress import JobProgress, logging_once, showing
from redpeft.storage import CHECKPOINTS, last_checkpoint, locked, to_json, write_atomically
from redpeft.training.recipe import Recipe
from redpeft.training.train import train
from redpeft.training.trainer import RolloutFunction

SUMMARY = "summary.json"
ENOUGH_ROWS = 8  # in a batch


def jobs_of(recipe: Recipe, folder: str | Path) -> list[Job]:
    """The jobs of a recipe: one in `folder`, or for several seeds one in each `folder`/seed-<n>."""
    folder = Path(folder)
    if recipe.seeds is None:
        return [Job(recipe, folder)]
    return [
        Job(recipe.model_copy(update={"seed": seed, "seeds": None}), folder / f"seed-{seed}")
        for seed in dict.fromkeys(recipe.seeds)
    ]


def run_jobs(jobs: Iterable[Job], rollout_func: RolloutFunction | None = None) -> list[dict[str, Any]]:
    """Run the jobs and return the result of each, in their order: side by side in fleets where that is faster, else
    one after the other.

    Finished jobs are skipped and unfinished ones continue from their last checkpoint: run an interrupted list again as
    it is. A job that fails does not stop the others: its result is {"error": message, "seed": ..., "kind": ...}.
    Raises `UserError` before the first step if a folder belongs to another recipe, and `Stopped` on Ctrl-C or SIGTERM.
    """
    jobs = [Job(job.recipe.alone(), job.folder) for job in jobs]
    for job in jobs:
        job.recipe.result_in(job.folder)
    together = [job for kind in _kinds(jobs).values() for job in kind if len(kind) > 1]
    results: dict[Path, dict[str, Any]] = {}
    if together:
        found = _run_together(together)
        results |= {folder: each for folder, each in found.items() if not must_train_alone(each)}
    rest = [job for job in jobs if job.folder not in results]
    for number, job in enumerate(rest, start=1):
        if len(rest) > 1:
            log_main(f"job {number} of {len(rest)}: {job.folder}")
        results[job.folder] = _run_alone(job, rollout_func)
    return [results[job.folder] for job in jobs]


def run_fleets(
    jobs: Iterable[Job],
    slots: int | None = None,
    tokens: int | None = None,
    halving: Mapping[Path, Hashable] | None = None,
    report: Report = silent,
) -> dict[Path, dict[str, Any]]:
    """Run the jobs in fleets: the result of each by its folder. Arguments as of `train_fleets` and `JobQueue`.

    Raises `UserError` for a job that no fleet can train, and as `run_jobs`.
    """
    queue = JobQueue(checked_for_fleets(jobs), halving)
    train_fleets(queue, slots, tokens, report)
    return queue.results


def must_train_alone(result: Mapping[str, Any]) -> bool:
    """Whether a job of `run_fleets` failed for the one reason that it can be trained alone."""
    return result.get("kind") == MustTrainAlone.__name__


def checked_for_fleets(jobs: Iterable[Job]) -> list[Job]:
    """The jobs as fleets take them. UserError for one that no fleet can train, or a folder of another recipe."""
    jobs = [Job(job.recipe.alone(), job.folder) for job in jobs]
    for job in jobs:
        job.recipe.result_in(job.folder)
        if reason := why_alone(job.recipe):
            raise UserError(f"{job.folder}: {reason} cannot be trained in a fleet; use redpeft train")
    return jobs


def _run_together(jobs: list[Job]) -> dict[Path, dict[str, Any]]:
    progress = JobProgress({job.folder.resolve(): str(job.folder) for job in jobs})
    with logging_once(), showing(progress, live=True) as show:

        def report(event: Event) -> None:
            progress(event)
            show(event)

        return run_fleets(jobs, report=report)


def _run_alone(job: Job, rollout_func: RolloutFunction | None) -> dict[str, Any]:
    try:
        result = train(job.recipe, job.folder, rollout_func)
    except Stopped:
        raise
    except (UserError, RunError) as error:
        log_main(f"{job.folder}: {error}")
        result = {"error": str(error), "kind": type(error).__name__, "seed": job.recipe.seed}
    return {"folder": str(job.folder), **result}


def _kinds(jobs: Iterable[Job]) -> dict[Hashable, list[Job]]:
    """The jobs that a fleet trains faster than one after the other, by the kind of their fleet.

    On a CPU a row among many costs little less than in a batch of 8 (benchmarks/fleet.py rows); on a GPU there is
    room beside small batches.
    """
    kinds: dict[Hashable, list[Job]] = {}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return kinds
    for job in jobs:
        small = torch.cuda.is_available() or job.recipe.batch_size < ENOUGH_ROWS
        begun_alone = last_checkpoint(job.folder / CHECKPOINTS) is not None
        if small and not begun_alone and why_alone(job.recipe) is None:
            kinds.setdefault(kind_of(job.recipe), []).append(job)
    return kinds


def run_recipe(recipe: Recipe, folder: str | Path, rollout_func: RolloutFunction | None = None) -> dict[str, Any]:
    """Run a recipe in `folder`; returns its result or, for several seeds, the summary written to summary.json.
    `rollout_func`: see `train`.

    A seed that fails does not stop the others and raises nothing: the summary names it and its error in `failed`
    (the command prints the summary and exits with 1). Where no seed succeeded, the first one's `UserError` or
    `RunError` is raised and there is no summary.
    """
    if recipe.seeds is None:
        return train(recipe, folder, rollout_func)
    with locked(Path(folder)):
        results = run_jobs(jobs_of(recipe, folder), rollout_func)
        failed = [result for result in results if "error" in result]
        if len(failed) == len(results):
            raise (UserError if failed[0]["kind"] == "UserError" else RunError)(failed[0]["error"])
        summary = summarise(results)
        if is_first_process():
            write_atomically(Path(folder) / SUMMARY, to_json(summary, indent=2))
    return summary


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The scores of one recipe's seeds as mean and standard deviation (of the sample; None for one seed), their best
    epochs in the order of the seeds, and the sum of their `seconds`. The counts of rows are the first seed's."""
    done = [result for result in results if "error" not in result]
    first = done[0]
    same = ("task", "base", "method", "metric", "learning_rate", "trainable_parameters", "head_parameters")
    return {
        **{key: first[key] for key in same},
        **{key: first[key] for key in ("rows", "rows_cut", "rows_left_out") if key in first},
        "seeds": [result["seed"] for result in done],
        "best_epoch": [result["best_epoch"] for result in done],
        "validation": _spread([result["validation"] for result in done]),
        "test": _spread([result["test"] for result in done]) if first["test"] else None,
        "adapter_bytes": first["adapter_bytes"],
        "seconds": sum(result["seconds"] for result in done),
        "seconds_per_step": _mean([result["seconds_per_step"] for result in done]),
        "failed": {result["folder"]: result["error"] for result in results if "error" in result},
    }


def _spread(scores: Sequence[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    spread = {}
    for name in scores[0]:
        values = [score[name] for score in scores if score[name] is not None]
        spread[name] = {
            "mean": _mean(values),
            "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
        }
    return spread


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
