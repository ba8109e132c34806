"""A tiny language model that says something, stops now and then, and minds what it has seen; and adapters on it."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

from redpeft import RedConfig

from .models import llama, save


def write_talker(folder: Path, tokenizer_folder: Path, seed: int = 0) -> Path:
    """A Llama with large random weights (outputs far apart) and an end token that is likely enough to come."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    large = {"max_position_embeddings": 512, "initializer_range": 0.4, "tie_word_embeddings": False}
    model = llama(tokenizer, seed, **large)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 1.3
    return save(folder, model, tokenizer)


def write_red(folder: Path, base: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = RedConfig(task_type="CAUSAL_LM", init_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def write_lora(folder: Path, base: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def write_prompt(folder: Path, base: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def chat_prompts(base: Path, *questions: str) -> list[list[int]]:
    """The tokens of each question to a chat model, up to where its answer begins."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    chats = [[{"role": "user", "content": question}] for question in questions]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
