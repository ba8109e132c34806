"""How exact a folded layer is. The arithmetic is exact; what it is stored in rounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from redpeft.adapters.files import EffectiveEdit
from redpeft.errors import UserError
from redpeft.tuner.edit import fold_edit

WARN_ABOVE = 0.1  # of the edit's effect lost, or of the scale's entries vanished


@dataclass(frozen=True)
class Exactness:
    """What rounding did to one site, all as shares of 1.

    `error` is the size of the rounding over the size of the edited output, for inputs of independent normal components
    at which the output is of the adapter's unit. `lost` is the same over the size of the edit's effect, so 1 means
    that the edit might as well not be there. `vanished` counts the entries of the scale that are not 1 and changed
    nothing: in bf16 those within 2^-9 of 1.
    """

    error: float
    lost: float
    vanished: float

    @property
    def is_poor(self) -> bool:
        return max(self.lost, self.vanished) > WARN_ABOVE


def fold_layer(
    site: str, weight: torch.Tensor, bias: torch.Tensor | None, edit: EffectiveEdit, unit: float, dtype: torch.dtype
) -> tuple[torch.Tensor, Exactness]:
    """The bias of a linear layer of weight (width, in) with an edit folded into it, and how exact the whole layer is.

    The arithmetic is fp32 (fp64 on fp64 weights), rounded once to `dtype`. `unit` is the adapter's at this site, 1
    where it has none. Raises `UserError` for a result beyond the range of `dtype`.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    edit = EffectiveEdit(edit.scale.to(wide), edit.bias.to(wide))
    exact_weight, exact_bias = fold_edit(weight, bias, *edit)
    stored = exact_weight.to(dtype), exact_bias.to(dtype)
    if not all(tensor.isfinite().all() for tensor in stored):
        largest = max(exact_weight.abs().max().item(), exact_bias.abs().max().item())
        raise UserError(
            f"{site}: the folded layer has values up to {largest:.3g}, and {dtype} ends at "
            f"{torch.finfo(dtype).max:.3g}; fold to bf16 or fp32"
        )
    plain = weight.to(wide)
    spread = 1.0 if unit == 1 else unit / plain.norm(dim=1).median().clamp_min(torch.finfo(wide).tiny).item()

    def size(weights: torch.Tensor, biases: torch.Tensor) -> float:
        return ((spread * weights.norm()) ** 2 + biases.norm() ** 2).sqrt().item()

    rounding = size(stored[0].to(wide) - exact_weight, stored[1].to(wide) - exact_bias)
    effect = size(exact_weight - plain, exact_bias - (0 if bias is None else bias.to(wide)))
    meant = (edit.scale != 1) & (plain != 0).any(dim=1)
    nothing = (stored[0] == weight.to(dtype)).all(dim=1)
    exactness = Exactness(
        error=_ratio(rounding, size(exact_weight, exact_bias)),
        lost=_ratio(rounding, effect),
        vanished=_ratio((meant & nothing).sum().item(), meant.sum().item()),
    )
    return stored[1], exactness


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
