"""The part of the plug-in in vLLM's API server: the adapters of a folder are models, as they are at each request, and
who asks for one that cannot be served is told why."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from contextvars import ContextVar
from http import HTTPStatus
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelList, ModelPermission
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine

from redpeft.errors import UserError, first_line
from redpeft.serving.folder import FileSignature, Refused, ServedFolder, file_signature
from redpeft.serving.options import Options
from redpeft.storage import find_adapter

logger = init_logger("vllm.redpeft")


class FolderAdapters(dict[str, LoRARequest]):
    """vLLM's adapters by name, for a server of a folder's. One whose files have changed since it was loaded is not
    among them, so that it is looked up again; and again, if it cannot be loaded as it is now."""

    def __init__(self, source: ServedFolder) -> None:
        super().__init__()
        self.source = source
        self._stamps: dict[str, FileSignature] = {}
        self._cards: tuple[dict[str, Path], list[ModelCard]] = {}, []

    def add(self, request: LoRARequest, then: FileSignature) -> None:
        """`then`: the stamp from before the adapter was read, so that a later change is seen."""
        self[request.lora_name], self._stamps[request.lora_name] = request, then

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self._stamps[name]

    def __contains__(self, name: object) -> bool:
        request = self.get(name) if isinstance(name, str) else None
        if request is None:
            return False
        now = file_signature(Path(request.lora_path))
        if not any(now):  # its files are gone, and with them what is known of it
            del self[request.lora_name]
            return False
        return self._stamps[request.lora_name] == now

    async def cards(self, models: OpenAIServingModels) -> list[ModelCard]:
        """A card for each adapter of the folder, loaded or not. The folder is looked at in a thread, since with a
        thousand adapters in it that takes a while."""
        adapters = await asyncio.to_thread(lambda: self.source.adapters)
        if adapters is not self._cards[0]:
            base = models.base_model_paths[0].name
            for name in filter(models.is_base_model, adapters):
                logger.warning("the adapter %s is not served, since the base model has its name", name)
            self._cards = (
                adapters,
                [
                    ModelCard(id=name, root=str(self.source.root / name), parent=base, permission=[ModelPermission()])
                    for name in adapters
                    if not models.is_base_model(name)
                ],
            )
        return self._cards[1]


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
            models.lora_requests = FolderAdapters(ServedFolder(folder))
            models.lora_resolver_lock = Locks()

    return build


def _of_folder(method: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's method, or the one instead of it where the server is one of a folder's adapters."""

    @functools.wraps(method)
    async def call(models: OpenAIServingModels, *args: Any, **kwargs: Any) -> Any:
        is_folder = isinstance(models.lora_requests, FolderAdapters)
        return await (instead if is_folder else method)(models, *args, **kwargs)

    return call


async def show_available_models(models: OpenAIServingModels) -> ModelList:
    bases = await models.registry.show_available_models()
    return ModelList(data=[*bases.data, *await models.lora_requests.cards(models)])


async def resolve_lora(models: OpenAIServingModels, lora_name: str) -> LoRARequest | ErrorResponse:
    adapters = models.lora_requests
    async with models.lora_resolver_lock[lora_name]:
        if lora_name in adapters:
            return adapters[lora_name]
        path = await asyncio.to_thread(adapters.source.find, lora_name)
        if path is None:
            return _not_found(f"The model `{lora_name}` does not exist.")
        then = file_signature(path)
        request = LoRARequest(lora_name, models.lora_id_counter.inc(1), str(path))
        try:
            await models.engine_client.add_lora(request)
        except UserError as error:
            return _bad_request(f"The adapter `{lora_name}` cannot be served: {error}")
        except Exception as error:
            logger.exception("the adapter %s could not be loaded", lora_name)
            return _bad_request(f"The adapter `{lora_name}` could not be loaded: {first_line(error)}")
        adapters.add(request, then)
        return request


async def load_lora_adapter(models: OpenAIServingModels, request: Any, base_model_name: str | None = None) -> Any:
    """Load ahead of the first request what would be served by this name anyway."""
    name, path = request.lora_name, request.lora_path
    if (error := await models._check_load_lora_adapter_request(request)) is not None:
        return error
    source = models.lora_requests.source
    if not await asyncio.to_thread(_is_served, source, name, path):
        return _bad_request(
            f"{path} as '{name}': not served, since it is not below {source.root} by this name; put it there, and "
            "name it by its path below that folder"
        )
    found = await models.resolve_lora(name)
    return found if isinstance(found, ErrorResponse) else f"Success: LoRA adapter '{name}' added successfully."


def _is_served(source: ServedFolder, name: str, path: str) -> bool:
    found = source.find(name)
    try:
        return found is not None and find_adapter(path).resolve() == found.resolve()
    except (OSError, ValueError):  # no path at all
        return False


async def unload_lora_adapter(models: OpenAIServingModels, request: Any) -> ErrorResponse | str:
    name, adapters = request.lora_name, models.lora_requests
    async with models.lora_resolver_lock[name]:
        if was_loaded := adapters.get(name) is not None:
            del adapters[name]
        if await asyncio.to_thread(adapters.source.find, name) is not None:
            return (
                f"'{name}' will be read anew at the next request for it, since it is still in the folder that is "
                "served; to stop serving it, remove it from there."
            )
        if was_loaded:
            return f"'{name}' is not served any more."
        return _not_found(f"The lora adapter '{name}' cannot be found.")


def _not_found(message: str) -> ErrorResponse:
    return create_error_response(message, "NotFoundError", HTTPStatus.NOT_FOUND)


def _bad_request(message: str) -> ErrorResponse:
    return create_error_response(message, "BadRequestError", HTTPStatus.BAD_REQUEST)


def _as_checked(choose: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM looks for a request's adapter twice: to check its name, and again when the prompt is ready. One that was
    replaced in between answers as what it was when it was checked."""

    @functools.wraps(choose)
    def adapter_of(serving: BaseServing, request: Any, *args: Any, **kwargs: Any) -> LoRARequest | None:
        requests = serving.models.lora_requests
        checked = requests.get(request.model) if isinstance(requests, FolderAdapters) else None
        return checked or choose(serving, request, *args, **kwargs)

    return adapter_of


refused = Refused()
why: ContextVar[str] = ContextVar("why an adapter was refused in this request", default="")


def _remembering(add_lora: Callable[..., Any]) -> Callable[..., Any]:
    """The client's `add_lora`, which raises `UserError` for an adapter that is refused. That is said in the log once,
    and the adapter is not read again until its files change."""

    @functools.wraps(add_lora)
    async def add(client: AsyncLLM, lora_request: LoRARequest) -> bool:
        path, then = lora_request.lora_path, file_signature(Path(lora_request.lora_path))
        reason = refused.reason(path, then)
        if reason is None:
            outcome = await add_lora(client, lora_request)
            if not isinstance(outcome, str):
                return outcome
            reason = outcome
            logger.warning("refused: %s", reason)
            if any(then):  # it is there, and no name on the Hub
                refused.add(path, then, reason)
        why.set(reason)
        raise UserError(reason)

    return add


def _raising(add_lora: Callable[..., Any]) -> Callable[..., Any]:
    """As `_remembering`, of the engine of a program that has no server."""

    @functools.wraps(add_lora)
    def add(engine: LLMEngine, lora_request: LoRARequest) -> bool:
        outcome = add_lora(engine, lora_request)
        if isinstance(outcome, str):
            raise UserError(outcome)
        return outcome

    return add


def _with_reason(method: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's own loading, which calls each error one of the server (500), or gives no reason."""

    @functools.wraps(method)
    async def call(models: OpenAIServingModels, *args: Any, **kwargs: Any) -> Any:
        why.set("")
        response = await method(models, *args, **kwargs)
        return _bad_request(reason) if isinstance(response, ErrorResponse) and (reason := why.get()) else response

    return call


def install() -> None:
    models = OpenAIServingModels
    models.__init__ = _with_folder(models.__init__)
    models.show_available_models = _of_folder(models.show_available_models, show_available_models)
    models.resolve_lora = _of_folder(_with_reason(models.resolve_lora), resolve_lora)
    models.load_lora_adapter = _of_folder(_with_reason(models.load_lora_adapter), load_lora_adapter)
    models.unload_lora_adapter = _of_folder(models.unload_lora_adapter, unload_lora_adapter)
    BaseServing._maybe_get_adapters = _as_checked(BaseServing._maybe_get_adapters)
    AsyncLLM.add_lora = _remembering(AsyncLLM.add_lora)
    LLMEngine.add_lora = _raising(LLMEngine.add_lora)
