"""The private names of vLLM that the plug-in leans on are there and take what they took: or this fails."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import redpeft
from redpeft.errors import UserError
from redpeft.serving import plugin

LOOK = """
import inspect, json
from vllm.lora import model_manager, worker_manager, lora_model, request
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.model_executor.layers import linear
from vllm.entrypoints.serve.instrumentator import metrics
from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.sample import sampler
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.v1.metrics.loggers import PrometheusStatLogger
manager, worker = model_manager.LRUCacheLoRAModelManager, worker_manager.LRUCacheWorkerLoRAManager
print(json.dumps({
    f"{owner.__name__.rpartition('.')[2]}.{name}": list(inspect.signature(getattr(owner, name)).parameters)
    for owner, names in [
        (manager, "__init__ _create_lora_modules activate_adapter _create_merged_loras_inplace _get_punica_wrapper"),
        (manager, "remove_oldest_adapter list_adapters"),
        (model_manager.AdapterLRUCache, "popitem"),
        (worker, "__init__ create_lora_manager _load_adapter set_active_adapters _apply_adapters add_adapter"),
        (lora_model.LoRAModel, "__init__"),
        (LoRAModelRunnerMixin, "load_lora_model add_lora"),
        (EngineCore, "add_lora remove_lora collective_rpc _initialize_kv_caches"),
        (EngineCore, "preprocess_add_request add_request step step_with_batch_queue post_step"),
        (AsyncLLM, "add_lora"),
        (LLMEngine, "add_lora"),
        (kv_cache_utils, "_gen_lora_extra_hash_keys"),
        (OpenAIServingModels, "__init__ show_available_models resolve_lora load_lora_adapter unload_lora_adapter"),
        (OpenAIServingModels, "_check_load_lora_adapter_request"),
        (PrometheusStatLogger, "record"),
        (BaseServing, "_maybe_get_adapters"),
        (OutputProcessor, "_update_stats_from_output"),
        (metrics, "get_prometheus_registry"),
        (FilesystemResolver, "_get_lora_req_from_path"),
        (PunicaWrapperBase, "_update_base_metadata"),
    ]
    for name in names.split()
}))
assert "self._token_lora_indices[: base_indices.shape[0]].copy_(" in inspect.getsource(PunicaWrapperBase)
made = inspect.getsource(RequestState.__init__)
assert all(f"self.{name} = " in made for name in ("lora_name", "prompt_len", "is_prefilling"))
assert "self.engine_core = " in inspect.getsource(AsyncLLM.__init__)  # its processes are started there
assert inspect.getsource(EngineCore.__init__).rstrip().endswith("enable_envs_cache()")  # the check comes after it
assert callable(sampler.batched_count_greater_than.__wrapped__)
assert "registry = get_prometheus_registry()" in inspect.getsource(metrics.attach_router)
"""
NAMES = {
    "LRUCacheLoRAModelManager.__init__": "self model max_num_seqs max_num_batched_tokens vocab_size lora_config "
    "device vllm_config",
    "LRUCacheLoRAModelManager._create_lora_modules": "self",
    "LRUCacheLoRAModelManager.activate_adapter": "self lora_id",
    "LRUCacheLoRAModelManager._create_merged_loras_inplace": "self lora_model",
    "LRUCacheLoRAModelManager._get_punica_wrapper": "self module_name",
    "LRUCacheLoRAModelManager.remove_oldest_adapter": "self",
    "AdapterLRUCache.popitem": "self remove_pinned",
    "LRUCacheLoRAModelManager.list_adapters": "self",
    "LRUCacheWorkerLoRAManager.__init__": "self vllm_config device embedding_modules lora_model_cls",
    "LRUCacheWorkerLoRAManager.create_lora_manager": "self model vllm_config",
    "LRUCacheWorkerLoRAManager._load_adapter": "self lora_request",
    "LRUCacheWorkerLoRAManager.set_active_adapters": "self requests mapping",
    "LRUCacheWorkerLoRAManager._apply_adapters": "self lora_requests",
    "LRUCacheWorkerLoRAManager.add_adapter": "self lora_request",
    "LoRAModel.__init__": "self lora_model_id rank loras is_3d_lora_weight modules_to_save",
    "LoRAModelRunnerMixin.load_lora_model": "self model vllm_config device",
    "LoRAModelRunnerMixin.add_lora": "self lora_request",
    "EngineCore.add_lora": "self lora_request",
    "EngineCore.remove_lora": "self lora_id",
    "EngineCore.collective_rpc": "self method timeout args kwargs",
    "EngineCore._initialize_kv_caches": "self vllm_config",
    "EngineCore.preprocess_add_request": "self request",
    "EngineCore.add_request": "self request request_wave",
    "EngineCore.step": "self",
    "EngineCore.step_with_batch_queue": "self",
    "EngineCore.post_step": "self model_executed",
    "AsyncLLM.add_lora": "self lora_request",
    "LLMEngine.add_lora": "self lora_request",
    "kv_cache_utils._gen_lora_extra_hash_keys": "request",
    "OpenAIServingModels.__init__": "self engine_client base_model_paths lora_modules",
    "OpenAIServingModels.show_available_models": "self",
    "OpenAIServingModels.resolve_lora": "self lora_name",
    "OpenAIServingModels.load_lora_adapter": "self request base_model_name",
    "OpenAIServingModels.unload_lora_adapter": "self request",
    "OpenAIServingModels._check_load_lora_adapter_request": "self request",
    "PrometheusStatLogger.record": "self scheduler_stats iteration_stats mm_cache_stats engine_idx",
    "BaseServing._maybe_get_adapters": "self request supports_default_mm_loras",
    "OutputProcessor._update_stats_from_output": "self req_state engine_core_output engine_core_timestamp "
    "iteration_stats",
    "metrics.get_prometheus_registry": "",
    "FilesystemResolver._get_lora_req_from_path": "self lora_name lora_path base_model_name",
    "PunicaWrapperBase._update_base_metadata": "self mapping lora_index_to_id max_loras vocab_size",
}


@pytest.mark.serving
def test_the_names_are_there_and_take_what_they_took():
    run = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert {name: " ".join(parameters) for name, parameters in found.items()} == NAMES


@pytest.mark.serving
def test_what_is_put_in_their_place_takes_the_same_and_only_once():
    from redpeft.serving.vllm_internals import hooks

    hooks.install()
    before = hooks.EngineCore.add_lora
    hooks.install()
    assert hooks.EngineCore.add_lora is before
    assert before.__annotations__["lora_request"] is hooks.LoRARequest  # the engine decodes its arguments by this
    assert list(inspect.signature(hooks.load_lora_model).parameters)[1:] == ["model", "vllm_config", "device"]


def test_no_other_package_reaches_into_vllm():
    root = Path(redpeft.__file__).parent
    reaching = {
        file.parent for file in root.rglob("*.py") if re.search(r"^\s*(import|from) vllm\b", file.read_text(), re.M)
    }
    assert reaching == {root / "serving" / "vllm_internals"}


@pytest.mark.parametrize("found", ["0.31.9", "0.33.0", "0.32.0rc1"])
def test_an_untested_version_is_refused_and_left_alone(monkeypatch, caplog, found):
    monkeypatch.setattr(plugin, "_installed", lambda: found)
    with pytest.raises(UserError, match=rf"cannot be served by vLLM {found}.* tested with 0\.32\.0 only"):
        plugin.check_version()
    plugin.register()  # importing the engine here would fail, or reach into another vLLM
    assert f"cannot be served by vLLM {found}" in caplog.text


def test_without_vllm_it_is_said(monkeypatch):
    monkeypatch.setattr(plugin, "PACKAGES", ("no-such-package",))
    with pytest.raises(UserError, match="serving needs vLLM, which is not installed"):
        plugin.check_version()


def test_a_local_build_of_a_tested_version_is_one(monkeypatch):
    monkeypatch.setattr(plugin, "_installed", lambda: "0.32.0+cpu")
    assert plugin.check_version() == "0.32.0+cpu"
