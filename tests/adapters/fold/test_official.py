"""The checkpoints that the paper's authors released, imported and folded at their real depth and width."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, RobertaConfig, RobertaForSequenceClassification

from redpeft.adapters import load_adapter, read_adapter
from redpeft.adapters.fold import fold, preview_fold
from redpeft.adapters.released import import_released

from .models import load_folded, logits, randomise, relative, token_ids

OFFICIAL = Path(__file__).parents[3] / ".." / "shared" / "official_red"
pytestmark = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="no ../shared/official_red beside the repository")


@pytest.fixture(scope="module")
def mnli(tmp_path_factory):
    """A RoBERTa-base with random weights and few words, the released MNLI edits and head on it, and what it says."""
    folder = tmp_path_factory.mktemp("mnli")
    config = RobertaConfig(vocab_size=120, max_position_embeddings=64, type_vocab_size=1, num_labels=3)
    base = randomise(RobertaForSequenceClassification(config))
    base.roberta.save_pretrained(folder / "base")
    import_released(OFFICIAL / "RoBERTa/RoBERTa_base/checkpoint/mnli", str(folder / "base"), folder / "adapter")
    adapted = load_adapter(base, folder / "adapter").eval()
    return folder, logits(adapted, token_ids())


def test_the_released_mnli_edits_fold_exactly(mnli, tmp_path):
    folder, expected = mnli
    result = fold(folder / "adapter", tmp_path / "out", folder / "base")
    assert (result.architecture, result.changes, result.notes) == ("RobertaForSequenceClassification", {}, [])
    assert len(result.sites) == 12
    assert relative(logits(load_folded(result), token_ids()), expected) <= 1e-5


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_edits_as_large_as_these_survive_16_bits(dtype, mnli, tmp_path):
    folder, _ = mnli
    result = fold(folder / "adapter", tmp_path / "out", folder / "base", dtype=dtype)
    assert result.notes == []
    assert all(site.exactness.lost < 0.01 and site.exactness.vanished < 0.02 for site in result.sites)


def test_the_released_llama_edits_need_biases_alone(tmp_path):
    """All its scales are exactly 1. The configuration is Llama-2-7B's own, on the meta device."""
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "base")
    import_released(OFFICIAL / "Llama/checkpoint", str(tmp_path / "base"), tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert all(torch.equal(edit.scale, torch.ones(4096)) for edit in adapter.edits.values())
    found = preview_fold(str(tmp_path / "base"), adapter=adapter)
    assert found.changes == {"mlp_bias": True}
    assert list(found.placements.values()) == ["weight, and a bias by mlp_bias=True"] * 32
