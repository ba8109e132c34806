"""Commands that train many adapters together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from redpeft.cli.command import CommandOutput, command, recipe_and_fields

Halving = Annotated[
    bool,
    typer.Option("--halving", help="Stop the worse half of the competing jobs several times (successive halving)."),
]
Slots = Annotated[int | None, typer.Option(min=1, help="Jobs trained at the same time. Default: as many as fit.")]
Tokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens in one pass, padding included. Default: chosen by memory.")
]

Ray = Annotated[bool, typer.Option("--ray", help="Spread the jobs over a Ray cluster, with a fleet in each worker.")]


@command("redpeft sweep base=roberta-base data.path=reviews.csv --grid lr=3e-3,1e-2,3e-2 --seeds 5 --out runs/rates")
def sweep(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE|KEY=VALUE", help="A recipe file, and fields that override its own."),
    ],
    grid: Annotated[
        list[str],
        typer.Option(help="A field and its values, such as lr=3e-3,1e-2. Repeat it for more fields."),
    ],
    seeds: Annotated[str | None, typer.Option(help="How many (5 means 0 to 4), or which ones (1,2,3).")] = None,
    out: Annotated[Path, typer.Option(help="The folder for runs and report.")] = Path("runs/sweep"),
    halving: Halving = False,
    slots: Slots = None,
    tokens: Tokens = None,
    ray: Ray = False,
    on_event: Any = None,
) -> CommandOutput:
    """Train every combination of values with every seed, and show which is best."""
    path, overrides = recipe_and_fields("sweep", arguments)
    from redpeft.runs.experiment import FleetOptions, failures
    from redpeft.runs.sweep import parse_grid, parse_seeds, run_sweep, sweep_table

    chosen = parse_seeds(seeds) if seeds else None
    options = FleetOptions(halving, slots, tokens, ray)
    found = run_sweep(path, overrides, parse_grid(grid), out, chosen, options, on_event)
    shown = [sweep_table(found), f"Best on validation: {found.best or '-'}", f"Report: {found.page}"]
    return CommandOutput({**found.data, "report": found.page}, shown, failures(found.results))


@command("redpeft fleet customers base=roberta-base epochs=10 --out runs/customers")
def fleet(
    jobs: Annotated[
        Path,
        typer.Argument(
            metavar="JOBS.jsonl|FOLDER",
            help="A file of JSON lines, one job each: recipe fields and optionally a name. Or a folder with one data "
            "file (or one folder with train, validation and test files) for each job.",
            show_default=False,
        ),
    ],
    fields: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Fields of all jobs; a job's own fields override them."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for runs and report.")] = Path("runs/fleet"),
    recipe: Annotated[str | None, typer.Option(help="A recipe file with fields that all jobs share.")] = None,
    halving: Halving = False,
    slots: Slots = None,
    tokens: Tokens = None,
    ray: Ray = False,
    on_event: Any = None,
) -> CommandOutput:
    """Train many adapters of one base model together, one for each job of a list or each data file of a folder."""
    from redpeft.runs.experiment import FleetOptions, failures
    from redpeft.runs.job_list import run_fleet
    from redpeft.runs.reports import facts, jobs_table

    options = FleetOptions(halving, slots, tokens, ray)
    found = run_fleet(jobs, out, recipe, fields or [], options, on_event)
    usage = Table(show_header=False)
    for name, value in facts(found.results, found.usage).items():
        usage.add_row(name, value)
    shown = [jobs_table(found.results, out), usage, f"Report: {found.page}"]
    return CommandOutput({**found.data, "report": found.page}, shown, failures(found.results))
