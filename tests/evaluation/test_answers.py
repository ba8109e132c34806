"""Rows of one `generate`: each answers as it would alone, word by word, greedy or drawn."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LogitsProcessorList

from helpers.language_models import write_lora, write_prompt, write_red, write_talker
from redpeft.adapters.arithmetic import compose
from redpeft.errors import UserError
from redpeft.evaluation.answers import Sampling, answer_chat, draws, open_adapted_model, short_names

GREEDY = Sampling(temperature=0, max_new_tokens=48)
DRAWN = Sampling(temperature=1.5, top_p=0.95, top_k=40, repetition_penalty=1.2, max_new_tokens=48, seed=3)
ROWS = [{}, {"formal": 1.0}, {"brief": 1.0}, {"formal": 0.7, "brief": -0.3}, {"plain": 0.5}]
ASKED = [{"role": "user", "content": "a"}]


@pytest.fixture(scope="module")
def folder(tiny_decoder_folder, tmp_path_factory):
    """A base model, adapters of it, and mixes of these; `plain` was trained with a longer prompt."""
    folder = tmp_path_factory.mktemp("models")
    base = write_talker(folder / "talker", tiny_decoder_folder)
    for seed, name in enumerate(("formal", "brief", "plain"), 1):
        write_red(folder / name, base, seed)
    (folder / "plain" / "chat_template.jinja").write_text(
        "{% for m in messages %}Question: {{ m.content }}\n{% endfor %}"
    )
    write_lora(folder / "lora", base, seed=4)
    write_prompt(folder / "prompt", base, seed=5)
    return folder


@pytest.fixture(scope="module")
def adapted(folder):
    return open_adapted_model(str(folder / "talker"), [folder / name for name in ("formal", "brief", "plain")])


def answered(adapted, *rows, sampling=GREEDY, **options):
    """The answers, after a check that what was written are their words."""
    written = [""] * len(rows)

    def write(row, text):
        written[row] += text

    found = answer_chat(adapted, rows, ASKED, sampling, write, **options)
    assert ["".join(text.split()) for text in written] == ["".join(each.text.split()) for each in found]
    return found


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_rows_answer_as_they_would_alone(adapted, sampling):
    together = answered(adapted, *ROWS, sampling=sampling)
    assert together == [answered(adapted, row, sampling=sampling)[0] for row in ROWS]
    assert len({each.text for each in together}) == len(ROWS)
    assert len({each.tokens for each in together}) > 1, "one of them ends before the others"
    assert {each.cut for each in together} == {True, False}


def test_a_mix_in_a_row_is_the_composition(adapted, folder, tmp_path):
    compose(f'0.7 * "{folder / "formal"}" + -0.3 * "{folder / "brief"}"', tmp_path / "both")
    composed = open_adapted_model(str(tmp_path / "both"))
    assert answered(adapted, *ROWS)[3] == answered(composed, {"both": 1.0})[0]


def test_equal_adapters_draw_equal_answers_and_seeds_differ(adapted):
    first, second, other = answered(adapted, {"formal": 1.0}, {"formal": 1.0000001}, {}, sampling=DRAWN)
    assert first == second != other
    assert answered(adapted, {"formal": 1.0}, sampling=DRAWN.changed({"seed": 4}))[0] != first


def test_tokens_are_drawn_by_their_probabilities():
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draw = draws(Sampling(temperature=2, top_p=1, top_k=3), [0])
    scores = (shares**2).log().expand(1, 4)
    counts = torch.zeros(4)
    for _ in range(2000):
        counts[draw(torch.zeros(1, 1, dtype=torch.long), scores).argmax()] += 1
    expected = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95
    assert torch.allclose(counts / 2000, expected, atol=0.03)


def test_the_likeliest_token_is_taken_at_temperature_0():
    assert draws(GREEDY, [0, 0]) == LogitsProcessorList()


def test_answers_are_stopped_between_tokens(adapted):
    asked = []

    def stop():
        asked.append(0)
        return len(asked) > 3

    found = answered(adapted, *ROWS, stop=stop)
    assert {each.tokens for each in found if each.stopped} == {4}


def test_adapters_of_one_type_answer_together(folder):
    model = open_adapted_model(str(folder / "talker"), [folder / name for name in ("formal", "lora", "prompt")])
    rows = [{}, {"lora": 1.0}]
    assert answered(model, *rows) == [answered(model, row)[0] for row in rows]
    for names in (("formal", "lora"), ("prompt", "prompt")):
        with pytest.raises(
            UserError, match=r"of one type, REDPEFT or LORA, not .*(lora \(LORA\)|prompt \(PROMPT_TUN)"
        ):
            answered(model, *({name: 1.0} for name in names))
    with pytest.raises(UserError, match="lora is a LORA adapter, which answers as it is"):
        answered(model, {}, {"lora": 0.5})


def test_the_row_whose_outputs_are_not_finite_is_named(adapted):
    with pytest.raises(UserError, match=r"^the model's outputs are not finite with 1e\+38 \* brief: choose a smaller"):
        answered(adapted, {"formal": 1.0}, {"brief": 1e38})


def test_an_adapter_comes_later(folder, tmp_path):
    model = open_adapted_model(str(folder / "talker"))
    model.add("formal", folder / "formal")
    [alone] = answered(open_adapted_model(str(folder / "formal")), {"formal": 1.0})
    assert answered(model, {}, {"formal": 1.0})[1] == alone
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "REDPEFT"}))
    model.add("broken", tmp_path)
    with pytest.raises(UserError, match="no adapter_model.safetensors there"):
        answered(model, {"broken": 1.0})
    assert answered(model, {}, {"formal": 1.0})[1] == alone


def test_names_are_as_long_as_it_takes(tmp_path):
    paths = [tmp_path / name for name in ("red/seed-0", "red/seed-1", "lora/seed-0")]
    assert short_names(paths) == ["red/seed-0", "red/seed-1", "lora/seed-0"]
    assert short_names(paths[:2]) == ["seed-0", "seed-1"]
    assert short_names([tmp_path / "base"]) == [f"{tmp_path.name}/base"]
    assert short_names([]) == []
