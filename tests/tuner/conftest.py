"""What the integration tests share: tiny models, edits far from the identity, and a watch over what training moves.

Tests reach the functions through the fixture `tiny`: `tiny.llama()`, `tiny.far(model)`, ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from helpers.models import GPT2_SHAPE, SHAPE, T5_SHAPE
from redpeft import RedConfig, RedLayer

VOCABULARY = 100
ENCODER = {**SHAPE, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}


# Models: random weights, no dropout, in evaluation mode.


def bert_classifier(dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.BertConfig(**ENCODER, num_labels=3)
    return _build(transformers.BertForSequenceClassification, config, dtype)


def bert_tagger() -> nn.Module:
    return _build(transformers.BertForTokenClassification, transformers.BertConfig(**ENCODER, num_labels=3))


def roberta_classifier() -> nn.Module:
    """Its head is a module of two linear layers that takes the whole sequence."""
    config = transformers.RobertaConfig(**{**ENCODER, "pad_token_id": 1}, num_labels=3)
    return _build(transformers.RobertaForSequenceClassification, config)


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Linear layers without a bias."""
    config = transformers.LlamaConfig(**ENCODER, num_key_value_heads=2)
    return _build(transformers.LlamaForCausalLM, config, dtype)


def gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    """`Conv1D` layers, with a bias."""
    config = transformers.GPT2Config(
        **GPT2_SHAPE, vocab_size=VOCABULARY, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return _build(transformers.GPT2LMHeadModel, config, dtype)


def t5() -> nn.Module:
    """An encoder-decoder."""
    config = transformers.T5Config(**T5_SHAPE, vocab_size=VOCABULARY, decoder_start_token_id=0)
    return _build(transformers.T5ForConditionalGeneration, config)


def qwen_moe() -> nn.Module:
    """Mixture of experts, with modules named `shared_expert`."""
    config = transformers.Qwen2MoeConfig(
        **ENCODER,
        num_key_value_heads=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return _build(transformers.Qwen2MoeForCausalLM, config)


def _build(model_cls: type, config: transformers.PretrainedConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    for name in vars(config):
        if name.endswith(("dropout", "dropout_prob", "dropout_rate", "pdrop")):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    return model_cls(config).to(dtype).eval()


# Data


def tokens(rows: int = 4, length: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch(task_type: str | None = None) -> dict[str, torch.Tensor]:
    """Inputs with labels for a model of this task."""
    ids = tokens()
    special = {"SEQ_CLS": torch.tensor([0, 1, 2, 0]), "TOKEN_CLS": ids % 3, "SEQ_2_SEQ_LM": tokens(seed=1)}
    return {"input_ids": ids, "labels": special.get(task_type, ids)}


# Adapters


def with_edits(model: nn.Module, task_type: str | None = None, **options) -> nn.Module:
    """`get_peft_model` with edits far from the identity, in evaluation mode."""
    return far(get_peft_model(model, RedConfig(task_type=task_type, **options)).eval())


def layers(model: nn.Module) -> list[RedLayer]:
    return [module for module in model.modules() if isinstance(module, RedLayer)]


def edits(model: nn.Module, adapter: str = "default") -> list[nn.Module]:
    return [layer.redpeft_edit[adapter] for layer in layers(model) if adapter in layer.redpeft_edit]


@torch.no_grad()
def far(model: nn.Module, adapter: str = "default", seed: int = 0) -> nn.Module:
    """Set an adapter's edits far from the identity: negative and large scales, large biases, a unit that is not 1."""
    generator = torch.Generator().manual_seed(seed)
    for edit in edits(model, adapter):
        edit.express(unit=0.5)
        edit.offset.copy_(2 * torch.randn(edit.offset.shape, generator=generator) - edit.origin)
        edit.bias.copy_(3 * torch.randn(edit.bias.shape, generator=generator))
    return model


def values(model: nn.Module, adapter: str = "default") -> list[torch.Tensor]:
    """All that the edits of an adapter hold: scale, bias and unit of each site."""
    return [tensor.detach().clone() for edit in edits(model, adapter) for tensor in edit.state_dict().values()]


def dtypes(model: nn.Module, adapter: str = "default") -> set[torch.dtype]:
    return {tensor.dtype for tensor in values(model, adapter)}


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    """Bit for bit."""
    assert len(left) == len(right) > 0
    torch.testing.assert_close(left, right, rtol=0, atol=0)


# Training


@contextmanager
def only_edits_move(model: nn.Module, heads: str | None = None) -> Iterator[None]:
    """Fail unless inside every edit changes, every parameter whose name holds `heads` too, and nothing else."""
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    yield
    after = model.state_dict()
    learned = {name for name in after if "redpeft_edit" in name and not name.endswith("unit")}
    learned |= {name for name in after if heads and heads in name}
    moved = {name for name in after if not torch.equal(before[name], after[name]) and not name.endswith("unit")}
    assert learned
    assert moved == learned


def train(model: nn.Module, inputs: dict[str, torch.Tensor], steps: int = 3, lr: float = 1e-2) -> list[float]:
    """A few steps of Adam on what is trainable; return the losses."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    models = (bert_classifier, bert_tagger, roberta_classifier, llama, gpt2, t5, qwen_moe)
    helpers = (tokens, batch, with_edits, layers, edits, far, values, dtypes, assert_same, only_edits_move, train)
    return SimpleNamespace(**{function.__name__: function for function in (*models, *helpers)})


@pytest.fixture(scope="session")
def llama_folders(tmp_path_factory) -> tuple[Path, Path]:
    """The folders of a Llama and of an adapter for it, far from the identity. Do not write into them."""
    base, adapter = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("llama_adapter")
    llama().save_pretrained(base)
    with_edits(transformers.AutoModelForCausalLM.from_pretrained(base), "CAUSAL_LM").save_pretrained(adapter)
    return base, adapter
