"""Fold an adapter into a plain transformers checkpoint: plan, survey, write.

No model is built, and one shard of the base is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from redpeft.adapters.card import write_folded_card
from redpeft.adapters.files import Adapter, EffectiveEdit, read_adapter, write_adapter
from redpeft.adapters.fold.base import checkpoint_fingerprint
from redpeft.adapters.fold.checkpoint import Checkpoint, local_folder
from redpeft.adapters.fold.exactness import WARN_ABOVE
from redpeft.adapters.fold.llama import as_llama
from redpeft.adapters.fold.names import Names
from redpeft.adapters.fold.outline import outline
from redpeft.adapters.fold.plan import BIAS_LEFT, LEFT, Parts, Plan, is_quantised, plan_fold
from redpeft.adapters.fold.survey import FoldedSite, survey
from redpeft.adapters.fold.ties import FLAG, untied
from redpeft.adapters.fold.write import changes, write_rest, write_weights
from redpeft.errors import UserError, some
from redpeft.models import (
    DTYPE_ARGUMENT,
    DTYPES,
    FLOATS,
    empty_model,
    fingerprint_difference,
    load_config,
    loading_report,
    on_meta,
    output_width,
)
from redpeft.storage import ADAPTER, find_adapter, find_run, new_folder
from redpeft.tuner.sites import find_sites


@dataclass(frozen=True)
class FoldResult:
    """A folded checkpoint. `adapter` is the folder of the edits that are left beside it, in a bundle."""

    out: Path
    architecture: str
    dtype: torch.dtype
    changes: dict[str, Any]
    sites: list[FoldedSite]
    adapter: Path | None
    notes: list[str]

    def summary(self) -> dict[str, Any]:
        """What can be written as JSON: no tensors."""
        sites = [{"site": s.site, "form": s.form, **(asdict(s.exactness) if s.exactness else {})} for s in self.sites]
        return {**vars(self), "dtype": str(self.dtype).removeprefix("torch."), "sites": sites}


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
    the model as Llama where that is the same function. `bundle` leaves what has no place in a stock checkpoint, or
    would be rounded away, as an adapter beside it.

    Raises `UserError` for whatever `read_adapter` refuses, another base model, a base without safetensors, an `out`
    that is there, and an edit that has no place in a stock checkpoint or overflows `dtype`; nothing is written then.
    """
    adapter, out = read_adapter(find_adapter(path)), Path(out)
    folder = _base_folder(adapter, base)
    checkpoint = Checkpoint(folder)
    original = outline(adapter, load_config(str(folder)), find_run(path))
    plan = plan_adapter(adapter, original, llama)
    if plan.left and not bundle:
        raise UserError(_no_place(plan, original))
    names = Names(checkpoint.keys, plan.model)
    _check_base(adapter, original, checkpoint, names)
    stored = _dtype(dtype, checkpoint, names, plan)
    sites = survey(adapter, plan, checkpoint, names, stored, bundle)
    if all(site.form == LEFT for site in sites):
        raise UserError(
            f"nothing of {adapter.folder} can be folded into {folder}: ship the base model and the adapter"
        )
    filled = {f"{site.site}.bias" for site in sites if site.bias is not None}
    zeros = plan.model.state_dict().keys() - original.state_dict().keys() - filled
    made = changes(sites, plan, zeros, names, stored)
    left = {site.site: site.left for site in sites if site.left is not None}
    with new_folder(out) as temporary:
        setattr(plan.model.config, DTYPE_ARGUMENT, stored)
        used = _used(names, plan.model, folder)
        write_weights(temporary, checkpoint, made, used, plan.model, adapter.head, stored, convert=dtype is not None)
        write_rest(temporary, folder, adapter, plan.model)
        _check_loads(temporary, plan.model)
        if left:
            _write_left(temporary, out, adapter, left)
        architecture = type(plan.model).__name__
        write_folded_card(temporary, str(base or folder), architecture, plan.changes, len(sites), list(left))
    left_in = out / ADAPTER if left else None
    return FoldResult(out, architecture, stored, plan.changes, sites, left_in, _notes(sites, stored))


def _base_folder(adapter: Adapter, base: str | Path | None) -> Path:
    if base:
        return local_folder(str(base))
    named = adapter.config.get("base_model_name_or_path")
    if not named:
        raise UserError(f"{adapter.folder} does not name its base model: give it with --base")
    try:
        return local_folder(str(named), adapter.config.get("revision"))
    except UserError as error:
        raise UserError(
            f"{error}. {adapter.folder} names it as its base model: if it is elsewhere now, give its place with --base"
        ) from error


def _write_left(folder: Path, final: Path, adapter: Adapter, left: dict[str, EffectiveEdit]) -> None:
    """What stays an edit, as an adapter whose base is the folded checkpoint. PEFT wants the head in both."""
    config = {
        **adapter.config,
        "base_model_name_or_path": str(final),
        "revision": None,
        "base_fingerprint": None,
        "use_scale": any(bool((edit.scale != 1).any()) for edit in left.values()),
    }
    write_adapter(replace(adapter, folder=folder / ADAPTER, config=config, edits=left))


@dataclass(frozen=True)
class FoldPreview:
    """What folding would write for a model. `forms` goes by site; `not_llama` is None where --as llama would do."""

    architecture: str
    forms: dict[str, str]
    changes: dict[str, Any]
    not_llama: str | None

    @property
    def notes(self) -> list[str]:
        """What to choose, in words."""
        if not any(form in (BIAS_LEFT, LEFT) for form in self.forms.values()):
            return ["A plain checkpoint carries all of it."]
        return [
            "Needs --format bundle: what stays an edit is an adapter beside the checkpoint.",
            f"--as llama: no, {self.not_llama}"
            if self.not_llama
            else "--as llama: the same function, written as Llama.",
        ]


def preview_fold(model: str, sites: str | Sequence[str] = "ffn", adapter: Adapter | None = None) -> FoldPreview:
    """What becomes of an adapter's edits on `model`, or of whole edits at `sites`. Reads no weights."""
    if adapter is None:
        original = empty_model(model)
        plan = plan_fold(original, {site.name: Parts() for site in find_sites(original, sites)})
    else:
        original = outline(adapter, load_config(model), adapter.folder)
        plan = plan_adapter(adapter, original, llama=False)
    return FoldPreview(type(original).__name__, plan.forms, plan.changes, _not_llama(original))


def plan_adapter(adapter: Adapter, original: PreTrainedModel, llama: bool) -> Plan:
    """The plan for an adapter of `original`, written as Llama where `llama` says so. UserError: it does not fit."""
    sites = {
        site: Parts(bool((edit.scale != 1).any()), bool((edit.bias != 0).any()))
        for site, edit in adapter.edits.items()
    }
    if llama:
        name, config = as_llama(original.config, type(original).__name__)
        plan = plan_fold(on_meta(getattr(transformers, name), config), sites)
        plan = replace(plan, changes={"model_type": config.model_type, **plan.changes})
    else:
        plan = plan_fold(original, sites)
    model, names = untied(plan.model, adapter.head)
    return replace(plan, model=model, changes={**plan.changes, FLAG: False}, untied=names) if names else plan


def _not_llama(model: PreTrainedModel) -> str | None:
    try:
        as_llama(model.config, type(model).__name__)
    except UserError as error:
        return str(error)
    return None


def _no_place(plan: Plan, original: PreTrainedModel) -> str:
    llama = "write it as Llama, which is the same function (--as llama), " if _not_llama(original) is None else ""
    whole = [site for site, form in plan.forms.items() if form == LEFT]
    what = f"{'the edits' if whole else 'the biases'} of {some(whole or plan.left)}"
    return (
        f"a stock {type(plan.model).__name__} has no place for {what}: {llama}write a bundle (--format bundle), which "
        "leaves what cannot be folded as an adapter beside the checkpoint, or use the adapter as it is"
    )


def _check_base(adapter: Adapter, original: PreTrainedModel, checkpoint: Checkpoint, names: Names) -> None:
    """Refuse another base model than the adapter was trained on: other widths, or other weights."""
    for site, edit in adapter.edits.items():
        width = output_width(original.get_submodule(site), original)
        if width != edit.scale.numel():
            raise UserError(
                f"{adapter.folder} is for another base model than {checkpoint.folder}: the output of {site} has width "
                f"{width} there, and {edit.scale.numel()} in the adapter"
            )
    saved = adapter.config.get("base_fingerprint")
    if not saved:
        return
    found = checkpoint_fingerprint({site: site for site in adapter.edits}, original, checkpoint, names)
    if differs := fingerprint_difference(saved, found):
        raise UserError(f"{adapter.folder} is for another base model than {checkpoint.folder}: {differs}")


def _dtype(dtype: str | None, checkpoint: Checkpoint, names: Names, plan: Plan) -> torch.dtype:
    """What new and folded tensors are stored in: as asked for, or as those of the first site are."""
    site = next(iter(plan.forms))
    quantised = is_quantised(plan.model.config, site)
    if plan.forms[site] == LEFT or quantised:
        keys = [key for key, name in names.own.items() if name in (f"{site}.weight", f"{site}.bias")]
    else:
        keys = [names.find(f"{site}.weight")]
    found = [checkpoint.read(key).dtype for key in keys or list(checkpoint.keys)[:1]]
    own = next((one for one in found if one in FLOATS), torch.float32)
    return own if dtype is None or quantised else DTYPES[dtype]


def _used(names: Names, model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """The names without those of tensors that the model of the checkpoint does not have (of another head)."""
    if getattr(model.config, "quantization_config", None):
        return names.written
    unexpected = set(loading_report(model, folder)["unexpected_keys"])
    return {key: name for key, name in names.written.items() if not {key, name, names.own[key]} & unexpected}


def _check_loads(folder: Path, model: PreTrainedModel) -> None:
    if getattr(model.config, "quantization_config", None):
        return
    info = loading_report(model, folder)
    if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise UserError(
            f"a {type(model).__name__} does not load from what the fold would write: {some(list(map(str, wrong)))}; "
            "the base model's folder may hold another model, or the adapter lacks its head"
        )


def _notes(sites: list[FoldedSite], dtype: torch.dtype) -> list[str]:
    poor = [site for site in sites if site.exactness and site.exactness.is_poor]
    if not poor:
        return []
    other = "fp32" if dtype == torch.float16 else "fp32 or fp16"
    return [
        f"Warning: at {len(poor)} of {len(sites)} sites {dtype} rounds away more than {WARN_ABOVE:.0%} of the edit or "
        f"of its scales ({some([site.site for site in poor])}): fold to {other} (--dtype), or write a bundle"
    ]
