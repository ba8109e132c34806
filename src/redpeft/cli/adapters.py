"""Commands about trained adapters, and about where a model would be edited."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from redpeft.cli.command import CommandOutput, RunFolder, command
from redpeft.console import counted
from redpeft.errors import RunError, UserError, shorten_list


@command("redpeft sites roberta-base --sites red+")
def sites(
    model: Annotated[
        str, typer.Argument(help="A Hub name, a folder with a config.json, or a GGUF file.", show_default=False)
    ],
    sites: Annotated[str, typer.Option(help="ffn, attention, qkv, several such as ffn,qkv, or red+ (all).")] = "ffn",
    layers: Annotated[str | None, typer.Option(help="Only the blocks with these numbers, such as 0,1,11.")] = None,
) -> CommandOutput:
    """Show which modules would be edited, and how many parameters that adds. Needs no weights."""
    from redpeft.adapters.stats import preview, preview_table

    found = preview(model, sites.split(","), None if layers is None else _numbers(layers))
    stored = f", GGUF {found.dequantised_from}" if found.dequantised_from else ""
    title = f"{found.model} ({found.architecture}{stored})"
    return CommandOutput(dataclasses.asdict(found), [title, preview_table(found)])


@command("redpeft inspect runs/demo/red --plot red.png")
def inspect(
    adapter: RunFolder,
    other: Annotated[Path | None, typer.Argument(help="A second adapter to compare with.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture to this PNG file.")] = None,
) -> CommandOutput:
    """Show what an adapter has learned, site by site, or how two adapters differ."""
    from redpeft.adapters import read_adapter, stats
    from redpeft.storage import find_adapter

    adapters = [read_adapter(find_adapter(folder)) for folder in (adapter, other) if folder]
    data: dict[str, Any] = {"adapter": adapters[0].folder, "sites": stats.summarize(adapters[0])}
    shown: list[Any] = [stats.summary_table(data["sites"], str(adapters[0].folder))]
    if other:
        rows = stats.compare(*adapters)
        data |= {"other": adapters[1].folder, "comparison": rows}
        shown = [stats.comparison_table(rows, f"{adapters[0].folder} (this) and {adapters[1].folder} (other)")]
    if plot:
        data["plot"] = stats.plot(adapters, plot)
        shown.append(f"Drew {plot}")
    return CommandOutput(data, shown)


@command("redpeft fold runs/reviews --out models/reviews")
def fold(
    adapter: Annotated[
        Path | None, typer.Argument(help="A run folder, or the adapter folder in it.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(help="The base model, if the adapter does not name it.")] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(help="Number format of the weights. Default: the base's own."),
    ] = None,
    as_: Annotated[
        Literal["llama"] | None,
        typer.Option("--as", help="Write the model as Llama, if that is the same function."),
    ] = None,
    format_: Annotated[
        Literal["checkpoint", "bundle"],
        typer.Option(
            "--format", help="bundle: what does not fit into a plain checkpoint stays as an adapter beside it."
        ),
    ] = "checkpoint",
    plan: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Only show what folding would write for this model.")
    ] = None,
    sites: Annotated[str, typer.Option(help="With --plan and no adapter: ffn, attention, qkv, red+.")] = "ffn",
) -> CommandOutput:
    """Fold an adapter into its base model's weights: a plain checkpoint that needs no redpeft."""
    from redpeft.adapters import read_adapter
    from redpeft.adapters.fold import fold, preview_fold, preview_table, result_table
    from redpeft.storage import find_adapter

    if plan:
        preview = preview_fold(plan, sites.split(","), read_adapter(find_adapter(adapter)) if adapter else None)
        return CommandOutput(dataclasses.asdict(preview), [preview_table(preview, plan), *preview.notes])
    if adapter is None or out is None:
        raise UserError("give an adapter and --out, or --plan MODEL")
    result = fold(adapter, out, base, dtype=dtype, llama=as_ == "llama", bundle=format_ == "bundle")
    return CommandOutput(result.summary(), [result_table(result), *result.notes, f"Checkpoint: {out}"])


@command("redpeft export-base smollm2 --out models/smollm2")
def export_base(
    base: Annotated[
        str, typer.Argument(metavar="FILE.gguf", help="A GGUF file, or its short name.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Number format of the weights.")] = "fp32",
) -> CommandOutput:
    """Write a GGUF file as an ordinary model folder, which transformers and vLLM load."""
    from redpeft.models import export_base

    model, quantised_as = export_base(base, out, dtype)
    kind, parameters = type(model).__name__, model.num_parameters()
    data = {"base": base, "out": out, "architecture": kind, "parameters": parameters, "dtype": dtype}
    data["dequantised_from"] = quantised_as
    return CommandOutput(data, [f"{kind}, {parameters:,} parameters, {quantised_as} to {dtype}", f"Folder: {out}"])


@command('redpeft compose \'0.7 * "runs/formal" + 0.3 * "runs/brief"\' --out adapters/both')
def compose(
    expression: Annotated[
        str,
        typer.Argument(
            help='Folders in quotes: 0.7 * "a" + 0.3 * "b" is the weighted sum, "a" >> "b" is b after a; '
            "inverse(...), scale(...), bias(...), layers(..., 0-5, 11), trim(..., 0.8).",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The adapter folder to write.")],
    head: Annotated[Path | None, typer.Option(help="The adapter whose head is kept, if several have one.")] = None,
) -> CommandOutput:
    """Make an adapter from others by exact arithmetic on their edits."""
    from redpeft.adapters import stats
    from redpeft.adapters.arithmetic import compose

    made, whose = compose(expression, out, head)
    rows = stats.summarize(made)
    kept = made.config["base_fingerprint"]
    data = {"adapter": out, "expression": expression, "base_fingerprint": kept, "head": whose, "sites": rows}
    shown: list[Any] = [stats.summary_table(rows, expression)]
    if not kept:
        shown.append("No fingerprint of the base model: none was made for exactly these sites.")
    if whose:
        shown.append(f"Head (modules_to_save): {whose}")
    return CommandOutput(data, [*shown, f"Adapter: {out}"])


@command("redpeft import-released RoBERTa_base/checkpoint/mnli --base FacebookAI/roberta-base --out adapters/mnli")
def import_released(
    path: Annotated[Path, typer.Argument(help="A delta_vector.pth, or the folder that holds it.", show_default=False)],
    base: Annotated[str, typer.Option(help="The base model: a Hub name, or a folder with a config.json.")],
    out: Annotated[Path, typer.Option(help="The adapter folder to write.")],
) -> CommandOutput:
    """Turn a checkpoint of the paper's own code into an adapter, and show what is in it."""
    from redpeft.adapters.released import import_released, import_table

    found = import_released(path, base, out)
    return CommandOutput(dataclasses.asdict(found), [import_table(found), *found.notes, f"Adapter: {out}"])


@command("redpeft export-released adapters/mnli --out mnli")
def export_released(
    adapter: RunFolder,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
) -> CommandOutput:
    """Write an adapter in the paper's own format: delta_vector.pth, and classifier.pth for RoBERTa's head."""
    from redpeft.adapters import read_adapter
    from redpeft.adapters.released import export_released
    from redpeft.storage import find_adapter

    found = export_released(read_adapter(find_adapter(adapter)), out)
    return CommandOutput(dataclasses.asdict(found), [f"Wrote {file} ({found.dtype})" for file in found.files])


@command("redpeft list runs")
def list_(
    path: Annotated[Path, typer.Argument(help="A folder with adapters below it.", show_default=False)],
) -> CommandOutput:
    """Show the adapters below a folder, and check each; exit code 1 if one is damaged."""
    from redpeft.adapters.listing import adapters_table, list_adapters

    rows = list_adapters(path)
    damaged = [row for row in rows if row.status == "damaged"]
    names = shorten_list([row.name for row in damaged])
    error = RunError(f"damaged: {len(damaged)} of {counted(len(rows), 'adapter')}: {names}") if damaged else None
    reasons = [f"{row.name}: {row.reason}" for row in damaged]
    return CommandOutput({"path": path, "adapters": rows}, [adapters_table(rows, str(path)), *reasons], error)


@command("redpeft serve models/llama --adapters runs/teams -- --port 8000")
def serve(
    base: Annotated[str, typer.Argument(help="The base model: a Hub name or a folder.", show_default=False)],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="vLLM's own options, as for `vllm serve`.")
    ] = None,
    adapters: Annotated[Path, typer.Option(help="A folder with adapters and runs. Each is served as a model.")] = Path(
        "runs"
    ),
    max_adapters: Annotated[int, typer.Option(min=1, help="How many adapters one batch can mix.")] = 64,
) -> CommandOutput:
    """Serve a base model and any number of RED adapters with vLLM's OpenAI server."""
    from redpeft.serving.launch import serve

    serve(base, adapters, max_adapters, options or [])


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--layers takes block numbers such as 0,1,11, not {text!r}") from None
