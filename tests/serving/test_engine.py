"""Within vLLM: greedy tokens of mixed batches are those of transformers with the same edits."""

from __future__ import annotations

import gc
import shutil

import pytest

from .making import TOKENS

pytestmark = pytest.mark.serving


def engine(base, **options):
    """An engine in this process, in fp32."""
    from vllm import LLM

    options = {"dtype": "float32", "enable_lora": True, "max_loras": 4, "enforce_eager": True, **options}
    return LLM(str(base), max_model_len=128, max_num_seqs=16, seed=0, disable_log_stats=True, **options)


RED_ONLY = {"redpeft": {"only": True}}


@pytest.fixture(scope="module", params=["with LoRA", "RED alone", "compiled"])
def llm(request, base):
    options = {"additional_config": {} if request.param == "with LoRA" else RED_ONLY}
    made = engine(base, enforce_eager=request.param != "compiled", **options)
    yield made
    del made
    gc.collect()


def asked(adapters, number):
    from vllm.lora.request import LoRARequest

    return None if number is None else LoRARequest(f"edit-{number}", number + 1, str(adapters[number]))


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


def test_more_adapters_than_slots_take_turns(llm, adapters, prompts, reference):
    for _ in range(2):  # evicted and loaded again
        numbers = range(len(adapters))
        found = answers(llm, [prompts[0]] * len(adapters), [asked(adapters, number) for number in numbers])
        reference.check(found, [prompts[0]] * len(adapters), adapters)


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
        return [[sorted((t, p.logprob) for t, p in step.items()) for step in each.outputs[0].logprobs] for each in found]

    mixed = logprobs(llm, [asked(adapters, number) for number in (None, 0, None, 1)])
    plain = logprobs(llm, None)
    assert mixed[0] == plain[0]
    assert mixed[2] == plain[2]
    assert mixed[1] != plain[1]


def test_replaced_in_place_it_answers_anew_at_once(llm, adapters, prompts, reference, tmp_path):
    from vllm.lora.request import LoRARequest

    folder = tmp_path / "edit"
    long = prompts[2] * 2  # several blocks of the prefix cache
    for source in (adapters[4], adapters[5]):
        shutil.copytree(source, folder, dirs_exist_ok=True)
        request = LoRARequest("replaced", 50, str(folder), load_inplace=True)
        llm.llm_engine.add_lora(request)
        for _ in range(2):
            reference.check(answers(llm, [long], [request]), [long], [source])
