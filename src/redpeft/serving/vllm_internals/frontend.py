"""The part of the plug-in in vLLM's API server: the adapters of a folder are models, as they are at each request."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from redpeft.serving.folder import Source, stamp
from redpeft.serving.options import Options


class FolderResolver(LoRAResolver):
    """Finds adapters below a folder by name. `found`: what the files were of those that are to be loaded now."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.found: dict[str, tuple[int, ...]] = {}

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        path = self.source.find(lora_name)
        if path is None:
            return None
        self.found[lora_name] = stamp(path)  # before it is read: a later change is seen then
        return LoRARequest(lora_name, 1, str(path))  # vLLM gives it a number of its own


class CurrentRequests(dict[str, LoRARequest]):
    """vLLM's adapters by name, which it adds when they are loaded. One whose files have changed since is not among
    them, so that it is looked up again; and again, if it cannot be loaded as it is now."""

    def __init__(self, resolver: FolderResolver) -> None:
        super().__init__()
        self.resolver = resolver
        self._stamps: dict[str, tuple[int, ...]] = {}

    def __setitem__(self, name: str, request: LoRARequest) -> None:
        known = self.resolver.found.pop(name, None)
        self._stamps[name] = stamp(Path(request.lora_path)) if known is None else known
        super().__setitem__(name, request)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self._stamps[name]

    def __contains__(self, name: object) -> bool:
        request = self.get(name) if isinstance(name, str) else None
        if request is None:
            return False
        now = stamp(Path(request.lora_path))
        if not any(now):  # its files are gone, and with them what is known of it
            del self[request.lora_name]
            return False
        return self._stamps[request.lora_name] == now


class Locks(WeakValueDictionary[str, asyncio.Lock]):
    """A lock for each name that is being looked up. vLLM's own dictionary keeps one for good of every name that anyone
    has asked for, those of no adapter too."""

    def __getitem__(self, name: str) -> asyncio.Lock:
        return self.setdefault(name, asyncio.Lock())


def _with_folder(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def build(models: OpenAIServingModels, engine_client: Any, *args: Any, **kwargs: Any) -> None:
        init(models, engine_client, *args, **kwargs)
        folder = Options.of(engine_client.vllm_config.additional_config).folder
        if folder is not None:
            resolver = FolderResolver(Source(folder))
            models.lora_resolvers.append(resolver)
            models.lora_requests = CurrentRequests(resolver)
            models.lora_resolver_lock = Locks()

    return build


def _with_names(show: Callable[..., Any]) -> Callable[..., Any]:
    """The list of models with every adapter of the folder, loaded or not, and none that is gone."""

    @functools.wraps(show)
    async def list_models(models: OpenAIServingModels) -> ModelList:
        shown = await show(models)
        if not isinstance(models.lora_requests, CurrentRequests):
            return shown
        source = models.lora_requests.resolver.source
        names = dict.fromkeys(source.names)
        bases = [card for card in shown.data if models.is_base_model(card.id)]
        others = [card for card in shown.data if card not in bases and card.id not in names]
        others = [card for card in others if card.id in models.lora_requests]
        cards = [
            ModelCard(id=name, root=str(source.root / name), parent=bases[0].id, permission=[ModelPermission()])
            for name in names
        ]
        return ModelList(data=[*bases, *cards, *others])

    return list_models


def _as_checked(choose: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM looks for a request's adapter twice: to check its name, and again when the prompt is ready. One that was
    replaced in between answers as what it was when it was checked."""

    @functools.wraps(choose)
    def adapter_of(serving: BaseServing, request: Any, *args: Any, **kwargs: Any) -> LoRARequest | None:
        requests = serving.models.lora_requests
        checked = requests.get(request.model) if isinstance(requests, CurrentRequests) else None
        return checked or choose(serving, request, *args, **kwargs)

    return adapter_of


def install() -> None:
    OpenAIServingModels.__init__ = _with_folder(OpenAIServingModels.__init__)
    OpenAIServingModels.show_available_models = _with_names(OpenAIServingModels.show_available_models)
    BaseServing._maybe_get_adapters = _as_checked(BaseServing._maybe_get_adapters)
