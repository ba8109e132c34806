"""Decide for every site what becomes of its edit, by reading its weights once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from redpeft.adapters.files import Adapter, EffectiveEdit
from redpeft.adapters.fold.checkpoint import Checkpoint
from redpeft.adapters.fold.exactness import Exactness, fold_layer
from redpeft.adapters.fold.names import Names
from redpeft.adapters.fold.plan import BIAS_LEFT, LEFT, Plan, is_quantised


@dataclass(frozen=True)
class FoldedSite:
    """What becomes of a site's edit: `form` says it in words.

    `key` is its weight's in the base's checkpoint and `scale` what its outputs are multiplied by there, None where the
    weight stays; `bias` is the layer's new bias; `left` is what stays an edit.
    """

    site: str
    form: str
    key: str | None = None
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    left: EffectiveEdit | None = None
    exactness: Exactness | None = None


def survey(
    adapter: Adapter, plan: Plan, checkpoint: Checkpoint, names: Names, dtype: torch.dtype, bundle: bool
) -> list[FoldedSite]:
    """One `FoldedSite` for each of the adapter's sites, none of them beyond the range of `dtype` (`UserError`).

    In a bundle an edit that rounding would spoil stays an edit.
    """
    return [_fold_site(site, adapter, plan, checkpoint, names, dtype, bundle) for site in adapter.edits]


def _fold_site(
    site: str,
    adapter: Adapter,
    plan: Plan,
    checkpoint: Checkpoint,
    names: Names,
    dtype: torch.dtype,
    bundle: bool,
) -> FoldedSite:
    form, edit = plan.forms[site], adapter.edits[site]
    if form == LEFT:
        return FoldedSite(site, LEFT, left=edit)
    quantised = is_quantised(plan.model.config, site)
    if quantised and f"{site}.bias" in names.own.values():
        key = names.find(f"{site}.bias").removesuffix("bias") + "weight"  # torchao's weights have other names
    else:
        key = names.find(f"{site}.weight")
    bias_key = key.removesuffix("weight") + "bias"
    bias = checkpoint.read(bias_key) if bias_key in checkpoint.keys else None
    if quantised:  # its scale is 1: the bias alone is folded
        new = edit.bias if bias is None else bias.float() + edit.bias
        return FoldedSite(site, form, key, bias=new.to(dtype))
    weight = rows(checkpoint.read(key), plan.model.get_submodule(site))
    new_bias, exactness = fold_layer(site, weight, bias, edit, adapter.units[site], dtype)
    if bundle and exactness.is_poor:
        return FoldedSite(site, LEFT, key, left=edit)
    if form == BIAS_LEFT:
        left = EffectiveEdit(torch.ones_like(edit.scale), edit.bias)
        return FoldedSite(site, form, key, edit.scale, left=left, exactness=exactness)
    has_bias = plan.model.get_submodule(site).bias is not None  # or it needs none
    return FoldedSite(site, form, key, edit.scale, new_bias if has_bias else None, exactness=exactness)


def rows(weight: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """A layer's weight as (width, in): Conv1D keeps it the other way round. Its own inverse."""
    return weight.T if isinstance(module, Conv1D) else weight
