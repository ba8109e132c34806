"""A head with each job's own weights says of each row what a copy of the head with these weights says."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from redpeft.fleet.stacked_heads import Groups, StackedHead
from redpeft.training.learner import head_modules

SIZES = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "n_inner", "d_inner", "hidden_dim"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], 1),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 2),
    **{"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "vocab_size": 50, "num_labels": 3},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
FAMILIES = [
    "bert",
    "roberta",
    "distilbert",
    "deberta-v2",
    "electra",
    "albert",
    "xlnet",
    "xlm",
    "gpt2",
    "llama",
    "modernbert",
]


def test_rows_are_gathered_by_job_and_put_back():
    index = torch.tensor([2, 0, 2, 1, 2, 0])
    groups = Groups(index, 3)
    rows = torch.arange(6.0)[:, None]
    grid = groups.gather(rows)
    assert grid.shape == (3, 3, 1)
    assert grid[:, :, 0].tolist() == [[1, 5, 1], [3, 3, 3], [0, 2, 4]]  # filled up with the job's own first row
    assert torch.equal(groups.scatter(grid), rows)


@pytest.mark.parametrize("dropout", [False, True])
def test_every_row_has_its_own_jobs_head(dropout):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double()
    heads = []
    for _ in range(3):
        own = copy.deepcopy(module)
        for parameter in own.parameters():
            nn.init.normal_(parameter, 0, 2)
        heads.append(own)
    stacked = StackedHead(module)
    stacked.train(dropout)
    weights = [
        torch.stack([dict(own.named_parameters())[name].flatten() for own in heads]).detach().requires_grad_()
        for name in stacked.names
    ]
    index, hidden = torch.tensor([1, 1, 0, 2, 1]), torch.randn(5, 4, 8, dtype=torch.float64)
    found = stacked(weights, Groups(index, 3), hidden)
    expected = torch.stack([heads[job].eval()(row) for job, row in zip(index.tolist(), hidden, strict=True)])
    if dropout:
        assert not torch.allclose(found, expected)
        return
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, weight in zip(stacked.names, weights, strict=True):
        own = torch.stack([dict(head.named_parameters())[name].grad.flatten() for head in heads])
        torch.testing.assert_close(weight.grad, own)


def test_what_one_job_computes_does_not_reach_another():
    """Not even a NaN, in values or gradients."""
    stacked = StackedHead(nn.Linear(4, 2))
    weights = [torch.randn(2, 8, requires_grad=True), torch.randn(2, 2, requires_grad=True)]
    hidden = torch.randn(4, 4)
    hidden[0] = torch.nan
    out = stacked(weights, Groups(torch.tensor([0, 1, 1, 1]), 2), hidden)
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()
    out.sum().backward()
    assert all(weight.grad[1].isfinite().all() for weight in weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_transformers(family):
    """Whatever modules a classifier has beside its encoder: called as the model calls them."""
    sizes = {name: size for name, size in SIZES.items() if (family, name) != ("xlnet", "max_position_embeddings")}
    config = transformers.CONFIG_MAPPING[family](**sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).double().eval()
    names = head_modules(model, "classification")
    assert names
    index, ids = torch.tensor([0, 1, 1, 0, 1]), torch.randint(3, 50, (5, 7))
    starts = [{n: torch.randn_like(p) for n, p in model.get_submodule(name).named_parameters()} for name in names]
    others = [{n: torch.randn_like(p) for n, p in model.get_submodule(name).named_parameters()} for name in names]
    expected = []
    for job, row in zip(index.tolist(), ids, strict=True):
        for name, first, second in zip(names, starts, others, strict=True):
            model.get_submodule(name).load_state_dict(second if job else first, strict=False)
        with torch.no_grad():
            expected.append(model(row[None]).logits[0])
    groups = Groups(index, 2)
    for name, first, second in zip(names, starts, others, strict=True):
        module = model.get_submodule(name)
        stacked = StackedHead(module)
        stacked.train(False)
        weights = [torch.stack([first[n].flatten(), second[n].flatten()]) for n in stacked.names]
        module.forward = lambda *args, head=stacked, weights=weights, **kw: head(weights, groups, *args, **kw)
    with torch.no_grad():
        found = model(ids).logits
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-9)


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, states, mask=None):
        return self.linear(states) * mask[:, None]


def test_a_head_that_is_called_by_keyword_has_the_rows_of_its_job():
    heads = [ByKeyword(), ByKeyword()]
    index, states, mask = torch.tensor([1, 0, 1]), torch.randn(3, 4), torch.tensor([1.0, 2.0, 3.0])
    stacked = StackedHead(heads[0])
    weights = [
        torch.stack([dict(head.named_parameters())[name].flatten() for head in heads]) for name in stacked.names
    ]
    out = stacked(weights, Groups(index, 2), states=states, mask=mask)
    expected = [heads[job](states[i : i + 1], mask[i : i + 1]) for i, job in enumerate(index.tolist())]
    torch.testing.assert_close(out, torch.cat(expected))
