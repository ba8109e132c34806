"""PEFT's methods among the baselines: what they need of a model, where PEFT has no default, or finds a problem only in
the middle of the first step, or never.

Each `fit_*` takes the model, the method_options and the task type, and returns the options for this model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import peft
from packaging.version import Version
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from torch import nn
from transformers import PreTrainedModel

from redpeft.errors import UserError

# What transformers from 5.24 calls `cache`, and earlier ones and PEFT before 0.22 call `past_key_values`.
OLD, NEW = "past_key_values", "cache"
PEFT_KNOWS_NEW = Version(peft.__version__) >= Version("0.22")


def fit_lora(model: PreTrainedModel, options: dict[str, Any], task_type: str) -> dict[str, Any]:
    """For a model family without default target modules in PEFT: all linear layers."""
    known = model.config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    return options if known else {"target_modules": "all-linear", **options}


def fit_ia3(model: PreTrainedModel, options: dict[str, Any], task_type: str) -> dict[str, Any]:
    """Raises `UserError` for a model family without default target modules in PEFT."""
    family = model.config.model_type
    if "target_modules" not in options and family not in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        raise UserError(
            f"PEFT knows no IA3 target modules for {family} models: name them in method_options.target_modules and "
            "method_options.feedforward_modules"
        )
    return options


def fit_prompt(model: PreTrainedModel, options: dict[str, Any], task_type: str) -> dict[str, Any]:
    """The options, checked. Raises `UserError` if the number of virtual tokens is not a whole number from 1.

    A decoder gets a hook: PEFT drops `position_ids` after a prompt, so that rows that are padded on the left for
    `generate` would have other positions than in training.
    """
    options = _check_number(options)
    if task_type == "CAUSAL_LM" and "position_ids" in inspect.signature(model.forward).parameters:
        model.register_forward_pre_hook(_number_positions, with_kwargs=True)
    _use_old_name(model)
    return options


def _check_number(options: dict[str, Any]) -> dict[str, Any]:
    tokens = options["num_virtual_tokens"]
    if not isinstance(tokens, int) or tokens < 1:
        raise UserError(f"method_options: num_virtual_tokens must be a whole number of at least 1, not {tokens!r}")
    return options


def fit_prefix(model: PreTrainedModel, options: dict[str, Any], task_type: str) -> dict[str, Any]:
    """The options, checked as in `fit_prompt`. Raises `UserError` also for a model whose attention takes no keys and
    values from outside."""
    if options.get("prefix_projection"):
        raise UserError(
            "method_options: with prefix_projection PEFT saves the projection's output and not the projection, so "
            "a run cannot return to its best epoch: leave it out"
        )
    backbone = getattr(model, model.base_model_prefix, model)
    if not any({OLD, NEW} & set(inspect.signature(part.forward).parameters) for part in (model, backbone)):
        raise UserError(
            f"method prefix puts keys and values into the attention, and {type(model).__name__} takes none: choose "
            "another method, such as prompt"
        )
    _use_old_name(model)
    return _check_number(options)


def _use_old_name(model: PreTrainedModel) -> None:
    """Let PEFT find the cache of keys and values by the name that it knows. Without it, PEFT refuses a prefix, and
    takes every step of a generation for the first, so that the prompt is inserted again before each token."""
    if PEFT_KNOWS_NEW:
        return
    for part in {id(part): part for part in (model, getattr(model, model.base_model_prefix, model))}.values():
        if NEW in inspect.signature(part.forward).parameters:
            part.forward = _taking_old_name(part.forward)
    if hasattr(model, "prepare_inputs_for_generation"):
        model.prepare_inputs_for_generation = _giving_old_name(model.prepare_inputs_for_generation)


def _taking_old_name(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get(OLD) is not None:
            kwargs[NEW] = kwargs.pop(OLD)
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    parameters = [p.replace(name=OLD) if p.name == NEW else p for p in signature.parameters.values()]
    renamed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return renamed


def _giving_old_name(prepare: Callable) -> Callable:
    @functools.wraps(prepare)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        inputs = prepare(*args, **kwargs)
        if NEW in inputs:
            inputs[OLD] = inputs.pop(NEW)
        return inputs

    return renamed


def _number_positions(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Positions count the tokens that are not padding, and continue after those in a cache."""
    given, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    given = kwargs.get("input_ids") if given is None else given
    if kwargs.get("position_ids") is None and given is not None and mask is not None and mask.dim() == 2:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        kwargs["position_ids"] = positions[:, -given.shape[1] :]
    return args, kwargs
