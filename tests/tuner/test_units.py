"""The unit of the bias: what it measures, what it refuses, and the invariance that it is there for."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from redpeft import RedConfig, RedLayer, calibrate
from redpeft.errors import UserError
from redpeft.models import example_inputs
from redpeft.tuner.units import MAX_VALUES, typical_size


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


@pytest.mark.parametrize("length", [64, 100, 1024])
def test_no_length_of_rows_lines_up_with_what_is_read(length):
    """Position 0, say, is often another size than the rest."""
    hidden = torch.ones(64, length, 2048)
    hidden[:, 0] = 100.0
    assert float(typical_size(hidden, "site")) == pytest.approx(1.4826)


def test_padding_and_rows_without_numbers_do_not_decide():
    hidden = torch.full((4, 10, 8), 50.0)
    hidden[:, :3] = 1.0
    real = torch.zeros(4, 10)
    real[:, :3] = 1
    assert float(typical_size(hidden, "site", real)) == pytest.approx(1.4826)
    assert float(typical_size(hidden.flatten(0, 1), "site", real)) == pytest.approx(1.4826)  # as experts have it
    hidden[1:, :3] = torch.nan
    assert float(typical_size(hidden, "site", real)) == pytest.approx(1.4826)
    assert typical_size(hidden, "site", torch.zeros(4, 10)) is None


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


def units(model):
    return [float(layer.redpeft_edit["default"].unit) for layer in sites(model)]


def test_it_is_measured_in_the_first_training_forward_and_never_again():
    model = get_peft_model(llama(torch.float32), RedConfig())
    edits = [layer.redpeft_edit["default"] for layer in sites(model)]
    model.eval()(torch.randint(0, 60, (2, 8)))
    assert all(edit.unit_pending for edit in edits)
    model.train()(torch.randint(0, 60, (2, 8)))
    first = units(model)
    assert all(unit != 1 for unit in first)
    assert model.peft_config["default"].unit_measured
    assert not model.get_base_model()._forward_pre_hooks
    model(torch.randint(0, 60, (2, 8)))
    assert units(model) == first


def test_the_unit_is_the_size_of_the_base_layers_output_on_tokens_of_its_own():
    """Whatever the batch is, whatever is drawn before, and with edits far from the identity."""
    measured = []
    for seed in (0, 1):
        model = get_peft_model(llama(torch.float32), RedConfig())
        with torch.no_grad():
            for layer in sites(model):
                layer.redpeft_edit["default"].offset.fill_(seed)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model.train()(torch.randint(0, 60, (2, 3 + seed)))
        torch.set_rng_state(before)
        measured.append(units(model))
    assert measured[0] == measured[1]
    ids = example_inputs(llama())["input_ids"]
    outputs = {}
    plain = llama(torch.float32).eval()
    for index, block in enumerate(plain.model.layers):
        block.mlp.down_proj.register_forward_hook(lambda _, __, output, i=index: outputs.update({i: output}))
    with torch.no_grad():
        plain(ids)
    assert measured[0] == pytest.approx([float(1.4826 * outputs[i].abs().median()) for i in (0, 1)])


def test_measuring_leaves_random_numbers_and_modes_as_they_were():
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        attention_dropout=0.3, pad_token_id=0,
    )  # fmt: skip
    tokens = torch.arange(12).reshape(2, 6)
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(config), RedConfig()).train()
    model.get_base_model().model.layers[0].eval()
    state = torch.get_rng_state()
    first = model(tokens).logits
    torch.set_rng_state(state)
    assert torch.equal(first, model(tokens).logits)
    assert not model.get_base_model().model.layers[0].training
    assert model.get_base_model().model.layers[1].self_attn.training


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_measure_for_themselves(duplicate):
    model = get_peft_model(llama(torch.float32), RedConfig())
    other = duplicate(model)
    for one in (other, model):
        assert units(one) == [1, 1]
        one.train()(torch.randint(0, 60, (2, 8)))
        assert not one.get_base_model()._forward_pre_hooks
    assert units(one) == units(other) != [1, 1]


def test_a_unit_of_exactly_1_that_was_measured_stays(tmp_path):
    model = get_peft_model(llama(torch.float32), RedConfig())
    for layer in sites(model):
        layer.redpeft_edit["default"].express(1.0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(torch.float32), tmp_path, is_trainable=True)
    loaded.train()(torch.randint(0, 60, (2, 8)))
    assert units(loaded) == [1 + 2**-23] * 2


def test_a_resumed_run_keeps_its_units(tmp_path):
    """Its values are loaded into a new adapter, as a Trainer does."""
    model = get_peft_model(llama(torch.float32), RedConfig())
    calibrate(model, {"input_ids": torch.arange(6)[None]})
    model.save_pretrained(tmp_path)
    resumed = get_peft_model(llama(torch.float32), RedConfig())
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    resumed.train()(torch.randint(0, 60, (2, 8)))
    assert units(resumed) == units(model)


def test_a_configuration_of_another_adapter_is_measured_anew(tmp_path):
    model = get_peft_model(llama(torch.float32), RedConfig())
    calibrate(model)
    model.save_pretrained(tmp_path)
    config = RedConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    fresh = get_peft_model(llama(torch.float32), config)
    fresh.train()(torch.randint(0, 60, (2, 8)))
    assert units(fresh) == units(model)


def test_an_imported_checkpoint_starts_training_as_it_was(tmp_path):
    """An imported checkpoint: the scale itself, and biases in the output's size."""
    model = get_peft_model(llama(torch.float32), RedConfig(scale_origin=0, init_weights=False))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(torch.float32), tmp_path).eval()
    tokens = torch.randint(0, 60, (2, 8))
    expected = loaded(tokens).logits
    assert [layer.redpeft_edit["default"].origin for layer in sites(loaded)] == [0, 0]
    loaded = PeftModel.from_pretrained(llama(torch.float32), tmp_path, is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=1e-3)
    started = loaded.train()(tokens, labels=tokens)
    torch.testing.assert_close(started.logits, expected, rtol=1e-4, atol=1e-5)
    started.loss.backward()
    optimizer.step()
    fresh = get_peft_model(llama(torch.float32), RedConfig())
    calibrate(fresh)
    assert units(loaded) == units(fresh)
    config = loaded.peft_config["default"]
    assert (config.scale_origin, config.unit_measured) == (1, True)
    names = {name.rpartition(".")[2] for name, p in loaded.named_parameters() if p.requires_grad}
    assert names == {"scale_offset", "bias"}
    expected = loaded.eval()(tokens).logits
    loaded.save_pretrained(tmp_path / "further")
    again = PeftModel.from_pretrained(llama(torch.float32), tmp_path / "further").eval()
    assert torch.equal(again(tokens).logits, expected)
    resumed = PeftModel.from_pretrained(llama(torch.float32), tmp_path, is_trainable=True)
    resumed.load_adapter(tmp_path / "further", "default", is_trainable=True)
    resumed.train()(tokens)
    assert torch.equal(resumed.eval()(tokens).logits, expected)
    assert units(resumed) == units(loaded)


def test_the_papers_rule_keeps_its_origin_in_training():
    model = get_peft_model(llama(torch.float32), RedConfig(scale_origin=0))
    model.train()(torch.randint(0, 60, (2, 8)))
    assert [layer.redpeft_edit["default"].origin for layer in sites(model)] == [0, 0]
    assert model.peft_config["default"].scale_origin == 0
    assert model.peft_config["default"].unit_measured


def test_layers_that_are_called_by_themselves_are_not_trained_without_a_unit():
    model = get_peft_model(llama(torch.float32), RedConfig()).train()
    message = "unit of the bias at model.layers.0.mlp.down_proj has not been measured.*call redpeft.calibrate"
    with pytest.raises(UserError, match=message):
        sites(model)[0](torch.randn(2, 32))
    calibrate(model)
    sites(model)[0](torch.randn(2, 32))


def test_a_new_adapter_on_a_model_in_evaluation_needs_no_unit():
    model = get_peft_model(llama(torch.float32).eval(), RedConfig())
    model(torch.randint(0, 60, (2, 8)))
    assert units(model) == [1, 1]
    model.train()(torch.randint(0, 60, (2, 8)))
    assert 1 not in units(model)


class Other(torch.nn.Module):
    """A model whose inputs nobody can guess; `spare` is for other batches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.down, self.spare = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x, with_spare=False):
        return self.down(x) + (self.spare(x) if with_spare else 0)


def test_inputs_that_cannot_be_made_up_are_the_batchs(monkeypatch):
    x = torch.randn(64, 8)
    model = get_peft_model(Other(), RedConfig(target_modules=["down"])).train()
    model(x=x)
    expected = 1.4826 * Other().down(x).abs().median()
    assert units(model) == pytest.approx([float(expected)])
    model = get_peft_model(Other(), RedConfig(target_modules=["down"])).train()
    monkeypatch.setattr("redpeft.tuner.units._several_processes", lambda: True)
    message = (
        r"inputs for Other \(it is not a model of transformers\) .* call redpeft.calibrate\(model, batch\) before"
    )
    with pytest.raises(UserError, match=message):
        model(x=x)
    calibrate(model, {"x": x})
    model(x=x)
    assert units(model) == pytest.approx([float(expected)])


def test_copies_of_dataparallel_are_refused():
    model = get_peft_model(llama(torch.float32), RedConfig()).train()
    model.get_base_model()._is_replica = True
    with pytest.raises(UserError, match=r"DataParallel trains copies .* call redpeft.calibrate\(model\)"):
        model(torch.randint(0, 60, (2, 8)))


def test_sites_that_the_measuring_pass_does_not_reach():
    model = get_peft_model(Other(), RedConfig(target_modules=["down", "spare"])).train()
    with pytest.warns(UserWarning, match="does not reach spare: the bias has the typical unit of the other sites"):
        model(x=torch.randn(4, 8))
    assert units(model)[0] == units(model)[1]
    model(x=torch.randn(4, 8), with_spare=True)
    with pytest.raises(UserError, match="no forward pass reaches spare: an edit there would do nothing"):
        get_peft_model(Other(), RedConfig(target_modules=["spare"])).train()(x=torch.randn(4, 8))


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


def test_what_is_loaded_for_inference_has_no_hook(tmp_path):
    """A hook would be a break in the graph of every compiled forward."""
    get_peft_model(llama(torch.float32), RedConfig(scale_origin=0, init_weights=False)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(torch.float32), tmp_path)
    assert not model.get_base_model()._forward_pre_hooks
    model.set_adapter("default")  # to be trained, after all
    with pytest.raises(UserError, match=r"has not been measured: it was loaded for inference, .* redpeft.calibrate"):
        model.train()(torch.randint(0, 60, (2, 8)))
    calibrate(model)
    model(torch.randint(0, 60, (2, 8)))
    assert [layer.redpeft_edit["default"].origin for layer in sites(model)] == [1, 1]
