"""What RED learns from preferences and from rewards, and at which rates, beside LoRA on SmolLM2-135M-Instruct.

    redpeft export-base smollm2 --out SMOLLM2
    python benchmarks/method_comparison/feedback.py data DATA
    python benchmarks/method_comparison/feedback.py runs DATA --base SMOLLM2 --workers 2
    python benchmarks/method_comparison/feedback.py tables

Preferences (DPO): a word spelled backward, and a plausible wrong spelling. Rewards (GRPO): sums, rewarded by exact
match, beside instruction tuning (SFT) on the same rows. Each run is a file in feedback/, and one that exists is not
run again. `tables` puts the tables into the pages docs/how-to/preferences.md and docs/explanation/comparison.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data import CHECKED, draw_checked, read_rows, write_rows
from settings import BASE, CANDIDATES
from tables import NOT_RUN, markdown, page_with_tables, short

from redpeft.storage import read_json, to_json, write_atomically

RESULTS = Path(__file__).parent / "feedback"
DOCS = Path(__file__).parents[2] / "docs"
OPTIONS = {**CHECKED, "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}}
ROWS = {"train": 240, "validation": 100, "test": 200}
TASKS = {"dpo": "spell_backward", "grpo": "chain_sum", "sft": "chain_sum"}
SUMS = {"data.chat_template": "plain", "batch_size": 4, "max_steps": 60}
TRAINING = {
    "dpo": {"task": "preference", "loss": "dpo", "data.chat_template": "plain", "batch_size": 8, "epochs": 1},
    "sft": {"task": "instruction", **SUMS},
    "grpo": {
        **{"task": "reward", "reward": "exact_match", "num_generations": 8, "temperature": 0.7},
        **{"max_completion_length": 12, **SUMS},
    },
}
NEW_TOKENS = 12
BETA = 0.1  # TRL's default for DPO


@dataclass(frozen=True)
class Run:
    """One training and the answers after it. `kind`: one of `TRAINING`, or `BASE` for the answers before."""

    kind: str
    task: str
    method: str = BASE
    rate: float | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of the run's file."""
        parts = [self.kind, self.task] if self.kind == BASE else [self.kind, self.method, f"{self.rate:g}", self.seed]
        return "-".join(map(str, parts)).lower().replace(" ", "-").replace("=", "")


def trained(kind: str, method: str, *rates: float, seed: int = 0) -> list[Run]:
    return [Run(kind, TASKS[kind], method, rate, seed) for rate in rates]


RUNS = [
    Run(BASE, "spell_backward"),
    Run(BASE, "chain_sum"),
    *trained("dpo", "RED", 1e-2, 3e-2, 3e-3, 1e-3),
    *trained("dpo", "LoRA r=8", 1e-3, 3e-4, 3e-3),
    *trained("grpo", "RED", 1e-2, 3e-2, 3e-3),
    *trained("sft", "RED", 3e-2),
    *trained("grpo", "LoRA r=8", 3e-4, 1e-3),
    *trained("grpo", "RED", 1e-2, 3e-3, seed=1),
    *trained("grpo", "LoRA r=1", 1e-3),
]


# --- data -----------------------------------------------------------------------------------------------------------


def make_data(out: Path) -> None:
    """Rows of both tasks, no question in two splits, and pairs of a right and a wrong spelling."""
    for task, options in OPTIONS.items():
        rows = draw_checked(task, train=sum(ROWS.values()), **options)["train"]
        draw = random.Random(0)
        draw.shuffle(rows)
        for split, count in ROWS.items():
            part, rows = rows[:count], rows[count:]
            if task == "chain_sum":  # short prompts keep steps cheap
                part = [
                    {**row, "prompt": f"What is {row['prompt'].split(': ')[1].removesuffix(' =')}?"} for row in part
                ]
            write_rows(out / task / f"{split}.jsonl", part)
            if task == "spell_backward":
                pairs = (
                    {
                        "prompt": row["prompt"],
                        "chosen": row["response"],
                        "rejected": wrong_spelling(row["response"], draw),
                    }
                    for row in part
                )
                write_rows(out / "pairs" / f"{split}.jsonl", pairs)


def wrong_spelling(answer: str, draw: random.Random) -> str:
    """A plausible wrong answer: two neighbours swapped, the word as it was, or a letter left out."""
    place = draw.randrange(len(answer) - 1)
    before, one, other, after = answer[:place], answer[place], answer[place + 1], answer[place + 2 :]
    wrong = [before + other + one + after, answer[::-1], before + other + after]
    return draw.choice([each for each in wrong if each != answer])


# --- a run ----------------------------------------------------------------------------------------------------------


def measure(run: Run, base: str, data: Path) -> None:
    """Train, answer the questions of the test split, and write the result."""
    from redpeft.storage import read_metrics
    from redpeft.training.recipe import load_recipe
    from redpeft.training.train import train

    result: dict[str, Any] = {"settings": asdict(run)}
    with tempfile.TemporaryDirectory() as folder:
        if run.kind != BASE:
            found = train(load_recipe(None, recipe_fields(run, base, data)), folder)
            kept = ("validation", "steps", "trainable_parameters", "versions")
            result |= {"training": TRAINING[run.kind], **{key: found[key] for key in kept}}
            if rewards := [entry["reward"] for entry in read_metrics(Path(folder)) if "reward" in entry]:
                result["rewards"] = rewards
        result["hits"] = hits(base if run.kind == BASE else folder, run.task, data)
    write_atomically(RESULTS / f"{run.name}.json", to_json(result, indent=1))
    print(f"{run.name}: {result['hits'].count('1')} of {len(result['hits'])} right", flush=True)


def recipe_fields(run: Run, base: str, data: Path) -> dict[str, Any]:
    """The recipe of a run."""
    candidate, rows = CANDIDATES[run.method], data / ("pairs" if run.kind == "dpo" else run.task)
    return {
        "base": base,
        **TRAINING[run.kind],
        "data.train": str(rows / "train.jsonl"),
        "data.validation": str(rows / "validation.jsonl"),
        "method": candidate.method,
        "method_options": dict(candidate.options),
        "learning_rate": run.rate,
        "seed": run.seed,
        "precision": "fp32",
    }


def hits(model: str, task: str, data: Path) -> str:
    """For each question of the test split 1 if the greedy answer of a base or a run is right, and 0 if it is not."""
    from redpeft.evaluation.language_model import Decoding, open_language_model
    from redpeft.tasks.instruction import InstructionTask
    from redpeft.tasks.metrics import is_right

    speaker, rows = open_language_model(model), read_rows(data / task / "test.jsonl")
    speaker = replace(speaker, task=InstructionTask({"messages": "messages"}, template="plain"))
    decoding = Decoding(NEW_TOKENS, repetition_penalty=1, no_repeat_ngrams=0)
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    texts: list[str] = []
    for start in range(0, len(chats), 50):
        texts += speaker.answer(chats[start : start + 50], decoding)
    return "".join(str(int(is_right(text, row["response"]))) for text, row in zip(texts, rows, strict=True))


def run_all(base: str, data: Path, workers: int, kinds: list[str]) -> None:
    """Every run of these kinds that has no file yet."""
    RESULTS.mkdir(exist_ok=True)
    todo = [run for run in RUNS if run.kind in kinds and not (RESULTS / f"{run.name}.json").exists()]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        running = {pool.submit(measure, run, base, data): run for run in todo}
        for future in as_completed(running):
            if error := future.exception():
                print(f"{running[future].name}: {type(error).__name__}: {error}", flush=True)


# --- tables ---------------------------------------------------------------------------------------------------------

Result = Mapping[str, Any]


def result_of(run: Run) -> Result | None:
    file = RESULTS / f"{run.name}.json"
    return read_json(file) if file.exists() else None


def percent_right(result: Result | None) -> str:
    """Exact match with its standard error over the questions."""
    if result is None or "hits" not in result:
        return NOT_RUN
    right = [100 * int(hit) for hit in result["hits"]]
    return f"{statistics.mean(right):.1f} ± {statistics.stdev(right) / len(right) ** 0.5:.1f}"


def rows_of(kind: str, cells: Callable[[Result], list[str]], columns: int) -> list[list[str]]:
    """The rows of the runs of a kind: RED's first, by rate and seed."""
    runs = sorted((run for run in RUNS if run.kind == kind), key=lambda run: (run.method != "RED", run.rate, run.seed))
    rows = []
    for run in runs:
        result = result_of(run)
        filled = [NOT_RUN, *[""] * (columns - 1)] if result is None else [*cells(result), percent_right(result)]
        rows.append([run.method, short(run.rate), *filled])
    return rows


def preferences_table() -> str:
    keys = {"loss": 3, "rewards/accuracies": 2, "rewards/margins": 2, "logps/chosen": 1, "logps/rejected": 1}

    def cells(result: Result) -> list[str]:
        return [f"{result['validation'][key]:.{digits}f}" for key, digits in keys.items()]

    scores = next(result["validation"] for run in RUNS if run.kind == "dpo" and (result := result_of(run)))
    start = [f"{scores[f'logps/{each}'] - scores[f'rewards/{each}'] / BETA:.1f}" for each in ("chosen", "rejected")]
    first = ["the base as it is", "", "0.693", "", "0.00", *start, percent_right(result_of(Run(BASE, TASKS["dpo"])))]
    headings = ["method", "rate", "loss", "accuracy", "margin", "chosen", "rejected", "exact match"]
    return markdown(headings, [first, *rows_of("dpo", cells, 6)])


def rewards_table() -> str:
    def cells(result: Result) -> list[str]:
        rewards = result.get("rewards")
        ends = [f"{statistics.mean(part):.2f}" for part in (rewards[:10], rewards[-10:])] if rewards else ["", ""]
        return [str(result["settings"]["seed"]), *ends]

    rows = [[kind.upper(), *row] for kind in ("grpo", "sft") for row in rows_of(kind, cells, 4)]
    first = ["", "the base as it is", "", "", "", "", percent_right(result_of(Run(BASE, TASKS["grpo"])))]
    headings = ["", "method", "rate", "seed", "reward, first 10 steps", "last 10 steps", "exact match"]
    return markdown(headings, [first, *rows])


TABLES = {
    "preferences": (DOCS / "how-to" / "preferences.md", preferences_table),
    "rewards": (DOCS / "explanation" / "comparison.md", rewards_table),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("data", help="write the rows").add_argument("data", type=Path)
    runs = commands.add_parser("runs", help="run what has no result yet")
    runs.add_argument("data", type=Path, help="the folder that `data` wrote")
    runs.add_argument("--kinds", nargs="+", choices=[BASE, *TRAINING], default=[BASE, *TRAINING])
    runs.add_argument("--base", required=True, help="the folder of the base model")
    runs.add_argument("--workers", type=int, default=2, help="runs at a time, with one thread each")
    commands.add_parser("tables", help="put the tables into the pages")
    options = parser.parse_args()
    if options.command == "data":
        make_data(options.data)
    elif options.command == "runs":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        run_all(options.base, options.data, options.workers, options.kinds)
    else:
        for name, (page, table) in TABLES.items():
            page.write_text(page_with_tables(page.read_text(encoding="utf-8"), {name: table()}), encoding="utf-8")


if __name__ == "__main__":
    main()
