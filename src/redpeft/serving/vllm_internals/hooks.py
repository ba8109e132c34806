"""What the plug-in puts in the place of vLLM's own, in each of its processes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.models import supports_lora
from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from redpeft.adapters.files import CONFIG_NAME, read_config
from redpeft.serving.folder import leads_out
from redpeft.serving.options import KEY, Options
from redpeft.serving.vllm_internals import frontend, metrics
from redpeft.serving.vllm_internals.engine import RedWorkerManager


def load_lora_model(
    runner: LoRAModelRunnerMixin, model: nn.Module, vllm_config: VllmConfig, device: torch.device
) -> nn.Module:
    """In the place of the runner's own: a server of RED alone needs nothing of the model's class."""
    if not supports_lora(model) and not Options.of(vllm_config.additional_config).only:
        raise ValueError(
            f"vLLM's {type(model).__name__} does not support LoRA; RED adapters alone can be served with it "
            f'(--additional-config \'{{"{KEY}": {{"only": true}}}}\')'
        )
    runner.lora_manager = RedWorkerManager(vllm_config, device, getattr(model, "embedding_modules", {}))
    return runner.lora_manager.create_lora_manager(model, vllm_config)


def _without_lora(post_init: Callable[[Any], None]) -> Callable[[Any], None]:
    """A mixture of experts as it runs without LoRA, in a server of RED alone: LoRA's kernels need a GPU."""

    @functools.wraps(post_init)
    def after_init(config: FusedMoEConfig) -> None:
        told = get_current_vllm_config_or_none()
        if told is not None and Options.of(told.additional_config).only:
            config.is_lora_enabled = False
        post_init(config)

    return after_init


_generations: dict[int, int] = {}  # how often each adapter was loaded into this engine


def _counted(add_lora: Callable[..., bool]) -> Callable[..., bool]:
    """The engine's `add_lora`, which counts: what was cached with what an adapter was before is out of date.

    The engine reads the method's annotations to decode its arguments, so these have to stay.
    """

    @functools.wraps(add_lora)
    def add(core: EngineCore, lora_request: LoRARequest) -> bool:
        loaded = add_lora(core, lora_request)
        _generations[lora_request.lora_int_id] = _generations.get(lora_request.lora_int_id, 0) + 1
        return loaded

    return add


def lora_hash_keys(request: Any) -> list[tuple[Any, ...]]:
    """In the place of the prefix cache's own, which knows an adapter by name and path: by what was loaded too."""
    lora = request.lora_request
    if not lora:
        return []
    return [("lora", lora.lora_name, lora.lora_path, lora.lora_int_id, _generations.get(lora.lora_int_id, 0))]


def _with_red(request_of: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's resolver of adapters in a folder, which passes over all but LoRA: RED too, if of the same base's name."""

    @functools.wraps(request_of)
    async def find(
        resolver: FilesystemResolver, lora_name: str, lora_path: str, base_model_name: str
    ) -> LoRARequest | None:
        found = await request_of(resolver, lora_name, lora_path, base_model_name)
        if found is not None or leads_out(lora_name) or not (Path(lora_path) / CONFIG_NAME).is_file():
            return found
        config = read_config(lora_path)
        base = config.get("base_model_name_or_path") or base_model_name  # whether it fits is seen when it is loaded
        is_ours = config["peft_type"] == "REDPEFT" and base == base_model_name
        return LoRARequest(lora_name, 1, lora_path) if is_ours else None  # the server gives it a number of its own

    return find


def install() -> None:
    """Put all of it in place; a second call changes nothing."""
    if LoRAModelRunnerMixin.load_lora_model is load_lora_model:
        return
    LoRAModelRunnerMixin.load_lora_model = load_lora_model
    FusedMoEConfig.__post_init__ = _without_lora(FusedMoEConfig.__post_init__)
    EngineCore.add_lora = _counted(EngineCore.add_lora)
    kv_cache_utils._gen_lora_extra_hash_keys = lora_hash_keys
    frontend.install()
    metrics.install()
    FilesystemResolver._get_lora_req_from_path = _with_red(FilesystemResolver._get_lora_req_from_path)
