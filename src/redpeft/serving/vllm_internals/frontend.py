"""The plug-in in vLLM's API server: the adapters of a folder are models, looked up at each request, and the answer for
an adapter that cannot be served gives the reason."""

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
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine

from redpeft.errors import UserError, first_line
from redpeft.models import read_chat_template
from redpeft.serving.options import Options
from redpeft.serving.served_folder import FileSignature, Refusals, ServedFolder, file_signature
from redpeft.storage import find_adapter

logger = init_logger("vllm.redpeft")


class FolderAdapters(dict[str, LoRARequest]):
    """vLLM's dictionary of loaded adapters by name, for a server of a folder. An adapter whose files have changed
    since it was loaded is not in it, so that it is looked up and loaded again."""

    def __init__(self, folder: ServedFolder) -> None:
        super().__init__()
        self.folder = folder
        self._signatures: dict[str, FileSignature] = {}
        self._cards: tuple[dict[str, Path], list[ModelCard]] = {}, []

    def add(self, request: LoRARequest, signature: FileSignature) -> None:
        """`signature`: from before the adapter was read, so that a later change is seen."""
        self[request.lora_name], self._signatures[request.lora_name] = request, signature

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self._signatures[name]

    def __contains__(self, name: object) -> bool:
        request = self.get(name) if isinstance(name, str) else None
        if request is None:
            return False
        now = file_signature(Path(request.lora_path))
        if not any(now):  # its files are gone
            del self[request.lora_name]
            return False
        return self._signatures[request.lora_name] == now

    async def cards(self, models: OpenAIServingModels) -> list[ModelCard]:
        """A card for each adapter of the folder, loaded or not. A thread searches the folder, since that takes time
        with a thousand adapters."""
        adapters = await asyncio.to_thread(lambda: self.folder.adapters)
        if adapters is not self._cards[0]:
            base = models.base_model_paths[0].name
            for name in filter(models.is_base_model, adapters):
                logger.warning("the adapter %s is not served, since the base model has its name", name)
            self._cards = (
                adapters,
                [
                    ModelCard(id=name, root=str(self.folder.root / name), parent=base, permission=[ModelPermission()])
                    for name in adapters
                    if not models.is_base_model(name)
                ],
            )
        return self._cards[1]


class Locks(WeakValueDictionary[str, asyncio.Lock]):
    """A lock for each name that is being looked up. vLLM's own dictionary would keep a lock for every name that was
    ever asked for, even those of no adapter."""

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


def _of_folder(method: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's method, or its replacement where the server serves the adapters of a folder."""

    @functools.wraps(method)
    async def call(models: OpenAIServingModels, *args: Any, **kwargs: Any) -> Any:
        is_folder = isinstance(models.lora_requests, FolderAdapters)
        return await (replacement if is_folder else method)(models, *args, **kwargs)

    return call


async def show_available_models(models: OpenAIServingModels) -> ModelList:
    bases = await models.registry.show_available_models()
    return ModelList(data=[*bases.data, *await models.lora_requests.cards(models)])


async def resolve_lora(models: OpenAIServingModels, lora_name: str) -> LoRARequest | ErrorResponse:
    adapters = models.lora_requests
    async with models.lora_resolver_lock[lora_name]:
        if lora_name in adapters:
            return adapters[lora_name]
        path = await asyncio.to_thread(adapters.folder.find, lora_name)
        if path is None:
            return _not_found(f"The model `{lora_name}` does not exist.")
        signature = file_signature(path)
        request = LoRARequest(lora_name, models.lora_id_counter.inc(1), str(path))
        try:
            await models.engine_client.add_lora(request)
        except UserError as error:
            return _bad_request(f"The adapter `{lora_name}` cannot be served: {error}")
        except Exception as error:
            logger.exception("the adapter %s could not be loaded", lora_name)
            return _bad_request(f"The adapter `{lora_name}` could not be loaded: {first_line(error)}")
        adapters.add(request, signature)
        return request


async def load_lora_adapter(models: OpenAIServingModels, request: Any, base_model_name: str | None = None) -> Any:
    """Load an adapter before its first request. Only what is served by this name anyway can be loaded."""
    name, path = request.lora_name, request.lora_path
    if (error := await models._check_load_lora_adapter_request(request)) is not None:
        return error
    folder = models.lora_requests.folder
    if not await asyncio.to_thread(_is_served, folder, name, path):
        return _bad_request(
            f"{path} as '{name}': not served, since it is not below {folder.root} by this name; put it there, and "
            "name it by its path below that folder"
        )
    found = await models.resolve_lora(name)
    return found if isinstance(found, ErrorResponse) else f"Success: LoRA adapter '{name}' added successfully."


def _is_served(folder: ServedFolder, name: str, path: str) -> bool:
    found = folder.find(name)
    try:
        return found is not None and find_adapter(path).resolve() == found.resolve()
    except (OSError, ValueError):  # not a valid path
        return False


async def unload_lora_adapter(models: OpenAIServingModels, request: Any) -> ErrorResponse | str:
    name, adapters = request.lora_name, models.lora_requests
    async with models.lora_resolver_lock[name]:
        if was_loaded := adapters.get(name) is not None:
            del adapters[name]
        if await asyncio.to_thread(adapters.folder.find, name) is not None:
            return (
                f"'{name}' will be read again at the next request for it, since it is still in the folder that is "
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
    """vLLM looks up a request's adapter twice: to check its name, and again when the prompt is ready. If the adapter
    was replaced in between, the request uses the one that was checked."""

    @functools.wraps(choose)
    def adapter_of(serving: BaseServing, request: Any, *args: Any, **kwargs: Any) -> LoRARequest | None:
        requests = serving.models.lora_requests
        checked = requests.get(request.model) if isinstance(requests, FolderAdapters) else None
        return checked or choose(serving, request, *args, **kwargs)

    return adapter_of


chat_template: ContextVar[str | None] = ContextVar("the chat template of this request's adapter", default=None)


def _with_template(check: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's check of a request's model, which also looks up the chat template that its adapter was trained with."""

    @functools.wraps(check)
    async def call(serving: BaseServing, request: Any, *args: Any, **kwargs: Any) -> ErrorResponse | None:
        error = await check(serving, request, *args, **kwargs)
        adapter = serving.models.lora_requests.get(request.model)
        chat_template.set(read_chat_template(find_adapter(adapter.lora_path)) if adapter and not error else None)
        return error

    return call


def _by_template(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM writes a chat by the template of its adapter, or else by the server's. A request's own template
    overrides both."""

    @functools.wraps(preprocess)
    async def call(renderer: Any, *args: Any, **kwargs: Any) -> Any:
        if (template := chat_template.get()) is not None:
            kwargs["default_template"] = template
        return await preprocess(renderer, *args, **kwargs)

    return call


refusals = Refusals()
refusal_reason: ContextVar[str] = ContextVar("why an adapter was refused in this request", default="")


def _remembering(add_lora: Callable[..., Any]) -> Callable[..., Any]:
    """The client's `add_lora`, which raises `UserError` for an adapter that is refused. The refusal is logged once,
    and the adapter is not read again until its files change."""

    @functools.wraps(add_lora)
    async def add(client: AsyncLLM, lora_request: LoRARequest) -> bool:
        path = lora_request.lora_path
        signature = file_signature(Path(path))
        reason = refusals.reason(path, signature)
        if reason is None:
            outcome = await add_lora(client, lora_request)
            if not isinstance(outcome, str):
                return outcome
            reason = outcome
            logger.warning("refused: %s", reason)
            if any(signature):  # files on this disk, not a name on the Hub
                refusals.add(path, signature, reason)
        refusal_reason.set(reason)
        raise UserError(reason)

    return add


def _raising(add_lora: Callable[..., Any]) -> Callable[..., Any]:
    """The same without a memory, for the engine of a program that has no server."""

    @functools.wraps(add_lora)
    def add(engine: LLMEngine, lora_request: LoRARequest) -> bool:
        outcome = add_lora(engine, lora_request)
        if isinstance(outcome, str):
            raise UserError(outcome)
        return outcome

    return add


def _with_reason(method: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's own loading, which answers every error as the server's (500) or without a reason: with status 400 and the
    reason instead."""

    @functools.wraps(method)
    async def call(models: OpenAIServingModels, *args: Any, **kwargs: Any) -> Any:
        refusal_reason.set("")
        response = await method(models, *args, **kwargs)
        reason = refusal_reason.get()
        return _bad_request(reason) if reason and isinstance(response, ErrorResponse) else response

    return call


def install() -> None:
    models = OpenAIServingModels
    models.__init__ = _with_folder(models.__init__)
    models.show_available_models = _of_folder(models.show_available_models, show_available_models)
    models.resolve_lora = _of_folder(_with_reason(models.resolve_lora), resolve_lora)
    models.load_lora_adapter = _of_folder(_with_reason(models.load_lora_adapter), load_lora_adapter)
    models.unload_lora_adapter = _of_folder(models.unload_lora_adapter, unload_lora_adapter)
    BaseServing._check_model = _with_template(BaseServing._check_model)
    OnlineRenderer.preprocess_chat = _by_template(OnlineRenderer.preprocess_chat)
    BaseServing._maybe_get_adapters = _as_checked(BaseServing._maybe_get_adapters)
    AsyncLLM.add_lora = _remembering(AsyncLLM.add_lora)
    LLMEngine.add_lora = _raising(LLMEngine.add_lora)
