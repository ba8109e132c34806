from __future__ import annotations

import io
import json
import os
import re
import signal

import pytest
import torch

from helpers.language_models import write_lora, write_prompt, write_red, write_talker
from redpeft.adapters.arithmetic import compose
from redpeft.adapters.folder import read_adapter
from redpeft.errors import UserError
from redpeft.evaluation import answers
from redpeft.evaluation.answers import Answer, Sampling
from redpeft.evaluation.chat import COMMANDS, chat
from redpeft.evaluation.language_model import Decoding, open_language_model

GREEDY = {"temperature": 0, "max_new_tokens": 8}
AS_CHAT = Decoding(max_new_tokens=8, repetition_penalty=1, no_repeat_ngrams=0)


@pytest.fixture(scope="module")
def folders(tiny_decoder_folder, tmp_path_factory):
    """A base model, two RED adapters, a LoRA and a prompt of it, and compositions of the former."""
    folder = tmp_path_factory.mktemp("models")
    base = write_talker(folder / "talker", tiny_decoder_folder)
    settings = base / "tokenizer_config.json"  # the model reads 512 tokens
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 512}))
    write_red(folder / "formal", base, seed=1)
    write_red(folder / "brief", base, seed=2)
    write_lora(folder / "lora", base, seed=3)
    write_prompt(folder / "prompt", base, seed=4)
    formal, brief = f'"{folder / "formal"}"', f'"{folder / "brief"}"'
    compose(f"0.5 * {formal}", folder / "half")
    compose(f"0.7 * {formal} - 0.3 * {brief}", folder / "both")
    compose(f"0.5 * (0.7 * {formal} - 0.3 * {brief})", folder / "half-of-both")
    return folder


@pytest.fixture
def talk(monkeypatch, folders):
    """Pipe lines into a chat of the adapters `formal` and `brief`: its messages, and what was written."""

    def run(*lines, model="formal", adapters=("brief",), **options):
        typed = "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        options = {"sampling": GREEDY, "out": io.StringIO()} | options
        done = chat(str(folders / model), [folders / name for name in adapters], **options)
        return [each["content"] for each in done["messages"]], options["out"].getvalue()

    return run


def without_spaces(text):
    """Streamed words end with the spaces that an answer is stripped of."""
    return "".join(text.split())


def answer_of(folders, name, *said):
    """What a model folder, or an adapter folder, answers after these messages."""
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(said)]
    return open_language_model(str(folders / name)).answer([messages], AS_CHAT)[0]


def test_each_switch_answers_as_that_model_alone_and_sees_the_whole_chat(talk, folders):
    switches = {
        "formal": [],
        "half": ["/strength 0.5"],
        "both": ["/mix formal=0.7 brief=-0.3"],
        "half-of-both": ["/strength .5"],
        "talker": ["/base"],
        "brief": ["/adapter brief"],
        "lora": ["/adapter lora"],
        "prompt": ["/adapter prompt"],
        "talker ": ["/base"],
        "formal ": ["/adapter formal"],
    }
    lines = [line for commands in switches.values() for line in (*commands, "a")]
    said, written = talk(*lines, adapters=("brief", "lora", "prompt"))
    assert len(said) == 2 * len(switches)
    for at, name in enumerate(switches):
        assert said[2 * at + 1] == answer_of(folders, name.strip(), *said[: 2 * at + 1]), name
    assert len(set(said[1::2])) > 5
    assert without_spaces(written) == without_spaces("".join(said[1::2]))


def test_side_by_side_answers_the_same_question_and_keeps_the_current_answer(talk, folders):
    said, written = talk("/side-by-side", "a", "/side-by-side", "b", "/side-by-side brief base", "c")
    first, second, third = said[1::2]
    assert first == answer_of(folders, "formal", "a")
    base, brief = answer_of(folders, "talker", "a"), answer_of(folders, "brief", *said[:5])
    expected = ["base:", base, "formal:", first, second, "brief:", brief]
    expected += ["base:", answer_of(folders, "talker", *said[:5]), "formal:", third]
    assert without_spaces(written) == without_spaces("".join(expected))


def test_a_base_model_alone_and_a_system_message(talk, folders):
    said, _ = talk("Hi", model="talker", adapters=(), system="Be brief.")
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert said[2:] == open_language_model(str(folders / "talker")).answer([prompt], AS_CHAT)
    said, _ = talk("Hi", "/clear", "", " /Ho", model="talker", adapters=(), system="Be brief.")
    assert said[:2] == ["Be brief.", "/Ho"]


def test_drawn_answers_repeat_with_their_seed(talk):
    drawn = {"temperature": 1.0, "max_new_tokens": 16}
    first, _ = talk("Hi", sampling=drawn)
    assert talk("Hi", sampling=drawn)[0] == first
    assert talk("Hi", sampling={**drawn, "seed": 1})[0] != first
    again, written = talk("Hi", "/again", sampling=drawn)
    assert again[0] == "Hi"
    assert again[1] != first[1]
    assert without_spaces(written) == without_spaces(first[1] + again[1])
    assert len(again) == 2
    beside = talk("/side-by-side formal", "/strength 1.0000001", "Hi", sampling=drawn)[1]
    assert without_spaces(beside) == without_spaces(f"formal:{first[1]}1*formal:{first[1]}")


def test_what_answers_is_saved_as_an_adapter(talk, folders, tmp_path):
    mixed = ["/mix formal=0.7 brief=-0.3", "/strength 0.5", f"/save {tmp_path / 'mix'}", "/adapter brief"]
    said, _ = talk(*mixed, f"/save '{tmp_path / 'a b'}'", "/clear", "/mix formal=0.7 brief=-0.3", "/strength 0.5", "a")
    assert said[1] == answer_of(folders, "half-of-both", "a") == answer_of(tmp_path, "mix", "a")
    saved, original = read_adapter(tmp_path / "a b"), read_adapter(folders / "brief")
    assert all(torch.equal(saved.edits[site].bias, edit.bias) for site, edit in original.edits.items())
    with pytest.raises(UserError, match="mix exists already"):
        talk(f"/save {tmp_path / 'mix'}")
    with pytest.raises(UserError, match="this is a LORA adapter, not a RED adapter"):
        talk("/adapter lora", f"/save {tmp_path / 'lora'}", adapters=("lora",))
    with pytest.raises(UserError, match="the base model is no adapter: choose one first"):
        talk("/base", "/save x")


def test_settings_are_shown_and_changed(talk, capsys):
    said, _ = talk("Hi", "/clear", "/set max_new_tokens=3 temperature=0", "Hi", "/set", sampling={"temperature": 0})
    assert len(said) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[-3:-1] == [
        str(Sampling(temperature=0, max_new_tokens=3)),
        "cut at 3 tokens: /set max_new_tokens=... allows more",
    ]
    assert shown[-1] == shown[-3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adapter nosuch", "there is no adapter 'nosuch'. The adapters are: formal, brief, lora"),
        ("/mix formal=1 nosuch=2", "there is no adapter 'nosuch'. The adapters are: formal, brief, lora"),
        ("/side-by-side nosuch", "there is no adapter 'nosuch'. The adapters are: formal, brief, lora"),
        ("/mix formal=half", "a strength or weight is a finite number, such as 0.5, not 'half'"),
        ("/strength nan", "a strength or weight is a finite number, such as 0.5, not 'nan'"),
        ("/mix formal=1 formal=2", "give each adapter one weight, such as /mix formal=0.7 brief=0.3"),
        ("/mix formal", "give each adapter one weight, such as /mix formal=0.7 brief=0.3"),
        ("/mix lora=0.5 formal=0.5", "lora is a LORA adapter, which answers as it is: only RED adapters have a"),
        ("/strength", "write /strength 0.5"),
        ("/again", "nothing was asked yet"),
        ("/nosuch", "there is no command /nosuch; /help lists them, and a space before it makes it a question"),
        ('/adapter "formal', "cannot read '/adapter \"formal': No closing quotation"),
        ("/set nosuch=1", "there is no setting nosuch: there are temperature=0.0 top_p=0.9"),
        ("/set top_p=2", "top_p: Input should be less than or equal to 1, not '2'"),
        ("/set temperature", "temperature: Input should be a valid number"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_changes_nothing(talk, folders, monkeypatch, capsys, line, message):
    with pytest.raises(UserError) as error:
        talk(line, adapters=("brief", "lora"))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    said = typed_on_a_terminal(monkeypatch, folders, [line, "Hi"], adapters=("brief", "lora"))[0]
    assert f"\n{message}" in capsys.readouterr().err
    assert said[1] == answer_of(folders, "formal", "Hi")


def typed_on_a_terminal(monkeypatch, folders, lines, adapters=("brief",), out=None):
    """What is said, and the prompts of the lines; an exception among these comes instead of a line."""
    prompts, typed = [], iter(lines)

    def read(prompt):
        prompts.append(prompt)
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    done = chat(str(folders / "formal"), [folders / name for name in adapters], GREEDY, out=out or io.StringIO())
    return [each["content"] for each in done["messages"]], prompts


def test_on_a_terminal_the_prompt_says_who_answers_and_an_interrupt_does_not_end(monkeypatch, folders, capsys):
    lines = ["/base", "/mix formal=0.7 brief=-.3", KeyboardInterrupt(), "", "/help", "/quit", "Hi"]
    said, prompts = typed_on_a_terminal(monkeypatch, folders, lines)
    assert said == []
    assert prompts[:3] == ["formal> ", "base> ", "0.7 * formal + -0.3 * brief> "]
    assert len(prompts) == 6
    shown = capsys.readouterr().err
    assert "/quit or Ctrl-D ends the chat" in shown
    assert all(f"\n{usage} " in shown for usage in list(COMMANDS)[1:])


def test_an_interrupt_ends_an_answer_and_the_chat_goes_on(talk, folders, monkeypatch, capsys):
    whole, _ = talk("a")
    tokens = iter(range(100))
    check = answers.OnlyFinite.__call__

    def interrupted(self, *arguments):
        if next(tokens) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return check(self, *arguments)

    monkeypatch.setattr(answers.OnlyFinite, "__call__", interrupted)
    out = io.StringIO()
    said, _ = typed_on_a_terminal(monkeypatch, folders, ["a", "/again", "b"], out=out)
    written = out.getvalue()
    assert said[:3] == [*whole, "b"]
    shown = capsys.readouterr().err.splitlines()
    assert [line for line in shown if "/help" not in line][:2] == [
        "cut at 8 tokens: /set max_new_tokens=... allows more",
        "stopped",
    ]
    assert 0 < len(without_spaces(written)) - len(without_spaces("".join(said[1::2]))) <= 5


def test_an_interrupt_ends_a_chat_from_a_pipe(talk, monkeypatch):
    asked = []

    def stopped(adapted, rows, messages, sampling, write):
        asked.append(messages[-1]["content"])
        return [Answer("Hel", tokens=1, stopped=True)]

    monkeypatch.setattr("redpeft.evaluation.chat.answer_chat", stopped)
    with pytest.raises(KeyboardInterrupt):
        talk("a", "b")
    assert asked == ["a"]


def test_a_question_without_an_answer_is_not_kept(talk, monkeypatch, capsys):
    texts = iter(["Hello!", "", ""])
    monkeypatch.setattr("redpeft.evaluation.chat.answer_chat", lambda *_: [Answer(next(texts), tokens=1)])
    assert talk("a", "/again", "b")[0] == ["a", "Hello!"]
    assert capsys.readouterr().err.splitlines() == ["there is no answer, so the question is not kept"] * 2


def test_outputs_that_are_not_finite_and_chats_that_are_too_long_are_refused(talk, capsys):
    for sampling in ({"temperature": 0}, {"temperature": 1}):
        with pytest.raises(UserError, match=r"^the model's outputs are not finite with 1e\+38 \* formal: choose a sm"):
            talk("/strength 1e38", "Hi", sampling=sampling)
    with pytest.raises(UserError, match=r"^the chat has \d+ tokens, as many as .* 512: begin a new chat"):
        talk("Hi " * 200)
    assert talk("Hi " * 160, sampling={"temperature": 0, "max_new_tokens": 400})[0][1:]
    assert re.match(r"cut at \d+ tokens: the model reads no longer chat, /clear begins", capsys.readouterr().err)


def test_input_that_is_no_text_is_refused(talk, monkeypatch, folders):
    assert talk("\ufeff/adapter base")[0] == []  # a byte order mark, as the first of a file
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\xff\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="standard input is not UTF-8"):
        chat(str(folders / "talker"), out=io.StringIO())


def test_adapters_of_another_base_are_refused_before_the_first_question(talk, folders, tiny_decoder_folder, tmp_path):
    other = write_talker(tmp_path / "other", tiny_decoder_folder, seed=7)
    for write in (write_red, write_lora):
        write(tmp_path / write.__name__, other, seed=1)
    with pytest.raises(UserError, match=r"write_red: this adapter is for another base model .*weights differ"):
        talk(adapters=[tmp_path / "write_red"])
    config = json.loads((folders / "formal" / "adapter_config.json").read_text())
    nameless = write_red(tmp_path / "nameless", folders / "talker", seed=1)
    (nameless / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match=r"nameless does not name its base model: give the base as MODEL, and this"):
        talk(model=nameless)
    assert talk(model="talker", adapters=[nameless])[0] == []


def test_an_adapter_is_asked_as_it_was_trained(talk, folders, tiny_chat_tokenizer, tmp_path, capsys):
    """Beside a base with a chat template, an adapter whose task says `plain`."""
    base = open_language_model(str(folders / "talker"))
    base.model.save_pretrained(tmp_path / "base")
    tiny_chat_tokenizer.save_pretrained(tmp_path / "base")
    for name in ("plain", "template"):
        write_red(tmp_path / name, tmp_path / "base", seed=1)
    task = {"columns": {"prompt": "prompt", "response": "response"}, "metric": "loss"}
    plain = {**task, "task": "instruction", "template": "plain"}
    (tmp_path / "plain" / "task.json").write_text(json.dumps(plain))
    options = {"model": tmp_path / "plain", "adapters": [tmp_path / "template"]}
    as_plain, _ = talk("Hi", **options)
    as_template, _ = talk("/adapter template", "Hi", **options)
    assert as_template[1] == answer_of(tmp_path, "template", "Hi") != as_plain[1]
    assert talk("/mix plain=0.5 template=0.5", "Hi", **options)[0] == as_plain  # of the same edit, asked as the first
    assert "different chat templates: the mix is asked as plain\n" in capsys.readouterr().err
    prompt = base.tokenizer("Human: Hi\n\nAssistant:", return_tensors="pt").input_ids
    model = open_language_model(str(tmp_path / "plain")).model
    tokens = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    assert as_plain[1] == base.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    (tmp_path / "plain" / "task.json").write_text(json.dumps({**task, "task": "e2e"}))
    with pytest.raises(UserError, match="was trained for e2e; answers need a run of the task instruction"):
        talk(model=tmp_path / "template", adapters=[tmp_path / "plain"])
