"""What does it gain to train K adapters in a fleet, and what does a step cost with ever more slots?

    python benchmarks/fleet.py jobs --data ../shared/data                # K jobs in a fleet, and one after another
    python benchmarks/fleet.py jobs --data ../shared/data --counts 200   # 200 small data sets
    python benchmarks/fleet.py slots                                     # a step of 64 rows with 1 to 4,096 slots
    python benchmarks/fleet.py slots --model llama-1b                    # on a GPU: 16 to 4,096 slots, bf16 decoder
    python benchmarks/fleet.py slots --model smollm2 --rows 512 --rows-a-job 4     # and one adapter alone beside them
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
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

import redpeft
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


def step_times(
    model_name: str, slots: Sequence[int], rows: int, tokens: int, steps: int, rows_a_job: int | None = None
) -> dict[str, Any]:
    """Seconds of training steps with ever more slots: medians, quartiles, and what they hold in memory.

    A step has `rows` rows that belong to as many slots as there are, at most one a row; or, with `rows_a_job`, that
    many rows of each of at most `rows // rows_a_job` slots, and then a step of one adapter alone with as many rows is
    measured beside it. All take turns, so that what else the machine does meets all of them.
    """
    model, vocabulary, labels = _model(model_name)
    fleets = {count: Fleet(model, count) for count in slots}
    tables = {count: sum(part.nbytes for part in fleet.state) for count, fleet in fleets.items()}
    for count, fleet in fleets.items():
        for slot in range(count):
            fleet.fill(slot)
    draw, step_alone = random.Random(0), _step_alone(model)

    def owners_in(count: int) -> list[int]:
        if rows_a_job:
            return [
                slot for slot in draw.sample(range(count), min(count, rows // rows_a_job)) for _ in range(rows_a_job)
            ]
        return [draw.randrange(count) for _ in range(rows)] if count < rows else draw.sample(range(count), rows)

    def batch_of(size: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, vocabulary, (size, tokens), device=model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels(ids)}

    seconds: dict[int | None, list[float]] = {count: [] for count in slots}
    peaks: dict[int | None, int] = {}
    for step in range(steps + 1):
        for count in [*slots, *([None] if rows_a_job else [])]:  # None: alone
            if count is None:
                function = partial(step_alone, batch_of(rows_a_job or 0))
            else:
                owners = owners_in(count)
                function = partial(fleets[count].step, batch_of(len(owners)), owners, dict.fromkeys(owners, RATES))
            spent = _seconds(function)
            if step:  # the first is the warm-up
                seconds.setdefault(count, []).append(spent)
            others = sum(tables.values()) - tables.get(count or 0, 0) if model.device.type == "cuda" else 0
            peaks[count] = _peak() - others

    def measured(count: int | None) -> dict[str, Any]:
        low, middle, high = statistics.quantiles(seconds[count], n=4)
        return {"seconds": middle, "quartiles": [low, high], "peak_bytes": peaks[count]}

    report: dict[str, Any] = {"model": model_name, "tokens": tokens, "steps": steps, "device": _device_name()}
    report["sizes"] = [
        {
            "slots": count,
            "jobs": len(set(owners := owners_in(count))),
            "rows": len(owners),
            "table_bytes": tables[count],
            **measured(count),
        }
        for count in slots
    ]
    return report | ({"alone": {"rows": rows_a_job, **measured(None)}} if rows_a_job else {})


def step_table(report: dict[str, Any]) -> Table:
    title = f"{report['model']}: a training step, rows of {report['tokens']} tokens, medians of {report['steps']}"
    table = Table(title=title)
    alone = report.get("alone")
    names = ["slots", "jobs", "rows", "ms", "quartiles", "times the first", "table and moments", "peak memory"]
    for name in [*names, "job steps/s", "times alone's"] if alone else names:
        table.add_column(name, justify="right")
    sizes = report["sizes"]
    for one in sizes + ([{"slots": "alone", "jobs": 1, "table_bytes": 0, **alone}] if alone else []):
        low, high = (1000 * value for value in one["quartiles"])
        rate = one["jobs"] / one["seconds"]
        cells = [
            one["slots"] if one["slots"] == "alone" else f"{one['slots']:,}",
            str(one["jobs"]),
            str(one["rows"]),
            f"{1000 * one['seconds']:.1f}",
            f"{low:.1f}-{high:.1f}",
            f"{one['seconds'] / sizes[0]['seconds']:.3f}",
            f"{one['table_bytes'] / 2**20:,.1f} MiB",
            f"{one['peak_bytes'] / 2**30:.2f} GiB",
        ]
        table.add_row(*cells, *([f"{rate:.1f}", f"{rate * alone['seconds']:.1f}"] if alone else []))
    return table


def row_times(sizes: Sequence[int], lengths: Sequence[int], rows: int, steps: int) -> Table:
    """Milliseconds a row of a training step: in batches of these sizes, and in a fleet of jobs of 4 rows each."""
    model, vocabulary, labels = _model("minilm")
    fleet = Fleet(model, rows)
    for slot in range(rows):
        fleet.fill(slot)

    def together(batch: dict[str, torch.Tensor]) -> None:
        owners = [row // 4 for row in range(rows)]
        fleet.step(batch, owners, dict.fromkeys(owners, RATES))

    table = Table("tokens", *(f"batches of {size}" for size in sizes), f"a fleet, {rows} rows", title="ms a row")
    for tokens in lengths:
        cells = []
        for size, step in [*((size, _step_alone(model)) for size in sizes), (rows, together)]:
            ids = torch.randint(5, vocabulary, (size, tokens), device=fleet.device)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels(ids)}
            seconds = [_seconds(partial(step, batch)) for _ in range(steps + 1)][1:]  # the first is the warm-up
            cells.append(f"{1000 * statistics.median(seconds) / size:.1f}")
        table.add_row(str(tokens), *cells)
    return table


def _step_alone(model: PeftModel) -> Callable[[dict[str, torch.Tensor]], None]:
    """A training step of the model's own adapter, as a Trainer takes it."""
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=RATES.edit, weight_decay=0.0, fused=True)

    def step(batch: dict[str, torch.Tensor]) -> None:
        model.train()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, RATES.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad()

    return step


def _seconds(function: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


DECODERS = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49_152,
    },
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256,
    },
}  # fmt: skip
MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}


def _model(name: str) -> tuple[PeftModel, int, Any]:
    """A model of this shape with RED, its weights random; the size of its vocabulary; labels for a batch of token ids.

    The encoder is fp32, the decoders are bf16.
    """
    if name in DECODERS:
        config = LlamaConfig(**DECODERS[name], tie_word_embeddings=True, use_cache=False)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        adapted = get_peft_model(base.to(_device()), redpeft.RedConfig(task_type="CAUSAL_LM"))
        labels = torch.clone
    else:
        config = BertConfig(**MINILM, num_labels=2)
        base = AutoModelForSequenceClassification.from_config(config).to(_device())
        adapted = get_peft_model(base, redpeft.RedConfig(task_type="SEQ_CLS", modules_to_save=["classifier"]))
        labels = lambda ids: ids[:, 0] % 2  # noqa: E731
    redpeft.calibrate(adapted)
    return adapted, config.vocab_size, labels


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


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
    one.add_argument("--model", choices=("minilm", *DECODERS), default="minilm", help="a shape; weights are random")
    one.add_argument("--slots", default=None, help="comma-separated")
    one.add_argument("--rows", type=int, default=64, help="in a step, at most")
    one.add_argument("--rows-a-job", type=int, help="so many of each job; and a step of one adapter alone beside it")
    one.add_argument("--tokens", type=int, default=32)
    one.add_argument("--steps", type=int, default=20)
    one.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
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
        default = "16,256,1024,4096" if asked.model in DECODERS else "1,8,64,256,1024,4096"
        slots = [int(count) for count in (asked.slots or default).split(",")]
        report = step_times(asked.model, slots, asked.rows, asked.tokens, asked.steps, asked.rows_a_job)
        if asked.json:
            print(json.dumps(report, indent=2))
        else:
            Console(width=None if sys.stdout.isatty() else 120).print(step_table(report))
    else:
        counts = [int(count) for count in asked.counts.split(",")]
        values = {"base": "minilm", "batch_size": asked.batch_size, "epochs": asked.epochs}
        with tempfile.TemporaryDirectory() as folder:
            sets = make_sets(asked.data, Path(folder), max(counts), asked.rows)
            Console().print(compare(sets, counts, asked.ways.split(","), values))


if __name__ == "__main__":
    main()
