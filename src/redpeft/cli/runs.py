"""Commands that train adapters and use them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from redpeft.cli.command import CommandOutput, RunFolder, command, recipe_and_fields
from redpeft.console import counted, rounded
from redpeft.errors import RunError, UserError

if TYPE_CHECKING:
    from redpeft.training.recipe import Recipe

MATRIX = 20  # the most labels for which a confusion matrix is shown

TaskName = Annotated[
    str | None, typer.Option(help="The task, such as instruction, if an adapter folder without a run does not say it.")
]


@command("redpeft init my-recipe.yaml")
def init(
    path: Annotated[Path, typer.Argument(help="The file to write. An existing file is not overwritten.")] = Path(
        "recipe.yaml"
    ),
) -> CommandOutput:
    """Write a recipe with every field, its meaning and its default."""
    from redpeft.training.recipe import template

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(template())
    except FileExistsError:
        raise UserError(f"{path} exists already: give another name, or remove it") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return CommandOutput({"recipe": path}, [f"Wrote {path}. Edit it, then: redpeft train {path}"])


@command("redpeft preview base=roberta-base data.path=reviews.csv")
def preview(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE|KEY=VALUE", help="A recipe file, and fields that override it."),
    ],
) -> CommandOutput:
    """Look at what a recipe will train: rows as the model will see them, lengths, steps, time, memory. Nothing is
    written."""
    path, overrides = recipe_and_fields("preview", arguments)
    from redpeft.training.recipe import load_recipe

    recipe = load_recipe(path, overrides)  # a wrong recipe is refused before torch is imported
    from redpeft.runs.reports import rows_line
    from redpeft.runs.runner import jobs_of
    from redpeft.training.preview import preview, shown

    first, *others = jobs_of(recipe, recipe.run_folder())
    found = preview(first.recipe, first.folder)
    data = asdict(found)
    seeds = [f"That is one run; there are {len(others) + 1}, one for each seed."] if others else []
    return CommandOutput(data, [*shown(found), rows_line(data), *seeds])


@command("redpeft train base=roberta-base data.path=reviews.csv --out runs/reviews --seeds 1,2,3")
def train(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE|KEY=VALUE", help="A recipe file, and fields that override it."),
    ],
    out: Annotated[str | None, typer.Option(help="The run folder. Overrides the recipe's `output`.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Several seeds, such as 1,2,3: one run for each.")] = None,
) -> CommandOutput:
    """Train an adapter. The same command again resumes the run, or shows its result when it is finished."""
    path, overrides = recipe_and_fields("train", arguments)
    from redpeft.training.recipe import load_recipe

    overrides += [f"output={out}"] if out else []
    overrides += [f"seeds=[{seeds}]"] if seeds else []
    recipe = load_recipe(path, overrides)  # a wrong recipe is refused before torch is imported
    from redpeft.runs.reports import closing_lines
    from redpeft.runs.runner import run_recipe

    result = run_recipe(recipe, recipe.run_folder(), _rollouts(recipe))
    best = "" if "seeds" in result else f", best epoch ({rounded(result['best_epoch'])})"
    scores = {f"validation{best}": result["validation"], **({"test": result["test"]} if result["test"] else {})}
    failed = "; ".join(f"{folder}: {error}" for folder, error in result.get("failed", {}).items())
    return CommandOutput(
        data={"run": recipe.run_folder(), **result},
        shown=[_scores(scores), *closing_lines(recipe, result)],
        error=RunError(f"some seeds failed: {failed}") if failed else None,
    )


@command("redpeft evaluate runs/reviews new-reviews.csv")
def evaluate(
    run: RunFolder,
    data: Annotated[str, typer.Argument(help="A file, a folder, or a data set on the Hub.", show_default=False)],
    config: Annotated[str | None, typer.Option(help="The Hub data set's configuration, such as sst2.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model, if it was moved.")] = None,
    task: TaskName = None,
) -> CommandOutput:
    """Score a trained adapter on data with labels."""
    from redpeft.storage import find_run
    from redpeft.training.predict import evaluate, open_run

    metrics = evaluate(open_run(find_run(run), base, task), data, config)
    matrix = metrics.pop("confusion_matrix", None)
    found = {"run": run, "data": data, "metrics": metrics, **({"confusion_matrix": matrix} if matrix else {})}
    small = matrix and len(matrix["true"]) <= MATRIX
    return CommandOutput(found, [_scores({data: metrics}), *([_confusion(matrix)] if small else [])])


@command("echo 'Where is my card?' | redpeft predict runs/demo/red -")
def predict(
    run: RunFolder,
    file: Annotated[
        str, typer.Argument(help="A data file, or - for standard input: a table, JSON lines, or lines of text.")
    ],
    format: Annotated[
        Literal["csv", "tsv", "jsonl", "json", "lines"] | None,
        typer.Option(help="The format of the input. Overrides its extension and first line."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the rows with their predictions to this .csv, .tsv or .jsonl file.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base model, if it was moved.")] = None,
    task: TaskName = None,
) -> Iterator[dict[str, Any]] | CommandOutput:
    """Label texts or answer prompts: one JSON object a row, with the row's `id`, or else its text."""
    from redpeft.storage import find_run
    from redpeft.training.answer_files import check_name, read_rows, rounded_answer, save_answers
    from redpeft.training.predict import answer_batches, identity, open_run

    if out is not None:
        check_name(out)
    opened = open_run(find_run(run), base, task)
    batches, total, name = read_rows(opened, file, format)
    answers = answer_batches(opened, batches, total=total, source=name)
    if out is None:
        return ({**identity(row, read), **rounded_answer(answer)} for row, read, answer in answers)
    written = save_answers(out, answers)
    return CommandOutput({"out": out, "rows": written}, [f"Wrote {counted(written, 'row')} with answers to {out}"])


@command("redpeft score e2e --references testset_w_refs.csv --predictions predictions.jsonl")
def score(
    benchmark: Annotated[Literal["e2e"], typer.Argument(help="e2e: the metrics of the E2E NLG challenge.")],
    references: Annotated[
        Path,
        typer.Option(
            help="Several texts for each meaning representation: a table with columns mr and ref, or lines with an "
            "empty line after each group."
        ),
    ],
    predictions: Annotated[
        Path,
        typer.Option(
            help="One text for each meaning representation, in that order: lines, or the output of `redpeft predict`."
        ),
    ],
) -> CommandOutput:
    """Score generated texts with a benchmark's official metrics."""
    from redpeft.tasks.e2e import score_files

    scores = score_files(references, predictions)
    data = {"benchmark": benchmark, "references": references, "predictions": predictions, "scores": scores}
    return CommandOutput(data, [_scores({predictions.name: scores})])


@command("redpeft demo --quick")
def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="The folder for runs and plot. Default: runs/demo, or runs/demo-quick."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One minute: the chat model alone, with fewer steps.")
    ] = False,
) -> CommandOutput:
    """Teach a small chat model three styles, and sort messages by RED and other methods: no account, three minutes."""
    from redpeft.demo import run_demo

    result, shown = run_demo(out or Path("runs", "demo-quick" if quick else "demo"), quick)
    return CommandOutput(result, shown)


@command("redpeft version")
def version() -> CommandOutput:
    """Show the versions of redpeft and of the libraries that it uses."""
    from importlib.metadata import version

    packages = ("redpeft", "torch", "transformers", "peft", "accelerate", "datasets")
    versions = {"python": sys.version.split()[0], **{name: version(name) for name in packages}}
    return CommandOutput(versions, [f"{name} {number}" for name, number in versions.items()])


def _rollouts(recipe: Recipe) -> Callable[..., Any] | None:
    """What gives vLLM RED's edit, if rewards are to be trained with vLLM. Other methods go TRL's own way."""
    if recipe.method != "red" or not recipe.trainer_options.get("use_vllm"):
        return None
    from redpeft.serving.rollouts import Rollouts

    return Rollouts(recipe.base.model)


def _scores(splits: dict[str, dict[str, Any]]) -> Table:
    """Scores by split and metric: each a value, or its mean and standard deviation over seeds."""
    table = Table("metric", *splits)
    for metric in dict.fromkeys(name for scores in splits.values() for name in scores):
        table.add_row(metric, *(_figure(scores.get(metric)) for scores in splits.values()))
    return table


def _confusion(matrix: dict[str, Any]) -> Table:
    """How many rows of each label were given each label."""
    columns = ["no label" if name is None else escape(name) for name in matrix["predicted"]]
    table = Table("true label, as predicted", *columns)
    for name, counts in zip(matrix["true"], matrix["counts"], strict=True):
        table.add_row(escape(name), *map(str, counts))
    return table


def _figure(value: float | dict[str, float | None] | None) -> str:
    if not isinstance(value, dict):
        return "-" if value is None else f"{value:.4f}"
    spread = value["standard_deviation"]
    return _figure(value["mean"]) + ("" if spread is None else f" ± {spread:.4f}")
