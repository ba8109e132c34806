"""Names from requests to adapters on disk, and what is not read."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from redpeft.adapters import pack_adapters
from redpeft.errors import UserError
from redpeft.serving.folder import Source, is_red, read, stamp

from .making import SITES, WIDTH, adapter, edits

WIDTHS = dict.fromkeys(SITES, WIDTH)


@pytest.fixture
def source(tmp_path):
    adapter(tmp_path / "served" / "one", 1)
    adapter(tmp_path / "served" / "teams" / "two" / "adapter", 2)  # a run's
    adapter(tmp_path / "secret", 3)
    return Source(tmp_path / "served")


def test_every_adapter_has_its_path_as_its_name(source):
    assert source.names == ["one", "teams/two"]
    assert source.find("one") == source.root / "one"
    assert source.find("teams/two") == source.root / "teams" / "two" / "adapter"


def test_new_folders_are_seen_and_removed_ones_gone(source):
    adapter(source.root / "three", 3)
    assert source.names == ["one", "teams/two", "three"]
    os.remove(source.root / "one" / "adapter_config.json")
    assert source.names == ["teams/two", "three"]
    assert source.find("one") is None


def test_an_empty_or_missing_folder_has_no_adapters(tmp_path):
    assert Source(tmp_path).names == []
    assert Source(tmp_path / "none").names == []
    assert Source(tmp_path / "none").find("one") is None


@pytest.mark.parametrize(
    "name",
    ["../secret", "one/../../secret", "..", ".", "", "./one", "teams/../one", "one\0", "{}/secret", "teams", "/"],
)
def test_a_name_never_leads_out_of_the_folder(source, name):
    assert source.find(name.format(source.root.parent)) is None


def test_a_link_out_of_the_folder_is_no_adapter(source):
    (source.root / "link").symlink_to(source.root.parent / "secret")
    assert source.find("link") is None
    assert not source.holds(source.root / "link")
    assert source.holds(source.root / "one")


def test_a_pack_is_served_like_the_folder_it_came_from(source, tmp_path):
    file = tmp_path / "all.safetensors"
    pack_adapters(source.root, file)
    pack = Source(file)
    assert pack.names == source.names
    assert pack.find("../secret") is None
    for name in pack.names:
        ours, theirs = read(pack.find(name), WIDTHS), read(source.find(name), WIDTHS)
        assert is_red(pack.find(name))
        assert all(torch.equal(ours.edits[site].scale, theirs.edits[site].scale) for site in SITES)
        assert all(torch.equal(ours.edits[site].bias, theirs.edits[site].bias) for site in SITES)


def test_a_stamp_changes_with_the_adapter(source):
    folder = source.find("one")
    before = stamp(folder)
    assert stamp(folder) == before
    tensors = edits(9)
    save_file(tensors, folder / "new")
    os.replace(folder / "new", folder / "adapter_model.safetensors")
    assert stamp(folder) != before


def test_a_file_larger_than_any_edit_is_not_read(tmp_path):
    folder = adapter(tmp_path / "big", 1)
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.truncate(2**26)
    with pytest.raises(UserError, match="67,108,864 bytes, more than edits of this base model can have"):
        read(folder, WIDTHS)


def test_other_adapters_are_told_apart_and_bad_ones_refused(tmp_path):
    lora = adapter(tmp_path / "lora", 1, peft_type="LORA")
    assert not is_red(lora)
    tensors = edits(2)
    tensors[next(iter(tensors))][5] = float("nan")
    folder = adapter(tmp_path / "nan", 2)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="scale has values that are not finite"):
        read(folder, WIDTHS)
