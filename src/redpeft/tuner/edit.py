"""The edit itself: two vectors per site, and the arithmetic `h' = scale * h + bias`, written once.

        h (..., width) ──── * (origin + scale_offset) ──── + unit * bias ────> h' (..., width)

Everything else in redpeft that applies an edit (the PEFT layer, mixed batches, fleets, folding) calls this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from redpeft.errors import UserError
from redpeft.tuner.compose import Difference

Affine = tuple[torch.Tensor, torch.Tensor]  # scale and bias (width,), the bias in the output's own size
HALF = (torch.float16, torch.bfloat16)
# What the scale is counted from, by the name under which it is learned and stored. Adding -0.0 changes no bit.
ORIGINS = {"scale_offset": 1.0, "scale": -0.0}


def apply_edit(hidden: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Edit a representation: `h' = scale * h + bias` (paper, section 3.2).

    Shapes: hidden (..., width); scale and bias (width,), or anything that broadcasts against hidden, in fp32 (fp64).
    The arithmetic is that of the wider dtype and the result has hidden's: for a bf16 base the products are fp32 while
    autograd keeps hidden as it is, one activation in the base's dtype.
    """
    return (hidden * scale + bias).to(hidden.dtype)


def fold_edit(
    weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, edit_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold an edit into the linear layer before it: `W' = scale * W` by rows, `b' = scale * b + bias`.

    Shapes: weight (width, in), bias (width,) or None for a layer without one, scale and edit_bias (width,).
    Returned in the dtype of scale (fp32 or fp64): rounding to the layer's dtype is the caller's last step.
    """
    folded = weight.to(scale.dtype) * scale[:, None]
    return folded, edit_bias if bias is None else bias.to(scale.dtype) * scale + edit_bias


def effective_edit(
    offset: torch.Tensor, bias: torch.Tensor, unit: torch.Tensor, origin: float | torch.Tensor
) -> Affine:
    """The scale and the bias that act, from what is learned: `origin + offset` and `unit * bias`, at least in fp32.

    Shapes: offset and bias (..., width), unit and origin anything that broadcasts against them.
    """
    wide = torch.promote_types(offset.dtype, torch.float32)
    return offset.to(wide) + origin, unit * bias.to(wide)


def name_of_scale(origin: float) -> str:
    """The name under which a scale that is counted from `origin` is learned and stored."""
    return next(name for name, value in ORIGINS.items() if value == origin)


class Edit(nn.Module):
    """One adapter's edit at one site, learned as `scale_offset` (width,), `bias` (width,) and with a `unit` (1,).

    The scale is `origin + scale_offset`, so that weight decay leads to the identity and small changes survive 16 bits.
    With an origin of 0 the vector is the scale itself, and is called `scale`: the paper's rule, released checkpoints,
    and files of version 1. A step of the bias is measured in `unit`, the typical size of the output that it is added
    to, so that one learning rate serves every model; "auto" is 1 until it is measured. The vectors are fp32 (fp64 on
    an fp64 base) whatever the base's dtype. A vector that is not learned is a buffer, since PEFT sets `requires_grad`
    on every parameter of an active adapter.

    Attributes:
        strength: (1,), how strongly the edit acts; None stands for 1. Neither learned nor saved.
        training_origin: what the scale is counted from in training: `express` changes to it. Not the origin at first
            for imported adapters, whose scales are stored bit for bit.
    """

    bias: torch.Tensor
    unit: torch.Tensor
    strength: torch.Tensor | None

    def __init__(
        self,
        width: int,
        *,
        unit: float | str = "auto",
        origin: float = 1.0,
        use_scale: bool = True,
        use_bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        kind = {"dtype": dtype, "device": device}
        self.scale_name = name_of_scale(origin)
        self.training_origin = origin
        for name, vector, learned in (
            (self.scale_name, torch.full((width,), 1.0 - origin, **kind), use_scale),
            ("bias", torch.zeros(width, **kind), use_bias),
        ):
            if learned:
                self.register_parameter(name, nn.Parameter(vector))
            else:
                self.register_buffer(name, vector)
        self.register_buffer("unit", torch.full((1,), 1.0 if unit == "auto" else float(unit), **kind))
        self.register_buffer("strength", None, persistent=False)  # a number would be compiled anew for each value
        self.auto_unit = unit == "auto" and use_bias
        self.unit_known = not self.auto_unit

    @property
    def origin(self) -> float:
        return ORIGINS[self.scale_name]

    @property
    def offset(self) -> torch.Tensor:
        """What is learned of the scale, (width,): `scale_offset`, or `scale`."""
        return getattr(self, self.scale_name)

    @property
    def effective(self) -> Affine:
        """Scale and bias (width,) as they act at this strength."""
        if self.strength is None:
            return effective_edit(self.offset, self.bias, self.unit, self.origin)
        d, bias = self.difference
        return 1 + d, bias

    @property
    def difference(self) -> Difference:
        """What differs from the identity at this strength: `scale - 1` and the bias."""
        d, bias = effective_edit(self.offset, self.bias, self.unit, self.origin - 1)
        return (d, bias) if self.strength is None else (self.strength * d, self.strength * bias)

    @property
    def trainable(self) -> bool:
        return self.offset.requires_grad or self.bias.requires_grad

    @property
    def unit_pending(self) -> bool:
        """Whether the unit is still to be measured: an automatic one is 1 until then, and never 1 afterwards.

        The tensor is asked until the unit is known: values that are loaded into an edit, also by transformers, which
        replaces tensors, bring the unit that they were learned in.
        """
        if not self.unit_known and not self.unit.is_meta:
            self.unit_known = bool(self.unit != 1.0)
        return not self.unit_known

    @property
    def express_pending(self) -> bool:
        """Whether training has to begin with `express`."""
        return self.unit_pending or self.origin != self.training_origin

    def forward(self, hidden: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        """(..., width) -> (..., width), in hidden's dtype. `with_bias`: False for one of two parts of a sum."""
        scale, bias = self.effective
        return apply_edit(hidden, scale, bias if with_bias else torch.zeros_like(bias))

    @torch.no_grad()
    def randomize(self) -> None:
        """Move what is learned far from where it is, for tests."""
        for vector in self.parameters():
            vector.add_(torch.randn_like(vector))

    def set_strength(self, strength: float) -> None:
        """How strongly the edit acts from now on: 0 is the identity, 1 the edit as it was learned."""
        self.strength = None if strength == 1 else torch.full_like(self.unit, strength)

    @torch.no_grad()
    def express(self, unit: float) -> None:
        """Count the bias in `unit`, and the scale from `training_origin`, from now on; the edit stays what it was.

        The bias changes by rounding alone, a scale by at most 2^-24 * max(1, |scale - 1|). Raises `UserError` for
        another origin of vectors that FSDP or DeepSpeed manage: these go by name.
        """
        if self.auto_unit and unit == 1.0:
            unit = 1.0 + 2.0**-23  # 1 stands for a unit that was not measured
        self.bias.mul_(float(self.unit) / unit)
        self.unit.fill_(unit)
        self.unit_known = True
        if self.origin == self.training_origin:
            return
        if _is_managed(self.offset):
            raise UserError(
                "an imported adapter cannot start to train in a model that is sharded already: call "
                "redpeft.calibrate(model) before the model is wrapped"
            )
        self.offset.add_(self.origin - self.training_origin)
        self._rename_scale(self.training_origin)

    def _rename_scale(self, origin: float) -> None:
        """Rename the scale's vector for another origin, in the same position: optimisers go by the order."""
        old, new = self.scale_name, name_of_scale(origin)
        vectors = self._parameters if old in self._parameters else self._buffers
        renamed = {new if name == old else name: vector for name, vector in vectors.items()}
        vectors.clear()
        vectors.update(renamed)
        self.scale_name = new

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Convert values whose scale is counted from another origin than this edit's. If that is `training_origin`,
        they come from later training: then this edit changes its own origin instead."""
        own, given = self.scale_name, next((name for name in ORIGINS if prefix + name in state_dict), None)
        if given is not None and given != own:
            if ORIGINS[given] == self.training_origin:
                self._rename_scale(self.training_origin)
            else:
                state_dict[prefix + own] = state_dict.pop(prefix + given) + (ORIGINS[given] - self.origin)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.unit_known = not self.auto_unit  # the tensor is asked again

    # Precision: PEFT (`add_adapter`), `.to(bfloat16)`, TRL (trainable parameters of a quantised base) and DeepSpeed
    # cast adapters to the base's dtype. Module-wide casts are refused where they happen; vectors whose `.data` were
    # cast are fp32 again when training starts. FSDP and DeepSpeed keep fp32 values to themselves and lend the module a
    # rounded copy: to put anything in its place would cut the edit off from its optimiser.

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Edit:
        def keep_precision(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in HALF and tensor.dtype not in HALF else moved

        return super()._apply(keep_precision, recurse)

    def train(self, mode: bool = True) -> Edit:
        super().train(mode)
        if mode and self.trainable and not _is_managed(self.offset):  # before DDP builds its buckets by dtype
            for vector in (*self.parameters(), *self.buffers()):
                if vector.dtype in HALF:
                    vector.data = vector.data.float()
        return self


def _is_managed(parameter: torch.Tensor) -> bool:
    """Whether FSDP (1 by a mark, 2 by a DTensor) or DeepSpeed's ZeRO hold a parameter's values."""
    marks = ("_fsdp_flattened", "placements", "ds_id", "_hp_mapping")
    return any(hasattr(parameter, mark) for mark in marks)
