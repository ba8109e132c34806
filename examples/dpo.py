"""Train a language model on preferences: python examples/dpo.py Qwen/Qwen3-0.6B trl-lib/ultrafeedback_binarized [OUT]

The data set is on the Hub, or a folder with a file train.jsonl. Each row has a `prompt` and two answers, `chosen` and
`rejected`. The default learning rate was measured on supervised tasks: try lower rates for preferences too.
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from redpeft import RedConfig

name, data, out = sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "runs/dpo"
trainer = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(name, dtype="auto"),  # without its adapter it is DPO's reference too
    args=DPOConfig(
        out,
        learning_rate=3e-2,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        bf16=torch.cuda.is_available(),  # TRL's default, True, needs a GPU
        report_to="none",
    ),
    train_dataset=load_dataset(data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(name),
    peft_config=RedConfig(task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(out)
