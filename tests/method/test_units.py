"""The unit of the bias: what it measures, what it refuses, and the invariance that it is there for."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from redpeft import RedConfig, RedLayer
from redpeft.errors import UserError
from redpeft.method.units import MAX_VALUES, typical_size


def test_it_is_the_standard_deviation_of_a_normal_sample_whatever_a_few_outliers_do():
    hidden = 0.7 * torch.randn(64, 128, 32, generator=torch.Generator().manual_seed(0))
    assert float(typical_size(hidden, "site")) == pytest.approx(0.7, rel=0.01)
    hidden[..., 3] *= 1000
    assert float(typical_size(hidden, "site")) == pytest.approx(0.7, rel=0.06)


def test_it_reads_at_most_about_a_million_values_from_all_channels():
    width = 1024
    hidden = torch.arange(1.0, width + 1).repeat(4 * MAX_VALUES // width, 1)
    assert float(typical_size(hidden, "site")) == pytest.approx(1.4826 * width / 2, rel=0.01)


def test_zeros_in_the_majority_are_left_out():
    hidden = torch.zeros(10, 8)
    hidden[0] = 2.0
    assert float(typical_size(hidden, "site")) == pytest.approx(2 * 1.4826)


@pytest.mark.parametrize(
    ("hidden", "what"), [(torch.zeros(2, 3, 4), "zero everywhere"), (torch.full((2, 4), torch.nan), "not finite")]
)
def test_an_output_without_a_size_is_an_error(hidden, what):
    with pytest.raises(UserError, match=f"output of layers.0.mlp is {what}.*unit=1"):
        typical_size(hidden, "layers.0.mlp")


def test_a_size_of_exactly_one_is_told_from_not_measured():
    assert float(typical_size(torch.full((4, 4), 1 / 1.4826, dtype=torch.float64), "site")) != 1.0


def llama(dtype=torch.float64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def gpt2(dtype=torch.float64):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        tie_word_embeddings=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype)


def stretch(model, factor):
    """The same function with a residual stream `factor` times as large: what writes into it grows, norms' eps too."""
    model = copy.deepcopy(model)
    writes = ("embed_tokens", "wte", "wpe", "o_proj", "down_proj", "c_proj")
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(writes):
                for parameter in module.parameters(recurse=False):
                    parameter.mul_(factor)
            for eps in ("variance_epsilon", "eps"):
                if ("ln_" in name or "norm" in name) and hasattr(module, eps):
                    setattr(module, eps, getattr(module, eps) * factor**2)
    return model


def train(model, unit, steps=12):
    model = get_peft_model(model, RedConfig(task_type="CAUSAL_LM", unit=unit))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-2)
    generator = torch.Generator().manual_seed(1)
    outputs = []
    model.train()
    for _ in range(steps):
        tokens = torch.randint(0, 60, (4, 12), generator=generator)
        result = model(input_ids=tokens, labels=tokens)
        outputs.append(result.logits.detach())
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    return torch.stack(outputs), model


# Llama's norm computes in fp32 whatever the model's dtype, and Adam turns that rounding into steps of its own.
@pytest.mark.parametrize(("build", "tolerance"), [(llama, 1e-4), (gpt2, 1e-9)])
@pytest.mark.parametrize("factor", [1 / 30, 30])
def test_training_does_not_depend_on_the_size_of_the_residual_stream(build, tolerance, factor):
    plain, _ = train(build(), "auto")
    stretched, model = train(stretch(build(), factor), "auto")
    assert (plain[-1] - plain[0]).abs().max() > 0.01  # it did learn
    torch.testing.assert_close(stretched, plain, rtol=tolerance, atol=tolerance)
    units = [float(m.redpeft_edit["default"].unit) for m in model.modules() if isinstance(m, RedLayer)]
    assert all(unit > 0 for unit in units)


def test_the_papers_rule_does_depend_on_it():
    plain, _ = train(llama(), 1)
    stretched, _ = train(stretch(llama(), 30), 1)
    assert (stretched - plain).abs().max() > 0.01


def sites(model):
    return [module for module in model.modules() if isinstance(module, RedLayer)]


def test_it_is_measured_in_the_first_training_forward_and_never_again():
    model = get_peft_model(llama(torch.float32), RedConfig())
    edits = [layer.redpeft_edit["default"] for layer in sites(model)]
    model.eval()(torch.randint(0, 60, (2, 8)))
    assert all(edit.unit_pending for edit in edits)
    model.train()(torch.randint(0, 60, (2, 8)))
    first = [float(edit.unit) for edit in edits]
    assert all(unit != 1 for unit in first)
    model(torch.randint(0, 60, (2, 8)))
    assert [float(edit.unit) for edit in edits] == first


def test_the_unit_is_the_size_of_the_base_layers_output():
    model = get_peft_model(llama(torch.float32), RedConfig())
    seen = {}
    for layer in sites(model):
        layer.base_layer.register_forward_hook(
            lambda module, args, output, site=layer.site: seen.update({site: output})
        )
    model.train()(torch.randint(0, 60, (2, 8)))
    for layer in sites(model):
        expected = 1.4826 * seen[layer.site].abs().median()
        torch.testing.assert_close(layer.redpeft_edit["default"].unit[0], expected)


def test_a_number_is_used_as_it_is():
    model = get_peft_model(llama(torch.float32), RedConfig(unit=0.25))
    model.train()(torch.randint(0, 60, (2, 8)))
    assert {float(layer.redpeft_edit["default"].unit) for layer in sites(model)} == {0.25}


def test_a_later_adapter_starts_with_the_unit_of_its_sibling():
    model = get_peft_model(llama(torch.float32), RedConfig())
    model.train()(torch.randint(0, 60, (2, 8)))
    model.add_adapter("ref", RedConfig())
    for layer in sites(model):
        assert torch.equal(layer.redpeft_edit["ref"].unit, layer.redpeft_edit["default"].unit)
        assert not layer.redpeft_edit["ref"].unit_pending


def test_a_site_that_is_all_zero_names_itself():
    model = llama(torch.float32)
    torch.nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    with pytest.raises(UserError, match=r"output of model\.layers\.1\.mlp\.down_proj is zero everywhere"):
        get_peft_model(model, RedConfig()).train()(torch.randint(0, 60, (2, 8)))
