"""`redpeft demo`: what RED does with a chat model and with an encoder; no account and no download.

The chat model is SmolLM2 (135M parameters). It learns three styles of answers, as three edits trained in one fleet,
which then answer side by side and mixed. The encoder is all-MiniLM-L6-v2 (22M parameters). It learns to sort support
messages, by RED and by two other methods. Both come as Python packages, and the data comes with redpeft. The runs are
ordinary ones, as `redpeft fleet` and `redpeft train` make them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from redpeft import tasks
from redpeft.console import log_main
from redpeft.errors import RunError, UserError
from redpeft.evaluation.language_model import Decoding, LanguageModel, attach, load_language_model
from redpeft.fleet.queue import Job
from redpeft.models import find_base, read_gguf_header
from redpeft.plots import MethodScore, plot_parameters
from redpeft.runs.experiment import failures
from redpeft.runs.job_list import run_fleet
from redpeft.runs.runner import run_jobs
from redpeft.storage import locked, read_result
from redpeft.training.predict import load_run, predict
from redpeft.training.recipe import Recipe
from redpeft.tuner.mixed import BASE

DATA = Path(tasks.__file__).parent

CHAT_MODEL = "smollm2"
STYLES = DATA / "answer_styles"  # a file of prompts and responses for each style
# Of 33 answers to unseen prompts, 33 were in style; at the default rate of 3e-2 the short ones repeated themselves, at
# 1e-2 some JSON did not end.
FLEET = {"task": "instruction", "batch_size": 4, "epochs": 2, "learning_rate": 0.02}
QUICK_FLEET = {"batch_size": 2, "max_steps": 12}
NEW_PROMPTS = ("How do I make a cup of tea?", "Why do stars twinkle?", "Tell me about the city of Paris.")
MIXED, WEAK = "half json, half pirate", "pirate at half strength"
DECODING = Decoding(max_new_tokens=48, repetition_penalty=1.0, no_repeat_ngrams=0)

ENCODER = "minilm"
MESSAGES = DATA / "support_messages"
METHODS = ("red", "lora", "ia3")
SCHEDULE = {"batch_size": 8, "epochs": 3}
QUICK_SCHEDULE = {"batch_size": 8, "epochs": 1}
NEW_MESSAGES = (
    "ordered my card two weeks ago and the postman still hasnt brought anything",
    "Why was I charged 2.99 extra for paying in euros?",
    "HELP i typed the wrong sort code and my rent went to a stranger",
)
PLOT = "accuracy.png"

Results = tuple[dict[str, Any], list[Any]]  # as data, and as tables and lines to print


def run_demo(folder: str | Path, quick: bool = False) -> Results:
    """Run both halves. What is finished in `folder` is not done again.

    A half whose model is not installed is left out, and a line says how to get it. `quick`: only one half, with fewer
    steps.

    Raises `UserError` where neither model is installed or `folder` holds something else, and `RunError` where a run
    failed.
    """
    folder = Path(folder)
    _check_folder(folder)
    data: dict[str, Any] = {}
    shown: list[Any] = []
    missing: list[str] = []
    with locked(folder):
        for model, half in ((CHAT_MODEL, teach_styles), (ENCODER, compare_methods)):
            try:
                read_gguf_header(model)  # raises where the model's package, or what reads its file, is not installed
            except UserError as error:
                log_main(f"left out: {error}")
                missing.append(str(error))
                continue
            found, lines = half(folder, quick)
            data |= found
            shown += lines
            if quick:
                break
    if not data:
        raise UserError("; ".join(missing))
    return data, shown


def _check_folder(folder: Path) -> None:
    """Raises `UserError` for a folder that holds something else than a demo."""
    if folder.exists():
        found = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
        known = (STYLES.name, *METHODS, PLOT)
        if other := sorted(name for name in found if name not in known and not name.startswith(".")):
            raise UserError(f"{folder} holds {other[0]}, which is no part of a demo: choose another output folder")


def _as_typed(settings: Mapping[str, Any]) -> list[str]:
    """Fields of a recipe as they are typed on the command line."""
    return [f"{key}={value}" for key, value in settings.items()]


# --- the chat model --------------------------------------------------------------------------------------------------


def teach_styles(folder: Path, quick: bool) -> Results:
    """Train an edit for each style, all in one fleet, and let the base model and the edits answer new prompts."""
    settings = {"base": CHAT_MODEL, **FLEET, **(QUICK_FLEET if quick else {})}
    fleet = run_fleet(STYLES, folder / STYLES.name, overrides=_as_typed(settings))
    if error := failures(fleet.results):
        raise error
    runs = {job.name: job.folder for job in fleet.results}
    answers = answer_in_styles(runs)
    shown = [_answers_table(answers), _sizes(read_result(runs["json"])), _next_with_styles(runs, settings)]
    return {"answers": answers, "styles": {style: str(run) for style, run in runs.items()}}, shown


def answer_in_styles(runs: Mapping[str, Path]) -> list[dict[str, str]]:
    """What the base model and each style answer to the new prompts, and two mixtures to the last of them: all in one
    batch, in which each row has its own edit."""
    model, tokenizer = load_language_model(CHAT_MODEL)
    for style, run in runs.items():
        model = attach(model, run, style)
    model.add_weighted_adapter(["json", "pirate"], [0.5, 0.5], MIXED)
    model.add_weighted_adapter(["pirate"], [0.5], WEAK)
    rows = [*product(NEW_PROMPTS, [BASE, *runs]), (NEW_PROMPTS[-1], MIXED), (NEW_PROMPTS[-1], WEAK)]
    chats = [[{"role": "user", "content": prompt}] for prompt, _ in rows]
    answers = LanguageModel(model, tokenizer).answer(chats, DECODING, [adapter for _, adapter in rows])
    return [
        {"prompt": prompt, "adapter": adapter, "answer": answer}
        for (prompt, adapter), answer in zip(rows, answers, strict=True)
    ]


def _answers_table(answers: Sequence[dict[str, str]]) -> Table:
    table = Table("prompt", "who answers", "answer", title="New prompts: a chat model, and edits of it")
    before = None
    for row in answers:
        if row["prompt"] != before:
            table.add_section()
        who = "the base model" if row["adapter"] == BASE else row["adapter"]
        table.add_row("" if row["prompt"] == before else row["prompt"], who, escape(row["answer"]))
        before = row["prompt"]
    return table


def _sizes(result: Mapping[str, Any]) -> str:
    base = find_base(CHAT_MODEL)
    size = sum(file.stat().st_size for file in base.folder.glob(base.gguf_file or "*.safetensors"))
    return (
        f"Each edit is {result['trainable_parameters']:,} numbers in a file of {result['adapter_bytes'] / 1024:,.0f} "
        f"KiB; the chat model's file has {size / 1024**2:,.0f} MiB."
    )


def _next_with_styles(runs: Mapping[str, Path], settings: Mapping[str, Any]) -> str:
    json, pirate = runs["json"], runs["pirate"]
    return f"""Next, with the chat model:
  redpeft chat {CHAT_MODEL} --adapter {json} --adapter {pirate}    # /help lists how to switch and mix them
  redpeft studio {json.parent}    # the same in the browser
  redpeft compose '0.5 * "{json}" + 0.5 * "{pirate}"' --out runs/mixed
  redpeft fold {json} --out models/json    # a plain checkpoint
  redpeft fleet {STYLES} {" ".join(_as_typed(settings))} --out runs/styles    # or a folder with files of your own"""


# --- the encoder -----------------------------------------------------------------------------------------------------


def compare_methods(folder: Path, quick: bool) -> Results:
    """Train each method on the support messages, compare them, and let RED's run label new messages."""
    methods, schedule = (METHODS[:1], QUICK_SCHEDULE) if quick else (METHODS, SCHEDULE)
    data = {"path": str(MESSAGES), "text": "text", "label": "label"}
    jobs = [
        Job(Recipe(base=ENCODER, task="classification", data=data, method=method, **schedule), folder / method)
        for method in methods
    ]
    results = run_jobs(jobs)
    if failed := next((result for result in results if "error" in result), None):
        raise RunError(f"{failed['folder']}: {failed['error']}")
    scores = [
        {
            "method": result["method"],
            "accuracy": 100 * result["test"]["accuracy"],
            "trained_parameters": result["trainable_parameters"],  # with the head, which every method trains
            "file_bytes": result["adapter_bytes"],
            "seconds_per_step": result["seconds_per_step"],
        }
        for result in results
    ]
    points = [MethodScore(each["method"], each["trained_parameters"], each["accuracy"], None) for each in scores]
    plot = plot_parameters(points, "trained parameters, with the head", "test accuracy (%)", folder / PLOT)
    run = folder / "red"
    answers = predict(load_run(run), NEW_MESSAGES)
    predictions = [
        {"text": text, "label": answer["label"], "probability": answer["probabilities"][answer["label"]]}
        for text, answer in zip(NEW_MESSAGES, answers, strict=True)
    ]
    shown = [
        _scores_table(scores),
        f"Drew {plot}",
        _predictions_table(predictions),
        _next_with_messages(run, schedule),
    ]
    return {"scores": scores, "predictions": predictions, "plot": plot, "run": run}, shown


def _scores_table(scores: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Support messages in 12 classes")
    table.add_column("method")
    for name in ("test accuracy", "trained parameters", "file", "seconds a step"):
        table.add_column(name, justify="right")
    for score in scores:
        table.add_row(
            score["method"],
            f"{score['accuracy']:.1f} %",
            f"{score['trained_parameters']:,}",
            f"{score['file_bytes'] / 1024:,.0f} KiB",
            f"{score['seconds_per_step']:.3f}",
        )
    return table


def _predictions_table(predictions: Sequence[dict[str, Any]]) -> Table:
    table = Table("message", "label", "probability", title="The RED adapter on new messages")
    for row in predictions:
        table.add_row(row["text"], row["label"], f"{row['probability']:.2f}")
    return table


def _next_with_messages(run: Path, schedule: Mapping[str, Any]) -> str:
    return f"""Next, with the encoder:
  redpeft train base={ENCODER} data.path={MESSAGES} {" ".join(_as_typed(schedule))} --out runs/mine
  redpeft evaluate {run} {MESSAGES / "test.jsonl"}
  echo "{NEW_MESSAGES[0]}" | redpeft predict {run} -
  redpeft inspect {run} --plot red.png"""
