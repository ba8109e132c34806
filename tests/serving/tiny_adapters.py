"""Adapters of a tiny Llama, written by hand and far from the identity."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, WIDTH, TOKENS = 3, 128, 12
SITES = [f"model.layers.{layer}.mlp.down_proj" for layer in range(LAYERS)]


def edits(seed: int, sites: list[str] = SITES, width: int = WIDTH, spread: float = 3.0) -> dict[str, torch.Tensor]:
    """Scales around 1 by `spread`, many of them negative, and from -64 to 74 at some channels; a unit other than 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in sites:
        scale = 1 + spread * torch.randn(width, generator=generator)
        scale[:4] = torch.tensor([-64.0, 74.0, -1.0, 0.0])
        tensors[f"base_model.model.{site}.redpeft_edit.scale"] = scale
        tensors[f"base_model.model.{site}.redpeft_edit.bias"] = 4 * torch.randn(width, generator=generator)
        tensors[f"base_model.model.{site}.redpeft_edit.unit"] = torch.tensor([0.25])
    return tensors


def adapter(folder: Path, seed: int, sites: list[str] = SITES, width: int = WIDTH, **config) -> Path:
    """An adapter folder as training leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "REDPEFT", "task_type": "CAUSAL_LM", "target_modules": sites, "resolved": True, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(edits(seed, sites, width), folder / "adapter_model.safetensors")
    return folder
