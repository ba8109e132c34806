"""The unit of the bias: the typical size of the base model's output at the site, measured once before training.

    unit = 1.4826 * median |h|     over channels and positions

1.4826 times the median of |h| is the standard deviation of a normal sample. It is a median because a few outlier
channels, 20 to 40 times the rest and more, are common in transformers and would set a root mean square.

An automatic unit is measured on random tokens in the first training forward, by a hook on the base model: tokens and
weights are the same on all processes, so none waits for another. `calibrate` measures when, and on what data, the user
chooses.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from redpeft.errors import UserError, first_line, some
from redpeft.models import example_inputs
from redpeft.tuner.edit import Edit
from redpeft.tuner.layer import RedLayer

MAX_VALUES = 2**20
STD_PER_MEDIAN = 1.4826


def calibrate(model: nn.Module, batch: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Measure the unit of every bias of the active adapters that has none yet; return {site: unit} of all sites.

    `batch` holds the arguments of one forward pass; where it has an attention mask, padding does not count. Without it
    random inputs are made: token ids, noise for images and audio, decoder inputs for encoder-decoders. Training does
    this by itself in its first forward pass. A unit is never measured twice. On several processes the batch has to be
    the same on all. Raises `UserError` where there is no edit, no way to make up inputs, or a site that the batch does
    not reach.
    """
    model = _unwrapped(model)
    layers = [module for module in model.modules() if isinstance(module, RedLayer)]
    if not layers:
        raise UserError("the model has no RED adapter: nothing to calibrate")
    base = next((m for m in model.modules() if "peft_config" in vars(m) and not isinstance(m, BaseTuner)), model)
    pending = [layer for layer in layers if _pending(layer)]
    if pending:
        if batch is not None:
            sizes = _sizes(base, pending, partial(model, **batch), _masks(batch))
        else:
            try:
                sizes = _sizes(base, pending, partial(_run_made_up, base, pending, model))
            except Exception as error:
                raise UserError(
                    f"cannot make up inputs for {type(base).__name__} ({first_line(error)}): pass a batch to "
                    "calibrate(model, batch)"
                ) from error
        if missed := [layer.site for layer in pending if not sizes[layer]]:
            raise UserError(f"the batch does not reach {len(missed)} sites ({some(missed)}): pass another batch")
        _set_units(base, pending, sizes)
    return {layer.site: float(edit.unit) for layer in layers for edit in layer.active_edits}


@torch.compiler.disable
def measure_before_training(base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A hook before the forward passes of a base model with RED, which removes itself when nothing is left to measure.

    Raises `UserError`, which names `calibrate`, where inputs cannot be made up and several processes train: each has a
    batch of its own. One process then measures on its batch.
    """
    if not base.training:
        return
    layers = [module for module in base.modules() if isinstance(module, RedLayer)]
    if any(edit.unit.is_meta for layer in layers for edit in layer.edits):
        return
    pending = [layer for layer in layers if _pending(layer, of_trained=True)]
    if pending:
        if getattr(base, "_is_replica", False):
            raise UserError(
                "nn.DataParallel trains copies of the model: call redpeft.calibrate(model) before training"
            )
        try:
            sizes = _sizes(base, pending, partial(_run_made_up, base, pending, base))
        except Exception as error:
            if _several_processes():
                raise UserError(
                    f"cannot make up inputs for {type(base).__name__} ({first_line(error)}) to measure the units of "
                    "biases: call redpeft.calibrate(model, batch) before training, with one batch on all processes"
                ) from error
            sizes = _sizes(base, pending, partial(base.forward, *args, **kwargs), _masks(kwargs))
        if missed := [layer.site for layer in pending if not sizes[layer]]:
            if len(missed) == len(pending):
                raise UserError(f"no forward pass reaches {some(missed)}: an edit there would do nothing")
            warnings.warn(
                f"the forward pass that measures the units does not reach {some(missed)}: the bias has the typical "
                "unit of the other sites there",
                stacklevel=2,
            )
        _set_units(base, pending, sizes, of_trained=True)
    if not any(edit.is_to_begin for layer in layers for edit in layer.edits):
        _remove_hook(base)


def hook_on(base: nn.Module) -> None:
    """Have the units of a base model's adapters measured in the first training forward."""
    if measure_before_training not in base._forward_pre_hooks.values():
        base.register_forward_pre_hook(measure_before_training, with_kwargs=True)


def _remove_hook(base: nn.Module) -> None:
    # Found by itself and not by a handle, which copies of a model do not have.
    for key in [key for key, hook in base._forward_pre_hooks.items() if hook is measure_before_training]:
        del base._forward_pre_hooks[key], base._forward_pre_hooks_with_kwargs[key]


@torch.no_grad()
def typical_size(hidden: torch.Tensor, site: str, real: torch.Tensor | None = None) -> torch.Tensor | None:
    """The unit of a site from its output: hidden (..., width) -> () in hidden's precision, at least fp32; None without
    any position.

    `real` (...) says which positions are no padding. Taken from at most about a million values, of positions drawn at
    random, so that no length of the rows matters. Positions with values that are not finite are left out, and zeros (a
    ReLU) where they are the majority. Raises `UserError` for an output that is zero everywhere or nowhere finite.
    """
    positions = hidden.detach().reshape(-1, hidden.shape[-1])
    if real is not None and real.numel() == len(positions):
        positions = positions[real.reshape(-1).to(positions.device, torch.bool)]
    if not len(positions):
        return None
    finite = positions[positions.isfinite().all(dim=1)]
    if finite.numel() > MAX_VALUES:
        count = -(-MAX_VALUES // finite.shape[1])
        drawn = torch.randint(len(finite), (count,), generator=torch.Generator().manual_seed(0))
        finite = finite[drawn.to(finite.device)]
    sizes = finite.abs().flatten().to(torch.promote_types(hidden.dtype, torch.float32))
    unit = STD_PER_MEDIAN * sizes.median() if len(sizes) else sizes.new_tensor(torch.nan)
    if unit == 0 and bool(sizes.any()):
        unit = STD_PER_MEDIAN * sizes[sizes > 0].median()
    if not bool(torch.isfinite(unit)) or unit == 0:
        what = "zero everywhere" if unit == 0 else "not finite"
        raise UserError(
            f"the output of {site} is {what}, so the bias has no unit there: "
            "give the unit as a number (unit=1), or leave the module out with exclude_modules"
        )
    return unit


Sizes = dict[RedLayer, list[float]]  # of each of the site's outputs in a forward pass


def _pending(layer: RedLayer, of_trained: bool = False) -> list[Edit]:
    """The active edits of a site that are yet to begin; `of_trained`: of those that are trained."""
    return [edit for edit in layer.active_edits if edit.is_to_begin and (edit.trainable or not of_trained)]


def _set_units(base: nn.Module, layers: Sequence[RedLayer], sizes: Sizes, of_trained: bool = False) -> None:
    """Where learning begins: biases are counted in the measured units, and the scales of adapters that were
    trained elsewhere from 1."""
    typical = median(size for layer in layers for size in sizes[layer])
    for layer in layers:
        unit = median(sizes[layer] or [typical])
        for edit in _pending(layer, of_trained):
            edit.express(unit if edit.unit_pending else float(edit.unit), 1.0 if edit.from_elsewhere else None)
    for name, config in getattr(base, "peft_config", {}).items():
        edits = [layer.redpeft_edit[name] for layer in layers if name in layer.redpeft_edit]
        if any(edit.auto_unit and not edit.is_to_begin for edit in edits):
            config.resolve(unit_measured=True, scale_origin=abs(edits[0].origin))


def _sizes(
    base: nn.Module, layers: Sequence[RedLayer], run: Callable[[], Any], masks: Sequence[torch.Tensor] = ()
) -> Sizes:
    """The typical sizes of the base layers' outputs in one forward pass, which nothing else sees anything of."""
    found: Sizes = {layer: [] for layer in layers}

    def watch(layer: RedLayer, hidden: torch.Tensor) -> None:
        real = next((mask for mask in masks if mask.numel() == hidden[..., 0].numel()), None)
        if not hidden.is_meta and (size := typical_size(hidden, layer.site, real)) is not None:
            found[layer].append(size.item())

    with keep_modes_and_rng(base), torch.no_grad():
        base.eval()  # without dropout
        watched = [module for module in base.modules() if isinstance(module, RedLayer)]
        try:
            for layer in watched:
                layer.watch = watch if layer in found else _pass_by
            run()
        finally:
            for layer in watched:
                layer.watch = None
    return found


def _pass_by(layer: RedLayer, hidden: torch.Tensor) -> None:
    """Of a site that is not measured, which leaves its output unedited all the same."""


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


def _masks(inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    masks: list[Any] = [inputs.get(name) for name in ("attention_mask", "decoder_attention_mask")]
    return [mask for mask in masks if torch.is_tensor(mask) and mask.dim() == 2]


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without what would make the forward pass a collective one, or compile it."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


# --- inputs that are made up -----------------------------------------------------------------------------------------


def _run_made_up(base: nn.Module, layers: Sequence[RedLayer], model: nn.Module) -> None:
    """One forward pass of random inputs, of the model without its head where that holds all the layers. `model` is the
    one to call where FSDP has spread the weights."""
    inputs = example_inputs(base, layers[0].device_of_base)
    module: nn.Module = base
    if isinstance(base, PreTrainedModel) and set(layers) <= set(base.base_model.modules()):
        module = base.base_model
    if "use_cache" in inspect.signature(module.forward).parameters:
        inputs["use_cache"] = False
    if model is not base and any(hasattr(weight, "placements") for weight in base.parameters()):
        model(**inputs)
    elif module is base:
        base.forward(**inputs)  # in a hook before its forward
    else:
        module(**inputs)
