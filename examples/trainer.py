"""Train a text classifier with transformers: python examples/trainer.py FacebookAI/roberta-base [OUTPUT_FOLDER]

The data are the 444 support messages that come with redpeft; a minute or two on a CPU with a small encoder.
"""

import sys

from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from redpeft import RedConfig
from redpeft.demo import MESSAGES

name, out = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "runs/trainer"
tokenizer = AutoTokenizer.from_pretrained(name)
files = {split: str(MESSAGES / f"{split}.jsonl") for split in ("train", "validation")}
rows = load_dataset("json", data_files=files).class_encode_column("label")
labels = rows["train"].features["label"].names
rows = rows.map(lambda batch: tokenizer(batch["text"], truncation=True), batched=True)

model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(labels))
model = get_peft_model(model, RedConfig(task_type="SEQ_CLS"))
model.print_trainable_parameters()

trainer = Trainer(
    model=model,
    args=TrainingArguments(out, learning_rate=3e-2, num_train_epochs=3, report_to="none"),
    train_dataset=rows["train"],
    eval_dataset=rows["validation"],
    processing_class=tokenizer,
    compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean().item()},
)
trainer.train()
print(trainer.evaluate())
trainer.save_model(out)
