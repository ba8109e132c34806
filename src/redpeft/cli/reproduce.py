"""The command that runs the paper's tables."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from redpeft.cli.command import CommandOutput, command
from redpeft.console import counted
from redpeft.errors import RunError, UserError

if TYPE_CHECKING:
    from redpeft.reproduce import published
    from redpeft.reproduce.report import Report


@command("redpeft reproduce glue-roberta-base --rows red,lora --tasks rte,mrpc --seeds 42,43 --out runs/glue")
def reproduce(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TABLE|[ROW:]KEY=VALUE",
            help="A table of the paper, and recipe fields that override the paper's, of all rows or of one ROW.",
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show every table and what it needs.")] = False,
    rows: Annotated[str | None, typer.Option(help="Methods, such as red,lora. Default: all of the paper's.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Data sets, such as rte,cola; with --data any folder in it.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, such as 42,43. Default: the paper's.")] = None,
    model: Annotated[str | None, typer.Option(help="Another base model: a folder, or a name on the Hub.")] = None,
    base_folder: Annotated[
        Path | None, typer.Option("--base-folder", help="The folder with the paper's base models, instead of the Hub.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="A folder with a folder for each data set.")] = None,
    questions: Annotated[
        Path | None, typer.Option(help="For alpaca-eval: alpaca_eval.json. For mt-bench: FastChat's question.jsonl.")
    ] = None,
    settings: Annotated[
        Literal["paper", "released", "default"] | None,
        typer.Option(
            help="Where settings come from: the paper, its released scripts (where they differ), or redpeft's own "
            "learning rates and units. Default: paper, and default with --model."
        ),
    ] = None,
    budget: Annotated[
        Literal["smoke", "full"], typer.Option(help="smoke: a few steps of a tiny model on generated data.")
    ] = "full",
    plan: Annotated[bool, typer.Option("--plan", help="Only show the runs and how long they take.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Spread the runs over a Ray cluster.")] = False,
    out: Annotated[Path | None, typer.Option(help="The folder for runs and report. Default: runs/TABLE.")] = None,
) -> CommandOutput:
    """Run a table of the paper, or part of it, and report the results beside the published figures."""
    from redpeft.reproduce.plan import Request, parse_changes
    from redpeft.reproduce.published import find_table, tables
    from redpeft.reproduce.run_tables import reproduce, show_plan

    if list_:
        return _list(tables().values())
    names = [argument for argument in arguments or [] if "=" not in argument]
    if len(names) != 1:
        raise UserError("give the name of one table; `redpeft reproduce --list` shows them")
    table = find_table(names[0])
    changes, row_changes = parse_changes([argument for argument in arguments or [] if "=" in argument], table)
    request = Request(
        table=table,
        out=out or Path("runs") / table.name,
        rows=rows.split(",") if rows else None,
        tasks=tasks.split(",") if tasks else None,
        seeds=_numbers(seeds) if seeds else None,
        model=model,
        base_folder=base_folder,
        data=data,
        questions=questions,
        settings=settings or ("default" if model else "paper"),
        changes=changes,
        row_changes=row_changes,
        smoke=budget == "smoke",
    )
    if plan:
        planned = show_plan(request)
        runs = [{"run": run.job.folder, "recipe": run.job.recipe.resolved().model_dump()} for run in planned.runs]
        facts = {"done": planned.done, "seconds": planned.seconds, "problem": planned.problem}
        return CommandOutput({"table": table.name, **facts, "runs": runs}, [planned.line()])
    return _report(reproduce(request, ray))


def _report(report: Report) -> CommandOutput:
    from redpeft.reproduce.page import grid
    from redpeft.reproduce.report import as_data
    from redpeft.runs.pages import Grid, to_table

    head, rows = grid(report)
    shown = to_table(Grid(head, rows), title=report.table.title)
    page = report.request.out / f"{report.table.name}.html"
    failed = "; ".join(f"{folder}: {error}" for folder, error in report.failed.items())
    return CommandOutput(
        data={**as_data(report), "report": page},
        shown=[shown, f"Report: {page}" + (" (it lists what is left to do)" if report.left else "")],
        error=RunError(f"{counted(len(report.failed), 'run')} failed: {failed}") if failed else None,
    )


def _list(tables: Iterable[published.Table]) -> CommandOutput:
    from redpeft.reproduce.plan import base_of

    shown = Table("table", "what it is", "base model", "rows", "data", "runs", "needs")
    found = {}
    for table in tables:
        published = [row.name for row in table.rows.values() if row.is_published]
        more = [row.name for row in table.rows.values() if not row.is_published]
        runs = len(published) * sum(len(table.seeds_of(task)) for task in table.tasks)
        names = ", ".join(published) + (f" (when named: {', '.join(more)})" if more else "")
        base, data = base_of(table.values), ", ".join(table.tasks)
        shown.add_row(table.name, table.title, base, names, data, str(runs), table.needs)
        found[table.name] = {
            "title": table.title,
            "base": base,
            "rows": [row.name for row in table.rows.values()],
            "tasks": table.tasks,
            "runs": runs,
            "needs": table.needs,
        }
    return CommandOutput({"tables": found}, [shown])


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds takes whole numbers such as 42,43, not {text!r}") from None
