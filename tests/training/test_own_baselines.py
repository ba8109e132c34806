from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from redpeft.errors import UserError
from redpeft.training.learner import apply_method
from redpeft.training.own_baselines import norm_parameters
from redpeft.training.recipe import load_recipe

VOCAB, WIDTH, INNER = 50, 16, 32
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": INNER}


def bert():
    return BertForSequenceClassification(BertConfig(vocab_size=VOCAB, **SIZES)).eval()


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **SIZES)).eval()


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "d_ff": INNER, "d_kv": 8, "num_layers": 3, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes)).eval()


def recipe(method, task="instruction", **options):
    return load_recipe(None, {"base": "m", "data": "d", "method": method, "task": task, "method_options": options})


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_top_layers():
    names = trained(apply_method(bert(), recipe("top_layers", "classification")))
    top = ("bert.encoder.layer.1.", "bert.encoder.layer.2.", "classifier.")
    assert names == {name for name, _ in bert().named_parameters() if name.startswith(top)}
    assert trained(apply_method(llama(), recipe("top_layers", layers=1))) == {
        name for name, _ in llama().named_parameters() if name.startswith("model.layers.2.")
    }
    both = trained(apply_method(t5(), recipe("top_layers", "text-to-text", layers=1)))
    assert {name.partition(".layer.")[0] for name in both} == {"encoder.block.2", "decoder.block.2"}


def test_more_layers_than_there_are():
    message = "method_options: layers 4 is more than bert.encoder.layer has, 3: choose a smaller number"
    with pytest.raises(UserError, match=message):
        apply_method(bert(), recipe("top_layers", "classification", layers=4))
    with pytest.raises(UserError, match="layers: Input should be greater than or equal to 1, not 0"):
        apply_method(bert(), recipe("top_layers", "classification", layers=0))


@pytest.mark.parametrize(("build", "task"), [(llama, "instruction"), (t5, "text-to-text")])
def test_added_biases_act_as_biases(build, task):
    inputs = {"input_ids": torch.arange(5, 12)[None]}
    inputs |= {"decoder_input_ids": torch.arange(3, 7)[None]} if build is t5 else {}
    plain, model = build(), build()
    had = {name for name, _ in plain.named_parameters()}
    apply_method(model, recipe("bitfit", task, add_biases=True))
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)
    added = trained(model)
    assert added == {name for name, _ in model.named_parameters()} - had
    linears = [name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)]
    norms = [name.removesuffix(".weight") for name in norm_parameters(plain)]
    assert len(norms) == (3 * 2 + 1 if build is llama else 3 * 2 + 3 * 3 + 2)
    assert added == {f"{name}.bias" for name in [*linears, *norms]}

    given = {}
    for name in (linears[2], norms[0]):
        module = model.get_submodule(name)
        torch.nn.init.normal_(module.bias, std=3)
        module.register_forward_hook(lambda module, args, output, name=name: given.update({name: (args[0], output)}))
    model(**inputs)
    for name, (hidden, output) in given.items():
        expected = plain.get_submodule(name)(hidden) + model.get_submodule(name).bias
        torch.testing.assert_close(output, expected)


def test_biases_that_are_there_stay():
    model, plain = bert(), bert()
    model.load_state_dict(plain.state_dict())
    apply_method(model, recipe("bitfit", "classification", add_biases=True))
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_norms_of_a_model():
    assert norm_parameters(bert()) == {name for name, _ in bert().named_parameters() if "LayerNorm" in name}
    assert norm_parameters(llama()) == {name for name, _ in llama().named_parameters() if "norm" in name}


def test_a_bias_that_is_missing():
    with pytest.raises(UserError, match="LlamaForCausalLM has none: set method_options.add_biases=true"):
        apply_method(llama(), recipe("bitfit"))
    with pytest.raises(UserError, match="BitFitOptions has no 'add_bias'; did you mean 'add_biases'"):
        apply_method(llama(), recipe("bitfit", add_bias=True))
