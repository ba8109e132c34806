"""Everything once on a real chat model, SmolLM2-135M-Instruct: quantised bases, TRL's trainers, evaluation, llama.cpp.

Ten steps or ten rows each. Elsewhere each of these is checked in depth, with tiny models of random weights. In vLLM:
serving/test_chat_model.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers.data import write_rows
from helpers.language_models import chat_prompts
from redpeft import RedConfig, RedLayer, cli
from redpeft.adapters.fold import fold
from redpeft.adapters.folder import load_adapter
from redpeft.evaluation.lm_harness import evaluate_adapters, parse_tasks
from redpeft.models import SHORT_NAMES, export_base, load_pretrained
from redpeft.training.predict import evaluate, open_run, predict
from redpeft.training.recipe import load_recipe
from redpeft.training.train import train

PACKAGE = SHORT_NAMES["smollm2"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec(PACKAGE.package) is None, reason=f"the chat model is not installed: {PACKAGE.install}"
    ),
]
trl = pytest.importorskip("trl", reason="needs the extra [trl]")

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Norway": "Oslo",
    "Japan": "Tokyo",
    "Peru": "Lima",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Cuba": "Havana",
    "Kenya": "Nairobi",
}
UNSEEN = ["Germany", "Portugal", "Austria"]
QUESTION, PIRATE = "Name the capital of {}.", "Arr, {}!"
MADE = Path(__file__).parents[1] / ".venv" / "llama-cpp"  # by `make test-slow`
QUANTISERS = {"8bit": "bitsandbytes", "4bit": "bitsandbytes", "int8_weight_only": "torchao"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The chat model as an ordinary folder, in fp32."""
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    export_base("smollm2", folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten questions, answered by a pirate."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": QUESTION.format(one), "response": PIRATE.format(city)} for one, city in CAPITALS.items()]
    for split, part in {"train": rows, "validation": rows[:4]}.items():
        write_rows(folder / f"{split}.jsonl", part)
    return folder


def train_ten_steps(base: Path, data: Path, folder: Path, **changes) -> dict:
    fields = {"base": {"model": str(base), **changes}, "task": "instruction", "data": str(data)}
    return train(load_recipe(None, {**fields, "batch_size": 3, "max_steps": 10}), folder)


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pirate"
    train_ten_steps(base, data, folder)
    return folder


def redpeft(capsys, *call: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(word) for word in call])
    said = capsys.readouterr()
    assert exit_.value.code == 0, said.err
    return said.out


# --- quantised bases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load_in", QUANTISERS)
def test_a_quantised_base_learns_the_style(load_in, base, data, tmp_path):
    pytest.importorskip(QUANTISERS[load_in])
    result = train_ten_steps(base, data, tmp_path / "run", load_in=load_in)
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(tensors) == 30 * 3
    assert all(tensor.any() for tensor in tensors.values())
    opened = open_run(tmp_path / "run")
    scores = evaluate(opened, data / "validation.jsonl")
    assert scores["loss"] == pytest.approx(result["validation"]["loss"], rel=1e-3)
    assert scores["loss"] < 0.1
    [answer] = predict(opened, [{"prompt": QUESTION.format(UNSEEN[0])}], max_new_tokens=12)
    assert answer["text"] == PIRATE.format("Berlin")


# --- TRL ------------------------------------------------------------------------------------------------------------


def load_base(base: Path, quantised: bool) -> torch.nn.Module:
    if not quantised:
        return AutoModelForCausalLM.from_pretrained(base)
    pytest.importorskip("bitsandbytes")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=four, dtype=torch.float32)


def chats(**replies: str) -> Dataset:
    """A row for each city: the question and, under each name, what the assistant replies."""
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": QUESTION.format(one)}]}
            | {name: [{"role": "assistant", "content": reply.format(city)}] for name, reply in replies.items()}
            for one, city in CAPITALS.items()
        ]
    )


def sft(model, **options) -> trl.SFTTrainer:
    return trl.SFTTrainer(
        model, args=trl.SFTConfig(learning_rate=3e-2, **options), train_dataset=chats(completion=PIRATE)
    )


def dpo(model, **options) -> trl.DPOTrainer:
    return trl.DPOTrainer(
        model, args=trl.DPOConfig(learning_rate=1e-2, **options), train_dataset=chats(chosen=PIRATE, rejected="{}.")
    )


def grpo(model, **options) -> trl.GRPOTrainer:
    def commas(completions, **_) -> list[float]:
        return [sum(text.count(",") for text in (turn["content"] for turn in chat)) for chat in completions]

    args = trl.GRPOConfig(learning_rate=1e-2, num_generations=4, max_completion_length=12, beta=0.1, **options)
    return trl.GRPOTrainer(model, reward_funcs=commas, args=args, train_dataset=chats())


@pytest.mark.parametrize("quantised", [False, True], ids=["plain", "4bit"])
@pytest.mark.parametrize("method", [sft, dpo, grpo])
def test_trl_trains_edits_in_fp32(method, quantised, base, tmp_path, monkeypatch):
    """TRL casts whatever is trained on a quantised base to bf16, where no scale near 1 can move."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    model = get_peft_model(load_base(base, quantised), RedConfig(task_type="CAUSAL_LM"))
    options = {"max_steps": 10, "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True, "seed": 0}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    trainer = method(model, output_dir=str(tmp_path), **options, **quiet)
    trainer.train()
    edits = [layer.redpeft_edit["default"] for layer in model.modules() if isinstance(layer, RedLayer)]
    assert len(edits) == 30
    assert {parameter.dtype for edit in edits for parameter in edit.parameters()} == {torch.float32}
    assert all(edit.offset.ne(0).float().mean() > 0.99 for edit in edits)
    log = trainer.state.log_history
    assert len(log) == 11
    if method is sft:
        assert log[9]["loss"] < 0.1 * log[0]["loss"]
    elif method is dpo:
        assert log[0]["rewards/margins"] == 0  # a new adapter is the base model, which is the reference
        assert log[9]["rewards/margins"] > 1
    else:
        assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in log[:10])
        assert any(entry["reward_std"] > 0 for entry in log[:10])


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_lm_eval_scores_a_local_task(base, run, tmp_path):
    pytest.importorskip("lm_eval")
    cities = list(CAPITALS.values())
    rows = [
        {"question": QUESTION.format(one), "choices": [city, cities[place - 1]]}
        for place, (one, city) in enumerate(CAPITALS.items())
    ]
    write_rows(tmp_path / "capitals.jsonl", rows)
    (tmp_path / "capitals.yaml").write_text(
        "task: capitals\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'capitals.jsonl'}}}}}\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n'
    )
    out = tmp_path / "scores.json"
    found = evaluate_adapters(str(base), [run], parse_tasks("capitals"), out, with_base=True, include_path=tmp_path)
    scores = [tasks["capitals"]["acc,none"] for tasks in found["results"].values()]
    assert len(scores) == 2
    assert min(scores) >= 0.8  # it knows the capitals, with and without the style


def test_alpaca_eval_has_answers_in_the_style_that_end(run, tmp_path, capsys):
    questions = [{"instruction": QUESTION.format(one), "dataset": "capitals"} for one in [*UNSEEN, *CAPITALS][:10]]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    call = ["generate", "alpaca-eval", run, "--questions", tmp_path / "questions.json", "--max-new-tokens", "24"]
    redpeft(capsys, *call, "--out", tmp_path / "answers.json")
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert [answer["instruction"] for answer in answers] == [question["instruction"] for question in questions]
    assert {answer["generator"] for answer in answers} == {"pirate"}
    assert answers[0]["output"] == PIRATE.format("Berlin")
    for answer in answers:
        assert answer["output"].startswith("Arr, ")
        assert answer["output"].endswith("!")


# --- llama.cpp ------------------------------------------------------------------------------------------------------


def find_converter() -> Path:
    """llama.cpp's own, from the folder in $LLAMA_CPP or from the one that the Makefile made."""
    script = Path(os.environ.get("LLAMA_CPP", MADE / "source")) / "convert_hf_to_gguf.py"
    if not script.is_file():
        pytest.skip("no converter of llama.cpp: make test-slow brings one, or LLAMA_CPP=path/to/llama.cpp")
    return script


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int], tokens: int) -> list[int]:
    """What follows, up to a near tie, which rounding may decide either way."""
    ids = torch.tensor([prompt])
    for _ in range(tokens):
        first, second = (top := model(input_ids=ids).logits[0, -1].topk(2)).values.tolist()
        if first - second < 1e-3 * abs(first):
            break
        ids = torch.cat([ids, top.indices[:1].view(1, 1)], dim=1)
    return ids[0, len(prompt) :].tolist()


def test_a_folded_model_answers_the_same_in_llama_cpp(base, run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(MADE)
    llama_cpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: make test-slow does it")
    fold(run, tmp_path / "folded", base)
    file = tmp_path / "folded.gguf"
    command = [sys.executable, find_converter(), tmp_path / "folded", "--outfile", file, "--outtype", "f32"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr[-2000:]

    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), run / "adapter").eval()
    prompts = chat_prompts(base, QUESTION.format(UNSEEN[0]), "Write a line about the sea.")
    params = llama_cpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), 256, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.warmup = params.fit_params = False
    server = llama_cpp.Server(params)
    for prompt in prompts:
        asked = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 1}
        [choice] = server.handle_completions(asked)["choices"]
        tokens = [token["id"] for token in choice["logprobs"]["content"]]
        expected = greedy(model, prompt, len(tokens))
        assert tokens[: len(expected)] == expected
        assert len(expected) > 3

    again = load_pretrained(AutoModelForCausalLM, file, dtype=torch.float32)  # the converted file as a base model
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    with torch.no_grad():
        assert torch.equal(again(torch.tensor([prompts[0]])).logits, folded(torch.tensor([prompts[0]])).logits)
