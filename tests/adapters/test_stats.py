from __future__ import annotations

import dataclasses
import io
import json
import math

import matplotlib.image
import pytest
import torch
from rich.console import Console
from transformers import BertConfig, CLIPConfig, GPT2Config, GraniteMoeSharedConfig, LlamaConfig

from helpers.adapters import SITES, random_tensors, write_folder
from redpeft.adapters import read_adapter
from redpeft.adapters.stats import (
    channels,
    compare,
    comparison_table,
    outliers,
    plot,
    preview,
    preview_table,
    short_site_names,
    summarize,
    summary_table,
)
from redpeft.errors import UserError

SCALE = [3.0, -2.0, 1.0, -0.5]
BIAS = [1.0, -4.0, 0.0, 10.0]


def one_site(folder, scale=SCALE, bias=BIAS, unit=0.5, site="layers.3.mlp"):
    tensors = {"scale": torch.tensor(scale), "bias": torch.tensor(bias), "unit": torch.tensor([unit])}
    tensors = {f"base_model.model.{site}.redpeft_edit.{name}": tensor for name, tensor in tensors.items()}
    return read_adapter(write_folder(folder, tensors, targets=[site]))


def text_of(table):
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def test_summary_by_formula(tmp_path):
    (row,) = summarize(one_site(tmp_path / "a"))
    expected = {
        "site": "layers.3.mlp",
        "width": 4,
        "scale_rms": math.sqrt((4 + 9 + 0 + 2.25) / 4),
        "scale_min": -2.0,
        "scale_max": 3.0,
        "scale_negative": 0.5,
        "bias_rms": math.sqrt((1 + 16 + 100) / 4),
        "bias_max": 10.0,
        "unit": 0.5,
        "shift_rms": 0.5 * math.sqrt((1 + 16 + 100) / 4),
    }
    for name, value in dataclasses.asdict(row).items():
        assert value == expected[name] if isinstance(value, str) else math.isclose(value, expected[name], rel_tol=1e-6)


def test_comparison_by_formula(tmp_path):
    this = one_site(tmp_path / "a")
    # scale - 1 turned round and twice as long; the bias is orthogonal, and its unit twice as large
    other = one_site(tmp_path / "b", [-3.0, 7.0, 1.0, 4.0], [4.0, 1.0, 3.0, 0.0], unit=1.0)
    (row,) = compare(this, other)
    assert row.edited_by == "both"
    assert math.isclose(row.scale_cosine, -1, rel_tol=1e-6)
    assert math.isclose(row.scale_size, 2, rel_tol=1e-6)
    assert abs(row.shift_cosine) < 1e-6
    assert math.isclose(row.shift_size, math.sqrt(26) / (0.5 * math.sqrt(117)), rel_tol=1e-6)


def test_comparison_where_one_does_not_edit(tmp_path):
    this, other = one_site(tmp_path / "a"), one_site(tmp_path / "b", site="layers.10.mlp")
    first, second = compare(this, other)
    assert (first.site, first.edited_by, first.scale_cosine) == ("layers.3.mlp", "this", None)
    assert (second.site, second.edited_by, second.shift_size) == ("layers.10.mlp", "other", None)
    unlearned = one_site(tmp_path / "c", scale=[1.0] * 4)
    (row,) = compare(this, unlearned)
    assert row.scale_cosine is None
    assert row.scale_size == 0
    (row,) = compare(this, one_site(tmp_path / "d", scale=[2.0] * 5, bias=[1.0] * 5))
    assert row.edited_by == "both, in different widths"
    assert "in different widths" in text_of(comparison_table([row], "two adapters"))


def test_rows_come_in_the_order_of_depth(tmp_path):
    sites = [f"layers.{index}.mlp" for index in (10, 2, 0)]
    adapter = read_adapter(write_folder(tmp_path / "a", random_tensors(sites), targets=sites))
    assert [row.site for row in summarize(adapter)] == ["layers.0.mlp", "layers.2.mlp", "layers.10.mlp"]


def test_tables_show_the_numbers(tmp_path):
    adapter = one_site(tmp_path / "a")
    table = text_of(summary_table(summarize(adapter), "an adapter"))
    for figure in ("layers.3.mlp", "1.95", "-2.00", "3.00", "50.0%", "5.41", "10", "0.5"):
        assert figure in table
    other = one_site(tmp_path / "b", [-3.0, 7.0, 1.0, 4.0])
    table = text_of(comparison_table(compare(adapter, other), "two adapters"))
    assert "-1" in table
    assert "2" in table


def test_rows_are_ready_for_json(adapter_folder):
    adapter = read_adapter(adapter_folder)
    rows = [*summarize(adapter), *compare(adapter, adapter)]
    assert len(json.loads(json.dumps([dataclasses.asdict(row) for row in rows]))) == 2 * len(SITES)


def test_channels_and_outliers_by_formula(tmp_path):
    write_folder(tmp_path, random_tensors())
    adapter = read_adapter(tmp_path)
    found = channels(adapter)
    for site, edit in adapter.edits.items():
        assert torch.equal(found["scale"][site], edit.scale - 1)
        assert torch.equal(found["bias"][site], edit.bias / adapter.units[site])
    rows = outliers(adapter, count=2)
    assert [row.vector for row in rows] == ["scale", "scale", "bias", "bias"]
    for vector in ("scale", "bias"):
        first, second = (row for row in rows if row.vector == vector)
        largest = torch.cat([values.abs() for values in found[vector].values()]).sort(descending=True).values
        assert [abs(first.value), abs(second.value)] == largest[:2].tolist()
        values = found[vector][first.site]
        assert values[first.channel].item() == first.value
        assert first.times == pytest.approx(abs(first.value) / values.square().mean().sqrt().item())


@pytest.mark.parametrize(
    ("sites", "names"),
    [
        (["h.0.mlp.down", "h.10.mlp.down"], ["0", "10"]),
        (["h.0.attn.q", "h.0.mlp.down", "h.1.attn.q"], ["0 q", "0 down", "1 q"]),
        (["encoder.h.0.down", "decoder.h.0.down"], ["encoder.h.0.down", "decoder.h.0.down"]),
        (["pooler", "classifier"], ["pooler", "classifier"]),
    ],
)
def test_names_of_sites_are_short(sites, names):
    assert short_site_names(sites) == names


def test_plot_writes_a_png(tmp_path):
    sites = [f"layers.{index}.{place}" for index in range(4) for place in ("mlp", "attn.q_proj")]
    adapter = read_adapter(write_folder(tmp_path / "a", random_tensors(sites), targets=sites))
    one, two = plot([adapter], tmp_path / "new" / "one.png"), plot([adapter, adapter], tmp_path / "two")
    for path in (one, two):
        assert path.read_bytes().startswith(b"\x89PNG")
    height = [int.from_bytes(path.read_bytes()[20:24], "big") for path in (one, two)]
    assert height[1] > 1.5 * height[0]


def test_plot_shows_every_adapter(tmp_path):
    """The rows share their axes: the second, larger one must not fall off the first one's."""
    small = one_site(tmp_path / "small", scale=[1.1] * 4, bias=[0.1] * 4)
    picture = matplotlib.image.imread(plot([small, one_site(tmp_path / "large")], tmp_path / "two.png"))
    blue = (picture[..., 2] > 0.6) & (picture[..., 0] < 0.3)  # the first line's colour: its markers
    height, width = blue.shape
    for left in (0, width // 2):
        for top in (0, height // 2):
            assert blue[top : top + height // 2, left : left + width // 2].any()


# --- before there is an adapter ---


def test_the_paper_s_ratios_for_llama_2(tmp_path):
    """Llama-2-7B from its configuration alone: 25,705 times fewer than full, 32 times fewer than LoRA r=16."""
    config = LlamaConfig(architectures=["LlamaForCausalLM"], vocab_size=32000, intermediate_size=11008)
    config.save_pretrained(tmp_path)
    found = preview(str(tmp_path))
    assert len(found.sites) == 32
    assert found.sites[0].name == "model.layers.0.mlp.down_proj"
    assert found.parameters == 262_144
    assert found.base_parameters == 6_738_415_616
    assert round(found.times_fewer_than_full) == 25_705
    assert found.share_percent == pytest.approx(100 / 25_705, rel=1e-4)
    assert found.lora_modules == ["q_proj", "v_proj"]
    assert found.lora_parameters == 8_388_608
    assert found.times_fewer_than_lora == 32


def test_red_plus_has_five_sites_a_layer(tmp_path):
    BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64).save_pretrained(
        tmp_path
    )
    found = preview(str(tmp_path), "red+")
    assert found.architecture == "BertModel"
    assert len(found.sites) == 15
    assert found.parameters == 15 * 2 * 32
    console = Console(file=io.StringIO(), width=120)
    console.print(preview_table(found))
    text = console.file.getvalue()
    for row in ("encoder.layer.*.attention.self.query", "encoder.layer.*.output.dense", "960", "LoRA r=16: 6,144"):
        assert row in text


def test_fused_projections_count_by_their_width(tmp_path):
    GPT2Config(n_embd=32, n_layer=2, n_head=2).save_pretrained(tmp_path)
    assert preview(str(tmp_path), ["qkv"]).parameters == 2 * 2 * 96


def test_lora_is_not_available_where_peft_has_no_default(tmp_path):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    CLIPConfig(text_config=small, vision_config=small).save_pretrained(tmp_path)
    found = preview(str(tmp_path))
    assert found.lora_parameters is None
    assert found.times_fewer_than_lora is None
    assert "n/a" in preview_table(found).caption


def test_no_such_model(tmp_path):
    with pytest.raises(UserError, match=r"no such model folder: .*nowhere") as error:
        preview(str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)


def test_a_shared_expert_is_named_beside_the_experts_that_it_is_edited_with(tmp_path):
    GraniteMoeSharedConfig(
        architectures=["GraniteMoeSharedForCausalLM"], num_hidden_layers=2, shared_intermediate_size=64
    ).save_pretrained(tmp_path)
    found = preview(str(tmp_path))
    console = Console(file=io.StringIO(), width=120)
    console.print(preview_table(found))
    assert "model.layers.*.block_sparse_moe + shared_mlp" in console.file.getvalue()
    assert found.parameters == 2 * 2 * 4096
