"""The edit itself: two vectors per site, and the arithmetic `h' = scale * h + bias`, written once.

        h (..., width) ──── * scale (width,) ──── + unit * bias (width,) ────> h' (..., width)

Everything else in redpeft that applies an edit (the PEFT layer, mixed batches, folding) calls this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from redpeft.method.compose import Affine, weighted_sum

HALF = (torch.float16, torch.bfloat16)
DEEPSPEED = ("ds_id", "_hp_mapping")  # what DeepSpeed's ZeRO leaves on the parameters that it manages


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


class Edit(nn.Module):
    """One adapter's edit at one site: `scale` (width,), `bias` (width,) in units, `unit` (1,).

    A step of the bias is measured in `unit`, the typical size of the output that it is added to, so that one learning
    rate serves every model. The vectors are fp32 (fp64 on an fp64 base) whatever the base's dtype: near a scale of 1
    an Adam step of 1e-3 rounds away in bf16 (the released Llama-2 checkpoint has every scale at exactly 1.0).
    A vector that is not learned is a buffer, since PEFT sets `requires_grad` on every parameter of an active adapter.
    """

    scale: torch.Tensor
    bias: torch.Tensor
    unit: torch.Tensor

    def __init__(
        self,
        width: int,
        *,
        unit: float | str = "auto",
        use_scale: bool = True,
        use_bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        kind = {"dtype": dtype, "device": device}
        for name, vector, learned in (
            ("scale", torch.ones(width, **kind), use_scale),
            ("bias", torch.zeros(width, **kind), use_bias),
        ):
            if learned:
                self.register_parameter(name, nn.Parameter(vector))
            else:
                self.register_buffer(name, vector)
        self.register_buffer("unit", torch.full((1,), 1.0 if unit == "auto" else float(unit), **kind))
        self.strength = 1.0  # of a live edit (RedLayer.set_scale); neither learned nor saved
        self.auto_unit = unit == "auto" and use_bias
        self.unit_known = not self.auto_unit
        self._uncast: dict[str, torch.Tensor] | None = None
        self._remember()

    def reset(self, identity: bool = True) -> None:
        """Set the identity (scale 1, bias 0), or for tests random vectors far from it, of those that are learned."""
        with torch.no_grad():
            self.scale.fill_(1.0)
            self.bias.zero_()
            for vector in self.parameters() if not identity else ():
                vector.add_(torch.randn_like(vector))
        self._remember()

    @property
    def shift(self) -> torch.Tensor:
        """What is added to the output: `unit * bias` (width,), in the output's own size."""
        return self.unit * self.bias

    @property
    def acting(self) -> Affine:
        """Scale and bias (width,) as they act at this strength; the bias in the output's own size."""
        edit = (self.scale, self.shift)
        return edit if self.strength == 1.0 else weighted_sum([edit], [self.strength])

    @property
    def unit_pending(self) -> bool:
        """Whether the unit is still to be measured: an automatic unit of exactly 1, so that the state needs no second
        buffer. The tensor is asked until it is known, since transformers loads adapters by replacing tensors."""
        if not self.unit_known and not self.unit.is_meta:
            self.unit_known = bool(self.unit != 1.0)
        return not self.unit_known

    @property
    def trainable(self) -> bool:
        return self.scale.requires_grad or self.bias.requires_grad

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., width), in hidden's dtype."""
        if self.scale.dtype in HALF or self.bias.dtype in HALF:
            self._meet_cast()
        if self.training and self.trainable:
            self._uncast = None  # from here on the vectors learn
        return apply_edit(hidden, *self.acting)

    @torch.no_grad()
    def set_unit(self, unit: float | torch.Tensor) -> None:
        """Measure the bias in `unit` from now on; what is added to the output stays what it was.

        A bias that is not zero is expressed in the new unit. Where its values are one rank's view of a sharded
        parameter that would be lost, so `redpeft.calibrate` has to come before the wrapping: RuntimeError.
        """
        if bool(self.bias.any()):
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                raise RuntimeError(
                    "the unit of a bias that is not zero cannot be measured in a distributed run: "
                    "call redpeft.calibrate(model) before the model is wrapped"
                )
            self.bias.mul_(self.unit / unit)
        self.unit.copy_(torch.as_tensor(unit))
        self.unit_known = True

    # Precision: PEFT (`add_adapter`), `.to(bfloat16)`, TRL (trainable parameters of a 4-bit base) and DeepSpeed cast
    # adapters to the base's dtype. Module-wide casts are refused where they happen; casts of `.data` are undone when
    # training starts, as long as nothing was lost for good. FSDP and DeepSpeed keep the fp32 values to themselves and
    # lend the module a rounded copy: to put anything in its place would cut the edit off from its optimiser.

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Edit:
        def keep_precision(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in HALF and tensor.dtype not in HALF else moved

        return super()._apply(keep_precision, recurse)

    def train(self, mode: bool = True) -> Edit:
        super().train(mode)
        if mode and self.trainable:  # before DDP builds its buckets by dtype, as Trainer calls it
            self._undo_cast()
        return self

    def _vectors(self) -> dict[str, torch.Tensor]:
        return {"scale": self.scale, "bias": self.bias, "unit": self.unit}

    def _remember(self) -> None:
        """Keep what was set or loaded until training starts, to undo a cast in between without loss."""
        self._uncast = {name: tensor.detach().clone() for name, tensor in self._vectors().items()}

    def _undo_cast(self) -> None:
        if self._uncast is None or any(hasattr(self.scale, mark) for mark in DEEPSPEED):
            return
        for name, tensor in self._vectors().items():
            kept = self._uncast[name].to(tensor.device)
            if tensor.dtype in HALF and torch.equal(kept.to(tensor.dtype), tensor.data):
                tensor.data = kept.clone()

    def _meet_cast(self) -> None:
        """A forward pass with vectors of 16 bits."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._uncast = None  # a copy that is lent: what was ours to undo, `train` has undone before the wrapping
            return
        if not (self.training and self.trainable):
            return
        self._undo_cast()
        if self.scale.dtype in HALF or self.bias.dtype in HALF:
            raise RuntimeError(
                f"a RED edit was cast to {self.scale.dtype} after it had learned something, which rounds small edits "
                "away: cast the base model only, and load the adapter again"
            )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if any(f"{prefix}{name}" in state_dict for name in self._vectors()):
            self.unit_known = not self.auto_unit
            self._remember()
