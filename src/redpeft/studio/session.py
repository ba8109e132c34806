"""What the studio's page shows and does, without the page: the adapters of a folder, and the models that answer.

Models are shared by all who look at the page, and an answer or a mix changes them: one request uses them at a time.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from peft import PeftModel

from redpeft.adapters import stats
from redpeft.adapters.arithmetic import weighted_sum
from redpeft.adapters.folder import Adapter, read_adapter
from redpeft.adapters.listing import ListedAdapter, list_adapters, search_adapters
from redpeft.console import counted
from redpeft.errors import UserError, shorten_list
from redpeft.evaluation.answers import AdaptedModel, Answer, Sampling, Weights, answer_chat, save_sum
from redpeft.evaluation.language_model import detach, load_language_model
from redpeft.models import find_base, input_limit
from redpeft.plots import channels_figure, run_figures
from redpeft.storage import METRICS, RESULT, WEIGHTS_NAME, is_below, read_metrics, read_result
from redpeft.tasks.base import TASKS, Task
from redpeft.tasks.classification import ClassificationTask
from redpeft.tasks.instruction import InstructionTask
from redpeft.training.predict import FinishedRun, answer_batches, open_run

MOST = 4  # adapters that answer together
OUTLIERS = 8  # of each vector
NAME = r"(?!adapter$|.*\.partial$)\w[\w.-]*"  # of an adapter that is saved, by which a search finds it


@dataclass(frozen=True)
class Entry:
    """An adapter of the folder, or an unfinished run: what is known of it, where it is, and when it was written."""

    listed: ListedAdapter
    adapter: Path
    run: Path | None
    date: datetime

    @property
    def answers(self) -> bool:
        """Whether it answers chats, as far as is known."""
        return self._is(InstructionTask, "CAUSAL_LM", None)

    @property
    def labels(self) -> bool:
        """Whether it labels a text or a pair of texts."""
        return self._is(ClassificationTask, "SEQ_CLS")

    def _is(self, kind: type[Task], *task_types: str | None) -> bool:
        """Whether it is whole, and of a run of this kind of task; without a run, of one of PEFT's task types."""
        task = self.listed.task
        whole = self.listed.status in ("ok", "not checked")
        known = TASKS.get(task) if task else None
        return whole and (issubclass(known, kind) if known else task in task_types)


class Session:
    """The adapters of a folder and the models that answer with them.

    Attributes:
        entries: by name, as `look` last found them.
        base: of the adapters that answer chats; None where none of them names one.
    """

    def __init__(self, folder: str | Path, base: str | None = None) -> None:
        """Raises `UserError`: no such folder, no adapters there, adapters of several bases without `base`, and a base
        that does not exist."""
        self.root = Path(folder).resolve()
        self.entries: dict[str, Entry] = {}
        self.closed = False
        self._lock = threading.Lock()  # held while models are used
        self._adapted: AdaptedModel | None = None
        self._added: dict[str, Entry] = {}  # to that model
        self._classifiers: dict[str, tuple[Entry, FinishedRun]] = {}
        self.look()
        named = list(dict.fromkeys(e.listed.base for e in self.entries.values() if e.answers and e.listed.base))
        if base is None and len(named) > 1:
            raise UserError(
                f"the adapters in {folder} name several base models, {shorten_list(named)}: choose one with --base"
            )
        self.base = base or next(iter(named), None)
        if self.base is not None:
            find_base(self.base)

    def look(self) -> None:
        """Read the folder again. An adapter that was written anew is loaded anew before it next answers."""
        found = {one.name: one for one in search_adapters(self.root)[0]}
        entries = {}
        for listed in list_adapters(self.root):
            one = found.get(listed.name)
            paths = [one.adapter / WEIGHTS_NAME, one.adapter, one.run or one.adapter] if one else []
            written = next((path.stat().st_mtime for path in paths if path.exists()), None)
            if one is None or written is None:  # it came or went between the two
                continue
            if (outside := self._outside(one.adapter, one.run)) is not None:
                listed = replace(listed, status="damaged", reason=outside)
            name = self.root.name if listed.name == "." else listed.name
            entries[name] = Entry(listed, one.adapter, one.run, datetime.fromtimestamp(written))
        self.entries = entries

    def find(self, name: str) -> Entry:
        """The adapter of this name. Raises `UserError` where there is none, and where it or a file of it lies outside
        the folder when all links are followed."""
        if name not in self.entries:
            raise UserError(f"there is no adapter {name!r} in {self.root}")
        entry = self.entries[name]
        if (outside := self._outside(entry.adapter, entry.run)) is not None:
            raise UserError(f"{name}: {outside}")
        return entry

    def _outside(self, adapter: Path, run: Path | None) -> str | None:
        """Why an adapter is not read: it leads out of the folder. None if it does not."""
        for folder in filter(None, (adapter, run)):
            for path in (folder, *sorted(folder.glob("*"))):
                if not is_below(path, self.root):
                    return f"{path} leads out of {self.root}, where the studio reads nothing: put the file there"
        return None

    # --- answers -----------------------------------------------------------------------------------------------------

    def answer(
        self, prompt: str, rows: Sequence[Weights], sampling: Sampling, system: str = ""
    ) -> Iterator[Sequence[str | Answer]]:
        """The answers to a prompt, one by each weighted sum of adapters: the texts so far, again and again, and at the
        end the whole answers.

        They are rows of one `generate`, in a thread of its own that ends early where nobody goes on reading.
        Raises `UserError` for an empty prompt, too many adapters, and as `answer_chat` and `AdaptedModel.add` do.
        """
        if not prompt.strip():
            raise UserError("write a prompt first")
        if not rows:
            raise UserError("choose who answers: the base model, an adapter, or both")
        if len({name for weights in rows for name in weights}) > MOST:
            raise UserError(f"choose at most {MOST} adapters")
        messages = [{"role": "user", "content": prompt}]
        if system.strip():
            messages.insert(0, {"role": "system", "content": system})
        changes: queue.SimpleQueue[tuple[int, str] | list[Answer] | Exception] = queue.SimpleQueue()
        left = threading.Event()

        def work() -> None:
            try:
                with self._lock:
                    adapted = self._model_with([name for weights in rows for name in weights])
                    changes.put(
                        answer_chat(
                            adapted,
                            rows,
                            messages,
                            sampling,
                            lambda row, text: changes.put((row, text)),
                            lambda: left.is_set() or self.closed,
                        )
                    )
            except Exception as error:  # raised again where the answers are read
                changes.put(error)

        threading.Thread(target=work, daemon=True).start()
        texts = [""] * len(rows)
        try:
            while isinstance(change := changes.get(), tuple):
                row, text = change
                texts[row] += text
                if changes.empty():
                    yield list(texts)
            if isinstance(change, Exception):
                raise change
            yield change
        finally:
            left.set()

    def _model_with(self, names: Sequence[str]) -> AdaptedModel:
        """The base model, to which these adapters are added; for the thread that holds the lock."""
        entries = {name: self.find(name) for name in names}
        if self.base is None:
            raise UserError(f"no adapter in {self.root} names its base model: start the studio with --base")
        if self._adapted is None:
            model, tokenizer = load_language_model(self.base)
            self._adapted = AdaptedModel(model, (InstructionTask({"messages": "messages"}), tokenizer))
        if any(self._added.get(name, entry) != entry for name, entry in entries.items()):
            model, form = self._adapted.model, self._adapted.base_form
            self._adapted = AdaptedModel(detach(model) if isinstance(model, PeftModel) else model, form)
            self._added = {}
        for name, entry in entries.items():
            if name not in self._added:
                self._adapted.add(name, entry.adapter)
                self._added[name] = entry
        return self._adapted

    def save(self, weights: Weights, name: str) -> Path:
        """Write a weighted sum of adapters as one more adapter of the folder.

        Raises `UserError` for a name that is not one, or is taken, for a folder that is an adapter itself, and as
        `compose` does.
        """
        if any(entry.listed.name == "." for entry in self.entries.values()):
            raise UserError(
                f"{self.root} is an adapter itself: to save others, start the studio with a folder above it"
            )
        if not re.fullmatch(NAME, name):
            raise UserError(f"a new name has letters, digits, dots, dashes and underscores, not {name!r}")
        out = self.root / name
        if out.exists() or out.is_symlink():
            raise UserError(f"{name} exists already in {self.root}: choose another name")
        save_sum({each: self.find(each).adapter for each in weights}, weights, out)
        self.look()
        return out

    def label(self, name: str, text: str, pair: str = "", edited: bool = True) -> dict[str, Any]:
        """How a classifier labels a text: label and probabilities, or a value.

        Without the edit (`edited=False`, RED alone) the trained head reads what the base model computes: the base has
        no head of its own. Raises `UserError` for a text that is missing or one too many, and as `open_run` does.
        """
        entry = self.find(name)
        with self._lock:
            known, run = self._classifiers.pop(name, (None, None))
            if run is None or known != entry:
                run = open_run(entry.run or entry.adapter)
            self._classifiers[name] = entry, run
            for oldest in list(self._classifiers)[:-MOST]:
                del self._classifiers[oldest]
            columns = [run.task.columns[key] for key in ("text", "text_pair") if key in run.task.columns]
            texts = [each for each in (text, pair) if each.strip()]
            if len(texts) != len(columns):
                raise UserError(f"{name} labels {counted(len(columns), 'text')} at a time, not {len(texts)}")
            limit = input_limit(run.model, run.tokenizer, run.recipe.max_length)
            if (length := len(run.tokenizer(*texts)["input_ids"])) > limit.tokens:
                raise UserError(f"the text has {length:,} tokens, more than {limit.source}: shorten it")
            if not edited and run.recipe.method != "red":
                raise UserError(f"{name} is no RED adapter: only an edit can be switched off beside its head")
            if not edited:
                run.model.base_model.set_scale("default", 0.0)
            try:
                [(_, _, answer)] = answer_batches(run, [[dict(zip(columns, texts, strict=True))]])
            finally:
                if not edited:
                    run.model.base_model.set_scale("default", 1.0)
            return answer

    # --- pictures ----------------------------------------------------------------------------------------------------

    def curves(self, name: str) -> list[Any]:
        """Figures of a run's loss and score by step, also while it trains."""
        entry = self.find(name)
        if entry.run is None or not (entry.run / METRICS).is_file():
            raise UserError(f"{name} has no curves: it is an adapter without its run, or has not begun")
        result = read_result(entry.run) if (entry.run / RESULT).is_file() else {}
        figures = run_figures(read_metrics(entry.run), result.get("metric", "loss"), result.get("best_epoch"))
        return list(figures.values())

    def channels(self, name: str, other: str | None = None) -> tuple[Any, list[stats.Outlier]]:
        """A picture of what an adapter learned at each layer and channel, or of what it has more than another, and the
        channels that stand out in it."""
        adapter = read_adapter(self.find(name).adapter)
        if other is not None and other != name:
            adapter = weighted_sum([adapter, read_adapter(self.find(other).adapter)], [1.0, -1.0])
        return channels_picture(adapter), stats.outliers(adapter, OUTLIERS)


def channels_picture(adapter: Adapter) -> Any:
    titles = {"scale": "scale - 1", "bias": "bias, in units"}
    panels = {}
    for vector, sites in stats.channels(adapter).items():
        names = stats.short_site_names(list(sites))
        panels[titles[vector]] = {name: values.tolist() for name, values in zip(names, sites.values(), strict=True)}
    return channels_figure(panels)
