"""What does a training step of RED cost beside its peers, in time and in memory?

    python benchmarks/training_step.py                                          # CPU, about ten minutes on two cores
    python benchmarks/training_step.py --device cuda --dtype bf16 --models llama --layers 22 --width 2048 --tokens 1024

A step is forward, backward, AdamW and zero_grad, on models with random weights. Every method has its own copy of the
model; each round takes one step of each, in a new order, and its times are divided by that round's *frozen floor*:
everything frozen but one bias on the first edited site, the least that any method which edits there can do. The floor
runs twice, so that its second row shows what is noise. benchmarks/README.md says how to read the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from peft import IA3Config, LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import redpeft
from redpeft import RedConfig, find_sites

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MB = 1e6


def bert(layers: int, width: int, tokens: int, vocabulary: int) -> nn.Module:
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=tokens,
        hidden_dropout_prob=0.0,  # the same work for every method, and noise
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False)


def llama(layers: int, width: int, tokens: int, vocabulary: int) -> nn.Module:
    heads = max(1, width // 64)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=-(-8 * width // 3 // 256) * 256,  # 8/3 of the width, as Llama has it
        max_position_embeddings=tokens,
        use_cache=False,
    )
    return LlamaModel(config)


def floor(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    site = model.get_submodule(find_sites(model)[0].name)
    site.bias = nn.Parameter(torch.zeros(site.out_features, dtype=site.weight.dtype, device=site.weight.device))
    return model


MODELS = {"bert": bert, "llama": llama}
FEWEST_ROUNDS = 5
FLOOR = "frozen floor"
METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    FLOOR: floor,
    "floor again": floor,
    "RED": lambda model: get_peft_model(model, RedConfig()),
    "RED, bias alone": lambda model: get_peft_model(model, RedConfig(use_scale=False)),
    "LoRA r=1 on q, v": lambda model: get_peft_model(model, LoraConfig(r=1)),
    "LoRA r=8 on q, v": lambda model: get_peft_model(model, LoraConfig(r=8)),  # PEFT's own default places
    "LoRA r=16 on all": lambda model: get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")),
    "IA3": lambda model: get_peft_model(model, IA3Config()),
    "full": lambda model: model,
}


class Variant:
    """One method on its own copy of the base model, with its own optimiser."""

    def __init__(self, base: nn.Module, method: str, compiled: bool) -> None:
        self.model = METHODS[method](copy.deepcopy(base)).train()
        self.forward = torch.compile(self.model) if compiled else self.model
        self.learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learned, lr=1e-3, fused=True)
        self.seconds: list[float] = []

    def step(self, ids: torch.Tensor, gradient: torch.Tensor) -> None:
        """One optimiser step. A fixed gradient stands for head and loss, which would only dilute the ratios."""
        self.forward(input_ids=ids).last_hidden_state.backward(gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed_step(self, ids: torch.Tensor, gradient: torch.Tensor) -> None:
        synchronize(ids.device)
        start = time.perf_counter()
        self.step(ids, gradient)
        synchronize(ids.device)
        self.seconds.append(time.perf_counter() - start)

    def saved_bytes(self, ids: torch.Tensor, gradient: torch.Tensor) -> int:
        """What autograd keeps between forward and backward, beside the model's own tensors; each storage once."""
        own = {tensor.untyped_storage().data_ptr() for tensor in [*self.model.parameters(), *self.model.buffers()]}
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.step(ids, gradient)
        return sum(size for pointer, size in saved.items() if pointer not in own)

    def peak_bytes(self, ids: torch.Tensor, gradient: torch.Tensor) -> int | None:
        """The most that a step holds on the GPU beside weights and optimiser state."""
        if ids.device.type != "cuda":
            return None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step(ids, gradient)
        return torch.cuda.max_memory_allocated() - before

    def optimizer_bytes(self) -> int:
        return sum(tensor.nbytes for state in self.optimizer.state.values() for tensor in state.values())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model: a dict for each method, the floor first."""
    torch.manual_seed(0)
    if options.compile:
        torch.compiler.reset()
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    base = MODELS[name](options.layers, options.width, options.tokens, options.vocabulary).to(device, dtype)
    ids = torch.randint(0, options.vocabulary, (options.batch, options.tokens), device=device)
    gradient = torch.randn(options.batch, options.tokens, options.width, device=device, dtype=dtype)
    end = time.monotonic() + 60 * options.minutes
    variants, memory = {}, {}
    for method in dict.fromkeys([FLOOR, *options.methods]):
        if variants and time.monotonic() > end:
            print(f"{name}: no time is left for {method}", file=sys.stderr)
            continue
        variants[method] = variant = Variant(base, method, options.compile)
        variant.step(ids, gradient)  # compiles, makes the optimiser's state, measures RED's units
        memory[method] = variant.saved_bytes(ids, gradient), variant.peak_bytes(ids, gradient)
        variant.step(ids, gradient)

    order = list(variants.values())
    for done in track(range(options.rounds), name, console=Console(stderr=True), transient=True):
        if done >= FEWEST_ROUNDS and time.monotonic() > end:
            break
        random.shuffle(order)
        for variant in order:
            variant.timed_step(ids, gradient)

    rows = []
    site_bytes = gradient.nbytes * len(find_sites(base))
    for method, variant in variants.items():
        ratios = [own / floor for own, floor in zip(variant.seconds, variants[FLOOR].seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        saved, peak = memory[method]
        rows.append(
            {
                "method": method,
                "parameters": sum(parameter.numel() for parameter in variant.learned),
                "seconds": statistics.median(variant.seconds),
                "ratio": middle,
                "ratio_quartiles": [low, high],
                "saved_bytes": saved,
                "saved_activations_per_site": (saved - memory[FLOOR][0]) / site_bytes,
                "optimizer_bytes": variant.optimizer_bytes(),
                "peak_bytes": peak,
            }
        )
    return rows


def load_average() -> float:
    """How many processes wanted a core over the last minute: other work on the machine shows here."""
    return round(os.getloadavg()[0], 2)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "peft")},
        "redpeft": redpeft.__version__,  # also where it runs from its sources
    }


def table(name: str, rows: list[dict[str, Any]]) -> Table:
    shown = Table("method", title=name, title_justify="left")
    with_peak = rows[0]["peak_bytes"] is not None
    headings = ["parameters", "ms/step", "ratio to floor", "quartiles", "saved MB", "more a site", "AdamW MB"]
    for heading in [*headings, "peak MB"] if with_peak else headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        low, high = row["ratio_quartiles"]
        cells = [
            f"{row['parameters']:,}",
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['ratio']:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{row['saved_bytes'] / MB:.1f}",
            f"{row['saved_activations_per_site']:.2f}",
            f"{row['optimizer_bytes'] / MB:.2f}",
        ]
        if with_peak:
            cells.append(f"{row['peak_bytes'] / MB:.1f}")
        shown.add_row(row["method"], *cells)
    return shown


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="architectures")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="beside the frozen floor")
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each method, at least 2")
    parser.add_argument("--layers", type=int, default=6, help="transformer blocks")
    parser.add_argument("--width", type=int, default=768, help="hidden size")
    parser.add_argument("--vocabulary", type=int, default=32000, help="rows of the embedding")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the base model")
    parser.add_argument("--compile", action="store_true", help="compile the models with torch.compile")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="of a model: then no method and no round begins"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    random.seed(0)
    torch.set_num_threads(options.threads)
    if options.compile:
        torch._dynamo.config.recompile_limit = 64  # the variants run the same code on different modules
    report = {"machine": machine(options), "settings": vars(options)}
    report["models"] = {name: measure(name, options) for name in options.models}
    report["machine"]["load_average_after"] = load_average()
    if options.json:
        print(json.dumps(report, indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    for name, rows in report["models"].items():
        console.print(table(name, rows))
    for part in ("machine", "settings"):
        console.print(f"{part}: " + ", ".join(f"{key} {value}" for key, value in report[part].items()), soft_wrap=True)


if __name__ == "__main__":
    main()
