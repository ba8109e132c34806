"""`redpeft ...`: one function per command, no logic of its own.

Every command returns its answer; the decorator `command` is what they share: `--json`, standard output kept for the
answer alone, and the exit codes 0, 1 (the work failed) and 2 (the call was wrong) with one line on standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect as python_inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console
from rich.table import Table

from redpeft.errors import RunError, UserError

app = typer.Typer(name="redpeft", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

WIDTH = 140  # of tables that do not go to a terminal

Json = Annotated[bool, typer.Option("--json", help="Print JSON; all else goes to standard error.")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder, or the adapter folder in it.", show_default=False)]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command prints: `data` with --json, otherwise the tables and lines of `shown`; then `error`, if any."""

    data: dict[str, Any]
    shown: list[Any]
    error: RunError | None = None


def command(example: str) -> Callable[[Callable], Callable]:
    """Register a function that returns an `Answer`, or an iterator of rows that become JSON lines."""

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(as_json: bool, **arguments: Any) -> None:
            out = sys.stdout
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    answer = function(**arguments)
                    if os.environ.get("RANK", "0") == "0":  # of several processes one answers
                        _print(answer, as_json, out)
            except UserError as error:
                _fail(error, 2)
            except RunError as error:
                _fail(error, 1)

        signature = python_inspect.signature(function, eval_str=True)
        json_option = python_inspect.Parameter(
            "as_json", python_inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json
        )
        run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), json_option])  # type: ignore
        return app.command(epilog=f"Example: {example}")(run)

    return register


def _print(answer: Answer | Iterator[dict[str, Any]], as_json: bool, out: TextIO) -> None:
    if isinstance(answer, Iterator):
        for row in answer:
            print(_dump(row), file=out, flush=True)
    elif as_json:
        print(_dump(answer.data), file=out)
    else:
        console = Console(file=out, width=None if out.isatty() else WIDTH)
        for part in answer.shown:
            console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
    if isinstance(answer, Answer) and answer.error:
        raise answer.error


def _dump(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else dataclasses.asdict(value)


def _fail(error: Exception, code: int) -> NoReturn:
    print(f"redpeft: {' '.join(str(error).split())}", file=sys.stderr)
    raise typer.Exit(code)


def _scores(splits: dict[str, dict[str, Any]]) -> Table:
    """Scores by split and metric: each a value, or its mean and standard deviation over seeds."""
    table = Table("metric", *splits)
    for metric in next(iter(splits.values())):
        table.add_row(metric, *(_figure(scores[metric]) for scores in splits.values()))
    return table


def _figure(value: float | dict[str, float | None] | None) -> str:
    if not isinstance(value, dict):
        return "-" if value is None else f"{value:.4f}"
    spread = value["standard_deviation"]
    return _figure(value["mean"]) + ("" if spread is None else f" ± {spread:.4f}")


def _standard_input() -> Iterator[dict[str, Any] | str]:
    """Rows from standard input as they come: a JSON object on a line, or a line of plain text."""
    for number, line in enumerate(sys.stdin, start=1):
        if line.lstrip().startswith("{"):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"line {number} of standard input is broken JSON ({error})") from None
        elif line.strip():
            yield line.rstrip("\n")


@app.callback()
def redpeft() -> None:
    """Fine-tune a frozen transformer with two vectors per layer (RED, Representation EDiting)."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # what PEFT still calls there
    logging.basicConfig(format="%(message)s")
    logging.getLogger("redpeft").setLevel(logging.INFO)


@command("redpeft init my-recipe.yaml")
def init(
    path: Annotated[Path, typer.Argument(help="The file to write; never overwritten.")] = Path("recipe.yaml"),
) -> Answer:
    """Write a recipe with every field, its meaning and its default."""
    from redpeft.training.recipe import template

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(template())
    except FileExistsError:
        raise UserError(f"{path} is there already: give another name, or remove it") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return Answer({"recipe": path}, [f"Wrote {path}. Edit it, then: redpeft train {path}"])


@command("redpeft train base=roberta-base data.path=reviews.csv --out runs/reviews --seeds 1,2,3")
def train(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE|KEY=VALUE", help="A recipe file, and fields that go before its own."),
    ],
    out: Annotated[str | None, typer.Option(help="The run folder, instead of the recipe's `output`.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Several seeds, as 1,2,3: one run for each.")] = None,
) -> Answer:
    """Train an adapter by a recipe. The same command again resumes a run, or shows what a finished one gave."""
    from redpeft.runs.runner import run_recipe
    from redpeft.training.recipe import load_recipe

    recipes = [argument for argument in arguments if "=" not in argument]
    if len(recipes) > 1:
        raise UserError(f"one recipe at a time, not {', '.join(recipes)}; fields are given as key=value")
    overrides = [argument for argument in arguments if "=" in argument]
    overrides += [f"output={out}"] if out else []
    overrides += [f"seeds=[{seeds}]"] if seeds else []
    recipe = load_recipe(recipes[0] if recipes else None, overrides)
    result = run_recipe(recipe, recipe.run_folder())
    scores = {split: result[split] for split in ("validation", "test") if result[split]}
    failed = result.get("failed")
    return Answer(
        data={"run": recipe.run_folder(), **result},
        shown=[_scores(scores), f"Run: {recipe.run_folder()}"],
        error=RunError(f"not all seeds came to an end: {failed}") if failed else None,
    )


@command("redpeft evaluate runs/reviews new-reviews.csv")
def evaluate(
    run: RunFolder,
    data: Annotated[str, typer.Argument(help="A file, a folder, or a data set of the Hub.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The base model, where it is not where it was.")] = None,
) -> Answer:
    """Score a trained adapter on data with labels."""
    from redpeft.adapters import find_run
    from redpeft.training.predict import evaluate, load_run

    metrics = evaluate(load_run(find_run(run), base), data)
    return Answer({"run": run, "data": data, "metrics": metrics}, [_scores({data: metrics})])


@command("echo 'Where is my card?' | redpeft predict runs/demo/red/seed-0 -")
def predict(
    run: RunFolder,
    file: Annotated[str, typer.Argument(help="A data file, or - for lines (text or JSON) of standard input.")],
    base: Annotated[str | None, typer.Option(help="The base model, where it is not where it was.")] = None,
) -> Iterator[dict[str, Any]]:
    """Label texts, or answer prompts: one JSON object a row."""
    from redpeft.adapters import find_run
    from redpeft.tasks import read_file
    from redpeft.training.predict import load_run, predict

    rows = _standard_input() if file == "-" else read_file(file)
    return predict(load_run(find_run(run), base), rows)


@command("redpeft sites roberta-base --sites red+")
def sites(
    model: Annotated[str, typer.Argument(help="A Hub name, or a folder with a config.json.", show_default=False)],
    sites: Annotated[str, typer.Option(help="ffn, attention, qkv, several as ffn,qkv, or red+ (all five).")] = "ffn",
) -> Answer:
    """Show which modules would be edited and how few parameters that takes. No weights are needed."""
    from redpeft.adapters.preview import preview, preview_table

    found = preview(model, sites.split(","))
    return Answer(dataclasses.asdict(found), [preview_table(found)])


@command("redpeft inspect runs/demo/red/seed-0 --plot red.png")
def inspect(
    adapter: RunFolder,
    other: Annotated[Path | None, typer.Argument(help="A second adapter to compare with.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture to this PNG file.")] = None,
) -> Answer:
    """Show what an adapter has learned, site by site, or how two adapters differ."""
    from redpeft.adapters import find_adapter, inspect, read_adapter

    adapters = [read_adapter(find_adapter(folder)) for folder in (adapter, other) if folder]
    data: dict[str, Any] = {"adapter": adapters[0].folder, "sites": inspect.summarize(adapters[0])}
    shown: list[Any] = [inspect.summary_table(data["sites"], str(adapters[0].folder))]
    if other:
        rows = inspect.compare(*adapters)
        data |= {"other": adapters[1].folder, "comparison": rows}
        shown = [inspect.comparison_table(rows, f"{adapters[0].folder} (this) and {adapters[1].folder} (other)")]
    if plot:
        data["plot"] = inspect.plot(adapters, plot)
        shown.append(f"Drew {plot}")
    return Answer(data, shown)


@command("redpeft demo --out runs/demo")
def demo(
    out: Annotated[Path, typer.Option(help="Where the runs, the table and the plot go.")] = Path("runs/demo"),
) -> Answer:
    """Train RED and four other methods on a small data set that comes along: no account, no download, five minutes."""
    from redpeft.demo import run_demo

    result, shown = run_demo(out)
    return Answer(result, shown)


@command("redpeft version")
def version() -> Answer:
    """Show the version of redpeft and of what it stands on."""
    from importlib.metadata import version

    packages = ("redpeft", "torch", "transformers", "peft", "accelerate", "datasets")
    versions = {"python": sys.version.split()[0], **{name: version(name) for name in packages}}
    return Answer(versions, [f"{name} {number}" for name, number in versions.items()])


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line, `sys.argv` by default, and exit."""
    sys.exit(app(arguments, prog_name="redpeft"))
