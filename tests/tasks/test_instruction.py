from __future__ import annotations

import json
from functools import partial

import making
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from redpeft.errors import UserError
from redpeft.tasks import DataConfig, InstructionTask, read_splits, task_from_dict

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]
PAIRS = {"prompt": ["Say yes", "Say no"], "response": ["yes", "no"]}

make = partial(making.make, source="train.jsonl")
task_of = partial(making.task_of, InstructionTask, source="train.jsonl")
error_of = partial(making.error_of, InstructionTask, source="train.jsonl")


@pytest.fixture
def plain_tokenizer(tiny_decoder_folder):
    return AutoTokenizer.from_pretrained(tiny_decoder_folder)


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (["response", "prompt"], {"prompt": "prompt", "response": "response"}),
        (["instruction", "output"], {"prompt": "instruction", "response": "output"}),
        (["instruction", "input", "output"], {"prompt": "instruction", "response": "output", "input": "input"}),
        (["question", "answer"], {"prompt": "question", "response": "answer"}),
        (["prompt", "completion"], {"prompt": "prompt", "response": "completion"}),
        (["Instruction", "Response"], {"prompt": "Instruction", "response": "Response"}),
    ],
)
def test_columns_are_guessed(columns, found):
    task = task_of({name: ["a", "b"] for name in columns})
    assert task.columns == found
    assert (task.metric, task.greater_is_better, task.compute_metrics) == ("loss", False, None)


def test_columns_that_are_named_are_taken():
    rows = {"messages": [CHAT], "q": ["a"], "a": ["b"]}
    assert task_of(rows).columns == {"messages": "messages"}
    assert task_of(rows, {"prompt": "q", "response": "a"}).columns == {"prompt": "q", "response": "a"}
    assert task_of({"talk": [CHAT]}, {"messages": "talk"}).columns == {"messages": "talk"}


def test_columns_that_are_missing():
    assert error_of({"text": ["a"]}) == (
        "cannot tell which column of train.jsonl is the prompt (columns: text); name it with `prompt`"
    )
    assert "is the response (columns: q, b)" in error_of({"q": ["a"], "b": ["c"]}, {"prompt": "q"})
    assert "has no column 'q'; its columns are prompt, response." in error_of(PAIRS, {"prompt": "q"})
    assert "has no column 'mesages'; " in error_of({"messages": [CHAT]}, {"messages": "mesages"})
    assert error_of(PAIRS, metric="bleu") == "no metric 'bleu' for this task; it has loss"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["a", ""], "response": ["b", "c"]}, "train.jsonl, row 2: the text in column 'prompt' is empty"),
        ({"prompt": ["a"], "response": [None]}, "train.jsonl, row 1: the text in column 'response' is empty"),
        ({"messages": ["Hi"]}, "train.jsonl, row 1: expected a list of {'role': ..., 'content': ...}, found Hi"),
        ({"messages": [[{"role": "bot", "content": "a"}]]}, "row 1: a message has the role 'bot'; roles are system, "),
        ({"messages": [[{"role": "user", "content": ""}]]}, "row 1: a message's content is empty or not text"),
        ({"messages": [CHAT, CHAT[:2]]}, "row 2: the chat has no answer of the assistant to learn"),
        ({"messages": [CHAT[2:4]]}, "row 1: the chat has no answer of the assistant to learn"),
        ({"messages": [CHAT[:1]]}, "row 1: the chat has no message of the user"),
    ],
)
def test_bad_rows(columns, message):
    assert message in error_of(columns)


def test_plain_text_without_a_chat_template(plain_tokenizer):
    rows = {"instruction": ["Add", "Say no"], "input": ["2 and 3", ""], "output": ["5", "no"]}
    encoded = task_of(rows).encode(make(rows), plain_tokenizer)
    assert encoded[:] == {
        "prompt": ["Human: Add\n\n2 and 3\n\nAssistant:", "Human: Say no\n\nAssistant:"],
        "completion": [" 5", " no"],
    }


def test_chats_with_a_chat_template(tiny_chat_tokenizer):
    encoded = task_of(PAIRS).encode(make(PAIRS), tiny_chat_tokenizer)
    assert encoded[1] == {
        "prompt": [{"role": "user", "content": "Say no"}],
        "completion": [{"role": "assistant", "content": "no"}],
    }


def test_plain_text_whatever_the_tokenizer_has(tiny_chat_tokenizer, plain_tokenizer):
    task = task_of(PAIRS, {"template": "plain"})
    assert task.encode(make(PAIRS), tiny_chat_tokenizer)[:] == task_of(PAIRS).encode(make(PAIRS), plain_tokenizer)[:]
    dataset = task.rows_to_dataset(["Say yes"])
    assert task.format_prompt(dataset[0], tiny_chat_tokenizer) == "Human: Say yes\n\nAssistant:"
    inputs = task.prompt_inputs(dataset, tiny_chat_tokenizer)
    assert inputs["input_ids"][0, 0] == tiny_chat_tokenizer.bos_token_id  # which a chat template would have to write
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task
    assert task_from_dict({"task": "instruction", "columns": {}}).template == "auto"  # of a run from before


def test_every_answer_of_a_chat_is_learned(tiny_chat_tokenizer, plain_tokenizer):
    rows = {"messages": [[{"role": "assistant", "content": "Welcome"}, *CHAT]]}
    encoded = task_of(rows).encode(make(rows), tiny_chat_tokenizer)
    assert encoded["completion"] == [[CHAT[2]], [CHAT[4]]]
    assert encoded["prompt"] == [rows["messages"][0][:3], rows["messages"][0][:5]]
    rows = {"messages": [CHAT]}
    assert task_of(rows).encode(make(rows), plain_tokenizer)[1] == {
        "prompt": "Be brief.\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant:",
        "completion": " See you",
    }


def test_prompts_to_answer(plain_tokenizer, tiny_chat_tokenizer):
    task = task_of(PAIRS)
    dataset = task.rows_to_dataset(["Say yes", {"prompt": "Say no or maybe", "response": "left out"}])
    assert "response" not in dataset.column_names
    assert task.format_prompt(dataset[0], plain_tokenizer) == "Human: Say yes\n\nAssistant:"
    assert task.format_prompt(dataset[0], tiny_chat_tokenizer) == "<|user|>\nSay yes\n<|assistant|>\n"
    plain = task.prompt_inputs(dataset, plain_tokenizer)
    assert plain_tokenizer.batch_decode(plain["input_ids"], skip_special_tokens=True) == [
        "Human: Say yes\n\nAssistant:",
        "Human: Say no or maybe\n\nAssistant:",
    ]
    assert plain["attention_mask"][0].tolist() == [0] * 8 + [1] * (plain["input_ids"].shape[1] - 8)  # on the left
    assert (plain["input_ids"][:, -1] == plain["input_ids"][0, -1]).all()
    begin = plain_tokenizer.bos_token_id
    assert (plain["input_ids"] == begin).sum(1).tolist() == [1, 1]
    assert (task.prompt_inputs(dataset, tiny_chat_tokenizer)["input_ids"] == begin).sum() == 0  # the template has none
    assert task.encode(dataset, plain_tokenizer, with_labels=False).column_names == ["prompt"]


def test_chats_to_answer(tiny_chat_tokenizer):
    task = task_of({"messages": [CHAT]})
    dataset = task.rows_to_dataset(["Hi", {"messages": CHAT[:4]}, {"messages": CHAT}])
    prompts = [task.format_prompt(row, tiny_chat_tokenizer) for row in dataset]
    assert prompts[0] == "<|user|>\nHi\n<|assistant|>\n"
    assert prompts[1] == prompts[2]  # the last answer of a chat is what is asked for
    assert prompts[1].endswith("<|user|>\nBye\n<|assistant|>\n")
    with pytest.raises(UserError, match="row 1: the chat has no message of the user"):
        task.prompt_inputs(task.rows_to_dataset([{"messages": CHAT[:1]}]), tiny_chat_tokenizer)


def test_generation_does_not_depend_on_the_batch(tiny_decoder_folder, plain_tokenizer):
    task = task_of(PAIRS)
    model = task.load_model(tiny_decoder_folder, plain_tokenizer).eval()
    assert model.config.pad_token_id == plain_tokenizer.pad_token_id == plain_tokenizer.eos_token_id
    texts = []
    for prompts in (["Say yes", "Say something long"], ["Say yes"]):
        inputs = task.prompt_inputs(task.rows_to_dataset(prompts), plain_tokenizer)
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        texts.append(tokens[0].tolist())
    assert texts[0] == texts[1]
    assert task.decode([" yes \n", "no"]) == [{"text": "yes"}, {"text": "no"}]


@pytest.mark.parametrize("template", [False, True])
def test_trl_learns_the_response_alone(tiny_decoder_folder, plain_tokenizer, tiny_chat_tokenizer, tmp_path, template):
    trl = pytest.importorskip("trl")
    tokenizer = tiny_chat_tokenizer if template else plain_tokenizer
    task = task_of(PAIRS)
    model = task.load_model(tiny_decoder_folder, tokenizer)
    arguments = trl.SFTConfig(tmp_path, max_length=64, max_steps=1, report_to=[], use_cpu=True, bf16=False)
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=task.encode(make(PAIRS), tokenizer, 64), processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    learned = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    if template:
        assert sorted(learned) == ["no</s>\n", "yes</s>\n"]
    else:
        assert sorted(learned) == [" no</s>", " yes</s>"]
        prompts = task.prompt_inputs(task.rows_to_dataset(PAIRS["prompt"]), tokenizer)["input_ids"]
        shown = [row[labels == -100] for row, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
        strip = {tokenizer.pad_token_id}
        assert sorted([t for t in row.tolist() if t not in strip] for row in shown) == sorted(
            [t for t in row.tolist() if t not in strip] for row in prompts
        )  # training and generation see the same tokens
    assert torch.isfinite(trainer.model(**batch).loss)


def test_the_prompt_ends_on_a_token_boundary(plain_tokenizer):
    """Tokenizers join a space to the word after it, so the template's last space must not belong to the prompt."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["Human: Say yes\n\nAssistant: yes"] * 3, trainer)
    row = task_of(PAIRS).encode(make(PAIRS), plain_tokenizer)[0]
    prompt, whole = (backend.encode(text).ids for text in (row["prompt"], row["prompt"] + row["completion"]))
    assert whole[: len(prompt)] == prompt
    with_space = backend.encode(row["prompt"] + " ").ids
    assert whole[: len(with_space)] != with_space


def test_a_task_survives_its_json():
    task = task_of({"instruction": ["a"], "input": ["b"], "output": ["c"]})
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task


@pytest.mark.parametrize("name", ["alpaca_eval", "self_instruct_seed"])
def test_shared_data(shared_data, plain_tokenizer, name):
    config = DataConfig(path=str(shared_data / name), max_train_rows=20)
    splits = read_splits(config)
    task = InstructionTask.from_splits(splits, config)
    assert task.columns == {"prompt": "instruction", "response": "output"}
    assert len(task.encode(splits["train"], plain_tokenizer)) == 20


def test_columns_of_an_unusual_name(shared_data):
    config = DataConfig(path=str(shared_data / "e2e"), prompt="meaning_representation", response="human_reference")
    assert InstructionTask.from_splits(read_splits(config), config).columns["prompt"] == "meaning_representation"
