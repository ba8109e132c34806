"""RED in TRL's trainers: supervised, preferences and rewards, on plain, bf16 and quantised bases."""

from __future__ import annotations

import datasets
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from redpeft import RedConfig
from redpeft.errors import UserError

trl = pytest.importorskip("trl", reason="needs the extra [trl]")

PROMPTS, GOOD, BAD = ["hello there", "what is", "who are", "tell me"] * 2, [" you"] * 8, [" never", " no"] * 4
COMPLETIONS = datasets.Dataset.from_dict({"prompt": PROMPTS, "completion": GOOD})
PREFERENCES = datasets.Dataset.from_dict({"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD})
QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
FEW_STEPS = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4, **QUIET}


def config() -> RedConfig:
    return RedConfig(task_type="CAUSAL_LM")


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    """A trainer in bf16 leaves this behind, and the next one would run in bf16."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


@pytest.fixture
def base(tiny_decoder_folder):
    def load(**options) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(tiny_decoder_folder, **options)

    return load


@pytest.fixture
def tokenizer(tiny_decoder_folder):
    loaded = AutoTokenizer.from_pretrained(tiny_decoder_folder)
    loaded.pad_token = loaded.eos_token
    return loaded


def sft(model, tokenizer, folder, **options) -> trl.SFTTrainer:
    peft_config = options.pop("peft_config", None)
    args = trl.SFTConfig(output_dir=str(folder), **{"bf16": False, "max_length": 64, **FEW_STEPS, **options})
    return trl.SFTTrainer(
        model, args=args, train_dataset=COMPLETIONS, processing_class=tokenizer, peft_config=peft_config
    )


def dpo(model, tokenizer, folder, **options) -> trl.DPOTrainer:
    args = trl.DPOConfig(output_dir=str(folder), bf16=False, max_length=64, **FEW_STEPS)
    return trl.DPOTrainer(model, args=args, train_dataset=PREFERENCES, processing_class=tokenizer, **options)


@torch.no_grad()
def log_probs(model, tokenizer) -> torch.Tensor:
    ids = torch.tensor([tokenizer("hello there you").input_ids])
    return model.eval()(ids).logits.log_softmax(-1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sft(tiny, base, tokenizer, tmp_path, dtype, checkpointing):
    bf16 = dtype == torch.bfloat16
    trainer = sft(
        base(dtype=dtype), tokenizer, tmp_path, peft_config=config(), bf16=bf16, gradient_checkpointing=checkpointing
    )
    with tiny.only_edits_move(trainer.model):
        trainer.train()
    assert tiny.dtypes(trainer.model) == {torch.float32}
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(dtype=dtype), tmp_path / "adapter")
    tiny.assert_same(tiny.values(loaded), tiny.values(trainer.model))


def test_dpo_of_a_new_adapter_refers_to_the_base(tiny, base, tokenizer, tmp_path):
    trainer = dpo(base(), tokenizer, tmp_path, peft_config=config())
    with tiny.only_edits_move(trainer.model):
        trainer.train()
    with trainer.model.disable_adapter():
        assert torch.equal(log_probs(trainer.model, tokenizer), log_probs(base(), tokenizer))
    assert trainer.state.log_history[0]["rewards/margins"] == 0


def test_dpo_of_a_trained_adapter_refers_to_its_start(tiny, base, tokenizer, tmp_path):
    tiny.with_edits(base(), "CAUSAL_LM").save_pretrained(tmp_path / "start")
    model = PeftModel.from_pretrained(base(), tmp_path / "start", is_trainable=True)
    start, edits = log_probs(model, tokenizer), tiny.values(model)
    trainer = dpo(model, tokenizer, tmp_path)
    tiny.assert_same(tiny.values(trainer.model, "ref"), edits)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0
    assert not torch.equal(log_probs(trainer.model, tokenizer), start)
    tiny.assert_same(tiny.values(trainer.model, "ref"), edits)
    trainer.model.set_adapter("ref")
    assert torch.equal(log_probs(trainer.model, tokenizer), start)


def test_grpo(tiny, base, tokenizer, tmp_path):
    args = trl.GRPOConfig(
        output_dir=str(tmp_path), bf16=False, num_generations=4, max_completion_length=8, beta=0.1, **FEW_STEPS
    )

    def longer_is_better(completions, **_) -> list[float]:
        return [float(len(set(completion))) + place for place, completion in enumerate(completions)]

    trainer = trl.GRPOTrainer(
        base(),
        reward_funcs=longer_is_better,
        args=args,
        train_dataset=COMPLETIONS.select_columns("prompt"),
        processing_class=tokenizer,
        peft_config=config(),
    )
    with tiny.only_edits_move(trainer.model):
        trainer.train()


def test_grpo_with_trls_own_vllm_is_refused_where_biases_would_be_lost(base, tiny_gpt2_folder, tmp_path):
    """There is no vLLM in this environment: TRL's error that says so shows that ours let the model pass."""
    args = trl.GRPOConfig(str(tmp_path), bf16=False, num_generations=4, use_vllm=True, **FEW_STEPS)

    def start(model, **options) -> None:
        peft_config = RedConfig(task_type="CAUSAL_LM", **options)
        trl.GRPOTrainer(model, lambda completions, **_: [0.0], args, COMPLETIONS, peft_config=peft_config)

    lost = r"TRL would send vLLM a bias for model.layers.0.mlp.down_proj, .* use_vllm=False and rollout_func="
    with pytest.raises(UserError, match=lost):
        start(base())
    with pytest.raises(ImportError, match="vLLM is not available"):
        start(base(), use_bias=False)
    with pytest.raises(ImportError, match="vLLM is not available"):
        start(AutoModelForCausalLM.from_pretrained(tiny_gpt2_folder))  # its layers have biases


# Quantised bases (more in test_quantised.py)


@pytest.fixture
def load_in_4_bit(tiny_decoder_folder):
    pytest.importorskip("bitsandbytes", reason="needs the extra [bnb]")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    return lambda: AutoModelForCausalLM.from_pretrained(
        tiny_decoder_folder, quantization_config=config, dtype=torch.bfloat16
    )


def test_edits_on_a_4_bit_base_are_trained_in_fp32(tiny, load_in_4_bit, tokenizer, tmp_path):
    trainer = sft(load_in_4_bit(), tokenizer, tmp_path, peft_config=config(), bf16=True)
    trainer.train()
    assert tiny.dtypes(trainer.model) == {torch.float32}
    assert all(edit.offset.any() and edit.bias.any() for edit in tiny.edits(trainer.model))
    trainer.save_model(tmp_path / "adapter")
    assert {t.dtype for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {torch.float32}

    model = PeftModel.from_pretrained(load_in_4_bit(), tmp_path / "adapter", is_trainable=True)
    expected = tiny.values(model)
    trainer = sft(model, tokenizer, tmp_path, bf16=True, learning_rate=0.0)
    trainer.train()
    assert tiny.dtypes(model) == {torch.float32}
    torch.testing.assert_close(tiny.values(model), expected, rtol=2**-8, atol=0)  # TRL has rounded them once
