"""Models that compute the same function as Llama and can be written as Llama, whose configuration can add biases.

These families were found by reading their source, and tests compare their logits. A few switches are not enough to
decide: SmolLM3 leaves the rotary embedding out of every fourth layer, Granite has multipliers, Ernie rotates
neighbours. So the whole configuration is compared: a field that Llama does not have and that is not listed here with a
harmless value means no.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from redpeft.errors import UserError

Harmless = Callable[[Any, PretrainedConfig], bool]


def _anything(value: Any, config: PretrainedConfig) -> bool:
    return True


def _off(value: Any, config: PretrainedConfig) -> bool:
    return not value


def _all_full(value: Any, config: PretrainedConfig) -> bool:
    return not value or set(value) == {"full_attention"}


def _no_window(value: Any, config: PretrainedConfig) -> bool:
    """No window, or one that is at least as long as any sequence."""
    return value is None or value >= config.max_position_embeddings


# Fields that Llama does not have, and when they have no effect. Biases that Llama's switch adds to theirs are zero.
FAMILIES: dict[str, dict[str, Harmless]] = {
    "mistral": {"sliding_window": _no_window},
    "qwen2": {
        "use_sliding_window": _off,
        "sliding_window": _anything,  # has no effect without use_sliding_window
        "max_window_layers": _anything,
        "layer_types": _all_full,
    },
    "seed_oss": {"attention_out_bias": _anything, "residual_dropout": _anything},
    "internlm3": {},
    "iquestcoder": {},
}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
ROPE_FIELDS = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "truncate"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "short_factor", "long_factor"),
    *("low_freq_factor", "high_freq_factor"),
}
CLASSES = {
    name: f"Llama{name}"
    for name in ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
}


def as_llama(config: PretrainedConfig, architecture: str) -> tuple[str, LlamaConfig]:
    """The Llama class and configuration that compute what `architecture` with `config` computes, tensor by tensor.

    Raises `UserError` that names a field not known to be the same.
    """
    why_not = _difference(config)
    kind = next((kind for kind in CLASSES if architecture.endswith(kind)), None)
    if why_not or kind is None:
        raise UserError(f"{architecture} is not known to be Llama by another name: {why_not or 'its head is another'}")
    own, known = config.to_dict(), LlamaConfig().to_dict().keys()
    fields = {name: value for name, value in own.items() if name in known - {"model_type", "architectures"}}
    # Qwen2 has biases on query, key and value always, and says so nowhere.
    biases = config.model_type == "qwen2" or own.get("attention_bias") or own.get("attention_out_bias")
    return CLASSES[kind], LlamaConfig(**fields | {"attention_bias": bool(biases), "architectures": [CLASSES[kind]]})


def _difference(config: PretrainedConfig) -> str | None:
    if config.model_type not in FAMILIES:
        return f"model type {config.model_type} (known: {', '.join(FAMILIES)})"
    harmless, known = FAMILIES[config.model_type], LlamaConfig().to_dict().keys()
    for name, value in config.to_dict().items():
        if name not in known and not (name in harmless and harmless[name](value, config)):
            return f"{name} = {value!r}"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    odd = sorted(rope.keys() - ROPE_FIELDS) or [rope.get("rope_type", rope.get("type", "default"))]
    return f"rotary embedding: {odd[0]}" if odd[0] not in ROPE_TYPES else None
