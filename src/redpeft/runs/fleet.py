"""`redpeft fleet`: the jobs of a list, or one for each file of a folder, trained in fleets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redpeft.fleet.queue import Report
from redpeft.runs.batch import Batch, Row, Totals, run_batch
from redpeft.runs.batch_report import PAGE, write_report
from redpeft.runs.job_files import jobs_of_entries, read_entries

RECORD = "summary.json"


@dataclass(frozen=True)
class FleetRun:
    """What became of the jobs, by rows and as data, and the report's page."""

    rows: list[Row]
    totals: Totals
    data: Mapping[str, Any]
    page: Path


def run_fleet(
    source: Path,
    out: Path,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    halving: bool = False,
    slots: int | None = None,
    tokens: int | None = None,
    ray: bool = False,
    tell: Report | None = None,
) -> FleetRun:
    """Train the jobs that `source` lists (JSON lines), or one for each data file or data set in it (a folder), each
    in a run folder in `out`, and write the report.

    The same call goes on with what was interrupted; jobs that were added to `source` join the others. Raises as
    `run_batch`, `read_entries` and `jobs_of_entries`.
    """
    jobs, groups = jobs_of_entries(read_entries(source), recipe, overrides, out)
    identity = {"command": "fleet", "source": str(source.resolve()), "halving": halving}
    batch = Batch(out, RECORD, identity, jobs, groups, halving, slots, tokens, ray)
    data: dict[str, Any] = {}

    def write(batch: Batch, rows: list[Row], totals: Totals) -> None:
        data.update(write_report(batch, rows, totals))

    rows, totals = run_batch(batch, write, tell)
    return FleetRun(rows, totals, data, out / PAGE)
