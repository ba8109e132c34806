from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from rich.console import Console
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers.adapters import SITES, random_tensors, write_folder
from redpeft import RedConfig
from redpeft.adapters import load_adapter, read_adapter
from redpeft.adapters.released import export_released, import_released, import_table
from redpeft.errors import UserError

SMALL = {"vocab_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ROBERTA = RobertaConfig(**SMALL, hidden_size=16, pad_token_id=1)
GPT2 = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)
T5 = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
LLAMA = LlamaConfig(**SMALL, hidden_size=16)

# By which names the released code finds the modules to edit in its models: RED, RED++.
RED = r"\d\.output\.dense$|mlp\.c_proj$|DenseReluDense\.wo$|mlp\.down_proj$"
RED_MORE = r"query$|key$|value$|output\.dense$|c_attn$|c_proj$"


def changed(config, **fields):
    return config.__class__(**{**config.to_dict(), **fields})


def bare(config, device="cpu"):
    """The model that the released code edits."""
    kinds = {"gpt2": GPT2LMHeadModel, "t5": T5ForConditionalGeneration, "llama": LlamaForCausalLM}
    with torch.device(device):
        if config.model_type == "roberta":
            return RobertaModel(config, add_pooling_layer=False).eval()
        return kinds[config.model_type](config).eval()


def released(config, pattern=RED, dtype=torch.float32, seed=0):
    """A state dict as the released code saves it, in the order of the model, far from the identity."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in bare(config, "meta").named_modules():
        if re.search(pattern, name):
            width = module.nf if hasattr(module, "nf") else module.out_features
            bias, scale = 50 * torch.randn(2, 1, width, generator=random)
            tensors[f"{name}.delta_vector.activation_bias"] = bias.to(dtype)
            tensors[f"{name}.delta_vector.activation_scaling"] = scale.to(dtype)
    return tensors


def head(labels=3, width=16, seed=1):
    random = torch.Generator().manual_seed(seed)
    shapes = {"dense.weight": (width, width), "dense.bias": (width,)}
    shapes |= {"out_proj.weight": (labels, width), "out_proj.bias": (labels,)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def write(folder, config, tensors=None, classifier=None):
    """The checkpoint and the base model's config.json: (path, base)."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder / "base")
    torch.save(released(config) if tensors is None else tensors, folder / "delta_vector.pth")
    if classifier is not None:
        torch.save(classifier, folder / "classifier.pth")
    return folder, str(folder / "base")


def same_bits(file, other):
    found, expected = (torch.load(one, weights_only=True, map_location="cpu") for one in (file, other))
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[tensor.dtype]
        assert torch.equal(found[key].view(integers), tensor.view(integers)), key


def edit_by_formula(model, tensors):
    """Hook the released edits into the bare model: `h * scaling + bias`, in the dtype of the model."""
    for key in tensors:
        name, _, part = key.partition(".delta_vector.")
        if part == "activation_scaling":
            scale, bias = tensors[key], tensors[f"{name}.delta_vector.activation_bias"]
            model.get_submodule(name).register_forward_hook(
                lambda module, inputs, h, scale=scale, bias=bias: h * scale.to(h.dtype) + bias.to(h.dtype)
            )
    return model


# --- the authors' own files ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def official():
    """The folder of the released checkpoints beside the repository; the test is skipped where there is none."""
    folder = Path(__file__).parents[2] / ".." / "shared" / "official_red"
    if not folder.is_dir():
        pytest.skip("no ../shared/official_red beside the repository")
    return folder.resolve()


OFFICIAL = {
    "RoBERTa/RoBERTa_base/checkpoint/mnli": (
        RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
        ("RobertaForSequenceClassification", 3, 12, 18_432, "float32", -2.2, 5.5, 0.06, 4.8, 0.18, 0.34),
    ),
    "GPT-2/gpt2_medium/checkpoint": (
        GPT2Config(n_embd=1024, n_layer=24, n_head=16),
        ("GPT2LMHeadModel", None, 24, 49_152, "float32", -7.7, 17.3, 0.10, 41, 1.8, 6.5),
    ),
    "Llama/checkpoint": (
        LlamaConfig(vocab_size=32000, intermediate_size=11008),
        ("LlamaForCausalLM", None, 32, 262_144, "bfloat16", 1.0, 1.0, 0.0, 0.155, 0.011, 0.051),
    ),
}


@pytest.mark.parametrize("path", OFFICIAL)
def test_official_checkpoints_hold_what_was_read_off_them_and_come_back_bit_for_bit(tmp_path, official, path):
    config, expected = OFFICIAL[path]
    architecture, labels, layers, parameters, dtype, low, high, negative, largest, first, last = expected
    config.save_pretrained(tmp_path / "base")
    found = import_released(official / path, str(tmp_path / "base"), tmp_path / "adapter")
    assert (found.architecture, found.num_labels, found.layers) == (architecture, labels, layers)
    assert (found.sites, found.modules, found.parameters, found.dtype) == ("ffn", layers, parameters, dtype)
    assert (found.scale_min, found.scale_max) == (pytest.approx(low, abs=0.05), pytest.approx(high, abs=0.05))
    assert found.scale_negative == pytest.approx(negative, abs=0.006)
    assert found.bias_max == pytest.approx(largest, rel=0.02)
    assert (found.bias_rms[0], found.bias_rms[-1]) == (pytest.approx(first, rel=0.05), pytest.approx(last, rel=0.05))

    adapter = read_adapter(tmp_path / "adapter")
    tensors = torch.load(official / path / "delta_vector.pth", weights_only=True, map_location="cpu")
    assert set(adapter.units.values()) == {1.0}
    assert 2 * len(adapter.edits) == len(tensors)
    for site, edit in adapter.edits.items():
        name = f"{site.removeprefix('roberta.')}.delta_vector.activation_"
        assert torch.equal(edit.scale, tensors[f"{name}scaling"][0].float())
        assert torch.equal(edit.bias, tensors[f"{name}bias"][0].float())

    exported = export_released(adapter, tmp_path / "back")
    assert exported.dtype == dtype
    assert {file.name for file in exported.files} == {file.name for file in (official / path).iterdir()}
    for file in exported.files:
        same_bits(file, official / path / file.name)


def test_the_llama_checkpoint_is_a_bias_only_edit_and_the_report_says_why(tmp_path, official):
    OFFICIAL["Llama/checkpoint"][0].save_pretrained(tmp_path / "base")
    found = import_released(official / "Llama/checkpoint/delta_vector.pth", str(tmp_path / "base"), tmp_path / "a")
    assert len(found.notes) == 1
    for text in ("every scale is exactly 1", "bias-only", "bf16", "2^-7 above and 2^-8 below", "1e-3 or 2e-5 rounds"):
        assert text in found.notes[0]
    one = torch.ones(1, dtype=torch.bfloat16)  # the note's own claim
    for step in (1e-3, -1e-3, 2e-5, -2e-5):
        assert torch.equal(one + step, one)
    assert one + 2**-7 > one > one - 2**-8
    assert torch.equal((torch.nextafter(one, 2 * one) - one).float(), torch.tensor([2.0**-7]))
    assert torch.equal((one - torch.nextafter(one, 0 * one)).float(), torch.tensor([2.0**-8]))


def test_official_roberta_gives_the_logits_of_the_released_forward(tmp_path, official):
    """RobertaModel without a pooler; at each FFN's output h * scaling + bias; on the first token's vector x the head
    out_proj(tanh(dense(x))), its dropouts idle. In fp64, on random weights."""
    path = official / "RoBERTa/RoBERTa_base/checkpoint/mnli"
    config = RobertaConfig(vocab_size=64, intermediate_size=64, max_position_embeddings=32, pad_token_id=1)
    torch.manual_seed(0)
    reference = RobertaModel(config, add_pooling_layer=False).eval()
    reference.save_pretrained(tmp_path / "base")
    found = import_released(path, str(tmp_path / "base"), tmp_path / "adapter")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=found.num_labels)
    batch = {"input_ids": torch.randint(3, 64, (3, 11)), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    batch["attention_mask"][1, 6:] = 0
    with torch.no_grad():
        plain = reference(**batch).last_hidden_state
        tensors = torch.load(path / "delta_vector.pth", weights_only=True, map_location="cpu")
        hidden = edit_by_formula(reference.double(), tensors)(**batch).last_hidden_state
        layers = torch.load(path / "classifier.pth", weights_only=True, map_location="cpu")
        layers = {name: tensor.double() for name, tensor in layers.items()}
        inner = torch.tanh(hidden[:, 0] @ layers["dense.weight"].T + layers["dense.bias"])
        expected = inner @ layers["out_proj.weight"].T + layers["out_proj.bias"]
        logits = PeftModel.from_pretrained(model, tmp_path / "adapter")(**batch).logits
    assert (hidden - plain).norm() > 0.1 * plain.norm()  # the edits do something
    assert (logits - expected).norm() <= 1e-5 * expected.norm()


# --- files in the released format ------------------------------------------------------------------------------------

ROBERTA_BASE = RobertaConfig(vocab_size=50265)
ROBERTA_LARGE = RobertaConfig(
    vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)
GPT2_MEDIUM, GPT2_LARGE = (GPT2Config(n_embd=64 * heads, n_layer=n, n_head=heads) for heads, n in ((16, 24), (20, 36)))
T5_BASE = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
LLAMA_7B = LlamaConfig(vocab_size=32000, intermediate_size=11008)


@pytest.mark.parametrize(
    ("config", "pattern", "parameters", "layers"),
    [
        (ROBERTA_BASE, RED, 18_432, 12),
        (ROBERTA_LARGE, RED, 49_152, 24),
        (GPT2_MEDIUM, RED, 49_152, 24),
        (GPT2_LARGE, RED, 92_160, 36),
        (T5_BASE, RED, 36_864, 24),
        (LLAMA_7B, RED, 262_144, 32),
        (ROBERTA_BASE, RED_MORE, 92_160, 12),
        (ROBERTA_LARGE, RED_MORE, 245_760, 24),
        (GPT2_MEDIUM, RED_MORE, 245_760, 24),
        (GPT2_LARGE, RED_MORE, 460_800, 36),
    ],
)
def test_real_configurations_have_the_paper_s_counts(tmp_path, config, pattern, parameters, layers):
    dtype = torch.bfloat16 if config.model_type == "llama" else torch.float32
    path, base = write(tmp_path, config, released(config, pattern, dtype))
    found = import_released(path, base, tmp_path / "adapter")
    assert (found.parameters, found.layers, len(found.bias_rms)) == (parameters, layers, layers)
    assert found.sites == ("ffn" if pattern == RED else "red+")
    adapter = read_adapter(tmp_path / "adapter")
    assert sum(edit.scale.numel() + edit.bias.numel() for edit in adapter.edits.values()) == parameters
    exported = export_released(adapter, tmp_path / "back")
    assert exported.modules == found.modules
    same_bits(tmp_path / "back" / "delta_vector.pth", path / "delta_vector.pth")


@pytest.mark.parametrize(
    ("config", "pattern"),
    [(ROBERTA, RED), (ROBERTA, RED_MORE), (GPT2, RED), (GPT2, RED_MORE), (T5, RED), (LLAMA, RED)],
)
def test_every_model_computes_the_formula(tmp_path, config, pattern):
    tensors = {key: value / 20 for key, value in released(config, pattern).items()}
    path, base = write(tmp_path, config, tensors)
    found = import_released(path, base, tmp_path / "adapter")
    torch.manual_seed(0)
    model = bare(config)
    assert type(model).__name__ == found.architecture
    ids = torch.arange(4, 12).reshape(2, 4)
    batch = {"input_ids": ids, **({"decoder_input_ids": ids.flip(0)} if config.model_type == "t5" else {})}
    with torch.no_grad():
        plain = model(**batch)[0]
        state = model.state_dict()
        reference = bare(config)
        reference.load_state_dict(state)
        expected = edit_by_formula(reference.double(), tensors)(**batch)[0]
        output = load_adapter(model, tmp_path / "adapter")(**batch)[0]
    assert (plain - expected).norm() > 0.1 * plain.norm()
    assert (output - expected).norm() <= 1e-5 * expected.norm()


def test_the_adapter_says_what_it_is(tmp_path):
    path, base = write(tmp_path, ROBERTA, released(ROBERTA, RED_MORE), head(labels=5))
    found = import_released(path, base, tmp_path / "adapter")
    config = read_adapter(tmp_path / "adapter").config
    assert config["base_model_name_or_path"] == base
    assert (config["task_type"], config["sites"], config["format"]) == ("SEQ_CLS", "red+", 2)
    assert (config["scale_origin"], config["unit"], config["unit_measured"]) == (0, "auto", False)
    assert (config["modules_to_save"], config["base_fingerprint"]) == (["classifier"], None)
    assert len(config["target_modules"]) == 10
    assert "roberta.encoder.layer.1.attention.self.query" in config["target_modules"]
    assert (found.num_labels, found.head_parameters, found.notes) == (5, 16 * 17 + 5 * 17, [])
    text = io.StringIO()
    Console(file=text, width=120).print(import_table(found))
    for figure in ("RobertaForSequenceClassification", "red+: 10 modules in 2 layers", "5 labels", "float32", "320"):
        assert figure in text.getvalue()


def test_layers_differ_in_the_report(tmp_path):
    tensors = released(GPT2, RED_MORE)
    for key in tensors:
        tensors[key] = torch.full_like(tensors[key], -3.0 if "h.1" in key else 0.5)
    found = import_released(*write(tmp_path, GPT2, tensors), tmp_path / "adapter")
    assert found.bias_rms == [0.5, 3.0]
    assert (found.scale_min, found.scale_max, found.scale_negative, found.bias_max) == (-3.0, 0.5, 0.5, 3.0)


def test_scales_of_1_in_fp32_were_not_rounded_away(tmp_path):
    tensors = {key: torch.ones_like(value) if "scaling" in key else value for key, value in released(GPT2).items()}
    found = import_released(*write(tmp_path, GPT2, tensors), tmp_path / "adapter")
    assert len(found.notes) == 1
    assert "bias-only" in found.notes[0]
    assert "bf16" not in found.notes[0]
    export_released(read_adapter(tmp_path / "adapter"), tmp_path / "back")
    same_bits(tmp_path / "back" / "delta_vector.pth", tmp_path / "delta_vector.pth")


def test_roberta_without_its_head_is_the_bare_encoder(tmp_path):
    path, base = write(tmp_path, ROBERTA)
    found = import_released(path, base, tmp_path / "adapter")
    assert (found.architecture, found.num_labels, found.head_parameters) == ("RobertaModel", None, 0)
    assert "no classifier.pth" in found.notes[0]
    adapter = read_adapter(tmp_path / "adapter")
    assert list(adapter.edits) == SITES
    assert adapter.config["modules_to_save"] is None
    load_adapter(RobertaModel(ROBERTA), tmp_path / "adapter")


@settings(max_examples=30, deadline=None)
@given(data=st.data(), bf16=st.booleans(), more=st.booleans(), labels=st.integers(0, 4))
def test_import_and_export_keep_every_bit(tmp_path_factory, data, bf16, more, labels):
    config = ROBERTA if labels else GPT2
    tensors = released(config, RED_MORE if more else RED, torch.bfloat16 if bf16 else torch.float32)
    integers, bits = (torch.int16, 16) if bf16 else (torch.int32, 32)
    exponent = 0x7F80 << (bits - 16)
    for key in data.draw(st.lists(st.sampled_from(list(tensors)), max_size=4)):
        finite = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).filter(lambda x: x & exponent != exponent)
        tensors[key].view(integers)[0, -1] = data.draw(finite)  # subnormal, -0, the largest, ...
    if not bf16:
        assume(any((value.view(torch.int32) & 0xFFFF).any() for value in tensors.values()))
    path, base = write(tmp_path_factory.mktemp("a"), config, tensors, head(labels) if labels else None)
    import_released(path, base, path / "adapter")
    for file in export_released(read_adapter(path / "adapter"), path / "back").files:
        same_bits(file, path / file.name)


def test_an_fp32_file_of_bf16_values_comes_back_in_bf16(tmp_path):
    """The price of a dtype that is told by the values. No value is lost."""
    tensors = {key: value.bfloat16().float() for key, value in released(GPT2).items()}
    import_released(*write(tmp_path, GPT2, tensors), tmp_path / "adapter")
    assert export_released(read_adapter(tmp_path / "adapter"), tmp_path / "back").dtype == "bfloat16"
    found = torch.load(tmp_path / "back" / "delta_vector.pth", weights_only=True)
    assert all(torch.equal(found[key].float(), tensors[key]) for key in tensors)


# --- export of what was trained here ---------------------------------------------------------------------------------


def test_export_writes_the_effective_bias(tmp_path):
    tensors = random_tensors(unit=0.25)
    adapter = read_adapter(write_folder(tmp_path / "a", tensors))
    exported = export_released(adapter, tmp_path / "out")
    assert (exported.modules, exported.dtype) == (2, "float32")
    found = torch.load(tmp_path / "out" / "delta_vector.pth", weights_only=True)
    for site in SITES:
        key = f"base_model.model.{site}.redpeft_edit."
        assert torch.equal(found[f"{site}.delta_vector.activation_scaling"][0], tensors[f"{key}scale"])
        assert torch.equal(found[f"{site}.delta_vector.activation_bias"][0], 0.25 * tensors[f"{key}bias"])
    assert not (tmp_path / "out" / "classifier.pth").exists()


@pytest.mark.parametrize(("config", "sites"), [(ROBERTA, "red+"), (GPT2, "red+"), (T5, "ffn"), (LLAMA, "ffn")])
def test_what_peft_saved_is_exported_in_the_order_of_the_model(tmp_path, config, sites):
    depth = {"gpt2": "n_layer", "t5": "num_layers"}.get(config.model_type, "num_hidden_layers")
    config = changed(config, **{depth: 11})  # 10 comes after 9
    model = bare(config)
    get_peft_model(model, RedConfig(sites=sites, init_weights=False)).save_pretrained(tmp_path / "a")
    export_released(read_adapter(tmp_path / "a"), tmp_path / "out")
    found = torch.load(tmp_path / "out" / "delta_vector.pth", weights_only=True)
    assert list(found) == list(released(config, RED_MORE if sites == "red+" else RED))
    assert any(".10." in key for key in found)


def test_a_trained_classifier_goes_there_and_back(tmp_path):
    config = RedConfig(init_weights=False, unit=1.0, task_type="SEQ_CLS")
    model = get_peft_model(RobertaForSequenceClassification(ROBERTA), config)
    model.save_pretrained(tmp_path / "a")
    trained = read_adapter(tmp_path / "a")
    export_released(trained, tmp_path / "out")
    ROBERTA.save_pretrained(tmp_path / "base")
    found = import_released(tmp_path / "out", str(tmp_path / "base"), tmp_path / "b")
    again = read_adapter(tmp_path / "b")
    assert found.num_labels == 2
    assert again.edits.keys() == trained.edits.keys()
    for site, edit in trained.edits.items():
        assert torch.equal(again.edits[site].scale, edit.scale.float().double())  # the released format has scales
        assert torch.equal(again.edits[site].bias, edit.bias)
    assert again.head.keys() == trained.head.keys()
    assert all(torch.equal(again.head[name], trained.head[name]) for name in trained.head)


def test_export_refuses_what_the_format_has_no_place_for(tmp_path):
    def refusal(sites, head):
        tensors = random_tensors(sites) | {f"base_model.model.{name}": torch.ones(2) for name in head}
        with pytest.raises(UserError) as error:
            export_released(read_adapter(write_folder(tmp_path / "a", tensors, targets=sites)), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(error.value)

    whole, linear = [f"classifier.{name}" for name in head()], ["classifier.weight", "classifier.bias"]
    bert, roberta = ([f"{name}.{site}" for site in SITES] for name in ("bert", "roberta"))
    assert f"which have no {bert[0]}" in refusal(bert, [])
    assert "which have no electra.encoder" in refusal(["electra.encoder.layer.0.output.dense"], whole)
    assert "no place for classifier.bias, classifier.weight" in refusal(roberta, linear)
    assert "no place for classifier.dense.weight" in refusal(roberta, whole[:1])
    assert "no place for lm_head.weight" in refusal(["model.layers.0.mlp.down_proj"], ["lm_head.weight"])
    assert "only for the head of RobertaForSequenceClassification" in refusal(SITES, whole)


def test_nothing_is_written_over(tmp_path):
    path, base = write(tmp_path, GPT2)
    import_released(path, base, tmp_path / "adapter")
    for attempt in (
        lambda: import_released(path, base, tmp_path / "adapter"),
        lambda: export_released(read_adapter(tmp_path / "adapter"), path),
        lambda: import_released(path, base, path / "delta_vector.pth"),
    ):
        before = {file: os.stat(file).st_mtime_ns for file in tmp_path.rglob("*")}
        with pytest.raises(UserError, match="exists already and is not an empty folder"):
            attempt()
        assert {file: os.stat(file).st_mtime_ns for file in tmp_path.rglob("*")} == before
    (tmp_path / "empty").mkdir()
    export_released(read_adapter(tmp_path / "adapter"), tmp_path / "empty")
    same_bits(tmp_path / "empty" / "delta_vector.pth", path / "delta_vector.pth")


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(folder, config=GPT2, tensors=None, classifier=None, base=None):
    path, own = write(folder, config, tensors, classifier)
    with pytest.raises(UserError) as error:
        import_released(path, own if base is None else str(base), folder / "out")
    assert not (folder / "out").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_refuses_a_pickle_of_anything_but_tensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(tmp_path / "a", tensors={**released(GPT2), "more": Harm()})
    assert "a pickle of more than tensors" in message
    assert not Path("harm").exists()
    assert "it holds no tensors by name" in refusal(tmp_path / "b", tensors=list(released(GPT2).values()))
    assert "it holds no tensors by name" in refusal(tmp_path / "c", tensors={})
    assert "epoch is int, and" in refusal(tmp_path / "d", tensors={"epoch": 3})
    assert "it holds no tensors by name" in refusal(tmp_path / "e", tensors={7: torch.ones(1, 16)})


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 500, b"PK\x03\x04", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_refuses_a_broken_file(tmp_path, content):
    path, base = write(tmp_path, GPT2)
    (path / "delta_vector.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"delta_vector\.pth: corrupt, or a pickle of more than tensors"):
        import_released(path, base, tmp_path / "out")


@pytest.mark.parametrize("keep", [10, 1000, -100])
def test_refuses_a_truncated_file(tmp_path, keep):
    path, base = write(tmp_path, GPT2)
    file = path / "delta_vector.pth"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="corrupt"):
        import_released(file, base, tmp_path / "out")


def test_refuses_what_is_not_there(tmp_path):
    path, base = write(tmp_path, GPT2)
    for missing in (tmp_path / "nowhere", tmp_path / "base"):
        with pytest.raises(UserError, match=r"no such file: .*; give a delta_vector\.pth"):
            import_released(missing, base, tmp_path / "out")
    with pytest.raises(UserError, match=r"no such model folder"):
        import_released(path, str(tmp_path / "nowhere"), tmp_path / "out")


SCALING, BIAS = (f"transformer.h.1.mlp.c_proj.delta_vector.activation_{part}" for part in ("scaling", "bias"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({SCALING: None}, "transformer.h.1.mlp.c_proj has no activation_scaling"),
        ({BIAS: None}, "transformer.h.1.mlp.c_proj has no activation_bias"),
        ({SCALING: torch.ones(16)}, f"{SCALING} is float32 of shape (16,)"),
        ({BIAS: torch.ones(2, 16)}, f"{BIAS} is float32 of shape (2, 16)"),
        ({BIAS: torch.ones(1, 16).bfloat16()}, f"{BIAS} is bfloat16 of shape (1, 16), and not float32"),
        ({BIAS: torch.ones(1, 16).half()}, f"{BIAS} is float16"),
        ({BIAS: torch.ones(1, 16).double()}, f"{BIAS} is float64"),
        ({SCALING: torch.ones(1, 16).int()}, f"{SCALING} is int32"),
        ({BIAS: torch.ones(1, 17)}, "of transformer.h.1.mlp.c_proj differ in width"),
        ({SCALING: torch.full((1, 16), float("nan"))}, f"{SCALING} has values that are not finite"),
        ({BIAS: torch.full((1, 16), float("-inf"))}, f"{BIAS} has values that are not finite"),
        (
            {"transformer.h.1.mlp.c_proj.delta_vector.activation_ln.weight": torch.ones(1, 16)},
            "transformer.h.1.mlp.c_proj.delta_vector.activation_ln.weight is neither the activation_scaling",
        ),
        ({"lm_head.weight": torch.ones(1, 16)}, "lm_head.weight is neither the activation_scaling"),
    ],
)
def test_names_the_tensor_that_does_not_fit(tmp_path, change, message):
    tensors = {key: value for key, value in (released(GPT2) | change).items() if value is not None}
    found = refusal(tmp_path, tensors=tensors)
    assert message in found
    assert "delta_vector.pth: " in found


@pytest.mark.parametrize(
    ("config", "base", "message"),
    [
        (GPT2, changed(GPT2, n_embd=32), "transformer.h.0.mlp.c_proj has width 16, and 32 in "),
        (GPT2, changed(GPT2, n_layer=1), "has no transformer.h.1.mlp.c_proj to edit"),
        (GPT2, changed(GPT2, n_layer=7), "no tensors for transformer.h.2.mlp.c_proj, transformer.h.3.mlp.c_proj, "),
        (T5, changed(T5, num_decoder_layers=1), "has no decoder.block.1.layer.2.DenseReluDense.wo to edit"),
        (ROBERTA, GPT2, "encoder.layer.0.output.dense is a module of roberta, and "),
        (GPT2, T5, "is a module of gpt2, and "),
        (T5, LLAMA, "is a module of t5, and "),
        (LLAMA, ROBERTA, "is a module of llama, and "),
    ],
)
def test_refuses_another_base_model(tmp_path, config, base, message):
    base.save_pretrained(tmp_path / "other")
    assert message in refusal(tmp_path, config, base=tmp_path / "other")


def test_refuses_modules_that_the_released_code_does_not_edit(tmp_path):
    strange = {key.replace("transformer.h", "blocks"): value for key, value in released(GPT2).items()}
    assert "blocks.0.mlp.c_proj is a module of none of the models" in refusal(tmp_path / "a", tensors=strange)
    inner = {key.replace("c_proj", "c_fc"): value for key, value in released(GPT2).items()}
    assert "has no transformer.h.0.mlp.c_fc" in refusal(tmp_path / "b", tensors=inner)


def test_refuses_half_of_red_more(tmp_path):
    tensors = {key: value for key, value in released(GPT2, RED_MORE).items() if "h.1.attn" not in key}
    message = refusal(tmp_path, tensors=tensors)
    assert "no tensors for transformer.h.1.attn.c_attn, transformer.h.1.attn.c_proj, which" in message


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        (head(width=32), "classifier.pth: dense.weight is (32, 32), and (16, 16) on "),
        ({**head(), "dense.bias": torch.ones(17)}, "classifier.pth: dense.bias is (17,), and (16,) on "),
        ({**head(), "out_proj.bias": torch.ones(4)}, "classifier.pth: out_proj.bias is (4,), and (3,) on "),
        ({**head(), "out_proj.weight": torch.ones(16)}, "classifier.pth: it holds dense.weight, "),
        ({"weight": torch.ones(3, 16), "bias": torch.ones(3)}, "classifier.pth: it holds weight, bias, which is not"),
        (
            {**head(), "dense.weight": torch.full((16, 16), float("nan"))},
            "dense.weight has values that are not finite",
        ),
        ({}, "classifier.pth: it holds no tensors"),
    ],
)
def test_refuses_a_classifier_that_does_not_fit(tmp_path, classifier, message):
    assert message in refusal(tmp_path, ROBERTA, classifier=classifier)


def test_refuses_a_classifier_beside_another_model(tmp_path):
    assert "the released code has a head for RoBERTa only" in refusal(tmp_path, GPT2, classifier=head())
