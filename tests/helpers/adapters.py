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


def write_run(run, tensors=None, score=0.9, seed=0, **config):
    """A finished run folder around such an adapter, as training leaves it."""
    folder = write_folder(run / "adapter", random_tensors(seed=seed) if tensors is None else tensors, **config)
    (folder / "README.md").write_text(f"# The card of {run.name}\n")
    (folder / "tokenizer.json").write_text("{" + 5000 * " " + "}")
    (run / "recipe.yaml").write_text(
        f"base:\n  model: some/encoder\ntask: classification\nmethod: red\nseed: {seed}\n"
    )
    (run / "task.json").write_text('{"task": "classification"}\n')
    scores = {"validation": {"accuracy": score, "loss": 0.1}, "test": {"accuracy": score / 2}}
    result = {"task": "classification", "base": "some/encoder", "method": "red", "metric": "accuracy", **scores}
    (run / "result.json").write_text(json.dumps(result))
    return run


def tree(folder):
    """Every file below a folder: {path: content}."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
