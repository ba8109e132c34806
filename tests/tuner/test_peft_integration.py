"""RED through PEFT's functions: get_peft_model, PeftModel, AutoPeftModel; several adapters, merging, mixed batches."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, UMT5Config, UMT5ForConditionalGeneration

from helpers.versions import keys_go_through_the_tuner
from redpeft import RedConfig
from redpeft.errors import UserError
from redpeft.models import reads_tying

TASKS = [
    ("bert_classifier", "SEQ_CLS", "modules_to_save.default"),
    ("roberta_classifier", "SEQ_CLS", "modules_to_save.default"),
    ("bert_tagger", "TOKEN_CLS", "modules_to_save.default"),
    ("llama", "CAUSAL_LM", None),
    ("gpt2", "CAUSAL_LM", None),
    ("qwen_moe", "CAUSAL_LM", None),
    ("t5", "SEQ_2_SEQ_LM", None),
    ("llama", None, None),
]


@pytest.mark.parametrize(("name", "task_type", "heads"), TASKS, ids=lambda value: value or "none")
def test_training_moves_only_edits_and_heads(tiny, name, task_type, heads):
    base = getattr(tiny, name)()
    own = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, RedConfig(task_type=task_type))
    with tiny.only_edits_move(model, heads):
        losses = tiny.train(model, tiny.batch(task_type))
    assert losses[-1] < losses[0]
    unloaded = model.unload().state_dict()
    assert own.keys() == unloaded.keys()
    assert not [key for key in own if not torch.equal(own[key], unloaded[key])]


def test_one_configuration_serves_models_of_other_names(tiny, tmp_path):
    """PEFT keeps the caller's object; with RED the models that it has served before are not changed by that."""
    config = RedConfig(task_type="CAUSAL_LM")
    llama = get_peft_model(tiny.llama(), config)
    assert llama.peft_config["default"] is config
    llama.add_adapter("again", config)
    gpt2 = get_peft_model(tiny.gpt2(), config)
    assert gpt2.peft_config["default"] is config
    of_llama = {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    for adapter in ("default", "again"):
        assert llama.peft_config[adapter].target_modules == of_llama
    assert config.target_modules == {f"transformer.h.{i}.mlp.c_proj" for i in range(2)}
    assert llama.peft_config["default"].base_fingerprint != config.base_fingerprint
    llama.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == of_llama
    for sites, targets, found in (
        ("attention", config.target_modules, "attn.c_proj"),
        (None, {"mlp.c_fc"}, "mlp.c_fc"),
    ):
        config.sites, config.target_modules = sites, targets  # asked for in between
        again = get_peft_model(tiny.gpt2(), config)
        assert again.targeted_module_names == [f"transformer.h.{i}.{found}" for i in range(2)]


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_given_configuration_is_kept(tiny, llama_folders, is_trainable):
    for config in (RedConfig(task_type="CAUSAL_LM"), RedConfig.from_pretrained(llama_folders[1])):
        model = PeftModel.from_pretrained(tiny.llama(), llama_folders[1], config=config, is_trainable=is_trainable)
        assert model.peft_config["default"] is config
        assert config.target_modules == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}


def test_heads_are_listed_once(tiny, tmp_path):
    config = RedConfig(task_type="SEQ_CLS", modules_to_save=["classifier"])
    get_peft_model(tiny.bert_classifier(), config)
    get_peft_model(tiny.bert_classifier(), config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]


# Saving and loading


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_from_pretrained_gives_the_same_outputs(tiny, llama_folders, is_trainable, low_cpu_mem_usage):
    expected = tiny.with_edits(tiny.llama(), "CAUSAL_LM")(tiny.tokens()).logits
    model = PeftModel.from_pretrained(
        tiny.llama(), llama_folders[1], is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(model(tiny.tokens()).logits, expected)
    assert sum(p.requires_grad for p in model.parameters()) == (4 if is_trainable else 0)
    if is_trainable:
        units = [edit.unit.clone() for edit in tiny.edits(model)]
        with tiny.only_edits_move(model):
            tiny.train(model, tiny.batch())
        tiny.assert_same([edit.unit for edit in tiny.edits(model)], units)  # measured once, not again


@pytest.mark.filterwarnings("ignore:Adapter name 'red' should not be contained in the prefix")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_second_adapter_is_loaded_beside_the_first(tiny, llama_folders, low_cpu_mem_usage):
    model = get_peft_model(tiny.llama(), RedConfig(task_type="CAUSAL_LM"))
    tiny.train(model, tiny.batch())
    first = model(tiny.tokens()).logits
    # "red", part of the prefix: PEFT warns of such names, ours are found by their place
    model.load_adapter(llama_folders[1], "red", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(model.eval()(tiny.tokens()).logits, first)
    model.set_adapter("red")
    expected = tiny.with_edits(tiny.llama(), "CAUSAL_LM")(tiny.tokens()).logits
    assert torch.equal(model(tiny.tokens()).logits, expected)
    model.delete_adapter("red")
    assert model.active_adapters == ["default"]
    assert torch.equal(model(tiny.tokens()).logits, first)
    assert not [name for name in model.state_dict() if ".red." in name]


def test_auto_classes_find_the_base(tiny, llama_folders, tmp_path):
    model = AutoPeftModelForCausalLM.from_pretrained(llama_folders[1]).eval()
    expected = tiny.with_edits(tiny.llama(), "CAUSAL_LM")(tiny.tokens()).logits
    assert torch.equal(model(tiny.tokens()).logits, expected)

    tiny.bert_classifier().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    classifier = tiny.with_edits(base, "SEQ_CLS")
    tiny.train(classifier, tiny.batch("SEQ_CLS"))
    classifier.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    assert torch.equal(loaded(tiny.tokens()).logits, classifier(tiny.tokens()).logits)


def test_files_hold_fp32_edits_and_nothing_else(tiny, tmp_path):
    model = tiny.with_edits(tiny.qwen_moe().bfloat16(), "CAUSAL_LM", target_modules=["shared_expert.down_proj"])
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    sites = [f"model.layers.{i}.mlp.shared_expert.down_proj" for i in range(2)]
    names = {"scale_offset": (32,), "bias": (32,), "unit": (1,)}
    expected = {
        f"base_model.model.{site}.redpeft_edit.{name}": shape for site in sites for name, shape in names.items()
    }
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "REDPEFT"
    assert sorted(config["target_modules"]) == sites


def test_full_names_are_not_taken_as_endings(tiny, tmp_path):
    def towers() -> nn.Module:
        torch.manual_seed(0)
        text, vision = (nn.ModuleDict({"blocks": nn.ModuleDict({"down": nn.Linear(8, 8)})}) for _ in range(2))
        return nn.ModuleDict({**text, "vision": vision})

    model = get_peft_model(towers(), RedConfig(target_modules=r"blocks\.down"))
    assert model.peft_config["default"].target_modules == {"blocks.down"}
    model.save_pretrained(tmp_path)
    assert len(tiny.layers(PeftModel.from_pretrained(towers(), tmp_path))) == 1


def test_names_of_many_sites_stay_whole(tiny, tmp_path):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(
                nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(24)
            )

    names = [f"layers.{i}.down" for i in range(24)]  # PEFT shortens sets of twenty and more
    model = get_peft_model(Deep(), RedConfig(target_modules=["down"]))
    model.save_pretrained(tmp_path)
    assert sorted(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == sorted(names)
    assert PeftModel.from_pretrained(Deep(), tmp_path).peft_config["default"].target_modules == set(names)


@keys_go_through_the_tuner
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_missing_and_left_over_keys_are_errors(tiny, llama_folders, tmp_path, low_cpu_mem_usage):
    folder = shutil.copytree(llama_folders[1], tmp_path / "damaged")
    tensors = load_file(folder / "adapter_model.safetensors")
    start = "base_model.model.model.layers"
    tensors[f"{start}.7.mlp.down_proj.redpeft_edit.bias"] = tensors.pop(f"{start}.0.mlp.down_proj.redpeft_edit.bias")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    message = (
        r"the file of adapter 'default' does not fit this model; "
        rf"keys missing: {start}.0.mlp.down_proj.redpeft_edit.default.bias; "
        rf"left over: {start}.7.mlp.down_proj.redpeft_edit.bias. Load it on the base model that it was trained on"
    )
    with pytest.raises(UserError, match=message):
        PeftModel.from_pretrained(tiny.llama(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    model = PeftModel.from_pretrained(tiny.llama(), llama_folders[1])
    with pytest.raises(UserError, match="the file of adapter 'other' does not fit this model"):
        model.load_adapter(folder, "other", low_cpu_mem_usage=low_cpu_mem_usage)


# What PEFT allows to LoRA alone


def test_red_is_not_put_on_another_method(tiny):
    lora = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    message = (
        r"cannot be mixed .* model.layers.0.self_attn.q_proj is a layer of another \(peft.tuners.lora.layer\): merge"
    )
    for model in (lora.base_model.model, lora.get_base_model()):
        with pytest.raises(UserError, match=message):
            get_peft_model(model, RedConfig())
    for model in (lora, get_peft_model(tiny.llama(), RedConfig())):
        with pytest.raises(
            UserError, match=r"is a PeftModel: add to it by model.add_adapter\(name, config\), or give"
        ):
            get_peft_model(model, RedConfig())
    assert lora.peft_config["default"].peft_type == "LORA"
    assert len(tiny.layers(get_peft_model(lora.merge_and_unload(), RedConfig()))) == 2


def test_what_only_lora_can_do_is_refused(tiny, llama_folders, tmp_path):
    model = tiny.with_edits(tiny.llama(), "CAUSAL_LM")
    lora = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but REDPEFT was passed"):
        hotswap_adapter(model, llama_folders[1], "default")
    with pytest.raises(ValueError, match="Incompatible PEFT types found: REDPEFT and LORA"):
        hotswap_adapter(model, tmp_path, "default")
    with pytest.raises(ValueError, match="'REDPEFT' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny.llama(), RedConfig(), mixed=True)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.load_adapter(tmp_path, "other")
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        lora.add_adapter("other", RedConfig())
    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(model, 2),
    ):
        pass
    assert not hasattr(model, "supports_lora_conversion") or not model.supports_lora_conversion()


# State


def test_status_and_requires_grad(tiny):
    model = get_peft_model(tiny.llama(), RedConfig())
    model.add_adapter("last", RedConfig(layers_to_transform=[1]))

    def trainable() -> set[str]:
        return {name.split("layers.")[1] for name, p in model.named_parameters() if p.requires_grad}

    def names(adapter: str, *blocks: int) -> set[str]:
        return {
            f"{i}.mlp.down_proj.redpeft_edit.{adapter}.{name}" for i in blocks for name in ("scale_offset", "bias")
        }

    status = model.get_model_status()
    assert status.adapter_model_type == "RedModel"
    assert status.peft_types == {"default": "REDPEFT", "last": "REDPEFT"}
    assert (status.trainable_params, status.num_adapter_layers) == (2 * 2 * 32, 2)
    assert status.active_adapters == ["default"]
    assert status.requires_grad == {"default": True, "last": False}
    assert [layer.available_adapters for layer in model.get_layer_status()] == [["default"], ["default", "last"]]
    assert trainable() == names("default", 0, 1)
    model.set_adapter("last")
    assert trainable() == names("last", 1)
    model.requires_grad_(False)
    assert trainable() == set()
    model.set_adapter("default")
    assert trainable() == names("default", 0, 1)
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    assert trainable() == names("default", 0, 1)


def test_adapters_compose_in_order_and_can_be_disabled(tiny):
    model = tiny.with_edits(tiny.llama())
    model.add_adapter("second", RedConfig())
    tiny.far(model, "second", seed=1)
    layer, hidden = tiny.layers(model)[0], torch.randn(2, 64)
    first, second = layer.redpeft_edit["default"], layer.redpeft_edit["second"]
    for order, expected in ((["default", "second"], (first, second)), (["second", "default"], (second, first))):
        model.base_model.set_adapter(order)
        assert torch.equal(layer(hidden), expected[1](expected[0](layer.base_layer(hidden))))
    with model.disable_adapter():
        assert torch.equal(model(tiny.tokens()).logits, tiny.llama()(tiny.tokens()).logits)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stand_alone(tiny, duplicate):
    model = tiny.with_edits(tiny.bert_classifier(), "SEQ_CLS")
    before = model(tiny.tokens()).logits
    other = duplicate(model)
    assert torch.equal(other(tiny.tokens()).logits, before)
    tiny.far(other, seed=1)
    assert not torch.equal(other(tiny.tokens()).logits, before)
    assert torch.equal(model(tiny.tokens()).logits, before)


# Merging


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_is_exact_up_to_rounding_and_unmerging_restores(tiny, name, dtype, tolerance):
    base = getattr(tiny, name)(dtype)
    own = {key: value.clone() for key, value in base.state_dict().items()}
    model = tiny.with_edits(base)
    model.add_adapter("second", RedConfig())
    tiny.far(model, "second", seed=1)
    model.base_model.set_adapter(["default", "second"])
    edited = model(tiny.tokens()).logits

    model.merge_adapter(safe_merge=True)
    assert model.get_layer_status()[0].merged_adapters == ["default", "second"]
    torch.testing.assert_close(model(tiny.tokens()).logits, edited, atol=tolerance, rtol=0)
    model.unmerge_adapter()
    assert torch.equal(model(tiny.tokens()).logits, edited)
    restored = {key.replace(".base_layer", ""): value for key, value in model.get_base_model().state_dict().items()}
    tiny.assert_same(list(own.values()), [restored[key] for key in own])

    model.merge_adapter()
    with model.disable_adapter():  # unmerges first
        torch.testing.assert_close(model(tiny.tokens()).logits, getattr(tiny, name)(dtype)(tiny.tokens()).logits)

    merged = model.merge_and_unload()
    assert not tiny.layers(merged)
    torch.testing.assert_close(merged(tiny.tokens()).logits, edited, atol=tolerance, rtol=0)
    assert {tensor.dtype for tensor in merged.state_dict().values()} == {dtype}


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_merged_moves_and_casts_with_the_model(tiny, name, copied):
    base = getattr(tiny, name)()
    own = copy.deepcopy(base).to(torch.bfloat16)
    model = tiny.with_edits(base)
    keys = model.state_dict().keys()
    model.merge_adapter()
    assert keys >= {key for key in model.state_dict() if not key.endswith("base_layer.bias")}
    merged = model(tiny.tokens()).logits
    model = copied(model).to(torch.bfloat16)
    torch.testing.assert_close(model(tiny.tokens()).logits.float(), merged, atol=2e-2, rtol=2e-2)
    model.unmerge_adapter()
    restored = {key.replace(".base_layer", ""): value for key, value in model.get_base_model().state_dict().items()}
    tiny.assert_same([*own.state_dict().values()], [restored[key] for key in own.state_dict()])
    assert not model(tiny.tokens()).logits.isnan().any()


def test_the_original_parameters_come_back(tiny):
    """Those of a layer that shares them with another, say; they are trained or not as before."""
    model = tiny.with_edits(tiny.gpt2())
    linear = tiny.layers(model)[0].get_base_layer()
    weight, bias = linear.weight, linear.bias
    model.merge_adapter()
    assert not linear.weight.requires_grad
    model.merge_adapter(adapter_names=[])
    model.unmerge_adapter()
    assert linear.weight is weight
    assert linear.bias is bias
    assert not list(tiny.layers(model)[0].buffers(recurse=False))


@pytest.mark.parametrize(
    ("name", "options", "switches"),
    [
        ("llama", {"layers_to_transform": [1]}, {"mlp_bias"}),
        ("llama", {"sites": "red+"}, {"mlp_bias", "attention_bias"}),
        ("gpt2", {"sites": "red+"}, set()),
        ("bert_classifier", {}, set()),
    ],
)
@pytest.mark.filterwarnings("error:.*now have one")
def test_a_merged_model_loads_strictly_into_its_class(tiny, tmp_path, name, options, switches):
    model = tiny.with_edits(getattr(tiny, name)(), **options)
    edited = model(tiny.tokens()).logits
    before = model.config.to_dict()
    merged = model.merge_and_unload()
    assert {key for key, value in merged.config.to_dict().items() if value != before[key]} == switches
    plain = type(merged)(merged.config).eval()
    plain.load_state_dict(merged.state_dict(), strict=True)
    merged.save_pretrained(tmp_path)
    for again in (plain, type(merged).from_pretrained(tmp_path).eval()):
        torch.testing.assert_close(again(tiny.tokens()).logits, edited, atol=1e-6, rtol=0)


def test_a_bias_that_the_configuration_has_no_switch_for_is_a_warning(tiny):
    model = tiny.with_edits(tiny.t5())
    with pytest.warns(UserWarning, match=r"4 layers without a bias now have one \(decoder.block.0.layer.2.DenseReluD"):
        model.merge_and_unload()


@pytest.mark.parametrize("heads", [None, ["lm_head"]], ids=["the base's", "the adapter's"])
def test_an_lm_head_of_its_own_stays_one(tiny, heads):
    """UMT5 scales what its head reads where the configuration says that the embeddings are tied (transformers before
    5.24)."""
    sizes = {"vocab_size": 100, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    base = UMT5ForConditionalGeneration(UMT5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)).eval()
    base.lm_head.weight = nn.Parameter(torch.randn(100, 32))
    inputs = {"input_ids": tiny.tokens(), "decoder_input_ids": tiny.tokens(seed=1)}
    model = tiny.with_edits(base, use_bias=False, modules_to_save=heads)
    edited, tied = model(**inputs).logits, base.config.tie_word_embeddings
    kept = heads is None or reads_tying(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error" if kept else "default", ".*no longer tied")
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings == (kept and tied)
    torch.testing.assert_close(merged(**inputs).logits, edited, atol=1e-4, rtol=1e-5)


def test_layers_that_shared_their_weights_are_merged_each_by_its_own_edit(tiny):
    """As in Zamba, whose checkpoints have the weights of such layers once."""
    base = tiny.gpt2()
    first, second = (block.mlp.c_proj for block in base.transformer.h)
    second.weight = first.weight
    model = tiny.with_edits(base)
    edited = model(tiny.tokens()).logits
    model.merge_adapter()
    model.unmerge_adapter()
    assert tiny.layers(model)[0].weight is tiny.layers(model)[1].weight
    with pytest.warns(UserWarning, match=r"2 layers no longer share their weights .*h.0.mlp.c_proj, .*may load with"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tiny.tokens()).logits, edited, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("error:.*now have one")
def test_scales_alone_need_no_bias(tiny):
    for options in ({"use_bias": False}, {}):
        model = tiny.with_edits(tiny.llama(), **options)
        for edit in tiny.edits(model):
            edit.bias.data.zero_()
        edited = model(tiny.tokens()).logits
        model.merge_adapter(safe_merge=True)
        model.unmerge_adapter()
        merged = model.merge_and_unload()
        assert merged.state_dict().keys() == tiny.llama().state_dict().keys()
        torch.testing.assert_close(merged(tiny.tokens()).logits, edited, atol=1e-6, rtol=0)


def test_conv1d_says_its_widths(tiny):
    layer = tiny.layers(get_peft_model(tiny.gpt2(), RedConfig()))[0]
    assert (layer.in_features, layer.out_features) == (4 * 32, 32)


def test_mixture_of_experts_cannot_be_merged(tiny):
    model = tiny.with_edits(tiny.qwen_moe())
    message = "cannot be merged: Qwen2MoeSparseMoeBlock is not a linear layer .* Keep the adapter unmerged"
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UserError, match=message):
            merge()
    assert model.get_model_status().merged_adapters == []


def test_a_merge_that_is_not_finite_is_refused(tiny):
    model = tiny.with_edits(tiny.llama())
    tiny.edits(model)[0].offset.data[3] = float("inf")
    with pytest.raises(
        UserError, match="^model.layers.0.mlp.down_proj: NaNs .* adapter default seems to be broken, or goes beyond"
    ):
        model.merge_adapter(safe_merge=True)
    assert not tiny.layers(model)[0].merged


# Mixed batches

ROWS = ["b", "__base__", "default", "c", "default"]


@pytest.fixture
def mixed(tiny):
    """Build a model with three adapters: "c" edits the second block alone."""

    def build(model: nn.Module, task_type: str) -> PeftModel:
        model = tiny.with_edits(model, task_type)
        for seed, (name, blocks) in enumerate({"b": None, "c": [1]}.items(), start=1):
            model.add_adapter(name, RedConfig(task_type=task_type, layers_to_transform=blocks))
            tiny.far(model, name, seed=seed)
        heads = [(name, p) for name, p in model.named_parameters() if "modules_to_save" in name]
        with torch.no_grad():
            for place, (_, head) in enumerate(heads):
                head.add_(0.3 * (place + 1))
        return model.eval()

    return build


@torch.no_grad()
def one_by_one(model, call) -> torch.Tensor:
    """Each row alone, with its adapter set."""
    outputs = []
    for row, name in enumerate(ROWS):
        rows = slice(row, row + 1)
        if name == "__base__":
            with model.disable_adapter():
                outputs.append(call(rows))
        else:
            model.set_adapter(name)
            outputs.append(call(rows))
    return torch.cat(outputs)


@pytest.mark.parametrize(("name", "task_type", "heads"), TASKS[:-2], ids=lambda value: value or "none")
def test_each_row_of_a_batch_has_its_adapter(tiny, mixed, name, task_type, heads):
    model, ids = mixed(getattr(tiny, name)(), task_type), tiny.tokens(5)
    expected = one_by_one(model, lambda rows: model(ids[rows]).logits)
    assert (expected[0] - expected[1:]).abs().amax(dim=tuple(range(1, expected.dim()))).min() > 1e-2
    torch.testing.assert_close(model(ids, adapter_names=ROWS).logits, expected, atol=1e-6, rtol=1e-5)


def test_disabled_adapters_do_not_act_in_mixed_batches(tiny, mixed):
    model, ids = mixed(tiny.llama(), "CAUSAL_LM"), tiny.tokens(5)
    with model.disable_adapter():
        assert torch.equal(model(ids, adapter_names=ROWS).logits, tiny.llama()(ids).logits)


GENERATION = [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}]


@pytest.mark.parametrize("options", GENERATION, ids=["greedy", "beams", "two of three beams"])
@pytest.mark.parametrize(("name", "task_type"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_generation_of_mixed_batches(tiny, mixed, name, task_type, options):
    model, ids = mixed(getattr(tiny, name)(), task_type), tiny.tokens(5)
    options = {**options, "do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    expected = one_by_one(model, lambda rows: model.generate(input_ids=ids[rows], **options))
    assert len(expected[:, -6:].unique(dim=0)) > 2
    assert torch.equal(model.generate(input_ids=ids, adapter_names=ROWS, **options), expected)


def test_changes_of_an_adapter_are_seen_at_once(tiny, mixed, tmp_path):
    model, ids = mixed(tiny.llama(), "CAUSAL_LM"), tiny.tokens(5)
    seen = []

    def check(change) -> None:
        change()
        expected = one_by_one(model, lambda rows: model(ids[rows]).logits)
        torch.testing.assert_close(model(ids, adapter_names=ROWS).logits, expected, atol=1e-6, rtol=1e-5)
        assert not seen or not torch.equal(seen[-1], expected)
        seen.append(expected)

    def reload() -> None:
        model.delete_adapter("b")
        model.load_adapter(tmp_path / "b", "b")

    def add_again() -> None:
        model.delete_adapter("b")
        model.add_adapter("b", RedConfig(task_type="CAUSAL_LM"))
        tiny.far(model, "b", seed=8)

    model.save_pretrained(tmp_path)
    check(lambda: None)
    check(lambda: tiny.far(model, "b", seed=7))
    check(lambda: [edit.offset.data.mul_(-1.5) for edit in tiny.edits(model, "b")])
    check(lambda: [setattr(edit.bias, "data", torch.randn(32)) for edit in tiny.edits(model, "b")])
    check(reload)
    check(add_again)
    check(lambda: (model.set_adapter("b"), tiny.train(model, tiny.batch())))
    model.delete_adapter("b")
    with pytest.raises(UserError, match="unknown adapters in adapter_names: b; loaded: default, c"):
        model(ids, adapter_names=ROWS)


def test_wrong_use_of_adapter_names(tiny, mixed):
    model, ids = mixed(tiny.bert_classifier(), "SEQ_CLS"), tiny.tokens(5)
    for names in (["b"] * 3, []):
        with pytest.raises(UserError, match=f"same as the number of inputs, but got {len(names)} and 5 respectively"):
            model(ids, adapter_names=names)
    model.merge_adapter()
    with pytest.raises(UserError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        model(ids, adapter_names=ROWS)
    model.unmerge_adapter()
    with pytest.raises(
        UserError, match=r"Cannot pass `adapter_names` when the model is in training mode. Call model\.eval"
    ):
        model.train()(ids, adapter_names=ROWS)
    model.set_adapter("default")  # and nothing of it stays behind
    alone = tiny.with_edits(tiny.bert_classifier(), "SEQ_CLS").base_model.model.bert(ids).last_hidden_state
    assert torch.equal(model.eval().base_model.model.bert(ids).last_hidden_state, alone)
