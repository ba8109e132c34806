from __future__ import annotations

import json
import re

import pytest

from helpers.data import write_rows
from redpeft.errors import UserError
from redpeft.tasks.base import DataConfig, task_from_dict
from redpeft.tasks.columns import CUT
from redpeft.tasks.data import read_data

ASKED = [{"role": "user", "content": "Hi"}]
PAIR = {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}


def chat(text):
    return [*ASKED, {"role": "assistant", "content": text}]


def read(folder, row, **options):
    path = write_rows(folder / "rows.jsonl", [row] * 4)
    fields = {name: options.pop(name) for name in list(options) if name in DataConfig.model_fields}
    return read_data("preference", DataConfig(path=str(path), **fields), **options)


def texts(tokenizer, row, *names):
    return [tokenizer.decode(row[name]) for name in names]


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"prompt": ASKED, "chosen": chat("Hello!")[1:], "rejected": chat("No.")[1:]},
        {"chosen": chat("Hello!"), "rejected": chat("No.")},
        {"prompt": "Hi", "chosen": chat("Hello!"), "rejected": chat("No.")},
        {"prompt": json.dumps(ASKED), "chosen": json.dumps(chat("Hello!")[1:]), "rejected": "No."},
        {"chosen": json.dumps(chat("Hello!")), "rejected": json.dumps(chat("No."))},
        {"instruction": "Hi", "input": "", "chosen": "Hello!", "rejected": "No."},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello!"},
            "rejected": {"from": "gpt", "value": "No."},
        },
        {"messages": ASKED, "chosen": chat("Hello!")[1:], "rejected": chat("No.")[1:]},
        {"messages": chat("Hello!"), "chosen": chat("Hello!"), "rejected": chat("No.")},
    ],
    ids=[
        *("strings", "messages", "whole chats", "whole chats with a prompt", "JSON", "whole chats in JSON", "Alpaca"),
        *("ShareGPT with one message each", "messages without a prompt", "whole chats beside one of them"),
    ],
)
def test_the_forms_of_a_pair(row, tiny_chat_tokenizer, tmp_path):
    task, splits = read(tmp_path, row)
    first = task.encode(splits["train"], tiny_chat_tokenizer)[0]
    prompt, chosen, rejected = texts(tiny_chat_tokenizer, first, "prompt_ids", "chosen_ids", "rejected_ids")
    asked = tiny_chat_tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    whole = tiny_chat_tokenizer.apply_chat_template(chat("Hello!"), tokenize=False)
    assert (prompt, prompt + chosen) == (asked, whole)
    assert rejected == chosen.replace("Hello!", "No.")
    assert first["input_ids"] == first["prompt_ids"] + first["chosen_ids"]
    assert first["completion_mask"] == [0] * len(first["prompt_ids"]) + [1] * len(first["chosen_ids"])
    assert task_from_dict(task.to_dict()) == task


def test_the_plain_template_a_system_message_and_a_cut(tiny_chat_tokenizer, tmp_path):
    task, splits = read(tmp_path, PAIR | {"system": "Be kind."}, chat_template="plain")
    encoded = task.encode(splits["train"], tiny_chat_tokenizer)
    prompt, chosen = texts(tiny_chat_tokenizer, encoded[0], "prompt_ids", "chosen_ids")
    assert prompt.endswith("Be kind.\n\nHuman: Hi\n\nAssistant:")
    assert chosen == " Hello!" + tiny_chat_tokenizer.eos_token
    assert not any(encoded[CUT])
    length = len(encoded[0]["prompt_ids"]) + 2
    short = task.encode(splits["train"], tiny_chat_tokenizer, length)
    assert all(short[CUT])
    assert len(short[0]["input_ids"]) == length
    assert short[0]["rejected_ids"] == encoded[0]["rejected_ids"][:2]
    assert task.encode(splits["train"], tiny_chat_tokenizer, 3)[0]["completion_mask"] == [0] * 3


def test_more_of_the_prompt_and_equal_answers(tiny_chat_tokenizer, tmp_path):
    row = {"instruction": "Add", "input": "2 and 3", "chosen": "5", "rejected": "5"}
    task, splits = read(tmp_path, row)
    first = task.encode(splits["train"], tiny_chat_tokenizer)[0]
    assert texts(tiny_chat_tokenizer, first, "prompt_ids") == ["<|user|>\nAdd\n\n2 and 3\n<|assistant|>\n"]
    assert task.describe(splits["train"]) == ["pairs of equal answers, which teach nothing: 3"]


def test_an_answer_without_messages(tmp_path):
    rows = [{"prompt": "Hi", "chosen": "a", "rejected": rejected} for rejected in (chat("b")[1:], [])]
    with pytest.raises(UserError, match="^rows.jsonl, row 2: an answer is a list without messages$"):
        read_data("preference", DataConfig(path=write_rows(tmp_path / "rows.jsonl", rows)))


def test_kto_takes_pairs_and_labels(tiny_chat_tokenizer, tmp_path):
    task, splits = read(tmp_path, PAIR, loss="kto")
    rows = task.encode(splits["train"], tiny_chat_tokenizer)
    assert len(rows) == 2 * len(splits["train"])
    assert rows["label"][:2] == [True, False]
    task, splits = read(tmp_path, {"prompt": "Hi", "completion": "Hello!", "label": 0}, loss="kto")
    single = task.encode(splits["train"], tiny_chat_tokenizer)
    assert single["label"] == [False] * len(splits["train"])
    assert single[0]["completion_ids"] == rows[0]["completion_ids"]
    assert task.describe(splits["train"]) == [f"answers: 0 desirable, {len(splits['train'])} undesirable"]
    task, splits = read(tmp_path, {"messages": chat("Hello!"), "label": False}, loss="kto")
    assert task.encode(splits["train"], tiny_chat_tokenizer).to_dict() == single.to_dict()


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "Hi", "completion": "Hello!", "label": True}, {}, "loss dpo needs pairs in columns chosen and"),
        ({"prompt": "Hi", "completion": "a", "label": "good"}, {"loss": "kto"}, "row 1: the label 'good' is neither"),
        ({"chosen": "a", "rejected": "b"}, {}, "has answers without a prompt: name its column with data.prompt"),
        ({"prompt": "Hi", "chosen": "", "rejected": "b"}, {}, "row 1 (and 3 more of 4): the text in column 'chosen'"),
        (
            {"messages": ASKED, "chosen": {"role": "gtp", "content": "a"}, "rejected": "b"}, {},
            "rows.jsonl, row 1: a message has the role 'gtp'",
        ),
        ({"messages": ASKED, "label": True}, {"loss": "kto"}, "row 1: the chat has no answer of the"),
        ({"prompt": "Hi", "chosen": "a", "rejcted": "b"}, {}, "cannot tell which column of rows.jsonl is the"),
        (
            {"chosen": chat("a"), "rejected": [{"role": "user", "content": "Ho"}, *chat("b")[1:]]}, {},
            "row 1: the chats differ before the assistant's answer, so they have no prompt in common",
        ),
        ({"prompt": "Hi", "chosen": ASKED, "rejected": ASKED}, {}, "row 1: the chat has no answer of the assistant"),
        ({"prompt": "Hi", "chosen": "a", "rejected": []}, {}, "row 1: column 'rejected' holds [], which is not text"),
        (
            {"chosen": [*chat("a"), *chat("b")], "rejected": [*chat("c"), *chat("b")]}, {},
            "row 1: an answer goes on with a message of the user: two chats may differ in the last answer only",
        ),
        (
            {"prompt": "Hi", "completion": "Hello!", "label": None}, {"loss": "kto"},
            "row 1: the label is empty; data.drop_missing=true leaves such rows out",
        ),
    ],
)  # fmt: skip
def test_wrong_rows(row, options, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        read(tmp_path, row, **options)
