"""`redpeft fleet`: the jobs of a list, or one for each data file or data set in a folder, trained in fleets."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redpeft.console import log_main
from redpeft.errors import UserError
from redpeft.fleet.queue import Job, Report
from redpeft.fleet.template_model import why_alone
from redpeft.runs.experiment import Experiment, FleetOptions, JobResult, Usage, run_experiment
from redpeft.runs.reports import PAGE, write_report
from redpeft.tasks.data import splits_in
from redpeft.tasks.files import READERS, extension, parse_lines, read_text, stem
from redpeft.training.recipe import Recipe, dotted_fields, flatten, load_recipe, with_full_names
from redpeft.training.train import check_recipe

RECORD = "summary.json"
NOT_PER_JOB = {
    "seeds": "write a line for each `seed`",
    "output": "use --out for the folder, and `name` for the one in it",
}


@dataclass(frozen=True)
class FleetRun:
    """The results of the jobs, also as data, and the report's page."""

    results: list[JobResult]
    usage: Usage
    data: Mapping[str, Any]
    page: Path


def run_fleet(
    source: Path,
    out: Path,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    options: FleetOptions | None = None,
    report: Report | None = None,
) -> FleetRun:
    """Train the jobs that `source` lists (JSON lines), or one for each data file or data set in it (a folder), each
    in a run folder in `out`, and write the report.

    The same call continues what was interrupted; jobs that were added to `source` join the others. Raises as
    `run_experiment`, `read_entries` and `jobs_of_entries`.
    """
    options = options or FleetOptions()
    jobs, groups = jobs_of_entries(read_entries(source), recipe, overrides, out)
    identity = {"command": "fleet", "source": str(source.resolve()), "halving": options.halving}
    experiment = Experiment(out, RECORD, identity, jobs, groups, options)
    data: dict[str, Any] = {}

    def write(results: list[JobResult], usage: Usage) -> None:
        data.update(write_report(experiment, results, usage))

    results, usage = run_experiment(experiment, write, report)
    return FleetRun(results, usage, data, out / PAGE)


@dataclass(frozen=True)
class JobEntry:
    """A job of the list: its own fields of a recipe, and the place where it stands, for errors."""

    name: str
    fields: dict[str, Any]
    where: str
    group: Hashable = None


def read_entries(path: Path) -> list[JobEntry]:
    """The jobs of a JSON lines file or of a folder of data, each with a name of its own. Raises `UserError` for
    anything else, and for a wrong entry, with its line."""
    if path.is_dir():
        entries = _check_names(_from_folder(path))
        if not entries:
            raise UserError(
                f"{path} holds no data: no file ({', '.join(READERS)}) and no folder with train, validation and test "
                "files"
            )
        return entries
    if not path.is_file():
        raise UserError(f"no such file or folder: {path}")
    if path.suffix.lower() != ".jsonl":
        raise UserError(
            f"{path} is not a list of jobs: give JSON lines (.jsonl), or a folder with the data of each job"
        )
    entries = _check_names(_from_line(path, number, row) for number, row in parse_lines(path, read_text(path)))
    if not entries:
        raise UserError(f"{path} is empty: it holds no jobs")
    return entries


def jobs_of_entries(
    entries: Sequence[JobEntry], recipe: str | None, overrides: Sequence[str], out: Path
) -> tuple[list[Job], dict[Path, Hashable]]:
    """The jobs in `out`/<name>, and the group of each that has one. An entry's fields override those of `recipe` and
    `overrides`, which all jobs share. Jobs that name no task have that of the first one of them.

    Raises `UserError`, with the line, for fields that no recipe has, for values that are wrong whatever the data is,
    and for a job that no fleet can train.
    """
    shared = dotted_fields(recipe, overrides)
    if unnamed := next((entry for entry in entries if {**shared, **entry.fields}.get("task") is None), None):
        shared["task"] = _recipe(unnamed, shared).task  # by the columns of one job: to read all data twice takes long
    jobs = [Job(_recipe(entry, shared), out / entry.name) for entry in entries]
    groups = {out / entry.name: entry.group for entry in entries if entry.group is not None}
    return jobs, groups


def _recipe(entry: JobEntry, shared: Mapping[str, Any]) -> Recipe:
    try:
        recipe = load_recipe(None, {**shared, **entry.fields}).alone()
        check_recipe(recipe)
        if reason := why_alone(recipe):
            raise UserError(f"{reason} cannot be trained in a fleet; use redpeft train or redpeft sweep")
        return recipe
    except UserError as error:
        raise UserError(f"{entry.where}: {error}") from None


def _from_line(path: Path, number: int, row: Any) -> JobEntry:
    where = f"{path}, line {number}"
    if not isinstance(row, dict):
        raise UserError(f"{where}: a job must be an object of recipe fields, not {str(row)[:40]!r}")
    try:
        fields = flatten(with_full_names({key: row[key] for key in row if key not in ("name", "group")}))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    name, group = row.get("name", f"job-{number}"), row.get("group")
    if wrong := next((key for key in NOT_PER_JOB if key in fields), None):
        raise UserError(f"{where}: {wrong} cannot be set for jobs of a fleet: {NOT_PER_JOB[wrong]}")
    if not isinstance(name, str) or not name or Path(name).name != name or name.startswith(".") or "\\" in name:
        raise UserError(f"{where}: name must be a folder name, not {name!r}")
    if not isinstance(group, str | int | None):
        raise UserError(f"{where}: group must be a text, not {group!r}")
    return JobEntry(name, fields, where, group)


def _from_folder(folder: Path) -> Iterator[JobEntry]:
    """One entry for each data file, and for each folder with the splits of one data set."""
    if "train" in (splits := splits_in(folder)):
        raise UserError(
            f"{folder} holds the data of one job ({', '.join(splits)}): use redpeft train, or give the folder above it"
        )
    for path in sorted(folder.iterdir()):
        data = {"data.path": str(path.resolve()), "data.train": None}
        if path.name.startswith("."):
            continue
        if path.is_dir() and splits_in(path):
            yield JobEntry(path.name, data, str(path))
        elif path.is_dir():
            log_main(f"{path} is left out: it holds no train, validation or test file")
        elif extension(path) in READERS:
            yield JobEntry(stem(path), data, str(path))


def _check_names(entries: Iterable[JobEntry]) -> list[JobEntry]:
    seen: dict[str, JobEntry] = {}
    for entry in entries:
        if entry.name in seen:
            raise UserError(f"{entry.where}: the name {entry.name!r} is also that of {seen[entry.name].where}")
        seen[entry.name] = entry
    return list(seen.values())
