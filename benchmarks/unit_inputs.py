"""Does it matter what the units of the biases are measured on: the first training rows, or random tokens?

Trains RED on SST-2, STS-B, QNLI and AG News with a MiniLM encoder at the default learning rate, with units measured on
either, and prints the test scores and how far the units are apart. Every run is a folder in --out: an interrupted
study continues.

    python benchmarks/unit_inputs.py --data ../shared/data --out runs/unit-inputs
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from redpeft import calibrate
from redpeft.training.recipe import load_recipe
from redpeft.training.train import train

TASKS = {  # the folder, and the file whose rows are the test
    "SST-2": ("sst2", "test"),
    "STS-B": ("stsb", "test"),
    "QNLI": ("qnli", "validation"),
    "AG News": ("ag_news", "test"),
}
INPUTS = ("rows", "random")


def run(task: str, inputs: str, seed: int, args: argparse.Namespace) -> tuple[float, dict[str, float]]:
    """The test score in points, and the unit of each site."""
    name, test = TASKS[task]
    folder = args.out / name / inputs / f"seed-{seed}"
    if not (folder / "result.json").is_file():
        recipe = load_recipe(
            None,
            {
                "base": "minilm",
                "data.train": str(args.data / name / "train.jsonl"),
                "data.test": str(args.data / name / f"{test}.jsonl"),
                "data.max_train_rows": args.rows,
                "data.validation_fraction": 0.1,
                "data.max_eval_rows": args.test_rows,
                "batch_size": 16,
                "epochs": args.epochs,
                "seed": seed,
            },
        )
        measure = calibrate if inputs == "rows" else lambda model, batch: calibrate(model)
        with patch("redpeft.training.trainer.calibrate", measure):
            train(recipe, folder)
    result = json.loads((folder / "result.json").read_text())
    weights = load_file(next(folder.rglob("adapter_model.safetensors")))
    units = {key: float(value) for key, value in weights.items() if key.endswith(".unit")}
    return 100 * result["test"][result["metric"]], units


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2, stsb, qnli and ag_news")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--rows", type=int, default=2000, help="to train on")
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    table = Table(title="RED: mean of the test scores (standard deviation over seeds)")
    for column in ("task", "first rows", "random tokens", "unit, random / rows"):
        table.add_column(column, justify="right")
    for task in TASKS:
        runs = {inputs: [run(task, inputs, int(seed), args) for seed in args.seeds.split(",")] for inputs in INPUTS}
        cells = []
        for inputs in INPUTS:
            values = [score for score, _ in runs[inputs]]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.1f} ({spread:.1f})")
        rows, random = runs["rows"][0][1], runs["random"][0][1]
        ratios = [random[key] / rows[key] for key in rows]
        table.add_row(task, *cells, f"{min(ratios):.2f} to {max(ratios):.2f}")
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
