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
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data import CHECKED, draw_checked, is_right, read_rows, write_rows
from settings import BASE, CANDIDATES
from tables import NOT_RUN, markdown, page_with_tables, short

from redpeft.storage import read_json, to_json, write_atomically

RESULTS = Path(__file__).parent / "feedback"
DOCS = Path(__file__).parents[2] / "docs"
OPTIONS = {**CHECKED, "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}}
ROWS = {"train": 240, "validation": 100, "test": 200}
TASKS = {"dpo": "spell_backward", "grpo": "chain_sum", "sft": "chain_sum"}
STEPS = 15
TRAINING = {
    "dpo": {"task": "preference", "loss": "dpo", "data.chat_template": "plain", "batch_size": 8, "epochs": 1},
    "sft": {"task": "instruction", "data.chat_template": "plain", "batch_size": 4, "max_steps": STEPS},
    "grpo": {  # of TRL's GRPOConfig
        **{"per_device_train_batch_size": 32, "num_generations": 8, "max_steps": STEPS},
        **{"temperature": 0.7, "max_completion_length": 12, "warmup_steps": 0.06},
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
    *trained("grpo", "RED", 1e-2, seed=1),
    *trained("grpo", "LoRA r=1", 1e-3),
]


# --- data -----------------------------------------------------------------------------------------------------------


def make_data(out: Path) -> None:
    """Rows of both tasks, no question in two splits, and pairs of a right and a wrong spelling."""
    for task, options in OPTIONS.items():
        rows = draw_checked(task, options, {"train": sum(ROWS.values())})["train"]
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
    from redpeft.training.recipe import load_recipe
    from redpeft.training.train import train

    result: dict[str, Any] = {"settings": asdict(run)}
    with tempfile.TemporaryDirectory() as folder:
        if run.kind == BASE:
            result["hits"] = hits(base, run.task, data)
        else:
            result["training"] = TRAINING[run.kind]
            if run.kind == "grpo":
                result |= train_on_rewards(run, base, data, folder)
            else:
                found = train(load_recipe(None, recipe_fields(run, base, data)), folder)
                kept = ("validation", "steps", "trainable_parameters", "versions")
                result |= {key: found[key] for key in kept}
            result["hits"] = hits(folder, run.task, data)
    write_atomically(RESULTS / f"{run.name}.json", to_json(result, indent=1))
    print(f"{run.name}: {result['hits'].count('1')} of {len(result['hits'])} right", flush=True)


def train_on_rewards(run: Run, base: str, data: Path, folder: str) -> dict[str, Any]:
    """Train by TRL's GRPOTrainer and save the adapter in `folder`. A right answer's reward is 1, and any other's 0."""
    import peft
    import torch
    import transformers
    import trl
    from datasets import Dataset

    import redpeft
    from redpeft.models import pad_prompts
    from redpeft.training.baselines import METHODS

    candidate, rows = CANDIDATES[run.method], read_rows(data / run.task / "train.jsonl")
    transformers.set_seed(run.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = METHODS[candidate.method].options_class(**candidate.options, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    prompts = [f"Human: {row['prompt']}\n\nAssistant:" for row in rows]
    if candidate.method == "red":
        redpeft.calibrate(model, pad_prompts(tokenizer, tokenizer(prompts[:32])["input_ids"], "left"))

    def reward(completions: list[str], response: list[str], **_: Any) -> list[float]:
        return [float(is_right(run.task, *pair)) for pair in zip(completions, response, strict=True)]

    options = {"output_dir": folder, "learning_rate": run.rate, "seed": run.seed, **TRAINING["grpo"]}
    options |= {
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
    }
    args = trl.GRPOConfig(**options, bf16=False, activation_checkpointing=False)
    rows = [{"prompt": prompt, "response": row["response"]} for prompt, row in zip(prompts, rows, strict=True)]
    trainer = trl.GRPOTrainer(model, reward, args, Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    trainer.save_model(folder)
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "rewards": [entry["reward"] for entry in logs],
        "lengths": [entry["completions/mean_length"] for entry in logs],
        "steps": trainer.state.global_step,
        "trainable_parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
        "versions": {module.__name__: module.__version__ for module in (redpeft, peft, transformers, trl, torch)},
    }


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

    speaker, rows = open_language_model(model), read_rows(data / task / "test.jsonl")
    speaker = replace(speaker, task=InstructionTask({"messages": "messages"}, template="plain"))
    decoding = Decoding(NEW_TOKENS, repetition_penalty=1, no_repeat_ngrams=0)
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    texts: list[str] = []
    for start in range(0, len(chats), 50):
        texts += speaker.answer(chats[start : start + 50], decoding)
    return "".join(str(int(is_right(task, text, row["response"]))) for text, row in zip(texts, rows, strict=True))


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


def read_runs(kind: str) -> list[Result]:
    """The results of a kind: RED's first, by rate and seed."""
    runs = sorted((run for run in RUNS if run.kind == kind), key=lambda run: (run.method != "RED", run.rate, run.seed))
    files = [RESULTS / f"{run.name}.json" for run in runs]
    return [read_json(file) for file in files if file.exists()]


def percent_right(result: Result) -> str:
    """Exact match with its standard error over the questions."""
    if "hits" not in result:
        return NOT_RUN
    right = [100 * int(hit) for hit in result["hits"]]
    return f"{statistics.mean(right):.1f} ± {statistics.stdev(right) / len(right) ** 0.5:.1f}"


def of_run(result: Result) -> list[str]:
    settings = result["settings"]
    return [settings["method"], f"{result['trainable_parameters']:,}", short(settings["rate"])]


def preferences_table() -> str:
    base, lines = read_json(RESULTS / f"{RUNS[0].name}.json"), []
    for result in read_runs("dpo"):
        scores = result["validation"]
        cells = [f"{scores[key]:.2f}" for key in ("rewards/accuracies", "rewards/margins")]
        logps = [f"{scores[f'logps/{answer}']:.1f}" for answer in ("chosen", "rejected")]
        lines.append([*of_run(result), f"{scores['loss']:.3f}", *cells, *logps, percent_right(result)])
        at_start = [scores[f"logps/{each}"] - scores[f"rewards/{each}"] / BETA for each in ("chosen", "rejected")]
    first = ["the base as it is", "0", "", "0.693", "", "0.00", *[f"{each:.1f}" for each in at_start]]
    headings = ["method", "parameters", "rate", "loss", "accuracy", "margin", "chosen", "rejected", "exact match"]
    return markdown(headings, [[*first, percent_right(base)], *lines])


def rewards_table() -> str:
    base, lines = read_json(RESULTS / f"{RUNS[1].name}.json"), []
    for result in [*read_runs("grpo"), *read_runs("sft")]:
        rewards = result.get("rewards")
        ends = [f"{statistics.mean(part):.2f}" for part in (rewards[:5], rewards[-5:])] if rewards else ["", ""]
        settings = result["settings"]
        lines.append([settings["kind"].upper(), *of_run(result), str(settings["seed"]), *ends, percent_right(result)])
    first = ["the base as it is", "", "0", *[""] * 4, percent_right(base)]
    headings = ["", "method", "parameters", "rate", "seed", "reward, first 5 steps", "last 5 steps", "exact match"]
    return markdown(headings, [first, *lines])


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
