"""The functions of vLLM that the plug-in replaces or wraps, in each of vLLM's processes."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.models import supports_lora
from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine import core as engine_core
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from redpeft.adapters.folder import read_config
from redpeft.errors import UserError
from redpeft.serving.options import KEY, Options
from redpeft.serving.served_folder import ServedFolder
from redpeft.serving.vllm_internals import adapter_metrics, frontend, self_check
from redpeft.serving.vllm_internals.engine import RedWorkerManager
from redpeft.storage import CONFIG_NAME


def load_lora_model(
    runner: LoRAModelRunnerMixin, model: nn.Module, vllm_config: VllmConfig, device: torch.device
) -> nn.Module:
    """Replaces the runner's method. With RED adapters only, the model's class need not support LoRA."""
    if not supports_lora(model) and not Options.of(vllm_config.additional_config).only:
        raise ValueError(
            f"vLLM's {type(model).__name__} does not support LoRA; only RED adapters can be served with it "
            f'(--additional-config \'{{"{KEY}": {{"only": true}}}}\')'
        )
    runner.lora_manager = RedWorkerManager(vllm_config, device, getattr(model, "embedding_modules", {}))
    return runner.lora_manager.create_lora_manager(model, vllm_config)


def _without_lora(post_init: Callable[[Any], None]) -> Callable[[Any], None]:
    """A mixture of experts runs as without LoRA where there are RED adapters only: LoRA's kernels need a GPU."""

    @functools.wraps(post_init)
    def after_init(config: FusedMoEConfig) -> None:
        current = get_current_vllm_config_or_none()
        if current is not None and Options.of(current.additional_config).only:
            config.is_lora_enabled = False
        post_init(config)

    return after_init


_generations: dict[int, int] = {}  # by adapter number: how often it was loaded into this engine


def _returning_refusals(add_lora: Callable[..., bool]) -> Callable[..., bool | str]:
    """The model runner's `add_lora`, which returns the reason where it refuses an adapter. An exception would leave a
    worker's process as another type, with the whole traceback in the log."""

    @functools.wraps(add_lora)
    def add(runner: LoRAModelRunnerMixin, lora_request: LoRARequest) -> bool | str:
        try:
            return add_lora(runner, lora_request)
        except UserError as error:
            return str(error)

    return add


def _counted(add_lora: Callable[..., bool]) -> Callable[..., bool | str]:
    """The engine's `add_lora`, which returns what the workers return, and counts the loads: the prefix cache must not
    use what was computed with an adapter's former weights.

    The engine reads this method's annotations to decode its arguments, so they have to stay.
    """

    @functools.wraps(add_lora)
    def add(core: EngineCore, lora_request: LoRARequest) -> bool | str:
        outcomes = core.collective_rpc("add_lora", args=(lora_request,))
        for outcome in outcomes:
            if isinstance(outcome, str):
                core.remove_lora(lora_request.lora_int_id)  # from the ranks that accepted it
                return outcome
        _generations[lora_request.lora_int_id] = _generations.get(lora_request.lora_int_id, 0) + 1
        return all(outcomes)

    return add


_starting: list[EngineCore] = []


def _noted(initialize: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(initialize)
    def initialize_kv_caches(core: EngineCore, *args: Any, **kwargs: Any) -> Any:
        _starting[:] = [core]
        return initialize(core, *args, **kwargs)

    return initialize_kv_caches


def _checked(last: Callable[[], None]) -> Callable[[], None]:
    """Runs the self-check after the last call of the engine's `__init__`. The `__init__` itself loads this plug-in, so
    it is too late to wrap that."""

    @functools.wraps(last)
    def end_of_init() -> None:
        last()
        self_check.run(_starting.pop())

    return end_of_init


def lora_hash_keys(request: Any) -> list[tuple[Any, ...]]:
    """Replaces the prefix cache's function, which tells adapters apart by name and path: by their loads too."""
    lora = request.lora_request
    if not lora:
        return []
    return [("lora", lora.lora_name, lora.lora_path, lora.lora_int_id, _generations.get(lora.lora_int_id, 0))]


def _with_red(request_of: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's resolver of adapters in a folder, which finds LoRA only: RED adapters too, if they name the same base."""

    @functools.wraps(request_of)
    async def find(
        resolver: FilesystemResolver, lora_name: str, lora_path: str, base_model_name: str
    ) -> LoRARequest | None:
        found = await request_of(resolver, lora_name, lora_path, base_model_name)
        if found is not None or not await asyncio.to_thread(_is_named, resolver, lora_name, lora_path):
            return found
        config = read_config(lora_path)
        base = config.get("base_model_name_or_path") or base_model_name  # loading checks whether it fits
        is_ours = config["peft_type"] == "REDPEFT" and base == base_model_name
        return LoRARequest(lora_name, 1, lora_path) if is_ours else None  # the server assigns the final number

    return find


def _is_named(resolver: FilesystemResolver, lora_name: str, lora_path: str) -> bool:
    """Whether the adapter at this path has this name: in the resolver's folder, or in a repository on the Hub."""
    if hasattr(resolver, "lora_cache_dir"):
        return ServedFolder(Path(resolver.lora_cache_dir)).find(lora_name) == Path(lora_path)
    return PurePosixPath(lora_name).as_posix() == lora_name and (Path(lora_path) / CONFIG_NAME).is_file()


def install() -> None:
    """Replace and wrap them; a second call changes nothing."""
    if LoRAModelRunnerMixin.load_lora_model is load_lora_model:
        return
    LoRAModelRunnerMixin.load_lora_model = load_lora_model
    FusedMoEConfig.__post_init__ = _without_lora(FusedMoEConfig.__post_init__)
    LoRAModelRunnerMixin.add_lora = _returning_refusals(LoRAModelRunnerMixin.add_lora)
    EngineCore._initialize_kv_caches = _noted(EngineCore._initialize_kv_caches)
    engine_core.enable_envs_cache = _checked(engine_core.enable_envs_cache)
    EngineCore.add_lora = _counted(EngineCore.add_lora)
    kv_cache_utils._gen_lora_extra_hash_keys = lora_hash_keys
    frontend.install()
    adapter_metrics.install()
    FilesystemResolver._get_lora_req_from_path = _with_red(FilesystemResolver._get_lora_req_from_path)
