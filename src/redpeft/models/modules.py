"""A model's modules: their widths, places for biases, fingerprints, compiled ones, and what they take of memory."""

from __future__ import annotations

import copy
import hashlib
import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from redpeft.errors import UserError
from redpeft.models.formats import FLOATS

# --- compiled models ------------------------------------------------------------------------------------------------
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


# --- modules --------------------------------------------------------------------------------------------------------


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """What a linear of any maker reads and writes; None for any other module."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.nf
    start, end = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (start, end) if isinstance(start, int) and isinstance(end, int) else None


def output_width(module: nn.Module, model: nn.Module) -> int:
    """The last dimension of a module's output: a linear layer says it, any other has the model's hidden width.

    Raises `UserError` where neither is known.
    """
    if widths := linear_widths(module):
        return widths[1]
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise UserError(f"cannot tell the width of {type(module).__name__}'s output: it has no out_features")
    return width


def device_and_dtype(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Where a module computes, and in what: the device of its tensors, or the one to which accelerate brings them if
    they are offloaded; the dtype of the first floating tensor. None for a module without tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    tensor = next((tensor for tensor in tensors if tensor.is_floating_point()), next(iter(tensors), None))
    if tensor is None:
        return None, None
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    offloaded = next((hook for hook in hooks if getattr(hook, "offload", False)), None)
    return torch.device(offloaded.execution_device) if offloaded else tensor.device, tensor.dtype


def reads_tying(model: nn.Module) -> bool:
    """Whether a model's forward pass reads `tie_word_embeddings` in its configuration: UMT5, Switch and UDOP scale
    what their head reads where it is set."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and "tie_word_embeddings" in code.co_names


_FAST_PATH = {  # what turns it off
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def allow_fast_path(model: nn.Module, allowed: bool) -> None:
    """Whether torch's own encoder may run its fused kernel in evaluation, as it does by itself. The kernel reads the
    weights of the linears and never calls them, so that no edit of their outputs would act."""
    for module in model.modules():
        for kind, (name, off) in _FAST_PATH.items():
            if isinstance(module, kind):
                kept = vars(module).setdefault(f"_redpeft_{name}", getattr(module, name, off))
                setattr(module, name, kept if allowed else off)


# --- biases ---------------------------------------------------------------------------------------------------------
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


# --- fingerprints ---------------------------------------------------------------------------------------------------
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


# --- memory ---------------------------------------------------------------------------------------------------------

SAMPLING = 0.002  # seconds between two measurements of a process on a CPU


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return psutil.virtual_memory().available


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Sequence[int]]:
    """Gives a list of bytes that are in use on the device, by the whole process on a CPU. The first is that before;
    afterwards the largest is the peak inside."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        found = [torch.cuda.memory_allocated(device)]
        yield found
        found.append(torch.cuda.max_memory_allocated(device))
        return
    process, done = psutil.Process(), threading.Event()
    found = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(SAMPLING):
            found.append(process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found.append(process.memory_info().rss)


@contextmanager
def keep_modes_and_rng(model: nn.Module) -> Iterator[None]:
    """For a forward pass that is only a measurement: modes and random numbers are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
