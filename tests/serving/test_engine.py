"""Within vLLM: greedy tokens of mixed batches are those of transformers with the same edits."""

from __future__ import annotations

import gc
import shutil
from types import SimpleNamespace

import pytest

from redpeft.errors import UserError

from .tiny_adapters import TOKENS, adapter

pytestmark = pytest.mark.serving


def engine(base, **options):
    """An engine in this process, in fp32."""
    from vllm import LLM

    usual = {"dtype": "float32", "enable_lora": True, "max_loras": 4, "max_num_seqs": 16, "enforce_eager": True}
    return LLM(str(base), max_model_len=128, seed=0, disable_log_stats=True, **usual | options)


RED_ONLY = {"redpeft": {"only": True}}


KINDS = {
    "with LoRA": {"max_lora_rank": 8},
    "RED alone, in chunks": {"additional_config": RED_ONLY, "max_num_batched_tokens": 32},  # a prompt has 35 tokens
    "compiled": {"additional_config": RED_ONLY, "enforce_eager": False},
}


RED_ALONE = pytest.mark.parametrize("llm", list(KINDS)[1:], indirect=True)  # vLLM's LoRA layers are slow on a CPU


@pytest.fixture(scope="module", params=KINDS)
def llm(request, base):
    made = engine(base, **KINDS[request.param])
    yield made
    del made
    gc.collect()


def named(name, number, folder, **options):
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(folder), **options)


def asked(adapters, number):
    return None if number is None else named(f"edit-{number}", number + 1, adapters[number])


def answers(llm, prompts, requests, tokens=TOKENS):
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    texts = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = llm.generate(texts, greedy, lora_request=requests, use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in found]


def test_a_mixed_batch_answers_as_transformers_with_the_same_edits(llm, adapters, prompts, reference):
    numbers = [0, None, 1, 2, 0, 3, None, 1]
    batch = [prompts[index % len(prompts)] for index in range(len(numbers))]
    found = answers(llm, batch, [asked(adapters, number) for number in numbers])
    reference.check(found, batch, [None if number is None else adapters[number] for number in numbers])
    assert len({tuple(answer) for answer in found}) == len(set(zip(numbers, map(tuple, batch), strict=True)))


@RED_ALONE
def test_more_adapters_than_slots_take_turns(llm, adapters, prompts, reference):
    for _ in range(2):  # evicted and loaded again
        numbers = range(len(adapters))
        found = answers(llm, [prompts[0]] * len(adapters), [asked(adapters, number) for number in numbers])
        reference.check(found, [prompts[0]] * len(adapters), adapters)


@RED_ALONE
def test_an_adapter_of_one_layer_leaves_the_others_alone(llm, adapters, prompts, reference):
    for number in (0, 11, 1, 11):  # into a slot that a fuller one had
        found = answers(llm, prompts[:2], [asked(adapters, number)] * 2)
        reference.check(found, prompts[:2], [adapters[number]] * 2)


def test_the_base_in_a_mixed_batch_is_the_engine_without_adapters_bit_for_bit(llm, base, adapters, prompts):
    from vllm import SamplingParams

    def logprobs(engine, requests):
        greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=3)
        texts = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = engine.generate(texts, greedy, lora_request=requests, use_tqdm=False)
        return [
            [sorted((t, p.logprob) for t, p in step.items()) for step in each.outputs[0].logprobs] for each in found
        ]

    mixed = logprobs(llm, [asked(adapters, number) for number in (None, 0, None, 1)])
    plain = logprobs(llm, None)
    assert mixed[0] == plain[0]
    assert mixed[2] == plain[2]
    assert mixed[1] != plain[1]


@RED_ALONE
def test_replaced_in_place_it_answers_anew_at_once(llm, adapters, prompts, reference, tmp_path):
    folder = tmp_path / "edit"
    long = prompts[2] * 2  # several blocks of the prefix cache
    for source in (adapters[4], adapters[5]):
        shutil.copytree(source, folder, dirs_exist_ok=True)
        request = named("replaced", 50, folder, load_inplace=True)
        llm.llm_engine.add_lora(request)
        for _ in range(2):
            reference.check(answers(llm, [long], [request]), [long], [source])


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    """A LoRA of q, v and the same down projections, far from zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.2)
    folder = tmp_path_factory.mktemp("lora")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("llm", ["with LoRA"], indirect=True)
def test_lora_and_red_adapters_share_a_batch_and_the_slots(llm, lora, adapters, prompts, reference):
    """Requests without an adapter are not among them: vLLM's LoRA layers on a CPU give them the last slot's LoRA."""
    folders = [lora, adapters[0], adapters[1], lora, adapters[2], adapters[3], adapters[4]]
    requests = [named(folder.name, 90 if folder is lora else adapters.index(folder) + 1, folder) for folder in folders]
    batch = [prompts[index % len(prompts)] for index in range(len(folders))]
    for _ in range(2):
        reference.check(answers(llm, batch, requests), batch, folders)


@pytest.mark.parametrize("llm", ["RED alone, in chunks"], indirect=True)
def test_what_cannot_be_served_is_refused_in_a_line(llm, lora, adapters, tmp_path):
    def refused(folder):
        with pytest.raises(UserError) as caught:  # the engine's process passes it on
            llm.llm_engine.add_lora(named("refused", 70, folder))
        return str(caught.value)

    assert "not a RED adapter, and this server was started for RED adapters only" in refused(lora)
    qkv = adapter(tmp_path / "qkv", 1, ["model.layers.0.self_attn.q_proj"])
    assert "it edits model.layers.0.self_attn.q_proj, and this server has tables for" in refused(qkv)
    wide = adapter(tmp_path / "wide", 1, width=64)
    assert "model.layers.0.mlp.down_proj has width 64, and 128 in this base model" in refused(wide)
    assert "no such adapter folder" in refused(tmp_path / "none")


@pytest.mark.parametrize("llm", ["compiled"], indirect=True)
def test_of_two_adapters_of_one_name_each_answers_its_own_requests(llm, adapters, prompts, reference):
    """As where one was replaced while requests for it were being answered."""
    folders = [adapters[6], adapters[7], adapters[8], adapters[9]]
    requests = [named("same", 60 + index, folder) for index, folder in enumerate(folders)]
    for request in requests:
        llm.llm_engine.add_lora(request)  # as a server does
    for _ in range(2):
        reference.check(answers(llm, prompts, requests), prompts, folders)


@pytest.mark.parametrize(
    ("number", "options", "known"), [(3, {}, True), (3, {"load_inplace": True}, False), (4, {}, False)]
)
def test_what_is_in_memory_is_put_into_a_slot_without_a_look_at_the_rest(number, options, known):
    """vLLM lists all adapters in memory for each one of a batch, which with a thousand of them takes its time."""
    from redpeft.serving.vllm_internals.engine import RedWorkerManager

    called = []
    worker = RedWorkerManager.__new__(RedWorkerManager)
    worker._adapter_manager = SimpleNamespace(
        _registered_adapters={3: "adapter"},
        get_adapter=lambda number: called.append(("get", number)),
        activate_adapter=lambda number: called.append(("activate", number)),
    )
    assert worker._touch(named("edit", number, "folder", **options)) is known
    assert called == ([("get", 3), ("activate", 3)] if known else [])
