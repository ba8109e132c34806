"""Commands about a trained edit as a thing, and about where a model would be edited."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from redpeft.cli.command import Answer, RunFolder, command


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
