from __future__ import annotations

import io

import pytest
from rich.console import Console
from transformers import BertConfig, CLIPConfig, GPT2Config, GraniteMoeSharedConfig, LlamaConfig

from redpeft.adapters.preview import preview, preview_table
from redpeft.errors import UserError


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
    with pytest.raises(UserError, match=r"nowhere: no folder with a config\.json") as error:
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
