"""What happens while a Trainer trains: checkpoints, metrics.jsonl, progress, and stopping on signals."""

from __future__ import annotations

import logging
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from redpeft.console import Progress, is_first_process, log_main, rounded
from redpeft.errors import Stopped
from redpeft.storage import append_metrics, set_default_modes, write_metrics

TIMES = ("_runtime", "_per_second", "_time")  # endings of log entries that are not scores


class RunCallback(TrainerCallback):
    """Writes checkpoints every `save_steps` steps and when the run is stopped, writes metrics.jsonl, measures the time
    of a step, and logs each evaluation."""

    def __init__(self, trainer: Any, folder: Path, save_steps: int | None) -> None:
        self.trainer, self.folder, self.save_steps = trainer, folder, save_steps
        self.seconds: list[float] = []
        self.writes = trainer.args.process_index == 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The history of a resumed run ends at its checkpoint: later steps are done again.
        if self.writes:
            write_metrics(self.folder, state.log_history)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # accelerate does not do it where several processes skip batches
        self.trainer.order.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        due = self.save_steps is not None and state.global_step % self.save_steps == 0
        # At the end of an epoch the evaluation comes before saving; a checkpoint before it would skip the evaluation.
        epoch_ends = control.should_training_stop or float(state.epoch).is_integer()
        if (due or self.trainer.should_stop) and not epoch_ends:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.writes:
            set_default_modes(Path(args.output_dir, f"checkpoint-{state.global_step}"))
        [stop] = self.trainer.on_any_process(self.trainer.terminated)  # a signal may have come during the evaluation
        if stop:
            raise Stopped(f"stopped at step {state.global_step}; run the same command again to continue")

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.writes:
            append_metrics(self.folder, state.log_history[-1])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.writes and self.trainer.is_in_train:
            scores = plain_scores(kwargs["metrics"], "eval_")
            shown = ", ".join(f"{key} {value:.4f}" for key, value in scores.items())
            log_main(f"epoch {rounded(state.epoch)}, step {state.global_step}: {shown}")

    def seconds_per_step(self) -> float | None:
        """The median over this process's steps, without the first few."""
        warm = self.seconds[min(5, len(self.seconds) // 2) :]
        return statistics.median(warm) if warm else None


def plain_scores(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """The scores among an evaluation's metrics, without their prefix and without times."""
    return {
        key.removeprefix(prefix): value
        for key, value in metrics.items()
        if key.startswith(prefix) and not key.endswith(TIMES)
    }


class ProgressBar(ProgressCallback):
    """transformers' progress bar with the loss in it. Its own log lines would go to standard output, which is for
    results."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


class ProgressLines(TrainerCallback):
    """Progress for logs: a line now and then, for steps and for batches that are scored."""

    def __init__(self) -> None:
        self.steps, self.loss, self.scored = Progress(), "", 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps = Progress(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.show("step", state.global_step, state.max_steps, *filter(None, [self.loss]))

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        if self.scored == 0:
            self.batches = Progress()
        self.scored += 1
        self.batches.show("scoring: batch", self.scored, len(eval_dataloader))
        if self.scored >= len(eval_dataloader):
            self.scored = 0


def show_progress(trainer: Any) -> None:
    """Show a bar on a terminal and lines elsewhere, instead of what the trainer prints itself."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if trainer.args.process_index == 0:
        trainer.add_callback(ProgressBar() if sys.stderr.isatty() else ProgressLines())


def attach(trainer: Any, folder: Path, save_steps: int | None) -> RunCallback:
    """Give the trainer this module's callbacks."""
    # It warns of unreliable times of files when checkpoints are less than a second apart.
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
    show_progress(trainer)
    callback = RunCallback(trainer, folder, save_steps)
    trainer.add_callback(callback)
    return callback


@contextmanager
def stop_on_signals(trainer: Any) -> Iterator[None]:
    """While inside, Ctrl-C and SIGTERM set `trainer.terminated`: the trainer finishes its step, saves and stops.

    A second Ctrl-C stops at once, unless a launcher runs several processes: the launcher passes on a signal that each
    process already got from the terminal. A signal that is ignored (nohup) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield
        return

    def stop(number: int, _: Any) -> None:
        if trainer.terminated and number == signal.SIGINT and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise KeyboardInterrupt
        if not trainer.terminated and number == signal.SIGINT and is_first_process():
            # not print: the signal may have interrupted a print
            os.write(2, b"\nstopping: this step is finished and saved first; Ctrl-C again stops at once\n")
        trainer.terminated = True

    numbers = [each for each in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
