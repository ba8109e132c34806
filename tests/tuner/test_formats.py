"""Adapter folders of version 1, of today and of a later version, by every way to load of PEFT and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from helpers.versions import TOO_OLD, keys_go_through_the_tuner, needs_add_adapter
from redpeft import RedConfig
from redpeft.adapters import read_adapter
from redpeft.errors import UserError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folders(tiny, llama_folders, tmp_path) -> dict[int, Path]:
    """The same adapter as version 1 wrote it and as it is written today, far from the identity."""
    new, old = llama_folders[1], shutil.copytree(llama_folders[1], tmp_path / "version_1")
    tensors = load_file(new / WEIGHTS)
    for key in [key for key in tensors if key.endswith("scale_offset")]:
        tensors[key.removesuffix("_offset")] = 1 + tensors.pop(key)
    save_file(tensors, old / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((old / CONFIG).read_text())
    for name in ("format", "scale_origin", "unit_measured"):
        del config[name]
    (old / CONFIG).write_text(json.dumps(config))
    return {1: old, 2: new}


def from_pretrained(model, folder):
    return PeftModel.from_pretrained(model, folder)


def without_memory(model, folder):
    return PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)


def load_adapter(model, folder):
    model = get_peft_model(model, RedConfig(), "first")
    model.load_adapter(folder, "default")
    model.set_adapter("default")
    return model


def into_a_new_adapter(model, folder):
    """As a Trainer's checkpoint is loaded: the values alone."""
    model = get_peft_model(model, RedConfig(task_type="CAUSAL_LM"))
    model.load_adapter(folder, "default")
    return model


def injected(model, folder):
    model = inject_adapter_in_model(PeftConfig.from_pretrained(folder), model)
    result = set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    assert not result.unexpected_keys
    model._hf_peft_config_loaded = True  # or `save_pretrained` writes all of it
    return model


def by_transformers(model, folder):
    model.load_adapter(str(folder))
    return model


LOADERS = [
    from_pretrained,
    without_memory,
    pytest.param(load_adapter, marks=keys_go_through_the_tuner),  # older PEFT saves all adapters' tensors for one
    into_a_new_adapter,
    pytest.param(injected, marks=keys_go_through_the_tuner),  # older PEFT wants the keys without their prefix
    pytest.param(by_transformers, marks=needs_add_adapter),
]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("load", LOADERS)
def test_every_loader_reads_both_versions(tiny, folders, tmp_path, load, version):
    expected = read_adapter(folders[version])
    model = load(tiny.llama(), folders[version]).eval()
    for layer in tiny.layers(model):
        scale, bias = (vector.detach() for vector in layer.redpeft_edit["default"].effective)
        edit = expected.edits[layer.site]
        if load is into_a_new_adapter:  # which counts from 1
            torch.testing.assert_close(scale, edit.scale.float(), rtol=2**-23, atol=2**-24)
        else:
            assert torch.equal(scale, edit.scale.float())
        torch.testing.assert_close(bias, edit.bias.float())
    config = model.peft_config["default"]
    assert config.format == 2
    assert config.scale_origin == (1 if version == 2 or load is into_a_new_adapter else 0)
    if load is injected and TOO_OLD:
        return  # transformers' own `save_pretrained` asks for a later PEFT too
    model.save_pretrained(tmp_path / "again")
    again = read_adapter(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert (saved["format"], saved["scale_origin"]) == (2, config.scale_origin)
    for site, edit in again.edits.items():
        tolerance = 2**-24 * (expected.edits[site].scale.abs().clamp(min=1))
        assert ((edit.scale - expected.edits[site].scale).abs() <= tolerance).all()
    if load is not into_a_new_adapter and version == 1:  # bit for bit
        key = f"base_model.model.{next(iter(again.edits))}.redpeft_edit.scale"
        assert torch.equal(load_file(tmp_path / "again" / WEIGHTS)[key], load_file(folders[1] / WEIGHTS)[key])


@pytest.mark.parametrize("load", LOADERS)
def test_every_loader_refuses_a_later_version(tiny, folders, tmp_path, load):
    folder = shutil.copytree(folders[2], tmp_path / "later")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "format": 3}))
    message = "an adapter of format 3, and this redpeft reads formats up to 2: upgrade redpeft"
    with pytest.raises(UserError, match=message):
        read_adapter(folder)
    if load is not into_a_new_adapter:  # which does not read the configuration
        with pytest.raises(UserError, match=message):
            load(tiny.llama(), folder)


@keys_go_through_the_tuner
def test_a_configuration_of_version_1_without_its_values_is_an_error(tiny, folders):
    model = inject_adapter_in_model(PeftConfig.from_pretrained(folders[1]), tiny.llama())
    message = "of format 1 and its values were never loaded: load the folder with PeftModel.from_pretrained, and save"
    for use in (lambda: model(tiny.tokens()), lambda: model.train()(tiny.tokens())):
        with pytest.raises(UserError, match=message):
            use()
    adapted = get_peft_model(tiny.llama(), PeftConfig.from_pretrained(folders[1]))
    for use in (adapted.merge_adapter, lambda: adapted.add_weighted_adapter(["default"], [0.5], "half_of_it")):
        with pytest.raises(UserError, match=message):
            use()
    set_peft_model_state_dict(model, load_file(folders[1] / WEIGHTS))
    expected = from_pretrained(tiny.llama(), folders[1])
    assert torch.equal(model.eval()(tiny.tokens()).logits, expected.eval()(tiny.tokens()).logits)


def test_mixed_batches_of_versions(tiny, folders):
    model = from_pretrained(tiny.llama(), folders[2])
    model.load_adapter(folders[1], "old")
    both = model.eval()(tiny.tokens(2).repeat_interleave(2, 0), adapter_names=["default", "old", "default", "old"])
    torch.testing.assert_close(both.logits[::2], both.logits[1::2], rtol=1e-4, atol=1e-4)
