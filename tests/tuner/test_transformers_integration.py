"""RED through transformers' functions: add_adapter, Trainer, casts, autocast, checkpointing, compile, offload."""

from __future__ import annotations

import copy

import accelerate
import datasets
import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parameters_to_vector
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from helpers.versions import needs_add_adapter
from redpeft import RedConfig, calibrate
from redpeft.errors import UserError

SHARED = ["shared_expert.down_proj"]


# add_adapter, load_adapter, delete_adapter, set_adapter, disable_adapters


@needs_add_adapter
@pytest.mark.parametrize("heads", [None, ["classifier"]], ids=["edits", "edits and head"])
def test_adapters_of_a_transformers_model(tiny, heads):
    if heads and Version(peft.__version__) < Version("0.19"):
        pytest.skip("older PEFT disables the heads of all adapters when a second one is added")
    model, ids = tiny.bert_classifier(), tiny.tokens()
    clean, names = model(ids).logits, set(model.state_dict())
    model.add_adapter(RedConfig(modules_to_save=heads), "a")
    with tiny.only_edits_move(model, heads and "classifier.modules_to_save"):
        tiny.train(model, tiny.batch("SEQ_CLS"))
    outputs = {"a": tiny.far(model, "a")(ids).logits}
    model.add_adapter(RedConfig(modules_to_save=heads), "b")
    assert model.active_adapters() == ["b"]
    outputs["b"] = tiny.far(model, "b", seed=1)(ids).logits
    assert not torch.equal(outputs["a"], outputs["b"])
    for name in ("a", "b"):
        model.set_adapter(name)
        assert torch.equal(model(ids).logits, outputs[name])
    model.disable_adapters()
    assert torch.equal(model(ids).logits, clean)
    model.enable_adapters()
    model.set_adapter("b")
    model.delete_adapter("a")
    assert torch.equal(model(ids).logits, outputs["b"])
    model.delete_adapter("b")
    assert torch.equal(model(ids).logits, clean)
    plain = {name.replace(".base_layer", "").replace(".original_module", "") for name in model.state_dict()}
    assert plain == names


@needs_add_adapter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_adapters_are_loaded_in_full_precision(tiny, tmp_path, dtype):
    tiny.bert_classifier(dtype).save_pretrained(tmp_path / "base")
    base = lambda: AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=dtype)  # noqa: E731
    model = base()
    model.add_adapter(RedConfig(modules_to_save=["classifier"]))
    tiny.far(model).save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in saved.items() if "redpeft_edit" in name} == {torch.float32}
    expected = tiny.values(model)

    loaded = base()
    loaded.load_adapter(str(tmp_path / "adapter"))
    tiny.assert_same(tiny.values(loaded), expected)
    assert torch.equal(loaded(tiny.tokens()).logits, model(tiny.tokens()).logits)
    through_peft = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    tiny.assert_same(tiny.values(through_peft), expected)
    by_folder = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter", dtype=dtype)
    tiny.assert_same(tiny.values(by_folder), expected)

    again = base()
    again.load_adapter(str(tmp_path / "adapter"), is_trainable=True)
    units = [edit.unit.clone() for edit in tiny.edits(again)]
    with tiny.only_edits_move(again, "classifier.modules_to_save"):
        tiny.train(again, tiny.batch("SEQ_CLS"))
    tiny.assert_same([edit.unit for edit in tiny.edits(again)], units)  # measured once, not again


@needs_add_adapter
def test_nothing_stays_behind_on_models_with_shared_experts(tiny):
    model, ids = tiny.qwen_moe(), tiny.tokens()
    clean, names = model(ids).logits, set(model.state_dict())
    model.add_adapter(RedConfig(target_modules=SHARED), "a")
    tiny.far(model, "a")
    sites = [f"model.layers.{i}.mlp.shared_expert.down_proj" for i in range(2)]
    expected = {f"{site}.redpeft_edit.{vector}" for site in sites for vector in ("scale_offset", "bias", "unit")}
    assert set(model.get_adapter_state_dict("a")) == expected
    assert not torch.equal(model(ids).logits, clean)
    model.add_adapter(RedConfig(target_modules=SHARED), "b")
    model.delete_adapter("a")
    model.delete_adapter("b")
    assert {name.replace(".base_layer", "") for name in model.state_dict()} == names
    assert torch.equal(model(ids).logits, clean)


@needs_add_adapter
def test_other_methods_are_refused(tiny):
    model = tiny.llama()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "low")
    with pytest.raises(
        UserError,
        match=r"RED cannot be mixed with other methods in one model, and .*q_proj is a layer of another \(peft",
    ):
        model.add_adapter(RedConfig(), "ours")


@pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="older transformers has no hotswap")
def test_hotswap_is_refused(tiny, llama_folders):
    model = tiny.llama()
    model.load_adapter(str(llama_folders[1]), adapter_name="ours")
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        model.load_adapter(str(llama_folders[1]), adapter_name="ours", hotswap=True)


# Trainer


def rows() -> datasets.Dataset:
    ids = torch.randint(3, 100, (24, 6), generator=torch.Generator().manual_seed(1))
    return datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()})


def arguments(folder, **options) -> TrainingArguments:
    common = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 3}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
    return TrainingArguments(output_dir=str(folder), **common, **quiet, **options)


def test_trainer_resumes_bit_for_bit(tiny, tmp_path):
    def make() -> PeftModel:
        return get_peft_model(tiny.bert_classifier(), RedConfig(task_type="SEQ_CLS"))

    model = make()
    with tiny.only_edits_move(model, "modules_to_save.default"):
        Trainer(model, arguments(tmp_path), train_dataset=rows()).train()
    resumed = make()
    tiny.far(resumed)  # must not matter
    Trainer(resumed, arguments(tmp_path), train_dataset=rows()).train(str(tmp_path / "checkpoint-2"))
    tiny.assert_same(list(model.state_dict().values()), list(resumed.state_dict().values()))


def test_trainer_ends_with_the_best_checkpoint(tiny, tmp_path):
    model = get_peft_model(tiny.bert_classifier(), RedConfig(task_type="SEQ_CLS"))
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    args = arguments(tmp_path, **best, metric_for_best_model="eval_loss")  # the worst, so not the last
    trainer = Trainer(model, args, train_dataset=rows(), eval_dataset=rows())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    loaded = PeftModel.from_pretrained(tiny.bert_classifier(), trainer.state.best_model_checkpoint)
    tiny.assert_same(tiny.values(model), tiny.values(loaded))


@needs_add_adapter
def test_trainer_with_add_adapter_on_a_bf16_model(tiny, tmp_path):
    model = tiny.bert_classifier(torch.bfloat16)
    model.add_adapter(RedConfig(modules_to_save=["classifier"]))
    with tiny.only_edits_move(model, "classifier.modules_to_save"):
        Trainer(model, arguments(tmp_path), train_dataset=rows()).train()
    assert tiny.dtypes(model) == {torch.float32}
    loaded = tiny.bert_classifier(torch.bfloat16)
    loaded.load_adapter(str(tmp_path / "checkpoint-6"))
    tiny.assert_same(tiny.values(loaded), tiny.values(model))


# Precision


@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_edits_are_fp32_or_wider_and_outputs_keep_the_base_dtype(tiny, dtype, autocast_adapter_dtype):
    own = torch.float64 if dtype == torch.float64 else torch.float32
    config = RedConfig(task_type="CAUSAL_LM")
    model = get_peft_model(tiny.llama(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    assert tiny.dtypes(model) == {own}
    with tiny.only_edits_move(model):
        tiny.train(model, tiny.batch(), lr=1e-4)
    assert tiny.dtypes(model) == {own}
    assert model(tiny.tokens()).logits.dtype == dtype


def half(model):
    return model.half()


def to_bf16(model):
    return model.to(torch.bfloat16)


def bf16(model):
    return model.bfloat16()


@pytest.mark.parametrize("cast", [half, to_bf16, bf16])
def test_casts_of_the_whole_model_leave_edits_alone(tiny, cast):
    model = tiny.with_edits(tiny.llama())
    before = tiny.values(model)
    dtype = cast(model).dtype
    tiny.assert_same(tiny.values(model), before)
    assert model(tiny.tokens()).logits.dtype == dtype == tiny.layers(model)[0].weight.dtype
    tiny.train(model, tiny.batch())
    assert tiny.dtypes(model) == {torch.float32}


def test_what_trl_and_deepspeed_cast_is_fp32_where_training_starts(tiny, llama_folders):
    """And an edit that was cast later still learns, from vectors of 16 bits."""
    model = PeftModel.from_pretrained(tiny.llama(torch.bfloat16), llama_folders[1], is_trainable=True)
    expected = tiny.values(model)
    for when in ("before", "after"):
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        if when == "before":
            model.train()
            assert tiny.dtypes(model) == {torch.float32}
            torch.testing.assert_close(tiny.values(model), expected, rtol=2**-8, atol=0)
        else:
            with tiny.only_edits_move(model):
                model(**tiny.batch()).loss.backward()
                torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()


def test_autocast(tiny):
    model = tiny.with_edits(tiny.llama(), "CAUSAL_LM")
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny.layers(model)[0](torch.randn(2, 64)).dtype == torch.bfloat16
        loss = model.train()(**tiny.batch()).loss
    loss.backward()
    mixed = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    assert {grad.dtype for grad in mixed} == {torch.float32}
    model.zero_grad()
    model(**tiny.batch()).loss.backward()
    full = [p.grad for p in model.parameters() if p.requires_grad]
    assert (
        parameters_to_vector(mixed).sub(parameters_to_vector(full)).norm() < 0.05 * parameters_to_vector(full).norm()
    )


# Checkpointing, compile, placement


@pytest.mark.parametrize("fresh", [True, False], ids=["unit to be measured", "trained"])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(("name", "task_type"), [("llama", "CAUSAL_LM"), ("bert_classifier", "SEQ_CLS")])
def test_gradient_checkpointing_gives_the_same_gradients(tiny, name, task_type, use_reentrant, fresh):
    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        model = get_peft_model(getattr(tiny, name)(), RedConfig(task_type=task_type))
        if not fresh:
            tiny.far(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.train()(**tiny.batch(task_type)).loss.backward()
        assert all(edit.unit_known for edit in tiny.edits(model))
        return [p.grad for p in model.parameters() if p.requires_grad]

    torch.testing.assert_close(gradients(True), gradients(False))


class Block(nn.Module):
    """The smallest model with an FFN: what torch.compile sees of an edit, without a transformer around it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(100, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        return hidden + self.down(self.up(hidden).relu())


def step(model: nn.Module) -> None:
    model.train()(tokens()).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-3 * parameter.grad)
                parameter.grad = None


def tokens() -> torch.Tensor:
    return torch.arange(12).reshape(4, 3)


def compiled(model: nn.Module) -> tuple[nn.Module, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter), counter


def test_compile_equals_eager_and_settles(tiny):
    model = get_peft_model(Block(), RedConfig(target_modules=["down"]))
    eager = copy.deepcopy(model)
    fast, counter = compiled(model)
    counts = []
    for _ in range(4):
        step(fast)
        step(eager)
        counts.append(counter.frame_count)
    assert counts[1] == counts[2] == counts[3]  # the first pass measures the unit
    torch.testing.assert_close(tiny.values(model), tiny.values(eager))


def test_mixed_batches_are_not_compiled_anew_for_every_mix(tiny):
    model = tiny.with_edits(Block(), target_modules=["down"])
    model.add_adapter("b", RedConfig(target_modules=["down"]))
    tiny.far(model, "b", seed=1).eval()
    fast, counter = compiled(model)
    counts = []
    with torch.no_grad():
        for names in (["b", "default"], ["__base__", "b"], ["default", "default"], ["b", "b"]):
            expected = model(tokens()[:2], adapter_names=names)
            torch.testing.assert_close(fast(tokens()[:2], adapter_names=names), expected)
            counts.append(counter.frame_count)
    assert counts == [counts[0]] * 4


def test_strengths_are_not_compiled_anew(tiny):
    model = tiny.with_edits(Block(), target_modules=["down"])
    fast, counter = compiled(model)
    counts = []
    with torch.no_grad():
        for strength in (1, 0.5, -2, 0, 0.7):
            model.set_scale("default", strength)
            torch.testing.assert_close(fast(tokens()), model(tokens()))
            counts.append(counter.frame_count)
    assert counts[1] == counts[-1]


@pytest.mark.slow
def test_compile_of_a_transformer_is_one_graph_after_calibrate(tiny):
    model = get_peft_model(tiny.llama(), RedConfig(task_type="CAUSAL_LM"))
    calibrate(model)
    torch._dynamo.reset()
    fast = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    assert torch.equal(fast.train()(tiny.tokens()).logits, model(tiny.tokens()).logits)


def test_meta_device_counts_parameters(tiny):
    with torch.device("meta"):
        base = tiny.gpt2()
    model = get_peft_model(base, RedConfig(task_type="CAUSAL_LM"))
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * 32
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert model.train()(torch.zeros(1, 3, dtype=torch.long, device="meta")).logits.shape == (1, 3, 100)


def test_offloaded_layers_are_edited_where_they_compute(tiny, llama_folders):
    def offloaded():
        base = AutoModelForCausalLM.from_pretrained(llama_folders[0])
        return accelerate.cpu_offload(base, execution_device="cpu")

    expected = tiny.with_edits(tiny.llama())(tiny.tokens()).logits
    model = PeftModel.from_pretrained(offloaded(), llama_folders[1])
    assert torch.equal(model(tiny.tokens()).logits, expected)
    model.merge_adapter()
    torch.testing.assert_close(model(tiny.tokens()).logits, expected)
    model.unmerge_adapter()
    assert torch.equal(model(tiny.tokens()).logits, expected)

    fresh = get_peft_model(offloaded(), RedConfig())
    assert {tensor.device.type for tensor in tiny.values(fresh)} == {"cpu"}
    before = tiny.values(fresh)
    tiny.train(fresh, tiny.batch())
    assert not any(torch.equal(*pair) for pair in zip(before, tiny.values(fresh), strict=True))
