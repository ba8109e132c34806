"""Scores that no test split of a run gives: those of AlpacaEval, MT-Bench and lm-eval.

They are in the run folder as <benchmark>-scores.json, an object of numbers by column. `score_run` writes lm-eval's.
For the others it writes the answers; the benchmark's own judge, which asks an API, is left to the user.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from redpeft.errors import UserError
from redpeft.evaluation.generate import generate
from redpeft.evaluation.language_model import Decoding
from redpeft.evaluation.lm_harness import PRESETS, HarnessTask, evaluate_adapters
from redpeft.storage import ADAPTER, MODEL, read_json, write_atomically

LM_EVAL = ("arc", "truthfulqa", "winogrande", "gsm8k", "hellaswag", "mmlu")
"""The columns of the tasks of lm-eval, in their order."""
ANSWERS = {"alpaca-eval": "alpaca-eval.json", "mt-bench": "mt-bench.jsonl"}
JUDGES = {
    "alpaca-eval": (
        "alpaca_eval --model_outputs {answers}   # its judge asks an API\n"
        'write the win rate into {file} as {{"alpaca_eval": 0.0}}'
    ),
    "mt-bench": (
        "let FastChat's gen_judgment.py judge {answers}   # it asks an API\n"
        'write the scores into {file} as {{"turn_1": 0.0, "turn_2": 0.0, "average": 0.0}}'
    ),
}


@dataclass(frozen=True)
class Scoring:
    """How a benchmark is run: its file of questions, how they are answered, the tasks of lm-eval."""

    questions: Path | None = None
    decoding: Decoding = field(default_factory=Decoding)
    tasks: tuple[HarnessTask, ...] = PRESETS["open-llm-leaderboard"]


def score_run(run: Path, benchmark: str, base: str, scoring: Scoring) -> None:
    """Run a benchmark on one finished run, unless it is done. UserError as the benchmark's command.

    AlpacaEval and MT-Bench: answer the questions, if there are any. lm-eval: score the run.
    """
    if scores_file(run, benchmark).is_file():
        return
    if benchmark == "lm-eval":
        model, adapters = (base, [run]) if (run / ADAPTER).is_dir() else (str(run / MODEL), [])
        found = evaluate_adapters(model, adapters, scoring.tasks, run / "lm-eval.json")
        [results] = found["results"].values()
        scores = {
            column: results[task.name][task.metric] for column, task in zip(LM_EVAL, scoring.tasks, strict=False)
        }
        write_atomically(scores_file(run, benchmark), json.dumps(scores))
    elif scoring.questions and not (run / ANSWERS[benchmark]).is_file():
        generate(benchmark, str(run), scoring.questions, run / ANSWERS[benchmark], decoding=scoring.decoding)


def scores_file(run: Path, benchmark: str) -> Path:
    """Where a run's scores of a benchmark lie."""
    return run / f"{benchmark}-scores.json"


def extra_scores(run: Path, benchmark: str) -> dict[str, float]:
    """A run's scores of a benchmark; {} where it has none yet. UserError for a file that holds something else."""
    file = scores_file(run, benchmark)
    if not file.is_file():
        return {}
    try:
        found = read_json(file)
        return {name: float(value) for name, value in found.items()}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{file} must hold one JSON object of numbers, the scores of a judge") from None


def what_is_left(run: Path, benchmark: str) -> str | None:
    """What the user has to do until a run has its scores; None if there is nothing to do."""
    file = scores_file(run, benchmark)
    if file.is_file() or benchmark not in JUDGES:
        return None
    answers = run / ANSWERS[benchmark]
    first = "" if answers.is_file() else f"redpeft generate {benchmark} {run} --questions FILE --out {answers}\n"
    return first + JUDGES[benchmark].format(answers=answers, file=file)
