"""A real server on a loopback port, called by OpenAI's client."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from .tiny_adapters import TOKENS

STARTED = 300  # seconds


class Server:
    """`redpeft serve` with three slots; or another `command`, whose options are vLLM's. `environment` is added."""

    def __init__(
        self, base: Path, folder: Path, log: Path, command: list[str] | None = None, **environment: str
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.base, self.folder, self.log = base, folder, log
        redpeft = str(Path(sys.executable).with_name("redpeft"))
        command = command or [redpeft, "serve", str(base), "--adapters", str(folder), "--max-adapters", "3", "--"]
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--max-model-len", "128"]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, *options, "--enforce-eager", "--served-model-name", "base", "--max-num-seqs", "16"],
                env={**os.environ, **environment},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def wait(self) -> Server:
        end = time.monotonic() + STARTED
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                self.get("health")
                return self
            except OSError:
                time.sleep(1)
        raise TimeoutError(self.log.read_text()[-3000:])

    def get(self, path: str) -> str:
        return urllib.request.urlopen(self.url(path), timeout=60).read().decode()

    def post(self, path: str, **body: object) -> str:
        """Raises `urllib.error.HTTPError`, whose `read` is the answer."""
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url(path), data, headers)
        return urllib.request.urlopen(request, timeout=60).read().decode()

    @property
    def client(self):
        from openai import OpenAI

        return OpenAI(base_url=self.url("v1"), api_key="none", max_retries=0, timeout=120)

    def ask(self, name: str, prompt: list[int], tokens: int = TOKENS) -> list[int]:
        extra = {"ignore_eos": True, "return_token_ids": True}
        found = self.client.completions.create(
            model=name, prompt=prompt, max_tokens=tokens, temperature=0, extra_body=extra
        )
        return found.choices[0].token_ids

    def models(self) -> list[str]:
        return [model.id for model in self.client.models.list()]

    def metrics(self) -> dict[tuple[str, str], float]:
        """The counters, by name and adapter; those without an adapter have "" there."""
        from prometheus_client.parser import text_string_to_metric_families

        return {
            (sample.name, sample.labels.get("adapter_name", "")): sample.value
            for family in text_string_to_metric_families(self.get("metrics"))
            if family.type == "counter"
            for sample in family.samples
        }

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


def put(source: Path, folder: Path) -> None:
    """Put an adapter's files into a folder, each at once, as those who replace adapters do."""
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        shutil.copy(file, folder / "new")
        os.replace(folder / "new", folder / file.name)
