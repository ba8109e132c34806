"""SmolLM2-135M-Instruct in vLLM: an adapter by the plug-in, and the same one folded, by an engine without it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from helpers.language_models import chat_prompts
from redpeft import RedConfig
from redpeft.adapters.fold import fold
from redpeft.models import SHORT_NAMES, export_base

from .conftest import Reference

PACKAGE = SHORT_NAMES["smollm2"]
pytestmark = [
    pytest.mark.serving,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec(PACKAGE.package) is None, reason=f"the chat model is not installed: {PACKAGE.install}"
    ),
]
QUESTIONS = ["What is the capital of France?", "Write a line about the sea.", "Count from one to five."]
ENGINE = """\
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
base, adapter, prompts = json.loads(sys.argv[1])
lora = {"enable_lora": True, "max_loras": 2, "additional_config": {"redpeft": {"only": True}}} if adapter else {}
llm = LLM(base, dtype="float32", max_model_len=128, max_num_seqs=4, enforce_eager=True, seed=0, **lora)
greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
request = LoRARequest("one", 1, adapter) if adapter else None
found = llm.generate([{"prompt_token_ids": each} for each in prompts], greedy, lora_request=request, use_tqdm=False)
print("found", json.dumps([list(each.outputs[0].token_ids) for each in found]))
"""


def answers(base: Path, adapter: Path | None, prompts: list[list[int]], plugins: str) -> list[list[int]]:
    """Greedy tokens of an engine in a process of its own."""
    asked = json.dumps([str(base), adapter and str(adapter), prompts])
    environment = {**os.environ, "VLLM_PLUGINS": plugins, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-c", ENGINE, asked]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.rpartition("found ")[2])


@pytest.mark.timeout(1800)
def test_an_adapter_and_its_fold_answer_as_in_transformers(tmp_path):
    base, adapter, folded = tmp_path / "base", tmp_path / "adapter", tmp_path / "folded"
    export_base("smollm2", base)
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), RedConfig(task_type="CAUSAL_LM", init_weights=False)
    )
    with torch.no_grad():  # random edits at full strength write nothing that can be read
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.05)
    model.save_pretrained(adapter)
    fold(adapter, folded, base)
    prompts = chat_prompts(base, *QUESTIONS)
    reference = Reference(base)
    by_plugin = answers(base, adapter, prompts, plugins="redpeft")
    reference.check(by_plugin, prompts, [adapter] * 3)
    reference.check(answers(folded, None, prompts, plugins=""), prompts, [adapter] * 3)
    assert reference.answer(prompts[0], None) != reference.answer(prompts[0], adapter)
