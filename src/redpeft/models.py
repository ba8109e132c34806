"""What redpeft knows of base models: names when they are compiled, example inputs, biases, fingerprints, packing."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from redpeft.errors import UserError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# --- compiled models -------------------------------------------------------------------------------------------------
#
# `torch.compile(module)` wraps the module, and all names in it get `_orig_mod.` in front: an adapter with such names
# would fit compiled models only. `module.compile()` compiles the same module in place and leaves its names alone.

WRAPPED = "_orig_mod"  # torch's name of what a compiled module wraps


def plain_name(name: str) -> str:
    """A name as in the model that is not compiled, of a module or of a tensor."""
    return ".".join(part for part in name.split(".") if part != WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` has wrapped, or this one."""
    while WRAPPED in module._modules:
        module = module._modules[WRAPPED]  # type: ignore[assignment]
    return module


def compile_in_place(model: nn.Module) -> nn.Module:
    """The model with every wrapper of `torch.compile` taken off, and the modules within compiled in place in the same
    way. It computes what it did before; the model that is returned is that within its own wrapper."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if WRAPPED in child._modules and name != WRAPPED:
                setattr(parent, name, _in_place(child))
    return _in_place(model)


def _in_place(module: nn.Module) -> nn.Module:
    inner = unwrapped(module)
    if inner is not module:
        inner._compiled_call_impl = module.dynamo_ctx(inner._call_impl)  # what `inner.compile(...)` sets
    return inner


# --- example inputs --------------------------------------------------------------------------------------------------

ROWS, POSITIONS = 8, 64  # of random tokens


def example_inputs(model: nn.Module, device: torch.device | None = None) -> dict[str, Any]:
    """Random inputs for a transformers model, the same at every call, from its `main_input_name` and configuration.

    Token ids (8, 64), noise for images and audio, and decoder ids for an encoder-decoder. Raises `UserError` for a
    model that takes anything else.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if config is None or name is None:
        raise UserError("it is no model of transformers")
    inputs: dict[str, Any] = {name: _random_input(name, config)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _random_input("input_ids", config)[: len(inputs[name])]
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _random_input(name: str, config: Any) -> torch.Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    generator = torch.Generator().manual_seed(0)
    if name == "input_ids":
        positions = min(POSITIONS, getattr(text, "max_position_embeddings", None) or POSITIONS)
        positions = max(1, positions - 2)  # RoBERTa-like models keep two positions for padding
        ids = torch.randint(0, text.vocab_size, (ROWS, positions), generator=generator)
        special = torch.tensor(sorted(_special_tokens(config) | _special_tokens(text)))
        plain = next((token for token in range(text.vocab_size) if token not in special), 0)
        return ids.masked_fill(torch.isin(ids, special), plain)
    if name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return torch.randn(ROWS, getattr(config, "num_channels", 3), height, width, generator=generator)
    if name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        return torch.randn(2, getattr(config, "num_mel_bins", 80), frames, generator=generator)
    if name == "input_values":
        return torch.randn(2, 16000, generator=generator)
    raise UserError(f"it takes {name}")


def _special_tokens(config: Any) -> set[int]:
    """Padding, ends of texts, and the tokens that stand for images, which a model counts."""
    values = [value for key, value in vars(config).items() if key.endswith(("_token_id", "_token_index"))]
    tokens = [token for value in values for token in (value if isinstance(value, list) else [value])]
    return {token for token in tokens if isinstance(token, int)}


# --- biases ----------------------------------------------------------------------------------------------------------
#
# Where a stock model has a place for the bias of a merged edit: a switch of its configuration, such as `mlp_bias`.


def add_biases(model: PreTrainedModel, sites: Sequence[str]) -> bool:
    """Let the class of a merged model, whose layers at `sites` have got a bias, load it: switches of its configuration
    are set, and the biases that these add elsewhere are zeros. False where there are no such switches."""
    with torch.device("meta"):
        found = switch_on_biases(type(model)._from_config(copy.deepcopy(model.config)), sites)
    if found is None:
        return False
    changed, switches = found
    for name, value in switches.items():
        setattr(model.config.get_text_config(), name, value)
    for key in changed.state_dict().keys() - model.state_dict().keys():
        layer = model.get_submodule(key.rpartition(".")[0])
        zeros = layer.weight.new_zeros(changed.get_parameter(key).shape)
        layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)
    return True


def switch_on_biases(model: PreTrainedModel, sites: Sequence[str]) -> tuple[PreTrainedModel, dict[str, bool]] | None:
    """The fewest switches of the configuration that give all these sites a bias and change nothing else: the model
    with them, on the meta device, and the switches. None where there are none. `model` needs no weights."""
    text = model.config.get_text_config()
    switches = [name for name, value in text.to_dict().items() if value is False and "bias" in name]
    for count in range(1, len(switches) + 1):
        for chosen in combinations(switches, count):
            config = copy.deepcopy(model.config)
            for name in chosen:
                setattr(config.get_text_config(), name, True)
            try:
                with torch.device("meta"):
                    changed = type(model)._from_config(type(config).from_dict(config.to_dict()))
            except Exception:  # some configurations refuse some combinations, each in its own way
                continue
            if _only_adds_biases(model, changed) and all(changed.get_submodule(s).bias is not None for s in sites):
                return changed, dict.fromkeys(chosen, True)
    return None


def _only_adds_biases(model: PreTrainedModel, changed: PreTrainedModel) -> bool:
    before, after = ({key: tensor.shape for key, tensor in m.state_dict().items()} for m in (model, changed))
    added = after.keys() - before.keys()
    kinds = [changed.get_submodule(key.rpartition(".")[0]) for key in added]
    return (
        all(before[key] == after.get(key) for key in before)
        and all(key.endswith(".bias") for key in added)
        and all(isinstance(module, (nn.Linear, Conv1D)) for module in kinds)
    )


# --- fingerprints ----------------------------------------------------------------------------------------------------
#
# A base model and its chat version have equal module names and widths, so the wrong one would load silently. The
# fingerprint holds a digest of the edited modules' names and shapes, and a few of their weights, rounded so that the
# same checkpoint loaded in fp32, bf16 or fp16 agrees with itself.

SAMPLES = 32
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


def fingerprint_difference(saved: dict | None, found: dict | None) -> str | None:
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


# --- packed 4-bit weights --------------------------------------------------------------------------------------------

PACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' Linear4bit: whether it may pack its weight


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
