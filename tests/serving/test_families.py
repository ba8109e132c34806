"""Other models than Llama, other sites than the FFN, and two ranks."""

from __future__ import annotations

import gc

import pytest
import torch

from .making import WIDTH, adapter
from .test_engine import answers, engine, named

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


@pytest.fixture
def save(tmp_path, tiny_chat_tokenizer):
    def save(make):
        torch.manual_seed(0)
        model, sites = make()
        model.save_pretrained(tmp_path / "base")
        tiny_chat_tokenizer.save_pretrained(tmp_path / "base")
        return tmp_path / "base", [adapter(tmp_path / f"edit-{seed}", seed, sites) for seed in range(2)]

    return save


def check(base, folders, prompts, reference_type, **options):
    only = {"only": True, **options.pop("told", {})}
    llm = engine(base, additional_config={"redpeft": only}, **options)
    chosen = [folders[0], None, folders[1], folders[0]]
    requests = [folder and named(folder.name, folders.index(folder) + 1, folder) for folder in chosen]
    found = answers(llm, prompts, requests)
    del llm
    gc.collect()
    reference_type(base).check(found, prompts, chosen)


@pytest.mark.parametrize("make", [gpt2, opt, mixtral])
def test_a_family_answers_as_transformers(make, save, prompts, reference):
    base, folders = save(make)
    check(base, folders, prompts, type(reference))


LLAMA = [f"model.layers.{layer}.{name}" for layer in range(3) for name in ("mlp.down_proj", "self_attn.o_proj")]


def test_two_ranks_and_the_attention_answer_as_transformers(base, tmp_path, prompts, reference, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # one core each is more than some machines have
    folders = [adapter(tmp_path / f"both-{seed}", seed, LLAMA) for seed in range(2)]
    told = {"sites": ["ffn", "attention"]}
    check(base, folders, prompts, type(reference), told=told, tensor_parallel_size=2)
