"""What a quantised base needs before an edit is trained on it.

The edit itself needs nothing: it touches a layer's output, whatever computes it. This is about the layers below.
"""

from __future__ import annotations

from torch import nn

from redpeft.errors import UserError

PACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' Linear4bit: whether it may pack its weight


def leave_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights on a CPU, so that gradients pass through them.

    With AVX512-BF16 a `Linear4bit` packs its weight in the first evaluation and leaves it so. Packed, it computes by a
    faster kernel in bf16 that has no backward pass: in the training after an evaluation every gradient from above
    stops there, with no more than a warning, and `state_dict` unpacks the weight with its block sizes rounded or lost
    (bitsandbytes 0.50). Raises `UserError` for a model whose weights are packed already; nothing is changed then.
    """
    linears = {name: module for name, module in model.named_modules() if hasattr(module, PACKS)}
    for name, module in linears.items():
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise UserError(
                f"the 4-bit weights of this model are packed for inference (at {name}: bitsandbytes does so in the "
                "first evaluation on this CPU) and pass no gradients: load the base model again and add the adapter "
                "before the model is used"
            )
    for module in linears.values():
        setattr(module, PACKS, False)
