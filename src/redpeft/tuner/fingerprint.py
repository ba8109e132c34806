"""Tell one base model from another of the same shape.

A base model and its chat version have equal module names and widths, so the wrong one would load silently. The
fingerprint holds a digest of the edited modules' names and shapes, and a few of their weights, rounded so that the
same checkpoint loaded in fp32, bf16 or fp16 agrees with itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

SAMPLES = 32
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# bf16 keeps 8 bits: rounding moves a weight by at most 2^-9 of itself; fp16 adds 2^-25 for the smallest ones.
RELATIVE, ABSOLUTE = 2.0**-8, 2.0**-24


def fingerprint(model: nn.Module, module_names: Iterable[str]) -> dict | None:
    """The fingerprint of the weights of the named modules: {"shapes": digest, "samples": [float, ...]}.

    None where it cannot be computed: quantised or sharded weights, or weights on the meta device.
    """
    return fingerprint_of({name: _weight(model.get_submodule(name)) for name in module_names})


@torch.no_grad()
def fingerprint_of(weights: Mapping[str, Any]) -> dict | None:
    """As `fingerprint`, of weights by their modules' names: those of a checkpoint, say."""
    names = sorted(weights)
    tensors = [weights[name] for name in names if _readable(weights[name])]
    if not tensors or len(tensors) < len(names):
        return None
    shapes = "\n".join(f"{name} {tuple(weight.shape)}" for name, weight in zip(names, tensors, strict=True))
    # Spread over the modules, and over each module's weights by steps that no power of two divides.
    picks = [tensors[(i * len(tensors)) // SAMPLES] for i in range(SAMPLES)]
    samples = [weight.flatten()[(i * 7919 + 13) % weight.numel()] for i, weight in enumerate(picks)]
    return {
        "shapes": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "samples": [float(f"{float(value):.4g}") for value in samples],
    }


def difference(saved: dict | None, found: dict | None) -> str | None:
    """What differs between two fingerprints, as the end of a sentence; None when they agree or one is unknown."""
    if not saved or not found:
        return None
    if saved["shapes"] != found["shapes"] or len(saved["samples"]) != len(found["samples"]):
        return "the edited modules have other names or shapes"
    apart = sum(
        abs(a - b) > RELATIVE * max(abs(a), abs(b)) + ABSOLUTE
        for a, b in zip(saved["samples"], found["samples"], strict=True)
    )
    if apart:
        return f"the weights differ ({apart} of {len(saved['samples'])} sampled values)"
    return None


def _weight(module: nn.Module) -> Any:
    """The weight that stands for a module: its own, or the largest of a mixture-of-experts block; None without any."""
    module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        return weight
    return max(module.parameters(), key=lambda parameter: parameter.numel(), default=None)


def _readable(weight: Any) -> bool:
    plain = type(weight) in (nn.Parameter, torch.Tensor)
    return plain and weight.dtype in FLOATS and not weight.is_meta and weight.numel() > 0
