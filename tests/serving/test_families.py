"""Other models than Llama, other sites than the FFN, and two ranks."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from .test_engine import answers, engine, named
from .tiny_adapters import WIDTH, adapter

pytestmark = pytest.mark.serving
SIZE = {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}


def gpt2():  # declares no LoRA in vLLM
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, n_positions=256, **SIZE)
    return GPT2LMHeadModel(config), [f"transformer.h.{layer}.mlp.c_proj" for layer in range(2)]


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    size = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 256, "init_std": 0.2}
    del (rest := dict(SIZE))["initializer_range"]
    config = OPTConfig(num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256, **size, **rest)
    return OPTForCausalLM(config), [f"model.decoder.layers.{layer}.fc2" for layer in range(2)]


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    size = {"hidden_size": WIDTH, "intermediate_size": 256, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256, **size, **SIZE)
    return MixtralForCausalLM(config), [f"model.layers.{layer}.mlp" for layer in range(2)]


SMALL = {
    **{"hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 256},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "tie_word_embeddings": False, **SIZE},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
HEADS = {"head_dim": 64}

# What vLLM does in its own way around an FFN's output: the model's type, what it adds to SMALL, and its sites.
OTHERS = {
    "a norm of the output": ("gemma3_text", HEADS, "mlp.down_proj"),
    "attention beside it, summed over the ranks together": ("cohere", {"tie_word_embeddings": True}, "mlp.down_proj"),
    "a residual that is scaled": ("granite", {"residual_multiplier": 0.5}, "mlp.down_proj"),
    "transformers' own model, with a batch dimension": ("gpt_neox", {}, "mlp.dense_4h_to_h"),
    "transformers' own model, attention beside it": ("phi", {}, "mlp.fc2"),
    "shared experts behind a gate": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 192}, "mlp"),
    "shared experts beside the block": (
        "granitemoeshared",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 128},
        "block_sparse_moe",
    ),
    "shared experts, and the others' sum scaled": (
        "glm4_moe",
        {**HEADS, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "n_group": 1}
        | {"n_shared_experts": 1, "first_k_dense_replace": 0, "routed_scaling_factor": 2.5, "topk_group": 1},
        "mlp",
    ),
    "experts with biases": ("gpt_oss", {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}, "mlp"),
}


def other(kind, more, site):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SMALL | more))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter.data, std=0.2)
    return model, [f"{'gpt_neox' if kind == 'gpt_neox' else 'model'}.layers.{layer}.{site}" for layer in range(2)]


FAMILIES = {
    "GPT-2": gpt2,
    "OPT": opt,
    "Mixtral": mixtral,
    **{way: partial(other, *told) for way, told in OTHERS.items()},
}


def chosen(folders: list[Path]) -> list[Path | None]:
    return [folders[0], None, folders[1], folders[0]]


@pytest.fixture(scope="module")
def families(tmp_path_factory, tiny_chat_tokenizer, prompts) -> dict[str, dict]:
    """For each family its base, its adapters and an engine's answers to a mixed batch."""
    jobs = {}
    for number, (name, make) in enumerate(FAMILIES.items()):
        root = tmp_path_factory.mktemp(f"family-{number}")
        torch.manual_seed(0)
        model, sites = make()
        model.save_pretrained(root / "base")
        tiny_chat_tokenizer.save_pretrained(root / "base")
        folders = [adapter(root / f"edit-{seed}", seed, sites) for seed in range(2)]
        requests = [folder and str(folder) for folder in chosen(folders)]
        jobs[name] = {"base": str(root / "base"), "prompts": prompts, "requests": requests, "out": f"{root}/answers"}
        jobs[name]["folders"] = folders
    told = [{key: value for key, value in job.items() if key != "folders"} for job in jobs.values()]
    script = Path(__file__).with_name("forked_engines.py")
    run = [sys.executable, str(script), json.dumps(told)]
    subprocess.run(run, check=True, timeout=1200, cwd=Path(__file__).parents[1])
    return jobs


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_answers_as_transformers(name, families, prompts, reference):
    job = families[name]
    found = json.loads(Path(job["out"]).read_text())
    own = type(reference)(Path(job["base"]))
    own.check(found, prompts, chosen(job["folders"]))
    assert own.answer(prompts[0], job["folders"][0]) != own.answer(prompts[0], None)  # or nothing would be seen


LLAMA = [f"model.layers.{layer}.{name}" for layer in range(3) for name in ("mlp.down_proj", "self_attn.o_proj")]


def test_two_ranks_and_the_attention_answer_as_transformers(base, tmp_path, prompts, reference, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # one core each is more than some machines have
    folders = [adapter(tmp_path / f"both-{seed}", seed, LLAMA) for seed in range(2)]
    told = {"only": True, "sites": ["ffn", "attention"]}
    llm = engine(base, additional_config={"redpeft": told}, tensor_parallel_size=2)
    requests = [folder and named(folder.name, folders.index(folder) + 1, folder) for folder in chosen(folders)]
    found = answers(llm, prompts, requests)
    del llm
    gc.collect()
    reference.check(found, prompts, chosen(folders))
