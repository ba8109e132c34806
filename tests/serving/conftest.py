"""A tiny Llama that an engine can serve, adapters, and transformers' answers with the same edits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from helpers.models import llama, save
from redpeft.models import fingerprint

from .tiny_adapters import LAYERS, SITES, TOKENS, WIDTH, adapter

PROMPTS = ["The quick brown fox", "serve", "A table of edits, a gather, a sum", "zebra crossing"]


os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


@pytest.fixture(scope="session")
def base(tmp_path_factory, tiny_chat_tokenizer) -> Path:
    """A saved LlamaForCausalLM with weights large enough that its answers differ from prompt to prompt."""
    model = llama(
        tiny_chat_tokenizer,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        intermediate_size=256,
        initializer_range=0.2,
    )
    return save(tmp_path_factory.mktemp("base"), model, tiny_chat_tokenizer)


@pytest.fixture(scope="session")
def own_fingerprint(base) -> dict:
    """What an adapter that was trained on this base model says of it."""
    from transformers import AutoModelForCausalLM

    return fingerprint(AutoModelForCausalLM.from_pretrained(base), SITES)


@pytest.fixture(scope="session")
def other_fingerprint(own_fingerprint) -> dict:
    """Of a base model of the same shape, such as its chat version."""
    return {**own_fingerprint, "samples": [1.02 * value for value in own_fingerprint["samples"]]}


@pytest.fixture(scope="session")
def adapters(tmp_path_factory) -> list[Path]:
    """Twelve adapters; the last one edits a single layer."""
    root = tmp_path_factory.mktemp("adapters")
    some = [adapter(root / f"edit-{seed}", seed) for seed in range(11)]
    return [*some, adapter(root / "edit-11", 11, SITES[1:2])]


class Reference:
    """transformers' greedy answers, with an adapter that PEFT has loaded or with none.

    An answer ends before a near tie of two tokens, which the order of summation may decide either way.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self._known: dict[tuple, list[int]] = {}

    @torch.no_grad()
    def answer(self, prompt: list[int], folder: Path | None, tokens: int = TOKENS) -> list[int]:
        key = (tuple(prompt), folder, tokens)
        if key not in self._known:
            from peft import PeftModel
            from transformers import AutoModelForCausalLM

            import redpeft  # noqa: F401  # PEFT knows RED after it

            model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
            if folder is not None:
                model = PeftModel.from_pretrained(model, str(folder))
            ids = torch.tensor([prompt])
            model.eval()
            for _ in range(tokens):
                logits = model(input_ids=ids).logits[0, -1]
                first, second = logits.topk(2).values.tolist()
                if first - second < 2e-4 * abs(first):
                    break
                ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
            self._known[key] = ids[0, len(prompt) :].tolist()
        return self._known[key]

    def check(self, found: list[list[int]], prompts: list[list[int]], folders: list[Path | None]) -> None:
        """That these are the answers; of all their tokens, nine in ten at least are not beyond a tie."""
        expected = [
            self.answer(prompt, folder, len(answer))
            for answer, prompt, folder in zip(found, prompts, folders, strict=True)
        ]
        assert [answer[: len(known)] for answer, known in zip(found, expected, strict=True)] == expected
        assert sum(map(len, expected)) >= 0.9 * sum(map(len, found))


@pytest.fixture(scope="session")
def reference(base) -> Reference:
    return Reference(base)


@pytest.fixture(scope="session")
def prompts(tiny_chat_tokenizer) -> list[list[int]]:
    return [tiny_chat_tokenizer(text)["input_ids"] for text in PROMPTS]
