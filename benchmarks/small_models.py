"""Small GPT-2-, Llama- and T5-shaped models, pretrained on plain text: bases to compare methods on where no pretrained
decoder is at hand.

Reads the texts of a folder of data sets (the rows' strings, whatever their columns), learns a byte-level BPE of 4,096
pieces, and trains each model on the texts of all but those that it is to be fine-tuned on: GPT-2 and Llama on the
next piece, T5 on the second half of a passage from the first. (The pieces are learned from those too: otherwise the
names in E2E's meaning representations fall into single letters, and two thirds of the rows are longer than the 64
tokens that the task leaves them.) No dropout: so short a training does not need it, and on a CPU it costs half as
much again. About half an hour a model on one core; a model that is there already is left alone, and an interrupted
one goes on from its last checkpoint.

    python benchmarks/small_models.py --data ../shared/data --out models
    redpeft reproduce e2e-gpt2-medium --model models/gpt2 --data ../shared/data
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

PIECES, LENGTH = 4096, 128
LEFT_OUT = ("e2e", "e2e_cleaned", "mt_bench", "alpaca_eval", "self_instruct_seed")
SHAPE = {"vocab_size": PIECES, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


def texts(data: Path, left_out: tuple[str, ...] = ()) -> Iterator[str]:
    """The strings of the training rows of every data set but those left out."""
    for path in sorted(data.glob("*/train.jsonl")):
        if path.parent.name in left_out:
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            yield from (value for value in json.loads(line).values() if isinstance(value, str) and len(value) > 20)


def train_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """<eos> ends a text and begins one; T5's decoder begins with <pad>."""
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(texts(data), vocab_size=PIECES, special_tokens=["<eos>", "<pad>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>"
    )


def passages(data: Path, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """All texts one after another, an <eos> between them, cut into passages of LENGTH pieces."""
    encoded = tokenizer(list(texts(data, LEFT_OUT)))["input_ids"]
    stream = [piece for ids in encoded for piece in [*ids, tokenizer.eos_token_id]]
    return [stream[start : start + LENGTH] for start in range(0, len(stream) - LENGTH, LENGTH)]


def build(name: str) -> PreTrainedModel:
    """Six layers of width 256."""
    if name == "gpt2":
        undropped = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**SHAPE, **undropped, n_embd=256, n_layer=6, n_head=4, n_positions=512))
    if name == "llama":
        wide = {"intermediate_size": 688, "num_key_value_heads": 4, "max_position_embeddings": 1024}
        return LlamaForCausalLM(
            LlamaConfig(
                **SHAPE, **wide, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, tie_word_embeddings=True
            )
        )
    start = {"decoder_start_token_id": SHAPE["pad_token_id"]}
    return T5ForConditionalGeneration(
        T5Config(**SHAPE, **start, d_model=256, d_kv=64, d_ff=1024, num_layers=4, num_heads=4, dropout_rate=0.0)
    )


def rows(name: str, cut: list[list[int]]) -> Dataset:
    half = LENGTH // 2
    if name == "t5":
        return Dataset.from_dict({"input_ids": [ids[:half] for ids in cut], "labels": [ids[half:] for ids in cut]})
    return Dataset.from_dict({"input_ids": cut, "labels": cut})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="gpt2,llama,t5")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--max-steps", type=int, default=-1)
    args = parser.parse_args()
    tokenizer = train_tokenizer(args.data)
    cut = passages(args.data, tokenizer)
    print(f"{len(cut)} passages of {LENGTH} pieces")
    for name in args.models.split(","):
        out = args.out / name
        if (out / "config.json").is_file():
            print(f"{out} is there already")
            continue
        set_seed(0)
        model = build(name)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(args.out / f"{name}-checkpoints"),
                per_device_train_batch_size=32,
                num_train_epochs=args.epochs,
                max_steps=args.max_steps,
                learning_rate=1e-3,
                warmup_steps=100,
                lr_scheduler_type="cosine",
                weight_decay=0.01,
                bf16=True,
                use_cpu=not torch.cuda.is_available(),
                logging_steps=50,
                save_steps=250,
                save_total_limit=1,
                report_to=[],
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=rows(name, cut),
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        )
        trainer.train(resume_from_checkpoint=any((args.out / f"{name}-checkpoints").glob("checkpoint-*")))
        model.float().save_pretrained(out)
        tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
