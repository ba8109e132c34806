from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from helpers.language_models import write_lora, write_prompt, write_red, write_talker
from redpeft.adapters.arithmetic import compose
from redpeft.adapters.fold.folding import fold
from redpeft.errors import UserError
from redpeft.evaluation.language_model import (
    Decoding,
    LanguageModel,
    WithoutPadding,
    attach,
    detach,
    load_language_model,
    open_language_model,
    penalties,
)
from redpeft.training.recipe import load_recipe
from redpeft.training.train import train
from redpeft.tuner.mixed import BASE

SHORT = Decoding(max_new_tokens=24)
ASKED = ["Hi", "Name three rivers in Europe, please.", "2+2?", "Write a poem about autumn leaves and rain"]
CHATS = [[{"role": "user", "content": text}] for text in ASKED]


@pytest.fixture(scope="module")
def talker(tiny_decoder_folder, tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("talker") / "base", tiny_decoder_folder)


@pytest.fixture(scope="module")
def opened(talker):
    return open_language_model(str(talker))


@pytest.mark.parametrize("penalty", [1.1, 1.5])
def test_a_batch_answers_as_each_question_alone(opened, penalty):
    """With enough questions that some answers end where the penalty on the end token, which pads, would matter."""
    decoding = Decoding(max_new_tokens=24, repetition_penalty=penalty)
    chats = CHATS + [[{"role": "user", "content": "word " * count}] for count in range(1, 13)]
    together = opened.answer(chats, decoding)
    assert together == [opened.answer([chat], decoding)[0] for chat in chats]
    assert opened.answer(chats[::-1], decoding) == together[::-1]
    assert len({len(text) for text in together}) > 4


def test_each_chat_of_a_batch_has_its_own_adapter(talker, opened, tmp_path):
    model, tokenizer = load_language_model(str(talker))
    for seed, name in enumerate(["a", "b"]):
        model = attach(model, write_red(tmp_path / name, talker, seed), name)
    several = LanguageModel(model, tokenizer)
    names = ["b", BASE, "a", "b"]
    together = several.answer(CHATS, SHORT, names)
    for chat, name, answer in zip(CHATS, names, together, strict=True):
        alone = opened if name == BASE else open_language_model(str(talker), tmp_path / name)
        assert alone.answer([chat], SHORT) == [answer]
    assert several.answer(CHATS, SHORT, ["a"] * 4) != several.answer(CHATS, SHORT, ["b"] * 4)
    with pytest.raises(UserError, match="unknown adapters in adapter_names: c"):
        several.answer(CHATS[:1], SHORT, ["c"])


def test_what_is_generated_is_what_greedy_decoding_by_hand_gives(opened, talker):
    model, tokenizer = LlamaForCausalLM.from_pretrained(talker).eval(), AutoTokenizer.from_pretrained(talker)
    ids = tokenizer("Human: Hi\n\nAssistant:", return_tensors="pt")["input_ids"]
    decoding = Decoding(max_new_tokens=24, repetition_penalty=1.3, no_repeat_ngrams=2)
    start, processors = ids.shape[1], penalties(decoding)
    for _ in range(decoding.max_new_tokens):
        scores = processors(ids, model(ids).logits[:, -1].float())
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    assert opened.answer(CHATS[:1], decoding) == [tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()]


def test_penalties_ignore_padding():
    torch.manual_seed(0)
    ids = torch.tensor([[9, 9, 9, 4, 5, 6, 4, 5], [1, 2, 3, 1, 2, 7, 1, 2]])
    scores = torch.randn(2, 12)
    decoding = Decoding(repetition_penalty=1.7, no_repeat_ngrams=3)
    rows = [ids[:1, 3:], ids[1:]]
    expected = torch.cat([penalties(decoding)(row, scores[i : i + 1].clone()) for i, row in enumerate(rows)])
    found = WithoutPadding(penalties(decoding), [3, 0])(ids, scores.clone())
    assert torch.equal(found, expected)
    assert found[0, 6] == -torch.inf  # 4 5 6 came before
    assert found[0, 9] == scores[0, 9]
    assert penalties(decoding)(ids, scores.clone())[0, 9] != scores[0, 9]  # what transformers makes of the padding


def test_default_decoding_is_the_papers():
    penalty, ngrams = penalties(Decoding())
    assert (type(penalty), penalty.penalty) == (RepetitionPenaltyLogitsProcessor, 1.1)
    assert (type(ngrams), ngrams.ngram_size) == (NoRepeatNGramLogitsProcessor, 5)
    assert Decoding().max_new_tokens == 768
    assert not penalties(Decoding(repetition_penalty=1, no_repeat_ngrams=0))


def test_generation_settings_of_the_model_folder_are_ignored(opened, talker, tmp_path):
    folder = tmp_path / "sampling"
    model, tokenizer = load_language_model(str(talker))
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    config = {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 3.0, "num_beams": 2}
    (folder / "generation_config.json").write_text(json.dumps({**config, "no_repeat_ngram_size": 1, "max_length": 9}))
    assert open_language_model(str(folder)).answer(CHATS, SHORT) == opened.answer(CHATS, SHORT)


def test_an_answer_ends_with_the_models_end_token_or_the_tokenizers(talker, opened):
    other = open_language_model(str(talker))
    other.model.generation_config.eos_token_id = None
    assert other.answer(CHATS, SHORT) == opened.answer(CHATS, SHORT)
    long = Decoding(max_new_tokens=100, repetition_penalty=1, no_repeat_ngrams=0)
    [full] = opened.answer(CHATS[1:2], long)
    letter = next(letter for letter in full[1:] if letter.isascii() and letter.isalnum())
    other.model.generation_config.eos_token_id = [other.tokenizer.convert_tokens_to_ids(letter)]
    assert other.answer(CHATS[1:2], long) == [full[: full.index(letter) + 1]]


def test_a_chat_template_is_used_where_there_is_one(talker, tiny_chat_tokenizer, tmp_path):
    model, _ = load_language_model(str(talker))
    model.save_pretrained(tmp_path)
    tiny_chat_tokenizer.save_pretrained(tmp_path)
    chatting = open_language_model(str(tmp_path))
    assert chatting.answer(CHATS, SHORT) == [chatting.answer([chat], SHORT)[0] for chat in CHATS]
    assert chatting.answer(CHATS, SHORT) != open_language_model(str(talker)).answer(CHATS, SHORT)


@pytest.mark.parametrize("write", [write_red, write_lora, write_prompt])
def test_an_adapter_changes_the_answers_and_can_be_removed(write, talker, opened, tmp_path):
    write(tmp_path / "adapter", talker, seed=1)
    adapted = open_language_model(str(talker), tmp_path / "adapter")
    base = opened.answer(CHATS, SHORT)
    assert adapted.answer(CHATS, SHORT) != base
    model, _ = load_language_model(str(talker))
    logits = model(torch.arange(5, 15)[None]).logits
    on = attach(model, tmp_path / "adapter")
    assert not torch.allclose(on(input_ids=torch.arange(5, 15)[None]).logits[:, -10:], logits, atol=0.1)
    off = detach(on)
    assert off is model
    assert torch.equal(off(torch.arange(5, 15)[None]).logits, logits)


def test_an_adapter_of_another_base_is_refused(talker, tiny_decoder_folder, tmp_path):
    other = write_talker(tmp_path / "other", tiny_decoder_folder, seed=7)
    write_red(tmp_path / "red", other, seed=1)
    with pytest.raises(UserError, match=r"red: this adapter is for another base model .*weights differ"):
        open_language_model(str(talker), tmp_path / "red")
    write_lora(tmp_path / "lora", talker, seed=1)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["nowhere"]}))
    with pytest.raises(UserError, match=r"lora: PEFT cannot load this adapter onto the base model: .*nowhere"):
        open_language_model(str(talker), tmp_path / "lora")


def test_a_folder_without_a_model_is_refused(talker, tmp_path):
    with pytest.raises(UserError, match="no such model folder: "):
        open_language_model(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot load .*empty with AutoTokenizer"):
        open_language_model(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no such adapter folder"):
        open_language_model(str(talker), tmp_path / "nowhere")


def test_a_prompt_that_is_too_long_is_an_error(opened, monkeypatch):
    short, long = ([{"role": "user", "content": "a" * length}] for length in (20, 600))
    with pytest.raises(
        UserError, match=r"^a prompt of \d+ tokens and 240 new ones are more than the tok.* 256: lower"
    ):
        opened.answer([short], Decoding(max_new_tokens=240))
    monkeypatch.setattr(opened.tokenizer, "model_max_length", 10**30)
    with pytest.raises(UserError, match="and 500 new ones are more than the 512 positions of LlamaFor.*: lower --max"):
        opened.answer([short], Decoding(max_new_tokens=500))
    with pytest.raises(UserError, match=r"^a prompt of \d+ tokens and .* LlamaForCausalLM: shorten it"):
        opened.answer([long], SHORT)


def test_a_run_answers_as_it_was_trained(talker, tiny_chat_tokenizer, tmp_path):
    """Its base has a chat template, and its recipe the plain one; and its adapter finds the run around it."""
    pytest.importorskip("trl")
    model, _ = load_language_model(str(talker))
    model.save_pretrained(tmp_path / "base")
    tiny_chat_tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"say {word}", "response": word} for word in ("good", "bad") * 4]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "base": str(tmp_path / "base"),
        "data": {"path": str(tmp_path / "train.jsonl"), "chat_template": "plain"},
        "task": "instruction",
        "learning_rate": 0.3,
        "max_steps": 2,
        "batch_size": 4,
    }
    train(load_recipe(None, values), tmp_path / "run")
    run = open_language_model(str(tmp_path / "run"))
    assert run.task.format_prompt(CHATS[0], run.tokenizer) == "Human: Hi\n\nAssistant:"
    answers = run.answer(CHATS, SHORT)
    assert answers != open_language_model(str(talker)).answer(CHATS, SHORT)
    moved = tmp_path / "base-moved"
    (tmp_path / "base").rename(moved)
    assert open_language_model(str(moved), tmp_path / "run").answer(CHATS, SHORT) == answers
    assert open_language_model(str(moved), tmp_path / "run" / "adapter").answer(CHATS, SHORT) == answers
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "alone")
    assert open_language_model(str(moved), tmp_path / "alone").answer(CHATS, SHORT) == answers


def test_an_adapter_brings_its_chat_template(talker, tmp_path):
    """To whatever reads it: its run, its folder alone, a folded checkpoint, an adapter made from it, a later run."""
    pytest.importorskip("trl")
    mine = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    mine += "{% if add_generation_prompt %}[assistant] {% endif %}"
    (tmp_path / "mine.jinja").write_text(mine)
    (tmp_path / "train.jsonl").write_text('{"prompt": "Hi", "response": "Hello"}\n' * 4)
    values = {"base": str(talker), "data": str(tmp_path / "train.jsonl"), "task": "instruction", "max_steps": 1}
    values |= {"learning_rate": 0.3, "batch_size": 2}
    train(load_recipe(None, values | {"data.chat_template": str(tmp_path / "mine.jinja")}), tmp_path / "run")
    (tmp_path / "mine.jinja").unlink()
    adapter = tmp_path / "adapter"
    shutil.copytree(tmp_path / "run" / "adapter", adapter)
    assert not list(adapter.glob("tokenizer*"))
    train(load_recipe(None, values | {"init_from": str(adapter)}), tmp_path / "later")
    compose(f'"{adapter}" + "{tmp_path / "later"}"', tmp_path / "sum")
    fold(adapter, tmp_path / "folded")
    asked = [
        (str(tmp_path / "run"), None),
        (str(tmp_path / "later"), None),
        (str(tmp_path / "folded"), None),
        (str(talker), adapter),
        (str(talker), tmp_path / "sum"),
    ]
    for model in (open_language_model(*each) for each in asked):
        assert model.task.format_prompt(CHATS[0], model.tokenizer) == "[user] Hi</s>[assistant] "
        assert len(model.answer(CHATS[:1], SHORT)) == 1


def test_runs_of_other_tasks_are_refused(tmp_path):
    (tmp_path / "seeds" / "seed-3").mkdir(parents=True)
    (tmp_path / "seeds" / "seed-3" / "recipe.yaml").touch()
    with pytest.raises(UserError, match="holds one run for each seed: choose seed-3"):
        open_language_model(str(tmp_path / "seeds"))
    run = tmp_path / "labels"
    run.mkdir()
    (run / "recipe.yaml").write_text("base: x\ndata: y.csv\n")
    (run / "result.json").write_text("{}")
    task = {"task": "token-classification", "columns": {"tokens": "tokens", "tags": "tags"}, "label_names": ["O"]}
    (run / "task.json").write_text(json.dumps({**task, "metric": "f1"}))
    with pytest.raises(
        UserError, match=r"the run in .*labels was trained for token-classification; answers need a run"
    ):
        open_language_model(str(run))
