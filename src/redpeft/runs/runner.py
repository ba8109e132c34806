"""Many runs: a list of jobs, one after the other, each resumed or skipped as its folder says."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redpeft.adapters.files import write_atomically
from redpeft.errors import RunError, Stopped, UserError
from redpeft.training.loop import is_first_process, say, to_json
from redpeft.training.recipe import Recipe
from redpeft.training.run_folder import finished, locked
from redpeft.training.train import train

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Job:
    """One run asked for: a recipe with one seed, and its run folder."""

    recipe: Recipe
    folder: Path


def jobs_of(recipe: Recipe, folder: str | Path) -> list[Job]:
    """The jobs of a recipe: one in `folder`, or for several seeds one in each `folder`/seed-<n>."""
    folder = Path(folder)
    if recipe.seeds is None:
        return [Job(recipe, folder)]
    return [
        Job(recipe.model_copy(update={"seed": seed, "seeds": None}), folder / f"seed-{seed}")
        for seed in dict.fromkeys(recipe.seeds)
    ]


def run_jobs(jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """Run the jobs in order and return the result of each.

    Finished jobs are skipped and unfinished ones go on from their last checkpoint, so an interrupted list is run again
    as it is. A job that fails does not stop the others: its result is {"error": message, "seed": ..., "kind": ...}.
    Raises `UserError` before the first step if a folder belongs to another recipe, and `Stopped` on SIGTERM.
    """
    jobs = list(jobs)
    for job in jobs:
        finished(job.recipe, job.folder)
    results = []
    for number, job in enumerate(jobs, start=1):
        if len(jobs) > 1:
            say(f"job {number} of {len(jobs)}: {job.folder}")
        try:
            result = train(job.recipe, job.folder)
        except Stopped:
            raise
        except (UserError, RunError) as error:
            say(f"{job.folder}: {error}")
            result = {"error": str(error), "kind": type(error).__name__, "seed": job.recipe.seed}
        results.append({"folder": str(job.folder), **result})
    return results


def run_recipe(recipe: Recipe, folder: str | Path) -> dict[str, Any]:
    """Run a recipe in `folder`; returns its result or, for several seeds, the summary written to summary.json.

    A seed that fails does not stop the others and raises nothing: the summary names it and its error in `failed`
    (the command prints the summary and exits with 1). Where no seed came to an end, the first one's `UserError` or
    `RunError` is raised and there is no summary.
    """
    if recipe.seeds is None:
        return train(recipe, folder)
    with locked(Path(folder)):
        results = run_jobs(jobs_of(recipe, folder))
        failed = [result for result in results if "error" in result]
        if len(failed) == len(results):
            raise (UserError if failed[0]["kind"] == "UserError" else RunError)(failed[0]["error"])
        summary = summarise(results)
        if is_first_process():
            write_atomically(Path(folder) / SUMMARY, to_json(summary, indent=2))
    return summary


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation (of the sample; None for one seed) of the scores of one recipe's seeds."""
    done = [result for result in results if "error" not in result]
    first = done[0]
    same = ("task", "base", "method", "metric", "learning_rate", "trainable_parameters", "head_parameters")
    return {
        **{key: first[key] for key in same},
        "seeds": [result["seed"] for result in done],
        "validation": _spread([result["validation"] for result in done]),
        "test": _spread([result["test"] for result in done]) if first["test"] else None,
        "adapter_bytes": first["adapter_bytes"],
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
