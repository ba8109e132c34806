"""A soak: mixed traffic on a real server for some minutes. Every answer is right, no error unexpected, memory level.

    make soak-serving MINUTES=15

A thousand adapters over three slots. Eight clients ask, cancel, replace, add, unload, remove, break, mend and load, as
they draw. An answer is compared with transformers' greedy tokens. The level of memory is that of all of the server's
processes together, fitted to what was done in the last two thirds; a run of a minute sees caches fill, and fails.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from safetensors.torch import save_file

from redpeft.storage import CONFIG_NAME, WEIGHTS_NAME

from .server import Server
from .tiny_adapters import TOKENS, WIDTH, adapter, edits

pytestmark = [pytest.mark.serving, pytest.mark.timeout(0)]

MINUTES = float(os.environ.get("MINUTES", "15"))
CLIENTS = 8
NAMES = 1100  # more than vLLM keeps on the CPU (1,024), so that this cache is full from the start
ALIKE = 11  # of the adapters edit the same sites, so that one's weights can take the place of another's
SWAPPED = 4  # names whose adapters are replaced while others ask for them
# MB of all processes, of 3,600, for each thousand actions, which are some 1,400 requests: 0.5 and 1.0 in two runs. Of
# the base alone, without the plug-in, vLLM grew by 0.5 for each thousand requests.
MOST_GROWTH = 1.5
SAMPLED = 2.0  # seconds between two looks at the memory


class Served:
    """The folder that is served, what each name in it answers, and who asks. `answers`: greedy tokens by the number of
    the edit (None for the base) and the number of the prompt."""

    def __init__(self, root: Path, adapters: list[Path], prompts: list[list[int]], answers: dict) -> None:
        self.root, self.adapters, self.prompts, self.answers = root, adapters, prompts, answers
        shutil.copytree(adapters[0], root / ".hidden")
        for number in range(NAMES):
            self.put(f"steady-{number:04}", number % len(adapters))
        self.history: list[list[Version]] = [[] for _ in range(SWAPPED)]
        self.swapping = threading.Lock()
        for number in range(SWAPPED):
            self.swap(number, number)

    def put(self, name: str, edit: int) -> None:
        """An adapter is there all at once: a hidden folder gets its name, or its weights a new file."""
        target, fresh = self.root / name, self.root / f".{name}"
        if target.exists():
            shutil.copy(self.adapters[edit] / WEIGHTS_NAME, fresh)
            os.replace(fresh, target / WEIGHTS_NAME)
        else:
            shutil.copytree(self.adapters[edit], fresh)
            fresh.rename(target)

    def swap(self, number: int, edit: int) -> None:
        with self.swapping:
            self.history[number].append(version := Version(edit))
            self.put(f"swapped-{number}", edit)
            version.there = time.monotonic()

    def answers_since(self, began: float, number: int, prompt: int) -> list[list[int]]:
        """What any of the edits answers that a name had at any moment since then."""
        versions = list(self.history[number])
        until = [version.there for version in versions[1:]] + [math.inf]
        return [self.answers[v.edit, prompt] for v, gone in zip(versions, until, strict=True) if gone > began]


@dataclass
class Version:
    """An edit that was put in the place of another: at the latest since `there`, and perhaps somewhat earlier, since a
    new name can be seen before the call that gives it returns."""

    edit: int
    there: float = math.inf


class Client(threading.Thread):
    """Draws one action after another until told to stop. What goes wrong is kept in `wrong`."""

    def __init__(self, number: int, server: Server, served: Served, end: float) -> None:
        super().__init__(daemon=True)
        self.number, self.server, self.served, self.end = number, server, served, end
        self.draw = random.Random(number)
        self.http = httpx.Client(base_url=server.url(""), timeout=120)
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.made = 0

    def run(self) -> None:
        actions, shares = zip(*ACTIONS.items(), strict=True)
        while time.monotonic() < self.end and len(self.wrong) < 10:
            action = self.draw.choices(actions, shares)[0]
            try:
                action(self)
            except Exception as error:
                self.wrong.append(f"client {self.number}, {action.__name__}: {type(error).__name__}: {error}"[:2000])
            self.done[action.__name__] += 1

    # --- what it says ---

    def body(self, name: str, prompt: int) -> dict:
        told = {"model": name, "prompt": self.served.prompts[prompt], "max_tokens": TOKENS, "temperature": 0}
        return {**told, "ignore_eos": True, "return_token_ids": True}

    def answer(self, name: str, prompt: int) -> list[int]:
        reply = self.http.post("v1/completions", json=self.body(name, prompt))
        assert reply.status_code == 200, f"{name}: {reply.status_code} {reply.text}"
        return reply.json()["choices"][0]["token_ids"]

    def check(self, name: str, edit: int | None) -> None:
        prompt = self.draw.randrange(len(self.served.prompts))
        found, known = self.answer(name, prompt), self.served.answers[edit, prompt]
        assert found[: len(known)] == known, f"{name}, prompt {prompt}: {found} is not {known}"

    def refused(self, name: str, status: int) -> None:
        reply = self.http.post("v1/completions", json=self.body(name, 0))
        assert reply.status_code == status, f"{name}: {reply.status_code} {reply.text}, and {status} was expected"

    def steady(self) -> tuple[str, int]:
        """One of the names that stay; a few of them far oftener than the rest."""
        number = min(int(self.draw.paretovariate(0.5)) - 1, NAMES - 1)
        return f"steady-{number:04}", number % len(self.served.adapters)

    def own(self) -> str:
        """A name that no one else uses."""
        self.made += 1
        return f"own-{self.number}-{self.made}"

    # --- what it does ---

    def ask(self) -> None:
        self.check(*(self.steady() if self.draw.random() < 0.9 else ("base", None)))

    def cancel(self) -> None:
        name, edit = self.steady()
        known, found = self.served.answers[edit, 0], []
        with self.http.stream("POST", "v1/completions", json={**self.body(name, 0), "stream": True}) as reply:
            assert reply.status_code == 200, f"{name}: {reply.status_code}"
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    found += json.loads(line[6:])["choices"][0]["token_ids"]
                if len(found) >= 3:
                    break
        assert found[: len(known)] == known[: len(found)], f"{name}, cancelled: {found} is not the start of {known}"

    def ask_swapped(self) -> None:
        number, prompt = self.draw.randrange(SWAPPED), self.draw.randrange(len(self.served.prompts))
        began = time.monotonic()
        found = self.answer(f"swapped-{number}", prompt)
        right = self.served.answers_since(began, number, prompt)
        assert any(found[: len(known)] == known for known in right), f"swapped-{number}: {found} is none of {right}"

    def swap(self) -> None:
        self.served.swap(self.draw.randrange(SWAPPED), self.draw.randrange(ALIKE))

    def come_and_go(self) -> None:
        name = self.own()
        for edit in self.draw.sample(range(ALIKE), 2):
            self.served.put(name, edit)
            self.check(name, edit)
            reply = self.http.post("v1/unload_lora_adapter", json={"lora_name": name})
            assert reply.status_code == 200, f"unload: {reply.status_code} {reply.text}"
            self.check(name, edit)
        shutil.rmtree(self.served.root / name)
        self.refused(name, 404)

    def break_and_mend(self) -> None:
        name, damage = self.own(), self.draw.choice(DAMAGES)
        self.served.put(f".{name}", 0)  # hidden: no one lists it
        damage(self.served.root / f".{name}")
        (self.served.root / f".{name}").rename(self.served.root / name)
        self.refused(name, 400)
        shutil.copy(self.served.adapters[1] / CONFIG_NAME, self.served.root / name)
        self.served.put(name, 1)
        self.check(name, 1)
        shutil.rmtree(self.served.root / name)

    def unknown(self) -> None:
        outside = self.served.root.parent / "outside"
        names = ["nobody", ".hidden", "steady-0000/", "./steady-0000", "steady-0000//", ".", "a\0b", "x" * 5000]
        self.refused(self.draw.choice([*names, "../outside", str(outside), "steady-0000/../../outside"]), 404)

    def load(self) -> None:
        name, edit = self.steady()
        told = {"lora_name": name, "lora_path": str(self.served.root / name)}
        reply = self.http.post("v1/load_lora_adapter", json=told)
        assert reply.status_code in (200, 400), f"load: {reply.status_code} {reply.text}"  # 400: loaded already
        self.check(name, edit)

    def load_from_outside(self) -> None:
        told = {"lora_name": "outside", "lora_path": str(self.served.root.parent / "outside")}
        reply = self.http.post("v1/load_lora_adapter", json=told)
        assert "not served, since it is not below" in reply.text, reply.text

    def scrape(self) -> None:
        text = self.http.get("metrics").text
        assert "redpeft:requests_total" in text
        assert text.count("vllm:lora_requests_info{") < 1000

    def list_models(self) -> None:
        names = {model["id"] for model in self.http.get("v1/models").json()["data"]}
        missing = {"base", *(f"steady-{number:04}" for number in range(NAMES))} - names
        assert not missing, f"not listed: {sorted(missing)[:5]}"
        assert "outside" not in names


ACTIONS: dict[Callable[[Client], None], int] = {
    Client.ask: 60,
    Client.cancel: 8,
    Client.ask_swapped: 12,
    Client.swap: 3,
    Client.come_and_go: 6,
    Client.break_and_mend: 4,
    Client.unknown: 3,
    Client.load: 3,
    Client.load_from_outside: 1,
    Client.list_models: 1,
    Client.scrape: 1,
}


def not_finite(folder: Path) -> None:
    tensors = edits(20)
    next(iter(tensors.values()))[3] = float("nan")
    save_file(tensors, folder / WEIGHTS_NAME)


def too_wide(folder: Path) -> None:
    save_file(edits(20, width=2 * WIDTH), folder / WEIGHTS_NAME)


def truncated(folder: Path) -> None:
    whole = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(whole[: len(whole) // 2])


def no_json(folder: Path) -> None:
    (folder / CONFIG_NAME).write_text("{'peft_type': REDPEFT")


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()


DAMAGES = [not_finite, too_wide, truncated, no_json, no_weights]


def memory(server: Server) -> dict[str, float]:
    """MB of each of the server's processes; what they share is counted in each."""
    found = {}
    for process in [first := psutil.Process(server.process.pid), *first.children(recursive=True)]:
        try:
            found[f"{process.name()} {process.pid}"] = process.memory_info().rss / 1e6
        except psutil.NoSuchProcess:
            continue
    return found


def growth(acted: list[int], levels: list[float]) -> float:
    """MB for each thousand actions, over the last two thirds of them."""
    late = next(number for number, so_far in enumerate(acted) if so_far > acted[-1] / 3)
    return 1000 * float(np.polyfit(acted[late:], levels[late:], 1)[0])


@pytest.fixture
def served(adapters, prompts, reference, tmp_path) -> Served:
    answers = {
        (edit, prompt): reference.answer(prompts[prompt], folder)
        for edit, folder in [(None, None), *enumerate(adapters)]
        for prompt in range(len(prompts))
    }
    assert sum(map(len, answers.values())) > 0.9 * TOKENS * len(answers)  # not cut short by near ties
    adapter(tmp_path / "outside", 21)
    return Served(tmp_path / "served", adapters, prompts, answers)


@pytest.fixture
def server(base, served, tmp_path):
    # oneDNN keeps a compiled primitive for each shape of a batch that it has met, a thousand of them: with vLLM's base
    # alone memory grows by hundreds of MB until then, beside which nothing else would be seen
    made = Server(base, served.root, tmp_path / "log", ONEDNN_PRIMITIVE_CACHE_CAPACITY="16")
    made.wait()
    yield made
    made.stop()


def test_soak(server, served):
    first = Client(CLIENTS, server, served, 0)
    for number in range(NAMES):
        first.check(f"steady-{number:04}", number % len(served.adapters))
    began = time.monotonic()
    clients = [Client(number, server, served, began + 60 * MINUTES) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    acted: list[int] = []
    levels: list[dict[str, float]] = []
    while any(client.is_alive() for client in clients):
        acted.append(sum(client.done.total() for client in clients))
        levels.append(memory(server))
        time.sleep(SAMPLED)
    done = sum((client.done for client in clients), Counter())
    print(f"\n{done.total():,} actions in {MINUTES:g} minutes: {dict(done.most_common())}")
    for name in levels[-1]:
        each = [level.get(name, 0) for level in levels]
        shown = ", ".join(f"{level:.0f}" for level in each[:: max(1, len(each) // 15)])
        print(f"{name}: {shown} MB; {growth(acted, each):+.2f} a thousand actions over the last two thirds")
    grown = growth(acted, [sum(level.values()) for level in levels])
    print(f"all processes: {grown:+.2f} MB a thousand actions over the last two thirds")
    wrong = [line for client in clients for line in client.wrong]
    assert not wrong, "\n".join(wrong)
    assert server.process.poll() is None
    assert set(done) == {action.__name__ for action in ACTIONS}
    for number in range(len(served.adapters)):  # and all is as it was
        first.check(f"steady-{number:04}", number)
    assert grown < MOST_GROWTH
