from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from helpers import tasks as helper
from helpers.tasks import parts
from redpeft.errors import UserError
from redpeft.models import pad_prompts
from redpeft.tasks.base import DataConfig, task_from_dict
from redpeft.tasks.data import read_data, read_splits
from redpeft.tasks.instruction import InstructionTask

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]
PAIRS = {"prompt": ["Say yes", "Say no"], "response": ["yes", "no"]}

make = partial(helper.make, source="train.jsonl")
task_of = partial(helper.task_of, InstructionTask, source="train.jsonl")
error_of = partial(helper.error_of, InstructionTask, source="train.jsonl")


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
    assert error_of({"body": ["a"]}) == (
        "cannot tell which column of train.jsonl is the prompt (columns: body); name it with `prompt`"
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
        ({"messages": ["Hi"]}, "train.jsonl, row 1: expected JSON of a list of {'role': ..., 'content': ...}, found"),
        ({"messages": [[{"role": "bot", "content": "a"}]]}, "row 1: a message has the role 'bot'; roles are system, "),
        (
            {"messages": [[{"role": "user", "content": ""}]]},
            "row 1: message 1 (user): its content is empty",
        ),
        ({"messages": [CHAT, CHAT[:2]]}, "row 2: the chat has no answer of the assistant to learn"),
        ({"messages": [CHAT[2:4]]}, "row 1: the chat has no answer of the assistant to learn"),
        ({"messages": [CHAT[:1]]}, "row 1: the chat has no message of the user"),
    ],
)
def test_bad_rows(columns, message):
    assert message in error_of(columns)


def test_plain_text_without_a_chat_template(plain_tokenizer):
    rows = {"instruction": ["Add", "Say no"], "input": ["2 and 3", ""], "output": ["5", "no"]}
    assert parts(task_of(rows).encode(make(rows), plain_tokenizer), plain_tokenizer) == [
        ("<s>Human: Add\n\n2 and 3\n\nAssistant:", " 5</s>"),
        ("<s>Human: Say no\n\nAssistant:", " no</s>"),
    ]


def test_chats_with_a_chat_template(tiny_chat_tokenizer):
    encoded = task_of(PAIRS).encode(make(PAIRS), tiny_chat_tokenizer)
    assert parts(encoded, tiny_chat_tokenizer)[1] == ("<|user|>\nSay no\n<|assistant|>\n", "no</s>\n")


def test_plain_text_whatever_the_tokenizer_has(tiny_chat_tokenizer, plain_tokenizer):
    task = task_of(PAIRS, {"chat_template": "plain"})
    encoded = task.encode(make(PAIRS), tiny_chat_tokenizer)
    assert encoded[:] == task_of(PAIRS).encode(make(PAIRS), plain_tokenizer)[:]
    assert encoded[0]["input_ids"][0] == tiny_chat_tokenizer.bos_token_id  # which a chat template would have to write
    asked = task.encode(task.rows_to_dataset(["Say yes"]), tiny_chat_tokenizer, with_labels=False)[:]["input_ids"]
    assert tiny_chat_tokenizer.batch_decode(asked) == ["<s>Human: Say yes\n\nAssistant:"]
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task
    assert task_from_dict({"task": "instruction", "columns": {}}).template == "auto"  # of a run from before


def test_every_answer_of_a_chat_is_learned(tiny_chat_tokenizer, plain_tokenizer):
    rows = {"messages": [[{"role": "assistant", "content": "Welcome"}, *CHAT]]}
    encoded = task_of(rows).encode(make(rows), tiny_chat_tokenizer)
    start = "<|assistant|>\nWelcome</s>\n<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\n"
    assert parts(encoded, tiny_chat_tokenizer) == [
        (start, "Hello!</s>\n", "<|user|>\nBye\n<|assistant|>\n", "See you</s>\n")
    ]
    rows = {"messages": [CHAT]}
    assert parts(task_of(rows).encode(make(rows), plain_tokenizer), plain_tokenizer)[1] == (
        "<s>Be brief.\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant:",
        " See you</s>",
    )
    tokenizer = copy.deepcopy(tiny_chat_tokenizer)
    shortens = "{% for m in messages %}{{ m.content[:1] if m.role == 'assistant' and not loop.last else m.content }}"
    tokenizer.chat_template = shortens + "{% endfor %}"
    assert parts(task_of(rows).encode(make(rows), tokenizer), tokenizer) == [
        ("Be brief.Hi", "Hello!"),
        ("Be brief.HiHBye", "See you"),
    ]


def test_rows_are_cut_where_the_model_ends(plain_tokenizer):
    rows = {"prompt": ["Say yes", "x" * 80], "response": ["yes " * 20, "no"]}
    encoded = task_of(rows).encode(make(rows), plain_tokenizer, 40)
    assert encoded[:]["__cut__"] == [True, True]
    assert [len(ids) for ids in encoded["input_ids"]] == [40, 40]
    assert [sum(mask) for mask in encoded["completion_mask"]] == [40 - len("sHuman: Say yes\n\nAssistant:"), 0]
    assert task_of(rows).encode(make(rows), plain_tokenizer, 110)[:]["__cut__"] == [False, False]
    with pytest.raises(
        UserError, match="^train.jsonl, row 2: a prompt of 100 tokens leaves no room for an answer: the model reads 8"
    ):
        task_of(rows).encode(make(rows), plain_tokenizer, 80, with_labels=False)


WRITTEN = "{% for message in messages %}{{ message.content }}{% endfor %}"
REFUSALS = {
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + WRITTEN: (
        "no system role here"
    ),
    "{{ city.name }}": "'city' is undefined",
    "{{ messages[0]['content'] + 1 }}": 'can only concatenate str (not "int") to str',
    "{% for m in messages %}{{ m.content }}": "Unexpected end of template",
    "{% if messages[0].role != 'system' %}" + WRITTEN + "{% endif %}": "writes nothing for this chat",
}


@pytest.mark.parametrize("template", REFUSALS)
@pytest.mark.parametrize("with_labels", [True, False])
def test_a_chat_template_that_refuses_a_chat(tiny_chat_tokenizer, template, with_labels):
    tokenizer = copy.deepcopy(tiny_chat_tokenizer)
    tokenizer.chat_template = template
    rows = {"messages": [CHAT[1:], CHAT]}
    with pytest.raises(UserError) as caught:
        task_of(rows).encode(make(rows), tokenizer, with_labels=with_labels)
    place = "row 2" if "system" in template else "row 1"  # of these two templates, each refuses chats with a system
    assert str(caught.value).startswith(f"train.jsonl, {place}: the tokenizer's chat template ")
    assert REFUSALS[template] in str(caught.value)
    assert "\n" not in str(caught.value)
    plain = task_of(rows, {"chat_template": "plain"})
    assert len(plain.encode(make(rows), tokenizer, with_labels=with_labels)) == (4 if with_labels else 2)


def test_prompts_that_end_otherwise_where_an_answer_follows(tiny_chat_tokenizer, caplog):
    tokenizer = copy.deepcopy(tiny_chat_tokenizer)
    tokenizer.chat_template += "{% if add_generation_prompt %}thinking{% endif %}"
    encoded = task_of(PAIRS).encode(make(PAIRS), tokenizer)
    assert parts(encoded, tokenizer)[0] == ("<|user|>\nSay yes\n<|assistant|>\n", "yes</s>\n")
    assert "train.jsonl: 2 of 2 prompts are tokenised differently when a response follows" in caplog.text


def test_a_tokenizer_that_raises_on_a_text(plain_tokenizer):
    class Picky:
        def __call__(self, texts, **options):
            if any("no" in text for text in texts):
                raise RuntimeError("unknown\nbyte")
            return plain_tokenizer(texts, **options)

        def __getattr__(self, name):
            return getattr(plain_tokenizer, name)

    with pytest.raises(UserError, match="^train.jsonl, row 2: the tokenizer fails: RuntimeError: unknown$"):
        task_of(PAIRS).encode(make(PAIRS), Picky())


def test_tokenizers_that_put_an_end_behind_every_text(plain_tokenizer):
    plain_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    asked = task_of(PAIRS).encode(make(PAIRS), plain_tokenizer, with_labels=False)[:]["input_ids"]
    assert plain_tokenizer.decode(asked[0]) == "<s>Human: Say yes\n\nAssistant:"


def test_prompts_to_answer(plain_tokenizer, tiny_chat_tokenizer):
    task = task_of(PAIRS)
    dataset = task.rows_to_dataset(["Say yes", {"prompt": "Say no or maybe", "response": "left out"}])
    assert "response" not in dataset.column_names
    plain = task.encode(dataset, plain_tokenizer, with_labels=False)[:]["input_ids"]
    texts = ["Human: Say yes\n\nAssistant:", "Human: Say no or maybe\n\nAssistant:"]
    assert plain_tokenizer.batch_decode(plain) == [f"<s>{text}" for text in texts]
    chats = task.encode(dataset, tiny_chat_tokenizer, with_labels=False)[:]["input_ids"]  # the template has no <s>
    assert tiny_chat_tokenizer.decode(chats[0]) == "<|user|>\nSay yes\n<|assistant|>\n"
    batch = pad_prompts(plain_tokenizer, plain, "left")
    assert batch["attention_mask"][0].tolist() == [0] * 8 + [1] * len(plain[0])
    assert batch["input_ids"][0, 8:].tolist() == plain[0]


def test_chats_to_answer(tiny_chat_tokenizer):
    task = task_of({"messages": [CHAT]})
    dataset = task.rows_to_dataset(["Hi", {"messages": CHAT[:4]}, {"messages": CHAT}])
    asked = task.encode(dataset, tiny_chat_tokenizer, with_labels=False)[:]["input_ids"]
    prompts = tiny_chat_tokenizer.batch_decode(asked)
    assert prompts[0] == "<|user|>\nHi\n<|assistant|>\n"
    assert prompts[1] == prompts[2]  # the last answer of a chat is what is asked for
    assert prompts[1].endswith("<|user|>\nBye\n<|assistant|>\n")
    with pytest.raises(UserError, match="row 1: the chat has no message of the user"):
        task.encode(task.rows_to_dataset([{"messages": CHAT[:1]}]), tiny_chat_tokenizer, with_labels=False)


def test_generation_does_not_depend_on_the_batch(tiny_decoder_folder, plain_tokenizer):
    task = task_of(PAIRS)
    model = task.load_model(tiny_decoder_folder, plain_tokenizer).eval()
    assert model.config.pad_token_id == plain_tokenizer.pad_token_id == plain_tokenizer.eos_token_id
    texts = []
    for prompts in (["Say yes", "Say something long"], ["Say yes"]):
        asked = task.encode(task.rows_to_dataset(prompts), plain_tokenizer, with_labels=False)[:]["input_ids"]
        inputs = pad_prompts(plain_tokenizer, asked, "left")
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
    options = {"max_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "completion_only_loss": True}
    arguments = trl.SFTConfig(tmp_path, max_length=64, **options)
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=task.encode(make(PAIRS), tokenizer, 64), processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    learned = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    if template:
        assert sorted(learned) == ["no</s>\n", "yes</s>\n"]
    else:
        assert sorted(learned) == [" no</s>", " yes</s>"]
        prompts = task.encode(task.rows_to_dataset(PAIRS["prompt"]), tokenizer, with_labels=False)[:]["input_ids"]
        shown = [row[labels == -100] for row, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
        # training and generation see the same tokens
        assert sorted([t for t in row.tolist() if t != tokenizer.pad_token_id] for row in shown) == sorted(prompts)
    assert torch.isfinite(trainer.model(**batch).loss)


def test_the_prompt_ends_on_a_token_boundary(plain_tokenizer):
    """Tokenizers join a space to the word after it, so the template's last space must not belong to the prompt."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["Human: Say yes\n\nAssistant: yes"] * 3, trainer)
    [(first, rest), _] = parts(task_of(PAIRS).encode(make(PAIRS), plain_tokenizer), plain_tokenizer)
    prompt, whole = (backend.encode(text).ids for text in (first, first + rest))
    assert whole[: len(prompt)] == prompt
    with_space = backend.encode(first + " ").ids
    assert whole[: len(with_space)] != with_space


def test_a_task_survives_its_json():
    task = task_of({"instruction": ["a"], "input": ["b"], "output": ["c"]})
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task


@pytest.mark.parametrize("name", ["alpaca_eval", "self_instruct_seed"])
def test_shared_data(shared_data, plain_tokenizer, name):
    config = DataConfig(path=str(shared_data / name), max_train_rows=20, drop_missing=True)
    task, splits = read_data("instruction", config)
    assert task.columns == {"prompt": "instruction", "response": "output"}
    assert len(task.encode(splits["train"], plain_tokenizer)) == 20


def test_columns_of_an_unusual_name(shared_data):
    config = DataConfig(path=str(shared_data / "e2e"), prompt="meaning_representation", response="human_reference")
    assert InstructionTask.from_splits(read_splits(config), config).columns["prompt"] == "meaning_representation"
