"""Load the base model that a recipe names, in the number format that fits the hardware and the method."""

from __future__ import annotations

import hashlib
import importlib.util
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TorchAoConfig,
    set_seed,
)

from redpeft.adapters.loading import DTYPE_ARGUMENT, DTYPES, loading_report, quiet
from redpeft.console import log_main
from redpeft.errors import UserError
from redpeft.models import leave_unpacked
from redpeft.tasks import Task
from redpeft.tasks.base_model import load_tokenizer
from redpeft.training.baselines import METHODS, head_modules
from redpeft.training.recipe import Recipe

QUANTISERS = {  # load_in: what does it, and the extra that brings it
    "8bit": ("bitsandbytes", "bnb"),
    "4bit": ("bitsandbytes", "bnb"),
    "int8_weight_only": ("torchao", "torchao"),
}
SLOW = 5.0  # times as long as in fp32


def precision(recipe: Recipe) -> str:
    """fp32, bf16 or fp16: what the recipe asks for, or the best of this machine for `auto`.

    Raises `UserError` where the hardware lacks it.
    """
    cuda = torch.cuda.is_available()
    has_bf16 = not cuda or torch.cuda.is_bf16_supported()
    if recipe.precision == "auto":
        return "bf16" if has_bf16 and (cuda or recipe.base.dtype == "bf16") else "fp32"
    if recipe.precision == "fp16" and not cuda:
        raise UserError("precision fp16 needs a GPU; choose fp32 or bf16")
    if recipe.precision == "bf16" and not has_bf16:
        raise UserError("this GPU has no bf16; choose precision fp32 or fp16")
    return recipe.precision


def bf16_slowdown() -> float:
    """How many times as long as in fp32 this CPU takes to multiply small matrices in bf16: 30 and more where it has no
    instructions for it, and around 1 where it has."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(64, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        times = []
        for _ in range(20):  # the fastest counts: on a busy machine most wait for another process
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def _warn_of_slow_bf16(recipe: Recipe) -> None:
    """Say before the first step where steps would take minutes instead of seconds."""
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if on_cpu and precision(recipe) == "bf16" and (times := bf16_slowdown()) > SLOW:
        fields = "precision and base.dtype" if recipe.base.dtype == "bf16" else "precision"
        why = "this CPU, which has no instructions for it"
        log_main(f"bf16 takes {times:.0f} times as long as fp32 on {why}: set {fields} to fp32")


def require_quantiser(recipe: Recipe) -> None:
    """Raises `UserError` where the package that `base.load_in` needs is not installed."""
    if recipe.base.load_in is None:
        return
    package, extra = QUANTISERS[recipe.base.load_in]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"base.load_in {recipe.base.load_in} needs {package}: pip install redpeft[{extra}]")


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager:
    """The context in which the recipe's model computes: fp32 edits and heads beside a half-precision base need it."""
    kind = precision(recipe)
    return nullcontext() if kind == "fp32" else torch.autocast(device.type, DTYPES[kind])


def load_base(recipe: Recipe, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model with the task's head, and its tokenizer.

    Raises `UserError` for a folder or hub name that cannot be read, and a `load_in` that does nothing to this model.
    """
    name, revision = recipe.base.model, recipe.base.revision
    _warn_of_slow_bf16(recipe)
    with quiet():  # transformers' report of a head that is new is no news here
        tokenizer = load_tokenizer(name, revision=revision)
        options: dict[str, Any] = {DTYPE_ARGUMENT: _dtype(recipe)}
        if recipe.base.load_in is not None:
            outline = task.load_model(name, tokenizer, revision=revision, device_map="meta")
            head = head_modules(outline, recipe.task, new_weights(outline, recipe))
            options["quantization_config"] = _quantization(recipe, head)
        model = task.load_model(name, tokenizer, revision=revision, **options)
    if recipe.base.load_in is not None and not _quantised(model):
        raise UserError(
            f"base.load_in {recipe.base.load_in} leaves every weight of {type(model).__name__} as it is: choose "
            f"another of {', '.join(QUANTISERS)}, or leave it out"
        )
    leave_unpacked(model)  # for every method, and a loaded run scores as it did in training
    return model, tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Differs where tokenizers make other tokens of a text, or of a chat; not where one has been used."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        words: Any = sorted(tokenizer.get_vocab().items())
    else:
        backend.no_truncation(), backend.no_padding()  # left from the last call, and set at each
        words = backend.to_str()
    limits = (tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side)
    parts = (type(tokenizer).__name__, words, tokenizer.special_tokens_map, tokenizer.chat_template, limits)
    return hashlib.sha256(repr(parts).encode(errors="surrogatepass")).hexdigest()


def new_weights(model: PreTrainedModel, recipe: Recipe) -> list[str]:
    """Names of the weights that the base's checkpoint lacks or has in another shape, seen by loading names only."""
    info = loading_report(model, Path(recipe.base.model).expanduser(), revision=recipe.base.revision)
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    new = set(info["missing_keys"]) | mismatched
    # a checkpoint that was saved quantised stores those weights in other shapes and names
    return sorted(new - _quantised(model))


@torch.no_grad()
def draw_weights(model: torch.nn.Module, weights: Iterable[str], seed: int) -> None:
    """Draw first values for these weights, by their names in `model`, as transformers does where a checkpoint lacks
    them: the same ones for the same seed, whatever was drawn before, whatever else the model holds, and wherever."""
    new = set(weights)
    if not new:
        return
    base = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    owners = {name: model.get_submodule(name) for name in {weight.rpartition(".")[0] for weight in new}}
    devices = {name: next(owner.parameters()).device for name, owner in owners.items()}
    kept = {
        weight: parameter.clone()
        for name, owner in owners.items()
        for key, parameter in owner.named_parameters()
        if (weight := f"{name}.{key}") not in new
    }
    for name, module in model.named_modules():
        module._is_hf_initialized = name not in owners
    for name, weight in model.named_parameters():
        weight._is_hf_initialized = name not in new
    for owner in owners.values():
        owner.to("cpu")  # a GPU draws other numbers
    set_seed(seed)
    base.initialize_weights()
    for name, owner in owners.items():
        owner.to(devices[name])
    for name, weight in kept.items():  # transformers 4 draws whole modules
        model.get_parameter(name).copy_(weight)


def _quantised(model: torch.nn.Module) -> set[str]:
    """Names of the weights that are no plain parameters."""
    return {name for name, weight in model.named_parameters() if type(weight) is not torch.nn.Parameter}


def _dtype(recipe: Recipe) -> torch.dtype | str:
    if recipe.base.dtype == "auto":
        own_weights = METHODS[recipe.method].own_weights
        return torch.float32 if own_weights or precision(recipe) == "fp32" else "auto"
    if recipe.base.dtype != "fp32" and precision(recipe) == "fp32":
        raise UserError(f"base.dtype {recipe.base.dtype} needs a precision of 16 bits too: bf16, or fp16 on a GPU")
    return DTYPES[recipe.base.dtype]


def _quantization(recipe: Recipe, head: list[str]) -> BitsAndBytesConfig | TorchAoConfig:
    """How the base is quantised; the head is trained, so it stays as it is."""
    require_quantiser(recipe)
    if recipe.base.load_in == "int8_weight_only":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=head or None)
    return BitsAndBytesConfig(
        load_in_8bit=recipe.base.load_in == "8bit",
        load_in_4bit=recipe.base.load_in == "4bit",
        llm_int8_skip_modules=head or None,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=DTYPES[precision(recipe)],
    )
