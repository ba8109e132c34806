"""Adapter folders written by hand: what a reader meets, without the writer that it belongs to."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

WIDTH = 32
SITES = [f"encoder.layer.{index}.output.dense" for index in range(2)]


def random_tensors(sites=SITES, width=WIDTH, seed=0, unit=0.25):
    """Scales and biases far from the identity, negative and large ones among them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in sites:
        tensors[f"base_model.model.{site}.redpeft_edit.scale"] = 3 * torch.randn(width, generator=generator)
        tensors[f"base_model.model.{site}.redpeft_edit.bias"] = 20 * torch.randn(width, generator=generator)
        tensors[f"base_model.model.{site}.redpeft_edit.unit"] = torch.tensor([unit])
    return tensors


def write_folder(folder, tensors, targets=SITES, **config):
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "peft_type": "REDPEFT",
        "base_model_name_or_path": "some/encoder",
        "revision": "abc123",
        "sites": "ffn",
        "target_modules": targets,
        "resolved": True,
        "base_fingerprint": None,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
