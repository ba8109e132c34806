"""Baselines that train a part of the base model's own weights: its biases, its top blocks, all of them, none."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn
from transformers import PreTrainedModel

from redpeft.errors import UserError
from redpeft.tuner.sites import find_blocks


@dataclass(frozen=True)
class NoOptions:
    """Of methods with nothing to choose."""


@dataclass(frozen=True)
class BitFitOptions:
    """BitFit (Ben Zaken et al. 2022, arXiv 2106.10199)."""

    add_biases: bool = False  # give the linear layers and norms that have no bias one of zeros


@dataclass(frozen=True)
class TopLayersOptions:
    """Fine-tuning of the uppermost blocks, two in the papers that compare with it (Li and Liang 2021, LoRA)."""

    layers: int = Field(default=2, ge=1)


def everything(model: PreTrainedModel, options: NoOptions) -> set[str]:
    """Names of all parameters."""
    return {name for name, _ in model.named_parameters()}


def nothing(model: PreTrainedModel, options: NoOptions) -> set[str]:
    """No names: the head alone is trained."""
    return set()


def biases(model: PreTrainedModel, options: BitFitOptions) -> set[str]:
    """Names of all biases. Raises `UserError` where there is none."""
    if options.add_biases:
        _add_biases(model)
    names = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    if not names:
        raise UserError(
            f"method bitfit trains biases, and {type(model).__name__} has none: set method_options.add_biases=true to "
            "give it biases of zero"
        )
    return names


def top_layers(model: PreTrainedModel, options: TopLayersOptions) -> set[str]:
    """Names of the parameters of the last blocks of each stack (of encoder and decoder, where there are both)."""
    stacks = find_blocks(model)
    if few := [name for name, blocks in stacks.items() if len(blocks) < options.layers]:
        raise UserError(
            f"method_options: layers {options.layers} is more than {few[0]} has, {len(stacks[few[0]])}: choose a "
            "smaller number, or method full"
        )
    top = tuple(f"{block}." for blocks in stacks.values() for block in blocks[-options.layers :])
    return {name for name, _ in model.named_parameters() if name.startswith(top)}


def norm_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of all norms (LayerNorm, RMSNorm, ...)."""
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if _is_norm(module)
        for key, _ in module.named_parameters(recurse=False)
    }


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.lower().endswith("norm")


def _add_biases(model: PreTrainedModel) -> None:
    """A bias of zeros for each linear layer and norm that has none, as the comparison in Compacter (Karimi Mahabadi et
    al. 2021, arXiv 2106.04647) gave to T5. A class that knows no bias has it added by a hook."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not (isinstance(module, nn.Linear) or _is_norm(module)) or weight is None:
            continue
        if getattr(module, "bias", None) is None:
            if not hasattr(module, "bias"):
                module.register_forward_hook(_add_bias)
            module.register_parameter("bias", nn.Parameter(weight.new_zeros(weight.shape[:1])))


def _add_bias(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
    return output + module.bias.to(output.dtype)
