"""Adapters of compiled models are those of plain ones: names, files and fingerprints, however PEFT loads them."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from helpers.versions import keys_go_through_the_tuner
from redpeft import RedConfig, find_sites
from redpeft.adapters import load_adapter, read_adapter
from redpeft.models import compile_in_place


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def blocks(model: nn.Module) -> nn.Module:
    """Block by block, as accelerate's regional compilation does."""
    layers = model.bert.encoder.layer
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")
    return model


def site(model: nn.Module) -> nn.Module:
    for layer in model.bert.encoder.layer:
        layer.output.dense = torch.compile(layer.output.dense, backend="eager")
    return model


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def plain(model: nn.Module) -> nn.Module:
    return model


WAYS = [whole, blocks, site, in_place, plain]
SITES = [f"bert.encoder.layer.{index}.output.dense" for index in range(2)]


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """The folder of an adapter with a head that was made on a plain model, and its logits."""
    model = tiny.with_edits(tiny.bert_classifier(), "SEQ_CLS")
    model.base_model.model.classifier.modules_to_save["default"].weight.data.add_(1)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder, logits(model, tiny)


@torch.no_grad()
def logits(model, tiny):
    return model(input_ids=tiny.tokens()).logits


def keys(folder):
    return load_file(folder / "adapter_model.safetensors").keys()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.filterwarnings("error:adapter 'default' was trained on another base model")
def test_an_adapter_fits_plain_and_compiled_models(tiny, saved, tmp_path, way):
    folder, expected = saved
    for load in (PeftModel.from_pretrained, load_adapter):
        model = load(way(tiny.bert_classifier()), folder).eval()
        torch.testing.assert_close(logits(model, tiny), expected, atol=1e-6, rtol=1e-5)
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    torch.testing.assert_close(logits(model, tiny), expected, atol=1e-6, rtol=1e-5)

    made = tiny.with_edits(way(tiny.bert_classifier()), "SEQ_CLS")
    made.base_model.model.classifier.modules_to_save["default"].weight.data.add_(1)
    made.save_pretrained(tmp_path)
    assert keys(tmp_path) == keys(folder)
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path)]
    for config in configs:
        assert sorted(config["target_modules"]) == SITES
    assert configs[0]["base_fingerprint"] == configs[1]["base_fingerprint"]
    again = PeftModel.from_pretrained(tiny.bert_classifier(), tmp_path).eval()
    torch.testing.assert_close(logits(again, tiny), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("way", [whole, blocks])
def test_a_compiled_model_stays_compiled(tiny, way):
    counter = CompileCounter()
    model = tiny.bert_classifier()
    if way is whole:
        model = torch.compile(model, backend=counter)
    else:
        layers = model.bert.encoder.layer
        layers[0] = torch.compile(layers[0], backend=counter)
    adapted = tiny.with_edits(model, "SEQ_CLS")
    logits(adapted, tiny)
    assert counter.frame_count > 0


@pytest.mark.parametrize("way", [whole, blocks])
def test_injection_without_a_peft_model(tiny, saved, way):
    folder, expected = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    model = inject_adapter_in_model(RedConfig.from_pretrained(folder), way(tiny.bert_classifier())).eval()
    set_peft_model_state_dict(model, {key.removeprefix("base_model.model."): t for key, t in tensors.items()})
    torch.testing.assert_close(logits(model, tiny), expected, atol=1e-6, rtol=1e-5)


@keys_go_through_the_tuner
def test_what_is_compiled_after_the_adapter_was_added(tiny, saved, tmp_path):
    folder, expected = saved
    model = PeftModel.from_pretrained(tiny.bert_classifier(), folder).eval()
    compiled = torch.compile(model, backend="eager")
    compiled.save_pretrained(tmp_path / "outside")
    blocks(model.base_model.model)
    model.save_pretrained(tmp_path / "inside")
    for path in (tmp_path / "outside", tmp_path / "inside"):
        assert keys(path) == keys(folder)
        again = PeftModel.from_pretrained(tiny.bert_classifier(), path).eval()
        torch.testing.assert_close(logits(again, tiny), expected, atol=1e-6, rtol=1e-5)
    own = get_peft_model_state_dict(compiled)
    assert not [key for key in own if "_orig_mod" in key]


@keys_go_through_the_tuner
@pytest.mark.filterwarnings("error:adapter 'default' was trained on another base model")
def test_files_with_the_names_of_a_compiled_model_are_read(tiny, saved, tmp_path):
    folder, _ = saved
    expected = read_adapter(folder)

    def compiled(name: str) -> str:
        return name.replace("encoder.layer", "encoder._orig_mod.layer")

    tensors = {compiled(key): tensor for key, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = [compiled(name) for name in config["target_modules"]]
    config["base_fingerprint"]["shapes"] = "a digest with the names of a compiled model"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = read_adapter(tmp_path)
    assert sorted(found.config["target_modules"]) == SITES
    assert found.edits.keys() == expected.edits.keys()
    model = PeftModel.from_pretrained(tiny.bert_classifier(), tmp_path)
    tiny.assert_same([e.effective[0] for e in tiny.edits(model)], [expected.edits[s].scale.float() for s in SITES])


def test_sites_have_plain_names(tiny):
    for way in (whole, blocks, site):
        assert [found.name for found in find_sites(way(tiny.bert_classifier()))] == SITES
    model = tiny.bert_classifier()
    assert compile_in_place(model) is model
