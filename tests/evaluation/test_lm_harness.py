"""lm-eval's stock tasks come from a hub; a task file and rows of our own stand for them."""

from __future__ import annotations

import json
import random
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from helpers.data import write_rows
from helpers.language_models import write_lora, write_red, write_talker
from redpeft import cli
from redpeft.errors import UserError
from redpeft.evaluation.language_model import attach
from redpeft.evaluation.lm_harness import PRESETS, HarnessTask, evaluate_adapters, parse_tasks, results_table

pytest.importorskip("lm_eval")

CHOICE = """\
task: {name}
tag: [tiny]
dataset_path: json
dataset_kwargs: {{data_files: {{train: {train}, test: {test}}}}}
output_type: multiple_choice
fewshot_split: train
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
OPEN = """\
task: tiny_open
dataset_path: json
dataset_kwargs: {{data_files: {{test: {test}}}}}
output_type: generate_until
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
WORDS = ["red", "tan", "sky", "fox", "mud", "ice"]  # of one length: the longer one is always less likely


def rows(count: int, first: int = 0) -> list[dict]:
    draw = random.Random(first)
    return [
        {"question": f"Which word is number {i}?", "choices": draw.sample(WORDS, 2), "answer": draw.randint(0, 1)}
        for i in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def folder(tiny_decoder_folder, tmp_path_factory) -> Path:
    """A base model, adapters on it, and tasks."""
    folder = tmp_path_factory.mktemp("harness")
    base = write_talker(folder / "base", tiny_decoder_folder)
    write_red(folder / "one", base, seed=1)
    write_red(folder / "two", base, seed=2)
    write_lora(folder / "lora", base, seed=3)
    (folder / "tasks").mkdir()
    train = write_rows(folder / "train.jsonl", rows(4, 100))
    for name, count in (("tiny_large", 24), ("tiny_small", 6)):
        test = write_rows(folder / f"{name}.jsonl", rows(count))
        (folder / "tasks" / f"{name}.yaml").write_text(CHOICE.format(name=name, train=train, test=test))
    (folder / "tasks" / "tiny_open.yaml").write_text(OPEN.format(test=folder / "tiny_small.jsonl"))
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    """Without reading lm-eval's own task files, thousands, and asking pip and others what is installed, each time."""
    import datasets.config
    import lm_eval.tasks

    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lm_eval.tasks.TaskManager", manager)
        patched.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
        patched.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def score(folder, adapters, out, tasks="tiny_large", shots=None, **options):
    options = {"include_path": folder / "tasks", "batch_size": 4, **options}
    adapters = [folder / name for name in adapters]
    return evaluate_adapters(str(folder / "base"), adapters, parse_tasks(tasks, shots), out, **options)


def by_name(folder, result):
    return {str(Path(name).relative_to(folder)): tasks for name, tasks in result["results"].items()}


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """What each model gives by itself: {name: metrics}."""
    out = tmp_path_factory.mktemp("alone")
    scores = {}
    for names in ([], ["one"], ["two"], ["lora"]):
        result = score(folder, names, out / f"{'-'.join(names)}.json", tasks="tiny_large,tiny_open")
        scores |= by_name(folder, result)
    return scores


def test_several_adapters_on_one_base_give_what_each_gives_alone(folder, alone, tmp_path, monkeypatch):
    loaded = []
    real = LlamaForCausalLM.from_pretrained.__func__
    monkeypatch.setattr(
        LlamaForCausalLM, "from_pretrained", classmethod(lambda *args, **kw: loaded.append(1) or real(*args, **kw))
    )
    out = tmp_path / "scores.json"
    result = score(folder, ["one", "lora", "two", "one"], out, tasks="tiny_large,tiny_open", with_base=True)
    assert loaded == [1]
    assert list(by_name(folder, result)) == ["base", "one", "lora", "two"]
    assert by_name(folder, result) == alone
    assert json.loads(out.read_text()) == result
    accuracies = {tasks["tiny_large"]["acc,none"] for tasks in alone.values()}
    assert len(accuracies) > 1, "adapters that all score the same say nothing"


@pytest.mark.parametrize("adapter", [None, "one", "lora"])
def test_scores_are_those_of_a_naive_loop(folder, alone, adapter):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = LlamaForCausalLM.from_pretrained(folder / "base").eval()
    if adapter:
        model = attach(model, folder / adapter)
    right = []
    for row in rows(24):
        scores = []
        for choice in row["choices"]:
            prompt = tokenizer(f"Q: {row['question']}\nA:")["input_ids"]
            answer = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0].log_softmax(-1)
            scores.append(sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)))
        right.append(scores.index(max(scores)) == row["answer"])
    assert alone[adapter or "base"]["tiny_large"]["acc,none"] == pytest.approx(sum(right) / len(right))


def test_the_result_has_scores_shots_and_versions(folder, tmp_path):
    result = score(folder, ["one"], tmp_path / "scores.json", tasks="tiny_small", shots=2)
    from lm_eval import __version__

    assert list(result) == ["base", "limit", "lm_eval", "tasks", "results", "parts", "average"]
    assert (result["base"], result["limit"], result["lm_eval"]) == (str(folder / "base"), None, __version__)
    assert result["tasks"] == {"tiny_small": 2}
    metrics = result["results"][str(folder / "one")]["tiny_small"]
    assert set(metrics) == {"acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none"}
    assert result["parts"] == {str(folder / "one"): {}}
    assert result["average"] == {}


def test_a_tag_has_the_mean_over_its_rows(folder, tmp_path):
    result = score(folder, ["one"], tmp_path / "scores.json", tasks="tiny")
    [tag], [parts] = result["results"].values(), result["parts"].values()
    large, small = parts["tiny"]["tiny_large"], parts["tiny"]["tiny_small"]
    assert tag["tiny"]["acc,none"] == pytest.approx((24 * large["acc,none"] + 6 * small["acc,none"]) / 30)
    assert set(tag["tiny"]) == {"acc,none", "acc_norm,none"}


def test_shots_and_limit_reach_lm_eval(folder, tmp_path, monkeypatch):
    import lm_eval

    calls, real = [], lm_eval.simple_evaluate

    def watched(*args, **kwargs):
        found = real(*args, **{**kwargs, "log_samples": True})
        calls.append([len(samples) for samples in found["samples"].values()])
        prompt = found["samples"]["tiny_large"][0]["arguments"][0][0]
        calls.append(prompt.count("Q: "))
        return found

    monkeypatch.setattr("lm_eval.simple_evaluate", watched)
    score(folder, [], tmp_path / "scores.json", shots=3, limit=5)
    assert calls == [[5], 4]


def test_a_task_can_be_a_file(folder, alone, tmp_path):
    path = str(folder / "tasks" / "tiny_large.yaml")
    result = score(folder, ["one"], tmp_path / "scores.json", tasks=path, include_path=None)
    assert by_name(folder, result)["one"][path] == alone["one"]["tiny_large"]


@pytest.fixture
def forward_passes(monkeypatch):
    """The rows of each forward pass for a score, as they are computed, and how to let one of them be the last."""
    from redpeft.evaluation.adapters_lm import AdaptersLM

    class Passes(list):
        last = None

    passes, real = Passes(), AdaptersLM._model_call

    def counted(self, inputs, *args, **kwargs):
        if passes.last == len(passes):
            raise KeyboardInterrupt
        passes.append(len(inputs))
        return real(self, inputs, *args, **kwargs)

    monkeypatch.setattr(AdaptersLM, "_model_call", counted)
    return passes


def test_a_killed_call_continues_within_a_task(folder, alone, tmp_path, forward_passes):
    call = partial(score, folder, ["one", "two"], tmp_path / "scores.json", tasks="tiny_large,tiny_small")
    forward_passes.last = 17  # 48 answers of adapter one in batches of 4, and 20 of adapter two
    with pytest.raises(KeyboardInterrupt):
        call()
    assert not (tmp_path / "scores.json").exists()
    forward_passes.last = None
    result = by_name(folder, call())
    assert {name: tasks["tiny_large"] for name, tasks in result.items()} == {
        name: alone[name]["tiny_large"] for name in ("one", "two")
    }
    assert sum(forward_passes) == 2 * 48, "no answer is computed twice: the small task's rows are in the large one too"
    assert by_name(folder, call()) == result
    assert sum(forward_passes) == 2 * 48


def test_more_adapters_and_tasks_compute_what_is_missing(folder, alone, tmp_path, forward_passes):
    score(folder, ["one"], tmp_path / "scores.json")
    assert sum(forward_passes) == 48
    more = score(folder, ["lora", "one"], tmp_path / "scores.json", tasks="tiny_small,tiny_large")
    assert sum(forward_passes) == 48 + 48
    assert list(by_name(folder, more)) == ["lora", "one"]
    assert by_name(folder, more)["one"]["tiny_large"] == alone["one"]["tiny_large"]


def test_what_has_changed_is_scored_again_or_refused(folder, tmp_path, forward_passes):
    adapter = write_red(tmp_path / "adapter", folder / "base", seed=5)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    task = tasks / "tiny_large.yaml"
    task.write_text((folder / "tasks" / "tiny_large.yaml").read_text())
    call = partial(
        evaluate_adapters, str(folder / "base"), [adapter], parse_tasks("tiny_large"), tmp_path / "scores.json"
    )
    first = call(include_path=tasks)
    write_red(tmp_path / "adapter", folder / "base", seed=6)
    assert call(include_path=tasks)["results"] != first["results"]
    task.write_text(task.read_text().replace("A:", "Answer:"))
    call(include_path=tasks)
    assert sum(forward_passes) == 3 * 48
    with pytest.raises(
        UserError, match=r"scores.json holds scores with other settings \(limit\): choose another --out"
    ):
        call(include_path=tasks, limit=3)


@pytest.mark.parametrize(
    ("adapters", "tasks", "message"),
    [
        ([], "tiny_larg", "lm-eval has no task 'tiny_larg'; did you mean 'tiny_large'?"),
        ([], "zzz", "lm-eval has no task 'zzz'; task files of your own are found by --include-path"),
        ([], " , ", "no tasks: give names of lm-eval's tasks, or open-llm-leaderboard"),
        (["nowhere"], "tiny_large", "nowhere: no such adapter folder"),
        (["one", "other"], "tiny_large", "other: this adapter is for another base model"),
    ],
)
def test_errors_come_before_anything_is_scored(
    folder, adapters, tasks, message, tmp_path, monkeypatch, tiny_decoder_folder
):
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda *_, **__: pytest.fail("scored"))
    if "other" in adapters and not (folder / "other").exists():
        other = write_talker(tmp_path / "other-base", tiny_decoder_folder, seed=9)
        write_red(folder / "other", other, seed=1)
    with pytest.raises(UserError) as caught:
        score(folder, adapters, tmp_path / "new" / "scores.json", tasks=tasks)
    assert message in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_task_whose_data_cannot_be_loaded_is_named(folder, tmp_path):
    path = tmp_path / "gone.yaml"
    text = (folder / "tasks" / "tiny_open.yaml").read_text()
    path.write_text(text.replace(str(folder / "tiny_small.jsonl"), str(tmp_path / "gone.jsonl")))
    with pytest.raises(UserError, match=r"lm-eval cannot load the task .*gone.yaml: .*gone.jsonl"):
        score(folder, [], tmp_path / "scores.json", tasks=str(path), include_path=None)


def test_an_existing_file_is_not_overwritten(folder, tmp_path):
    (tmp_path / "scores.json").write_text("mine")
    with pytest.raises(
        UserError, match=r"scores.json exists already and holds no scores: choose another --out, or remove it"
    ):
        score(folder, [], tmp_path / "scores.json")
    assert (tmp_path / "scores.json").read_text() == "mine"


def test_a_missing_extra_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"scores by lm-eval need its package: pip install redpeft\[lm-eval\]"):
        score(folder, [], tmp_path / "scores.json")


def test_lm_eval_knows_the_model_redpeft(folder):
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    from redpeft.evaluation.adapters_lm import AdaptersLM

    assert get_model("redpeft") is AdaptersLM
    found = simple_evaluate(
        "redpeft",
        model_args=f"pretrained={folder / 'base'},adapter={folder / 'one'}",
        tasks=["tiny_small"],
        task_manager=TaskManager(include_path=str(folder / "tasks")),
        batch_size=4,
    )
    assert found["config"]["model_num_parameters"] > 0
    assert 0 <= found["results"]["tiny_small"]["acc,none"] <= 1


def test_virtual_tokens_shorten_the_longest_prompt(tiny_gpt2_folder, tmp_path):
    """lm-eval cuts prompts that are too long, and a learned position beyond the last is an IndexError."""
    from lm_eval.api.instance import Instance
    from peft import PromptTuningConfig, get_peft_model

    from redpeft.evaluation.adapters_lm import AdaptersLM

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    get_peft_model(GPT2LMHeadModel.from_pretrained(tiny_gpt2_folder), config).save_pretrained(tmp_path / "prompt")
    lm = AdaptersLM(str(tiny_gpt2_folder), tmp_path / "prompt", batch_size=1)
    assert lm.max_length == 256 - 6
    [(score, _)] = lm.loglikelihood([Instance("loglikelihood", {}, ("word " * 400, "end"), 0)])
    assert score < 0
    lm.use(None)
    assert lm.max_length == 256
    assert AdaptersLM(str(tiny_gpt2_folder), max_length=100).max_length == 100


def test_answers_longer_than_the_models_positions_are_an_error(folder, tmp_path):
    short = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=4, n_embd=16, n_layer=1, n_head=2))
    short.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(tmp_path / "base")
    tasks, files = parse_tasks("tiny_open"), folder / "tasks"
    with pytest.raises(UserError, match="^lm-eval cannot score .*base on tiny_open: .*maximum sequence length .4."):
        evaluate_adapters(str(tmp_path / "base"), [], tasks, tmp_path / "scores.json", include_path=files)


def test_the_preset_has_the_papers_tasks_and_shots():
    shots = {task.name: task.shots for task in parse_tasks("open-llm-leaderboard", num_fewshot=3)}
    assert shots == {"ai2_arc": 25, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5, "hellaswag": 10, "mmlu": 10}
    assert all(task.metric for task in PRESETS["open-llm-leaderboard"])
    assert parse_tasks("boolq, gsm8k,boolq", 3) == [HarnessTask("boolq", 3), HarnessTask("gsm8k", 3)]
    mixed = parse_tasks("gsm8k,open-llm-leaderboard", 3)
    assert HarnessTask("gsm8k", 3) in mixed
    assert len(mixed) == len(PRESETS["open-llm-leaderboard"])


@pytest.mark.slow
def test_lm_eval_knows_the_papers_tasks():
    from lm_eval.tasks.manager import TaskManager

    manager = TaskManager()
    assert {task.name for task in PRESETS["open-llm-leaderboard"]} <= set(manager.all_tasks)
    assert manager.task_index["ai2_arc"].tags == {"arc_easy", "arc_challenge"}


def test_the_table_shows_scores_and_their_average(monkeypatch):
    tasks = [HarnessTask("a", 5, "acc,none"), HarnessTask("b", 0, "exact_match,strict")]
    scores = {"a": {"acc,none": 0.5, "acc_stderr,none": 0.25}, "b": {"exact_match,strict": 0.75, "other,none": 3.0}}
    cells = {
        ("red", task): {"metrics": {task.name: scores[task.name]}, "rows": {task.name: 4}, "shots": task.shots}
        for task in tasks
    }
    from redpeft.evaluation.lm_harness import _collect

    result = _collect("base", cells)
    assert result["average"] == {"red": 0.625}
    table = results_table(result, tasks)
    assert [list(column.cells) for column in table.columns] == [
        ["a", "b", "average"],
        ["5", "0", ""],
        ["acc", "exact_match (strict)", ""],
        ["0.5000 ± 0.2500", "0.7500", "0.6250"],
    ]
    everything = results_table({**result, "average": {}}, [HarnessTask("a"), HarnessTask("b")])
    assert list(everything.columns[2].cells) == ["acc", "exact_match (strict)", "other"]


def test_the_command_prints_json_or_a_table(folder, alone, tmp_path, capsys):
    call = ["lm-eval", str(folder / "base"), "--adapter", str(folder / "one"), "--adapter", str(folder / "lora")]
    call += ["--tasks", "tiny_large", "--include-path", str(folder / "tasks"), "--out", str(tmp_path / "scores.json")]
    with pytest.raises(SystemExit) as exit_:
        cli.main([*call, "--json"])
    assert exit_.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "scores.json").read_text())
    assert by_name(folder, said)["lora"]["tiny_large"] == alone["lora"]["tiny_large"]
    with pytest.raises(SystemExit):
        cli.main(call)
    out = capsys.readouterr().out
    assert "tiny_large" in out
    assert f"{alone['one']['tiny_large']['acc,none']:.4f}" in out
