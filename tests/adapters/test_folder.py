from __future__ import annotations

import dataclasses
import json
import os
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForSequenceClassification

from helpers.adapters import SITES, WIDTH, random_tensors, write_folder
from redpeft.adapters import (
    Adapter,
    EffectiveEdit,
    load_adapter,
    read_adapter,
    write_adapter,
)
from redpeft.adapters.folder import read_config
from redpeft.errors import UserError
from redpeft.models import fingerprint
from redpeft.storage import find_adapter, save_tensors


def key(site, part):
    return f"base_model.model.{site}.redpeft_edit.{part}"


def test_reads_effective_edits_units_and_head(tmp_path):
    tensors = {**random_tensors(unit=0.25), "base_model.model.classifier.weight": torch.randn(3, WIDTH)}
    adapter = read_adapter(write_folder(tmp_path / "a", tensors, modules_to_save=["classifier"]))
    assert list(adapter.edits) == SITES
    for site in SITES:
        torch.testing.assert_close(adapter.edits[site].scale, tensors[key(site, "scale")].double())
        torch.testing.assert_close(adapter.edits[site].bias, 0.25 * tensors[key(site, "bias")].double())
        assert adapter.units[site] == 0.25
    assert list(adapter.head) == ["classifier.weight"]
    assert adapter.config["revision"] == "abc123"


def test_targets_match_as_peft_matches(tmp_path):
    """PEFT shortens a list of 20 and more names to endings."""
    sites = [f"layer.{index}.output.dense" for index in range(24)]
    folder = write_folder(tmp_path / "a", random_tensors(sites), targets=["output.dense"])
    assert sorted(read_adapter(folder).edits) == sorted(sites)


def test_a_run_folder_holds_its_adapter(adapter_folder):
    assert find_adapter(adapter_folder.parent) == adapter_folder
    assert find_adapter(adapter_folder) == adapter_folder
    assert find_adapter(adapter_folder / "nowhere") == adapter_folder / "nowhere"


def refusal(folder):
    with pytest.raises(UserError) as error:
        read_adapter(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refuses_what_is_not_a_red_adapter(adapter_folder, tmp_path):
    assert "no such adapter folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no adapter_config.json" in refusal(tmp_path / "empty")
    lora = write_folder(tmp_path / "lora", random_tensors(), peft_type="LORA")
    assert "this is a LORA adapter, not a RED adapter" in refusal(lora)
    config = adapter_folder / "adapter_config.json"
    config.write_text("{")
    assert "not valid JSON" in refusal(adapter_folder)
    config.write_text("{}")
    assert "no peft_type" in refusal(adapter_folder)


@pytest.mark.parametrize("name", ["base_model_name_or_path", "task_type"])
@pytest.mark.parametrize("kind", ["REDPEFT", "LORA"])
def test_refuses_names_that_are_no_text(tmp_path, kind, name):
    folder = write_folder(tmp_path / "a", random_tensors(), **{"peft_type": kind, name: [5]})
    with pytest.raises(UserError, match=f"{name} is not a text; set it to null to go without"):
        read_config(folder)


@pytest.mark.parametrize("keep", [0, 5, 60, -10])
def test_refuses_a_truncated_file(adapter_folder, keep):
    weights = adapter_folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "corrupt or truncated" in refusal(adapter_folder)


def test_refuses_a_corrupt_file(adapter_folder):
    (adapter_folder / "adapter_model.safetensors").write_bytes(b"\xff" * 500)
    assert "corrupt or truncated" in refusal(adapter_folder)


def test_never_reads_a_pickle(adapter_folder):
    weights = adapter_folder / "adapter_model.safetensors"
    torch.save(random_tensors(), adapter_folder / "adapter_model.bin")
    weights.unlink()
    message = refusal(adapter_folder)
    assert "adapter_model.bin may be a pickle" in message
    assert "safetensors only" in message
    (adapter_folder / "adapter_model.bin").unlink()
    assert refusal(adapter_folder).endswith("no adapter_model.safetensors there")


def test_names_the_first_few_missing_sites(tmp_path):
    sites = [f"layer.{index}.mlp" for index in range(6)]
    folder = write_folder(tmp_path / "a", random_tensors(sites[:1]), targets=sites)
    assert "no tensors for layer.1.mlp, layer.2.mlp, layer.3.mlp and 2 more" in refusal(folder)


def test_refuses_missing_and_left_over_tensors(tmp_path):
    tensors = random_tensors()
    del tensors[key(SITES[1], "unit")]
    assert f"no tensors for {SITES[1]}.redpeft_edit.unit;" in refusal(write_folder(tmp_path / "a", tensors))
    folder = write_folder(tmp_path / "b", random_tensors(), targets=SITES[:1])
    assert f"does not name: {SITES[1]};" in refusal(folder)
    tensors = {**random_tensors(), key(SITES[0], "gate"): torch.ones(3)}
    assert f"does not name: {SITES[0]}.redpeft_edit.gate;" in refusal(write_folder(tmp_path / "c", tensors))
    for targets in (None, [], "output.dense"):
        folder = write_folder(tmp_path / "d", random_tensors(), targets=targets)
        assert "target_modules is not a list" in refusal(folder)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("bias", torch.ones(WIDTH + 1), "should be of shapes"),
        ("scale", torch.ones(1, WIDTH), "should be of shapes"),
        ("unit", torch.ones(2), "should be of shapes"),
        ("scale", torch.full((WIDTH,), float("nan")), "scale has values that are not finite"),
        ("bias", torch.full((WIDTH,), float("-inf")), "bias has values that are not finite"),
        ("unit", torch.zeros(1), "a unit is a positive number"),
    ],
)
def test_refuses_wrong_shapes_and_values(tmp_path, part, value, message):
    tensors = {**random_tensors(), key(SITES[1], part): value}
    found = refusal(write_folder(tmp_path / "a", tensors))
    assert message in found
    assert SITES[1] in found


@pytest.fixture
def encoder(tiny_encoder_folder):
    return AutoModel.from_pretrained(tiny_encoder_folder)


def test_loads_onto_its_base_without_a_warning(adapter_folder, encoder):
    tensors = random_tensors()
    batch = {"input_ids": torch.arange(5, 15)[None]}
    plain = encoder(**batch).last_hidden_state
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load_adapter(encoder, adapter_folder)
    edited = dict(model.get_base_model().named_modules())
    for site in SITES:
        torch.testing.assert_close(edited[site].redpeft_edit["default"].scale.data, tensors[key(site, "scale")])
        torch.testing.assert_close(edited[site].redpeft_edit["default"].bias.data, tensors[key(site, "bias")])
        assert edited[site].redpeft_edit["default"].unit.item() == 0.25
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (model(**batch).last_hidden_state - plain).abs().max() > 0.1


def test_loads_to_train_under_a_name(adapter_folder, encoder):
    model = load_adapter(encoder, adapter_folder, is_trainable=True, adapter_name="mine")
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * len(SITES)
    assert all(".redpeft_edit.mine." in name for name in trainable)


def loading_refusal(model, folder):
    before = [name for name, _ in model.named_modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # one line: PEFT's own warnings about the same do not come on top
        with pytest.raises(UserError) as error:
            load_adapter(model, folder)
    assert [name for name, _ in model.named_modules()] == before
    assert "is for another base model (some/encoder)" in str(error.value)
    return str(error.value)


def test_refuses_a_base_of_other_names_or_widths(tmp_path, encoder):
    sites = [*SITES, "encoder.layer.2.output.dense"]
    message = loading_refusal(encoder, write_folder(tmp_path / "a", random_tensors(sites), targets=sites))
    assert "this one (BertModel) has no module encoder.layer.2.output.dense" in message
    message = loading_refusal(encoder, write_folder(tmp_path / "b", random_tensors(width=WIDTH + 16)))
    assert f"the output of {SITES[0]} has width 32 here and 48 in the adapter" in message


def test_refuses_a_base_of_other_weights(tmp_path, encoder):
    right = fingerprint(encoder, SITES)
    folder = write_folder(tmp_path / "a", random_tensors(), base_fingerprint=right)
    load_adapter(encoder, folder)
    other = AutoModel.from_config(encoder.config)
    assert "the weights differ" in loading_refusal(other, folder)


def test_refuses_a_head_that_does_not_fit(tmp_path, tiny_encoder_folder):
    sites = [f"bert.{site}" for site in SITES]

    def head(rows, **more):
        tensors = {"classifier.weight": torch.randn(rows, WIDTH), "classifier.bias": torch.randn(rows), **more}
        return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}

    def folder(tensors):
        config = {"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}
        return write_folder(tmp_path / "a", {**random_tensors(sites), **tensors}, targets=sites, **config)

    model = AutoModelForSequenceClassification.from_pretrained(tiny_encoder_folder, num_labels=3)
    message = loading_refusal(model, folder(head(4)))
    assert "the head classifier.bias is (3,) here and (4,) in the adapter" in message
    assert "no tensors for its head classifier.bias, classifier.weight" in loading_refusal(model, folder({}))
    message = loading_refusal(model, folder(head(3, **{"scorer.weight": torch.ones(1)})))
    assert "has no head scorer.weight" in message
    tensors = head(3)
    loaded = load_adapter(model, folder(tensors))
    weight = loaded.get_base_model().classifier.modules_to_save["default"].weight.data
    torch.testing.assert_close(weight, tensors["base_model.model.classifier.weight"])


def test_reads_what_peft_writes(tmp_path, encoder):
    """The contract with the writer: PEFT's save_pretrained of a RED adapter."""
    from peft import get_peft_model

    from redpeft import RedConfig

    model = get_peft_model(encoder, RedConfig(init_weights=False, unit=0.5))
    model.save_pretrained(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    assert sorted(adapter.edits) == SITES
    for site, edit in adapter.edits.items():
        layer = encoder.get_submodule(site).redpeft_edit["default"]
        assert torch.equal(edit.scale, 1 + layer.offset.data.double())
        assert torch.equal(edit.bias, 0.5 * layer.bias.data.double())
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_fingerprint"]


# Writing


@pytest.fixture
def adapter(adapter_folder):
    adapter = read_adapter(adapter_folder)
    head = {"classifier.weight": torch.randn(3, WIDTH).bfloat16(), "classifier.bias": torch.randn(WIDTH, 3).T[0]}
    return dataclasses.replace(adapter, folder=adapter_folder.parent / "deep" / "new", head=head)


def test_writes_what_it_reads(adapter):
    write_adapter(adapter)
    again = read_adapter(adapter.folder)
    assert again.units == adapter.units == dict.fromkeys(SITES, 0.25)
    for site in SITES:
        assert torch.equal(again.edits[site].scale, adapter.edits[site].scale)
        assert torch.equal(again.edits[site].bias, adapter.edits[site].bias)
    assert again.head.keys() == adapter.head.keys()
    assert all(torch.equal(again.head[key], tensor) for key, tensor in adapter.head.items())
    assert again.head["classifier.weight"].dtype == torch.bfloat16
    assert again.config == adapter.config
    assert [path.name for path in adapter.folder.parent.iterdir()] == ["new"]


def test_the_edits_say_which_modules(adapter, tmp_path):
    """Also where an edit is one tensor twice, in fp64, and the folder is there and empty, or behind a link."""
    ones = torch.full((WIDTH,), 3.0, dtype=torch.float64)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    write_adapter(
        Adapter(
            tmp_path / "link", {"base_model_name_or_path": None}, {"x.1": EffectiveEdit(ones, ones)}, {"x.1": 2.0}, {}
        )
    )
    written = read_adapter(tmp_path / "empty")
    assert written.config["target_modules"] == ["x.1"]
    assert written.config["resolved"] is True
    assert torch.equal(written.edits["x.1"].bias, ones.float())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_rights_that_the_umask_gives(adapter, tmp_path, umask):
    """safetensors alone writes 0600."""
    before = os.umask(umask)
    try:
        write_adapter(dataclasses.replace(adapter, folder=tmp_path / "runs" / "one"))
        save_tensors(tmp_path / "tensors", {"a": torch.ones(2)}, {})
        files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
        assert len(files) == 2
        modes = {path.stat().st_mode & 0o777 for path in (*files, tmp_path / "tensors")}
    finally:
        os.umask(before)
    assert modes == {0o666 & ~umask}
    assert not list(tmp_path.rglob("*.partial"))


def test_what_is_written_loads_in_peft(adapter, encoder):
    write_adapter(dataclasses.replace(adapter, head={}))
    model = PeftModel.from_pretrained(encoder, adapter.folder)
    for site in SITES:
        edit = model.get_base_model().get_submodule(site).redpeft_edit["default"]
        torch.testing.assert_close(edit.effective[1].data, adapter.edits[site].bias.float())


def test_refuses_to_write(adapter, tmp_path):
    def refusal(**changes):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError) as error:
            write_adapter(dataclasses.replace(adapter, **changes))
        assert sorted(tmp_path.rglob("*")) == before
        return str(error.value)

    (tmp_path / "file").touch()
    for there in (tmp_path / "adapter", tmp_path / "file"):
        assert f"{there} exists already and is not an empty folder" in refusal(folder=there)
    assert f"{tmp_path}/file/x: {tmp_path}/file is not a folder" in refusal(folder=tmp_path / "file" / "x")
    assert "no site is left to edit" in refusal(edits={})
    edit = adapter.edits[SITES[0]]
    for wrong in (
        EffectiveEdit(edit.scale.double() * 1e39, edit.bias),
        EffectiveEdit(edit.scale, edit.bias * float("nan")),
    ):
        assert f"{SITES[0]}: " in (message := refusal(edits={SITES[0]: wrong}))
        assert "not finite (NaN, or too large for fp32)" in message
    assert "should be of shapes" in refusal(edits={SITES[0]: EffectiveEdit(edit.scale, edit.bias[:3])})
