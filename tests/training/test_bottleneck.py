from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MobileBertConfig,
    MobileBertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers.training import learn
from redpeft import find_sites
from redpeft.errors import UserError
from redpeft.training.learner import apply_method, check_options
from redpeft.training.own_baselines import Bottleneck
from redpeft.training.recipe import load_recipe

WIDTH, INNER, VOCAB = 16, 32, 50


def bert(layers=2):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": INNER}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCAB, hidden_size=WIDTH, **sizes)).eval()


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "d_ff": INNER, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64)).eval()


def recipe(method="adapter", task="classification", **options):
    return load_recipe(None, {"base": "m", "data": "d", "method": method, "task": task, "method_options": options})


def ids(seed=1):
    return torch.randint(5, VOCAB, (3, 7), generator=torch.Generator().manual_seed(seed))


def randomize(model, scale=2.0):
    """Adapters far from the identity."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".bottleneck." in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def naive(adapter, hidden, activation):
    """h + up(f(down(h))), one vector at a time in float64."""
    functions = {
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "relu": lambda x: torch.where(x > 0, x, 0 * x),
        "silu": lambda x: x / (1 + torch.exp(-x)),
    }
    down, up = (adapter.get_submodule(name) for name in ("down", "up"))
    rows = []
    for vector in hidden.double().reshape(-1, hidden.shape[-1]):
        inner = torch.stack([(row * vector).sum() for row in down.weight.double()]) + down.bias.double()
        inner = functions[activation](inner)
        rows.append(vector + torch.stack([(row * inner).sum() for row in up.weight.double()]) + up.bias.double())
    return torch.stack(rows).reshape(hidden.shape)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_the_arithmetic(activation):
    torch.manual_seed(0)
    adapter = Bottleneck(6, 4, activation)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=2)
    hidden = 30 * torch.randn(2, 5, 6)
    torch.testing.assert_close(adapter(hidden).double(), naive(adapter, hidden, activation), rtol=1e-5, atol=1e-3)
    half = adapter(hidden.bfloat16())
    assert half.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    torch.testing.assert_close(half.double(), naive(adapter, hidden.bfloat16(), activation), rtol=2e-2, atol=2)


def test_the_gradients():
    torch.manual_seed(0)
    adapter = Bottleneck(5, 3, "gelu").double()
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in adapter.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in adapter.parameters()]

    def run(hidden, *values):
        return torch.func.functional_call(adapter, dict(zip(names, values, strict=True)), hidden)

    assert torch.autograd.gradcheck(run, (hidden, *values))


def test_it_begins_near_the_identity_and_can_leave_it():
    torch.manual_seed(0)
    adapter, hidden = Bottleneck(256, 64, "gelu"), torch.randn(9, 256)
    assert 0 < (adapter(hidden) - hidden).abs().max() < 1e-3
    weights = torch.cat([adapter.down.weight.flatten(), adapter.up.weight.flatten()])
    assert weights.abs().max() <= 2e-3
    # a normal distribution cut at two standard deviations has 0.88 of its spread
    assert weights.std().item() == pytest.approx(0.88e-3, rel=0.02)
    adapter(hidden).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())
    before = bert()(ids()).logits
    torch.testing.assert_close(apply_method(bert(), recipe())(ids()).logits, before, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("method", "activation"), [("adapter", "gelu"), ("adapter_ffn", "relu")])
def test_it_acts_before_the_residual_sum_and_the_norm(method, activation):
    model = apply_method(bert(), recipe(method, bottleneck=4))
    randomize(model)
    seen = {}
    for name in ("attention.output", "output"):
        part = model.bert.encoder.layer[1].get_submodule(name)
        part.register_forward_hook(lambda module, given, output, name=name: seen.update({name: (*given, output)}))
    model(ids())
    for name, (hidden, residual, output) in seen.items():
        part = model.bert.encoder.layer[1].get_submodule(name)
        projected = hidden @ part.dense.weight.T + part.dense.bias
        if method == "adapter" or name == "output":
            projected = naive(part.dense.bottleneck, projected, activation).float()
        torch.testing.assert_close(output, part.LayerNorm(projected + residual), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "norms"), [("adapter", True), ("adapter_ffn", False)])
@pytest.mark.parametrize(("build", "task"), [(bert, "classification"), (gpt2, "instruction"), (t5, "text-to-text")])
def test_what_moves(build, task, method, norms):
    model = apply_method(build(), recipe(method, task, bottleneck=4))
    labels = torch.tensor([0, 1, 1]) if task == "classification" else ids(2)
    moved = learn(model, 0.1, 3, input_ids=ids(), labels=labels)
    names = dict(model.named_parameters())
    adapters = {name for name in names if ".bottleneck." in name}
    expected = {
        name
        for name in names
        if name in adapters or name.startswith("classifier") or (norms and ("norm" in name.lower() or "ln_" in name))
    }
    assert moved == expected
    sites = [site.name for site in find_sites(model, ["attention", "ffn"] if method == "adapter" else "ffn")]
    assert {name.partition(".bottleneck")[0] for name in adapters} == set(sites)
    assert len(sites) == (2 if method == "adapter" else 1) * (4 if build is t5 else 2)


def test_no_adapter_in_cross_attention():
    model = apply_method(t5(), recipe("adapter", "text-to-text"))
    adapted = {name.partition(".bottleneck")[0] for name, _ in model.named_parameters() if ".bottleneck." in name}
    assert len(adapted) == 2 * 2 * 2
    assert not any("EncDecAttention" in name for name in adapted)


@pytest.mark.parametrize(("build", "task"), [(bert, "classification"), (t5, "text-to-text")])
def test_dropped_layers_are_left_alone(build, task):
    plain, model = build(), build()
    model = apply_method(model, recipe("adapter_drop", task, drop_layers=1, bottleneck=4))
    randomize(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    low = ("bert.encoder.layer.0.", "encoder.block.0.", "decoder.block.0.")
    assert not any(name.startswith(low) for name in trained)
    assert "bert.embeddings.LayerNorm.weight" not in trained
    inside = ("bert.encoder.layer.1.", "encoder.block.1.", "decoder.block.1.", "classifier.")
    assert all(name.startswith(inside) for name in trained)
    norms = [name for name in trained if "norm" in name.lower() and name.endswith("weight")]
    assert len(norms) == (2 if build is bert else 2 + 3)
    inputs = {"input_ids": ids()} if build is bert else {"input_ids": ids(), "decoder_input_ids": ids(2)}
    key = "hidden_states" if build is bert else "encoder_hidden_states"
    ours, theirs = (m(**inputs, output_hidden_states=True)[key] for m in (model, plain))
    torch.testing.assert_close(ours[1], theirs[1])
    assert (ours[2] - theirs[2]).abs().max() > 0.1


def test_the_size_follows_the_width():
    for method, options, size in (("adapter", {}, 1), ("adapter_ffn", {}, 1), ("adapter", {"bottleneck": 5}, 5)):
        model = apply_method(bert(), recipe(method, **options))
        assert model.bert.encoder.layer[0].output.dense.bottleneck.down.weight.shape == (size, WIDTH)


def test_blocks_that_share_a_module_share_the_adapter():
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": INNER, "embedding_size": 8}
    config = AlbertConfig(vocab_size=VOCAB, hidden_size=WIDTH, **sizes)
    model = apply_method(AlbertForSequenceClassification(config), recipe("adapter_ffn", bottleneck=4))
    adapters = [name for name, _ in model.named_parameters() if name.endswith("bottleneck.down.weight")]
    assert len(adapters) == 1


def test_bottlenecks_of_the_model_itself_stay_frozen():
    config = MobileBertConfig(vocab_size=VOCAB, num_hidden_layers=1, num_attention_heads=2)
    model = apply_method(MobileBertForSequenceClassification(config), recipe("adapter_ffn"))
    trained = {name.rpartition(".bottleneck.")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained - {""}) == len(find_sites(model, "ffn"))


def test_the_base_keeps_its_names_and_can_be_half_precision():
    base = bert().to(torch.bfloat16)
    names = {name for name, _ in base.named_parameters()}
    model = apply_method(base, recipe("adapter_ffn"))
    assert names < {name for name, _ in model.named_parameters()}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.bert.encoder.layer[0].output.dense.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (recipe("adapter", bottleneck=0), "method_options: bottleneck: .*greater than or equal to 1, not 0"),
        (recipe("adapter", activation="step"), "method_options: activation: .*'gelu', 'relu' or 'silu', not 'step'"),
        (recipe("adapter_ffn", sites=["qkv"]), "method_options: sites.0: .*'attention' or 'ffn', not 'qkv'"),
        (recipe("adapter", size=8), "BottleneckOptions has no 'size'; did you mean 'sites'"),
    ],
)
def test_wrong_options_are_found_without_a_model(chosen, message):
    with pytest.raises(UserError, match=message) as caught:
        check_options(chosen)
    assert "\n" not in str(caught.value)


def test_no_block_left():
    message = "method_options: drop_layers 5 leaves no block of BertForSequenceClassification with an adapter"
    with pytest.raises(UserError, match=message):
        apply_method(bert(), recipe("adapter_drop"))
