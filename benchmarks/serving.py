"""What do adapters cost a vLLM server: RED beside LoRA, and beside the base model alone?

    python benchmarks/serving.py throughput    # tokens a second with 1 to 1,024 adapters in one stream of requests
    python benchmarks/serving.py load          # time to load an adapter from disk, and the memory of a slot
    python benchmarks/serving.py latency       # time to the first token under open-loop load, 1,000 adapters

On vLLM's CPU build (`make test-serving` makes an environment). The base is a Llama with random weights, or the model
in the folder --base, in fp32. Each way is an engine in a process of its own; they are all alive and take turns, in a
new order each round:

    base        vLLM without adapters; `base again` is the same engine once more: how far it is from 1 is noise
    RED         the plug-in, RED alone
    LoRA r=8    on q and v, vLLM's own LoRA without the plug-in
    LoRA r=16   on all linear layers

A batch takes up to --slots requests and as many adapters; with more adapters than slots requests wait for one. All
adapters are in the engine's memory (its CPU cache) before anything is timed, except for `load`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from engines import BASE, METHODS, engines, make_adapters, make_base
from redpeft.console import machine
from redpeft.storage import WEIGHTS_NAME

AGAIN = "base again"
MEMORY = 0.4  # of what is free, for the adapters of one engine


def choose_base(options: argparse.Namespace, root: Path) -> Path:
    """The folder of the base model that the options ask for."""
    return Path(options.base) if options.base else make_base(root / "base", options.layers, options.width)


# --- the questions ---------------------------------------------------------------------------------------------------


def fitting(method: str, counts: Sequence[int], folder: Path) -> tuple[list[int], str]:
    """The numbers of adapters whose weights fit into memory, and what to say of the others."""
    size = sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS_NAME).values())
    most = int(MEMORY * psutil.virtual_memory().available / size)
    fit = [count for count in counts if count <= most]
    left = [count for count in counts if count > most]
    return fit, f"{method}: {left[0]:,} adapters of {size / 1e6:.2f} MB were not tried: {most:,} fit" if left else ""


def throughput(options: argparse.Namespace, root: Path, settings: dict[str, Any]) -> dict[str, Any]:
    base = choose_base(options, root)
    ways: dict[str, Sequence[Path]] = {BASE: []}
    counts, notes = {}, []
    for method in options.methods:
        made = make_adapters(base, method, root / method, max(options.adapters))
        counts[method], note = fitting(method, options.adapters, made[0])
        ways[method] = made[: max(counts[method], default=0)]
        notes += [note] if note else []
    rows: list[dict[str, Any]] = []
    with engines(ways, base, settings) as asked:
        for way in asked:
            asked[way]("warm", len(ways[way]))
            asked[way]("run", 0, options.requests, 0, max(len(ways[way]), 1))
        for count in options.adapters:
            order = [BASE, AGAIN, *(method for method in options.methods if count in counts[method])]
            seconds: dict[str, list[float]] = {way: [] for way in order}
            for number in range(options.rounds):
                for way in random.sample(order, len(order)):
                    told = 1000 * count + number, options.requests, number * options.requests, count
                    seconds[way].append(asked[BASE if way == AGAIN else way]("run", *told))
            rows += [_throughput_row(count, way, seconds, options) for way in order]
    return {"rows": rows, "notes": notes}


def _throughput_row(
    count: int, way: str, seconds: dict[str, list[float]], options: argparse.Namespace
) -> dict[str, Any]:
    ratios = [base / own for own, base in zip(seconds[way], seconds[BASE], strict=True)]
    return {
        "adapters": count,
        "way": way,
        "tokens_per_second": options.requests * options.tokens / statistics.median(seconds[way]),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def load(options: argparse.Namespace, root: Path, settings: dict[str, Any]) -> dict[str, Any]:
    base = choose_base(options, root)
    ways = {way: make_adapters(base, way, root / way, options.count, options.count) for way in options.methods}
    os.sync()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with engines(ways, base, settings) as asked:
        for number in range(options.count):
            for way in random.sample(list(ways), len(ways)):
                seconds[way].append(asked[way]("load", number))
        slots = {way: asked[way]("slot_bytes") for way in ways}
    rows = [
        {
            "way": way,
            "median_ms": 1e3 * statistics.median(times[1:]),  # the first one warms up
            "p99_ms": 1e3 * p99(times[1:]),
            "file_bytes": (ways[way][0] / WEIGHTS_NAME).stat().st_size,
            "slot_bytes": slots[way],
        }
        for way, times in seconds.items()
    ]
    return {"rows": rows, "notes": []}


def latency(options: argparse.Namespace, root: Path, settings: dict[str, Any]) -> dict[str, Any]:
    base = choose_base(options, root)
    ways: dict[str, Sequence[Path]] = {BASE: []}
    notes = []
    for method in options.methods:
        made = make_adapters(base, method, root / method, options.adapters)
        fit, note = fitting(method, [options.adapters], made[0])
        if fit:
            ways[method] = made
        else:
            notes.append(note)
    rows = []
    with engines(ways, base, settings) as asked:
        for way in asked:
            asked[way]("warm", len(ways[way]))
            asked[way]("run", 0, settings["slots"], 0, max(len(ways[way]), 1))
        closed = [asked[BASE]("run", seed, 4 * settings["slots"], 0, 1) for seed in (1, 2, 3)]
        capacity = 4 * settings["slots"] / statistics.median(closed)
        notes.append(f"capacity: {capacity:.1f} requests a second, the base's with all requests there at once")
        for load_factor in options.loads:
            found: dict[str, list[list[float]]] = {way: [] for way in ways}
            for number in range(options.rounds):
                for way in random.sample(list(ways), len(ways)):
                    told = number, load_factor * capacity, options.seconds, options.adapters
                    found[way].append(asked[way]("open_loop", *told))
            rows += [_latency_row(load_factor, way, rounds) for way, rounds in found.items()]
    return {"rows": rows, "notes": notes}


def _latency_row(load_factor: float, way: str, rounds: list[list[float]]) -> dict[str, Any]:
    waits = [wait for one in rounds for wait in one]
    return {
        "load": load_factor,
        "way": way,
        "requests": len(waits),
        "p50_ms": 1e3 * statistics.median(waits),
        "p99_ms": 1e3 * p99(waits),
        "p99_ms_range": [1e3 * extreme(p99(one) for one in rounds) for extreme in (min, max)],
    }


def p99(values: Sequence[float]) -> float:
    """The smallest value that 99 percent do not exceed."""
    return float(np.percentile(values, 99, method="inverted_cdf"))


# --- what is shown ---------------------------------------------------------------------------------------------------

COLUMNS: dict[str, dict[str, Callable[[dict[str, Any]], str]]] = {
    "throughput": {
        "adapters": lambda row: f"{row['adapters']:,}",
        "way": lambda row: row["way"],
        "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
        "times the base's": lambda row: f"{row['ratio']:.2f}",
        "least-most": lambda row: "{:.2f}-{:.2f}".format(*row["ratio_range"]),
    },
    "load": {
        "way": lambda row: row["way"],
        "median ms": lambda row: f"{row['median_ms']:.1f}",
        "p99 ms": lambda row: f"{row['p99_ms']:.1f}",
        "file": lambda row: f"{row['file_bytes'] / 1e3:,.0f} KB",
        "a slot": lambda row: f"{row['slot_bytes'] / 1e3:,.0f} KB",
    },
    "latency": {
        "load": lambda row: f"{row['load']:.2f}",
        "way": lambda row: row["way"],
        "requests": lambda row: f"{row['requests']:,}",
        "p50 ms": lambda row: f"{row['p50_ms']:.0f}",
        "p99 ms": lambda row: f"{row['p99_ms']:.0f}",
        "p99 of rounds": lambda row: "{:.0f}-{:.0f}".format(*row["p99_ms_range"]),
    },
}


def show(report: dict[str, Any]) -> None:
    columns = COLUMNS[report["question"]]
    table = Table(title=report["question"], title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    for row in report["rows"]:
        table.add_row(*(cell(row) for cell in columns.values()))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for note in report["notes"]:
        console.print(note, soft_wrap=True)
    for part in ("machine", "settings"):
        console.print(f"{part}: " + ", ".join(f"{key} {value}" for key, value in report[part].items()), soft_wrap=True)


def conditions() -> dict[str, Any]:
    packages = {package: version(package) for package in ("torch", "transformers", "peft", "redpeft")}
    return {**machine(), "load_average": round(os.getloadavg()[0], 2), **packages}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    questions = parser.add_subparsers(dest="question", required=True)
    numbers = lambda kind: lambda text: [kind(part) for part in text.split(",")]  # noqa: E731
    for name in COLUMNS:
        one = questions.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        one.add_argument("--base", help="a folder with a model, instead of a Llama with random weights")
        one.add_argument("--layers", type=int, default=12, help="of that Llama")
        one.add_argument("--width", type=int, default=512, help="of that Llama")
        one.add_argument("--slots", type=int, default=64, help="requests, and adapters, in a batch at most")
        one.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
        one.add_argument("--tokens", type=int, default=32, help="tokens of an answer")
        one.add_argument("--threads", type=int, default=os.cpu_count(), help="of each engine")
        one.add_argument("--compile", action="store_true", help="compile the models; they run eagerly otherwise")
        ways = list(METHODS)[:2] if name == "latency" else list(METHODS)
        one.add_argument("--methods", type=numbers(str), default=ways, help=f"of {', '.join(METHODS)}")
        one.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        if name == "throughput":
            one.add_argument("--adapters", type=numbers(int), default=[1, 8, 64, 256, 1024], help="comma-separated")
            one.add_argument("--requests", type=int, default=128, help="in one run")
            one.add_argument("--rounds", type=int, default=5)
        elif name == "load":
            one.add_argument("--count", type=int, default=200, help="adapters to load, each once")
        else:
            one.add_argument("--adapters", type=int, default=1000)
            one.add_argument("--loads", type=numbers(float), default=[0.5, 0.8], help="of the base's capacity")
            one.add_argument("--seconds", type=float, default=30, help="in which requests arrive, of one run")
            one.add_argument("--rounds", type=int, default=2)
    return parser.parse_args(arguments)


def publish(report: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    """Print what was measured, and how busy the machine is at the end."""
    report["machine"]["load_average_after"] = round(os.getloadavg()[0], 2)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show(report)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    random.seed(0)
    settings = {name: getattr(options, name) for name in ("slots", "prompt", "tokens", "threads", "compile")}
    report: dict[str, Any] = {"question": options.question, "machine": conditions(), "settings": vars(options)}
    with tempfile.TemporaryDirectory() as folder:
        report |= {"throughput": throughput, "load": load, "latency": latency}[options.question](
            options, Path(folder), settings
        )
    publish(report, options.json, show)


if __name__ == "__main__":
    main()
