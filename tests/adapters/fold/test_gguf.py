"""What llama.cpp's converter makes of a folded Llama: every tensor has a name and a shape that llama.cpp reads."""

from __future__ import annotations

import re

import pytest
from safetensors.torch import load_file

from redpeft.adapters.fold import fold

from .models import CAUSAL, save_both, tiny, tiny_config

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
LAYERS = 3


@pytest.mark.parametrize(("sites", "biases"), [("ffn", "down"), ("red+", "down q k v o")])
def test_every_tensor_of_a_folded_llama_has_its_place(sites, biases, tmp_path):
    save_both(tmp_path, tiny("LlamaForCausalLM", tiny_config("llama")), CAUSAL, sites)
    fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    names = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in tensors}
    assert None not in names.values()
    places = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.LLAMA]}
    bare = {re.sub(r"blk\.\d+\.", "blk.{bid}.", name).rpartition(".")[0] for name in names.values()}
    assert bare <= places

    by_name = {place: tensors[name] for name, place in names.items()}
    model = tiny_config("llama")
    for layer in range(LAYERS):
        assert by_name[f"blk.{layer}.ffn_down.bias"].shape == (model.hidden_size,)
        assert by_name[f"blk.{layer}.ffn_down.bias"].any()
        assert not by_name[f"blk.{layer}.ffn_gate.bias"].any()
        assert by_name[f"blk.{layer}.ffn_gate.bias"].shape == (model.intermediate_size,)
        attention = {name for name in by_name if re.match(rf"blk\.{layer}\.attn_\w+\.bias", name)}
        expected = {f"blk.{layer}.attn_{'output' if name == 'o' else name}.bias" for name in biases.split()[1:]}
        assert attention == expected


def test_a_file_of_them_reads_back(tmp_path):
    """Written with the gguf package under these names and read again, shapes reversed as GGUF has them."""
    save_both(tmp_path, tiny("LlamaForCausalLM", tiny_config("llama")), CAUSAL)
    fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        writer.add_tensor(table.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    bias = tensors["model.layers.1.mlp.down_proj.bias"]
    assert list(read["blk.1.ffn_down.bias"].shape) == [64]
    assert read["blk.1.ffn_down.bias"].data.tolist() == bias.tolist()
    assert list(read["blk.1.ffn_down.weight"].shape) == [96, 64]
