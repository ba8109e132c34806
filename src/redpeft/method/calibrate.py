"""Measure the units of the biases by one forward pass, before any training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from redpeft.errors import UserError
from redpeft.method.layer import RedLayer

ROWS, POSITIONS = 8, 64


def calibrate(model: nn.Module, batch: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Measure the unit of every bias of the active adapters that has none yet; return {site: unit} of all sites.

    `batch` holds the arguments of one forward pass. Without it random inputs are made: token ids, noise for images and
    audio, decoder inputs for encoder-decoders (their units lie within about 25 % of those of real text). Training does
    this by itself in its first forward pass; here it is done at a time and on data of your choice. A unit is never
    measured twice. Raises `UserError` where there is no edit, no way to guess inputs, or a site that the batch does
    not reach.
    """
    layers = {module.site: module for module in model.modules() if isinstance(module, RedLayer)}
    if not layers:
        raise UserError("the model has no RED adapter: nothing to calibrate")
    pending = {site: layer for site, layer in layers.items() if _pending(layer)}
    if pending:
        inputs = example_inputs(model) if batch is None else dict(batch)
        with _measuring(model, pending.values()), torch.no_grad():
            model(**inputs)
    missed = [site for site, layer in pending.items() if _pending(layer)]
    if missed:
        raise UserError(
            f"the batch does not reach {len(missed)} sites ({', '.join(missed[:3])}, ...): pass another batch"
        )
    return {site: float(edit.unit) for site, layer in layers.items() for edit in _active(layer)}


def _active(layer: RedLayer) -> list:
    return [layer.redpeft_edit[name] for name in layer.active_adapters if name in layer.redpeft_edit]


def _pending(layer: RedLayer) -> bool:
    return any(edit.unit_pending for edit in _active(layer))


@contextmanager
def _measuring(model: nn.Module, layers: Any) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    layers = list(layers)
    try:
        model.eval()  # no dropout
        for layer in layers:
            layer.measuring = True
        yield
    finally:
        for layer in layers:
            layer.measuring = False
        for module, mode in modes.items():
            module.training = mode


def example_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Random inputs for a transformers model, from its `main_input_name` and configuration."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    device = next(base.parameters()).device
    name = base.main_input_name
    inputs = {name: _noise(name, config).to(device)}
    if getattr(config, "is_encoder_decoder", False):
        tokens = _noise("input_ids", config)[: len(inputs[name])].to(device)
        inputs["decoder_input_ids"] = tokens
    return inputs


def _noise(name: str, config: Any) -> torch.Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    generator = torch.Generator().manual_seed(0)
    if name == "input_ids":
        positions = min(POSITIONS, getattr(text, "max_position_embeddings", None) or POSITIONS)
        positions = max(1, positions - 2)  # RoBERTa-like models keep two positions for padding
        return torch.randint(0, text.vocab_size, (ROWS, positions), generator=generator)
    if name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return torch.randn(ROWS, getattr(config, "num_channels", 3), height, width, generator=generator)
    if name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        return torch.randn(2, getattr(config, "num_mel_bins", 80), frames, generator=generator)
    if name == "input_values":
        return torch.randn(2, 16000, generator=generator)
    raise UserError(
        f"cannot make random inputs for a model that takes {name}: pass a batch to calibrate(model, batch)"
    )
