"""GRPO with completions from vLLM: after each step the engine samples from the new policy."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from redpeft import RedConfig
from redpeft.adapters import read_adapter, write_adapter
from redpeft.errors import UserError
from redpeft.serving.rollouts import Rollouts

from .conftest import PROMPTS
from .tiny_adapters import SITES

trl = pytest.importorskip("trl", reason="needs the extra [trl]")
pytestmark = pytest.mark.serving

LONG = "a prompt that is longer than a block of the prefix cache " * 3


def distinct_letters(completions, **_) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


@pytest.fixture(scope="module")
def rollouts(base):
    """One engine for all, since it takes its settings of sampling from each trainer anew."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.envs import disable_envs_cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that it is as before afterwards
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)
        made = Rollouts(base, enforce_eager=True)
        yield made
        made.engine = None
        gc.collect()
        cleanup_dist_env_and_memory()
        disable_envs_cache()


def policy(base, **options) -> torch.nn.Module:
    """The base with edits far from the identity, biases above all."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return get_peft_model(model, RedConfig(task_type="CAUSAL_LM", init_weights=False, **options))


def grpo(model, tokenizer, folder, **options) -> trl.GRPOTrainer:
    rollout_func = options.pop("rollout_func", None)
    usual = {"max_steps": 2, "learning_rate": 0.1, "num_generations": 4, "max_completion_length": 12}
    usual |= {"per_device_train_batch_size": 8, "bf16": False, "use_cpu": True}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return trl.GRPOTrainer(
        model,
        reward_funcs=distinct_letters,
        args=trl.GRPOConfig(str(folder), **usual | quiet | options),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        rollout_func=rollout_func,
    )


@pytest.fixture
def trainer(base, tiny_chat_tokenizer, tmp_path, rollouts):
    return grpo(policy(base), tiny_chat_tokenizer, tmp_path / "run", rollout_func=rollouts)


def greedy(rollouts, trainer, prompts) -> list[list[int]]:
    trainer.args.temperature = 0.0
    return rollouts(prompts, trainer)["completion_ids"]


def test_after_steps_the_engine_answers_as_the_new_policy(trainer, rollouts, prompts, reference, tmp_path):
    folders = [tmp_path / "before", tmp_path / "after"]
    trainer.save_model(folders[0])
    before = greedy(rollouts, trainer, PROMPTS)
    reference.check(before, prompts, [folders[0]] * len(PROMPTS))
    trainer.args.temperature = 1.0
    trainer.train()
    trainer.save_model(folders[1])
    after = greedy(rollouts, trainer, PROMPTS)
    reference.check(after, prompts, [folders[1]] * len(PROMPTS))
    assert all(old != new for old, new in zip(before, after, strict=True))
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2
    for entry in steps:  # what TRL corrects by, from vLLM's probabilities and its own
        assert entry["sampling/sampling_logp_difference/max"] < 1e-3
        assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def test_sampling_is_as_the_trainer_asks(trainer, rollouts):
    trainer.args.temperature, trainer.args.max_completion_length = 0.7, 5
    found = rollouts([PROMPTS[0]] * 8, trainer)
    assert max(map(len, found["completion_ids"])) == 5
    assert len(Counter(map(tuple, found["completion_ids"]))) > 1
    model = trainer.model.eval()
    for prompt, completion, logprobs in zip(*(found[key] for key in found), strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        assert logprobs == pytest.approx(expected.tolist(), abs=1e-3)


def test_chats_are_written_by_the_template(trainer, rollouts, tiny_chat_tokenizer):
    chat = [{"role": "user", "content": "Hello"}]
    expected = tiny_chat_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    assert rollouts([chat], trainer)["prompt_ids"] == [expected["input_ids"]]


def test_nothing_cached_of_the_edit_before_is_used(trainer, rollouts, reference, monkeypatch, tmp_path):
    greedy(rollouts, trainer, PROMPTS[:1])  # starts the engine
    cached, generate = [], rollouts.engine.llm.generate

    def watched(*args, **kwargs):
        found = generate(*args, **kwargs)
        cached.append([each.num_cached_tokens for each in found])
        return found

    monkeypatch.setattr(rollouts.engine.llm, "generate", watched)
    greedy(rollouts, trainer, [LONG] * 2)
    with torch.no_grad():
        for edit in trainer.model.parameters():
            if edit.requires_grad:
                edit.mul_(-1)
    trainer.save_model(tmp_path / "other")
    found = greedy(rollouts, trainer, [LONG] * 2)
    reference.check(found, trainer._tokenize_prompts([LONG] * 2)[0], [tmp_path / "other"] * 2)
    assert [first for first, _ in cached] == [0, 0]
    assert all(again > 0 for _, again in cached), "the cache is off, so this test shows nothing"


def test_trls_own_way_would_lose_the_biases(base, trainer, rollouts, prompts, reference, tmp_path):
    """The parameters that use_vllm=True would send, in the same engine: it answers by the scales alone."""
    from trl.generation.vllm_generation import VLLMGeneration
    from vllm import SamplingParams

    with torch.no_grad():
        for name, edit in trainer.model.named_parameters():
            if edit.requires_grad and "bias" in name:
                edit.mul_(20)
    trainer.save_model(tmp_path / "whole")
    adapter = read_adapter(tmp_path / "whole")
    scales = {site: edit._replace(bias=torch.zeros_like(edit.bias)) for site, edit in adapter.edits.items()}
    write_adapter(replace(adapter, folder=tmp_path / "scales", edits=scales))
    greedy(rollouts, trainer, PROMPTS[:1])  # starts the engine

    sender = VLLMGeneration.__new__(VLLMGeneration)
    sender.model, sender._dist = trainer.model, trainer._dist
    sent = [(name, tensor.clone()) for name, tensor in sender._iter_named_params()]
    assert SITES[0] + ".bias" in dict(sent)
    try:
        # not by TRL's `load_weights`, which vLLM's CPU build cannot do once it has packed the weights
        rollouts.engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(sent)})
        asked = [{"prompt_token_ids": each} for each in prompts]
        found = rollouts.engine.llm.generate(asked, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    finally:
        own = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).named_parameters()
        rollouts.engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": own})
    tokens = [list(each.outputs[0].token_ids) for each in found]
    reference.check(tokens, prompts, [tmp_path / "scales"] * len(prompts))
    right = [reference.answer(each, tmp_path / "whole") for each in prompts]
    assert all(answer[: len(whole)] != whole for answer, whole in zip(tokens, right, strict=True))


def test_what_does_not_fit_is_refused(base, rollouts, tiny_chat_tokenizer, tmp_path, trainer):
    def refuses(model, message):
        trainer.model = model
        with pytest.raises(UserError, match=message) as refusal:
            rollouts(PROMPTS, trainer)
        assert "\n" not in str(refusal.value)

    gguf = tmp_path / "base.gguf"
    gguf.touch()
    with pytest.raises(UserError, match=f"redpeft export-base {gguf} --out FOLDER"):
        Rollouts(gguf)
    greedy(rollouts, trainer, PROMPTS[:1])
    two = policy(base)
    two.add_adapter("other", RedConfig(task_type="CAUSAL_LM"))
    two.base_model.set_adapter(["default", "other"])
    refuses(two, "one adapter, and default, other are active")
    refuses(policy(base, modules_to_save=["lm_head"]), r"has a head \(lm_head.weight\)")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"])
    refuses(get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora), "are for RED adapters")
    other = policy(base)
    other.peft_config["default"].base_fingerprint["samples"][0] *= 1.5
    refuses(other, "the adapter in training is for another base model")
    rollouts = Rollouts(base, enforce_eager=True)
    refuses(
        policy(base, target_modules=["q_proj"]),
        "cannot be used .*: vLLM's LlamaForCausalLM has no module .*q_proj to edit$",
    )
