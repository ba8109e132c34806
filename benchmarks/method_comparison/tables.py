"""The tables of docs/explanation/comparison.md, made from the files in results/ and steps.json.

python benchmarks/method_comparison/tables.py            # prints them
python benchmarks/method_comparison/tables.py --write    # puts them into the page
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from run import read_results
from settings import (
    BASE,
    CANDIDATES,
    CELLS,
    CRITERIA,
    RED_DEFAULT,
    THREE,
    best_rate,
    group,
    rates_tried,
    run_of,
    variant_runs,
    winner,
)

from redpeft.storage import read_json

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "comparison.md"
STEPS = Path(__file__).with_name("steps.json")  # what training_step.py printed
BEGIN, END = "<!-- table: {} -->\n", "<!-- end -->\n"
NOT_RUN = "not run"
Result = Mapping[str, Any]
Results = Mapping[str, Result]


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def with_error(values: Sequence[float], digits: int, factor: float = 1) -> str:
    """The mean over seeds, and its standard error."""
    scaled = [factor * value for value in values]
    mean = f"{statistics.mean(scaled):.{digits}f}"
    return mean if len(scaled) == 1 else f"{mean} ± {statistics.stdev(scaled) / math.sqrt(len(scaled)):.{digits}f}"


def tested(results: Results, task: str, name: str, rate: float | None) -> list[Result]:
    """The runs of a row of a table, by seed."""
    settings = {"task": task, "name": name, "rate": rate, "split": "test"}
    found = [r for r in results.values() if all(r["settings"][key] == value for key, value in settings.items())]
    return sorted((r for r in found if "test" in r), key=lambda r: r["settings"]["seed"])


def rows_of(results: Results, task: str, names: Iterable[str]) -> dict[str, list[Result]]:
    """The runs by the row's label: the base, each candidate at its best rate, and RED at its default."""
    rows = {"the base as it is": tested(results, task, BASE, None)}
    for name in names:
        best = best_rate(name, task, results)
        rows[name] = [] if best is None else tested(results, task, name, best)
        if name == "RED" and best not in (None, RED_DEFAULT):
            rows["RED at its default rate"] = tested(results, task, name, RED_DEFAULT)
    return rows


def shared_cells(runs: Sequence[Result]) -> list[str]:
    """Parameters, file, peak memory and rate."""
    first, rate = runs[0], runs[0]["settings"]["rate"]
    if rate is None:
        return ["0", "", "", ""]
    size = first["file_bytes"]
    shown = f"{size / 1e6:.1f} MB" if size > 1e6 else f"{size / 1e3:.0f} kB"
    return [f"{first['parameters']:,}", shown, f"{first['peak_bytes'] / 1e9:.1f} GB", short(rate)]


def short(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


def forgetting(runs: Sequence[Result], base: Sequence[Result]) -> str:
    if not base or runs is base:
        return ""
    return with_error([run["text_loss"] - base[0]["text_loss"] for run in runs], 3)


def e2e_table(results: Results) -> str:
    """Where the test has not been run, the loss of the search is there."""
    rows = rows_of(results, "e2e", group("main", "more"))
    base = rows["the base as it is"]
    for name in group("main", "more"):
        rate = best_rate(name, "e2e", results)
        if not rows[name] and rate is not None:
            rows[name] = [results[run_of(name, "e2e", rate, 0, "validation").digest]]

    def cells(runs: Sequence[Result]) -> list[str]:
        losses = [run["validation"]["loss"] for run in runs if run["validation"]]
        found = [*shared_cells(runs), with_error(losses, 3) if losses else ""]
        if "test" not in runs[0]:
            return [*found, NOT_RUN, *[""] * 5]
        of: Callable[[str], list[float]] = lambda key: [run["test"][key] for run in runs if run["test"]]  # noqa: E731
        return [
            *found,
            with_error(of("bleu beams"), 1),
            with_error(of("values beams"), 2),
            with_error(of("unending beams"), 1, 100),
            with_error(of("bleu published"), 1),
            with_error(of("values published"), 2),
            forgetting(runs, base),
        ]

    first = ["method", "parameters", "file", "peak", "rate", "loss"]
    headings = [*first, "BLEU", "values", "unending, %", "BLEU, ban", "values, ban", "forgetting"]
    return markdown(headings, filled(rows, cells, len(headings) - 1))


def official_table(results: Results) -> str:
    """The five scores of the E2E challenge, by both decodings."""
    scores = ("bleu", "nist", "meteor", "rouge_l", "cider")
    rows = {
        name: [run for run in runs if "official" in run]
        for name, runs in rows_of(results, "e2e", group("main", "more")).items()
    }

    def cells(runs: Sequence[Result]) -> list[str]:
        return [
            " / ".join(
                f"{statistics.mean(run['official'][decoding][score] for run in runs):.{digits}f}"
                for decoding in ("beams", "published")
            )
            for score, digits in zip(scores, (1, 2, 1, 1, 2), strict=True)
        ]

    return markdown(["method", "BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"], filled(rows, cells, len(scores)))


def checked_table(results: Results, task: str) -> str:
    """Exact match, and how far from RED's: paired over questions."""
    rows = rows_of(results, task, group("main", "more"))
    if not any(rows.values()):
        return "\nNot run yet.\n\n"
    base, red = rows["the base as it is"], rows["RED"]

    def cells(runs: Sequence[Result]) -> list[str]:
        return [
            *shared_cells(runs),
            with_error([run["validation"]["loss"] for run in runs], 3) if runs[0]["validation"] else "",
            with_error([run["test"]["exact_match"] for run in runs], 1, 100),
            difference(runs, red),
            forgetting(runs, base),
        ]

    headings = ["method", "parameters", "file", "peak", "rate", "loss", "exact match", "less RED's"]
    return markdown([*headings, "forgetting"], filled(rows, cells, len(headings)))


def difference(runs: Sequence[Result], others: Sequence[Result]) -> str:
    """The difference of two exact matches in points, with the standard error of the paired difference over items."""
    if not others or runs is others:
        return ""
    means = [
        [statistics.mean(map(int, hits)) for hits in zip(*(run["test"]["hits"] for run in each), strict=True)]
        for each in (runs, others)
    ]
    pairs = [100 * (one - other) for one, other in zip(*means, strict=True)]
    return f"{statistics.mean(pairs):+.1f} ± {statistics.stdev(pairs) / math.sqrt(len(pairs)):.1f}"


def filled(
    rows: Mapping[str, Sequence[Result]], cells: Callable[[Sequence[Result]], list[str]], columns: int
) -> list[list[str]]:
    return [[name, *(cells(runs) if runs else [NOT_RUN, *[""] * (columns - 1)])] for name, runs in rows.items()]


def rates_table(results: Results, names: Sequence[str], tasks: Sequence[str]) -> str:
    """Every rate that was tried, with the validation scores by which one was chosen. The chosen one is bold."""
    lines = []
    for task in tasks:
        for name in names:
            best = best_rate(name, task, results)
            shown = []
            for rate, scores in rates_tried(name, task, results).items():
                text = f"{short(rate)}: " + scores_in_short(scores, task)
                shown.append(f"**{text}**" if rate == best else text)
            if shown:
                lines.append([name, task, "; ".join(shown)])
    return markdown(["method", "task", "rate: validation scores"], lines)


def scores_in_short(scores: Mapping[str, float] | None, task: str) -> str:
    if scores is None:
        return "diverged"
    if task in CRITERIA:
        return f"{scores['loss']:.3f}, {scores['bleu']:.1f}, {scores['values']:.2f}"
    return f"{scores['loss']:.3f}, {100 * scores['exact_match']:.1f}"


def formats_table(results: Results) -> str:
    """Part C."""
    lines = []
    for cell in CELLS:
        for rate in (2e-5, 1e-3):
            runs = tested(results, "spell_backward", cell, rate)
            if not runs:
                lines.append([cell, short(rate), NOT_RUN, "", "", "", ""])
                continue
            lines.append(
                [
                    cell,
                    short(rate),
                    with_error([run["validation"]["loss"] for run in runs], 3),
                    with_error([run["test"]["exact_match"] for run in runs], 1, 100),
                    with_error([run["scales_moved"] for run in runs], 1, 100),
                    f"{max(run['largest_scale_change'] for run in runs):.1g}",
                    with_error([run["biases_moved"] for run in runs], 1, 100),
                ]
            )
    headings = ["edits and Adam state", "rate", "loss", "exact match", "scales that moved, %"]
    return markdown([*headings, "largest change", "biases that moved, %"], lines)


def variants_table(results: Results) -> str:
    """Part D: RED and its variants on E2E's validation split. The one that is tested is bold."""
    best = winner(results)
    rows = {
        f"**{name}**" if name == best else name: [results[one.digest]] if one.digest in results else []
        for name, one in variant_runs().items()
    }

    def cells(runs: Sequence[Result]) -> list[str]:
        parameters, scores = runs[0]["parameters"], runs[0]["validation"]
        return [f"{parameters:,}", f"{scores['loss']:.3f}", f"{scores['bleu']:.1f}", f"{scores['values']:.2f}"]

    headings = ["variant", "parameters", "loss", "BLEU", "values"]
    return markdown(headings, filled(rows, cells, len(headings) - 1))


def variants_tested(results: Results) -> str:
    """The best variant beside RED on the test split, with three seeds, at RED's default rate."""
    best, lines = winner(results), []
    scores = {
        "e2e": {"bleu beams": 1, "values beams": 100, "unending beams": 100},
        "spell_backward": {"exact_match": 100},
    }
    for name in ["RED", *([best] if best else [])]:
        cells = [name]
        for task, factors in scores.items():
            runs, base = tested(results, task, name, RED_DEFAULT), tested(results, task, BASE, None)
            if not runs:
                cells += [NOT_RUN, *[""] * len(factors)]
                continue
            answered = [run["test"] for run in runs if run["test"]]
            cells += [with_error([test[key] for test in answered], 1, factor) for key, factor in factors.items()]
            cells.append(forgetting(runs, base))
        lines.append(cells)
    headings = ["", "E2E: BLEU", "values, %", "unending, %", "forgetting", "spelling: exact match", "forgetting"]
    return markdown(headings, lines)


def steps_table() -> str:
    """Time and memory of a training step, from a run of their own with nothing beside it."""
    (rows,) = read_json(STEPS)["models"].values()
    lines = []
    for row in rows:
        low, high = row["ratio_quartiles"]
        ratio = f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})"
        kept, adam = row["saved_bytes"] / 1e6, row["optimizer_bytes"] / 1e6
        lines.append([row["method"], f"{row['seconds']:.3f}", ratio, f"{kept:.0f} MB", f"{adam:.1f} MB"])
    return markdown(["method", "seconds a step", "ratio (quartiles)", "kept for backward", "AdamW"], lines)


def tables(results: Results) -> dict[str, str]:
    """Every table of the page by its name."""
    return {
        "e2e": e2e_table(results),
        "official": official_table(results),
        **{task: checked_table(results, task) for task in THREE[1:]},
        "steps": steps_table(),
        "formats": formats_table(results),
        "variants": variants_table(results),
        "variants tested": variants_tested(results),
        "rates": rates_table(results, [name for name in CANDIDATES if name not in group("variant")], THREE),
    }


def page_with_tables(text: str, made: Mapping[str, str]) -> str:
    """The page with each table between its marks. Raises ValueError for a table without a place."""
    for name, table in made.items():
        before, mark, after = text.partition(BEGIN.format(name))
        if not mark or END not in after:
            raise ValueError(f"the page has no place for the table {name}")
        text = before + mark + table + after[after.index(END) :]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    options = parser.parse_args()
    results = read_results()
    if options.write:
        PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8"), tables(results)), encoding="utf-8")
    else:
        for name, table in tables(results).items():
            print(f"## {name}\n{table}")


if __name__ == "__main__":
    main()
