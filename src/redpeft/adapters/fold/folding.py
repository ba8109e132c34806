"""Fold an adapter into a plain transformers checkpoint: plan where each edit goes, fold the layers, write the files.

No model is loaded, but to dequantise a GGUF file.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from redpeft.adapters.card import write_folded_card
from redpeft.adapters.checkpoint import Checkpoint, KeyMap, checkpoint_fingerprint, is_quantised, local_folder
from redpeft.adapters.fold.layers import WARN_ABOVE, FoldedSite, FoldSpec, fold_sites
from redpeft.adapters.fold.placement import LEFT, FoldPreview, Plan, empty_adapted_model, plan_adapter, why_not_llama
from redpeft.adapters.fold.write import find_changes, write_other_files, write_weights
from redpeft.adapters.folder import Adapter, EffectiveEdit, read_adapter, write_adapter
from redpeft.adapters.stats import layer_pattern
from redpeft.errors import UserError, shorten_list
from redpeft.models import (
    DTYPE_ARGUMENT,
    DTYPES,
    FLOATS,
    dtype_name,
    export_base,
    find_base,
    fingerprint_difference,
    load_config,
    loading_report,
    output_width,
)
from redpeft.storage import ADAPTER, find_adapter, find_run, new_folder, temporary_path


@dataclass(frozen=True)
class FoldResult:
    """A folded checkpoint. `changes`: of the configuration; `adapter`: the folder with the edits that are left, in a
    bundle."""

    out: Path
    architecture: str
    dtype: torch.dtype
    changes: dict[str, Any]
    sites: list[FoldedSite]
    adapter: Path | None

    @property
    def notes(self) -> list[str]:
        """A warning where the dtype rounds away much of the edit."""
        poor = [site.site for site in self.sites if site.exactness and site.exactness.is_poor]
        if not poor:
            return []
        other = "fp32" if self.dtype == torch.float16 else "fp32 or fp16"
        return [
            f"Warning: at {len(poor)} of {len(self.sites)} sites {self.dtype} rounds away more than {WARN_ABOVE:.0%} "
            f"of the edit or of its scales ({shorten_list(poor)}): fold to {other} (--dtype), or write a bundle"
        ]

    def summary(self) -> dict[str, Any]:
        """The same without tensors, for JSON."""
        sites = [
            {"site": site.site, "placement": site.placement, **(asdict(site.exactness) if site.exactness else {})}
            for site in self.sites
        ]
        return {**vars(self), "dtype": dtype_name(self.dtype), "sites": sites, "notes": self.notes}


def fold(
    path: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    *,
    dtype: str | None = None,
    llama: bool = False,
    bundle: bool = False,
) -> FoldResult:
    """Fold an adapter (or a run's) into its base model's weights and write a checkpoint that needs no redpeft.

    The arithmetic is fp32, rounded once to `dtype` ("fp32", "bf16", "fp16"; the base's own by default). `llama` writes
    the model as Llama where both are the same function. `bundle` keeps an edit that has no place in a stock
    checkpoint, or would be rounded away, as an adapter beside it.

    Raises `UserError` for whatever `read_adapter` refuses, another base model, a base without safetensors, an `out`
    that exists, and an edit that has no place in a stock checkpoint or overflows `dtype`; nothing is written then.
    """
    adapter, out = read_adapter(find_adapter(path)), Path(out)
    with _base_checkpoint(adapter, base, out) as checkpoint:
        original = empty_adapted_model(adapter, load_config(str(checkpoint.folder)), find_run(path))
        plan = plan_adapter(adapter, original, llama)
        if plan.left and not bundle:
            raise UserError(_no_place(plan, original))
        keys = KeyMap(checkpoint.keys, plan.model)
        _check_base(adapter, original, checkpoint, keys)

        stored = _stored_dtype(dtype, checkpoint, keys, plan)
        spec = FoldSpec(adapter, checkpoint, keys, plan, stored, convert=dtype is not None, bundle=bundle)
        sites = fold_sites(spec)
        if all(site.placement == LEFT for site in sites):
            raise UserError(
                f"nothing of {adapter.folder} can be folded into {checkpoint.name}: ship the base model and the "
                "adapter"
            )
        left = {site.site: site.left for site in sites if site.left is not None}

        with new_folder(out) as temporary:
            setattr(plan.model.config, DTYPE_ARGUMENT, stored)
            write_weights(temporary, spec, find_changes(spec, sites, original))
            write_other_files(temporary, checkpoint.folder, adapter, plan.model)
            _check_loads(temporary, plan.model)
            if left:
                _write_left(temporary, out, adapter, left)
            architecture = type(plan.model).__name__
            write_folded_card(temporary, checkpoint.name, architecture, plan.changes, len(sites), list(left))
        return FoldResult(out, architecture, stored, plan.changes, sites, out / ADAPTER if left else None)


@contextmanager
def _base_checkpoint(adapter: Adapter, base: str | Path | None, out: Path) -> Iterator[Checkpoint]:
    """The base model's checkpoint. A GGUF file becomes an ordinary folder beside `out`, removed at the end."""
    named = base or adapter.config.get("base_model_name_or_path")
    if not named:
        raise UserError(f"{adapter.folder} does not name its base model: give it with --base")
    try:
        files = find_base(named)
        folder = local_folder(str(files.folder), None if base else adapter.config.get("revision"))
    except UserError as error:
        if base:
            raise
        raise UserError(
            f"{error}. {adapter.folder} names it as its base model: if it is elsewhere now, give its place with --base"
        ) from error
    if files.gguf_file is None:
        yield Checkpoint(folder, str(named))
        return
    exported = temporary_path(out.resolve())
    try:
        export_base(named, exported)
        yield Checkpoint(exported, str(named))
    finally:
        shutil.rmtree(exported, ignore_errors=True)


def _no_place(plan: Plan, original: PreTrainedModel) -> str:
    llama = "write it as Llama, which is the same function (--as llama), " if why_not_llama(original) is None else ""
    whole = [site for site, placement in plan.placements.items() if placement == LEFT]
    what = f"{'the edits' if whole else 'the biases'} of {shorten_list(whole or plan.left)}"
    return (
        f"a stock {type(plan.model).__name__} has no place for {what}: {llama}write a bundle (--format bundle), which "
        "leaves what cannot be folded as an adapter beside the checkpoint, or use the adapter as it is"
    )


def _check_base(adapter: Adapter, original: PreTrainedModel, checkpoint: Checkpoint, keys: KeyMap) -> None:
    """Refuse another base model than the adapter was trained on: other widths, or other weights."""
    for site, edit in adapter.edits.items():
        width = output_width(original.get_submodule(site), original)
        if width != edit.scale.numel():
            raise UserError(
                f"{adapter.folder} is for another base model than {checkpoint.name}: the output of {site} has width "
                f"{width} there, and {edit.scale.numel()} in the adapter"
            )
    saved = adapter.config.get("base_fingerprint")
    if not saved:
        return
    found = checkpoint_fingerprint({site: site for site in adapter.edits}, original, checkpoint, keys)
    if differs := fingerprint_difference(saved, found):
        raise UserError(f"{adapter.folder} is for another base model than {checkpoint.name}: {differs}")


def _stored_dtype(asked: str | None, checkpoint: Checkpoint, keys: KeyMap, plan: Plan) -> torch.dtype:
    """The dtype of new and folded tensors: the one asked for, or that of the first site's tensors."""
    site = next(iter(plan.placements))
    quantised = is_quantised(plan.model.config, site)
    if plan.placements[site] == LEFT or quantised:
        found = [key for key, name in keys.in_model.items() if name in (f"{site}.weight", f"{site}.bias")]
    else:
        found = [keys.key_of(f"{site}.weight")]
    dtypes = [checkpoint.read(key).dtype for key in found or list(checkpoint.keys)[:1]]
    own = next((dtype for dtype in dtypes if dtype in FLOATS), torch.float32)
    return own if asked is None or quantised else DTYPES[asked]


def _check_loads(folder: Path, model: PreTrainedModel) -> None:
    if getattr(model.config, "quantization_config", None):
        return
    info = loading_report(model, folder)
    if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise UserError(
            f"a {type(model).__name__} does not load from what the fold would write: "
            f"{shorten_list(list(map(str, wrong)))}; the base model's folder may hold another model, or the adapter "
            "lacks its head"
        )


def _write_left(folder: Path, final: Path, adapter: Adapter, left: dict[str, EffectiveEdit]) -> None:
    """Write the edits that are left as an adapter of the folded checkpoint. PEFT needs the head in both."""
    config = {
        **adapter.config,
        "base_model_name_or_path": str(final),
        "revision": None,
        "base_fingerprint": None,
        "use_scale": any(bool((edit.scale != 1).any()) for edit in left.values()),
    }
    write_adapter(replace(adapter, folder=folder / ADAPTER, config=config, edits=left))


# --- tables ----------------------------------------------------------------------------------------------------------


def result_table(result: FoldResult) -> Table:
    """A row for each place in the layers and each placement, with the largest rounding there: as shares of the output
    and of the edit's effect, and the share of scales without effect."""
    table = Table(title=f"{result.architecture}, {dtype_name(result.dtype)}")
    table.add_column("module", overflow="fold")
    table.add_column("sites", justify="right")
    table.add_column("folded into")
    for name in ("rounding / output", "rounding / edit", "scales vanished"):
        table.add_column(name, justify="right")
    for (where, placement), sites in _grouped((site.site, site.placement, site) for site in result.sites).items():
        known = [site.exactness for site in sites if site.exactness]
        worst = ["-", "-", "-"]
        if known:
            worst = [
                f"{max(one.error for one in known):.1e}",
                f"{max(one.lost for one in known):.1e}",
                f"{max(one.vanished for one in known):.1%}",
            ]
        table.add_row(where, str(len(sites)), placement, *worst)
    return table


def preview_table(preview: FoldPreview, model: str) -> Table:
    """A row for each place in the layers and each placement."""
    table = Table(title=f"{model} ({preview.architecture})")
    for name in ("module", "sites", "folded into"):
        table.add_column(name, overflow="fold")
    rows = _grouped((site, placement, site) for site, placement in preview.placements.items())
    for (where, placement), sites in rows.items():
        table.add_row(where, str(len(sites)), placement)
    return table


def _grouped(rows: Iterable[tuple[str, str, Any]]) -> dict[tuple[str, str], list[Any]]:
    groups: dict[tuple[str, str], list[Any]] = {}
    for site, placement, row in rows:
        groups.setdefault((layer_pattern(site), placement), []).append(row)
    return groups
