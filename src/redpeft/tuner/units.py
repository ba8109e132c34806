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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from redpeft.errors import UserError, first_line, shorten_list
from redpeft.models import device_and_dtype, example_inputs, keep_modes_and_rng, unwrapped
from redpeft.tuner.edit import Edit
from redpeft.tuner.first_step import check_first_step
from redpeft.tuner.layer import RedLayer, edits_of, red_layers, replaced

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
    while isinstance(model := unwrapped(model), (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module  # or the forward pass would be a collective one
    layers = list(red_layers(model).values())
    if not layers:
        raise UserError("the model has no RED adapter: nothing to calibrate")
    base = next((m for m in model.modules() if "peft_config" in vars(m) and not isinstance(m, BaseTuner)), model)
    pending = [layer for layer in layers if _pending_edits(layer)]
    if pending:
        if batch is not None:
            sizes = _measure(base, pending, model, batch)
        else:
            try:
                sizes = _measure_on_example(base, pending, model)
            except UserError as error:
                raise UserError(f"{error}: pass a batch to calibrate(model, batch)") from error
        if missed := [layer.site for layer in pending if not sizes[layer]]:
            raise UserError(
                f"the batch does not reach {len(missed)} sites ({shorten_list(missed)}): pass another batch"
            )
        _set_units(base, pending, sizes)
    return {layer.site: float(edit.unit) for layer in layers for edit in layer.active_edits}


def add_hook(base: nn.Module) -> None:
    """Have the units of a base model's adapters measured in the first training forward."""
    if measure_before_training not in base._forward_pre_hooks.values():
        base.register_forward_pre_hook(measure_before_training, with_kwargs=True)


def remove_hook(base: nn.Module, hook: Callable[..., None]) -> None:
    """Remove a hook before the forward passes. Found by itself and not by a handle, which copies of a model lack."""
    for key in [key for key, each in base._forward_pre_hooks.items() if each is hook]:
        del base._forward_pre_hooks[key]
        base._forward_pre_hooks_with_kwargs.pop(key, None)


@torch.compiler.disable
def measure_before_training(base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A hook before the forward passes of a base model with RED, which removes itself when nothing is left to measure.

    Where inputs cannot be made up, one process measures on its batch. Of several each has a batch of its own: that
    raises `UserError`, which names `calibrate`.
    """
    layers = list(red_layers(base).values())
    if not base.training or any(edit.unit.is_meta for layer in layers for edit in layer.edits):
        return
    pending = [layer for layer in layers if _pending_edits(layer)]
    if pending:
        if getattr(base, "_is_replica", False):
            raise UserError(
                "nn.DataParallel trains copies of the model: call redpeft.calibrate(model) before training"
            )
        try:
            sizes = _measure_on_example(base, pending, base)
        except UserError as error:
            if _several_processes():
                raise UserError(
                    f"{error} to measure the units of biases: call redpeft.calibrate(model, batch) before training, "
                    "with one batch on all processes"
                ) from error
            sizes = _measure(base, pending, partial(base.forward, *args), kwargs)
        if missed := [layer.site for layer in pending if not sizes[layer]]:
            if len(missed) == len(pending):
                raise UserError(f"no forward pass reaches {shorten_list(missed)}: an edit there would do nothing")
            warnings.warn(
                f"the forward pass that measures the units does not reach {shorten_list(missed)}: the bias has the "
                "typical unit of the other sites there",
                stacklevel=2,
            )
        _set_units(base, pending, sizes)
    if not any(edit.express_pending for layer in layers for edit in layer.edits):
        remove_hook(base, measure_before_training)


@torch.no_grad()
def typical_size(hidden: torch.Tensor, site: str, real: torch.Tensor | None = None) -> torch.Tensor | None:
    """The unit of a site from its output: hidden (..., width) -> () in hidden's precision, at least fp32; None without
    any position.

    `real` (...) says which positions are no padding. Taken from at most about a million values, of positions drawn at
    random, so that no length of the rows matters. Positions with values that are not finite are left out, and zeros (a
    ReLU) where they are the majority. Raises `UserError` for an output that is zero everywhere or nowhere finite.
    """
    positions = hidden.detach().reshape(-1, hidden.shape[-1])
    if real is not None:
        positions = positions[real.reshape(-1).to(positions.device, torch.bool)]
    if not len(positions):
        return None
    finite = positions[positions.isfinite().all(dim=1)]
    if finite.numel() > MAX_VALUES:
        count = -(-MAX_VALUES // finite.shape[1])
        drawn = torch.randint(len(finite), (count,), generator=torch.Generator().manual_seed(0))
        finite = finite[drawn.to(finite.device)]
    sizes = finite.abs().flatten().to(torch.promote_types(hidden.dtype, torch.float32))
    if len(sizes) and sizes.median() == 0:
        sizes = sizes[sizes > 0]
    if not len(sizes):
        raise UserError(
            f"the output of {site} is {'zero everywhere' if len(finite) else 'not finite'}, so the bias has no unit "
            "there: give the unit as a number (unit=1), or leave the module out with exclude_modules"
        )
    return STD_PER_MEDIAN * sizes.median()


Sizes = dict[RedLayer, list[float]]  # of each of the site's outputs in a forward pass


def _measure_on_example(base: nn.Module, layers: Sequence[RedLayer], model: nn.Module) -> Sizes:
    """`_measure` on example inputs. `model` is the one to call where FSDP has sharded the weights. Raises `UserError`,
    the beginning of a sentence, where there are no such inputs or the model does not take them."""
    module: nn.Module = base
    if isinstance(base, PreTrainedModel) and set(layers) <= set(base.base_model.modules()):
        module = base.base_model  # without a head, which may ask for more than inputs
    sharded = model is not base and any(hasattr(weight, "placements") for weight in base.parameters())
    # This may run in a hook of `base`: a call of `base` itself would compile a compiled model for this pass too.
    run: Callable[..., Any] = model if sharded else base.forward if module is base else module
    try:
        device, _ = device_and_dtype(layers[0].get_base_layer())
        inputs = example_inputs(base, device)
        if "use_cache" in inspect.signature(module.forward).parameters:
            inputs["use_cache"] = False
        return _measure(base, layers, run, inputs)
    except Exception as error:
        raise UserError(f"cannot generate inputs for {type(base).__name__} ({first_line(error)})") from error


def _measure(base: nn.Module, layers: Sequence[RedLayer], run: Callable[..., Any], inputs: Mapping[str, Any]) -> Sizes:
    """The typical sizes of the base layers' outputs in one forward pass, without edits and in evaluation mode. Modes
    and random numbers are as before afterwards. Attention masks (batch, positions) of the inputs are 0 for padding."""
    sizes: Sizes = {layer: [] for layer in layers}
    masks: list[Any] = [inputs.get(name) for name in ("attention_mask", "decoder_attention_mask")]
    masks = [mask for mask in masks if torch.is_tensor(mask) and mask.dim() == 2]
    waiting: dict[RedLayer, torch.Tensor] = {}  # the first parts of sums of two outputs

    def watch(layer: RedLayer, hidden: torch.Tensor, with_bias: bool) -> torch.Tensor:
        if layer not in sizes or hidden.is_meta:
            return hidden
        if layer.added is not None and layer not in waiting:
            waiting[layer] = hidden
            return hidden
        whole = waiting.pop(layer).view_as(hidden) + hidden if layer in waiting else hidden
        real = next((mask for mask in masks if mask.numel() == whole[..., 0].numel()), None)
        if (size := typical_size(whole, layer.site, real)) is not None:
            sizes[layer].append(size.item())
        return hidden

    every = red_layers(base).values()
    for layer in every:
        layer.unmerge()
    watchers = {layer: partial(watch, layer) for layer in every}
    with keep_modes_and_rng(base), torch.no_grad(), replaced("editor", watchers):
        base.eval()
        run(**inputs)
    return sizes


def _set_units(base: nn.Module, layers: Sequence[RedLayer], sizes: Sizes) -> None:
    """Count the biases of pending edits in the measured units, and the scales of imported adapters from 1."""
    typical = median(size for layer in layers for size in sizes[layer])
    for layer in layers:
        unit = median(sizes[layer] or [typical])
        for edit in _pending_edits(layer):
            edit.express(unit if edit.unit_pending else float(edit.unit))
            check_first_step(edit)  # also of a copy of the model that got the adapter
    for name, config in getattr(base, "peft_config", {}).items():
        edits = list(edits_of(base, name).values())
        if any(edit.auto_unit and not edit.express_pending for edit in edits):
            config.resolve(unit_measured=True, scale_origin=abs(edits[0].origin))


def _pending_edits(layer: RedLayer) -> list[Edit]:
    """The active edits of a site that need `express` before training."""
    return [edit for edit in layer.active_edits if edit.express_pending]


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
