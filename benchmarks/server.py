"""How long does a server of many adapters take to start, and to list them?

    python benchmarks/server.py                   # 1,000 adapters, four servers one after another

On vLLM's CPU build (`make test-serving` makes an environment). The base is a Llama with random weights, in fp32. Every
server is a process of its own, on a loopback port, and starts from nothing:

    base                vLLM's own command, without adapters and without the plug-in
    1 adapter           `redpeft serve`
    all adapters        the same with --adapters of them
    all, no check       the same without the self-check

**start** is the time from the command to the first answer of `/health`. The server of all adapters is asked for
`/v1/models`: once when it has just started, then --calls times, then once after an adapter was added. `/health` is
asked every 20 ms meanwhile, by another client: alone first, then beside those calls.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engines import KEPT, make_adapters, make_base
from redpeft.serving.launch import SERVER
from serving import conditions, publish

STARTED = 600  # seconds that a server may take to start
PAUSE = 0.02  # seconds between two calls of /health
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", **KEPT}


@contextmanager
def server(command: Sequence[str], log: Path, **environment: str) -> Iterator[tuple[str, float]]:
    """A running server: its address, and the seconds that its start took."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "128"]
    options += ["--enforce-eager", "--skip-tokenizer-init", "--max-num-seqs", "64"]
    began = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, *options],
            env={**os.environ, **ENVIRONMENT, **environment},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.perf_counter() - began > STARTED:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.05)
        yield url, time.perf_counter() - began
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    except OSError:
        return False


def timed(url: str) -> tuple[float, bytes]:
    """Milliseconds of one call, and its answer."""
    began = time.perf_counter()
    answer = urllib.request.urlopen(url, timeout=60).read()
    return 1e3 * (time.perf_counter() - began), answer


class Health(threading.Thread):
    """Asks for /health again and again, until it is stopped."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.milliseconds, self._stopped = f"{url}/health", list[float](), threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(PAUSE):
            self.milliseconds.append(timed(self.url)[0])

    def __enter__(self) -> Health:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self.join()


def list_models(url: str, folder: Path, count: int, calls: int) -> list[dict[str, Any]]:
    """Rows of milliseconds: what `/v1/models` takes, and `/health` alone and beside it."""
    with Health(url) as alone:
        time.sleep(3)  # a change of the last two seconds keeps a list from being kept
    with Health(url) as beside:
        first, answer = timed(f"{url}/v1/models")
        later = []
        for _ in range(calls):
            time.sleep(PAUSE)
            later.append(timed(f"{url}/v1/models")[0])
        shutil.copytree(folder / "0", folder / "added")
        changed, grown = timed(f"{url}/v1/models")
    if [len(json.loads(each)["data"]) for each in (answer, grown)] != [count + 1, count + 2]:  # and the base
        raise RuntimeError("the server lists other models than those of the folder")
    named = {
        "/v1/models, first call": [first],
        "/v1/models, later calls": later,
        "/v1/models, an adapter more": [changed],
        "/health alone": alone.milliseconds,
        "/health beside them": beside.milliseconds,
    }
    return [
        {"call": name, "calls": len(each), "median_ms": statistics.median(each), "most_ms": max(each)}
        for name, each in named.items()
    ]


def measure(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    base = make_base(root / "base", options.layers, options.width)
    many, one = root / "many", root / "one"
    made = make_adapters(base, "RED", many, options.adapters)
    shutil.copytree(made[0], one / "0")
    redpeft = [str(Path(sys.executable).with_name("redpeft")), "serve", str(base), "--adapters"]
    unchecked = json.dumps({"redpeft": {"folder": str(many), "only": True, "check": False}})
    commands = {
        "base": [sys.executable, "-m", SERVER, "--model", str(base)],
        "1 adapter": [*redpeft, str(one), "--"],
        f"{options.adapters:,} adapters": [*redpeft, str(many), "--"],
        f"{options.adapters:,}, no check": [*redpeft, str(many), "--", "--additional-config", unchecked],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    listed: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for name, command in commands.items():
            plugins = {"VLLM_PLUGINS": ""} if name == "base" else {}
            with server(command, root / "server.log", **plugins) as (url, start):
                seconds[name].append(start)
                if name == f"{options.adapters:,} adapters" and not listed:
                    listed = list_models(url, many, options.adapters, options.calls)
    starts = [{"server": name, "seconds": each, "median_s": statistics.median(each)} for name, each in seconds.items()]
    return {"starts": starts, "calls": listed}


def show(report: dict[str, Any]) -> None:
    starts = Table("server", "start: median s", "least-most", title="start", title_justify="left")
    for row in report["starts"]:
        starts.add_row(row["server"], f"{row['median_s']:.1f}", f"{min(row['seconds']):.1f}-{max(row['seconds']):.1f}")
    calls = Table("call", "calls", "median ms", "most ms", title="calls", title_justify="left")
    for row in report["calls"]:
        calls.add_row(row["call"], str(row["calls"]), f"{row['median_ms']:.1f}", f"{row['most_ms']:.1f}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(starts, calls)
    for part in ("machine", "settings"):
        console.print(f"{part}: " + ", ".join(f"{key} {value}" for key, value in report[part].items()), soft_wrap=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=12, help="of the base")
    parser.add_argument("--width", type=int, default=512, help="of the base")
    parser.add_argument("--calls", type=int, default=50, help="of /v1/models, after the first one")
    parser.add_argument("--rounds", type=int, default=1, help="starts of each server")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    report: dict[str, Any] = {"machine": conditions(), "settings": vars(options)}
    with tempfile.TemporaryDirectory() as folder:
        report |= measure(options, Path(folder))
    publish(report, options.json, show)


if __name__ == "__main__":
    main()
