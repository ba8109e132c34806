"""What is compared: methods, tasks, rates and seeds, and which runs follow from the results of others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

TASKS = {
    "e2e": {"task": "e2e", "epochs": 1, "batch_size": 10},
    "spell_backward": {"task": "instruction", "epochs": 4, "batch_size": 20},
    "chain_sum": {"task": "instruction", "epochs": 4, "batch_size": 20},
}
# What the rate is chosen by, on the validation split: the least sum of ranks, and of equals the lower loss.
CRITERIA = {"e2e": ("loss", "bleu", "values")}
CHECKED_CRITERIA = ("loss", "exact_match")
LESS_IS_BETTER = ("loss",)

RED_RATES = (1e-2, 3e-2, 1e-1)
LORA_RATES = (3e-3, 1e-2, 3e-2)
IA3_RATES = (1e-2, 3e-2, 1e-1)
FULL_RATES = (3e-5, 1e-4, 3e-4)
SEEDS = (0, 1, 2)
BEAM_SEEDS = SEEDS[:2]  # with the others E2E's test questions are not answered: beams take longer than the training


@dataclass(frozen=True)
class Candidate:
    """A method with its options, as a recipe has them, and its rates, half a decade apart.

    `bias_bound`: RED's biases are kept within this many units. `group`: "main" (the table), "more" (its further rows)
    or "variant" (other choices for RED).
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = RED_RATES
    group: str = "main"
    bias_bound: float | None = None


CANDIDATES = {
    "RED": Candidate("red"),
    "RED, bias alone": Candidate("red", {"use_scale": False}),
    "LoRA r=1": Candidate("lora", {"r": 1, "lora_alpha": 1}, LORA_RATES),
    "LoRA r=8": Candidate("lora", {"r": 8, "lora_alpha": 8}, LORA_RATES),
    "IA3": Candidate("ia3", {}, IA3_RATES),
    "RED, scale alone": Candidate("red", {"use_bias": False}, group="more"),
    "RED+": Candidate("red", {"sites": ["ffn", "attention", "qkv"]}, group="more"),
    "LoRA r=32": Candidate("lora", {"r": 32, "lora_alpha": 32}, LORA_RATES, "more"),
    "LN tuning": Candidate("ln_tuning", {}, LORA_RATES, "more"),
    "RoAd": Candidate("road", {}, IA3_RATES, "more"),
    "VeRA": Candidate("vera", {"target_modules": ["q_proj", "v_proj"]}, IA3_RATES, "more"),
    "MiSS": Candidate("miss", {"r": 16, "target_modules": ["q_proj", "v_proj"]}, LORA_RATES, "more"),
    "WaveFT": Candidate("waveft", {"n_frequency": 576, "target_modules": ["q_proj", "v_proj"]}, IA3_RATES, "more"),
    "full fine-tuning": Candidate("full", {}, FULL_RATES, "more"),
    "RED after the block": Candidate("red", {"target_modules": r".*layers\.\d+"}, group="variant"),
    "RED on attention": Candidate("red", {"sites": ["attention"]}, group="variant"),
    "RED on norms": Candidate("red", {"target_modules": r".*layernorm"}, group="variant"),
    "RED on all linears": Candidate("red", {"target_modules": r".*layers.*_proj"}, group="variant"),
    "RED, first half": Candidate("red", {"layers_to_transform": list(range(15))}, group="variant"),
    "RED, every third block": Candidate("red", {"layers_to_transform": list(range(2, 30, 3))}, group="variant"),
    "RED, bias bounded": Candidate("red", {}, group="variant", bias_bound=0.3),
}
BASE = "base"  # the model as it is
RED_DEFAULT = 3e-2


@dataclass(frozen=True)
class Run:
    """Everything that decides the outcome of a run but the data and the base model, which are the same for all.

    Attributes:
        name: of the candidate, or what part C calls the cell.
        split: whose questions are answered. "validation" chooses rates, and "test" is for the tables alone.
        stored: the number format of what is trained and of its Adam state.
    """

    task: str
    name: str
    method: str
    options: Mapping[str, Any]
    rate: float | None
    seed: int
    split: str
    stored: str = "fp32"
    bias_bound: float | None = None

    def settings(self) -> dict[str, Any]:
        """JSON-able. The task's own settings are in it, so that a change of them is another run."""
        return {**asdict(self), "options": dict(self.options), "training": TASKS[self.task]}

    @property
    def digest(self) -> str:
        """The name of the run's result."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:12]


def run_of(name: str, task: str, rate: float | None, seed: int, split: str) -> Run:
    if name == BASE:
        return Run(task, name, BASE, {}, None, seed, split)
    candidate = CANDIDATES[name]
    options = candidate.options
    return Run(task, name, candidate.method, options, rate, seed, split, bias_bound=candidate.bias_bound)


Results = Mapping[str, Mapping[str, Any]]  # by digest


def rates_tried(name: str, task: str, results: Results) -> dict[float, Mapping[str, Any]]:
    """The validation scores by rate, of those that have a result."""
    found = (r for r in results.values() if r["settings"]["name"] == name and r["settings"]["task"] == task)
    return dict(
        sorted(
            (r["settings"]["rate"], r["validation"])
            for r in found
            if r["settings"]["split"] == "validation" and r["settings"]["seed"] == 0
        )
    )


def best_rate(name: str, task: str, results: Results) -> float | None:
    """The rate of the least sum of ranks over the task's criteria. None while a rate of the grid has no result."""
    tried = rates_tried(name, task, results)
    if set(CANDIDATES[name].rates) - set(tried):
        return None
    usable = {rate: scores for rate, scores in tried.items() if scores is not None}  # others: the loss was not finite
    return min(usable, key=lambda rate: (rank_sum(rate, usable, task), usable[rate]["loss"]))


def rank_sum(one: Any, scores: Mapping[Any, Mapping[str, float]], task: str) -> int:
    """For each criterion how many others are better than `one`, summed."""
    total = 0
    for criterion in CRITERIA.get(task, CHECKED_CRITERIA):
        sign = -1 if criterion in LESS_IS_BETTER else 1
        total += sum(sign * other[criterion] > sign * scores[one][criterion] for other in scores.values())
    return total


def next_rate(name: str, task: str, results: Results) -> float | None:
    """One more rate, half a decade outside, where the best one is at an edge."""
    best, tried = best_rate(name, task, results), sorted(rates_tried(name, task, results))
    if best is None or best not in (tried[0], tried[-1]) or len(tried) > len(CANDIDATES[name].rates):
        return None
    step = 10**0.5 if best == tried[-1] else 10**-0.5
    return float(f"{best * step:.0e}")


def searches(names: Iterable[str], tasks: Iterable[str], results: Results) -> list[Run]:
    """The runs that choose each candidate's rate."""
    runs = []
    for task in tasks:
        for name in names:
            more = next_rate(name, task, results)
            rates = [*CANDIDATES[name].rates, *rates_tried(name, task, results), *([more] if more else [])]
            runs += [run_of(name, task, rate, 0, "validation") for rate in dict.fromkeys(rates)]
    return runs


def table(names: Iterable[str], tasks: Iterable[str], results: Results) -> list[Run]:
    """The runs of a table: each candidate at its best rate, with three seeds, on the test split."""
    runs = []
    for task in tasks:
        for name in names:
            best = best_rate(name, task, results)
            rates = [] if best is None else [best, RED_DEFAULT] if name == "RED" else [best]
            runs += [run_of(name, task, rate, seed, "test") for rate in dict.fromkeys(rates) for seed in SEEDS]
    return runs


def variant_runs() -> dict[str, Run]:
    """What RED and its variants are compared by: E2E's validation split, at RED's default rate."""
    return {name: run_of(name, "e2e", RED_DEFAULT, 0, "validation") for name in ["RED", *group("variant")]}


def winner(results: Results) -> str | None:
    """The best variant of RED by its validation scores. None while a run of them has no result."""
    runs = variant_runs()
    if any(one.digest not in results for one in runs.values()):
        return None
    scores = {name: results[runs[name].digest]["validation"] for name in group("variant")}
    return min(scores, key=lambda name: (rank_sum(name, scores, "e2e"), scores[name]["loss"]))


def group(*kinds: str) -> list[str]:
    return [name for name, candidate in CANDIDATES.items() if candidate.group in kinds]


CELLS = {  # part C: how the edits are stored. All have the paper's own unit of the bias, 1.
    "as released: the scale, in bf16": ({"scale_origin": 0, "unit": 1}, "bf16"),
    "the scale's offset from 1, in bf16": ({"unit": 1}, "bf16"),
    "the scale's offset from 1, in fp32": ({"unit": 1}, "fp32"),
}
TWO, THREE = ("e2e", "spell_backward"), ("e2e", "spell_backward", "chain_sum")


def planned(part: str, results: Results) -> list[Run]:
    """The runs of a part that can be named now. Those that depend on results come when the results are there."""
    if part == "A":
        return searches(group("main"), TWO, results)
    if part == "B":
        return [run_of(BASE, task, None, 0, "test") for task in TWO] + table(group("main"), TWO, results)
    if part == "C":
        return [
            Run("spell_backward", cell, "red", options, rate, seed, "test", stored)
            for cell, (options, stored) in CELLS.items()
            for rate in (2e-5, 1e-3)
            for seed in SEEDS[:2]
        ]
    if part == "D":
        runs = list(variant_runs().values())
        if best := winner(results):  # as a default would be: one rate on every task
            runs += [run_of(best, task, RED_DEFAULT, seed, "test") for task in TWO for seed in SEEDS]
        return runs
    if part == "more":
        further = group("more")
        return [
            *searches(further, THREE, results),
            *searches(group("main"), ["chain_sum"], results),
            run_of(BASE, "chain_sum", None, 0, "test"),
            *table(further, THREE, results),
            *table(group("main"), ["chain_sum"], results),
        ]
    raise ValueError(part)


PARTS = ("A", "B", "C", "D", "more")
