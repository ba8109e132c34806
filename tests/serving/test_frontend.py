"""vLLM's adapters by name are those whose files are as they were when they were loaded."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from functools import partial
from types import SimpleNamespace

import pytest

from redpeft.storage import WEIGHTS_NAME

from .tiny_adapters import adapter

pytestmark = pytest.mark.serving


@pytest.fixture
def models(tmp_path):
    """vLLM's models of a server of a folder with one adapter. `models.engine_client.add_lora` notes what it is asked
    for in `models.asked`, and refuses as `models.refuses` says."""
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry, OpenAIServingModels
    from vllm.utils.counter import AtomicCounter

    from redpeft.serving import plugin
    from redpeft.serving.served_folder import ServedFolder
    from redpeft.serving.vllm_internals.frontend import FolderAdapters, Locks, _remembering

    plugin.register()
    adapter(tmp_path / "served" / "edit", 1)
    models = object.__new__(OpenAIServingModels)
    models.lora_requests, models.lora_resolver_lock = FolderAdapters(ServedFolder(tmp_path / "served")), Locks()
    models.base_model_paths = [BaseModelPath(name="base", model_path="/base")]
    config = SimpleNamespace(model="base", max_model_len=9)
    models.registry = OpenAIModelRegistry(config, models.base_model_paths)
    models.lora_id_counter, models.asked, models.refuses = AtomicCounter(), [], ""

    async def add_lora(client, request):
        models.asked.append(request)
        return models.refuses or True

    models.engine_client = SimpleNamespace(add_lora=partial(_remembering(add_lora), None))
    return models


def resolve(models, name="edit"):
    return asyncio.run(models.resolve_lora(name))


def replace(models, seed):
    folder = models.lora_requests.folder.root
    adapter(folder / ".new", seed)
    os.replace(folder / ".new" / WEIGHTS_NAME, folder / "edit" / WEIGHTS_NAME)


def test_one_that_was_replaced_is_loaded_again_and_by_another_number(models):
    first = resolve(models)
    assert "edit" in models.lora_requests
    assert resolve(models) is first
    replace(models, 2)
    assert "edit" not in models.lora_requests
    second = resolve(models)
    assert "edit" in models.lora_requests
    assert models.asked == [first, second]
    assert first.lora_int_id != second.lora_int_id


def test_one_that_changes_while_it_is_read_is_looked_up_again(models):
    add = models.engine_client.add_lora

    async def slowly(request):
        await add(request)
        replace(models, 2)

    models.engine_client.add_lora = slowly
    resolve(models)
    assert "edit" not in models.lora_requests


def test_what_could_not_be_loaded_does_not_bring_back_what_was_there_before(models):
    resolve(models)
    replace(models, 2)
    models.refuses = "it is damaged"
    assert resolve(models).error.code == 400
    assert "edit" not in models.lora_requests


def test_a_refused_one_is_read_once_logged_once_and_explained_each_time(models, monkeypatch):
    from redpeft.serving.vllm_internals import frontend

    said = []
    monkeypatch.setattr(frontend.logger, "warning", lambda *words: said.append(words))
    models.refuses = "its scale is not finite"
    for _ in range(3):
        error = resolve(models).error
        assert (error.code, error.message) == (400, "The adapter `edit` cannot be served: its scale is not finite")
    assert len(models.asked) == len(said) == 1
    replace(models, 2)
    resolve(models)
    assert len(models.asked) == len(said) == 2
    models.refuses = ""
    replace(models, 3)
    assert resolve(models).lora_name == "edit"


def test_what_goes_wrong_otherwise_is_not_remembered(models):
    async def fail(request):
        raise RuntimeError("out of memory\nmore")

    add, models.engine_client.add_lora = models.engine_client.add_lora, fail
    error = resolve(models).error
    assert (error.code, error.message) == (400, "The adapter `edit` could not be loaded: out of memory")
    models.engine_client.add_lora = add
    assert resolve(models).lora_name == "edit"


def test_one_that_was_removed_or_unloaded_is_forgotten(models):
    folder = models.lora_requests.folder.root / "edit"
    for remove in (lambda: models.lora_requests.__delitem__("edit"), lambda: shutil.rmtree(folder)):
        resolve(models)
        remove()
        assert "edit" not in models.lora_requests
        assert len(models.lora_requests) == len(models.lora_requests._signatures) == 0
    assert resolve(models).error.code == 404


def test_the_list_is_that_of_the_folder_and_made_in_a_thread(models, monkeypatch):
    from redpeft.serving import served_folder

    threads = []
    search = served_folder.search_adapters
    monkeypatch.setattr(
        served_folder, "search_adapters", lambda *a: threads.append(threading.current_thread()) or search(*a)
    )
    adapter(models.lora_requests.folder.root / "base", 2)
    adapter(models.lora_requests.folder.root / ".trash" / "x", 2)
    listed = asyncio.run(models.show_available_models())
    assert [card.id for card in listed.data] == ["base", "edit"]
    assert listed.data[0].root == "/base"
    assert resolve(models).lora_name == "edit"
    assert len(threads) >= 2
    assert threading.main_thread() not in threads


def ask(method, **fields):
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest

    kind = LoadLoRAAdapterRequest if "lora_path" in fields else UnloadLoRAAdapterRequest
    answer = asyncio.run(method(kind(**fields)))
    return answer if isinstance(answer, str) else (answer.error.code, answer.error.message)


def test_no_second_name_is_loaded_by_a_path(models):
    root = models.lora_requests.folder.root
    adapter(root / ".trash" / "x", 2)
    adapter(root.parent / "outside", 2)
    edit = str(root / "edit")
    for name, path in (
        *(("edit/", edit), ("alias", edit), ("./edit", edit), ("edit", "x" * 5000), ("edit", "a\0"), ("edit", "edit")),
        *((".trash/x", str(root / ".trash" / "x")), ("outside", str(root.parent / "outside"))),
    ):
        code, message = ask(models.load_lora_adapter, lora_name=name, lora_path=path)
        assert code == 400
        assert "not served, since it is not below" in message
    assert models.asked == []
    assert ask(models.load_lora_adapter, lora_name="", lora_path=edit)[0] == 400
    added = ask(models.load_lora_adapter, lora_name="edit", lora_path=edit)
    assert added == "Success: LoRA adapter 'edit' added successfully."
    code, message = ask(models.load_lora_adapter, lora_name="edit", lora_path=edit)
    assert code == 400
    assert "has already been loaded" in message


def test_unloading_says_that_it_is_served_as_long_as_it_is_there(models):
    resolve(models)
    for _ in range(2):
        said = ask(models.unload_lora_adapter, lora_name="edit")
        assert said.startswith("'edit' will be read again at the next request for it, since it is still in the folder")
        assert "edit" not in models.lora_requests
    resolve(models)
    shutil.rmtree(models.lora_requests.folder.root / "edit")
    assert ask(models.unload_lora_adapter, lora_name="edit") == "'edit' is not served any more."
    for name in ("edit", "edit/", "x" * 5000, "a\0", ""):
        assert ask(models.unload_lora_adapter, lora_name=name)[0] == 404


def test_vllms_own_doors_tell_the_reason_and_call_it_the_clients(models, tmp_path):
    """Those of a server that serves no folder: loading by a path, and resolvers."""
    from vllm.lora.request import LoRARequest

    class Resolver:
        async def resolve_lora(self, base, name):
            return LoRARequest(name, 1, str(tmp_path / "served" / "edit"))

    models.lora_requests, models.lora_resolvers, models.model_config = {}, [Resolver()], SimpleNamespace(model="base")
    models.refuses = "its scale is not finite"
    fields = {"lora_name": "any", "lora_path": str(tmp_path / "served" / "edit")}
    assert ask(models.load_lora_adapter, **fields) == (400, "its scale is not finite")
    error = resolve(models, "any").error
    assert (error.code, error.message) == (400, "its scale is not finite")
    assert len(models.asked) == 1
    models.refuses = ""
    shutil.rmtree(tmp_path / "served")
    adapter(tmp_path / "served" / "edit", 2)
    assert ask(models.load_lora_adapter, **fields) == "Success: LoRA adapter 'any' added successfully."
    assert ask(models.unload_lora_adapter, lora_name="any") == "Success: LoRA adapter 'any' removed successfully."


def test_a_request_keeps_the_adapter_that_it_was_checked_for(models):
    from vllm.entrypoints.serve.engine.serving import BaseServing

    request = resolve(models)
    replace(models, 2)
    serving = SimpleNamespace(models=models)
    assert BaseServing._maybe_get_adapters(serving, SimpleNamespace(model="edit")) is request


def test_a_name_is_looked_up_by_one_at_a_time_and_then_forgotten():
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.utils.counter import AtomicCounter

    from redpeft.serving.vllm_internals.frontend import Locks

    now, most = [], []

    class Resolver:
        async def resolve_lora(self, base, name):
            now.append(name)
            await asyncio.sleep(0.01)
            most.append(len(now))
            now.remove(name)

    models = object.__new__(OpenAIServingModels)
    models.lora_resolver_lock, models.lora_requests, models.lora_resolvers = Locks(), {}, [Resolver()]
    models.model_config, models.lora_id_counter = SimpleNamespace(model="base"), AtomicCounter()

    async def ask(names):
        return await asyncio.gather(*map(models.resolve_lora, names))

    assert {reply.error.code for reply in asyncio.run(ask(["nobody"] * 5))} == {404}
    assert most == [1] * 5
    asyncio.run(ask([f"nobody-{number}" for number in range(100)]))
    assert max(most) > 1
    assert len(models.lora_resolver_lock) == 0


def test_the_mixes_of_adapters_in_vllms_gauge_stay_few():
    from prometheus_client import CollectorRegistry, Gauge

    from redpeft.serving.vllm_internals import adapter_metrics

    gauge = Gauge("mixes", "Adapters that run together.", ["running"], registry=CollectorRegistry())
    record = adapter_metrics._bounded(lambda logger, number: logger.gauge_lora_info.labels(running=str(number)).set(1))
    for number in range(3 * adapter_metrics.MOST_MIXES):
        record(SimpleNamespace(gauge_lora_info=gauge), number)
    kept = {sample.labels["running"] for sample in gauge.collect()[0].samples}
    assert str(3 * adapter_metrics.MOST_MIXES - 1) in kept
    assert len(kept) <= adapter_metrics.MOST_MIXES + 1
    adapter_metrics._bounded(lambda logger: None)(SimpleNamespace(gauge_lora_info=None))  # a server without adapters
