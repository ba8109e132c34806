"""Fold each site's edit into its layer, and measure what rounding does to it. The weights are read once.

The arithmetic is exact; the dtype that the result is stored in rounds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from redpeft.adapters.checkpoint import Checkpoint, KeyMap, is_quantised
from redpeft.adapters.fold.placement import BIAS_LEFT, LEFT, Plan
from redpeft.adapters.folder import Adapter, EffectiveEdit
from redpeft.errors import UserError
from redpeft.tuner.edit import fold_edit

WARN_ABOVE = 0.1  # share of the edit's effect that is lost, or of the scale's entries that have no effect


@dataclass(frozen=True)
class FoldSpec:
    """What is folded into what, and how: everything that is known before a weight is read.

    `dtype` is that of new and folded tensors; with `convert` all other tensors get it too. In a `bundle` an edit that
    rounding would spoil stays an edit.
    """

    adapter: Adapter
    checkpoint: Checkpoint
    keys: KeyMap
    plan: Plan
    dtype: torch.dtype
    convert: bool
    bundle: bool


@dataclass(frozen=True)
class Exactness:
    """What rounding did to one site, as shares of 1.

    `error` is the size of the rounding over the size of the edited output, for inputs of independent normal components
    at which the output has the adapter's unit. `lost` is the same over the size of the edit's effect: at 1 the edit is
    lost. `vanished` counts the entries of the scale that are not 1 and changed nothing: in bf16 those within 2^-9 of
    1.
    """

    error: float
    lost: float
    vanished: float

    @property
    def is_poor(self) -> bool:
        return max(self.lost, self.vanished) > WARN_ABOVE


@dataclass(frozen=True)
class FoldedSite:
    """Where a site's edit went.

    `key`: its weight's in the base's checkpoint; `scale`: what the weight's rows are multiplied by, None where the
    weight stays; `bias`: the layer's new bias; `left`: the edit that stays.
    """

    site: str
    placement: str
    key: str | None = None
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    left: EffectiveEdit | None = None
    exactness: Exactness | None = None

    @property
    def bias_key(self) -> str:
        assert self.key is not None
        return self.key.removesuffix("weight") + "bias"


def fold_sites(spec: FoldSpec) -> list[FoldedSite]:
    """One `FoldedSite` for each of the adapter's sites. `UserError`: a value beyond the range of the dtype."""
    return [_fold_site(site, edit, spec) for site, edit in spec.adapter.edits.items()]


def _fold_site(site: str, edit: EffectiveEdit, spec: FoldSpec) -> FoldedSite:
    plan, keys, placement = spec.plan, spec.keys, spec.plan.placements[site]
    if placement == LEFT:
        return FoldedSite(site, LEFT, left=edit)
    quantised = is_quantised(plan.model.config, site)
    if quantised and f"{site}.bias" in keys.in_model.values():
        key = keys.key_of(f"{site}.bias").removesuffix("bias") + "weight"  # torchao's weights have other names
    else:
        key = keys.key_of(f"{site}.weight")
    folded = FoldedSite(site, placement, key)
    bias = spec.checkpoint.read(folded.bias_key) if folded.bias_key in spec.checkpoint.keys else None
    if quantised:  # its scale is 1: only the bias is folded
        new_bias = edit.bias if bias is None else bias.float() + edit.bias
        return FoldedSite(site, placement, key, bias=new_bias.to(spec.dtype))
    module = plan.model.get_submodule(site)
    weight = as_rows(spec.checkpoint.read(key), module)
    new_bias, exactness = fold_layer(site, weight, bias, edit, spec.adapter.units[site], spec.dtype)
    if spec.bundle and exactness.is_poor:
        return FoldedSite(site, LEFT, key, left=edit)
    if placement == BIAS_LEFT:
        left = EffectiveEdit(torch.ones_like(edit.scale), edit.bias)
        return FoldedSite(site, placement, key, edit.scale, left=left, exactness=exactness)
    has_bias = module.bias is not None  # a layer without one needs none here
    return FoldedSite(site, placement, key, edit.scale, new_bias if has_bias else None, exactness=exactness)


def fold_layer(
    site: str, weight: torch.Tensor, bias: torch.Tensor | None, edit: EffectiveEdit, unit: float, dtype: torch.dtype
) -> tuple[torch.Tensor, Exactness]:
    """The new bias of a linear layer with an edit folded into it, and how exact the whole layer is.

    Shapes: weight (width, in), bias and the result (width,). The arithmetic is fp32 (fp64 for fp64 weights), rounded
    once to `dtype`. `unit` is the adapter's at this site, 1 where it has none. Raises `UserError` for a result beyond
    the range of `dtype`.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = edit.scale.to(wide)
    exact_weight, exact_bias = fold_edit(weight, bias, scale, edit.bias.to(wide))
    stored_weight, stored_bias = exact_weight.to(dtype), exact_bias.to(dtype)
    if not (stored_weight.isfinite().all() and stored_bias.isfinite().all()):
        largest = max(exact_weight.abs().max().item(), exact_bias.abs().max().item())
        raise UserError(
            f"{site}: the folded layer has values up to {largest:.3g}, and {dtype} ends at "
            f"{torch.finfo(dtype).max:.3g}; fold to bf16 or fp32"
        )
    plain = weight.to(wide)
    spread = 1.0 if unit == 1 else unit / plain.norm(dim=1).median().clamp_min(torch.finfo(wide).tiny).item()

    def size(weights: torch.Tensor, biases: torch.Tensor) -> float:
        return ((spread * weights.norm()) ** 2 + biases.norm() ** 2).sqrt().item()

    rounding = size(stored_weight.to(wide) - exact_weight, stored_bias.to(wide) - exact_bias)
    effect = size(exact_weight - plain, exact_bias - (0 if bias is None else bias.to(wide)))
    scaled = (scale != 1) & (plain != 0).any(dim=1)
    unchanged = (stored_weight == weight.to(dtype)).all(dim=1)
    return stored_bias, Exactness(
        error=_ratio(rounding, size(exact_weight, exact_bias)),
        lost=_ratio(rounding, effect),
        vanished=_ratio((scaled & unchanged).sum().item(), scaled.sum().item()),
    )


def as_rows(weight: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """A layer's weight as (width, in); Conv1D stores it transposed. The same call turns it back."""
    return weight.T if isinstance(module, Conv1D) else weight


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
