"""vLLM's adapters by name are those whose files are as they were when they were loaded."""

from __future__ import annotations

import asyncio
import os
import shutil
from types import SimpleNamespace

import pytest

from redpeft.adapters.files import WEIGHTS_NAME

from .making import adapter

pytestmark = pytest.mark.serving


@pytest.fixture
def requests(tmp_path):
    from redpeft.serving.folder import Source
    from redpeft.serving.vllm_internals.frontend import CurrentRequests, FolderResolver

    adapter(tmp_path / "edit", 1)
    return CurrentRequests(FolderResolver(Source(tmp_path)))


def look_up(requests):
    return asyncio.run(requests.resolver.resolve_lora("base", "edit"))


def replace(folder, seed):
    adapter(folder / ".new", seed)
    os.replace(folder / ".new" / WEIGHTS_NAME, folder / "edit" / WEIGHTS_NAME)


def test_one_that_was_replaced_is_looked_up_again(requests, tmp_path):
    requests["edit"] = look_up(requests)
    assert "edit" in requests
    replace(tmp_path, 2)
    assert "edit" not in requests
    requests["edit"] = look_up(requests)
    assert "edit" in requests
    assert "other" not in requests


def test_one_that_changes_while_it_is_read_is_looked_up_again(requests, tmp_path):
    request = look_up(requests)
    replace(tmp_path, 2)
    requests["edit"] = request
    assert "edit" not in requests


def test_what_could_not_be_loaded_does_not_bring_back_what_was_there_before(requests, tmp_path):
    requests["edit"] = look_up(requests)
    replace(tmp_path, 2)
    look_up(requests)  # and the engine refuses it
    assert "edit" not in requests


def test_one_that_was_removed_or_unloaded_is_forgotten(requests, tmp_path):
    for remove in (lambda: requests.__delitem__("edit"), lambda: shutil.rmtree(tmp_path / "edit")):
        requests["edit"] = look_up(requests)
        remove()
        assert "edit" not in requests
        assert len(requests) == len(requests._stamps) == 0
    assert look_up(requests) is None


def test_one_that_was_loaded_by_a_path_is_looked_up_again_too(requests, tmp_path):
    from vllm.lora.request import LoRARequest

    requests["alias"] = LoRARequest("alias", 3, str(tmp_path / "edit"))
    assert "alias" in requests
    replace(tmp_path, 2)
    assert "alias" not in requests


def test_a_request_keeps_the_adapter_that_it_was_checked_for(requests, tmp_path):
    from vllm.entrypoints.serve.engine.serving import BaseServing

    from redpeft.serving import plugin

    plugin.register()
    requests["edit"] = request = look_up(requests)
    replace(tmp_path, 2)
    serving = SimpleNamespace(models=SimpleNamespace(lora_requests=requests))
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

    from redpeft.serving.vllm_internals import metrics

    gauge = Gauge("mixes", "Adapters that run together.", ["running"], registry=CollectorRegistry())
    record = metrics._bounded(lambda logger, number: logger.gauge_lora_info.labels(running=str(number)).set(1))
    for number in range(3 * metrics.MOST_MIXES):
        record(SimpleNamespace(gauge_lora_info=gauge), number)
    kept = {sample.labels["running"] for sample in gauge.collect()[0].samples}
    assert str(3 * metrics.MOST_MIXES - 1) in kept
    assert len(kept) <= metrics.MOST_MIXES + 1
    metrics._bounded(lambda logger: None)(SimpleNamespace(gauge_lora_info=None))  # a server without adapters
