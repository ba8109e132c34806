"""`redpeft reproduce`: plan the runs of a table, estimate, run or resume them, and write the report."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from redpeft.console import bars_on_terminals_only, counted, in_words, log_main
from redpeft.errors import RunError, UserError
from redpeft.reproduce.external_scores import Scoring, score_run
from redpeft.reproduce.page import write_report
from redpeft.reproduce.plan import Request, TableRun, check_folder, claim, plan
from redpeft.reproduce.report import Report, make_report
from redpeft.reproduce.smoke import make_scoring
from redpeft.reproduce.time_estimate import count_rows, estimate
from redpeft.runs.on_ray import require_ray, run_on_ray
from redpeft.runs.runner import run_jobs
from redpeft.storage import locked

ASSETS = ".smoke"  # in the output folder


@dataclass(frozen=True)
class PlannedRuns:
    """The runs of a request: how many, how many of them are done, and how long the others take in seconds.

    `seconds` is None where `problem` says why nothing can be tried here.
    """

    runs: list[TableRun]
    done: int
    seconds: float | None
    problem: str | None = None

    def line(self) -> str:
        rows, tasks, seeds = ({getattr(run, key) for run in self.runs} for key in ("row", "task", "seed"))
        counts = f"{counted(len(rows), 'method')}, {counted(len(tasks), 'data set')}, {counted(len(seeds), 'seed')}"
        time = f"no estimate of the time: {self.problem}"
        if self.seconds is not None:
            time = f"about {in_words(self.seconds)} for the others"
        return f"{counted(len(self.runs), 'run')} ({counts}), {self.done} of them done; {time}"


def show_plan(request: Request) -> PlannedRuns:
    """What a request would run; nothing is written. Raises `UserError` as `plan` and `check_folder` do."""
    bars_on_terminals_only()
    check_folder(request)
    with tempfile.TemporaryDirectory() as folder:
        runs = plan(request, request.out / ASSETS if (request.out / ASSETS).is_dir() else Path(folder))
        todo = _unfinished(runs)
        try:
            return _timed(runs, todo, count_rows(todo))
        except UserError as error:
            return PlannedRuns(runs, len(runs) - len(todo), None, str(error))


def reproduce(request: Request, ray: bool = False) -> Report:
    """Run what is not done of a request, and write the report. The same call continues what was interrupted.

    A run that fails does not stop the others; the report shows it. Raises `UserError`, with nothing written, for
    unknown names, a missing base model or data, and an output folder with something else.
    """
    if ray:
        require_ray()
    bars_on_terminals_only()
    check_folder(request)
    with locked(request.out):
        runs = plan(request, request.out / ASSETS)
        todo = _unfinished(runs)
        log_main(_timed(runs, todo, count_rows(todo)).line())
        claim(request)
        try:
            results = (run_on_ray if ray else run_jobs)([run.job for run in todo])
        except BaseException:  # an interrupt: what is done is shown all the same
            write_report(make_report(request, runs, {}))
            raise
        failed = {
            run.job.folder: result["error"] for run, result in zip(todo, results, strict=True) if "error" in result
        }
        failed |= _score(request, [run for run in runs if run.job.folder not in failed])
        report = make_report(request, runs, failed)
        write_report(report)
    return report


def _timed(runs: list[TableRun], todo: list[TableRun], rows: dict[str, dict[str, int]]) -> PlannedRuns:
    try:
        return PlannedRuns(runs, len(runs) - len(todo), estimate(todo, rows))
    except (UserError, RunError) as error:  # of one run; the others may well come to an end
        return PlannedRuns(runs, len(runs) - len(todo), None, str(error))


def _score(request: Request, runs: Sequence[TableRun]) -> dict[Path, str]:
    """Run the table's benchmark, where it has one, on each finished run; returns the errors by run folder."""
    benchmark, failed = request.table.scored, {}
    if benchmark is None:
        return {}
    questions = request.questions and Scoring(request.questions)
    scoring = questions or (make_scoring(request.out / ASSETS, benchmark) if request.smoke else Scoring())
    for run in runs:
        log_main(f"{benchmark}: {run.job.folder}")
        try:
            score_run(run.job.folder, benchmark, run.job.recipe.base.model, scoring)
        except (UserError, RunError) as error:
            log_main(f"{run.job.folder}: {error}")
            failed[run.job.folder] = str(error)
    return failed


def _unfinished(runs: Sequence[TableRun]) -> list[TableRun]:
    return [run for run in runs if run.job.recipe.result_in(run.job.folder) is None]
