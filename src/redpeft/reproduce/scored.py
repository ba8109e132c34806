"""Scores that no test split of a run gives: those of AlpacaEval, MT-Bench and lm-eval.

They lie in the run folder as <benchmark>-scores.json, an object of numbers by column.
"""

from __future__ import annotations

import json
from pathlib import Path

from redpeft.errors import UserError

STEPS = {
    "alpaca-eval": (
        "redpeft generate alpaca-eval {run} --questions alpaca_eval.json --out {run}/alpaca-eval.json\n"
        "alpaca_eval --model_outputs {run}/alpaca-eval.json   # its judge asks an API\n"
        'put the win rate into {file} as {{"alpaca_eval": 0.0}}'
    ),
    "mt-bench": (
        "redpeft generate mt-bench {run} --questions question.jsonl --out {run}/mt-bench.jsonl\n"
        "let FastChat's gen_judgment.py judge it              # it asks an API\n"
        'put the scores into {file} as {{"turn_1": 0.0, "turn_2": 0.0, "average": 0.0}}'
    ),
}
"""By benchmark, what is done by hand with a trained run."""


def scores_file(run: Path, benchmark: str) -> Path:
    """Where a run's scores of a benchmark lie."""
    return run / f"{benchmark}-scores.json"


def extra_scores(run: Path, benchmark: str) -> dict[str, float]:
    """A run's scores of a benchmark; {} where it has none yet. UserError for a file that holds something else."""
    file = scores_file(run, benchmark)
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {name: float(value) for name, value in found.items()}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{file} is to hold one JSON object of numbers, the scores of a judge") from None


def what_is_left(run: Path, benchmark: str) -> str | None:
    """What is to be done by hand until a run has its scores; None where it has them."""
    file = scores_file(run, benchmark)
    return None if file.is_file() else STEPS[benchmark].format(run=run, file=file)
