"""The part of the plug-in in vLLM's API server: the adapters of a folder are models, as they are at each request.

With `engine`, the only module that touches vLLM's private names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from redpeft.serving.folder import Source, stamp
from redpeft.serving.options import Options


class FolderResolver(LoRAResolver):
    """Finds adapters below a folder by name, and remembers what their files were when they were loaded."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._stamps: dict[str, tuple[int, ...]] = {}

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        path = self.source.find(lora_name)
        if path is None:
            return None
        self._stamps[lora_name] = stamp(path)  # before it is read: a later change is seen then
        return LoRARequest(lora_name, 1, str(path))  # vLLM gives it a number of its own

    def is_current(self, request: LoRARequest) -> bool:
        """Whether an adapter is still what was loaded; always, for one that was not found here."""
        known = self._stamps.get(request.lora_name)
        return known is None or known == stamp(Path(request.lora_path))


class CurrentRequests(dict[str, LoRARequest]):
    """vLLM's adapters by name. One whose files have changed is not among them, so that it is looked up again."""

    def __init__(self, resolver: FolderResolver) -> None:
        super().__init__()
        self.resolver = resolver

    def __contains__(self, name: object) -> bool:
        request = self.get(name) if isinstance(name, str) else None
        return request is not None and self.resolver.is_current(request)


def _with_folder(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def build(models: OpenAIServingModels, engine_client: Any, *args: Any, **kwargs: Any) -> None:
        init(models, engine_client, *args, **kwargs)
        folder = Options.of(engine_client.vllm_config.additional_config).folder
        if folder is not None:
            resolver = FolderResolver(Source(folder))
            models.lora_resolvers.append(resolver)
            models.lora_requests = CurrentRequests(resolver)

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


def install() -> None:
    OpenAIServingModels.__init__ = _with_folder(OpenAIServingModels.__init__)
    OpenAIServingModels.show_available_models = _with_names(OpenAIServingModels.show_available_models)
