"""The data of the comparison: three tasks and a text on which forgetting is measured, as files of rows.

    python benchmarks/method_comparison/data.py FOLDER --e2e DIR --wikitext DIR

E2E and WikiText-2 are read from folders with `train.jsonl`, `validation.jsonl` and `test.jsonl`. The two tasks whose
answers can be checked come from reasoning-gym (`pip install redpeft[reasoning]`, which builds pycosat from source).
The same arguments always give the same rows.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from redpeft.tasks.reasoning import PREFIX, draw_questions

TRAIN_ROWS = {"e2e": 600, "spell_backward": 1000, "chain_sum": 1000}
LOSS_ROWS = 200  # of E2E's validation split: those whose loss is measured
TEST_MRS = 100
QUESTIONS = 200  # in the validation and the test split of a checked task
CHECKED = {
    "spell_backward": {"min_word_len": 3, "max_word_len": 5},
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
}
FORGETTING = {"sequences": 64, "tokens": 512}
WIKITEXT_CHARACTERS = 4 * 1000 * FORGETTING["sequences"]  # more than enough for these tokens


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make_e2e(source: Path, out: Path) -> None:
    """Rows to train on and to measure the loss on, and for validation and test MRs with all their references."""
    splits = {
        split: [
            {"mr": row["meaning_representation"], "ref": row["human_reference"]}
            for row in read_rows(source / f"{split}.jsonl")
        ]
        for split in ("train", "validation", "test")
    }
    draw = random.Random(0)
    write_rows(out / "train.jsonl", draw.sample(splits["train"], TRAIN_ROWS["e2e"]))
    write_rows(out / "validation.jsonl", draw.sample(splits["validation"], LOSS_ROWS))
    for split in ("validation", "test"):
        groups: dict[str, list[str]] = {}
        for row in splits[split]:
            groups.setdefault(row["mr"], []).append(row["ref"])
        chosen = draw.sample(sorted(groups), min(TEST_MRS, len(groups)))
        write_rows(out / f"{split}_questions.jsonl", ({"mr": mr, "references": groups[mr]} for mr in chosen))


def draw_checked(name: str, **options: Any) -> dict[str, list[dict[str, str]]]:
    """Distinct questions of a task of reasoning-gym with their answers, by split. `options`: how many of each split,
    and those of the task."""
    splits = draw_questions(PREFIX + name, options)
    return {
        split: [{"prompt": row["prompt"], "response": row["response"]} for row in rows]
        for split, rows in splits.items()
    }


def make_checked(name: str, out: Path) -> None:
    counts = {"train": TRAIN_ROWS[name], "validation": QUESTIONS, "test": QUESTIONS}
    for split, rows in draw_checked(name, **counts, **CHECKED[name]).items():
        write_rows(out / f"{split}.jsonl", rows)
        if split != "train":
            write_rows(out / f"{split}_questions.jsonl", rows)


def make_forgetting(source: Path, out: Path) -> None:
    """The first lines of WikiText-2's test text."""
    text = "\n".join(row["text"] for row in read_rows(source / "validation.jsonl"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text[:WIKITEXT_CHARACTERS], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--e2e", type=Path, help="E2E: a folder with train.jsonl, validation.jsonl, test.jsonl")
    parser.add_argument("--wikitext", type=Path, help="WikiText-2: a folder whose validation.jsonl is the test text")
    options = parser.parse_args()
    if options.e2e:
        make_e2e(options.e2e, options.out / "e2e")
    if options.wikitext:
        make_forgetting(options.wikitext, options.out / "wikitext.txt")
    for name in CHECKED:
        make_checked(name, options.out / name)


if __name__ == "__main__":
    main()
