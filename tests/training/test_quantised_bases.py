"""Recipes with `base.load_in`: a quantised base from training to prediction."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from helpers.data import write_rows
from redpeft import cli
from redpeft.errors import UserError
from redpeft.tasks.base import TASKS
from redpeft.tasks.data import read_splits
from redpeft.training.learner import load_base
from redpeft.training.predict import evaluate, load_run, predict
from redpeft.training.train import set_up, train

PACKAGES = {"8bit": "bitsandbytes", "4bit": "bitsandbytes", "int8_weight_only": "torchao"}


@pytest.fixture(params=PACKAGES)
def load_in(request) -> str:
    pytest.importorskip(PACKAGES[request.param])
    return request.param


def learned(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_train_evaluate_and_predict(load_in, tiny_encoder_folder, data_folder, tmp_path, capsys):
    def redpeft(*call: object) -> str:
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(word) for word in call])
        said = capsys.readouterr()
        assert exit_.value.code == 0, said.err
        assert "MatMul8bitLt" not in said.err
        return said.out

    base, run = [f"base.model={tiny_encoder_folder}", f"base.load_in={load_in}"], tmp_path / "run"
    recipe = [*base, f"data={data_folder}", "epochs=2", "batch_size=8"]
    result = json.loads(redpeft("train", *recipe, "--out", run, "--json"))
    assert result["trainable_parameters"] == 2 * 2 * 32 + 66  # the head is not quantised
    tensors = learned(run)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.any() for name, tensor in tensors.items() if name.endswith("scale_offset"))
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_fingerprint"] is None

    found = json.loads(redpeft("evaluate", run, data_folder, "--json"))["metrics"]
    assert found["loss"] == pytest.approx(result["test"]["loss"], abs=1e-6)
    [row] = map(json.loads, redpeft("predict", run, data_folder / "test.jsonl").splitlines()[:1])
    assert sum(row["probabilities"].values()) == pytest.approx(1)


def test_a_run_learns_what_it_would_learn_on_the_dequantised_base(
    load_in, make_recipe, tiny_encoder_folder, data_folder, tmp_path
):
    """Over three epochs, so that training goes on after evaluations."""
    recipe = make_recipe(base__load_in=load_in, task="classification")
    train(recipe, tmp_path / "quantised")
    base, _ = load_base(recipe, TASKS[recipe.task].from_splits(read_splits(recipe.data, 0), recipe.data))
    plain = AutoModel.from_pretrained(tiny_encoder_folder)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, torch.nn.Linear):
                weight = dequantize_module_weight(base.get_submodule(f"{base.base_model_prefix}.{name}"))
                assert not torch.equal(module.weight, weight)
                module.weight.copy_(weight)
    plain.save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(tiny_encoder_folder).save_pretrained(tmp_path / "plain")
    train(make_recipe(base=str(tmp_path / "plain")), tmp_path / "dequantised")
    found, expected = learned(tmp_path / "quantised"), learned(tmp_path / "dequantised")
    assert found.keys() == expected.keys()
    for name in found:
        # units are measured in evaluation mode, where 8bit rounds the inputs too
        allowed = 0.02 if load_in == "8bit" and name.endswith("unit") else 1e-3
        assert (found[name] - expected[name]).norm() < allowed * expected[name].norm(), name


@pytest.mark.parametrize(
    ("load_in", "method"), [("8bit", "ia3"), ("4bit", "lora"), ("int8_weight_only", "lora")], indirect=["load_in"]
)
def test_the_baselines_too(load_in, method, make_recipe, data_folder, tmp_path):
    result = train(make_recipe(base__load_in=load_in, method=method, max_steps=7), tmp_path / "run")
    scores = evaluate(load_run(tmp_path / "run"), str(data_folder / "validation.jsonl"))
    assert scores["loss"] == pytest.approx(result["validation"]["loss"], abs=1e-4)


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instructions")
    rows = [{"prompt": f"say {word}", "response": word} for word in ("good", "bad") * 8]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"task": "instruction", "data": str(folder), "epochs": 2, "learning_rate": 0.3}


def test_instructions_in_bf16(load_in, instructions, tiny_decoder_folder, make_recipe, tmp_path):
    pytest.importorskip("trl")
    base = {"base": {"model": str(tiny_decoder_folder), "load_in": load_in, "dtype": "bf16"}}
    result = train(make_recipe(**instructions, **base), tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert run.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in learned(tmp_path / "run").values()} == {torch.float32}
    scores = evaluate(run, f"{instructions['data']}/validation.jsonl")
    assert scores["loss"] == pytest.approx(result["validation"]["loss"], abs=1e-4)
    assert all("text" in answer for answer in predict(run, ["say good", "say bad"], max_new_tokens=3))


@pytest.mark.parametrize("task", ["preference", "reward"])
def test_preferences_and_rewards(task, load_in, tiny_decoder_folder, make_recipe, tmp_path):
    """TRL makes what is trained on a quantised base bf16; here edits stay fp32."""
    pytest.importorskip("trl")
    row = {"prompt": "say", "rejected": "no", "response": "yes"}
    write_rows(tmp_path / "rows.jsonl", [row | {"chosen": word} for word in "abcd" * 4])
    fields = {"task": task, "data": str(tmp_path / "rows.jsonl"), "epochs": 1, "learning_rate": 0.1}
    if task == "reward":
        few = {"batch_size": 2, "num_generations": 2, "max_completion_length": 4, "max_steps": 1}
        fields |= {"reward": "exact_match", "beta": 0.1, **few}
    recipe = make_recipe(base=str(tiny_decoder_folder), base__load_in=load_in, **fields)
    train(recipe, tmp_path / "run")
    first = learned(tmp_path / "run")
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}
    again = recipe.model_copy(update={"init_from": str(tmp_path / "run"), "method_options": {}})
    _, trainer = set_up(again.alone(), tmp_path / "again")
    begun = trainer.model.state_dict()
    assert all(torch.equal(begun[name.replace("edit.", "edit.default.")], tensor) for name, tensor in first.items())


def test_a_quantiser_that_finds_nothing_to_do(instructions, tiny_decoder_folder, make_recipe, tmp_path):
    """torchao takes linear layers, and GPT-2 has none."""
    pytest.importorskip("trl")
    pytest.importorskip("torchao")
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder_folder)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    recipe = make_recipe(**instructions, base={"model": str(tmp_path / "gpt2"), "load_in": "int8_weight_only"})
    with pytest.raises(UserError, match="int8_weight_only changes no weight of GPT2LMHeadModel: choose a"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_quantised_already(instructions, tiny_decoder_folder, make_recipe, tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(tiny_decoder_folder, quantization_config=four).save_pretrained(tmp_path / "4")
    AutoTokenizer.from_pretrained(tiny_decoder_folder).save_pretrained(tmp_path / "4")
    result = train(make_recipe(**instructions, base=str(tmp_path / "4")), tmp_path / "run")
    assert result["trainable_parameters"] == 2 * 2 * 32
    run = load_run(tmp_path / "run")
    assert any(type(parameter).__name__ == "Params4bit" for parameter in run.model.parameters())
    scores = evaluate(run, f"{instructions['data']}/validation.jsonl")
    assert scores["loss"] == pytest.approx(result["validation"]["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("load_in", "says"),
    [
        ("8bit", r"base.load_in 8bit needs bitsandbytes: pip install redpeft\[bnb\]"),
        ("4bit", r"base.load_in 4bit needs bitsandbytes: pip install redpeft\[bnb\]"),
        ("int8_weight_only", r"base.load_in int8_weight_only needs torchao: pip install redpeft\[torchao\]"),
    ],
)
def test_a_missing_extra_is_named_before_anything_is_written(load_in, says, make_recipe, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "redpeft.models.formats.importlib.util.find_spec",
        lambda name, *rest: None if name in PACKAGES.values() else find(name, *rest),
    )
    with pytest.raises(UserError, match=f"^{says}$"):
        train(make_recipe(base__load_in=load_in), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="computes on a GPU")
def test_a_cpu_without_bf16_instructions_says_so_before_the_first_step(make_recipe, tmp_path, capsys, monkeypatch):
    says = "bf16 takes 42 times as long as fp32 on this CPU, which has no instructions for it: set "
    monkeypatch.setattr("redpeft.training.learner.bf16_slowdown", lambda: 41.7)
    train(make_recipe(precision="bf16", max_steps=1), tmp_path / "slow")
    said = capsys.readouterr().err
    assert f"{says}precision to fp32\n" in said
    assert said.index(says) < said.index("step 1:")
    train(make_recipe(base__dtype="bf16", max_steps=1), tmp_path / "by_dtype")
    assert f"{says}precision and base.dtype to fp32\n" in capsys.readouterr().err
    train(make_recipe(max_steps=1), tmp_path / "fp32")
    assert says not in capsys.readouterr().err
    monkeypatch.setattr("redpeft.training.learner.bf16_slowdown", lambda: 1.2)
    train(make_recipe(precision="bf16", max_steps=1), tmp_path / "quick")
    assert says not in capsys.readouterr().err
