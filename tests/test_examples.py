"""The example scripts run: the training scripts on tiny models, the client against a small server."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.data import write_rows
from redpeft.training.baselines import DEFAULT_RATES

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINING = ["trainer", "sft", "dpo"]


@pytest.fixture
def run_example(tmp_path, monkeypatch):
    """Run a script in an empty folder, as `python examples/NAME.py ARGUMENTS` does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(name, *arguments):
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    return run


@pytest.fixture
def tiny_chat_model(tmp_path, tiny_decoder_folder, tiny_chat_tokenizer):
    """A tiny Llama whose tokenizer has a chat template and a padding token."""
    folder = tmp_path / "llama"
    shutil.copytree(tiny_decoder_folder, folder)
    tiny_chat_tokenizer.save_pretrained(folder)
    return folder


def twice(folder: Path, row: dict) -> Path:
    """A data set of one row, twice."""
    write_rows(folder / "train.jsonl", [row, row])
    return folder


def trained_edit(folder: str) -> dict[str, torch.Tensor]:
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if "redpeft" in name}


def assert_moved(folder: str) -> None:
    """All edits of a saved adapter are away from the identity, where both of their tensors are zero."""
    moved = {name: bool(tensor.any()) for name, tensor in trained_edit(folder).items() if not name.endswith("unit")}
    assert len(moved) == 4, "two layers, scale and bias"
    assert all(moved.values()), moved


def test_every_example_is_listed_and_says_how_to_run_it():
    listed = set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in EXAMPLES.glob("*.py")}
    for name in listed:
        assert f"python examples/{name} " in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("name", TRAINING)
def test_the_examples_show_the_default_learning_rate(name):
    [rate] = re.findall(r"learning_rate=([\d.e-]+)", (EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    assert float(rate) == DEFAULT_RATES["red"]


def test_trainer(run_example, tiny_encoder_folder, capsys):
    run_example("trainer", tiny_encoder_folder, "out")
    assert "eval_accuracy" in capsys.readouterr().out
    assert_moved("out")


def test_sft(run_example, tiny_chat_model, tmp_path):
    roles = [{"role": "user", "content": "Is it open?"}, {"role": "assistant", "content": "Yes, from ten."}]
    run_example("sft", tiny_chat_model, twice(tmp_path / "chats", {"messages": roles}), "out")
    assert_moved("out")


def test_dpo(run_example, tiny_chat_model, tmp_path):
    row = {"prompt": "Is it open?", "chosen": " Yes, from ten.", "rejected": " Who knows."}
    run_example("dpo", tiny_chat_model, twice(tmp_path / "pairs", row), "out")
    assert_moved("out")


class FakeServer(BaseHTTPRequestHandler):
    """Two models; each answers with its name and what it was asked."""

    def do_GET(self):
        assert self.path == "/v1/models"
        self.reply({"data": [{"id": "models/base"}, {"id": "support"}]})

    def do_POST(self):
        assert self.path == "/v1/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply({"choices": [{"text": f" {body['model']} heard {body['prompt']}"}]})

    def reply(self, data):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())

    def log_message(self, *_):
        pass


def test_serving_client(run_example, capsys):
    server = HTTPServer(("127.0.0.1", 0), FakeServer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        run_example("serving_client", f"http://127.0.0.1:{server.server_port}/", "hello")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert capsys.readouterr().out == "models/base: models/base heard hello\nsupport: support heard hello\n"
