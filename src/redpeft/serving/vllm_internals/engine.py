"""RED adapters in vLLM's own adapter managers.

vLLM keeps adapters in a cache on the CPU, moves those of a batch into slots and tells every layer each token's slot.
The managers here extend it: they attach a table of edits to each site, read RED adapters, and fill the tables where
vLLM fills the slots of its LoRA layers. A request has one adapter, LoRA or RED; the other kind does nothing for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from redpeft.adapters import Adapter, EffectiveEdit
from redpeft.errors import UserError, shorten_list
from redpeft.serving.options import KEY, Options
from redpeft.serving.served_base import ServedBase, find_module, widths_of_sites
from redpeft.serving.served_folder import ServedFolder, check_numbers, is_red, read
from redpeft.serving.table import SlotTable
from redpeft.serving.vllm_internals import adapter_metrics
from redpeft.serving.vllm_internals.checks import FOLD, check_model, check_site, is_partial
from redpeft.tuner.sites import SHARED_EXPERT

logger = init_logger("vllm.redpeft")

REMEMBERED = 4096  # adapters of the latest batches, by number; far more than requests are answered at a time
CHECK = "redpeft-check:"  # in place of a path: an adapter of the self-check, followed by the site that it edits


class RedAdapter(LoRAModel):
    """What vLLM keeps of a RED adapter: no LoRA weights, and its edits by the engine's module paths."""

    def __init__(self, number: int, edits: dict[str, EffectiveEdit]) -> None:
        super().__init__(number, rank=0, loras={})
        self.edits = edits


class RequestInMemory(LoRARequest):
    """A request for an adapter in memory, for an engine in the same process. Its path is read by people alone."""

    adapter: Adapter | None = None


def check_edit(width: int) -> EffectiveEdit:
    """The self-check's edit: it changes outputs of any size, also small ones and zeros, and stays within fp16."""
    signs = 1.0 - 2.0 * (torch.arange(width) % 2)
    return EffectiveEdit(torch.full((width,), -4.0), signs)


class RedModelManager(LRUCacheLoRAModelManager):
    """vLLM's cache and slots, and a table of edits at each site."""

    def __init__(self, model: nn.Module, *args: Any, vllm_config: VllmConfig, **kwargs: Any) -> None:
        self.options = Options.of(vllm_config.additional_config)
        self.vllm_config = vllm_config
        model_config = vllm_config.model_config
        self.hf_config = model_config.hf_config
        self.base = ServedBase(
            model_config.model, self.hf_config, model_config.revision, vllm_config.load_config.download_dir
        )
        self.widths: dict[str, int] = {}  # by site; also of sites on other pipeline ranks
        self.modules_of_sites: dict[str, str] = {}  # by site: the engine's module, if it is on this rank
        self.tables: dict[str, SlotTable] = {}  # by that module
        self.problem = ""  # why no RED adapter can be served
        self.problems: dict[str, str] = {}  # by site: why it cannot be edited
        self.counts = vllm_config.parallel_config.rank == 0  # one rank counts; all do the same
        for name in ("is_3d_moe_weight", "is_non_gated_moe"):  # vLLM reads them of every mixture of experts
            if not hasattr(model, name):
                setattr(model, name, getattr(SupportsLoRA, name))
        super().__init__(model, *args, vllm_config=vllm_config, **kwargs)

    def _create_lora_modules(self) -> None:
        if not self.options.only:
            super()._create_lora_modules()
        try:
            self._attach_tables()
        except UserError as error:
            if self.options.explicit:
                raise
            self.problem = str(error)
            logger.warning("RED adapters cannot be served with this model: %s", error)

    def _attach_tables(self) -> None:
        check_model(self.model, self.vllm_config)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        widths, problems = widths_of_sites(self.hf_config, self.options.sites)
        found: dict[str, str] = {}
        tables: dict[str, SlotTable] = {}
        for site, width in widths.items():
            try:
                name = self._find(site, modules)
                if name is None and not any(isinstance(module, PPMissingLayer) for module in modules.values()):
                    raise UserError(f"vLLM's {type(self.model).__name__} has no module {site} to edit; {FOLD}")
                if name is not None:
                    tables[name] = tables.get(name) or self._table(name, modules[name], width)
                    found[site] = name
            except UserError as error:
                problems[site] = str(error)
        if problems and (self.options.folder is None or problems.keys() >= widths.keys()):
            raise UserError(next(iter(problems.values())))
        for name, table in tables.items():
            modules[name].register_forward_hook(table.hook)
            if (shared := _shared_expert(name, modules)) is not None:
                shared.register_forward_hook(table.added_hook)
        if problems:  # a folder may hold adapters of another base model, which must not stop the others
            reason = next(iter(problems.values()))
            logger.warning("adapters that edit %s will be refused: %s", shorten_list(list(problems)), reason)
        self.modules_of_sites, self.tables, self.problems = found, tables, problems
        self.widths = {site: width for site, width in widths.items() if site not in problems}

    def _find(self, site: str, modules: dict[str, nn.Module]) -> str | None:
        """The engine's module of a site: by the engine's renaming of checkpoint names, or by the site's own name."""
        names = {name for name in modules if not name.endswith(".base_layer")}
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        renamed = mapper and mapper.get_rename_mapper().map_name(f"{site}.weight")
        found = find_module(renamed.removesuffix(".weight"), names) if renamed else None
        return found or find_module(site, names) or self._find_experts(site, modules, names)

    def _find_experts(self, site: str, modules: dict[str, nn.Module], names: set[str]) -> str | None:
        """A layer's mixture of experts, to which vLLM gives another name (`block_sparse_moe` for `mlp`)."""
        layer = find_module(site.rpartition(".")[0], names)
        if layer is None or not layer.rpartition(".")[2].isdigit():
            return None
        children = modules[layer].named_children()
        blocks = [name for name, child in children if any(isinstance(part, MoERunner) for part in child.modules())]
        return f"{layer}.{blocks[0]}" if len(blocks) == 1 else None

    def _table(self, name: str, module: nn.Module, width: int) -> SlotTable:
        """A new table for a module. `UserError`: its output is neither the site's nor this rank's part of a sum."""
        check_site(name, module, self.vllm_config)
        wrapper = self._get_punica_wrapper(name)
        if wrapper is None:
            raise UserError(f"vLLM serves no adapters in {name}, only in the language model; {FOLD}")
        wrapper._token_lora_indices.fill_(-1)  # vLLM leaves it uninitialised until the first batch
        return SlotTable(self.lora_slots, width, wrapper._token_lora_indices, partial=is_partial(module))

    def edits_of(self, adapter: Adapter) -> dict[str, EffectiveEdit]:
        """An adapter's edits by the engine's modules, without those on other pipeline ranks.

        Raises `UserError` for a head, for sites without a table, and for widths or weights of another model.
        """
        if self.problem:
            raise UserError(f"{adapter.folder}: cannot be served with this model: {self.problem}")
        if adapter.head:
            raise UserError(f"{adapter.folder}: it has a head of its own ({shorten_list(list(adapter.head))}); {FOLD}")
        found = {path: find_module(path, self.widths) for path in adapter.edits}
        sites = {path: site for path, site in found.items() if site is not None}
        if unknown := [path for path in found if path not in sites]:
            raise UserError(f"{adapter.folder}: {self.problems.get(unknown[0]) or self._no_tables(unknown)}")
        for path, site in sites.items():
            width = adapter.edits[path].scale.numel()
            if width != self.widths[site]:
                expected = self.widths[site]
                raise UserError(f"{adapter.folder}: {path} has width {width}, and {expected} in this base model")
        check_numbers(adapter, self.vllm_config.model_config.dtype)
        self.base.check(adapter, sites)
        return {
            self.modules_of_sites[site]: EffectiveEdit(*(vector.float() for vector in adapter.edits[path]))
            for path, site in sites.items()
            if site in self.modules_of_sites
        }

    def _no_tables(self, unknown: list[str]) -> str:
        plugin_options = f'with those sites in --additional-config \'{{"{KEY}": {{"sites": [...]}}}}\''
        return (
            f"it edits {shorten_list(unknown)}, and this server has tables for {shorten_list(list(self.widths))}: "
            f"start it again{'' if self.options.folder else f' {plugin_options}'}, or {FOLD}"
        )

    def activate_adapter(self, lora_id: int) -> bool:
        held = list(self.lora_index_to_id)
        fresh = super().activate_adapter(lora_id)
        if fresh:
            slot = self.lora_index_to_id.index(lora_id)
            adapters = self._registered_adapters.cache
            edits = getattr(adapters[lora_id], "edits", {})
            for name, table in self.tables.items():
                table.fill(slot, edits.get(name))
            self.count(adapters[lora_id], "adapter_slot_loads")
            if held[slot] is not None:
                self.count(adapters[held[slot]], "adapter_slot_evictions")
        return fresh

    def remove_oldest_adapter(self) -> bool:
        """As vLLM's own method, which does not say which adapter it removed."""
        if len(self._registered_adapters) == 0:
            return False
        _, adapter = self._registered_adapters.popitem()
        self.count(adapter, "adapter_evictions")
        return True

    def count(self, adapter: LoRAModel, what: str) -> None:
        """Count an adapter's load or eviction. The adapters of vLLM's warm-up have no names and are not counted."""
        if self.counts and (name := getattr(adapter, "served_name", None)) is not None:
            adapter_metrics.counters.add(name, **{what: 1})

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        if lora_model.loras:  # vLLM's own method fails without any
            super()._create_merged_loras_inplace(lora_model)


def _shared_expert(experts: str, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The module whose output a block adds to that of its `experts`: both are one site, as `tuner.sites` says."""
    if not any(isinstance(part, MoERunner) for part in modules[experts].modules()):
        return None
    return modules.get(f"{experts.rpartition('.')[0]}.{SHARED_EXPERT}")


class RedWorkerManager(LRUCacheWorkerLoRAManager):
    """vLLM's loading on demand, extended to RED adapters."""

    _manager_cls = RedModelManager
    _adapter_manager: RedModelManager

    def create_lora_manager(self, model: nn.Module, vllm_config: VllmConfig) -> nn.Module:
        self._requests: dict[int, LoRARequest] = {}
        self._adapter_manager = self._manager_cls(
            model,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            vocab_size=self.vocab_size,
            lora_config=self.lora_config,
            device=self.device,
            vllm_config=vllm_config,
        )
        return self._adapter_manager.model

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        manager = self._adapter_manager
        if lora_request.lora_path.startswith(CHECK):
            site = lora_request.lora_path.removeprefix(CHECK)
            module = manager.modules_of_sites.get(site)  # None: on another pipeline rank
            return RedAdapter(lora_request.lora_int_id, {module: check_edit(manager.widths[site])} if module else {})
        if isinstance(lora_request, RequestInMemory) and lora_request.adapter is not None:
            return RedAdapter(lora_request.lora_int_id, manager.edits_of(lora_request.adapter))
        adapter = self._read_adapter(lora_request)
        adapter.served_name = lora_request.lora_name
        manager.count(adapter, "adapter_loads")
        return adapter

    def _read_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        options, path = self._adapter_manager.options, Path(get_adapter_absolute_path(lora_request.lora_path))
        if options.folder is not None:
            ServedFolder(options.folder).check(path)
        if is_red(path):
            adapter = read(path, self._adapter_manager.widths)
            return RedAdapter(lora_request.lora_int_id, self._adapter_manager.edits_of(adapter))
        if options.only:
            raise UserError(f"{path}: not a RED adapter, and this server was started for RED adapters only")
        return super()._load_adapter(lora_request)

    def set_active_adapters(self, requests: Iterable[LoRARequest], mapping: Any) -> None:
        """vLLM passes the batch's adapters as a set, compared by name. An adapter that was replaced while requests for
        it were being answered has the same name as its successor; the numbers of the mapping tell them apart."""
        named = {request.lora_int_id: request for request in requests}
        for number in set(mapping.prompt_mapping if mapping is not None else ()) - named.keys() - {0}:
            if number in self._requests:
                named[number] = self._requests[number]
        super().set_active_adapters(named.values(), mapping)

    def _apply_adapters(self, lora_requests: Iterable[LoRARequest]) -> None:
        """A batch uses its adapters as they are: `add_adapter` has already replaced those to be loaded in place."""
        super()._apply_adapters([msgspec.structs.replace(each, load_inplace=False) for each in lora_requests])

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        loaded = self._touch(lora_request) or super().add_adapter(lora_request)
        self._requests.pop(lora_request.lora_int_id, None)  # so that it becomes the latest
        self._requests[lora_request.lora_int_id] = lora_request
        if len(self._requests) > REMEMBERED:
            del self._requests[next(iter(self._requests))]
        return loaded

    def _touch(self, lora_request: LoRARequest) -> bool:
        """Give a slot to an adapter that is in memory already; False if it has to be loaded. vLLM's own method copies
        a list of all adapters for each adapter of each batch: with a thousand in memory, a quarter of the time."""
        manager, number = self._adapter_manager, lora_request.lora_int_id
        if lora_request.load_inplace or number not in manager._registered_adapters:
            return False
        with gpu_sync_allowed():
            manager.get_adapter(number)  # marks it as the latest of the cache
            manager.activate_adapter(number)
        return True
