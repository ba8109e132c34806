"""What an adapter has learned, site by site: how far its scales are from 1, how large its biases are in units."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from redpeft.adapters.files import Adapter


@dataclass(frozen=True)
class SiteSummary:
    """One site. `bias_rms` and `bias_max` are in units; `shift_rms` is the RMS of what is added, `unit * bias`."""

    site: str
    width: int
    scale_rms: float  # root mean square of scale - 1
    scale_min: float
    scale_max: float
    scale_negative: float  # share of the channels
    bias_rms: float
    bias_max: float
    unit: float
    shift_rms: float


@dataclass(frozen=True)
class SiteComparison:
    """One site of two adapters: cosine and relative size (other / this) of `scale - 1` and of what is added.

    None where one of the two does not edit the site, or where one of the vectors is zero.
    """

    site: str
    edited_by: str  # "both", "this" or "other"
    scale_cosine: float | None
    scale_size: float | None
    shift_cosine: float | None
    shift_size: float | None


def summarize(adapter: Adapter) -> list[SiteSummary]:
    """One row per site, in the order of depth."""
    rows = []
    for site in _by_depth(adapter.edits):
        scale, shift, unit = adapter.edits[site].scale, adapter.edits[site].bias, adapter.units[site]
        rows.append(
            SiteSummary(
                site=site,
                width=scale.numel(),
                scale_rms=_rms(scale - 1),
                scale_min=scale.min().item(),
                scale_max=scale.max().item(),
                scale_negative=(scale < 0).float().mean().item(),
                bias_rms=_rms(shift) / unit,
                bias_max=shift.abs().max().item() / unit,
                unit=unit,
                shift_rms=_rms(shift),
            )
        )
    return rows


def compare(this: Adapter, other: Adapter) -> list[SiteComparison]:
    """One row per site that either adapter edits. Biases are compared as they act, whatever their units."""
    rows = []
    for site in _by_depth(this.edits.keys() | other.edits.keys()):
        a, b = this.edits.get(site), other.edits.get(site)
        if a is None or b is None or a.scale.shape != b.scale.shape:
            edited_by = "this" if b is None else "other" if a is None else "both, in different widths"
            rows.append(SiteComparison(site, edited_by, None, None, None, None))
            continue
        scale = _cosine_and_size(a.scale - 1, b.scale - 1)
        rows.append(SiteComparison(site, "both", *scale, *_cosine_and_size(a.bias, b.bias)))
    return rows


def summary_table(rows: Sequence[SiteSummary], title: str) -> Table:
    table = Table(
        title=title, caption="scale: RMS of scale - 1, range, share below 0; bias: in units", box=SIMPLE_HEAD
    )
    table.add_column("site", overflow="fold", min_width=18)
    for name in ("scale RMS", "min", "max", "< 0", "bias RMS", "max", "unit"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.site,
            f"{row.scale_rms:.3g}",
            f"{row.scale_min:.2f}",
            f"{row.scale_max:.2f}",
            f"{row.scale_negative:.1%}",
            f"{row.bias_rms:.3g}",
            f"{row.bias_max:.3g}",
            f"{row.unit:.3g}",
        )
    return table


def comparison_table(rows: Sequence[SiteComparison], title: str) -> Table:
    caption = "cosine and relative size (other / this) of scale - 1 and of what is added"
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("site", overflow="fold", min_width=18)
    table.add_column("edited by")
    for name in ("scale: cosine", "size", "bias: cosine", "size"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = (row.scale_cosine, row.scale_size, row.shift_cosine, row.shift_size)
        table.add_row(row.site, row.edited_by, *("-" if value is None else f"{value:.3g}" for value in figures))
    return table


def plot(adapters: Sequence[Adapter], path: str | Path) -> Path:
    """A PNG with one row of two panels per adapter, along depth: distance of scale from 1, size of bias in units.

    One line per place in the layers (for RED+: five); dotted, the layer's largest bias.
    """
    from matplotlib.figure import Figure  # no pyplot: no display and no global state

    figure = Figure(figsize=(9, 0.6 + 2.7 * len(adapters)), layout="constrained")
    panels = figure.subplots(len(adapters), 2, squeeze=False, sharey="col")
    for (left, right), adapter in zip(panels, adapters, strict=True):
        for name, rows in _by_place(summarize(adapter)).items():
            depth = range(len(rows))
            (line,) = left.plot(depth, [row.scale_rms for row in rows], "o-", markersize=3, label=name)
            right.plot(depth, [row.bias_rms for row in rows], "o-", markersize=3, color=line.get_color())
            right.plot(depth, [row.bias_max for row in rows], ":", color=line.get_color())
        left.set_title("scale: RMS of scale - 1")
        left.set_ylabel("/".join(adapter.folder.parts[-3:]), fontsize="small")
        right.set_title("bias in units: RMS, and dotted the largest")
        left.legend(fontsize="x-small", frameon=False)
    for panel in panels.flat:
        panel.set_xlabel("layer")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
    return path


def place(site: str) -> str:
    """The site's name with `*` for the layer's number, the same in every layer: `layers.*.mlp.down_proj`."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", site, count=1)


def _by_depth(sites: Iterable[str]) -> list[str]:
    """Sorted with the numbers in the names as numbers: layer 10 comes after layer 9."""
    return sorted(sites, key=lambda site: [part.zfill(6) if part.isdigit() else part for part in site.split(".")])


def _by_place(rows: Sequence[SiteSummary]) -> dict[str, list[SiteSummary]]:
    places: dict[str, list[SiteSummary]] = {}
    for row in rows:
        places.setdefault(place(row.site), []).append(row)
    return places


def _rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


def _cosine_and_size(a: torch.Tensor, b: torch.Tensor) -> tuple[float | None, float | None]:
    """Cosine of two vectors and |b| / |a|; None where a zero vector leaves it undefined."""
    size_a, size_b = a.norm().item(), b.norm().item()
    if size_a == 0:
        return None, None
    return ((a @ b).item() / (size_a * size_b) if size_b else None), size_b / size_a
