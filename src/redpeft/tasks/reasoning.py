"""Questions of reasoning-gym, and its scores of their answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from redpeft.errors import UserError, first_line, shorten_list
from redpeft.tasks.files import with_rows
from redpeft.tasks.metrics import take_answer

PREFIX = "reasoning-gym:"  # of a data set's name, as `data.path`
REWARD = "reasoning-gym"
ROWS = {"train": 1000, "validation": 200, "test": 200}
# Row i of a data set is drawn by Random(seed + i): data sets with near seeds would share rows.
SEEDS = {"train": 0, "validation": 1_000_000, "test": 2_000_000}
DRAWS = 20  # questions that are drawn for each that is wanted, since some are drawn twice


def draw_questions(path: str, options: Mapping[str, Any]) -> dict[str, Dataset]:
    """The splits of a data set `reasoning-gym:<name>`: "prompt", "response" (its answer, or "") and "metadata" (JSON).

    Args:
        options: how many rows a split has, by its name (default: `ROWS`), and options of the data set.

    All questions differ, also between the splits, and the same arguments always give the same ones. Raises `UserError`
    if the package is missing, and for an unknown name, wrong options, or more rows than there are questions.
    """
    gym = _package(f"data.path {path}")
    name = path.removeprefix(PREFIX)
    wanted = {split: options.get(split, count) for split, count in ROWS.items()}
    if wrong := [split for split, count in wanted.items() if not isinstance(count, int) or count < 1]:
        raise UserError(f"data.generate.{wrong[0]} is a number of rows, not {wanted[wrong[0]]!r}")
    own = {key: value for key, value in options.items() if key not in ROWS}
    if name not in gym.factory.DATASETS:
        raise UserError(
            f"reasoning-gym has no data set {name!r}; it has {shorten_list(sorted(gym.factory.DATASETS), 200)}"
        )
    seen: set[str] = set()
    splits = {}
    for split, count in wanted.items():
        try:
            drawn = gym.create_dataset(name, seed=SEEDS[split], size=DRAWS * count, **own)
        except (TypeError, ValueError, AssertionError) as error:
            raise UserError(f"data.generate: reasoning-gym's {name}: {first_line(error)}") from None
        rows: list[dict[str, str]] = []
        for entry in drawn:
            if entry["question"] not in seen:
                seen.add(entry["question"])
                metadata = json.dumps(entry["metadata"], default=str)
                answer = "" if entry["answer"] is None else str(entry["answer"])  # None: there are several
                rows.append({"prompt": entry["question"], "response": answer, "metadata": metadata})
            if len(rows) == count:
                break
        if len(rows) < count:
            raise UserError(
                f"{path}: {count:,} rows for {split} were asked for, and only {len(rows):,} questions differ"
            )
        splits[split] = with_rows(Dataset.from_list(rows), f"{path}, {split}")
    return splits


def score_answer(text: str, row: Mapping[str, Any]) -> float:
    """reasoning-gym's score of the answer that a text gives (`take_answer`). `row`: as `draw_questions` makes it.

    Raises `UserError` for a row of another kind.
    """
    gym = _package(f"reward {REWARD}")
    try:
        metadata = json.loads(row["metadata"])
        score = gym.get_score_answer_fn(metadata["source_dataset"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"reward {REWARD} needs rows of reasoning-gym with its metadata as JSON: data.path={PREFIX}NAME has them"
        ) from None
    entry = {"question": row["prompt"], "answer": row["response"] or None, "metadata": metadata}
    return float(score(take_answer(text, row["response"]), entry))


def _package(needed_by: str) -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError:
        raise UserError(f"{needed_by} needs reasoning-gym: pip install redpeft[reasoning]") from None
    return reasoning_gym
