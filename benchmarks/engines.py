"""A base model, adapters on disk, and engines that answer in processes of their own: for `serving.py`."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from redpeft import RedConfig
from redpeft.storage import WEIGHTS_NAME

BASE = "base"
METHODS = {
    "RED": lambda: RedConfig(task_type="CAUSAL_LM", init_weights=False),
    "LoRA r=8": lambda: LoraConfig(r=8, target_modules=PLACES["LoRA r=8"], init_lora_weights=False),
    "LoRA r=16": lambda: LoraConfig(r=16, target_modules=PLACES["LoRA r=16"], init_lora_weights=False),
}
PLACES = {
    "LoRA r=8": ["q_proj", "v_proj"],
    "LoRA r=16": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
DISTINCT = 16  # adapters with numbers of their own; the others are links to these under other names
# vLLM asks for tcmalloc on CPUs, which keeps the memory of large tensors for the next ones. glibc's allocator, left as
# it is, gives it back to the system each time; LoRA, which copies each token's matrices, then takes twice as long.
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
VOCABULARY = 32_000


# --- what is served --------------------------------------------------------------------------------------------------


def make_base(folder: Path, layers: int, width: int) -> Path:
    torch.manual_seed(0)
    heads = max(1, width // 64)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=-(-8 * width // 3 // 32) * 32,  # 8/3 of the width, as Llama has it
        max_position_embeddings=2048,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_adapters(base: Path, method: str, root: Path, count: int, distinct: int = DISTINCT) -> list[Path]:
    """Adapters far from the identity, each in a folder of its own."""
    first = root / "0"
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), METHODS[method]()).save_pretrained(first)
    tensors = load_file(first / WEIGHTS_NAME)
    for number in range(1, count):
        folder, known = root / str(number), root / str(number % distinct)
        shutil.copytree(first if number < distinct else known, folder, copy_function=os.link)
        if number < distinct:
            (folder / WEIGHTS_NAME).unlink()
            save_file({k: t * (1 + 0.1 * torch.randn_like(t)) for k, t in tensors.items()}, folder / WEIGHTS_NAME)
    return [root / str(number) for number in range(count)]


# --- an engine in its own process ------------------------------------------------------------------------------------


class Engine:
    """What a process does when it is told to. `way`: "base" or a method."""

    def __init__(self, way: str, base: Path, folders: Sequence[Path], settings: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        lora: dict[str, Any] = {}
        if way != BASE:
            lora = {
                "enable_lora": True,
                "max_loras": settings["slots"],
                "max_cpu_loras": max(len(folders), settings["slots"]),
            }
        if way == "RED":
            lora["additional_config"] = {"redpeft": {"only": True}}
        elif way != BASE:
            lora["max_lora_rank"] = METHODS[way]().r
            lora["lora_target_modules"] = PLACES[way]  # vLLM makes slots for every linear and the vocabulary otherwise
        self.llm = LLM(
            str(base),
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=settings["prompt"] + settings["tokens"],
            max_num_seqs=settings["slots"],
            enforce_eager=not settings["compile"],
            enable_prefix_caching=False,  # no two prompts are alike
            seed=0,
            **lora,
        )
        self.engine, self.settings = self.llm.llm_engine, settings
        self.requests = [LoRARequest(folder.name, n + 1, str(folder)) for n, folder in enumerate(folders)]
        self.numbers = itertools.count()
        self.vocabulary = self.engine.model_config.get_vocab_size()

    def add(self, prompt: list[int], adapter: int | None) -> str:
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=self.settings["tokens"], ignore_eos=True, detokenize=False)
        request, name = (
            None if adapter is None or not self.requests else self.requests[adapter],
            str(next(self.numbers)),
        )
        self.engine.add_request(name, {"prompt_token_ids": prompt}, greedy, lora_request=request)
        return name

    def warm(self, count: int) -> None:
        """Load the adapters into the engine's memory."""
        for request in self.requests[:count]:
            self.engine.add_lora(request)

    def run(self, seed: int, requests: int, first: int, adapters: int) -> float:
        """Seconds for so many requests at once, the adapters taking turns from the `first` on."""
        draw = random.Random(seed)
        for number in range(requests):
            self.add(self.prompt(draw), (first + number) % adapters)
        began = time.perf_counter()
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return time.perf_counter() - began

    def prompt(self, draw: random.Random) -> list[int]:
        return [draw.randrange(3, self.vocabulary) for _ in range(self.settings["prompt"])]

    def open_loop(self, seed: int, rate: float, seconds: float, adapters: int) -> list[float]:
        """Seconds to the first token of each request. They arrive at `rate` a second whether or not others are
        answered yet (Poisson), each with an adapter drawn by Zipf's law; the engine sees them between its steps."""
        draw = random.Random(seed)
        shares = [1 / rank for rank in range(1, adapters + 1)]
        arrivals = []
        now = draw.expovariate(rate)
        while now < seconds:
            arrivals.append((now, self.prompt(draw), draw.choices(range(adapters), shares)[0]))
            now += draw.expovariate(rate)
        came: dict[str, float] = {}
        waits: dict[str, float] = {}
        waiting = iter(arrivals)
        due = next(waiting, None)
        began = time.perf_counter()
        while due is not None or self.engine.has_unfinished_requests():
            while due is not None and due[0] <= time.perf_counter() - began:
                came[self.add(*due[1:])] = due[0]
                due = next(waiting, None)
            if self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    waits.setdefault(output.request_id, time.perf_counter() - began - came[output.request_id])
            elif due is not None:
                time.sleep(max(0.0, due[0] - (time.perf_counter() - began)))
        return list(waits.values())

    def load(self, number: int) -> float:
        """Seconds to load an adapter whose files the system has been told to forget."""
        request = self.requests[number]
        for file in Path(request.lora_path).iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        began = time.perf_counter()
        self.engine.add_lora(request)
        return time.perf_counter() - began

    def slot_bytes(self) -> int:
        """Bytes of the engine's tables for one adapter."""
        return self.llm.apply_model(_slot_bytes)[0]


def _slot_bytes(model: torch.nn.Module) -> int:
    manager = model.lora_manager
    if tables := getattr(manager, "tables", None):
        return sum(table.rows[0].nbytes for table in tables.values())
    stacks = [
        stack for module in manager.modules.values() for stack in (*module.lora_a_stacked, *module.lora_b_stacked)
    ]
    return sum(stack.nbytes for stack in stacks) // manager.lora_slots


def serve(pipe: Any, *arguments: Any) -> None:
    """The process of an engine: answers each (name of a method, arguments) that comes."""
    engine = Engine(*arguments)
    pipe.send(None)
    while (told := pipe.recv()) is not None:
        pipe.send(getattr(engine, told[0])(*told[1:]))


Ask = Callable[..., Any]


@contextmanager
def engines(ways: dict[str, Sequence[Path]], base: Path, settings: dict[str, Any]) -> Iterator[dict[str, Ask]]:
    """An engine for each way and its adapters, started one after another; each is asked by a method's name."""
    context = multiprocessing.get_context("spawn")
    asked: dict[str, Ask] = {}
    running = []
    try:
        for way, folders in ways.items():
            here, there = context.Pipe()
            environment = {
                "OMP_NUM_THREADS": str(settings["threads"]),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_LOGGING_LEVEL": "ERROR",
                "VLLM_LOGGING_STREAM": "ext://sys.stderr",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_PLUGINS": "redpeft" if way == "RED" else "",
                **KEPT,
            }
            process = context.Process(target=serve, args=(there, way, base, folders, settings))
            with patch.dict(os.environ, environment):  # some of these count only before a process starts
                process.start()
            there.close()
            running.append((process, here))
            here.recv()
            asked[way] = partial(_ask, here)
        yield asked
    finally:
        for process, here in running:
            if process.is_alive():
                here.send(None)
            process.join(30)
            process.kill()


def _ask(pipe: Any, *told: Any) -> Any:
    pipe.send(told)
    return pipe.recv()
