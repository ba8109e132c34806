"""What an adapter of a model would be, before there is one: its modules, its size, and what other methods take."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from peft import LoraConfig, get_peft_model
from rich.table import Table
from transformers import PreTrainedModel

from redpeft.adapters.inspect import place
from redpeft.models import empty_model
from redpeft.tuner.sites import Site, find_sites

LORA_RANK = 16


@dataclass(frozen=True)
class Preview:
    """Counts of parameters. `lora_*` are those of LoRA r=16 on PEFT's default modules, None where PEFT has none."""

    model: str
    architecture: str
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
    places: dict[str, list[Site]] = {}
    for site in preview.sites:
        added = site.added and f" + {site.added.rpartition('.')[2]}"  # one edit of the sum of both
        places.setdefault(place(site.name) + (added or ""), []).append(site)
    table.add_column("module", "all", overflow="fold")
    table.add_column("kind")
    table.add_column("sites", f"{len(preview.sites)}", justify="right")
    table.add_column("width", justify="right")
    table.add_column("parameters", f"{preview.parameters:,}", justify="right")
    for name, found in places.items():
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
            warnings.simplefilter("ignore")  # nobody asked to train a LoRA
            lora = get_peft_model(empty, LoraConfig(r=LORA_RANK), low_cpu_mem_usage=True)
    except ValueError:  # PEFT: "Please specify `target_modules`"
        return None, None
    count = sum(parameter.numel() for name, parameter in lora.named_parameters() if ".lora_" in name)
    return sorted(lora.peft_config["default"].target_modules), count
