"""What does it gain to train K adapters in a fleet, and what does a step cost with ever more slots?

    python benchmarks/fleet.py jobs --data ../shared/data                # K jobs in a fleet, and one after another
    python benchmarks/fleet.py jobs --data ../shared/data --counts 200   # 200 small data sets
    python benchmarks/fleet.py slots                                     # a step of 64 rows with 1 to 4,096 slots
    python benchmarks/fleet.py slots --model llama-1b                    # on a GPU: 16 to 4,096 slots, bf16 decoder
    python benchmarks/fleet.py rows                                      # a row in batches of 1 to 64, and in a fleet

The jobs are small data sets cut from SST-2, AG News and CoLA, each with other rows and its classes renamed, on a
pretrained encoder of 22M parameters (`pip install redpeft[demo]`). The ways, each a process with its start-up:

    fleet       `redpeft fleet`'s own function on all jobs
    one by one  the same jobs by `redpeft train`'s own function, one after the other in one process
    LoRA        the same with PEFT's LoRA (r=8)
    commands    `redpeft train` for each job; of more than 8 jobs the first 8, and the time of all by their mean
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

import redpeft
from redpeft.demo import find_encoder
from redpeft.fleet import Fleet, Rates
from redpeft.fleet.queue import Job
from redpeft.runs.runner import run_fleets
from redpeft.tasks.files import read_file
from redpeft.training.recipe import load_recipe
from redpeft.training.train import train

WAYS = ("fleet", "one by one", "LoRA", "commands")
MOST_COMMANDS = 8
RATES = Rates(3e-2, 3e-2, 0.0, 1.0)


def make_sets(data: Path, folder: Path, count: int, rows: int) -> list[Path]:
    """`count` data sets of so many training rows and half as many to validate, their classes given other names."""
    sources = [read_file(data / name / "train.jsonl") for name in ("sst2", "ag_news", "cola")]
    sets = []
    for number in range(count):
        draw, source = random.Random(number), sources[number % len(sources)]
        chosen = source.select(draw.sample(range(len(source)), rows + rows // 2))
        names = {value: f"class {draw.randrange(10**6)}" for value in sorted(set(source["label"]))}
        lines = [json.dumps({"text": row["sentence"], "label": names[row["label"]]}) + "\n" for row in chosen]
        path = folder / f"set-{number:03}"
        path.mkdir(parents=True)
        (path / "train.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
        (path / "validation.jsonl").write_text("".join(lines[rows:]), encoding="utf-8")
        sets.append(path)
    return sets


def work(way: str, sets: Sequence[Path], out: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Train a job on each data set in this process: its peak memory, the mean accuracy and the steps."""
    values = {**values, "method": "lora" if way == "LoRA" else "red"}
    jobs = [Job(load_recipe(None, {**values, "data": str(path)}).alone(), out / path.name) for path in sets]
    results = run_fleets(jobs).values() if way == "fleet" else [train(job.recipe, job.folder) for job in jobs]
    assert not any("error" in result for result in results), results
    score = statistics.fmean(result["validation"]["accuracy"] for result in results)
    return {"peak": _peak(), "accuracy": score, "steps": sum(result["steps"] for result in results)}


def run_way(way: str, sets: Sequence[Path], values: dict[str, Any]) -> dict[str, Any]:
    """Its seconds for all sets, start-up included, beside what `work` says (nothing, of commands)."""
    found: dict[str, Any] = {}
    used = sets[:MOST_COMMANDS] if way == "commands" else sets
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        if way == "commands":
            for path in used:
                fields = [f"{key}={value}" for key, value in {**values, "data": path}.items()]
                _run("-m", "redpeft", "train", *fields, "--out", f"{out}/{path.name}")
        else:
            lists = json.dumps([str(path) for path in sets]), json.dumps(values)
            found = json.loads(_run(__file__, "work", way, out, *lists).splitlines()[-1])
    return {**found, "seconds": (time.perf_counter() - began) * len(sets) / len(used)}


def _run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def compare(sets: Sequence[Path], counts: Sequence[int], ways: Sequence[str], values: dict[str, Any]) -> Table:
    table = Table(title=f"K jobs, batches of {values['batch_size']}, {values['epochs']} epochs")
    for name in ("K", "way", "seconds", "a job", "times the fleet's", "peak memory", "accuracy"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for count in counts:
        found = {way: run_way(way, sets[:count], values) for way in ways}
        for way, one in found.items():
            seconds = one["seconds"]
            shown = [f"{seconds:.1f}", f"{seconds / count:.2f}", f"{seconds / found['fleet']['seconds']:.2f}"]
            shown += [f"{one['peak'] / 2**30:.2f} GiB", f"{100 * one['accuracy']:.1f}"] if "peak" in one else ["", ""]
            table.add_row(str(count), way, *shown)
    return table


def step_times(model_name: str, slots: Sequence[int], rows: int, tokens: int, steps: int) -> Table:
    """Medians of a training step of `rows` rows that belong to as many slots as there are, at most one a row.

    The sizes take turns, so that what else the machine does meets all of them.
    """
    model, vocabulary, labels = _model(model_name)
    fleets = {}
    for count in slots:
        fleets[count] = Fleet(model, count)
        for slot in range(count):
            fleets[count].fill(slot)
    seconds: dict[int, list[float]] = {count: [] for count in slots}
    memory: dict[int, int] = {}
    draw = random.Random(0)
    for step in range(steps + 1):
        for count, fleet in fleets.items():
            owners = [draw.randrange(count) for _ in range(rows)] if count < rows else draw.sample(range(count), rows)
            ids = torch.randint(5, vocabulary, (rows, tokens), device=fleet.device)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels(ids)}
            if fleet.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            began = time.perf_counter()
            fleet.step(batch, owners, dict.fromkeys(owners, RATES))
            if step:  # the first is the warm-up
                seconds[count].append(time.perf_counter() - began)
            memory[count] = _peak()
    table = Table(title=f"{model_name}: a step of {rows} rows of {tokens} tokens, medians of {steps}")
    for name in ("slots", "ms", "quartiles", "times 1 slot's", "table and moments", "peak memory"):
        table.add_column(name, justify="right")
    first = statistics.median(seconds[slots[0]])
    for count, fleet in fleets.items():
        low, middle, high = (1000 * value for value in statistics.quantiles(seconds[count], n=4))
        state = sum(part.numel() * part.element_size() for part in fleet.state)
        sizes = f"{state / 2**20:,.1f} MiB", f"{memory[count] / 2**30:.2f} GiB"
        table.add_row(f"{count:,}", f"{middle:.0f}", f"{low:.0f}-{high:.0f}", f"{middle / 1000 / first:.3f}", *sizes)
    return table


def row_times(sizes: Sequence[int], lengths: Sequence[int], rows: int, steps: int) -> Table:
    """Milliseconds a row of a training step: in batches of these sizes, and in a fleet of jobs of 4 rows each."""
    model, vocabulary, labels = _model("minilm")
    fleet = Fleet(model, rows)
    for slot in range(rows):
        fleet.fill(slot)
    optimiser = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-2)

    def alone(batch: dict[str, torch.Tensor]) -> None:
        model(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    def together(batch: dict[str, torch.Tensor]) -> None:
        owners = [row // 4 for row in range(rows)]
        fleet.step(batch, owners, dict.fromkeys(owners, RATES))

    table = Table("tokens", *(f"batches of {size}" for size in sizes), f"a fleet, {rows} rows", title="ms a row")
    for tokens in lengths:
        cells = []
        for size, step in [*((size, alone) for size in sizes), (rows, together)]:
            ids = torch.randint(5, vocabulary, (size, tokens), device=fleet.device)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels(ids)}
            cells.append(f"{1000 * _median_seconds(partial(step, batch), steps) / size:.1f}")
        table.add_row(str(tokens), *cells)
    return table


def _median_seconds(function: Callable[[], None], times: int) -> float:
    seconds = []
    for _ in range(times + 1):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])  # the first is the warm-up


def _model(name: str) -> tuple[Any, int, Any]:
    """A model with RED, the size of its vocabulary, and labels for a batch of token ids."""
    if name == "llama-1b":
        config = LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=True,
        )  # fmt: skip
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        adapted = get_peft_model(base.to(_device()), redpeft.RedConfig(task_type="CAUSAL_LM"))
        vocabulary, labels = config.vocab_size, torch.clone
    else:
        base = AutoModelForSequenceClassification.from_pretrained(find_encoder(), num_labels=2).to(_device())
        adapted = get_peft_model(base, redpeft.RedConfig(task_type="SEQ_CLS", modules_to_save=["classifier"]))
        vocabulary, labels = base.config.vocab_size, lambda ids: ids[:, 0] % 2
    redpeft.calibrate(adapted)
    return adapted, vocabulary, labels


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return max(psutil.Process().memory_info().rss, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("jobs")
    one.add_argument("--data", type=Path, required=True, help="folder with sst2, ag_news and cola")
    one.add_argument("--counts", default="1,8,32,128", help="comma-separated")
    one.add_argument("--rows", type=int, default=32, help="to train on, of each data set")
    one.add_argument("--batch-size", type=int, default=4)
    one.add_argument("--epochs", type=int, default=3)
    one.add_argument("--ways", default=",".join(WAYS))
    one = commands.add_parser("slots")
    one.add_argument("--model", choices=("minilm", "llama-1b"), default="minilm")
    one.add_argument("--slots", default=None, help="comma-separated")
    one.add_argument("--rows", type=int, default=64)
    one.add_argument("--tokens", type=int, default=32)
    one.add_argument("--steps", type=int, default=20)
    one = commands.add_parser("rows")
    one.add_argument("--sizes", default="1,4,8,16,64")
    one.add_argument("--lengths", default="16,32,64", help="in tokens")
    one.add_argument("--rows", type=int, default=64, help="of the fleet's pass")
    one.add_argument("--steps", type=int, default=9)
    one = commands.add_parser("work")  # of `jobs`, in a process of its own
    for name in ("way", "out", "sets", "values"):
        one.add_argument(name)
    asked = parser.parse_args()
    if asked.command == "work":
        sets = [Path(path) for path in json.loads(asked.sets)]
        print(json.dumps(work(asked.way, sets, Path(asked.out), json.loads(asked.values))))
    elif asked.command == "rows":
        sizes, lengths = ([int(part) for part in text.split(",")] for text in (asked.sizes, asked.lengths))
        Console().print(row_times(sizes, lengths, asked.rows, asked.steps))
    elif asked.command == "slots":
        default = "16,256,1024,4096" if asked.model == "llama-1b" else "1,8,64,256,1024,4096"
        slots = [int(count) for count in (asked.slots or default).split(",")]
        Console().print(step_times(asked.model, slots, asked.rows, asked.tokens, asked.steps))
    else:
        counts = [int(count) for count in asked.counts.split(",")]
        values = {"base": find_encoder(), "batch_size": asked.batch_size, "epochs": asked.epochs}
        with tempfile.TemporaryDirectory() as folder:
            sets = make_sets(asked.data, Path(folder), max(counts), asked.rows)
            Console().print(compare(sets, counts, asked.ways.split(","), values))


if __name__ == "__main__":
    main()
