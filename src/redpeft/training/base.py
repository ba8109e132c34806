"""Load the base model that a recipe names, in the number format that fits the hardware and the method."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from redpeft.errors import UserError
from redpeft.tasks import Task
from redpeft.tasks.base_model import load_base as load_or_explain
from redpeft.training.methods import head_modules
from redpeft.training.recipe import Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_ARGUMENT = "dtype" if int(transformers.__version__.partition(".")[0]) >= 5 else "torch_dtype"


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


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager:
    """The context in which the recipe's model computes: fp32 edits and heads beside a half-precision base need it."""
    kind = precision(recipe)
    return nullcontext() if kind == "fp32" else torch.autocast(device.type, DTYPES[kind])


def load_base(recipe: Recipe, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model with the task's head, and its tokenizer.

    Raises `UserError` for a folder or hub name that cannot be read.
    """
    name, revision = recipe.base.model, recipe.base.revision
    with _quiet():  # transformers' report of a head that is new is no news here
        tokenizer = load_or_explain(AutoTokenizer, name, revision=revision)
        if recipe.base.load_in is None:
            options = {DTYPE_ARGUMENT: _dtype(recipe)}
        else:
            outline = task.load_model(name, tokenizer, revision=revision, device_map="meta")
            head = head_modules(outline, recipe.task, new_weights(outline, recipe))
            options = {"quantization_config": _quantization(recipe, head)}
        return task.load_model(name, tokenizer, revision=revision, **options), tokenizer


def new_weights(model: PreTrainedModel, recipe: Recipe) -> list[str]:
    """Names of the weights that the base's checkpoint lacks or has in another shape, seen by loading names only."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with _quiet():
        loader: Any = type(model)
        _, info = loader.from_pretrained(
            str(Path(recipe.base.model).expanduser()) if recipe.base.model.startswith("~") else recipe.base.model,
            revision=recipe.base.revision,
            config=config,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    return sorted(set(info["missing_keys"]) | mismatched)


def _dtype(recipe: Recipe) -> torch.dtype | str:
    if recipe.base.dtype == "auto":
        own_weights = recipe.method in ("full", "bitfit")
        return torch.float32 if own_weights or precision(recipe) == "fp32" else "auto"
    if recipe.base.dtype != "fp32" and precision(recipe) == "fp32":
        raise UserError(f"base.dtype {recipe.base.dtype} needs a precision of 16 bits too: bf16, or fp16 on a GPU")
    return DTYPES[recipe.base.dtype]


def _quantization(recipe: Recipe, head: list[str]) -> BitsAndBytesConfig:
    """bitsandbytes' configuration; the head is trained, so it stays as it is."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("base.load_in needs bitsandbytes: pip install redpeft[bnb]")
    return BitsAndBytesConfig(
        load_in_8bit=recipe.base.load_in == "8bit",
        load_in_4bit=recipe.base.load_in == "4bit",
        llm_int8_skip_modules=head or None,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=DTYPES[precision(recipe)],
    )


@contextmanager
def _quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
