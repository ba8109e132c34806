"""The methods of a recipe, with options that fit a tiny model."""

from __future__ import annotations

OPTIONS = {
    "adapter": {"bottleneck": 4},
    "adapter_ffn": {"bottleneck": 4},
    "adapter_drop": {"bottleneck": 4, "drop_layers": 1},
    "prompt": {"num_virtual_tokens": 4},
    "prefix": {"num_virtual_tokens": 4},
    "bitfit": {"add_biases": True},
    "top_layers": {"layers": 1},
}
