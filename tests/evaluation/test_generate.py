from __future__ import annotations

import errno
import json
import shutil

import pytest

from helpers.data import write_rows
from helpers.language_models import write_red, write_talker
from redpeft import cli, console
from redpeft.errors import RunError, UserError
from redpeft.evaluation.generate import Journal, generate
from redpeft.evaluation.language_model import Decoding, LanguageModel, open_language_model
from redpeft.evaluation.question_files import FORMATS
from redpeft.storage import locked

SHORT = Decoding(max_new_tokens=12)
ALPACA = [
    {"instruction": f"Say {word}", "output": "by another", "generator": "other", "dataset": source}
    for word, source in (
        ("yes", "koala"),
        ("no, and why not", "vicuna"),
        ("ünïcode", "oasst"),
        ("4", "oasst"),
        ("5", "x"),
    )
]
MT = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line", "Now in capitals"], "reference": ["a", "b"]},
    {"question_id": 7, "category": "math", "turns": ["1+1", "times 3?"]},
    {"question_id": 130, "category": "coding", "turns": ["Only one turn"]},
]


@pytest.fixture(scope="module")
def talker(tiny_decoder_folder, tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("talker") / "base", tiny_decoder_folder)


@pytest.fixture
def alpaca(tmp_path):
    path = tmp_path / "alpaca_eval.json"
    path.write_text(json.dumps(ALPACA), encoding="utf-8")
    return path


@pytest.fixture
def mt(tmp_path):
    return write_rows(tmp_path / "question.jsonl", MT)


def alone(talker, *turns):
    """What the model answers to these turns, one model call after the other."""
    model, chat, answers = open_language_model(str(talker)), [], []
    for turn in turns:
        chat.append({"role": "user", "content": turn})
        answers += model.answer([chat], SHORT)
        chat.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_alpaca_eval_answers_are_in_its_format(talker, alpaca, tmp_path, monkeypatch, capsys):
    out = tmp_path / "answers" / "base.json"
    monkeypatch.setattr(console, "SECONDS", 0.0)
    done = generate("alpaca-eval", str(talker), alpaca, out, decoding=SHORT, batch_size=2)
    assert "question 2 of 5, " in capsys.readouterr().err
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert [list(row) for row in rows] == [["instruction", "output", "generator", "dataset"]] * 5
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in ALPACA]
    assert [row["dataset"] for row in rows] == ["koala", "vicuna", "oasst", "oasst", "x"]
    assert {row["generator"] for row in rows} == {"base"}
    assert [row["output"] for row in rows] == [alone(talker, row["instruction"])[0] for row in ALPACA]
    assert done == {"benchmark": "alpaca-eval", "model": "base", "questions": 5, "generated": 5, "out": str(out)}


def test_mt_bench_answers_are_in_fastchats_format(talker, mt, tmp_path):
    out = tmp_path / "model_answer" / "red.jsonl"
    generate("mt-bench", str(talker), mt, out, name="red", decoding=SHORT, batch_size=3)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [list(row) for row in rows] == [["question_id", "answer_id", "model_id", "choices", "tstamp"]] * 3
    assert [row["question_id"] for row in rows] == [81, 7, 130]
    assert {row["model_id"] for row in rows} == {"red"}
    assert len({row["answer_id"] for row in rows}) == 3
    assert all(isinstance(row["tstamp"], float) for row in rows)
    for row, question in zip(rows, MT, strict=True):
        assert row["choices"] == [{"index": 0, "turns": alone(talker, *question["turns"])}]
    assert not list(out.parent.glob("*.jsonl.*jsonl"))  # FastChat takes every *.jsonl there for a model's answers


def test_the_second_turn_sees_the_first_answer(talker, mt, tmp_path, monkeypatch):
    asked = []

    def answer(_, chats, __):
        asked.append(json.dumps(chats))
        return ["", "b", "c"][: len(chats)]

    monkeypatch.setattr(LanguageModel, "answer", answer)
    generate("mt-bench", str(talker), mt, tmp_path / "out.jsonl", decoding=SHORT)
    first = [[{"role": "user", "content": row["turns"][0]}] for row in MT]
    second = [
        [*first[0], {"role": "assistant", "content": ""}, {"role": "user", "content": "Now in capitals"}],
        [*first[1], {"role": "assistant", "content": "b"}, {"role": "user", "content": "times 3?"}],
    ]
    assert [json.loads(chats) for chats in asked] == [first, second]


def test_an_empty_first_answer_does_not_stop_the_second_turn(talker, mt, tmp_path):
    model = open_language_model(str(talker))
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "b"}]
    assert len(model.answer([chat], SHORT)) == 1


def test_every_question_is_checked_before_the_first_is_answered(talker, alpaca, mt, tmp_path, monkeypatch):
    shutil.copytree(talker, tmp_path / "base")
    template = (
        "{% for m in messages %}{% if 'times' in m['content'] %}{{ raise_exception('no sums') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    (tmp_path / "base" / "chat_template.jinja").write_text(template)
    out = tmp_path / "out.json"
    long = [*ALPACA, {"instruction": "x" * 600, "dataset": "x"}]
    alpaca.write_text(json.dumps(long), encoding="utf-8")
    with pytest.raises(UserError, match=r"question 6: a prompt of 600 tokens .*: shorten it$"):
        generate("alpaca-eval", str(tmp_path / "base"), alpaca, out, decoding=SHORT)
    monkeypatch.setattr(LanguageModel, "answer", lambda _, chats, __: [""] * len(chats))
    with pytest.raises(UserError, match=r"question.jsonl, question 2: the tokenizer's chat template .*\(no sums\)"):
        generate("mt-bench", str(tmp_path / "base"), mt, out, decoding=SHORT)  # in its second turn


class Killed(BaseException):
    pass


@pytest.mark.parametrize("benchmark", ["alpaca-eval", "mt-bench"])
def test_a_killed_call_continues_and_writes_the_same_file(benchmark, talker, alpaca, mt, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1700000000.5)
    questions = alpaca if benchmark == "alpaca-eval" else mt
    generate(benchmark, str(talker), questions, tmp_path / "whole", name="m", decoding=SHORT, batch_size=2)
    calls, real = [], LanguageModel.answer

    def until_the_second_batch(self, chats, decoding):
        calls.append(len(chats))
        if sum(calls) > 3 + (benchmark == "mt-bench"):
            raise Killed
        return real(self, chats, decoding)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "answer", until_the_second_batch)
        with pytest.raises(Killed):
            generate(benchmark, str(talker), questions, out, name="m", decoding=SHORT, batch_size=2)
    assert not out.exists()
    journal = tmp_path / "out.journal"
    journal.write_bytes(journal.read_bytes() + b'{"question": 2, "ans')  # killed while it wrote
    done = generate(benchmark, str(talker), questions, out, name="m", decoding=SHORT, batch_size=1)
    assert done["generated"] == done["questions"] - 2
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_finished_call_does_not_load_the_model_again(talker, alpaca, tmp_path, monkeypatch):
    generate("alpaca-eval", str(talker), alpaca, tmp_path / "out.json", decoding=SHORT)
    before = (tmp_path / "out.json").read_bytes()
    monkeypatch.setattr("redpeft.evaluation.generate.open_language_model", lambda *_: pytest.fail("loaded the model"))
    done = generate("alpaca-eval", str(talker), alpaca, tmp_path / "out.json", decoding=SHORT)
    assert (done["questions"], done["generated"]) == (5, 0)
    assert (tmp_path / "out.json").read_bytes() == before


def test_other_settings_are_refused_for_the_same_output(talker, alpaca, tmp_path):
    red, out = write_red(tmp_path / "red", talker, seed=1), tmp_path / "out.json"
    generate("alpaca-eval", str(talker), alpaca, out, adapter=red, decoding=SHORT)
    assert json.loads(out.read_text())[0]["generator"] == "red"
    for changes, differing in (
        ({"decoding": Decoding(max_new_tokens=5)}, "max_new_tokens"),
        ({"adapter": None}, "adapter, adapter_weights"),
    ):
        with pytest.raises(
            UserError, match=rf"out.json.journal belongs to a call with other settings \({differing}\)"
        ):
            generate("alpaca-eval", str(talker), alpaca, out, **{"adapter": red, "decoding": SHORT, **changes})
    write_red(tmp_path / "red", talker, seed=2)
    with pytest.raises(UserError, match=r"other settings \(adapter_weights\)"):
        generate("alpaca-eval", str(talker), alpaca, out, adapter=red, decoding=SHORT)
    alpaca.write_text(json.dumps(ALPACA[:2]))
    with pytest.raises(UserError, match=r"other settings \(questions, adapter_weights\)"):
        generate("alpaca-eval", str(talker), alpaca, out, adapter=red, decoding=SHORT)


@pytest.mark.parametrize(
    ("benchmark", "text", "message"),
    [
        ("alpaca-eval", None, r"no such file: .*questions.jsonl"),
        ("alpaca-eval", "", r"questions.jsonl is empty: it holds no rows"),
        ("alpaca-eval", '{"instruction": "a"}\n{"instr', r"questions.jsonl, line 2: broken JSON"),
        ("alpaca-eval", '{"prompt": "a"}', r"questions.jsonl has no column 'instruction'; its columns are prompt"),
        (
            "alpaca-eval",
            '{"instruction": "a"}\n{"instruction": " "}',
            r"row 2: the text in column 'instruction' is em",
        ),
        ("mt-bench", '{"question_id": 1, "instruction": "a"}', r"has no column 'turns'"),
        ("mt-bench", '{"question_id": 1, "turns": []}', r"row 1: turns is \[\], not a list of texts"),
        ("mt-bench", '{"question_id": 1, "turns": "a"}', r"row 1: turns is a, not a list of texts"),
        ("mt-bench", '{"question_id": 1, "turns": ["a", ""]}', r"row 1: turns is \['a', ''\], not a list of texts"),
        (
            "mt-bench",
            '{"question_id": 1, "turns": ["a"]}\n\n{"question_id": 1, "turns": ["b"]}',
            r"row 1: question_id is 1: every row needs an id of its own",
        ),
        (
            "mt-bench",
            '{"question_id": null, "turns": ["a"]}',
            r"question_id is None: every row needs an id of its own",
        ),
    ],
)
def test_bad_questions_are_errors_that_name_the_row(benchmark, text, message, tmp_path, monkeypatch):
    monkeypatch.setattr("redpeft.evaluation.generate.open_language_model", lambda *_: pytest.fail("loaded the model"))
    path = tmp_path / "questions.jsonl"
    if text is not None:
        path.write_text(text)
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        generate(benchmark, "base", path, tmp_path / "out.json")
    assert set(tmp_path.iterdir()) == before


def test_an_existing_file_is_not_overwritten(talker, alpaca, tmp_path):
    out = tmp_path / "out.json"
    out.write_text("mine")
    with pytest.raises(UserError, match=r"out.json exists already and has no journal to continue: choose another"):
        generate("alpaca-eval", str(talker), alpaca, out)
    assert out.read_text() == "mine"


def test_one_process_at_a_time(talker, alpaca, tmp_path):
    out = tmp_path / "answers" / "out.json"
    with locked(out.parent, ".out.json.lock"):
        with pytest.raises(UserError, match="another process is at work in"):
            generate("alpaca-eval", str(talker), alpaca, out, decoding=SHORT)
        generate("alpaca-eval", str(talker), alpaca, out.with_name("other.json"), decoding=SHORT)
    assert {path.name for path in out.parent.iterdir()} == {"other.json", "other.json.journal"}


def test_an_output_folder_that_cannot_be_written(talker, alpaca, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write into .*file: "):
        generate("alpaca-eval", str(talker), alpaca, tmp_path / "file" / "out.json", decoding=SHORT)


JOURNAL_SETTINGS = {"model": "a", "tokens": 5}
ENTRIES = [{"question": 0, "answers": ["ä\n"]}, {"question": 1, "answers": []}]


def test_the_journal_keeps_entries_for_the_next_call(tmp_path):
    path = tmp_path / "out.journal"
    journal = Journal(path, JOURNAL_SETTINGS)
    assert journal.entries == []
    assert not path.exists()
    journal.append(ENTRIES[:1])
    journal.append(ENTRIES[1:])
    assert journal.entries == ENTRIES == Journal(path, JOURNAL_SETTINGS).entries
    assert len(path.read_bytes().splitlines()) == 3


def test_the_journal_drops_an_incomplete_line(tmp_path):
    path = tmp_path / "out.journal"
    Journal(path, JOURNAL_SETTINGS).append(ENTRIES)
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        journal = Journal(path, JOURNAL_SETTINGS)
        kept = max(0, sum(end <= cut for end in ends) - 1)
        assert journal.entries == ENTRIES[:kept]
        journal.append(ENTRIES[kept:])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("text", ["hello\n", "[1]\n", '{"question": 1}\n', '{"settings": {}}\n{"a"\n{}\n', "3\n"])
def test_the_journal_refuses_another_file(tmp_path, text):
    path = tmp_path / "out.journal"
    path.write_text(text)
    with pytest.raises(UserError, match=r"out.journal is damaged, or is no journal of unfinished work: remove it"):
        Journal(path, JOURNAL_SETTINGS)
    assert path.read_text() == text


def test_the_journal_continues_after_a_full_disk(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "out.journal", JOURNAL_SETTINGS)
    journal.append(ENTRIES[:1])

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(RunError, match=r"the disk of .* is full"):
            journal.append(ENTRIES[1:])
    assert journal.entries == ENTRIES[:1]
    journal.append(ENTRIES[1:])  # over what was cut short
    lines = (tmp_path / "out.journal").read_text().splitlines()
    assert [json.loads(line) for line in lines[1:]] == ENTRIES


def test_a_missing_model_writes_nothing(alpaca, tmp_path):
    with pytest.raises(UserError, match="no such model folder"):
        generate("alpaca-eval", str(tmp_path / "nowhere"), alpaca, tmp_path / "new" / "out.json")
    assert not (tmp_path / "new").exists()


def test_the_command_answers_with_its_options(talker, mt, tmp_path, capsys):
    red, out = write_red(tmp_path / "red", talker, seed=1), tmp_path / "out.jsonl"
    call = ["generate", "mt-bench", str(talker), "--adapter", str(red), "--questions", str(mt), "--out", str(out)]
    call += ["--max-new-tokens", "6", "--batch-size", "2", "--repetition-penalty", "1.3", "--no-repeat-ngrams", "3"]
    with pytest.raises(SystemExit) as exit_:
        cli.main([*call, "--json"])
    assert exit_.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"benchmark": "mt-bench", "model": "red", "questions": 3, "generated": 3, "out": str(out)}
    model = open_language_model(str(talker), red)
    decoding = Decoding(max_new_tokens=6, repetition_penalty=1.3, no_repeat_ngrams=3)
    [answer] = model.answer([[{"role": "user", "content": "Only one turn"}]], decoding)
    assert json.loads(out.read_text().splitlines()[2])["choices"][0]["turns"] == [answer]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["generate", "alpaca", "model", "--questions", "q", "--out", "o"], "'alpaca' is not one of"),
        (["generate", "mt-bench", "model", "--out", "o"], "Missing option '--questions'"),
        (["generate", "mt-bench", "m", "--questions", "q", "--out", "o", "--batch-size", "0"], "'--batch-size'"),
    ],
)
def test_wrong_calls_are_one_line(call, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(call)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_the_published_question_files_are_read(shared_data, talker, tmp_path):
    """As AlpacaEval and FastChat publish them, but for FastChat's name of the turns."""
    rows = FORMATS["alpaca-eval"].read(shared_data / "alpaca_eval" / "validation.jsonl")
    assert len(rows) == 105
    assert json.loads(FORMATS["alpaca-eval"].write(rows[:1], [{"answers": ["a"]}], "m")) == [
        {"instruction": rows[0]["instruction"], "output": "a", "generator": "m", "dataset": None}
    ]
    rows = [json.loads(line) for line in (shared_data / "mt_bench" / "test.jsonl").read_text().splitlines()]
    for row in rows:
        row["turns"] = [row.pop("instruction"), row.pop("follow_up")]
    questions = FORMATS["mt-bench"].read(write_rows(tmp_path / "question.jsonl", rows))
    assert [question["question_id"] for question in questions] == list(range(81, 161))
    assert all(len(FORMATS["mt-bench"].turns(question)) == 2 for question in questions)
    short = write_rows(tmp_path / "short.jsonl", [row for row in rows if sum(map(len, row["turns"])) < 120][:3])
    done = generate("mt-bench", str(talker), short, tmp_path / "out.jsonl", decoding=SHORT)
    assert done["questions"] == 3
