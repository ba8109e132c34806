"""Number formats and quantised weights."""

from __future__ import annotations

import importlib.util
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
from torch import nn

from redpeft.errors import UserError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# as from_pretrained and configurations call it
DTYPE_ARGUMENT = "dtype" if int(transformers.__version__.partition(".")[0]) >= 5 else "torch_dtype"


# --- number formats -------------------------------------------------------------------------------------------------

SLOW_BF16 = 5.0  # times as long as in fp32


def dtype_name(dtype: torch.dtype) -> str:
    """As torch calls it, without `torch.`."""
    return str(dtype).removeprefix("torch.")


def training_device() -> torch.device:
    """The kind of device that Trainer trains on."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(asked: str, dtype: str) -> str:
    """The number format to compute in: fp32, bf16 or fp16. `asked` is what the recipe asks for; `auto` takes the best
    that this machine has. `dtype` is the recipe's format of the base's weights.

    Raises `UserError` if the hardware does not have the format.
    """
    cuda = torch.cuda.is_available()
    has_bf16 = not cuda or torch.cuda.is_bf16_supported()
    if asked == "auto":
        return "bf16" if has_bf16 and (cuda or dtype == "bf16") else "fp32"
    if asked == "fp16" and not cuda:
        raise UserError("precision fp16 needs a GPU; choose fp32 or bf16")
    if asked == "bf16" and not has_bf16:
        raise UserError("this GPU has no bf16; choose precision fp32 or fp16")
    return asked


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context to compute in, given fp32, bf16 or fp16. A half-precision base needs it beside fp32 edits and
    heads."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def bf16_slowdown() -> float:
    """How many times longer than in fp32 this CPU takes to multiply small matrices in bf16: 30 and more if it has no
    instructions for bf16, about 1 if it has."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(64, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        times = []
        for _ in range(20):  # the fastest counts: on a busy machine many wait for other processes
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] / seconds[torch.float32]


# --- quantised weights ----------------------------------------------------------------------------------------------

QUANTISERS = {  # the package, and the extra that installs it
    "8bit": ("bitsandbytes", "bnb"),
    "4bit": ("bitsandbytes", "bnb"),
    "int8_weight_only": ("torchao", "torchao"),
}
PACKS = "support_avx512bf16_for_cpu"  # an attribute of bitsandbytes' Linear4bit: whether it may pack its weight


def require_quantiser(load_in: str) -> None:
    """Raises `UserError` if the package for this `load_in` is not installed."""
    package, extra = QUANTISERS[load_in]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"base.load_in {load_in} needs {package}: pip install redpeft[{extra}]")


def quantization_config(load_in: str, head: list[str], compute_dtype: torch.dtype) -> Any:
    """The configuration with which transformers quantises a base while loading it. The modules of the head stay as
    they are."""
    require_quantiser(load_in)
    if load_in == "int8_weight_only":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=head or None)
    return transformers.BitsAndBytesConfig(
        load_in_8bit=load_in == "8bit",
        load_in_4bit=load_in == "4bit",
        llm_int8_skip_modules=head or None,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
    )


def quantised_weights(model: nn.Module) -> set[str]:
    """Names of the weights that are not plain parameters."""
    return {name for name, weight in model.named_parameters() if type(weight) is not nn.Parameter}


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
