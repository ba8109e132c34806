"""Commands that train many adapters together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from redpeft.cli.command import Answer, command, recipe_and_fields

Halving = Annotated[
    bool, typer.Option("--halving", help="Let only the better half of what competes go on, several times.")
]
Slots = Annotated[int | None, typer.Option(min=1, help="Jobs side by side; as many as fit when not given.")]
Tokens = Annotated[int | None, typer.Option(min=1, help="Tokens of one pass, padding included.")]

Ray = Annotated[
    bool, typer.Option("--ray", help="Spread the jobs over a Ray cluster: a fleet in each of its workers.")
]


@command("redpeft sweep base=roberta-base data.path=reviews.csv --grid lr=3e-3,1e-2,3e-2 --seeds 5 --out runs/rates")
def sweep(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE|KEY=VALUE", help="A recipe file, and fields that override its own."),
    ],
    grid: Annotated[
        list[str],
        typer.Option(help="A field and its values, as lr=3e-3,1e-2 or batch_size=8,16; may be given several times."),
    ],
    seeds: Annotated[str | None, typer.Option(help="How many (5: 0 to 4), or which (1,2,3).")] = None,
    out: Annotated[Path, typer.Option(help="The folder of runs and report.")] = Path("runs/sweep"),
    halving: Halving = False,
    slots: Slots = None,
    tokens: Tokens = None,
    ray: Ray = False,
    tell: Any = None,
) -> Answer:
    """Train every combination of some fields' values with every seed, and show which is best."""
    path, overrides = recipe_and_fields("sweep", arguments)
    from redpeft.runs.batch import failures
    from redpeft.runs.grid import parse_grid, parse_seeds
    from redpeft.runs.sweep import run_sweep, sweep_table

    chosen = parse_seeds(seeds) if seeds else None
    found = run_sweep(path, overrides, parse_grid(grid), out, chosen, halving, slots, tokens, ray, tell)
    shown = [sweep_table(found), f"Best on validation: {found.best or '-'}", f"Report: {found.page}"]
    return Answer({**found.data, "report": found.page}, shown, failures(found.rows))


@command("redpeft fleet customers base=roberta-base epochs=10 --out runs/customers")
def fleet(
    jobs: Annotated[
        Path,
        typer.Argument(
            metavar="JOBS.jsonl|FOLDER",
            help="JSON lines with a job each: recipe fields, and a name if you like; or a folder with a data file "
            "(or a folder with train, validation and test files) for each job.",
            show_default=False,
        ),
    ],
    fields: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Fields of all jobs that do not have them of their own."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of runs and report.")] = Path("runs/fleet"),
    recipe: Annotated[str | None, typer.Option(help="A recipe file with the fields that the jobs share.")] = None,
    halving: Halving = False,
    slots: Slots = None,
    tokens: Tokens = None,
    ray: Ray = False,
    tell: Any = None,
) -> Answer:
    """Train many adapters of one base model together, one for each job of a list or each data file of a folder."""
    from redpeft.runs.batch import failures
    from redpeft.runs.batch_report import facts, jobs_table
    from redpeft.runs.fleet import run_fleet

    found = run_fleet(jobs, out, recipe, fields or [], halving, slots, tokens, ray, tell)
    totals = Table(show_header=False)
    for name, value in facts(found.rows, found.totals).items():
        totals.add_row(name, value)
    shown = [jobs_table(found.rows, out), totals, f"Report: {found.page}"]
    return Answer({**found.data, "report": found.page}, shown, failures(found.rows))
