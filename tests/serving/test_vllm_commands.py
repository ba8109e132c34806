"""vLLM's own server, with RED adapters wherever it takes LoRA adapters, and its /metrics."""

from __future__ import annotations

import sys
import time
import urllib.error
from collections import Counter

import pytest

from redpeft.serving.counters import DELAY

from .server import Server
from .tiny_adapters import TOKENS, adapter

pytestmark = pytest.mark.serving

LONG = 90  # tokens: nearly all that fit behind a prompt


@pytest.fixture(scope="module")
def server(base, adapters, tmp_path_factory):
    """Five adapters by name, of which two have a slot and four are kept; and a folder for vLLM's own resolver."""
    root = tmp_path_factory.mktemp("vllm")
    adapter(root / "cache" / "resolved", 8, base_model_name_or_path=str(base))
    adapter(root / "cache" / "of-another", 8, base_model_name_or_path="another/base")
    adapter(root / "outside", 9, base_model_name_or_path=str(base))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--enable-lora"]
    modules = [f"edit-{number}={adapters[number]}" for number in range(5)]
    command += ["--lora-modules", *modules, "--max-loras", "2", "--max-cpu-loras", "4", "--max-lora-rank", "8"]
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_LORA_RESOLVER_CACHE_DIR": str(root / "cache")}
    made = Server(base, root / "cache", root / "log", command, **environment)
    yield made.wait()
    made.stop()


def test_adapters_named_at_the_start_answer(server, adapters, prompts, reference):
    assert server.models() == ["base", *(f"edit-{number}" for number in range(5))]
    names = [None, 0, 4, 2]
    found = [server.ask("base" if name is None else f"edit-{name}", prompts[0]) for name in names]
    reference.check(found, [prompts[0]] * 4, [None if name is None else adapters[name] for name in names])


def test_it_is_healthy(server):
    assert server.get("health") == ""


def test_load_replace_and_unload_at_run_time(server, adapters, prompts, reference):
    from openai import NotFoundError

    prompt = prompts[2] * 2  # blocks of the prefix cache
    for number, options in ((6, {}), (7, {"load_inplace": True})):
        answer = server.post("v1/load_lora_adapter", lora_name="late", lora_path=str(adapters[number]), **options)
        assert "'late' added successfully" in answer
        for _ in range(2):
            reference.check([server.ask("late", prompt)], [prompt], [adapters[number]])
    assert "late" in server.models()
    assert "'late' removed successfully" in server.post("v1/unload_lora_adapter", lora_name="late")
    with pytest.raises(NotFoundError):
        server.ask("late", prompt)


def test_an_adapter_of_another_base_model_is_refused_with_the_reason(server, other_fingerprint, tmp_path):
    folder = adapter(tmp_path / "foreign", 10, base_fingerprint=other_fingerprint)
    with pytest.raises(urllib.error.HTTPError, match="400") as caught:
        server.post("v1/load_lora_adapter", lora_name="foreign", lora_path=str(folder))
    assert "is for another base model than <path>: the weights differ" in caught.value.read().decode()
    assert f"{folder} is for another base model than {server.base}: the weights differ" in server.log.read_text()
    assert "foreign" not in server.models()


def test_an_adapter_that_names_its_base_weights_rightly_is_loaded(
    server, own_fingerprint, tmp_path, prompts, reference
):
    folder = adapter(tmp_path / "own", 11, base_fingerprint=own_fingerprint)
    server.post("v1/load_lora_adapter", lora_name="own", lora_path=str(folder))
    reference.check([server.ask("own", prompts[1])], [prompts[1]], [folder])


def test_the_resolver_of_a_folder_takes_red_adapters_of_the_same_base(server, prompts, reference):
    from openai import NotFoundError

    reference.check([server.ask("resolved", prompts[1])], [prompts[1]], [server.folder / "resolved"])
    for name in ("of-another", "../outside", str(server.folder.parent / "outside"), "resolved/", "./resolved"):
        with pytest.raises(NotFoundError):
            server.ask(name, prompts[1])


def test_metrics_count_by_adapter_what_was_asked(server, prompts):
    for number in (0, 1, 2, 3):  # 0, 1, 2, 3 are in memory now, and 2, 3 have the slots
        server.ask(f"edit-{number}", prompts[0])
    time.sleep(2 * DELAY)
    before = server.metrics()
    asked = [0, 1, 1, None, 4, 2]
    for index, number in enumerate(asked):
        server.ask("base" if number is None else f"edit-{number}", prompts[index % 2])
    time.sleep(2 * DELAY)
    after = server.metrics()
    grown: dict[str, Counter] = {}
    for (name, number), value in after.items():
        if difference := value - before.get((name, number), 0):
            grown.setdefault(name.removeprefix("redpeft:").removesuffix("_total"), Counter())[number] = difference

    lengths: Counter = Counter()
    for index, number in enumerate(asked):
        lengths[number] += len(prompts[index % 2])
    wanted = Counter(number for number in asked if number is not None)
    assert grown["requests"] == named(wanted)
    assert grown["prompt_tokens"] == named({number: lengths[number] for number in wanted})
    assert grown["generation_tokens"] == named({number: TOKENS * count for number, count in wanted.items()})
    assert grown["adapter_slot_loads"] == named({0: 1, 1: 1, 4: 1, 2: 1})
    assert grown["adapter_slot_evictions"] == named({2: 1, 3: 1, 0: 1, 1: 1})
    assert grown["adapter_loads"] == named({4: 1, 2: 1})
    assert grown["adapter_evictions"] == named({2: 1, 3: 1})  # 2 had been used longest ago, then 3
    ours = grown["prompt_tokens"].total() + lengths[None]
    assert grown["vllm:prompt_tokens"][""] == ours  # vLLM's own, with those of the base


def named(counts) -> Counter:
    return Counter({f"edit-{number}": count for number, count in counts.items()})


def test_a_request_that_is_cancelled_is_counted_as_far_as_it_came(server, prompts):
    before, after = server.metrics(), {}

    def grown(name):
        return after[f"redpeft:{name}_total", "edit-1"] - before[f"redpeft:{name}_total", "edit-1"]

    for asked in range(1, 11):  # on a busy machine an answer may be whole before its cancellation arrives
        stream = server.client.completions.create(
            model="edit-1",
            prompt=prompts[0],
            max_tokens=LONG,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
        server.ask("base", prompts[0])
        after = server.metrics()
        if grown("generation_tokens") < asked * LONG:
            break
    assert grown("requests") == asked
    assert grown("prompt_tokens") == asked * len(prompts[0])
    assert (asked - 1) * LONG < grown("generation_tokens") < asked * LONG
