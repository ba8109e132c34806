"""On a GPU an edit does what it does on the CPU in float64: in every number format, compiled, mixed, merged."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import redpeft
from helpers.devices import ON_A_GPU
from redpeft import RedConfig

pytestmark = ON_A_GPU
MODELS = [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert_classifier", "SEQ_CLS")]
FP32, BF16 = 1e-4, 3e-2  # what rounding may do to an output or a gradient, relative to its norm


def on_gpu(inputs):
    return {name: value.cuda() for name, value in inputs.items()}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


def outputs_and_gradients(model: nn.Module, edits, inputs) -> list[torch.Tensor]:
    """The logits, and the gradient of every scale and bias."""
    output = model(**inputs)
    output.loss.backward()
    return [output.logits, *(vector.grad for edit in edits for vector in edit.parameters())]


@pytest.fixture(params=MODELS, ids=lambda model: model[0])
def case(request, tiny):
    """A model with edits far from the identity; its inputs; and what it gives on the CPU in float64."""
    name, task = request.param
    model = tiny.with_edits(getattr(tiny, name)(), task)
    inputs = tiny.batch(task)
    exact = copy.deepcopy(model).double()
    return model, inputs, outputs_and_gradients(exact, tiny.edits(exact), inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_outputs_and_gradients(tiny, case, dtype, tolerance, autocast, compiled):
    model, inputs, expected = case
    model = model.to("cuda", dtype)
    assert tiny.dtypes(model) == {torch.float32}
    called = torch.compile(model) if compiled else model
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found = outputs_and_gradients(called, tiny.edits(model), on_gpu(inputs))
    assert len(found) == len(expected)
    for own, exact in zip(found, expected, strict=True):
        assert distance(own, exact) < (BF16 if autocast else tolerance)


def test_units_are_those_of_the_cpu(tiny):
    models = [get_peft_model(tiny.llama().to(device), RedConfig(task_type="CAUSAL_LM")) for device in ("cpu", "cuda")]
    units, on_cuda = (redpeft.calibrate(model) for model in models)
    assert on_cuda == pytest.approx(units, rel=1e-5)
    assert all(unit not in (0, 1) for unit in units.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_moves_only_the_edits(tiny, dtype):
    model = get_peft_model(tiny.llama(dtype).cuda(), RedConfig(task_type="CAUSAL_LM"))
    with tiny.only_edits_move(model):
        losses = tiny.train(model, on_gpu(tiny.batch()))
    assert losses[-1] < losses[0]
    assert tiny.dtypes(model) == {torch.float32}


def test_a_forward_pass_does_not_wait_for_the_gpu(tiny):
    """Whoever asks for a value of a tensor there does."""
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).cuda()
    model = get_peft_model(base, RedConfig(target_modules=["0", "1"], unit=0.5)).train()
    hidden = torch.randn(3, 8, device="cuda")
    model(hidden).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(hidden).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def three(tiny):
    """A Llama on the GPU with three adapters that differ."""
    model = tiny.with_edits(tiny.llama(), "CAUSAL_LM")
    for seed, name in enumerate(("b", "c"), start=1):
        model.add_adapter(name, RedConfig(task_type="CAUSAL_LM"))
        tiny.far(model, name, seed)
    return model.cuda().eval()


@torch.no_grad()
def test_each_sequence_of_a_batch_has_its_own_adapter(tiny, three):
    rows = ["default", "c", "__base__", "b"]
    ids = tiny.tokens().cuda()
    mixed = three(input_ids=ids, adapter_names=rows).logits
    options = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    texts = three.generate(input_ids=ids, adapter_names=rows, **options)
    for row, name in enumerate(rows):
        one = ids[row : row + 1]
        if name == "__base__":
            with three.disable_adapter():
                alone, text = three(input_ids=one).logits, three.generate(input_ids=one, **options)
        else:
            three.set_adapter(name)
            alone, text = three(input_ids=one).logits, three.generate(input_ids=one, **options)
        assert distance(mixed[row], alone[0]) < FP32
        assert torch.equal(texts[row], text[0])


@pytest.mark.parametrize(("name", "task"), MODELS)
@torch.no_grad()
def test_merging_and_back(tiny, name, task):
    """Also where the model moves while it is merged."""
    model = tiny.with_edits(getattr(tiny, name)(), task).cuda()
    inputs = on_gpu({"input_ids": tiny.tokens()})
    before, weights = model(**inputs).logits, copy.deepcopy(model.state_dict())
    model.merge_adapter()
    assert distance(model(**inputs).logits, before) < FP32
    model.cpu()
    model.cuda()
    model.unmerge_adapter()
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert [key for key in after if not torch.equal(after[key], weights[key])] == []
    assert torch.equal(model(**inputs).logits, before)


def test_a_saved_adapter_is_the_same_on_both_devices(tiny, tmp_path):
    model = tiny.with_edits(tiny.llama().cuda(), "CAUSAL_LM")
    model.save_pretrained(tmp_path)
    for device in ("cpu", "cuda"):
        again = PeftModel.from_pretrained(tiny.llama().to(device), tmp_path).eval()
        assert {tensor.device.type for tensor in tiny.values(again)} == {device}
        tiny.assert_same([value.cpu() for value in tiny.values(again)], [v.cpu() for v in tiny.values(model)])
        logits = again(input_ids=tiny.tokens().to(device)).logits
        assert distance(logits, model(input_ids=tiny.tokens().cuda()).logits) < FP32
