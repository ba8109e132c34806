"""Numbers of adapters, site by site: what one has learned, how two differ, and how large one would be on a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import PreTrainedModel

from redpeft.adapters.folder import Adapter
from redpeft.models import empty_model
from redpeft.tuner.sites import Site, find_sites

LORA_RANK = 16


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


class Outlier(NamedTuple):
    """A channel that differs much from the identity. `value` is of scale - 1 or of the bias in units; `times` is how
    many times the site's RMS that is."""

    site: str
    channel: int
    vector: str  # "scale" or "bias"
    value: float
    times: float


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


def channels(adapter: Adapter) -> dict[str, dict[str, torch.Tensor]]:
    """What each channel learned: "scale" is scale - 1, "bias" the bias in units; by site in the order of depth, each
    of shape (width,)."""
    sites = _by_depth(adapter.edits)
    return {
        "scale": {site: adapter.edits[site].scale - 1 for site in sites},
        "bias": {site: adapter.edits[site].bias / adapter.units[site] for site in sites},
    }


def outliers(adapter: Adapter, count: int = 5) -> list[Outlier]:
    """The channels of all sites that differ most from the identity: `count` by their scale, then `count` by their bias
    in units."""
    found = []
    for vector, sites in channels(adapter).items():
        rows = [
            Outlier(
                site, int(channel), vector, values[channel].item(), abs(values[channel].item()) / (_rms(values) or 1)
            )
            for site, values in sites.items()
            for channel in values.abs().topk(min(count, len(values))).indices
        ]
        found += sorted(rows, key=lambda row: -abs(row.value))[:count]
    return found


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
    """Draw a PNG with a row of two panels per adapter: the scale's distance from 1 and the bias in units, by layer.

    There is one line for each place in a layer (five for RED+); the dotted line is the layer's largest bias.
    """
    from matplotlib.figure import Figure  # not pyplot, which has global state

    figure = Figure(figsize=(9, 0.6 + 2.7 * len(adapters)), layout="constrained")
    panels = figure.subplots(len(adapters), 2, squeeze=False, sharey="col")
    for (left, right), adapter in zip(panels, adapters, strict=True):
        for name, rows in _by_pattern(summarize(adapter)).items():
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


def short_site_names(sites: Sequence[str]) -> list[str]:
    """The layer's number, followed by the module's own name where a layer has several sites; whole names where that
    does not tell them apart."""
    several = len({layer_pattern(site) for site in sites}) > 1
    names = []
    for site in sites:
        number = re.search(r"(?:^|\.)(\d+)(?=\.)", site)
        own = site.rpartition(".")[2]
        names.append(f"{number[1]} {own}" if number and several else number[1] if number else own)
    return names if len(set(names)) == len(sites) else list(sites)


def layer_pattern(site: str) -> str:
    """A site's name with `*` for the layer's number, the same in every layer: `layers.*.mlp.down_proj`."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", site, count=1)


def _by_depth(sites: Iterable[str]) -> list[str]:
    """Sorted by name, with numbers in names compared as numbers: layer 10 comes after layer 9."""
    return sorted(sites, key=lambda site: [part.zfill(6) if part.isdigit() else part for part in site.split(".")])


def _by_pattern(rows: Sequence[SiteSummary]) -> dict[str, list[SiteSummary]]:
    groups: dict[str, list[SiteSummary]] = {}
    for row in rows:
        groups.setdefault(layer_pattern(row.site), []).append(row)
    return groups


def _rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


def _cosine_and_size(a: torch.Tensor, b: torch.Tensor) -> tuple[float | None, float | None]:
    """Cosine of two vectors and |b| / |a|; None where a zero vector leaves it undefined."""
    size_a, size_b = a.norm().item(), b.norm().item()
    if size_a == 0:
        return None, None
    return ((a @ b).item() / (size_a * size_b) if size_b else None), size_b / size_a


# --- before there is an adapter -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preview:
    """Numbers of parameters. `lora_*`: of LoRA r=16 on PEFT's default modules, None where PEFT has no default."""

    model: str
    architecture: str
    dequantised_from: str | None  # of a GGUF file
    sites: list[Site]
    parameters: int
    base_parameters: int
    share_percent: float
    times_fewer_than_full: float
    lora_modules: list[str] | None
    lora_parameters: int | None
    times_fewer_than_lora: float | None


def preview(model: str, sites: str | Sequence[str] = "ffn", layers: Sequence[int] | int | None = None) -> Preview:
    """Where RED would edit `model`, a hub name or a folder with a config.json; no weights are read.

    `layers` keeps the blocks with these indices. Raises `UserError` for a model that cannot be found or built, and for
    one without such sites or blocks.
    """
    empty = empty_model(model)
    found = find_sites(empty, sites, layers)
    parameters = sum(2 * site.width for site in found)
    base_parameters = sum(parameter.numel() for parameter in empty.parameters())
    architecture = type(empty).__name__
    lora_modules, lora_parameters = _lora(empty)
    return Preview(
        model=model,
        architecture=architecture,
        dequantised_from=getattr(empty.config, "dequantised_from", None),
        sites=found,
        parameters=parameters,
        base_parameters=base_parameters,
        share_percent=100 * parameters / base_parameters,
        times_fewer_than_full=base_parameters / parameters,
        lora_modules=lora_modules,
        lora_parameters=lora_parameters,
        times_fewer_than_lora=lora_parameters and lora_parameters / parameters,
    )


def preview_table(preview: Preview) -> Table:
    """One row per place in the layers, then the sums."""
    table = Table(show_footer=True)
    groups: dict[str, list[Site]] = {}
    for site in preview.sites:
        added = site.added and f" + {site.added.rpartition('.')[2]}"  # one edit of the sum of both
        groups.setdefault(layer_pattern(site.name) + (added or ""), []).append(site)
    table.add_column("module", "all", overflow="fold")
    table.add_column("kind")
    table.add_column("sites", f"{len(preview.sites)}", justify="right")
    table.add_column("width", justify="right")
    table.add_column("parameters", f"{preview.parameters:,}", justify="right")
    for name, found in groups.items():
        count = sum(2 * site.width for site in found)
        table.add_row(name, found[0].kind, str(len(found)), str(found[0].width), f"{count:,}")
    lora = "n/a (PEFT has no default modules for this model)"
    if preview.lora_modules:
        modules = ", ".join(preview.lora_modules)
        lora = f"{preview.lora_parameters:,} on {modules}: {preview.times_fewer_than_lora:,.0f} times as many"
    table.caption = (
        f"{preview.share_percent:.4f} % of the base model's {preview.base_parameters:,} parameters, "
        f"{preview.times_fewer_than_full:,.0f} times fewer than full fine-tuning\nLoRA r={LORA_RANK}: {lora}"
    )
    return table


def _lora(empty: PreTrainedModel) -> tuple[list[str] | None, int | None]:
    """The modules that PEFT's LoRA chooses by itself in this model, and its parameters. Changes the model."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # this LoRA is only counted
            lora = get_peft_model(empty, LoraConfig(r=LORA_RANK), low_cpu_mem_usage=True)
    except ValueError:  # PEFT: "Please specify `target_modules`"
        return None, None
    count = sum(parameter.numel() for name, parameter in lora.named_parameters() if ".lora_" in name)
    return sorted(lora.peft_config["default"].target_modules), count
