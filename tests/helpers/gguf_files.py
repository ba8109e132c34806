"""Tiny Llamas as GGUF files, with a chat model's tokenizer whose pad token is its end token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers
from transformers import LlamaForCausalLM

from .models import llama

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class _Vocabulary(list):
    """As much of a tokenizer as a tiny model's configuration needs."""

    bos_token_id, eos_token_id = 1, 2


def write_gguf(
    file: Path,
    kind: str = "Q8_0",
    *,
    architecture: str = "llama",
    tokenizer: bool = True,
    file_type: bool = True,
    parts: int = 1,
    model: LlamaForCausalLM | None = None,
    without: str | None = None,
) -> Path:
    """`file`, with the same weights each time or those of `model`, in the number format `kind` (norms and biases in
    fp32). `without`: a tensor that is left out."""
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    pieces = _Vocabulary([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"])
    model = model or llama(pieces, tie_word_embeddings=True, initializer_range=0.2)
    config, table = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, architecture)
    if file_type:
        writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"])
    if parts > 1:
        writer.add_uint16("split.count", parts)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(pieces))
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(pieces)
        writer.add_token_types([3 if piece in SPECIAL else 1 for piece in pieces])  # 3: control
        writer.add_token_merges(["t h", "th e"])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template(CHATML)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            values = weight.numpy().astype(np.float32)
            plain = kind == "F32" or values.ndim == 1
            stored = gguf.GGMLQuantizationType["F32" if plain else kind]
            place = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if place != without:
                writer.add_tensor(place, values if plain else gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
