"""The PEFT tuner of RED: finds the sites, wraps them, and serves batches that mix adapters."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from redpeft.errors import UserError, shorten_list
from redpeft.models import (
    add_biases,
    allow_fast_path,
    compile_in_place,
    fingerprint,
    fingerprint_difference,
    leave_unpacked,
    output_width,
    plain_name,
    reads_tying,
    unwrapped,
)
from redpeft.tuner.compose import COMBINATIONS, combine_configs
from redpeft.tuner.config import FORMAT, RedConfig
from redpeft.tuner.edit import ORIGINS
from redpeft.tuner.first_step import check_first_step
from redpeft.tuner.heads import (
    combine_heads,
    common_heads,
    head_of,
    put_modules,
    run_by_adapter,
    same_tensors,
    wrappers,
)
from redpeft.tuner.layer import RedLayer, edits_of, red_layers, replaced
from redpeft.tuner.mixed import BASE, MixedBatch
from redpeft.tuner.register import PREFIX
from redpeft.tuner.sites import SHARED_EXPERT, adds_shared_expert, find_sites
from redpeft.tuner.units import add_hook, remove_hook

logger = logging.getLogger(__name__)


class RedModel(BaseTuner):
    """A model whose sites are wrapped in `RedLayer`s, as `get_peft_model(model, RedConfig(...))` makes it."""

    prefix = PREFIX
    tuner_layer_cls = RedLayer
    target_module_mapping: ClassVar[dict] = {}  # sites are found by structure

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        _check_plain(model)  # before PEFT puts its configuration in the place of another's
        super().__init__(model, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)  # PEFT until 0.20: model.forward, past what `model.compile()` has compiled

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        model = self.model = compile_in_place(model)
        config = self.peft_config[adapter_name]
        config.enter_model(self.peft_config, adapter_name)
        was_saved = config.resolved
        if config.sites is not None and not config.resolved:
            sites = find_sites(model, config.sites, config.layers_to_transform)
            config.resolve(target_modules={site.name for site in sites}, resolved=True)
        if config.resolved:
            config.resolve(target_modules=frozenset(config.target_modules))  # PEFT shortens a large set to endings
        if not config.inference_mode:
            leave_unpacked(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        edits = edits_of(model, adapter_name)
        automatic = config.unit == "auto"
        if automatic and was_saved and config.scale_origin == 0 and not config.unit_measured:  # an imported checkpoint
            for edit in edits.values():
                edit.training_origin = 1.0
        if config.format == 1:
            for edit in edits.values():
                nn.init.constant_(edit.offset, torch.nan)  # until the file's values are loaded
            model.register_forward_pre_hook(refuse_missing_values)
        if automatic and not config.inference_mode:
            for edit in edits.values():
                check_first_step(edit)
            add_hook(model)
        # Full names, also where PEFT was given endings: loading goes by these.
        config.resolve(target_modules=set(edits), resolved=True, format=FORMAT)
        allow_fast_path(model, False)
        self._check_base(model, config, adapter_name)

    def _check_base(self, model: nn.Module, config: RedConfig, adapter_name: str) -> None:
        """Warn where the adapter was trained on another base model of the same shape."""
        found = fingerprint(model, config.target_modules or ())
        if found is None:
            logger.info(
                "adapter '%s': the base model's weights are quantised, sharded or not loaded, so its fingerprint "
                "cannot be taken, and another base model of the same shape cannot be detected",
                adapter_name,
            )
        if differs := fingerprint_difference(config.base_fingerprint, found):
            named = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
            warnings.warn(
                f"adapter '{adapter_name}' was trained on another base model{named} than this one: {differs}",
                stacklevel=2,
            )
        config.resolve(base_fingerprint=config.base_fingerprint or found)

    @staticmethod
    def _check_target_module_exists(config: RedConfig, key: str) -> Any:
        found = BaseTuner._check_target_module_exists(config, key)
        # PEFT takes full names as endings too, which modules of another tower may have.
        return found and (not config.resolved or key in (config.target_modules or ()))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Also without the name that a module gets that is compiled after the adapter was added."""
        return plain_name(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: RedConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """An adapter file with keys missing or left over is an error, where PEFT would warn or say nothing."""
        state_dict = {plain_name(key): tensor for key, tensor in state_dict.items()}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for key in list(remapped):  # an edit takes either name of its scale, and PEFT finds the one that it has
            site, _, name = key.rpartition(".")
            if name in ORIGINS and site.endswith(".redpeft_edit"):
                remapped[f"{site}.{adapter_name}.{name}"] = remapped.pop(key)
        expected = [
            f"{name}.redpeft_edit.{adapter_name}.{key}"
            for name, edit in edits_of(model, adapter_name).items()
            for key in edit.state_dict()
        ]
        known, given = ({_either_name(key) for key in keys} for keys in (model.state_dict(), remapped))
        missing = sorted(key for key in expected if _either_name(key) not in given)
        left_over = sorted(key for key in remapped if _either_name(key) not in known)
        if missing or left_over:
            raise UserError(
                f"the file of adapter '{adapter_name}' does not fit this model; "
                f"keys missing: {shorten_list(missing) or 'none'}; left over: {shorten_list(left_over) or 'none'}. "
                "Load it on the base model that it was trained on, or save it again"
            )
        return remapped

    def _create_and_replace(
        self,
        peft_config: RedConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, RedLayer):
            target.update_layer(adapter_name, peft_config)
            return
        width = output_width(target, self.model)
        layer = RedLayer(target, adapter_name, peft_config, width=width, site=current_key)
        self._replace_module(parent, target_name, layer, target)
        if adds_shared_expert(parent, target):
            layer.edit_too(parent.get_submodule(SHARED_EXPERT))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Wherever it stands: several blocks may share a linear. PEFT's own would move the layer to another device too.
        for owner in list(self.model.modules()):
            for name, module in list(owner._modules.items()):
                if module is child:
                    setattr(owner, name, new_module)
        if isinstance(child, RedLayer) and child.added is not None:
            child.added.remove()

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set how strongly an adapter acts: 0 is the base model, 1 the adapter as it was trained, -1 its negation.

        `h' = h + scale * (edit(h) - h)` in forward passes, mixed batches and merges from now on. What is stored stays,
        and the strength is not saved: `add_weighted_adapter([name], [scale], other)` makes an adapter to save. Heads
        are not touched. Raises `UserError` for an unknown name, a scale that is not finite, and a merged adapter.
        """
        self._check_known([adapter_name])
        if not math.isfinite(scale):
            raise UserError(f"the strength of an adapter must be a finite number, not {scale}")
        for layer in red_layers(self.model).values():
            layer.set_scale(adapter_name, scale)

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        head: str | None = None,
    ) -> None:
        """Add an adapter that is made from others, by exact arithmetic at each site.

        "linear": the weighted sum of their differences from the identity, `scale = 1 + sum of w (s - 1)` and
        `bias = sum of w b`; "sequence": one after another in this order, each with its weight as its strength. They
        count as they act now (`set_scale`). A site that an adapter lacks is the identity there. Heads
        (`modules_to_save`): one that comes alone is kept, several are averaged where the weights sum to 1 (a warning
        says so), or `head` names the adapter whose head to take. The new adapter is neither active nor trained yet:
        `set_adapter` does it.

        Raises `UserError` for unknown or taken names, weights that are not one finite number for each adapter, an
        unknown `combination_type`, and heads that cannot be combined; the model is unchanged then.
        """
        self._check_known([*adapters, *([head] if head else [])])
        self._check_loaded()
        if adapter_name in self.peft_config:
            raise UserError(f"there is an adapter '{adapter_name}' already: choose another name, or delete it first")
        if "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
            raise UserError(f"an adapter cannot be called '{adapter_name}': torch keeps that name for itself")
        if not adapters or len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
            raise UserError(f"give one finite weight for each adapter, not {list(weights)} for {list(adapters)}")
        if combination_type not in COMBINATIONS:
            raise UserError(f"unknown combination_type {combination_type!r}: choose {' or '.join(COMBINATIONS)}")
        bringing = [head] if head else list(adapters)
        heads = [head_of(self.model, name) for name in bringing]
        new_head = combine_heads(bringing, heads, weights if combination_type == "linear" else None)
        owner = next((name for name, found in zip(bringing, heads, strict=True) if found), None)
        if new_head and not any(same_tensors(new_head, found) for found in heads):
            warnings.warn(
                f"the head (modules_to_save) of '{adapter_name}' is the average of those of {', '.join(adapters)}, "
                "which is right where these began as one; head=... takes that of one adapter",
                stacklevel=2,
            )
        configs = [self.peft_config[name] for name in adapters]
        sites = {site for config in configs for site in config.target_modules}
        self.peft_config[adapter_name] = replace(
            configs[0],
            **combine_configs([config.to_dict() for config in configs], sites),
            modules_to_save=list(self.peft_config[owner].modules_to_save) if owner else None,
        )
        self.inject_adapter(self.model, adapter_name)
        for layer in red_layers(self.model).values():
            layer.combine(adapters, weights, adapter_name, COMBINATIONS[combination_type])
        for key, tensor in head_of(self.model, adapter_name).items():
            tensor.copy_(new_head[key])

    def _check_loaded(self) -> None:
        if refuse_missing_values in self.model._forward_pre_hooks.values():
            refuse_missing_values(self.model, ())

    def _check_known(self, adapters: Sequence[str]) -> None:
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown:
            raise UserError(f"unknown adapters: {', '.join(unknown)}; loaded: {', '.join(self.peft_config)}")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's. Raises `UserError` for unknown names and for several heads; nothing is changed then."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_known(names)
        for module, wrapper in wrappers(self.model).items():
            owners = [name for name in names if name in wrapper.modules_to_save]
            if len(owners) > 1:
                raise UserError(
                    f"Only one adapter can be set at a time for ModulesToSaveWrapper: {' and '.join(owners)} bring a "
                    f"{module} each. Make one adapter of them: add_weighted_adapter(names, weights, new_name, "
                    "'sequence', head=...)"
                )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it alone was active, the first of the others becomes so, at all sites and with its
        head, where PEFT chooses one for each site. Raises `UserError` for an unknown and for a merged adapter."""
        self._check_known([adapter_name])
        if any(adapter_name in layer.merged_adapters for layer in red_layers(self.model).values()):
            raise UserError(
                f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please unmerge them first."
            )
        if adapter_name in self.active_adapters:
            left = [name for name in self.active_adapters if name != adapter_name]
            if not left and (left := sorted(self.peft_config.keys() - {adapter_name})[:1]):
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}.",
                    stacklevel=2,
                )
            if left:
                self.set_adapter(left, inference_mode=self.peft_config[left[0]].inference_mode)
        for wrapper in wrappers(self.model).values():  # PEFT asks these to take all active adapters, and fails
            if adapter_name not in wrapper.active_adapters:
                wrapper.delete_adapter(adapter_name, wrapper.active_adapters)
        super().delete_adapter(adapter_name)

    # Merging. A merged model has one head: its adapters' own, or the base's if they have none. PEFT keeps the active
    # adapter's, whatever is merged.

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        self._check_loaded()
        for layer in red_layers(self.model).values():
            layer.check_mergeable()

    def _merged_heads(self, adapter_names: list[str] | None, head: str | None) -> dict[str, nn.Module]:
        """What the modules to save are once these adapters are merged too, or the one that brings `head`."""
        names = [name for layer in red_layers(self.model).values() for name in layer.merged_adapters]
        names += self.active_adapters if adapter_names is None else adapter_names
        self._check_known([*names, *([head] if head else [])])
        return common_heads(self.model, [head] if head else names)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, head: str | None = None
    ) -> None:
        """Merge adapters (the active ones by default) into the base's weights, until `unmerge_adapter`.

        The active head has to be theirs; where they bring different heads, `head` names the adapter whose head it is.
        Raises `UserError` otherwise, for unknown names, and for what `RedLayer.merge` refuses.
        """
        acting = common_heads(self.model, self.active_adapters)
        for name, module in self._merged_heads(adapter_names, head).items():
            if not same_tensors(module.state_dict(), acting[name].state_dict()):
                raise UserError(
                    f"the active {name} (modules_to_save) is not that of the adapters to merge: call set_adapter with "
                    "the adapter whose head is to act first"
                )
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        head: str | None = None,
    ) -> nn.Module:
        """Merge adapters (the active ones by default) into the base's weights and return the plain model.

        Its head is theirs, or the base's own if they have none; where they bring different heads, `head` names the
        adapter whose head to keep. Layers without a bias get one where the adapters need it, and the configuration the
        switch that says so (Llama: `mlp_bias=True`, which adds biases of zeros beside). A warning where a checkpoint
        would not load as this model: no such switch, or layers that share their weights (Zamba). Raises `UserError` as
        `merge_adapter` does; the adapted model still works then.
        """
        heads = self._merged_heads(adapter_names, head)
        super().merge_adapter(adapter_names, safe_merge)
        shared = self._shared_sites()
        with_bias = sorted(
            name
            for name, layer in red_layers(self.model).items()
            if layer.originals[1] is None and layer.get_base_layer().bias is not None
        )
        put_modules(self.model, heads)
        if heads and not reads_tying(self.model):
            # This sets `tie_word_embeddings` to False where the embeddings are two tensors: right for heads that were
            # trained, but not for a base that came with two, nor for a model that computes something else then.
            model = super().merge_and_unload(progressbar, adapter_names=[])
        else:
            model = super().unload()
        allow_fast_path(model, True)
        if with_bias and not (isinstance(model, PreTrainedModel) and add_biases(model, with_bias)):
            warnings.warn(
                f"{len(with_bias)} layers without a bias now have one ({shorten_list(with_bias)}): the model in "
                "memory is right, but its configuration has no place for them, so a checkpoint of it loads without "
                "these biases. `redpeft fold` writes a checkpoint that is right, or says why there is none",
                stacklevel=2,
            )
        if shared:
            warnings.warn(
                f"{len(shared)} layers no longer share their weights with others ({shorten_list(shared)}): the model "
                "in memory is right, but a checkpoint of it may load with shared weights",
                stacklevel=2,
            )
        return model

    def _shared_sites(self) -> list[str]:
        """The sites whose weight, as it is without the adapter, is another module's too."""
        uses = Counter(
            id(tensor)
            for module in self.model.modules()
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        )
        return [name for name, layer in red_layers(self.model).items() if uses[id(layer.originals[0])] > 1]

    def unload(self) -> nn.Module:
        """The base model as it was: unmerged, and with its own head, where PEFT leaves the active adapter's in."""
        self.unmerge_adapter()
        put_modules(self.model, {name: wrapper.original_module for name, wrapper in wrappers(self.model).items()})
        model = super().unload()
        allow_fast_path(model, True)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around `forward` and `generate`: `adapter_names` gives each sequence its adapter."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise UserError("Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first")
        layers = red_layers(self.model).values()
        if any(layer.merged for layer in layers):
            raise UserError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        batch = MixedBatch(names, list(self.peft_config))
        heads = {
            head: partial(run_by_adapter, {**head.modules_to_save, BASE: head.original_module}, batch)
            for head in wrappers(self.model).values()
        }
        with replaced("editor", batch.editors(layers)), replaced("forward", heads):
            yield


@torch.compiler.disable
def refuse_missing_values(model: nn.Module, args: Any) -> None:
    """A hook before the forward passes of a model with an adapter of version 1, which removes itself. Raises
    `UserError` while an edit has no values."""
    for layer in red_layers(model).values():
        for edit in layer.edits:
            if edit.offset.is_meta or bool(edit.offset.isnan().all()):
                raise UserError(
                    "this adapter's configuration is of format 1 and its values were never loaded: load the folder "
                    "with PeftModel.from_pretrained, and save it again to convert it"
                )
    remove_hook(model, refuse_missing_values)


def refuse_lost_biases(generation: Any) -> None:
    """Make TRL's `VLLMGeneration` refuse a model whose biases would be lost on its way to vLLM: it merges the adapter
    and sends the model's parameters, and vLLM ignores a bias that its own layer has no place for."""
    init = generation.__init__

    @wraps(init)
    def checked(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        for layer in red_layers(model).values():
            without = getattr(layer.get_base_layer(), "bias", None) is None
            if without and any(edit.bias.requires_grad for edit in layer.active_edits):
                raise UserError(
                    f"use_vllm cannot train RED's biases: TRL would send vLLM a bias for {layer.site}, "
                    "which has none in the base model, and vLLM would sample without it, from another policy than the "
                    "one that is trained; set use_vllm=False and rollout_func=redpeft.serving.rollouts.Rollouts(base)"
                )
        init(self, model, *args, **kwargs)

    generation.__init__ = checked


def _either_name(key: str) -> str:
    """The key of a tensor, the same for `scale_offset` and `scale`, with PEFT's prefix and without."""
    return key.removeprefix("base_model.model.").removesuffix("_offset")


def _check_plain(model: nn.Module) -> None:
    if isinstance(unwrapped(model), PeftModel):
        raise UserError(
            "this model is a PeftModel: add to it by model.add_adapter(name, config), or give the base model, which "
            "model.unload() or model.merge_and_unload() returns"
        )
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, RedLayer):
            raise UserError(
                f"RED cannot be mixed with other methods in one model, and {name} is a layer of another "
                f"({type(module).__module__}): merge that adapter (merge_and_unload), or load the base model anew"
            )
