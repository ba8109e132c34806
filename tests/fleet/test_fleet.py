"""The table of slots and its passes, without data, jobs or files."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import redpeft
from helpers.devices import ON_EACH_DEVICE
from redpeft.errors import UserError
from redpeft.fleet import Fleet, Rates

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
BERT = {**SIZES, "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RATES = Rates(0.05, 0.02, 0.0, 0.7)


def bert():
    return BertForSequenceClassification(BertConfig(**BERT)), {
        "task_type": "SEQ_CLS",
        "modules_to_save": ["classifier"],
    }


def albert():
    config = AlbertConfig(**BERT, embedding_size=16, classifier_dropout_prob=0.0)
    return AlbertForSequenceClassification(config), {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}


def gpt2():
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return GPT2LMHeadModel(config), {"task_type": "CAUSAL_LM"}


def moe():
    sizes = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = Qwen2MoeConfig(**SIZES, **sizes, shared_expert_intermediate_size=24)
    config._experts_implementation = "eager"  # the fast ones do not know float64
    return Qwen2MoeForCausalLM(config), {"task_type": "CAUSAL_LM"}


def fleet_of(make, slots=4, device="cpu", **options):
    """A fleet of a float64 model, whose slots hold edits far from the identity, some scales negative and large."""
    torch.manual_seed(0)
    base, config = make()
    model = get_peft_model(base.to(device, torch.float64), redpeft.RedConfig(**config, **options))
    redpeft.calibrate(model)
    fleet = Fleet(model, slots)
    for slot in range(slots):
        with torch.no_grad():
            for edit in fleet.edits:
                for vector in edit.parameters():
                    vector.copy_(torch.randn_like(vector) * 2)
                edit.offset[:2] = torch.tensor([-64.0, 74.0]) if edit.offset.requires_grad else 0.0
            for head in fleet.heads:
                for weight in head.trained:
                    weight.copy_(torch.randn_like(weight))
        fleet.fill(slot)
    return fleet


def batch_of(fleet, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, 6:] = 0
    if fleet.heads:
        labels = torch.randint(0, 3, (rows,), generator=generator)
    else:  # prompts of three and four tokens
        labels = ids.where(mask == 1, -100)
        labels[:, :3] = labels[::3, 3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def alone(fleet, slot, batches, rates):
    """What PEFT's own model and torch's AdamW make of a slot: losses and what is trained."""
    fleet.copy_to_model(slot)
    model = fleet.model.train()
    edits = [vector for edit in fleet.edits for vector in edit.parameters()]
    heads = [weight for head in fleet.heads for weight in head.trained]
    groups = [{"params": edits, "lr": rates.edit}, {"params": heads, "lr": rates.head}]
    optimiser = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    losses = []
    for batch in batches:
        loss = model(**{name: value.to(fleet.device) for name, value in batch.items()}).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*edits, *heads], rates.max_grad_norm)
        optimiser.step()
        losses.append(loss.item())
    return losses, torch.cat([parameter.detach().flatten() for parameter in fleet.parameters])


@ON_EACH_DEVICE
@pytest.mark.parametrize("make", [bert, albert, gpt2, moe])
@pytest.mark.parametrize("options", [{}, {"use_scale": False}, {"use_bias": False}], ids=str)
def test_every_slot_learns_as_it_would_alone(make, options, device, monkeypatch):
    """Rows of three slots, in any order and number; shared layers, Conv1D, blocks of experts; a slot that rests."""
    if make in (gpt2, moe):  # the models' own loss is fp32
        from redpeft.fleet.losses import row_loss

        def own_loss(logits, labels, *_, **__):
            sums, counts = row_loss(None, "CAUSAL_LM")(logits, labels)
            return sums.sum() / counts.sum()

        monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.loss_function", property(lambda _: own_loss))
    fleet = fleet_of(make, device=device, **options)
    owners = torch.tensor([3, 0, 3, 1, 0, 3])
    batches = [batch_of(fleet, len(owners), seed) for seed in range(3)]
    expected = {}
    for slot in (0, 1, 3):
        mine = [{name: value[owners == slot] for name, value in batch.items()} for batch in batches]
        expected[slot] = alone(fleet, slot, mine, RATES)
    resting = fleet.read(2)
    for step, batch in enumerate(batches):
        losses = fleet.step(batch, owners.tolist(), dict.fromkeys((0, 1, 3), RATES))
        assert losses == pytest.approx({slot: expected[slot][0][step] for slot in (0, 1, 3)}, rel=1e-9)
    for slot, (_, values) in expected.items():
        torch.testing.assert_close(fleet.state.values[slot], values, rtol=1e-9, atol=1e-9)
        assert fleet.state.steps[slot] == 3
    assert all(torch.equal(one, other) for one, other in zip(fleet.read(2), resting, strict=True))


def test_a_step_computes_no_logits_of_what_all_prompts_have():
    fleet, seen = fleet_of(gpt2), []
    batch, owners = batch_of(fleet, 4), [0, 1, 2, 3]
    fleet.model.get_base_model().lm_head.register_forward_hook(lambda *call: seen.append(call[-1].shape[1]))
    fleet.step(batch, owners, dict.fromkeys(owners, RATES))
    assert fleet.evaluate(batch, owners)[1].shape[1] == 9
    fleet.step(batch | {"labels": batch["input_ids"]}, owners, dict.fromkeys(owners, RATES))
    assert seen == [7, 9, 9]


def test_evaluation_says_what_the_model_says():
    fleet = fleet_of(bert)
    batch = batch_of(fleet, 5)
    losses, logits = fleet.evaluate(batch, [1, 0, 1, 2, 1])
    for slot, rows in {0: [1], 1: [0, 2, 4], 2: [3]}.items():
        fleet.copy_to_model(slot)
        with torch.no_grad():
            own = fleet.model.eval()(**{name: value[rows] for name, value in batch.items()})
        torch.testing.assert_close(logits[rows], own.logits)
        assert losses[slot] == pytest.approx(own.loss.item())


def test_outside_a_pass_the_model_is_the_users():
    fleet = fleet_of(bert)
    fleet.copy_to_model(0)
    batch = batch_of(fleet, 3)
    before = fleet.model.eval()(**batch).logits
    fleet.step(batch, [1, 2, 1], {1: RATES, 2: RATES})
    assert torch.equal(fleet.model.eval()(**batch).logits, before)
    with pytest.raises(IndexError):
        fleet.step({**batch, "input_ids": batch["input_ids"] + 1000}, [1, 2, 1], {1: RATES, 2: RATES})
    assert torch.equal(fleet.model.eval()(**batch).logits, before)


def test_a_slot_whose_loss_is_not_finite_stays_as_it_was_and_the_others_learn():
    fleet, whole = fleet_of(bert), fleet_of(bert)
    fleet.state.values[1, 5] = whole.state.values[1, 5] = torch.nan
    before = fleet.read(1)
    batch = batch_of(fleet, 4)
    losses = fleet.step(batch, [0, 1, 0, 2], dict.fromkeys((0, 1, 2), RATES))
    assert losses[1] != losses[1]
    assert torch.equal(fleet.state.values[1].nan_to_num(), before.values.nan_to_num())
    assert fleet.state.steps[1] == 0
    mine = {name: value[[0, 2]] for name, value in batch.items()}
    whole.step(mine, [0, 0], {0: RATES})
    torch.testing.assert_close(fleet.state.values[0], whole.state.values[0], rtol=1e-9, atol=1e-9)


def test_a_saved_slot_is_an_ordinary_adapter(tmp_path):
    from peft import PeftModel

    fleet = fleet_of(bert)
    batch = batch_of(fleet, 2)
    _, logits = fleet.evaluate(batch, [3, 3])
    fleet.copy_to_model(3)
    fleet.model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(bert()[0].double(), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, logits, rtol=1e-4, atol=1e-4)


def test_weight_decay_acts_on_what_is_named():
    fleet = fleet_of(bert)
    names = {id(weight): name for name, weight in fleet.model.named_parameters()}
    chosen = [names[id(weight)] for weight in fleet.heads[0].trained[:1]]
    fleet.decay(chosen)
    before = fleet.read(0).values
    fleet.step(batch_of(fleet, 2), [0, 0], {0: Rates(0.0, 0.1, 0.5, 0.0)})
    plain = fleet_of(bert)
    plain.step(batch_of(plain, 2), [0, 0], {0: Rates(0.0, 0.1, 0.0, 0.0)})
    start, size = fleet.edit_numbers, fleet.heads[0].trained[0].numel()
    difference = plain.state.values[0] - fleet.state.values[0]
    torch.testing.assert_close(difference[start : start + size], 0.05 * before[start : start + size])
    assert difference[:start].eq(0).all()
    assert difference[start + size :].eq(0).all()


def test_what_cannot_be_a_fleet():
    base, config = bert()
    with pytest.raises(UserError, match="a fleet trains RED: the model has no RED adapter"):
        Fleet(get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])), 2)
    base, config = bert()
    model = get_peft_model(base, redpeft.RedConfig(**config))
    model.get_base_model().bert.embeddings.requires_grad_(True)
    with pytest.raises(UserError, match="trains only edits and heads, but this model also trains .*embeddings"):
        Fleet(model, 2)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=60, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2))
    with pytest.raises(
        UserError, match="cannot train a model for SEQ_2_SEQ_LM: only for SEQ_CLS, TOKEN_CLS and CAUSAL_LM"
    ):
        Fleet(get_peft_model(t5, redpeft.RedConfig(task_type="SEQ_2_SEQ_LM")), 2)


class Smoothed(BertForSequenceClassification):
    """A model that adds to the loss of its labels, in training."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if output.loss is not None and self.training:
            output.loss = output.loss + 0.1 * output.logits.abs().mean()
        return output


def test_dropout_acts_from_the_first_step():
    """A model that is loaded is in evaluation, and the PeftModel around it says that it is in training."""
    config = BertConfig(**{**BERT, "hidden_dropout_prob": 0.5})
    model = get_peft_model(BertForSequenceClassification(config).eval(), redpeft.RedConfig(**bert()[1]))
    redpeft.calibrate(model)
    fleet = Fleet(model, 2)
    fleet.fill(0), fleet.fill(1)
    batch = {"input_ids": torch.arange(6).repeat(2, 1), "labels": torch.tensor([0, 0])}
    losses = fleet.step(batch, [0, 1], dict.fromkeys((0, 1), RATES))
    assert abs(losses[0] - losses[1]) > 1e-3
    fleet.fill(0), fleet.fill(1)
    losses, _ = fleet.evaluate(batch, [0, 1])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_models_that_add_a_loss_of_their_own_are_refused():
    moe = Qwen2MoeConfig(**SIZES, num_key_value_heads=2, num_experts=4, output_router_logits=True)
    model = get_peft_model(Qwen2MoeForCausalLM(moe), redpeft.RedConfig(task_type="CAUSAL_LM"))
    with pytest.raises(
        UserError, match="cannot train Qwen2MoeForCausalLM with output_router_logits: .* Train it alone"
    ):
        Fleet(model, 2)
    batch = {"input_ids": torch.arange(12).reshape(2, 6), "labels": torch.tensor([0, 2])}
    for kind in (BertForSequenceClassification, Smoothed):
        torch.manual_seed(0)
        model = get_peft_model(kind(BertConfig(**BERT)), redpeft.RedConfig(**bert()[1]))
        redpeft.calibrate(model)
        fleet = Fleet(model, 1)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        numbers = torch.get_rng_state()
        if kind is Smoothed:
            with pytest.raises(UserError, match="cannot train Smoothed: its loss of a batch is .*; train it alone"):
                fleet.check_loss(batch)
        else:
            fleet.check_loss(batch)
        assert modes == [module.training for module in model.modules()]
        assert torch.equal(torch.get_rng_state(), numbers)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
