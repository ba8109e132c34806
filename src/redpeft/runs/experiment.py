"""An experiment: many jobs with run folders in one output folder, and their results.

A file in the output folder, the record, says which experiment the folder belongs to. No command writes into the folder
of another experiment, and the same call continues an interrupted one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from redpeft.console import bars_on_terminals_only, counted, log_main
from redpeft.errors import RunError, UserError, shorten_list
from redpeft.fleet.queue import Event, Job, Report
from redpeft.fleet.template_model import why_alone
from redpeft.runs.on_ray import require_ray, run_fleets_on_ray, run_on_ray
from redpeft.runs.progress import JobProgress, logging_once, showing
from redpeft.runs.runner import must_train_alone, run_fleets, run_jobs
from redpeft.storage import RESULT, finite, locked, read_json, read_result, write_atomically

USAGE = "totals"  # its key in the record
SAVE_EVERY = 10.0  # seconds; so much of the usage is lost at most when the process is killed


@dataclass(frozen=True)
class FleetOptions:
    """How jobs share fleets.

    `halving`: the worse half of each group of jobs is stopped at each rung. `slots`: jobs side by side, and `tokens`
    of one pass, both chosen when not given. `ray`: the jobs are spread over a Ray cluster.
    """

    halving: bool = False
    slots: int | None = None
    tokens: int | None = None
    ray: bool = False


@dataclass(frozen=True)
class Experiment:
    """Jobs below the folder `out`, in which the file `record` holds the fields of `identity`.

    `groups` says which of the jobs compete with each other.
    """

    out: Path
    record: str
    identity: Mapping[str, Any]
    jobs: Sequence[Job]
    groups: Mapping[Path, Hashable] = field(default_factory=dict)
    options: FleetOptions = FleetOptions()

    def name(self, job: Job) -> str:
        """The path of the job's run folder within the output folder."""
        return job.folder.relative_to(self.out).as_posix()

    @property
    def is_one_competition(self) -> bool:
        """Whether all jobs are of one group."""
        groups = {self.groups.get(job.folder) for job in self.jobs}
        return len(groups) == 1 and None not in groups


@dataclass(frozen=True)
class Usage:
    """What an experiment took, in all calls together."""

    began: float  # the first call, in seconds since 1970
    seconds: float = 0.0
    examples: int = 0
    slots: int | None = None
    tokens: int | None = None
    plan: str | None = None

    def plus(self, progress: JobProgress) -> Usage:
        """With what this call has taken so far."""
        seconds, examples = self.seconds + progress.seconds, self.examples + progress.rows
        return replace(self, seconds=seconds, examples=examples, **progress.fleet)


@dataclass(frozen=True)
class JobResult:
    """The result in a job's run folder, or the reason why it failed in this call, or neither yet."""

    name: str
    folder: Path
    result: dict[str, Any] | None
    error: str | None = None

    @property
    def metric(self) -> str:
        """The job's own; empty where it has no result."""
        return self.result["metric"] if self.result else ""

    def score(self, split: str) -> float | None:
        """On a split, by the job's own metric."""
        scores = self.result and self.result[split]
        return scores.get(self.metric) if scores else None


def run_experiment(
    experiment: Experiment,
    write: Callable[[list[JobResult], Usage], None],
    report: Report | None = None,
) -> tuple[list[JobResult], Usage]:
    """Run the jobs of an experiment that are not finished. The same call continues an interrupted experiment.

    `write` gets the results at the end, also where that is an interrupt, and `report` gets what happens, event by
    event. A job that fails does not stop the others. Raises `UserError` before the first step, with nothing written,
    for an output folder of something else, a run folder of another recipe and, with halving, a job that no fleet can
    train; `Stopped` on Ctrl-C and SIGTERM.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("sweeps and fleets run in one process: start redpeft without torchrun or accelerate launch")
    if experiment.options.ray:
        require_ray()
    bars_on_terminals_only()
    record = experiment.out / experiment.record
    check_folder(record, experiment.identity, str(experiment.identity["command"]))
    jobs = {experiment.name(job): job for job in experiment.jobs}
    before = {name for name, job in jobs.items() if job.recipe.alone().result_in(job.folder)}
    _check_halving(experiment)
    with locked(experiment.out):
        usage = Usage(**read_record(record).get(USAGE, {"began": time.time()}))
        _save_usage(experiment, usage)
        names = {job.folder.resolve(): name for name, job in jobs.items()}
        progress = JobProgress(names, experiment.is_one_competition)
        if before:
            log_main(f"{len(before)} of {counted(len(jobs), 'job')} done already")
        left = len(before) < len(jobs)
        try:
            if left:
                _run(experiment, usage, progress, before, report)
        finally:
            if left:
                usage = usage.plus(progress)
            # without checking the recipes again: an error here would hide the one that ended the work
            found = {name: read_result(job.folder) for name, job in jobs.items() if (job.folder / RESULT).is_file()}
            results = [
                JobResult(name, job.folder, found.get(name), progress.failed.get(name)) for name, job in jobs.items()
            ]
            write(results, usage)
    return results, usage


def failures(results: Sequence[JobResult]) -> RunError | None:
    """The error of an experiment in which jobs failed."""
    failed = [f"{result.name}: {result.error}" for result in results if result.error]
    return (
        RunError(f"{len(failed)} of {counted(len(results), 'job')} failed: {shorten_list(failed)}") if failed else None
    )


def _run(experiment: Experiment, usage: Usage, progress: JobProgress, before: set[str], report: Report | None) -> None:
    options = experiment.options
    with logging_once(), showing(progress, live=report is None, before=before) as show:
        saved = 0.0

        def report_all(event: Event) -> None:
            nonlocal saved
            progress(event)
            show(event)
            if report is not None and event["event"] != "pass":
                report(finite(event))
            if progress.seconds > saved + SAVE_EVERY:
                _save_usage(experiment, usage.plus(progress))
                saved = progress.seconds

        alone = [job for job in experiment.jobs if why_alone(job.recipe)]
        together = [job for job in experiment.jobs if why_alone(job.recipe) is None]
        if together:
            run = run_fleets_on_ray if options.ray else run_fleets
            halving = experiment.groups if options.halving else None
            results = run(together, options.slots, options.tokens, halving, report_all)
            refused = {folder.resolve() for folder, result in results.items() if must_train_alone(result)}
            if not options.halving:  # it compares jobs that train side by side
                alone += [job for job in together if job.folder.resolve() in refused]
        for part in [alone] if options.ray and alone else [[job] for job in alone]:
            for job in part:
                report_all({"event": "started", "folder": str(job.folder)})
            for result in run_on_ray(part) if options.ray else run_jobs(part):
                report_all({"event": "failed" if "error" in result else "finished", **result})


def _save_usage(experiment: Experiment, usage: Usage) -> None:
    claim(experiment.out / experiment.record, {**experiment.identity, USAGE: asdict(usage)})


def _check_halving(experiment: Experiment) -> None:
    if not experiment.options.halving:
        return
    if not experiment.groups:
        raise UserError('--halving compares the jobs of a group, but no job has a group: add "group" to some jobs')
    for job in experiment.jobs:
        if job.folder in experiment.groups and (reason := why_alone(job.recipe)):
            raise UserError(f"--halving needs jobs that a fleet can train, but {reason} cannot be trained in one")


# --- the record of an output folder ----------------------------------------------------------------------------------


def check_folder(record: Path, identity: Mapping[str, Any], what: str) -> None:
    """Raises `UserError` where the folder of `record` holds something else than a `what`, or one of another identity.

    `record` is a JSON object with the fields of `identity` among others.
    """
    folder = record.parent
    if record.is_file():
        there, here = read_record(record), json.loads(json.dumps(identity))
        if other := [key for key in here if here[key] != there.get(key)]:
            raise UserError(
                f"{folder} holds runs with another {', '.join(other)}: choose another --out, or keep it the same"
            )
    elif folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
        raise UserError(f"{folder} is not empty and holds no {what}: choose another --out")


def read_record(record: Path) -> dict[str, Any]:
    """The content of a record; nothing where there is none."""
    try:
        found = read_json(record)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def claim(record: Path, identity: Mapping[str, Any]) -> None:
    """Write the identity into the record of an output folder, and keep its other fields."""
    record.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(record, json.dumps({**read_record(record), **identity}, indent=2))
