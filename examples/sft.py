"""Train a language model on conversations: python examples/sft.py Qwen/Qwen3-0.6B trl-lib/Capybara [OUTPUT_FOLDER]

The data set is on the Hub, or a folder with a file train.jsonl. Each row has a list `messages`, or a `prompt` and a
`completion`.
"""

import sys

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from redpeft import RedConfig

name, data, out = sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "runs/sft"
trainer = SFTTrainer(
    name,  # TRL loads the model and its tokenizer
    SFTConfig(
        out,
        learning_rate=3e-2,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        bf16=torch.cuda.is_available(),  # TRL's default, True, needs a GPU
        model_init_kwargs={"dtype": "auto"},
        report_to="none",
    ),
    train_dataset=load_dataset(data, split="train"),
    peft_config=RedConfig(task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(out)
