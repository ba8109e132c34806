"""What the studio answers, mixes, saves and shows, without its page."""

from __future__ import annotations

import itertools
import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.language_models import write_lora, write_red, write_talker
from redpeft.adapters.arithmetic import compose
from redpeft.adapters.folder import read_adapter
from redpeft.errors import UserError
from redpeft.evaluation.answers import Sampling
from redpeft.studio.session import Session
from redpeft.training.predict import load_run, predict
from redpeft.training.recipe import Recipe
from redpeft.training.train import train

GREEDY = Sampling(temperature=0, max_new_tokens=48)


@pytest.fixture(scope="module")
def folder(tiny_decoder_folder, tmp_path_factory):
    """Two RED adapters of a base model, a LoRA, and a damaged one."""
    base = write_talker(tmp_path_factory.mktemp("base") / "talker", tiny_decoder_folder)
    folder = tmp_path_factory.mktemp("runs")
    write_red(folder / "formal", base, seed=1)
    write_red(folder / "styles" / "brief", base, seed=2)
    write_lora(folder / "lora", base, seed=3)
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text('{"peft_type": "REDPEFT"}')
    return folder


@pytest.fixture(scope="module")
def session(folder):
    return Session(folder)


def last(session, rows, prompt="a", sampling=GREEDY):
    *parts, answers = session.answer(prompt, rows, sampling)
    texts = [*parts, [each.text for each in answers]]
    for earlier, later in itertools.pairwise(texts):
        assert all("".join(b.split()).startswith("".join(a.split())) for a, b in zip(earlier, later, strict=True))
    return answers


def test_the_folder_is_listed_with_what_is_damaged(session, folder):
    assert {name: entry.listed.status for name, entry in session.entries.items()} == {
        "broken": "damaged",
        "formal": "ok",
        "lora": "not checked",
        "styles/brief": "ok",
    }
    assert [name for name, entry in session.entries.items() if entry.answers] == ["formal", "lora", "styles/brief"]
    assert not any(entry.labels for entry in session.entries.values())
    assert "no adapter_model.safetensors" in session.entries["broken"].listed.reason
    assert session.base.endswith("talker")


@pytest.mark.parametrize("temperature", [0, 1.5], ids=["greedy", "drawn"])
def test_two_requests_at_once_get_the_answers_of_single_runs(session, temperature):
    sampling = GREEDY.changed({"temperature": temperature})
    together = [{}, {"formal": 1.0}, {"styles/brief": 1.0}, {"formal": 0.5, "styles/brief": 0.5}]
    alone = [last(session, [row], sampling=sampling)[0] for row in together]
    found = {}

    def ask(key, rows):
        found[key] = last(session, rows, sampling=sampling)

    requests = {"all": together, "mixes": [{"formal": -0.5}, together[3]], "reversed": together[::-1]}
    threads = [threading.Thread(target=ask, args=request) for request in requests.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found["all"] == alone == found["reversed"][::-1]
    assert found["mixes"][1] == alone[3] != found["mixes"][0]
    assert len({each.text for each in alone}) == 4


def test_who_stops_reading_ends_the_answer(session):
    reading = session.answer("a", [{}], Sampling(max_new_tokens=400))
    next(reading)
    reading.close()
    assert last(session, [{"formal": 1.0}]), "the model is free for the next"


def test_a_mix_is_the_composition_and_is_saved_as_it(session, folder, tmp_path):
    weights = {"formal": 0.7, "styles/brief": -0.3}
    compose(f'0.7 * "{folder / "formal"}" + -0.3 * "{folder / "styles" / "brief"}"', tmp_path / "both")
    assert last(session, [{}, weights])[1] == last(Session(tmp_path), [{"both": 1.0}])[0]
    out = session.save(weights, "both")
    try:
        saved, composed = read_adapter(out), read_adapter(tmp_path / "both")
        assert all(torch.equal(saved.edits[s].scale, edit.scale) for s, edit in composed.edits.items())
        assert last(session, [{}, {"both": 1.0}])[1] == last(session, [weights])[0]
        with pytest.raises(UserError, match=r"^both exists already in .*: choose another name"):
            session.save(weights, "both")
    finally:
        shutil.rmtree(out)
        session.look()


@pytest.mark.parametrize(
    "name", ["", "../out", "/tmp/out", "a/b", ".", "..", ".hidden", "a b", "a\n", "adapter", "a.partial"]
)
def test_a_mix_is_saved_in_the_folder_alone(session, name):
    with pytest.raises(UserError, match=r"^a new name has letters, digits, dots, dashes and underscores, not "):
        session.save({"formal": 0.5}, name)


def test_nothing_is_saved_into_an_adapter(folder):
    alone = Session(folder / "formal")
    assert last(alone, [{"formal": 1.0}])[0].text
    with pytest.raises(UserError, match="formal is an adapter itself: to save others, start the studio with a folder"):
        alone.save({"formal": 0.5}, "half")


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path):
    inside = shutil.copytree(folder, tmp_path / "inside")
    (inside / "link").symlink_to(folder / "formal")
    (inside / "out").symlink_to(tmp_path / "nowhere")
    weights = inside / "formal" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(folder / "formal" / "adapter_model.safetensors")
    session = Session(inside)
    assert "link" not in session.entries
    assert session.entries["formal"].listed.status == "damaged"
    for use in (lambda: last(session, [{"formal": 1.0}]), lambda: session.channels("formal")):
        with pytest.raises(UserError, match=r"adapter_model.safetensors leads out of .*: put the file there"):
            use()
    with pytest.raises(UserError, match="out exists already"):
        session.save({"styles/brief": 0.5}, "out")
    assert not (tmp_path / "nowhere").exists()


def test_an_adapter_that_is_written_anew_answers_anew(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    session = Session(copy)
    formal, brief = last(session, [{"formal": 1.0}, {"styles/brief": 1.0}])
    shutil.rmtree(copy / "formal")
    shutil.move(copy / "styles" / "brief", copy / "formal")
    (copy / "formal" / "adapter_model.safetensors").touch()
    session.look()
    assert last(session, [{"formal": 1.0}]) == [brief] != [formal]


@pytest.mark.parametrize(
    ("prompt", "rows", "message"),
    [
        (" ", [{}], "write a prompt first"),
        ("a", [], "choose who answers: the base model, an adapter, or both"),
        ("a", [{str(n): 1.0} for n in range(5)], "choose at most 4 adapters"),
        ("a", [{"nosuch": 1.0}], "there is no adapter 'nosuch' in "),
        ("a", [{"../formal": 1.0}], "there is no adapter '../formal' in "),
        ("a", [{"broken": 1.0}], ".*broken/adapter_model.safetensors|.*broken: no adapter_model.safetensors there"),
        ("a", [{"formal": 1.0}, {"lora": 1.0}], "adapters that answer together are all of one type"),
        ("a", [{"formal": 1e38}], "the model's outputs are not finite with 1e\\+38 \\* formal: choose a smaller"),
        ("a" * 600, [{}], "the chat has \\d+ tokens, as many as .* 256: begin a new chat"),
    ],
)
def test_what_cannot_be_answered_is_a_sentence_and_the_next_answer_comes(session, prompt, rows, message):
    with pytest.raises(UserError, match=f"^{message}"):
        last(session, rows, prompt)
    assert last(session, [{"formal": 1.0}])[0].text


def test_an_adapter_of_another_base_is_refused(folder, tiny_decoder_folder, tmp_path):
    other = write_talker(tmp_path / "other", tiny_decoder_folder, seed=7)
    with pytest.raises(UserError, match="this adapter is for another base model .*weights differ"):
        last(Session(folder, str(other)), [{"formal": 1.0}])
    write_red(tmp_path / "runs" / "its-own", other, seed=1)
    shutil.copytree(folder / "formal", tmp_path / "runs" / "formal")
    with pytest.raises(UserError, match=r"name several base models, .*talker, .*other: choose one with --base"):
        Session(tmp_path / "runs")
    with pytest.raises(UserError, match="no such model folder: nowhere/at/all|nowhere"):
        Session(folder, "nowhere/at/all")
    with pytest.raises(UserError, match="no such folder"):
        Session(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no adapters there"):
        Session(other)


def test_pictures_show_channels_and_differences(session):
    figure, outliers = session.channels("formal")
    assert [axes.get_title() for axes in figure.axes[:2]] == ["scale - 1", "bias, in units"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "1"]
    assert {each.vector for each in outliers} == {"scale", "bias"}
    _, none = session.channels("formal", "formal")
    assert none == outliers
    _, less = session.channels("formal", "styles/brief")
    edits = [read_adapter(session.entries[name].adapter).edits for name in ("formal", "styles/brief")]
    first = less[0]
    one, other = (edit[first.site].scale[first.channel].item() for edit in edits)
    assert first.value == pytest.approx(one - other)
    with pytest.raises(UserError, match="lora: this is a LORA adapter|this is a LORA"):
        session.channels("lora")
    with pytest.raises(UserError, match="formal has no curves: it is an adapter without its run"):
        session.curves("formal")


@pytest.fixture(scope="module")
def classifiers(still_encoder, tmp_path_factory):
    """Runs of RED, of LoRA, and of RED on pairs."""
    folder = tmp_path_factory.mktemp("classifiers")
    rows = [{"a": text, "b": "the shop", "label": label} for text, label in (("good film", "yes"), ("bad", "no"))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    for name, method, columns in (("red", "red", {}), ("lora", "lora", {}), ("pairs", "red", {"text_pair": "b"})):
        data = {"path": str(folder / "rows.jsonl"), "text": "a", "label": "label", **columns}
        fields = {"base": str(still_encoder), "method": method, "max_length": 16, "max_steps": 4, "learning_rate": 0.1}
        train(Recipe(task="classification", data=data, **fields), folder / name)
    weights = folder / "red" / "adapter" / "adapter_model.safetensors"
    save_file({key: tensor + 0.3 for key, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    return folder


def test_a_text_is_labelled_with_the_edit_and_without(classifiers):
    session = Session(classifiers)
    assert session.base is None
    assert all(entry.labels and not entry.answers for entry in session.entries.values())
    run = load_run(classifiers / "red")
    [expected] = predict(run, ["a good film"])
    found = session.label("red", "a good film")
    assert found["probabilities"] == expected["probabilities"]
    off = session.label("red", "a good film", edited=False)
    run.model.base_model.set_scale("default", 0.0)
    [expected] = predict(run, ["a good film"])
    assert off["probabilities"] == expected["probabilities"] != found["probabilities"]
    assert session.label("red", "a good film") == found, "the edit is on again"
    assert session.label("lora", "bad").keys() == session.label("pairs", "bad", "the shop").keys() == found.keys()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("red", ""), "red labels 1 text at a time, not 0"),
        (("red", "good", "bad"), "red labels 1 text at a time, not 2"),
        (("pairs", "good"), "pairs labels 2 texts at a time, not 1"),
        (("red", "good " * 40), "the text has 42 tokens, more than max_length 16: shorten it"),
        (("lora", "good", "", False), "lora is no RED adapter: only an edit can be switched off beside its head"),
        (("nosuch", "good"), "there is no adapter 'nosuch'"),
    ],
)
def test_what_cannot_be_labelled_is_a_sentence(classifiers, call, message):
    with pytest.raises(UserError, match=f"^{message}"):
        Session(classifiers).label(*call)


def test_a_chat_needs_a_base_and_a_run_has_curves(classifiers):
    session = Session(classifiers)
    with pytest.raises(UserError, match="names its base model: start the studio with --base"):
        last(session, [{}])
    assert [figure.axes[0].get_ylabel() for figure in session.curves("red")] == ["loss", "accuracy"]
    (classifiers / "lora" / "result.json").unlink()  # as while it trains
    session.look()
    assert session.entries["lora"].listed.status == "unfinished"
    assert [figure.axes[0].get_ylabel() for figure in session.curves("lora")] == ["loss"]
