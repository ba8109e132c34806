"""What was folded, or would be, as tables: a row for each place in the layers and each form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from redpeft.adapters.fold.folding import FoldPreview, FoldResult
from redpeft.adapters.fold.survey import FoldedSite
from redpeft.adapters.inspect import place


def result_table(result: FoldResult) -> Table:
    """The largest rounding at each place, as shares of the output and of the edit's effect; scales without effect."""
    table = Table(title=f"{result.architecture}, {str(result.dtype).removeprefix('torch.')}")
    table.add_column("module", overflow="fold")
    table.add_column("sites", justify="right")
    table.add_column("folded into")
    for name in ("rounding / output", "rounding / edit", "scales vanished"):
        table.add_column(name, justify="right")
    for (where, form), sites in _grouped((site.site, site.form, site) for site in result.sites).items():
        table.add_row(where, str(len(sites)), form, *_worst(sites))
    return table


def preview_table(preview: FoldPreview, model: str) -> Table:
    """What a checkpoint of this architecture carries, and whether it can be written as Llama."""
    table = Table(title=f"{model} ({preview.architecture})")
    for name in ("module", "sites", "folded into"):
        table.add_column(name, overflow="fold")
    for (where, form), sites in _grouped((site, form, site) for site, form in preview.forms.items()).items():
        table.add_row(where, str(len(sites)), form)
    return table


def _grouped(rows: Iterable[tuple[str, str, Any]]) -> dict[tuple[str, str], list[Any]]:
    groups: dict[tuple[str, str], list[Any]] = {}
    for site, form, row in rows:
        groups.setdefault((place(site), form), []).append(row)
    return groups


def _worst(sites: list[FoldedSite]) -> list[str]:
    known = [site.exactness for site in sites if site.exactness]
    if not known:
        return ["-", "-", "-"]
    return [
        f"{max(one.error for one in known):.1e}",
        f"{max(one.lost for one in known):.1e}",
        f"{max(one.vanished for one in known):.1%}",
    ]
