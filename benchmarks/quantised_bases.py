"""How much memory does a base model take in each number format, and what do the edits add to it?

python benchmarks/quantised_bases.py                          # a Llama of 4 blocks of width 2048
python benchmarks/quantised_bases.py --layers 2 --width 512   # a smaller one
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from redpeft import RedConfig
from redpeft.tuner.edit import Edit

MB = 1e6


def formats() -> dict[str, dict[str, Any]]:
    """Arguments of `from_pretrained`, for what is installed; what is not quantised is bf16."""
    found: dict[str, dict[str, Any]] = {"fp32": {"dtype": torch.float32}, "bf16": {"dtype": torch.bfloat16}}
    configs = {}
    if importlib.util.find_spec("bitsandbytes"):
        four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        configs["8bit"] = BitsAndBytesConfig(load_in_8bit=True)
        configs["4bit"] = BitsAndBytesConfig(load_in_4bit=True, **four)
    if importlib.util.find_spec("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig

        configs["int8_weight_only"] = TorchAoConfig(Int8WeightOnlyConfig())
    return found | {name: {**found["bf16"], "quantization_config": config} for name, config in configs.items()}


def nbytes(tensor: torch.Tensor) -> int:
    """The bytes of a tensor, or of those inside one of torchao's."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def held(module: nn.Module) -> int:
    """The bytes of a module's parameters and buffers, with what a quantiser keeps beside them."""
    return sum(nbytes(tensor) for tensor in module.state_dict().values())


def edits(model: nn.Module) -> list[Edit]:
    return [module for module in model.modules() if isinstance(module, Edit)]


def saved_by_edits(model: nn.Module, ids: torch.Tensor) -> int:
    """What the edits make autograd keep from the forward to the backward pass, beside their own vectors."""
    own = {tensor.data_ptr() for edit in edits(model) for tensor in edit.state_dict().values()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    around = ExitStack()
    for edit in edits(model):
        edit.register_forward_pre_hook(
            lambda *_: around.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        )
        edit.register_forward_hook(lambda *_: around.close())
    model.train()(input_ids=ids)
    return sum(size for pointer, size in saved.items() if pointer not in own)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
        intermediate_size=4 * options.width,
    )
    plain = LlamaForCausalLM(config).to(torch.bfloat16)
    weights = sum(parameter.numel() for parameter in plain.model.layers.parameters())
    ids = torch.randint(0, options.vocabulary, (options.batch, options.tokens))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        del plain
        for name, arguments in formats().items():
            base = LlamaForCausalLM.from_pretrained(folder, **arguments)
            base_bytes, block_bytes = held(base), held(base.model.layers)
            model = get_peft_model(base, RedConfig(task_type="CAUSAL_LM"))
            model.train()(input_ids=ids[:1])  # measures the units
            activation = options.batch * options.tokens * options.width * arguments["dtype"].itemsize
            rows.append(
                {
                    "format": name,
                    "base_bytes": base_bytes,
                    "block_bytes": block_bytes,
                    "bits_per_block_weight": 8 * block_bytes / weights,
                    "edit_bytes": sum(map(held, edits(model))),
                    "saved_activations_per_site": saved_by_edits(model, ids) / activation / options.layers,
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("base")
    for heading in ("whole base MB", "its blocks MB", "bits a weight", "edits MB", "kept a site"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row["format"],
            f"{row['base_bytes'] / MB:.1f}",
            f"{row['block_bytes'] / MB:.1f}",
            f"{row['bits_per_block_weight']:.2f}",
            f"{row['edit_bytes'] / MB:.4f}",
            f"{row['saved_activations_per_site']:.2f}",
        )
    return shown


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
    parser.add_argument("--width", type=int, default=2048, help="hidden size")
    parser.add_argument("--vocabulary", type=int, default=32000, help="rows of the embedding")
    parser.add_argument("--batch", type=int, default=2, help="sequences in a step")
    parser.add_argument("--tokens", type=int, default=64, help="tokens in a sequence")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(0)
    packages = ("torch", "transformers", "peft", "redpeft", "bitsandbytes", "torchao")
    versions = {name: version(name) for name in packages if importlib.util.find_spec(name)}
    rows = measure(options)
    if options.json:
        print(json.dumps({"versions": versions, "settings": vars(options), "bases": rows}, indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(rows))
    console.print(
        ", ".join(f"{name} {number}" for name, number in (versions | vars(options)).items()), highlight=False
    )


if __name__ == "__main__":
    main()
