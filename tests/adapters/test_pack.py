"""Packs: what comes out is what went in, byte for byte; what is damaged, mixed up or hostile is refused in a line."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from redpeft.adapters import open_pack, pack_adapters, packing, read_adapter, unpack_adapters
from redpeft.errors import RunError, UserError

from .folders import SITES, WIDTH, random_tensors, tree, write_folder, write_run


def key(site, part):
    return f"base_model.model.{site}.redpeft_edit.{part}"


@pytest.fixture
def runs(tmp_path):
    """Two finished runs, one of them a seed's, and a plain adapter with a head."""
    write_run(tmp_path / "runs" / "reviews", seed=1)
    write_run(tmp_path / "runs" / "topics" / "seed-3", seed=2)
    head = {"base_model.model.classifier.weight": torch.randn(3, WIDTH).bfloat16()}
    write_folder(tmp_path / "runs" / "plain", random_tensors(seed=3) | head, modules_to_save=["classifier"])
    return tmp_path / "runs"


@pytest.fixture
def pack(runs):
    pack_adapters(runs, runs.parent / "pack.safetensors")
    return runs.parent / "pack.safetensors"


def rewrite(path, change):
    """Write the pack again with an index that `change` was called with."""
    with safe_open(path, framework="pt") as file:
        index = json.loads(file.metadata()["redpeft_pack"])
    change(index)
    save_file(load_file(path), path, metadata={"redpeft_pack": json.dumps(index)})


def refusal(error, function, *arguments, **options):
    with pytest.raises(error) as raised:
        function(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_folder_comes_back_as_it_was(runs, pack, tmp_path):
    assert unpack_adapters(pack, tmp_path / "out") == ["plain", "reviews", "topics/seed-3"]
    assert tree(tmp_path / "out") == tree(runs)
    assert len(tree(runs)) == 2 + 2 * 7


values = st.floats(-64, 74, width=32)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64])


@st.composite
def adapters_of_one_base(draw):
    """Some adapters at some of three sites, with a head of some shape and dtype or none, and the file's metadata."""
    widths = {f"layer.{index}.mlp": draw(st.integers(1, 6)) for index in range(3)}
    return [draw(an_adapter(widths)) for _ in range(draw(st.integers(1, 5)))]


@st.composite
def an_adapter(draw, widths):
    tensors, sites = {}, draw(st.lists(st.sampled_from(sorted(widths)), min_size=1, unique=True))
    for site in sites:
        for part in ("scale", "bias"):
            tensors[key(site, part)] = torch.tensor(
                draw(st.lists(values, min_size=widths[site], max_size=widths[site]))
            )
        tensors[key(site, "unit")] = torch.tensor([draw(st.floats(2.0**-20, 2.0**20, width=32))])
    shape = draw(st.none() | st.lists(st.integers(0, 3), max_size=2))
    if shape is not None:
        tensors["base_model.model.score.weight"] = torch.full(shape, draw(values)).to(draw(dtypes))
    return sites, tensors, draw(st.none() | st.just({"format": "pt"}))


@settings(max_examples=40, deadline=None)
@given(adapters_of_one_base())
def test_any_adapters_come_back_bit_for_bit(drawn):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for index, (sites, tensors, metadata) in enumerate(drawn):
            adapter = write_folder(folder / "in" / str(index), tensors, sites)
            save_file(tensors, adapter / "adapter_model.safetensors", metadata=metadata)
        pack_adapters(folder / "in", folder / "pack")
        unpack_adapters(folder / "pack", folder / "out")
        assert tree(folder / "out") == tree(folder / "in")
        with open_pack(folder / "pack") as pack:
            assert len(pack.names) == len(drawn)
            for name in pack.names:
                same(pack.adapter(name), read_adapter(folder / "in" / name))


def same(one, other):
    assert one.config == other.config
    assert one.units == other.units
    assert one.edits.keys() == other.edits.keys()
    for site in one.edits:
        assert torch.equal(one.edits[site].scale, other.edits[site].scale)
        assert torch.equal(one.edits[site].bias, other.edits[site].bias)
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in one.head.items()} == {
        name: (tensor.dtype, tensor.tolist()) for name, tensor in other.head.items()
    }


def test_the_tables_have_a_row_for_each_adapter_of_a_shape(runs, pack):
    tables = load_file(pack)
    bias = tables[f"1/{key(SITES[0], 'bias')}"]
    assert bias.shape == (2, WIDTH)
    assert torch.equal(bias[1], random_tensors(seed=2)[key(SITES[0], "bias")])  # as stored: in units
    assert tables[f"1/{key(SITES[0], 'unit')}"].shape == (2, 1)
    assert tables["0/base_model.model.classifier.weight"].shape == (1, 3, WIDTH)
    assert tables["0/base_model.model.classifier.weight"].dtype == torch.bfloat16
    assert len(tables) == 7 + 6 + 1
    assert bytes(tables["files"].numpy()).count(5000 * b" ") == 1  # two tokenizers, one content


def test_a_pack_of_the_same_folder_is_the_same_file(runs, pack, tmp_path):
    pack_adapters(runs, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == pack.read_bytes()


def test_one_adapter_is_read_without_the_others(runs, pack):
    damage(pack, random_tensors(seed=1)[key(SITES[1], "scale")])
    with open_pack(pack) as opened:
        same(opened.adapter("topics/seed-3"), read_adapter(runs / "topics" / "seed-3" / "adapter"))
        assert "reviews is not there as it was packed" in refusal(UserError, opened.adapter, "reviews")
        assert "has no adapter other; it has plain, reviews, topics/seed-3" in refusal(
            UserError, opened.weights, "other"
        )


def damage(pack, values):
    """Flip a bit of these values in the file."""
    data, place = bytearray(pack.read_bytes()), pack.read_bytes().index(bytes(values.numpy()))
    data[place] ^= 1
    pack.write_bytes(data)


def test_a_thousand_adapters_take_seconds(tmp_path):
    first = write_run(tmp_path / "runs" / "0000")
    for index in range(1, 1000):
        run = tmp_path / "runs" / f"{index:04}"
        shutil.copytree(first, run)
        save_file(random_tensors(seed=index), run / "adapter" / "adapter_model.safetensors")
    start = time.perf_counter()
    packed = pack_adapters(tmp_path / "runs", tmp_path / "pack")
    unpack_adapters(tmp_path / "pack", tmp_path / "one", only=["0500"])
    assert time.perf_counter() - start < 20  # on an idle machine two
    assert (packed.adapters, packed.groups) == (1000, 1)
    assert packed.bytes < 1000 * (4 * (2 * WIDTH + 1) * len(SITES) + 1000)
    assert tree(tmp_path / "one" / "0500") == tree(tmp_path / "runs" / "0500")
    header = int.from_bytes((tmp_path / "pack").read_bytes()[:8], "little")
    assert header < 1_000_000  # of 100 million that safetensors reads


def test_some_adapters_are_taken_out(runs, pack, tmp_path):
    only = ["topics/seed-3", "plain", "plain"]
    assert unpack_adapters(pack, tmp_path / "out", only=only) == ["topics/seed-3", "plain"]
    expected = {path: data for path, data in tree(runs).items() if not path.startswith("reviews")}
    assert tree(tmp_path / "out") == expected
    message = refusal(UserError, unpack_adapters, pack, tmp_path / "other", only=["plain", "review"])
    assert message.endswith("this pack has no adapter review; it has plain, reviews, topics/seed-3")
    assert not (tmp_path / "other").exists()


def packed_names(folder):
    out = folder.parent / f"{folder.name}.pack"
    out.unlink(missing_ok=True)
    packed = pack_adapters(folder, out)
    shutil.rmtree(folder.parent / "again", ignore_errors=True)
    unpack_adapters(out, folder.parent / "again")
    with open_pack(out) as pack:
        return pack.names, packed, tree(folder.parent / "again")


def test_names_are_paths_below_the_folder(runs):
    assert packed_names(runs / "topics")[0] == ["seed-3"]
    names, _, files = packed_names(runs / "reviews")
    assert (names, files) == (["."], tree(runs / "reviews"))
    names, _, files = packed_names(runs / "reviews" / "adapter")
    assert (names, files) == (["."], tree(runs / "reviews" / "adapter"))
    write_folder(runs / "plain" / "adapter", random_tensors(seed=4))  # an adapter within another: each has its name
    names, _, files = packed_names(runs / "plain")
    assert (names, files) == ([".", "adapter"], tree(runs / "plain"))


def test_what_is_left_out_and_what_is_said_of_it(runs):
    before = tree(runs)
    reviews = runs / "reviews"
    write_folder(reviews / "checkpoints" / "checkpoint-2", random_tensors())
    (reviews / "metrics.jsonl").write_text("{}")
    write_folder(runs / "new.partial", random_tensors())
    write_folder(runs / ".cache" / "old", random_tensors())
    (reviews / "adapter" / ".lock").write_text("")
    (reviews / "adapter" / "optimizer.pt").write_bytes(b"a pickle")
    for name in ("recipe.yaml", "task.json"):
        (runs / "begun").mkdir(exist_ok=True)
        shutil.copy(reviews / name, runs / "begun" / name)
    (reviews / "adapter" / "templates").mkdir()
    (reviews / "adapter" / "templates" / "tool.jinja").write_text("a template")
    names, packed, files = packed_names(runs)
    assert names == ["plain", "reviews", "topics/seed-3"]
    assert files == before | {"reviews/adapter/templates/tool.jinja": b"a template"}
    assert packed.unfinished == ["begun"]
    assert packed.left_out == ["reviews/adapter/optimizer.pt"]


def test_nothing_to_pack(tmp_path, runs):
    assert refusal(UserError, pack_adapters, tmp_path / "no", tmp_path / "p") == f"no such folder: {tmp_path / 'no'}"
    (tmp_path / "empty").mkdir()
    assert refusal(UserError, pack_adapters, tmp_path / "empty", tmp_path / "p").endswith("empty: no adapters there")
    (runs / "reviews" / "result.json").unlink()
    shutil.rmtree(runs / "reviews" / "adapter")
    assert "no adapters there but unfinished" in refusal(UserError, pack_adapters, runs / "reviews", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_an_adapter_that_is_not_whole_is_named(runs, tmp_path):
    def refused():
        message = refusal(UserError, pack_adapters, runs, tmp_path / "p")
        assert not list(tmp_path.glob("p*"))
        return message

    weights = runs / "reviews" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert refused().startswith(f"{weights}: corrupt or truncated")
    shutil.rmtree(runs / "reviews" / "adapter")
    assert refused() == f"{runs / 'reviews' / 'adapter'}: no such adapter folder"
    shutil.rmtree(runs / "reviews")
    write_folder(runs / "lora", random_tensors(), peft_type="LORA")
    assert "lora: this is a LORA adapter, not a RED adapter" in refused()


def test_one_pack_has_one_base_model(tmp_path):
    prints = [{"shapes": "x", "samples": [number]} for number in (0.5, 0.9)]
    write_folder(tmp_path / "in" / "a", random_tensors(), base_fingerprint=prints[0])
    write_folder(tmp_path / "in" / "b", random_tensors(SITES[:1]), SITES[:1], base_fingerprint=prints[1])
    pack_adapters(tmp_path / "in", tmp_path / "p")  # other sites: their fingerprints cannot be compared
    write_folder(tmp_path / "in" / "c", random_tensors(SITES[:1]), SITES[:1], base_fingerprint=prints[0])
    message = refusal(UserError, pack_adapters, tmp_path / "in", tmp_path / "q")
    assert re.search(r"in/b and .*in/c are for different base models: the weights differ", message)
    write_folder(tmp_path / "in" / "c", random_tensors(), base_model_name_or_path="some/decoder")
    message = refusal(UserError, pack_adapters, tmp_path / "in", tmp_path / "q")
    assert "are for different base models: one names some/encoder, the other some/decoder" in message
    assert not list(tmp_path.glob("q*"))


def test_nothing_is_overwritten(runs, pack, tmp_path):
    before = pack.read_bytes()
    assert refusal(UserError, pack_adapters, runs, pack) == f"{pack} exists already: choose another, or remove it"
    assert pack.read_bytes() == before
    assert "is not an empty folder: choose another" in refusal(UserError, unpack_adapters, pack, runs)
    (tmp_path / "file").write_text("")
    assert "cannot write" in refusal(UserError, pack_adapters, runs, tmp_path / "file" / "pack")


def test_what_changes_while_it_is_packed_is_not_packed(runs, tmp_path, monkeypatch):
    tables, weights = packing._Collected.tables, runs / "plain" / "adapter_model.safetensors"

    def late(self):
        save_file(random_tensors(seed=9), weights)
        return tables(self)

    monkeypatch.setattr(packing._Collected, "tables", late)
    message = refusal(RunError, pack_adapters, runs, tmp_path / "p")
    assert message == f"{weights} was changed while it was being packed: run the same command again"

    def gone(self):
        weights.unlink()
        return tables(self)

    monkeypatch.setattr(packing._Collected, "tables", gone)
    assert "was changed while it was being packed" in refusal(RunError, pack_adapters, runs, tmp_path / "p")
    save_file(random_tensors(seed=9), weights)

    def wrong(self):
        made = tables(self)
        made[f"0/{key(SITES[0], 'scale')}"][1, 7] += 2**-20
        return made

    monkeypatch.setattr(packing._Collected, "tables", wrong)
    assert "does not read back" in refusal(RunError, pack_adapters, runs, tmp_path / "p")
    assert not list(tmp_path.glob("p*"))


def test_files_that_cannot_be_read_or_named(runs, tmp_path):
    (runs / "plain" / "linked.json").symlink_to(tmp_path / "nowhere")
    message = refusal(UserError, pack_adapters, runs, tmp_path / "p")
    assert message == f"cannot read {runs / 'plain' / 'linked.json'}: No such file or directory"
    (runs / "plain" / "linked.json").unlink()
    try:
        (runs / "plain" / "caf\udce9").write_text("")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    message = refusal(UserError, pack_adapters, runs, tmp_path / "p")
    assert message == f"{runs}: the name 'plain/caf\\udce9' there is not UTF-8: rename it"
    assert not list(tmp_path.glob("p*"))


def test_an_index_that_safetensors_could_not_read_is_refused(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "LARGEST_INDEX", 100)
    assert "3 adapters are too many for one pack" in refusal(UserError, pack_adapters, runs, tmp_path / "p")


def unpacked(pack):
    """The message with which a pack is refused; nothing may have been written."""
    message = refusal(UserError, unpack_adapters, pack, pack.parent / "refused")
    assert not list(pack.parent.glob("refused*"))
    return message


def test_a_file_that_is_no_pack(runs, pack, tmp_path):
    assert unpacked(tmp_path / "no") == f"no such file: {tmp_path / 'no'}"
    assert "which redpeft pack writes" in unpacked(runs / "plain" / "adapter_model.safetensors")
    assert "corrupt or truncated" in unpacked(runs / "plain" / "adapter_config.json")
    for index in ("{", "[]", '{"version": 2, "groups": [], "contents": [], "adapters": []}'):
        save_file(load_file(pack), tmp_path / "p", metadata={"redpeft_pack": index})
        assert "its index is damaged, or of a later version" in unpacked(tmp_path / "p")


@pytest.mark.parametrize("keep", [0, 5, 700, -1])
def test_a_pack_cut_short(pack, keep):
    pack.write_bytes(pack.read_bytes()[:keep])
    assert "corrupt or truncated" in unpacked(pack)


def test_a_bit_that_flipped_is_found(pack, tmp_path):
    whole = pack.read_bytes()
    damage(pack, random_tensors(seed=2)[key(SITES[0], "bias")])
    assert unpacked(pack) == f"{pack}: damaged, topics/seed-3 is not there as it was packed; copy the file again"
    pack.write_bytes(whole.replace(b"# The card of reviews", b"# The card of Reviews"))
    assert "damaged, reviews/adapter/README.md is not there" in unpacked(pack)


@pytest.mark.parametrize(
    ("what", "value"), [("group", 9), ("row", 2), ("row", 10**30), ("files", {"x": 99}), ("sha256", "")]
)
def test_an_index_that_names_what_is_not_there(pack, what, value):
    rewrite(pack, lambda index: index["adapters"][1].update({what: value}))
    assert "damaged" in unpacked(pack)


def test_an_adapter_without_its_configuration(pack):
    rewrite(pack, lambda index: index["adapters"][0]["files"].clear())
    with open_pack(pack) as opened:
        assert "adapter_config.json: not valid JSON" in refusal(UserError, opened.adapter, "plain")


@pytest.mark.parametrize("path", ["../evil", "/tmp/evil", "a/../../evil", "a\0b"])
@pytest.mark.parametrize("field", ["name", "folder", "files"])
def test_a_pack_writes_nowhere_else(pack, path, field):
    value = {path: 0} if field == "files" else path
    rewrite(pack, lambda index: index["adapters"][1].update({field: value}))
    assert "would lie outside the folder: do not use this file" in unpacked(pack)
    assert not (pack.parent / "evil").exists()
