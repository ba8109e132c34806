"""Scores of several adapters on one base model, by EleutherAI's lm-evaluation-harness (the extra `lm-eval`)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from redpeft.console import log_main
from redpeft.errors import UserError, did_you_mean, first_line
from redpeft.evaluation.language_model import weights_digest
from redpeft.storage import explaining_full_disk, locked, read_json, to_json, write_atomically

Metrics = dict[str, float]


@dataclass(frozen=True)
class HarnessTask:
    """What lm-eval is to score.

    Attributes:
        name: a task, tag or group of lm-eval, or a task's YAML file.
        shots: how many examples its prompts begin with; None: as the task says.
        metric: the metric that counts; None: all are shown.
    """

    name: str
    shots: int | None = None
    metric: str | None = None


PRESETS = {
    # The paper's, with the metrics of the Open LLM leaderboard. Its released script takes 5 examples for MMLU.
    "open-llm-leaderboard": (
        HarnessTask("ai2_arc", 25, "acc_norm,none"),
        HarnessTask("truthfulqa_mc2", 0, "acc,none"),
        HarnessTask("winogrande", 5, "acc,none"),
        HarnessTask("gsm8k", 5, "exact_match,strict-match"),
        HarnessTask("hellaswag", 10, "acc_norm,none"),
        HarnessTask("mmlu", 10, "acc,none"),
    )
}


def parse_tasks(names: str, num_fewshot: int | None = None) -> list[HarnessTask]:
    """The tasks in a list such as "arc_easy,gsm8k", each once; a preset's name stands for its tasks, which keep their
    own number of examples."""
    asked = dict.fromkeys(name.strip() for name in names.split(",") if name.strip())
    found = [task for name in asked for task in PRESETS.get(name, (HarnessTask(name, num_fewshot),))]
    return list({task.name: task for task in reversed(found)}.values())[::-1]


def evaluate_adapters(
    base: str,
    adapters: Sequence[str | Path],
    tasks: Sequence[HarnessTask],
    out: str | Path,
    *,
    with_base: bool = False,
    include_path: str | Path | None = None,
    batch_size: int | str = 8,
    limit: int | None = None,
) -> dict[str, Any]:
    """Score every adapter on every task, with `base` loaded once; returns what is written to `out`, a JSON file.

    That is `base`, `limit`, `lm_eval` (its version), `tasks` (name: examples in a prompt), `results` (adapter: task:
    metric: value, in lm-eval's names), `parts` (the same for the tasks of a tag or group) and `average` (adapter: mean
    of the metrics that count, where every task has one). Without adapters, or `with_base`, the base model alone is
    scored too, under its own name. A tag has the mean of its tasks, weighted by their sizes.

    `include_path` is a folder with task files of your own, and `limit` scores that many rows of each task, the first.

    lm-eval caches each answer of the model in `out`.cache as soon as it has it, in a file for each adapter, so the
    same call after a kill, or with more adapters or tasks, computes what is missing. Raises `UserError` before
    anything is scored for an unknown task or one whose data cannot be loaded, an adapter that does not fit the base
    model, and an `out` that holds something else.
    """
    _require_harness()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path) if include_path is not None else None)
    _check_names(tasks, manager.all_tasks)
    models = [*([None] if with_base or not adapters else []), *dict.fromkeys(map(str, adapters))]
    settings = {"base": base, "limit": limit}
    out = Path(out)
    with locked(out.parent, f".{out.name}.lock"):
        _check_out(out, settings)
        _check_data(tasks, manager)
        scored = _score(base, models, tasks, out, manager, batch_size, limit)
        result = {**settings, "lm_eval": version("lm_eval"), **_collect(base, scored)}
        with explaining_full_disk(out.parent):
            write_atomically(out, to_json(result, indent=2))
    return result


def results_table(result: dict[str, Any], tasks: Sequence[HarnessTask]) -> Table:
    """A row for each task and metric, a column for each adapter, with the standard errors that lm-eval gives."""
    models = list(result["results"])
    table = Table("task", "shots", "metric", *models)
    for task in tasks:
        found = {model: result["results"][model][task.name] for model in models}
        names = [task.metric] if task.metric else [name for name in found[models[0]] if "_stderr," not in name]
        for name in names:
            shots = result["tasks"][task.name]
            table.add_row(task.name, str(shots), _short(name), *(_figure(found[model], name) for model in models))
    if result["average"]:
        table.add_section()
        table.add_row("average", "", "", *(f"{result['average'][model]:.4f}" for model in models))
    return table


def _require_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("scores by lm-eval need its package: pip install redpeft[lm-eval]")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it logs a page of defaults


def _check_names(tasks: Sequence[HarnessTask], known: Iterable[str]) -> None:
    if not tasks:
        raise UserError(f"no tasks: give names of lm-eval's tasks, or {', '.join(PRESETS)}")
    known = list(known)
    for task in tasks:
        if task.name in known or (Path(task.name).suffix == ".yaml" and Path(task.name).is_file()):
            continue
        hint = did_you_mean(task.name, [*known, *PRESETS]) or "; task files of your own are found by --include-path"
        raise UserError(f"lm-eval has no task {task.name!r}{hint}")


def _check_data(tasks: Iterable[HarnessTask], manager: Any) -> None:
    """Load each task once before anything is scored, which also downloads its data."""
    for task in tasks:
        try:
            manager.load([task.name])
        except Exception as error:  # of datasets, the hub's client, YAML, Jinja and the task's own code
            raise UserError(f"lm-eval cannot load the task {task.name}: {first_line(error)}") from error


def _check_out(out: Path, settings: dict[str, Any]) -> None:
    """Raises `UserError` where `out` holds anything but scores with these settings, which are computed again."""
    if not out.exists():
        return
    try:
        found = read_json(out)
        differing = [key for key in settings if found[key] != settings[key]]
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{out} exists already and holds no scores: choose another --out, or remove it") from None
    if differing:
        raise UserError(
            f"{out} holds scores with other settings ({', '.join(differing)}): choose another --out, or remove it"
        )


def _score(
    base: str,
    models: Sequence[str | None],
    tasks: Sequence[HarnessTask],
    out: Path,
    manager: Any,
    batch_size: int | str,
    limit: int | None,
) -> dict[tuple[str | None, HarnessTask], dict[str, Any]]:
    """By adapter (None: the base alone) and task: `metrics` and `rows` of the task or its parts, and `shots`."""
    from lm_eval import simple_evaluate

    from redpeft.evaluation.adapters_lm import AdaptersLM

    lm = AdaptersLM(base, batch_size=batch_size)
    for model in models:
        lm.use(model)  # an adapter that does not fit is found out now, and not after hours
    scored: dict[tuple[str | None, HarnessTask], dict[str, Any]] = {}
    for model in models:
        lm.use(model)
        cache = str(_cache(out, base, model))
        for task in tasks:
            log_main(f"{len(scored) + 1} of {len(models) * len(tasks)}: {model or base} on {task.name}")
            try:
                found = simple_evaluate(
                    lm,
                    tasks=[task.name],
                    num_fewshot=task.shots,
                    limit=limit,
                    task_manager=manager,
                    log_samples=False,
                    use_cache=cache,
                )
            except (AssertionError, ValueError) as error:  # such as an answer that is longer than the model reads
                raise UserError(f"lm-eval cannot score {model or base} on {task.name}: {first_line(error)}") from error
            shots = sorted(set(found["n-shot"].values()))
            scored[model, task] = {
                "shots": shots[0] if len(shots) == 1 else shots,
                "metrics": {name: _metrics(values) for name, values in found["results"].items()},
                "rows": {name: count["effective"] for name, count in found["n-samples"].items()},
            }
    return scored


def _cache(out: Path, base: str, model: str | None) -> Path:
    """Where lm-eval keeps a model's answers by prompt: one file for each set of weights, as its keys have none."""
    key = json.dumps([base, model, weights_digest(model)])
    return out.with_name(f"{out.name}.cache") / hashlib.sha256(key.encode()).hexdigest()[:16]


def _metrics(values: dict[str, Any]) -> Metrics:
    """The numbers in lm-eval's result for a task; their names are `metric,filter`."""
    return {name: value for name, value in values.items() if "," in name and isinstance(value, (int, float))}


def _collect(base: str, cells: dict[tuple[str | None, HarnessTask], dict[str, Any]]) -> dict[str, Any]:
    tasks = list(dict.fromkeys(task for _, task in cells))
    names = {model: model or base for model, _ in cells}
    results: dict[str, dict[str, Metrics]] = {name: {} for name in names.values()}
    parts: dict[str, dict[str, dict[str, Metrics]]] = {name: {} for name in names.values()}
    for (model, task), cell in cells.items():
        results[names[model]][task.name] = _whole(task, cell)
        if len(cell["metrics"]) > 1:
            parts[names[model]][task.name] = cell["metrics"]
    average = {
        name: sum(found[task.name][task.metric] for task in tasks if task.metric) / len(tasks)
        for name, found in results.items()
        if all(task.metric for task in tasks)
    }
    shots = {task.name: cell["shots"] for (_, task), cell in cells.items()}
    return {"tasks": shots, "results": results, "parts": parts, "average": average}


def _whole(task: HarnessTask, cell: dict[str, Any]) -> Metrics:
    """lm-eval's numbers for the task or group; for a tag, which has none, the mean over its rows."""
    metrics, rows = cell["metrics"], cell["rows"]
    if task.name in metrics:
        return metrics[task.name]
    if len(metrics) == 1:
        return next(iter(metrics.values()))
    shared = [name for name in next(iter(metrics.values())) if all(name in values for values in metrics.values())]
    total = sum(rows[part] for part in metrics)
    return {
        name: sum(values[name] * rows[part] for part, values in metrics.items()) / total
        for name in shared
        if "_stderr," not in name
    }


def _figure(metrics: Metrics, name: str) -> str:
    error = metrics.get(name.replace(",", "_stderr,"))
    return f"{metrics[name]:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _short(name: str) -> str:
    metric, _, filter_ = name.partition(",")
    return metric if filter_ == "none" else f"{metric} ({filter_})"
