"""A batch: jobs with run folders in one output folder, worked off together, and what is known of them afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from redpeft.console import counted, log_main
from redpeft.errors import RunError, UserError, some
from redpeft.fleet.queue import Job, Report
from redpeft.fleet.template_model import why_alone
from redpeft.runs.fleets_on_ray import run_fleets_on_ray
from redpeft.runs.on_ray import require_ray, run_on_ray
from redpeft.runs.output import check_folder, claim, read_record
from redpeft.runs.progress import saying_once, showing
from redpeft.runs.runner import must_train_alone, run_fleets, run_jobs
from redpeft.runs.tally import Tally
from redpeft.storage import finite, locked
from redpeft.training.callbacks import bars_on_terminals_only

TOTALS = "totals"  # of the record
NOTE = 10.0  # seconds of work that are forgotten at most when the process is killed


@dataclass(frozen=True)
class Batch:
    """Jobs below `out`, where the file `record` says by `identity` whose folder it is.

    `groups`: which of the jobs compete with each other. With `halving` the worse half of each group is stopped at
    each rung; with `ray` they are spread over a Ray cluster.
    """

    out: Path
    record: str
    identity: Mapping[str, Any]
    jobs: Sequence[Job]
    groups: Mapping[Path, Hashable] = field(default_factory=dict)
    halving: bool = False
    slots: int | None = None
    tokens: int | None = None
    ray: bool = False

    def name(self, job: Job) -> str:
        """Where the job's run folder lies in the output folder."""
        return job.folder.relative_to(self.out).as_posix()

    @property
    def competing(self) -> bool:
        """Whether all jobs are of one group."""
        groups = {self.groups.get(job.folder) for job in self.jobs}
        return len(groups) == 1 and None not in groups


@dataclass(frozen=True)
class Totals:
    """What was done for a folder, by all calls together."""

    began: float  # the first call, in seconds since 1970
    seconds: float = 0.0
    examples: int = 0
    slots: int | None = None
    tokens: int | None = None
    plan: str | None = None

    def plus(self, tally: Tally) -> Totals:
        """With what is done so far in this call."""
        return replace(self, seconds=self.seconds + tally.seconds, examples=self.examples + tally.rows, **tally.fleet)


@dataclass(frozen=True)
class Row:
    """What is known of a job: the result in its run folder, why it failed in this call, or neither yet."""

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


def run_batch(
    batch: Batch, write: Callable[[Batch, list[Row], Totals], None], tell: Report | None = None
) -> tuple[list[Row], Totals]:
    """Work off what is not done of a batch; the same call goes on with what was interrupted.

    `write` gets what is known at the end, also where that is an interrupt, and `tell` what happens, event by event. A
    job that fails does not stop the others. Raises `UserError` before the first step, with nothing written, for an
    output folder of something else, a run folder of another recipe and, with halving, a job that no fleet can train;
    `Stopped` on Ctrl-C and SIGTERM.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("sweeps and fleets run in one process: start redpeft without torchrun or accelerate launch")
    if batch.ray:
        require_ray()
    bars_on_terminals_only()
    check_folder(batch.out / batch.record, batch.identity, str(batch.identity["command"]))
    jobs = [(batch.name(job), job) for job in batch.jobs]
    before = {name for name, job in jobs if job.recipe.alone().result_in(job.folder)}
    _check_halving(batch)
    with locked(batch.out):
        totals = Totals(**read_record(batch.out / batch.record).get(TOTALS, {"began": time.time()}))
        _note(batch, totals)
        tally = Tally({job.folder.resolve(): name for name, job in jobs}, batch.competing)
        if before:
            log_main(f"{len(before)} of {counted(len(jobs), 'job')} done already")
        left = len(before) < len(jobs)
        try:
            if left:
                _work(batch, totals, tally, before, tell)
        finally:
            if left:
                totals = totals.plus(tally)
            rows = [_row(name, job, tally.failed) for name, job in jobs]
            write(batch, rows, totals)
    return rows, totals


def failures(rows: Sequence[Row]) -> RunError | None:
    """The error of a batch in which jobs failed."""
    failed = [f"{row.name}: {row.error}" for row in rows if row.error]
    return RunError(f"{len(failed)} of {counted(len(rows), 'job')} failed: {some(failed)}") if failed else None


def _note(batch: Batch, totals: Totals) -> None:
    """Say in the output folder whose it is, and what was done for it."""
    claim(batch.out / batch.record, {**batch.identity, TOTALS: asdict(totals)})


def _work(batch: Batch, totals: Totals, tally: Tally, before: set[str], tell: Report | None) -> None:
    alone = [job for job in batch.jobs if why_alone(job.recipe)]
    together = [job for job in batch.jobs if why_alone(job.recipe) is None]
    with saying_once(), showing(tally, live=tell is None, before=before) as show:
        noted = 0.0

        def report(event: dict[str, Any]) -> None:
            nonlocal noted
            tally(event)
            show(event)
            if tell is not None and event["event"] != "pass":
                tell(finite(event))
            if tally.seconds > noted + NOTE:
                _note(batch, totals.plus(tally))
                noted = tally.seconds

        if together:
            halving = batch.groups if batch.halving else None
            run = run_fleets_on_ray if batch.ray else run_fleets
            results = run(together, batch.slots, batch.tokens, halving, report)
            refused = {folder.resolve() for folder, result in results.items() if must_train_alone(result)}
            if not batch.halving:  # it compares what trains side by side
                alone += [job for job in together if job.folder.resolve() in refused]
        for part in [alone] if batch.ray and alone else [[job] for job in alone]:
            for job in part:
                report({"event": "started", "folder": str(job.folder)})
            for result in run_on_ray(part) if batch.ray else run_jobs(part):
                report({"event": "failed" if "error" in result else "finished", **result})


def _check_halving(batch: Batch) -> None:
    if not batch.halving:
        return
    if not batch.groups:
        raise UserError('--halving compares the jobs of a group, but no job has a group: add "group" to some jobs')
    for job in batch.jobs:
        if job.folder in batch.groups and (reason := why_alone(job.recipe)):
            raise UserError(f"--halving needs jobs that a fleet can train, but {reason} cannot be trained in one")


def _row(name: str, job: Job, failed: Mapping[str, str]) -> Row:
    return Row(name, job.folder, job.recipe.alone().result_in(job.folder), failed.get(name))
