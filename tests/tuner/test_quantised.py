"""RED on quantised bases: it learns there what it learns on a plain model that holds the same numbers."""

from __future__ import annotations

import copy
import logging
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from redpeft import RedConfig, calibrate
from redpeft.errors import UserError
from redpeft.models import PACKS

QUANTISERS = ["8bit", "4bit", "int8_weight_only"]
LINEARS = {"8bit": "Linear8bitLt", "4bit": "Linear4bit", "int8_weight_only": "Linear"}
ERROR = {"8bit": 0.02, "4bit": 0.15, "int8_weight_only": 0.02}  # of the weights, relative norm
HEADS = ["classifier", "lm_head"]
SHAPE = {  # multiples of 64 and weights far from zero, so that every layer takes part in the result
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
BERT = {"num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def quantisation(quantiser: str) -> transformers.utils.quantization_config.QuantizationConfigMixin:
    if quantiser == "int8_weight_only":
        torchao = pytest.importorskip("torchao.quantization", reason="needs the extra [torchao]")
        return transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=HEADS)
    pytest.importorskip("bitsandbytes", reason="needs the extra [bnb]")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    options = four if quantiser == "4bit" else {"load_in_8bit": True}
    return transformers.BitsAndBytesConfig(**options, llm_int8_skip_modules=HEADS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    models = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)),
        "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SHAPE, **BERT)),
    }
    folder = tmp_path_factory.mktemp("plain")
    for name, build in models.items():
        torch.manual_seed(0)
        build().save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


@pytest.fixture(params=QUANTISERS)
def quantiser(request) -> str:
    return request.param


@pytest.fixture(params=["llama", "bert"])
def case(request, quantiser, folders) -> SimpleNamespace:
    """`load()` gives the quantised base, `config` and `batch` go with it."""
    kind, task = {
        "llama": (transformers.LlamaForCausalLM, "CAUSAL_LM"),
        "bert": (transformers.BertForSequenceClassification, "SEQ_CLS"),
    }[request.param]
    options = {"quantization_config": quantisation(quantiser), "dtype": torch.float32}
    return SimpleNamespace(
        load=lambda: kind.from_pretrained(folders[request.param], **options).eval(),
        config=RedConfig(task_type=task),
        batch=lambda tiny: tiny.batch(task),
    )


def numbers(module: nn.Module) -> torch.Tensor:
    """What a module's weight stands for, by each maker's formula."""
    weight = module.weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if type(weight).__name__ == "Int8Params":  # rows in units of their largest value / 127
        largest = module.state.SCB if weight.SCB is None else weight.SCB
        return weight.data * largest[:, None] / 127
    return weight.detach() if type(weight) is nn.Parameter else weight.dequantize()


@torch.no_grad()
def dequantised(model: nn.Module) -> nn.Module:
    """A plain model that holds the numbers for which the quantised weights stand."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config")
    plain = type(model)(config)
    for name, parameter in plain.named_parameters():
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        parameter.copy_(numbers(module) if last == "weight" else getattr(module, last))
    return plain.eval()


def pair(case: SimpleNamespace, tiny: SimpleNamespace) -> tuple[nn.Module, nn.Module]:
    """The quantised and the dequantised model with the same edits, far from the identity."""
    base = case.load()
    return tuple(tiny.far(get_peft_model(model, copy.copy(case.config))) for model in (base, dequantised(base)))


def learn(model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a step in the model's mode, and the gradients of the edits and of the head."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_near(found: torch.Tensor, expected: torch.Tensor, error: float, name: str = "") -> None:
    assert found.dtype == expected.dtype == torch.float32
    assert (found - expected).norm() <= error * expected.norm(), name
    assert expected.norm() > 0


def assert_same_gradients(model: nn.Module, twin: nn.Module, batch: dict, error: float = 1e-4) -> None:
    (loss, gradients), (twin_loss, twin_gradients) = learn(model, batch), learn(twin, batch)
    assert_near(loss, twin_loss, error)
    assert sum("redpeft_edit" in name for name in gradients) == 2 * 2
    for name, gradient in gradients.items():
        assert_near(gradient, twin_gradients[name], error, name)


def test_the_dequantised_model_is_near_the_one_that_was_quantised(case, quantiser, folders):
    base = case.load()
    original = type(base).from_pretrained(folders[base.config.model_type])
    plain = dequantised(base)
    linears = [name for name, module in base.named_modules() if type(module).__name__ == LINEARS[quantiser]]
    changed = {name for name in linears if type(base.get_submodule(name).weight) is not nn.Parameter}
    assert len(changed) >= 2 * 6
    for name, weight in plain.named_parameters():
        owner = name.rpartition(".")[0]
        error = (weight - original.get_parameter(name)).norm() / original.get_parameter(name).norm()
        assert error < ERROR[quantiser] if owner in changed and name.endswith("weight") else not error > 0


def test_loss_and_gradients_are_those_of_the_dequantised_model(case, tiny):
    model, twin = (each.train() for each in pair(case, tiny))
    assert_same_gradients(model, twin, case.batch(tiny))


def test_gradients_are_right_after_an_evaluation_and_a_checkpoint(case, tiny):
    """Where bitsandbytes packs 4-bit weights in an evaluation, the first block's gradients would be off by 90 %."""
    model, twin = pair(case, tiny)
    with torch.no_grad():
        model.eval()(**case.batch(tiny))
    model.state_dict()
    assert_same_gradients(model.train(), twin.train(), case.batch(tiny))


def test_a_few_steps_learn_the_same(case, quantiser, tiny):
    model, twin = pair(case, tiny)
    base = {n: numbers(m) for n, m in model.named_modules() if type(m).__name__ == LINEARS[quantiser]}
    losses, twin_losses = (tiny.train(each, case.batch(tiny), steps=4, lr=0.03) for each in (model, twin))
    assert losses == pytest.approx(twin_losses, rel=1e-3)
    assert losses[-1] < losses[0]
    assert tiny.dtypes(model) == {torch.float32}
    for edit, other in zip(tiny.edits(model), tiny.edits(twin), strict=True):
        assert_near(edit.offset.detach(), other.offset.detach(), 1e-4)
        assert_near(edit.bias.detach(), other.bias.detach(), 1e-4)
    assert all(torch.equal(numbers(model.get_submodule(name)), base[name]) for name in base)


def test_units_are_those_of_the_dequantised_model(case, quantiser, tiny):
    base = case.load()
    units, twin_units = (
        calibrate(get_peft_model(model, copy.copy(case.config)), case.batch(tiny))
        for model in (base, dequantised(base))
    )
    assert 1.0 not in units.values()
    assert units == pytest.approx(twin_units, rel=0.05 if quantiser == "8bit" else 1e-5)


@pytest.mark.parametrize("quantiser", ["8bit"], indirect=True)
def test_8_bit_evaluation_rounds_the_inputs_too(case, tiny):
    """As 8-bit training does on a GPU: columns of inputs with values beyond the threshold of 6 in fp16, all others in
    8 bits. The gradients are those of the rounded inputs."""
    model, twin = pair(case, tiny)
    batch = case.batch(tiny)
    assert (learn(model, batch)[0] - learn(twin, batch)[0]).abs() > 1e-6
    assert_same_gradients(model, twin, batch, error=0.1)


def test_an_adapter_saved_and_loaded_on_a_quantised_base(case, quantiser, tiny, tmp_path):
    model, _ = pair(case, tiny)
    batch = case.batch(tiny)
    tiny.train(model, batch)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.load(), tmp_path, is_trainable=True).eval()
    tiny.assert_same(tiny.values(again), tiny.values(model))
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(again(**batch).logits, expected)
        for_inference = PeftModel.from_pretrained(case.load(), tmp_path).eval()
        # in 4 bits a CPU with AVX512-BF16 computes in bf16 here
        assert_near(for_inference(**batch).logits, expected, 0.05 if quantiser == "4bit" else 1e-6)


@torch.no_grad()
def test_a_batch_that_mixes_adapters(case, quantiser, tiny):
    model = get_peft_model(case.load(), case.config).eval()
    model.add_adapter("other", copy.copy(case.config))
    tiny.far(model)
    tiny.far(model, "other", seed=1)
    ids = case.batch(tiny)["input_ids"]
    names = ["other", "default", "__base__", "other"]
    mixed = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        model.set_adapter("default" if name == "__base__" else name)
        if name == "__base__":
            with model.disable_adapter():
                alone = model(input_ids=ids).logits[row]
        else:
            alone = model(input_ids=ids).logits[row]
        # in 8 bits the columns that go in fp16 are chosen over the whole batch
        assert_near(mixed[row], alone, 0.05 if quantiser == "8bit" else 1e-5, name)


@torch.no_grad()
def test_quantised_layers_are_edited_but_not_merged(case, quantiser, tiny):
    model = get_peft_model(case.load(), case.config).eval()
    batch = case.batch(tiny)
    clean = model(**batch).logits
    assert not torch.equal(tiny.far(model)(**batch).logits, clean)
    message = f"the weights of {LINEARS[quantiser]} are quantised or sharded .* merge into the unquantised model"
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UserError, match=f"cannot be merged: {message}"):
            merge()
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, clean)


def test_a_missing_fingerprint_is_logged(case, folders, caplog, tmp_path):
    caplog.set_level(logging.INFO, "redpeft")
    base = case.load()
    model = get_peft_model(base, case.config)
    assert model.peft_config["default"].base_fingerprint is None
    line = "adapter 'default': the base model's weights are quantised, .* its fingerprint cannot be taken"
    assert [record.name for record in caplog.records] == ["redpeft.tuner.model"]
    assert caplog.records[0].levelno == logging.INFO
    assert re.match(line, caplog.records[0].getMessage())
    caplog.clear()
    get_peft_model(dequantised(case.load()), copy.copy(case.config))
    assert not caplog.records


@pytest.mark.parametrize("quantiser", ["4bit"], indirect=True)
def test_only_an_adapter_that_is_trained_needs_unpacked_weights(case, tiny, tmp_path):
    def allowed(model: nn.Module) -> set[bool]:
        return {getattr(module, PACKS) for module in model.modules() if hasattr(module, PACKS)}

    base = case.load()
    if not allowed(base):
        pytest.skip("this bitsandbytes does not pack")
    before = allowed(base)
    model = get_peft_model(base, case.config)
    assert allowed(model) == {False}
    model.save_pretrained(tmp_path)
    assert allowed(PeftModel.from_pretrained(case.load(), tmp_path)) == before
