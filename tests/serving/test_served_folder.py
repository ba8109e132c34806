"""Names from requests to adapters on disk, and what is not read."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from redpeft.adapters import read_adapter
from redpeft.errors import UserError
from redpeft.serving import launch, served_folder
from redpeft.serving.served_folder import Refusals, ServedFolder, check_numbers, file_signature, is_red, read

from .tiny_adapters import SITES, WIDTH, adapter, edits

WIDTHS = dict.fromkeys(SITES, WIDTH)


@pytest.fixture
def served(tmp_path):
    """Two adapters, one of them in a run, among much that is none."""
    root = tmp_path / "served"
    adapter(root / "one", 1)
    run(root / "teams" / "two")
    adapter(root / ".trash" / "x", 3)
    adapter(root / "half.partial", 3)
    adapter(root / "teams" / "two" / "checkpoints" / "checkpoint-8", 3)
    adapter(root / "teams" / "two" / "adapter.partial", 3)
    run(root / "unfinished")
    (root / "unfinished" / "adapter" / "adapter_config.json").unlink()
    adapter(tmp_path / "secret", 3)
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "alias").symlink_to(root / "one")
    return ServedFolder(root)


def run(path: Path) -> None:
    adapter(path / "adapter", 2)
    for name in ("recipe.yaml", "task.json"):
        (path / name).write_text("{}")


def test_every_adapter_has_its_path_as_its_name(served):
    assert served.adapters == {"one": served.root / "one", "teams/two": served.root / "teams" / "two" / "adapter"}
    assert {name: served.find(name) for name in served.adapters} == served.adapters


NO_NAMES = """. / ./ .. nobody teams unfinished link alias one/ one// ./one one/. teams/../one /one //one one/adapter
    teams//two teams/two/ teams/two/adapter teams/./two ONE %6fne .trash/x half.partial teams/two/adapter.partial
    teams/two/checkpoints/checkpoint-8 ../secret one/../../secret {}/secret"""
ODD_NAMES = ["", "o\u0301ne", "\uff4fne", "one\0", "one\n", " one", "one ", "\udcff", "x" * 5000, "one/" + "x/" * 5000]


@pytest.mark.parametrize("name", [*NO_NAMES.split(), *ODD_NAMES])
def test_no_other_name_finds_anything(served, name):
    assert served.find(name.format(served.root.parent)) is None


def test_what_is_listed_is_found_by_the_same_rules(served):
    """Whatever folders there are: a name is found if it is listed, and only then."""
    paths = [path.relative_to(served.root) for path in served.root.rglob("*") if path.is_dir()]
    found = {path.as_posix() for path in paths if served.find(path.as_posix()) is not None}
    assert found == set(served.adapters)


def test_new_folders_are_seen_and_removed_ones_gone(served):
    for change, names in (
        (lambda: adapter(served.root / "three", 3), {"one", "teams/two", "three"}),
        (lambda: os.remove(served.root / "one" / "adapter_config.json"), {"teams/two", "three"}),
        (lambda: (served.root / "teams").rename(served.root / ".teams"), {"three"}),
        (lambda: shutil.rmtree(served.root), set()),
        (lambda: adapter(served.root / "deep" / "four", 3), {"deep/four"}),
    ):
        change()
        assert set(served.adapters) == names
        assert served.find("one") == (served.root / "one" if "one" in names else None)


def test_a_list_is_kept_as_long_as_nothing_changes(served, monkeypatch):
    monkeypatch.setattr(served_folder, "SETTLED", 0)
    time.sleep(0.02)  # a later tick of the clock than that of the last change
    first = served.adapters
    monkeypatch.setattr(served_folder, "search_adapters", None)
    assert served.adapters is first
    monkeypatch.undo()
    adapter(served.root / "teams" / "three", 3)
    assert list(served.adapters) == ["one", "teams/three", "teams/two"]


def test_a_list_made_just_after_a_change_is_made_again(served):
    """Another change could have given its folder the same time."""
    assert served.adapters is not served.adapters


def test_a_folder_that_is_an_adapter_or_a_run_has_its_own_name(served):
    for path, name, found in (
        (served.root / "one", "one", served.root / "one"),
        (served.root / "teams" / "two", "two", served.root / "teams" / "two" / "adapter"),
    ):
        assert ServedFolder(path).adapters == {name: found}
        assert ServedFolder(path).find(name) == found
        assert ServedFolder(path).find(".") is None


def test_a_name_that_no_answer_can_hold_is_passed_over(served):
    adapter(Path(os.fsdecode(os.fsencode(served.root) + b"/\xff")), 4)
    assert set(served.adapters) == {"one", "teams/two"}


def test_an_adapter_or_a_file_of_it_that_lies_outside_is_refused(served):
    served.check(served.root / "one")
    with pytest.raises(UserError, match="secret: not served, since it is not below .*served"):
        served.check(served.root.parent / "secret")
    with pytest.raises(UserError, match="link: not served, since it is not below"):
        served.check(served.root / "link")
    weights = served.root / "one" / "adapter_model.safetensors"
    weights.rename(served.root / "weights")
    weights.symlink_to(served.root / "weights")
    served.check(served.root / "one")
    (served.root / "one" / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match=r"one/tokenizer.json: not served, since this link leads out of .*served"):
        served.check(served.root / "one")


def test_the_signature_changes_with_the_adapter(served):
    path = served.find("one")
    weights = path / "adapter_model.safetensors"
    signatures = [file_signature(path)]
    assert file_signature(path) == signatures[0]
    save_file(edits(9), path / "new")
    os.replace(path / "new", weights)
    signatures.append(file_signature(path))
    time.sleep(0.02)
    old = weights.stat()
    with weights.open("r+b") as file:  # in its place, of its size, and with its time
        file.write(file.read(1))
    os.utime(weights, ns=(old.st_atime_ns, old.st_mtime_ns))
    signatures.append(file_signature(path))
    time.sleep(0.02)
    weights.chmod(0o600)  # and back: who could not read it can
    signatures.append(file_signature(path))
    assert len(set(signatures)) == 4


def test_what_was_refused_is_known_until_it_changes():
    refusals = Refusals()
    refusals.add("a", (1, 2), "it is damaged")
    assert refusals.reason("a", (1, 2)) == "it is damaged"
    assert refusals.reason("a", (1, 3)) is None
    assert refusals.reason("b", (1, 2)) is None
    for number in range(served_folder.REMEMBERED):
        refusals.add(f"{number}", (0,), "")
    assert refusals.reason("a", (1, 2)) is None  # of thousands the oldest is forgotten


def test_a_file_larger_than_any_edit_is_not_read(tmp_path):
    path = adapter(tmp_path / "big", 1)
    with (path / "adapter_model.safetensors").open("ab") as file:
        file.truncate(2**26)
    with pytest.raises(UserError, match="67,108,864 bytes, more than edits of this base model can have"):
        read(path, WIDTHS)
    with (path / "adapter_config.json").open("ab") as file:
        file.truncate(2**40)  # which no memory holds
    for look in (is_red, lambda path: read(path, WIDTHS)):
        with pytest.raises(UserError, match=r"adapter_config.json: 1,099,511,627,776 bytes, more than"):
            look(path)


def test_before_the_start_no_more_is_read_than_names(served, caplog, monkeypatch):
    monkeypatch.setattr(served_folder, "read_adapter", None)
    adapter(served.root / "other-sites", 3, ["model.layers.7.mlp.down_proj"])
    with (served.root / "one" / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(200)
    (served.root / "no-json").mkdir()
    (served.root / "no-json" / "adapter_config.json").write_text("[" * 100_000)
    assert launch.scan(served) == launch.AdapterScan(["model.layers.7.mlp.down_proj", *SITES], only_red=True)
    assert "not served as it is: " in caplog.text
    assert f"{served.root / 'one' / 'adapter_model.safetensors'}: corrupt or truncated" in caplog.text
    assert "no-json/adapter_config.json: not valid JSON" in caplog.text
    adapter(served.root / "lora", 4, peft_type="LORA")
    assert launch.scan(served).only_red is False


def test_other_adapters_are_told_apart_and_bad_ones_refused(tmp_path):
    lora = adapter(tmp_path / "lora", 1, peft_type="LORA")
    assert not is_red(lora)
    tensors = edits(2)
    tensors[next(iter(tensors))][5] = float("nan")
    path = adapter(tmp_path / "nan", 2)
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="scale has values that are not finite"):
        read(path, WIDTHS)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = adapter(tmp_path / "private", 1)

    def refuse(path):
        raise PermissionError(errno.EACCES, "not yours")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"private/adapter_config.json: cannot be read \(not yours\)"):
        read(path, WIDTHS)


def test_a_fingerprint_of_another_form_is_refused(tmp_path):
    for wrong in ({"shapes": "a", "samples": ["x"] * 32}, [], {"shapes": 3}):
        path = adapter(tmp_path / "edit", 1, base_fingerprint=wrong)
        with pytest.raises(UserError, match="base_fingerprint is not one that redpeft wrote"):
            read(path, WIDTHS)


@pytest.mark.parametrize(
    ("part", "value", "dtype", "said"),
    [
        ("scale", 1e30, torch.float32, "the scale of .*layers.1.* goes up to 1e\\+30, and no more than 1,000,000"),
        ("scale", -1e30, torch.bfloat16, "the scale of .*layers.1.* goes up to 1e\\+30, and no more than 1,000,000"),
        ("bias", 1e30, torch.bfloat16, "the bias of .*layers.1.* goes up to 2.5e\\+29"),
        ("unit", 1e30, torch.float32, "the bias of .*layers.1.* goes up to "),
        ("scale", 7e4, torch.float16, "the scale of .*layers.1.* goes up to 7e\\+04, and no more than 65,504 is"),
        ("scale", 7e4, torch.bfloat16, None),
        ("bias", -2e6, torch.float32, None),
    ],
)
def test_numbers_that_would_overflow_are_refused(tmp_path, part, value, dtype, said):
    path, tensors = adapter(tmp_path / "edit", 1), edits(1)
    tensors[f"base_model.model.{SITES[1]}.redpeft_edit.{part}"][0] = value
    save_file(tensors, path / "adapter_model.safetensors")
    if said is None:
        check_numbers(read_adapter(path), dtype)
    else:
        with pytest.raises(UserError, match=f"{path}: {said}"):
            check_numbers(read_adapter(path), dtype)


def test_a_bias_that_is_finite_alone_and_not_in_its_unit_is_refused_by_every_reader(tmp_path):
    path, tensors = adapter(tmp_path / "edit", 1), edits(1)
    tensors[f"base_model.model.{SITES[1]}.redpeft_edit.bias"][0] = 1e30
    tensors[f"base_model.model.{SITES[1]}.redpeft_edit.unit"][0] = 1e30
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"layers.1.mlp.down_proj: the bias in units of 1e\+30 is too large for fp32"):
        read_adapter(path)
