"""Runs the comparison: every run becomes one JSON file in results/, and one that exists is not run again.

    python benchmarks/method_comparison/data.py DATA --e2e DIR --wikitext DIR
    redpeft export-base smollm2 --out SMOLLM2
    python benchmarks/method_comparison/run.py A B C D --base SMOLLM2 --data DATA --workers 2

So days and machines add up. B needs the results of A, and D those of its own searches: a part is asked again for what
it can run until nothing is left.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import resource
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from data import FORGETTING
from settings import BASE, BEAM_SEEDS, PARTS, TASKS, Run, planned

from redpeft.storage import read_json, to_json, write_atomically

HERE = Path(__file__).parent
RESULTS, TEXTS = HERE / "results", HERE / "texts"
PLAIN_BEAMS = {"num_beams": 10, "length_penalty": 0.9, "do_sample": False, "max_new_tokens": 100}
PUBLISHED = {**PLAIN_BEAMS, "no_repeat_ngram_size": 4}
GREEDY = {"do_sample": False, "max_new_tokens": 24}
DECODINGS = {
    ("e2e", "validation"): {"greedy": {**GREEDY, "max_new_tokens": 100}},
    ("e2e", "test"): {"beams": PLAIN_BEAMS, "published": PUBLISHED},
}
ROWS_AT_ONCE = {"e2e": 64, "spell_backward": 200, "chain_sum": 200}  # questions; each has 10 beams in E2E


def read_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    return {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}


# --- one run --------------------------------------------------------------------------------------------------------


def run(one: Run, base: str, data: Path, texts: Path | None = None) -> dict[str, Any]:
    """Train, answer and measure. The texts that are scored elsewhere, by Java, are kept in the folder `texts`."""
    import torch

    import redpeft
    from redpeft.errors import RunError
    from redpeft.training.predict import FinishedRun, load_run
    from redpeft.training.recipe import load_recipe
    from redpeft.training.train import read_task, train

    start, on_gpu = time.perf_counter(), torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    recipe = load_recipe(None, recipe_fields(one, base, data))
    result: dict[str, Any] = {"settings": one.settings(), "split": one.split, "validation": None}
    with tempfile.TemporaryDirectory() as folder:
        if one.method == BASE:
            task, _ = read_task(recipe)
            finished, peak, trained = FinishedRun(None, recipe, task), None, {}
        else:
            try:
                with changed(one):
                    trained = train(recipe, Path(folder) / "run")
            except RunError as error:
                return result | {"failed": str(error).split(":")[0]}
            peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF)[2]
            finished = load_run(Path(folder) / "run")
            if one.method == "red":
                result |= moved(finished.model)
        scores, answers = answer(finished, one, data)
        if one.split == "test":
            result |= {"test": scores, "text_loss": text_loss(finished, data / "wikitext.txt")}
            scores = {}
    if texts is not None and answers:
        texts.mkdir(parents=True, exist_ok=True)
        write_atomically(texts / f"{one.digest}.json", to_json(answers, indent=0))
    return result | {
        "validation": {"loss": trained["validation"]["loss"], **scores} if trained else None,
        "parameters": trained.get("trainable_parameters", 0),
        "file_bytes": trained.get("adapter_bytes", 0),
        "steps": trained.get("steps", 0),
        "peak_bytes": peak,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": trained.get("versions") or {"redpeft": redpeft.__version__, "torch": torch.__version__},
    }


def recipe_fields(one: Run, base: str, data: Path) -> dict[str, Any]:
    """The recipe of a run."""
    fields = {
        "base": base,
        **TASKS[one.task],
        "data.train": str(data / one.task / "train.jsonl"),
        "data.validation": str(data / one.task / "validation.jsonl"),
        "seed": one.seed,
        "precision": "fp32",
    }
    if one.method != BASE:
        fields |= {"method": one.method, "method_options": dict(one.options), "learning_rate": one.rate}
    return fields


@contextmanager
def changed(one: Run) -> Iterator[None]:
    """While inside, training does what a run asks for and the library does not: bounded biases, and edits that are
    held, with their Adam state, in bf16 while base and computation stay fp32."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from redpeft.training import train as training
    from redpeft.tuner.edit import Edit

    build = training.build_learner

    def built(*arguments: Any) -> Any:
        learner = build(*arguments)
        for parameter in learner.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        return learner

    with ExitStack() as stack:
        if one.stored == "bf16":
            stack.enter_context(patch.object(training, "build_learner", built))
            stack.enter_context(patch.object(Edit, "train", torch.nn.Module.train))  # Edit's own goes back to fp32
        if one.bias_bound is not None:
            bound = one.bias_bound

            def keep_within(optimizer: torch.optim.Optimizer, *_: Any) -> None:
                for edit in edits:
                    edit.bias.data.clamp_(-bound, bound)

            edits: list[Edit] = []

            def noted(*arguments: Any) -> Any:
                learner = build(*arguments)
                edits.extend(module for module in learner.model.modules() if isinstance(module, Edit))
                return learner

            stack.enter_context(patch.object(training, "build_learner", noted))
            stack.callback(register_optimizer_step_post_hook(keep_within).remove)
        yield


def moved(model: Any) -> dict[str, float]:
    """The share of scales that differ from 1, the largest |scale - 1|, and of the biases the share that is not 0."""
    import torch

    from redpeft.tuner.edit import Edit

    pairs = [module.difference for module in model.modules() if isinstance(module, Edit)]
    d, bias = (torch.cat([pair[index].detach().float().flatten() for pair in pairs]) for index in (0, 1))
    return {
        "scales_moved": (d != 0).float().mean().item(),
        "largest_scale_change": d.abs().max().item(),
        "biases_moved": (bias != 0).float().mean().item(),
    }


def answer(finished: Any, one: Run, data: Path) -> tuple[dict[str, Any], dict[str, list]]:
    """The scores on the questions of the run's split, and the texts by decoding."""
    from redpeft.tasks.metrics import bleu, is_right
    from redpeft.training.predict import predict

    decodings = DECODINGS.get((one.task, one.split), {"greedy": GREEDY})
    if "beams" in decodings and one.seed not in BEAM_SEEDS:
        return {}, {}
    rows = [json.loads(line) for line in (data / one.task / f"{one.split}_questions.jsonl").open(encoding="utf-8")]
    questions = [{key: row[key] for key in ("mr", "prompt") if key in row} for row in rows]
    scores: dict[str, Any] = {}
    texts: dict[str, list] = {}
    for name, generation in decodings.items():
        finished.task.generation = generation
        texts[name] = [found["text"] for found in predict(finished, questions, ROWS_AT_ONCE[one.task])]
        if one.task == "e2e":
            scores[f"bleu {name}"] = bleu(texts[name], [row["references"] for row in rows])
            scores[f"values {name}"] = values_said(texts[name], questions)
            scores[f"unending {name}"] = unending(texts[name])
            texts["references"] = [row["references"] for row in rows]
        else:
            hits = [is_right(text, row["response"]) for text, row in zip(texts[name], rows, strict=True)]
            scores["exact_match"] = sum(hits) / len(hits)
            scores["hits"] = "".join(str(int(hit)) for hit in hits)  # for paired differences
    if one.split == "validation":  # one decoding
        scores = {name.split()[0]: value for name, value in scores.items()}
    return scores, texts


def values_said(texts: list[str], questions: list[Mapping[str, str]]) -> float:
    """Of the values in the MRs (`food[Fast food]`) the share whose every word stands in the text. Yes and no, which
    are said in other words, do not count."""
    found = []
    for text, question in zip(texts, questions, strict=True):
        words = set(re.findall(r"\w+", text.lower()))
        for value in re.findall(r"\[([^\]]*)\]", question["mr"]):
            if value not in ("yes", "no"):
                found.append(set(re.findall(r"\w+", value.lower())) <= words)
    return sum(found) / len(found)


def unending(texts: list[str]) -> float:
    """The share of texts that the limit of tokens cut: they do not end as a sentence does."""
    return sum(not text.rstrip().endswith((".", "!", "?")) for text in texts) / len(texts)


def text_loss(finished: Any, path: Path) -> float:
    """The mean loss on a text that has nothing to do with the task. What it rises by was forgotten."""
    import torch

    length = FORGETTING["tokens"]
    ids = finished.tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    rows = ids[: FORGETTING["sequences"] * length].view(-1, length).to(finished.model.device)
    with torch.inference_mode():
        losses = [finished.model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    return sum(losses) / len(losses)


# --- all of them ----------------------------------------------------------------------------------------------------


def run_parts(parts: list[str], base: str, data: Path, workers: int, minutes: float | None, out: Path) -> None:
    """Run what the parts plan and no file has. After `minutes` no run is started."""
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    out.mkdir(parents=True, exist_ok=True)
    # on a CPU a process for each run, since the most memory that it had is what is measured
    context = multiprocessing.get_context("spawn")
    each = None if on_gpu() else 1
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=each) as pool:
        running: dict[Future, Run] = {}
        failed: set[str] = set()
        while True:
            results = read_results(out)
            known = results.keys() | failed | {one.digest for one in running.values()}
            todo = {one.digest: one for part in parts for one in planned(part, results) if one.digest not in known}
            for one in list(todo.values())[: workers - len(running)]:
                if time.monotonic() < end:
                    running[pool.submit(run, one, base, data, out.parent / TEXTS.name)] = one
            if not running:
                print(f"{len(todo)} runs are left" if todo else "nothing is left", flush=True)
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                one = running.pop(future)
                if error := future.exception():
                    failed.add(one.digest)
                    print(f"{one.digest} {one.name}, {one.task}: {type(error).__name__}: {error}", flush=True)
                    continue
                result = future.result()
                write_atomically(out / f"{one.digest}.json", to_json(result, indent=1))
                said = result.get("test") or result["validation"] or result.get("failed")
                print(f"{one.digest} {one.task}, {one.name}, {one.rate}, seed {one.seed}: {said}", flush=True)


def score(out: Path) -> None:
    """Add the official scores of E2E, three of which need Java, to the results whose texts are there."""
    from redpeft.tasks.metrics import score_texts

    for digest, result in read_results(out).items():
        kept = out.parent / TEXTS.name / f"{digest}.json"
        if result["settings"]["task"] == "e2e" and "test" in result and "official" not in result and kept.is_file():
            answers = read_json(kept)
            texts, references = ({d: answers[d] for d in DECODINGS["e2e", "test"]}, answers["references"])
            result["official"] = {decoding: score_texts(texts[decoding], references) for decoding in texts}
            write_atomically(out / f"{digest}.json", to_json(result, indent=1))


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="+", choices=(*PARTS, "score"), help="see README.md")
    parser.add_argument("--base", default="smollm2", help="the base model")
    parser.add_argument("--data", type=Path, help="the folder that data.py wrote")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time; on a CPU with one thread each")
    parser.add_argument("--minutes", type=float, help="start no run after this time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are")
    options = parser.parse_args()
    if options.parts == ["score"]:
        return score(options.out)
    os.environ.setdefault("OMP_NUM_THREADS", "1" if options.workers > 1 else str(os.cpu_count()))
    run_parts(options.parts, options.base, options.data, options.workers, options.minutes, options.out)


if __name__ == "__main__":
    main()
