"""Tiny models with random weights, random edits on them, and what a model says with and without a fold."""

from __future__ import annotations

import torch
import transformers
from peft import PeftModel, get_peft_model

import redpeft

# Names of one thing differ between families; a configuration ignores what it does not know.
SIZES = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "word_embed_proj_dim"], 64),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"], 96),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"], 3),
    **dict.fromkeys(["encoder_layers", "decoder_layers"], 3),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **{"num_key_value_heads": 2, "head_dim": 16, "d_kv": 16, "max_position_embeddings": 64, "vocab_size": 100},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0},
}
CAUSAL, LABELS, SEQ2SEQ = "CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"


def tiny_config(family, **changes):
    return transformers.CONFIG_MAPPING[family](**{**SIZES, "num_labels": 4, **changes})


def randomise(model, seed=0):
    """Weights, biases and norms all different from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def tiny(class_name, config):
    return randomise(getattr(transformers, class_name)(config))


def edited(model, task, sites="ffn", seed=0, **options):
    """The model with random edits: scales around 1 with a spread of 1, biases around 0."""
    torch.manual_seed(seed)
    config = redpeft.RedConfig(task_type=task, sites=sites, init_weights=False, **options)
    return get_peft_model(model, config).eval()


def logits(model, ids):
    extra = {"decoder_input_ids": ids[:, :7]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits.double()


def token_ids(seed=0):
    return torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def save_both(folder, model, task, sites="ffn", base=None, **options):
    """Write a base and an adapter with random edits on it: what the adapted model says of some tokens."""
    (base or model).save_pretrained(folder / "base")
    adapted = edited(model, task, sites, **options)
    adapted.save_pretrained(folder / "adapter")
    return logits(adapted, token_ids())


def load_folded(result):
    """The folded model by the class that its own configuration names, with what stayed an adapter."""
    model = getattr(transformers, result.architecture).from_pretrained(result.out).eval()
    assert model.config.architectures == [result.architecture]
    return PeftModel.from_pretrained(model, result.adapter).eval() if result.adapter else model
