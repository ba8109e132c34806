"""Baselines that PEFT does not have: bottleneck adapters, BitFit, the top layers, full fine-tuning, the head alone.

Each takes the model and its options, changes the model, and returns the names of the parameters to train beside the
head.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from redpeft import Site, find_sites
from redpeft.errors import UserError
from redpeft.tuner.sites import find_blocks

# --- parts of the base model's own weights -------------------------------------------------------------------------


@dataclass(frozen=True)
class NoOptions:
    """For methods without options."""


@dataclass(frozen=True)
class BitFitOptions:
    """BitFit (Ben Zaken et al. 2022, arXiv 2106.10199)."""

    add_biases: bool = False  # give the linear layers and norms that have no bias one of zeros


@dataclass(frozen=True)
class TopLayersOptions:
    """Fine-tuning of the top blocks; two in the papers that compare with it (Li and Liang 2021, LoRA)."""

    layers: int = Field(default=2, ge=1)


def everything(model: PreTrainedModel, options: NoOptions) -> set[str]:
    """Names of all parameters."""
    return {name for name, _ in model.named_parameters()}


def nothing(model: PreTrainedModel, options: NoOptions) -> set[str]:
    """No names: only the head is trained."""
    return set()


def biases(model: PreTrainedModel, options: BitFitOptions) -> set[str]:
    """Names of all biases. Raises `UserError` if there are none."""
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
    """Add a bias of zeros to each linear layer and norm without one, as in the comparison of Compacter on T5 (Karimi
    Mahabadi et al. 2021, arXiv 2106.04647). For a class that has no bias, a hook adds it to the output."""
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


# --- bottleneck adapters ---------------------------------------------------------------------------------------------
#
# Houlsby et al. 2019, arXiv 1902.00751: a small network behind attention and FFN of each block.
#
#     base module ── h ──┬──────────────────────────────────┐
#                        └─> down: d -> m ─> f ─> up: m -> d ─ + ──> h'
#
# They stand where RED's edits do, at the output of the linear that leads back to the model's width, before the
# residual sum and its norm. One set of options covers the papers' variants; `METHODS` has what each of them chooses.

NAME = "bottleneck"  # the adapter's name within the module that it follows
INITIAL_STD = 1e-3  # of the released code (google-research/adapter-bert): the adapter begins close to the identity
REDUCTION = 16  # Houlsby's 64 of BERT-large's 1024, and Pfeiffer et al. (2021, arXiv 2005.00247)


@dataclass(frozen=True)
class BottleneckOptions:
    """The method_options of the bottleneck adapters."""

    sites: tuple[Literal["attention", "ffn"], ...] = Field(default=("attention", "ffn"), min_length=1)
    bottleneck: int | None = Field(default=None, ge=1)  # m; a sixteenth of the width when not given
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    layer_norms: bool = False  # train the model's norms too, as Houlsby et al. do
    drop_layers: int = Field(default=0, ge=0)  # so many of the lowest blocks of each stack get no adapter


class Bottleneck(nn.Module):
    """`h' = h + up(f(down(h)))`, of shape (..., width) -> (..., width), in fp32 whatever `h` is.

    Weights are drawn from a normal distribution cut at two standard deviations, biases are zero.
    """

    def __init__(self, width: int, bottleneck: int, activation: str, device: torch.device | None = None) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck, device=device, dtype=torch.float32)
        self.activation = ACT2FN[activation]
        self.up = nn.Linear(bottleneck, width, device=device, dtype=torch.float32)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=INITIAL_STD, a=-2 * INITIAL_STD, b=2 * INITIAL_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        change = self.up(self.activation(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + change.to(hidden.dtype)


def add_bottlenecks(model: PreTrainedModel, options: BottleneckOptions) -> set[str]:
    """Add an adapter after each site of `model` and return the names of the parameters to train.

    An adapter is a child of the module that it follows (`...output.dense.bottleneck.down.weight`) and is called by a
    hook. So the base model keeps its own names and finds its modules unchanged.
    """
    sites = [site for site in find_sites(model, options.sites) if site.layer >= options.drop_layers]
    if not sites:
        raise UserError(
            f"method_options: drop_layers {options.drop_layers} leaves no block of {type(model).__name__} with an "
            "adapter: choose a smaller number"
        )
    for site in sites:
        module = model.get_submodule(site.name)
        device = next(module.parameters()).device
        size = options.bottleneck or max(1, site.width // REDUCTION)
        module.add_module(NAME, Bottleneck(site.width, size, options.activation, device))
        module.register_forward_hook(_adapt)
    inside = tuple(f"{site.name}.{NAME}." for site in sites)
    names = {name for name, _ in model.named_parameters() if name.startswith(inside)}
    return names | _norms(model, sites, options) if options.layer_norms else names


def _adapt(module: nn.Module, _: Any, output: Any) -> Any:
    """The hook. Some mixture-of-experts blocks return a tuple whose first entry is the output."""
    adapter = module.get_submodule(NAME)
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


def _norms(model: PreTrainedModel, sites: list[Site], options: BottleneckOptions) -> set[str]:
    """All norms. If lower blocks are left out, those of the other blocks alone: nothing below them is trained."""
    norms = norm_parameters(model)
    if not options.drop_layers:
        return norms
    blocks = [f"{block}." for stack in find_blocks(model).values() for block in stack]
    kept = tuple(block for block in blocks if any(site.name.startswith(block) for site in sites))
    return {name for name in norms if name.startswith(kept)}
