from __future__ import annotations

import json
import re
import sys

import pytest

from helpers.data import write_rows
from redpeft.errors import RunError, UserError
from redpeft.tasks.base import DataConfig, task_from_dict
from redpeft.tasks.columns import CUT
from redpeft.tasks.data import read_data
from redpeft.tasks.reward import GIVEN, load_reward

ASKED = [{"role": "user", "content": "Hi"}]
FUNCTIONS = """
CALLS = []

def noted(prompts, completions, **columns):
    CALLS.append({"prompts": prompts, "completions": completions, **columns})
    return [None, 1]

def fails(completions, **columns):
    return [row["colour"] for row in columns["given"]]

def too_few(completions, **columns):
    return [1.0]

def words(completions, **columns):
    return ["good"] * len(completions)

def infinite(completions, **columns):
    return [float("inf")] * len(completions)

def narrow(completions):
    return [1.0] * len(completions)

def nothing(completions, **columns):
    pass

NUMBER = 3
"""


def read(folder, row, reward="exact_match", **options):
    path = write_rows(folder / "rows.jsonl", [row] * 4)
    fields = {name: options.pop(name) for name in list(options) if name in DataConfig.model_fields}
    return read_data("reward", DataConfig(path=str(path), **fields), reward=reward.split(","), **options)


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """The module `scores`, in the working folder."""
    (tmp_path / "scores.py").write_text(FUNCTIONS)
    (tmp_path / "broken.py").write_text("import json\n1 / 0\n")
    (tmp_path / "needy.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    yield
    for name in ("scores", "others", "broken", "needy"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("row", "more"),
    [
        ({"prompt": "Hi"}, ""),
        ({"prompt": ASKED}, ""),
        ({"prompt": json.dumps(ASKED)}, ""),
        ({"messages": ASKED}, ""),
        ({"messages": [*ASKED, {"role": "assistant", "content": "Hello!"}]}, ""),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, ""),
        ({"instruction": "Hi", "input": "", "output": "Hello!"}, ""),
        ({"instruction": "Hi", "input": "you", "output": "Hello!"}, "\n\nyou"),
    ],
    ids=["string", "messages", "JSON", "a chat", "an answer", "ShareGPT", "Alpaca", "Alpaca with input"],
)
def test_the_forms_of_a_prompt(row, more, functions, tiny_chat_tokenizer, tmp_path):
    task, splits = read(tmp_path, row, "scores:noted")
    first = task.encode(splits["train"], tiny_chat_tokenizer)[0]
    asked = [{"role": "user", "content": "Hi" + more}]
    assert first["prompt"] == tiny_chat_tokenizer.apply_chat_template(
        asked, tokenize=False, add_generation_prompt=True
    )
    assert tiny_chat_tokenizer.decode(first["input_ids"]) == first["prompt"]
    assert not first[CUT]
    assert {name: first[GIVEN + name] for name in row} == splits["train"].select_columns(list(row))[0]
    assert task_from_dict(task.to_dict()) == task


def test_the_plain_template_and_a_system_message(functions, tiny_chat_tokenizer, tmp_path):
    row = {"prompt": "Hi", "system": "Be kind."}
    task, splits = read(tmp_path, row, "scores:noted", chat_template="plain")
    assert task.encode(splits["train"], tiny_chat_tokenizer)[0]["prompt"].endswith(
        "Be kind.\n\nHuman: Hi\n\nAssistant:"
    )


def test_a_prompt_leaves_room_for_an_answer(functions, tiny_chat_tokenizer, tmp_path):
    task, splits = read(tmp_path, {"prompt": "Hi"}, "scores:noted", max_completion_length=10)
    length = len(task.encode(splits["train"], tiny_chat_tokenizer)[0]["input_ids"])
    fits = task.encode(splits["train"], tiny_chat_tokenizer, length + 10)
    short = task.encode(splits["train"], tiny_chat_tokenizer, length + 9)
    assert (any(fits[CUT]), all(short[CUT])) == (False, True)
    assert short[0]["input_ids"] == []
    with pytest.raises(UserError, match="max_completion_length 10 leaves no room for prompts: the model reads 10 tok"):
        task.encode(splits["train"], tiny_chat_tokenizer, 10)


@pytest.mark.parametrize("messages", [False, True])
def test_what_a_function_gets(messages, functions, tmp_path):
    asked = ASKED if messages else "Hi"
    task, _ = read(tmp_path, {"prompt": asked, "difficulty": 3}, "scores:noted")
    assert [score.__name__ for score in task.reward_functions()] == ["noted"]
    [score] = task.reward_functions()
    given = {f"{GIVEN}prompt": [asked] * 2, f"{GIVEN}difficulty": [3, 4]}
    of_trl = {"prompts": ["<|user|>"] * 2, "input_ids": [[1]] * 2, "completion_ids": [[5], [6]], "trainer_state": None}
    assert score(completions=["a", "b"], **given, **of_trl) == [None, 1.0]
    answers = [[{"role": "assistant", "content": text}] for text in "ab"] if messages else ["a", "b"]
    [call] = sys.modules["scores"].CALLS
    assert call == {
        "prompts": [asked] * 2, "completions": answers, "prompt": [asked] * 2, "difficulty": [3, 4],
        "completion_ids": [[5], [6]], "trainer_state": None,
    }  # fmt: skip


def test_functions_of_one_name_are_told_apart(functions, tmp_path):
    (tmp_path / "others.py").write_text("def noted(completions, **_):\n    return [0.5] * len(completions)\n")
    task, _ = read(tmp_path, {"prompt": "Hi"}, "scores:noted,others:noted")
    assert [score.__name__ for score in task.reward_functions()] == ["scores:noted", "others:noted"]


def test_a_line_names_the_functions_and_further_columns(functions, tmp_path):
    task, splits = read(tmp_path, {"prompt": "Hi", "response": "Ho", "kind": "a"}, "exact_match,scores:noted")
    assert task.describe(splits["train"]) == ["reward: exact_match, scores:noted; it also gets the columns kind"]


def test_exact_match(tmp_path):
    task, _ = read(tmp_path, {"question": "Hi", "answer": "1,234"})
    [score] = task.reward_functions()
    given = {f"{GIVEN}question": ["Hi"] * 3, f"{GIVEN}answer": ["1,234", "5", "red"]}
    assert score(prompts=["Hi"] * 3, completions=["1234.0", "5 or 6", "It is Red."], **given) == [1, 0, 1]


def test_the_right_answer_is_that_of_the_column_that_was_named(tmp_path):
    task, _ = read(tmp_path, {"prompt": "Hi", "response": "a draft", "gold": "5"}, response="gold")
    [score] = task.reward_functions()
    given = {f"{GIVEN}prompt": ["Hi"], f"{GIVEN}response": ["a draft"], f"{GIVEN}gold": ["5"]}
    assert score(prompts=["Hi"], completions=["It is 5."], **given) == [1]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "Hi"}, {}, "cannot tell which column of rows.jsonl is the response"),
        ({"prompt": "Hi", "response": ""}, {}, "row 1 (and 3 more of 4): the answer in column 'response' is empty"),
        ({"prompt": "", "response": "a"}, {}, "row 1 (and 3 more of 4): the text in column 'prompt'"),
        ({"promt": "Hi", "response": "a"}, {}, "cannot tell which column of rows.jsonl is the prompt"),
        ({"prompt": "Hi", "response": "a"}, {"response": "answer"}, "has no column 'answer'"),
        ({"messages": [{"role": "system", "content": "a"}], "response": "a"}, {}, "row 1: the chat has no "),
        ({"prompt": "Hi", "response": "a"}, {"metric": "accuracy"}, "no metric 'accuracy' for this task; it has rew"),
    ],
)
def test_wrong_rows(row, options, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        read(tmp_path, row, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "exactmatch",
            "reward 'exactmatch' is neither exact_match nor reasoning-gym, and not of the form module:func",
        ),
        ("scores:", "reward 'scores:' is neither"),
        (":noted", "reward ':noted' is neither"),
        ("score:noted", "reward score:noted: no module 'score' is installed or in the folder "),
        ("scores.more:noted", "reward scores.more:noted: no module 'scores.more' is installed or in the folder "),
        ("broken:noted", "reward broken:noted: importing broken fails: ZeroDivisionError: division by zero"),
        ("needy:noted", "reward needy:noted: importing needy fails: ModuleNotFoundError: No module named 'no_such_"),
        ("scores:note", "scores.py has no function 'note'; did you mean 'noted'?"),
        ("scores:NUMBER", "scores.py has no function 'NUMBER'"),
    ],
)
def test_names_that_lead_to_no_function(name, message, functions):
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        load_reward(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "reward scores:fails fails at scores.py, line 9: KeyError: 'given'"),
        ("too_few", "reward scores:too_few gives 1 scores for 2 completions: one is needed for each"),
        ("words", "reward scores:words gives 'good': a score is a finite number, or None, which adds nothing"),
        ("infinite", "reward scores:infinite gives inf: a score is a finite number"),
        ("nothing", "reward scores:nothing gives None instead of a list of scores"),
        ("narrow", "reward scores:narrow fails: TypeError: narrow() got an unexpected keyword argument"),
    ],
)
def test_functions_that_give_no_scores(name, message, functions, tmp_path):
    task, _ = read(tmp_path, {"prompt": "Hi"}, f"scores:{name}")
    [score] = task.reward_functions()
    with pytest.raises(RunError, match=re.escape(message)):
        score(prompts=["Hi"] * 2, completions=["a", "b"], **{f"{GIVEN}prompt": ["Hi"] * 2})
