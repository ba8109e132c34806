"""How long does it take to fold an adapter into a model of 1.2 billion parameters, and how much memory?

`redpeft fold` (fp32 arithmetic, file by file, and a report of what rounding did) beside PEFT's way for a LoRA:
`from_pretrained`, `merge_and_unload().save_pretrained()`. The model has Llama-3.2-1B's shape with random bf16 weights.
Each run is a process of its own, in turns; "peak" is the largest resident memory of the process, mapped files
included. Copying the base's files is the floor of any method that writes a whole checkpoint.

    python benchmarks/fold.py
    python benchmarks/fold.py --scale 0.25 --rounds 1     # a quick look: a quarter of the width
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

import redpeft
from redpeft.adapters.fold import fold

WAYS = ("copy", "redpeft fold", "LoRA merge_and_unload")


def prepare(folder: Path, scale: float) -> None:
    """Write the base model, a RED adapter with random edits and a LoRA adapter (r=16 on all linears) for it."""
    width = int(2048 * scale)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="1GB")
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear", init_lora_weights=False)
    red = redpeft.RedConfig(task_type="CAUSAL_LM", init_weights=False)
    for name, method in (("lora", lora), ("red", red)):
        adapted = get_peft_model(model, method)
        adapted.save_pretrained(folder / name)
        model = adapted.unload()


def work(way: str, folder: Path) -> None:
    out = folder / "out"
    if way == "copy":
        shutil.copytree(folder / "base", out)
    elif way == "redpeft fold":
        fold(folder / "red", out, folder / "base")
    else:
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        PeftModel.from_pretrained(base, folder / "lora").merge_and_unload().save_pretrained(out)


def _peak_gib() -> float:
    """This process's largest resident memory. `getrusage` would count that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20


def measure(way: str, folder: Path, threads: int) -> tuple[float, float]:
    """Seconds and peak memory in GiB of one run in a process of its own, imports left out of the seconds."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [sys.executable, __file__, "--work", way, "--folder", str(folder), "--threads", str(threads)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(answer[-2]), float(answer[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the width")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where to work, with 8 GB free; a temporary folder by default")
    args = parser.parse_args()
    if args.work:
        torch.set_num_threads(args.threads)
        start = time.perf_counter()
        work(args.work, args.folder)
        seconds = time.perf_counter() - start
        print(seconds, _peak_gib())
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        prepare(folder, args.scale)
        size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        runs = [{way: measure(way, folder, args.threads) for way in WAYS} for _ in range(args.rounds)]
    table = Table(title=f"base of {size / 2**30:.2f} GiB in bf16, {args.threads} threads, medians of {args.rounds}")
    for column in ("", "seconds", "range", "peak GiB"):
        table.add_column(column)
    for way in WAYS:
        seconds, peaks = zip(*(run[way] for run in runs), strict=True)
        spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
        table.add_row(way, f"{statistics.median(seconds):.1f}", spread, f"{statistics.median(peaks):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
