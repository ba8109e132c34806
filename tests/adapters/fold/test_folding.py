"""Folded checkpoints say what the adapted model says, loaded with nothing but transformers."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertForMaskedLM, BertForSequenceClassification, BertModel

from redpeft.adapters import read_adapter
from redpeft.adapters.fold import fold
from redpeft.errors import UserError
from redpeft.models import leave_unpacked

from .models import (
    CAUSAL,
    LABELS,
    SEQ2SEQ,
    edited,
    load_folded,
    logits,
    randomise,
    relative,
    save_both,
    tiny,
    tiny_config,
    token_ids,
)

EXACT = 1e-5

# A bias where the edit is
IN_PLACE = [
    ("bert", "BertForSequenceClassification", LABELS),
    ("roberta", "RobertaForSequenceClassification", LABELS),
    ("albert", "AlbertForSequenceClassification", LABELS),
    ("deberta-v2", "DebertaV2ForSequenceClassification", LABELS),
    ("distilbert", "DistilBertForSequenceClassification", LABELS),
    ("xlm", "XLMForSequenceClassification", LABELS),
    ("gpt2", "GPT2LMHeadModel", CAUSAL),
    ("gpt2", "GPT2ForSequenceClassification", LABELS),
    ("gpt_neox", "GPTNeoXForCausalLM", CAUSAL),
    ("opt", "OPTForCausalLM", CAUSAL),
    ("bloom", "BloomForCausalLM", CAUSAL),
    ("phi", "PhiForCausalLM", CAUSAL),
    ("starcoder2", "Starcoder2ForCausalLM", CAUSAL),
    ("bart", "BartForConditionalGeneration", SEQ2SEQ),
]
# A switch of the configuration gives one
SWITCHED = {
    ("llama", "LlamaForCausalLM", CAUSAL): ["mlp_bias"],
    ("llama", "LlamaForSequenceClassification", LABELS): ["mlp_bias"],
    ("granite", "GraniteForCausalLM", CAUSAL): ["mlp_bias"],
    ("smollm3", "SmolLM3ForCausalLM", CAUSAL): ["mlp_bias"],
    ("seed_oss", "SeedOssForCausalLM", CAUSAL): ["mlp_bias"],
    ("helium", "HeliumForCausalLM", CAUSAL): ["mlp_bias"],
    ("nemotron", "NemotronForCausalLM", CAUSAL): ["mlp_bias"],
    ("modernbert", "ModernBertForSequenceClassification", LABELS): ["mlp_bias"],
    ("eurobert", "EuroBertForSequenceClassification", LABELS): ["mlp_bias"],
    ("internlm3", "LlamaForCausalLM", CAUSAL): ["attention_bias", "mlp_bias"],
    ("ernie4_5", "Ernie4_5ForCausalLM", CAUSAL): ["use_bias"],
}
# None of these: the bias stays an edit
LEFT = [
    ("t5", "T5ForConditionalGeneration", SEQ2SEQ),
    ("gemma2", "Gemma2ForCausalLM", CAUSAL),
    ("qwen3", "Qwen3ForCausalLM", CAUSAL),
    ("mistral", "MistralForCausalLM", CAUSAL),
    ("mistral", "MistralForSequenceClassification", LABELS),
    ("olmo2", "Olmo2ForCausalLM", CAUSAL),
    ("phi3", "Phi3ForCausalLM", CAUSAL),
]


def known(family):
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")


@pytest.mark.parametrize(("family", "class_name", "task"), [*IN_PLACE, *SWITCHED], ids=lambda value: str(value))
def test_a_plain_checkpoint_says_the_same(family, class_name, task, tmp_path):
    known(family)
    expected = save_both(tmp_path, tiny(class_name, tiny_config(family)), task)
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    assert list(result.changes) == SWITCHED.get((family, class_name, task), [])
    assert result.adapter is None
    assert not (tmp_path / "out" / "adapter").exists()
    folded = load_folded(result)
    assert "redpeft" not in " ".join(folded.state_dict())
    assert relative(logits(folded, token_ids()), expected) <= EXACT
    base = getattr(transformers, class_name).from_pretrained(tmp_path / "base").eval()
    assert relative(logits(base, token_ids()), expected) > 0.1  # the edits do something


def test_a_base_whose_files_have_other_names_than_its_modules(tmp_path):
    """transformers 5 writes ViT by its old names, `vit.encoder.layer.0.output.dense`, and renames as it loads."""
    config = tiny_config("vit", image_size=16, patch_size=8, num_hidden_layers=2)
    model = tiny("ViTForImageClassification", config)
    model.save_pretrained(tmp_path / "base")
    adapted = edited(model, None)
    adapted.save_pretrained(tmp_path / "adapter")
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    assert set(load_file(result.out / "model.safetensors")) == set(load_file(tmp_path / "base" / "model.safetensors"))
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    folded = load_folded(result)
    with torch.no_grad():
        assert relative(folded(pixels).logits, adapted(pixels).logits) <= EXACT


@pytest.mark.parametrize(("family", "class_name", "task"), LEFT)
def test_a_bundle_says_the_same(family, class_name, task, tmp_path):
    known(family)
    options = {"sliding_window": None} if family == "mistral" else {}
    expected = save_both(tmp_path, tiny(class_name, tiny_config(family, **options)), task)
    with pytest.raises(UserError, match=r"a stock .* has no place for the biases of .*--format bundle"):
        fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    assert not (tmp_path / "out").exists()
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base", bundle=True)
    assert relative(logits(load_folded(result), token_ids()), expected) <= EXACT
    left = read_adapter(result.adapter)
    assert all((edit.scale == 1).all() and (edit.bias != 0).any() for edit in left.edits.values())
    assert left.config["use_scale"] is False
    assert left.config["base_model_name_or_path"] == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "class_name", "changes"),
    [
        ("gpt2", "GPT2LMHeadModel", []),
        ("bert", "BertForMaskedLM", []),
        ("llama", "LlamaForCausalLM", ["attention_bias", "mlp_bias"]),
        ("gemma", "GemmaForCausalLM", None),
    ],
)
def test_all_five_sites_of_a_layer(family, class_name, changes, tmp_path):
    expected = save_both(tmp_path, tiny(class_name, tiny_config(family)), None, sites="red+")
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base", bundle=changes is None)
    assert (list(result.changes) or None) == (changes or None)
    assert relative(logits(load_folded(result), token_ids()), expected) <= EXACT


def test_one_kind_of_site_switches_on_no_more_than_it_needs(tmp_path):
    expected = save_both(tmp_path, tiny("GemmaForCausalLM", tiny_config("gemma")), CAUSAL, sites="attention")
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    assert result.changes == {"attention_bias": True}
    assert relative(logits(load_folded(result), token_ids()), expected) <= EXACT


def test_edits_as_large_as_trained_ones_are(tmp_path):
    """Scales from -64 to 74 and biases up to 147, as in the released T5, and a unit that is not 1."""
    model = tiny("LlamaForCausalLM", tiny_config("llama"))
    model.save_pretrained(tmp_path / "base")
    adapted = edited(model, CAUSAL)
    with torch.no_grad():
        for name, tensor in adapted.state_dict().items():
            if "redpeft_edit" in name:
                low, high = {"scale_offset": (-65, 73), "bias": (-147, 147), "unit": (0.2, 3)}[name.rpartition(".")[2]]
                tensor.uniform_(low, high)
    adapted.save_pretrained(tmp_path / "adapter")
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    assert relative(logits(load_folded(result), token_ids()), logits(adapted, token_ids())) <= EXACT


def test_a_scale_without_bias_needs_no_place_for_one(tmp_path):
    expected = save_both(tmp_path, tiny("Qwen3ForCausalLM", tiny_config("qwen3")), CAUSAL, use_bias=False)
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    assert result.changes == {}
    assert relative(logits(load_folded(result), token_ids()), expected) <= EXACT


def test_a_mixture_of_experts_keeps_the_edits_of_its_blocks(tmp_path):
    config = tiny_config("mixtral", num_local_experts=4, num_experts_per_tok=2)
    expected = save_both(tmp_path, tiny("MixtralForCausalLM", config), CAUSAL, sites=["ffn", "attention"])
    with pytest.raises(UserError, match=r"no place for the edits of model\.layers\.0\.mlp"):
        fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base", bundle=True)
    forms = {site.site.rpartition(".")[2]: site.placement for site in result.sites}
    assert forms == {"mlp": "stays an edit", "o_proj": "weight; its bias stays an edit"}
    assert relative(logits(load_folded(result), token_ids()), expected) <= EXACT


def test_nothing_to_fold_is_an_error(tmp_path):
    config = tiny_config("mixtral", num_local_experts=4, num_experts_per_tok=2)
    save_both(tmp_path, tiny("MixtralForCausalLM", config), CAUSAL)
    with pytest.raises(UserError, match="nothing of .* can be folded"):
        fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base", bundle=True)


# --- heads, names and files of the base ------------------------------------------------------------------------------


@pytest.mark.parametrize("base_class", [BertModel, BertForMaskedLM, BertForSequenceClassification])
def test_the_head_is_the_adapter_s_whatever_the_base_was_saved_as(base_class, tmp_path):
    """Saved with or without prefix, with another head, or with a head of other labels."""
    config = tiny_config("bert", num_labels=3)
    base = randomise(base_class(config))
    base.save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
    ).eval()
    adapted = edited(model, LABELS, modules_to_save=["classifier", "pooler"])
    adapted.save_pretrained(tmp_path / "adapter")
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    keys = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert keys == set(BertForSequenceClassification(config).state_dict())
    assert relative(logits(load_folded(result), token_ids()), logits(adapted, token_ids())) <= EXACT


def test_a_base_in_several_files_stays_in_several_files(tmp_path):
    model = tiny("LlamaForCausalLM", tiny_config("llama"))
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    adapted = edited(model, CAUSAL)
    adapted.save_pretrained(tmp_path / "adapter")
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    shards = {path.name for path in (tmp_path / "base").glob("*.safetensors")}
    assert len(shards) > 2
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == shards
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {name: file for file in shards for name in load_file(tmp_path / "out" / file)}
    assert index["weight_map"] == stored
    sizes = [t.nbytes for file in shards for t in load_file(tmp_path / "out" / file).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert relative(logits(load_folded(result), token_ids()), logits(adapted, token_ids())) <= EXACT


def test_each_tensor_of_a_base_in_several_files_is_written_once(tmp_path):
    """The base has a head of its own in the first files, and the adapter brings its own."""
    model = tiny("RobertaForSequenceClassification", tiny_config("roberta", num_labels=5))
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    base = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    adapted = edited(model, LABELS)
    for name, parameter in adapted.named_parameters():
        parameter.data.add_(1 if "modules_to_save" in name else 0)
    adapted.save_pretrained(tmp_path / "adapter")
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert sorted(index["weight_map"]) == sorted(name for tensors in files.values() for name in tensors)
    assert index["weight_map"] == base["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in files.values() for t in tensors.values())
    assert relative(logits(load_folded(result), token_ids()), logits(adapted, token_ids())) <= EXACT


def test_what_lies_beside_the_weights_comes_along(tmp_path, tiny_decoder_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder_folder)
    edited(model, CAUSAL).save_pretrained(tmp_path / "adapter")
    fold(tmp_path / "adapter", tmp_path / "out", tiny_decoder_folder)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert "adapter_config.json" not in files
    ours, base = (transformers.AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", tiny_decoder_folder))
    assert ours("a film")["input_ids"] == base("a film")["input_ids"]
    assert base.pad_token is None  # and training takes another
    assert ours.pad_token == "</s>"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == ours.pad_token_id


def test_the_folded_model_needs_no_redpeft(tmp_path):
    expected = save_both(tmp_path, tiny("LlamaForCausalLM", tiny_config("llama")), CAUSAL)
    fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    code = f"""
import sys
sys.modules["redpeft"] = sys.modules["peft"] = None  # importing either fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
ids = torch.tensor({token_ids().tolist()})
torch.save(model(input_ids=ids).logits.double(), {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert relative(torch.load(tmp_path / "logits.pt"), expected) <= EXACT


def test_a_run_becomes_a_classifier_with_its_labels(make_run, tmp_path):
    """From `redpeft train` to transformers' pipeline."""
    from redpeft.training.predict import load_run, predict

    result = fold(make_run, tmp_path / "out")
    texts = ["the film is very good", "awful", "the film is great in the film", "bad film"]
    classify = transformers.pipeline("text-classification", str(result.out))
    ours = list(predict(load_run(make_run), texts))
    for found, expected in zip(classify(texts), ours, strict=True):
        assert found["label"] == expected["label"]
        assert found["score"] == pytest.approx(max(expected["probabilities"].values()), rel=1e-4)


@pytest.fixture(scope="module")
def make_run(tiny_encoder_folder, tmp_path_factory):
    from redpeft.training.recipe import load_recipe
    from redpeft.training.train import train

    folder = tmp_path_factory.mktemp("fold-run")
    rows = [
        {"text": f"the film is {word}", "label": "yes" if word in ("good", "great") else "no"}
        for word in ["good", "bad", "great", "awful"] * 8
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"base": str(tiny_encoder_folder), "data.path": str(folder / "rows.jsonl"), "epochs": 2, "batch_size": 8}
    train(load_recipe(None, values), folder / "run")
    return folder / "run"


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_rounded_once_to_the_dtype_asked_for(dtype, base_dtype, tmp_path):
    to = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    model = tiny("LlamaForCausalLM", tiny_config("llama")).to(base_dtype)
    save_both(tmp_path, model, CAUSAL)
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base", dtype=dtype)
    base, out = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert {tensor.dtype for tensor in out.values()} == {to}
    for site, edit in read_adapter(tmp_path / "adapter").edits.items():
        exact = edit.scale.float().double()[:, None] * base[f"{site}.weight"].double()
        assert torch.equal(out[f"{site}.weight"], exact.float().to(to))
        assert torch.equal(out[f"{site}.bias"], edit.bias.float().to(to))
    kept = base["model.embed_tokens.weight"]
    assert torch.equal(out["model.embed_tokens.weight"], kept.to(to))
    assert str(result.dtype) == str(to)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config.get("dtype") or config["torch_dtype"]) == str(to).removeprefix("torch.")


def test_the_base_s_dtype_is_kept(tmp_path):
    model = tiny("LlamaForCausalLM", tiny_config("llama")).to(torch.bfloat16)
    save_both(tmp_path, model, CAUSAL)
    fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in out.values()} == {torch.bfloat16}


def test_small_edits_that_bf16_rounds_away_are_told_and_a_bundle_keeps_them(tmp_path):
    """An edit within 2^-9 of the identity folds to the identity in bf16: the warning says what to do, and it helps."""
    model = tiny("LlamaForCausalLM", tiny_config("llama")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    adapted = edited(model, CAUSAL)
    with torch.no_grad():
        for name, tensor in adapted.state_dict().items():
            if name.endswith("scale_offset"):
                tensor.uniform_(-(2**-10), 2**-10)
            elif name.endswith("bias") and "redpeft" in name:
                tensor.uniform_(-1e-4, 1e-4)
    adapted.save_pretrained(tmp_path / "adapter")

    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    assert len(result.notes) == 1
    assert "at 3 of 3 sites torch.bfloat16 rounds away" in result.notes[0]
    assert "fp32 or fp16 (--dtype), or write a bundle" in result.notes[0]
    assert all(site.exactness.vanished == 1 for site in result.sites)
    assert fold(tmp_path / "adapter", tmp_path / "wide", tmp_path / "base", dtype="fp32").notes == []

    with pytest.raises(UserError, match="nothing of .* can be folded"):
        fold(tmp_path / "adapter", tmp_path / "bundle", tmp_path / "base", bundle=True)


def test_a_bundle_keeps_the_sites_that_rounding_would_spoil_and_folds_the_rest(tmp_path):
    model = tiny("LlamaForCausalLM", tiny_config("llama")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    adapted = edited(model, CAUSAL)
    small = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        edit = adapted.get_submodule(f"base_model.model.{small}").redpeft_edit["default"]
        edit.offset.uniform_(-(2**-10), 2**-10)
        edit.bias.zero_()
    adapted.save_pretrained(tmp_path / "adapter")
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base", bundle=True)
    assert result.notes == []
    kept = read_adapter(result.adapter).edits
    assert list(kept) == [small]
    torch.testing.assert_close(kept[small].scale, 1 + edit.offset.detach().double(), rtol=0, atol=0)
    out, base = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
    assert torch.equal(out[f"{small}.weight"], base[f"{small}.weight"])
    assert not out[f"{small}.bias"].any()


def test_fp16_overflow_is_an_error_before_anything_is_written(tmp_path):
    model = tiny("LlamaForCausalLM", tiny_config("llama"))
    model.save_pretrained(tmp_path / "base")
    adapted = edited(model, CAUSAL)
    with torch.no_grad():
        adapted.get_submodule("base_model.model.model.layers.2.mlp.down_proj").redpeft_edit["default"].bias[3] = 1e5
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        UserError, match=r"model\.layers\.2\.mlp\.down_proj: .* up to 1e\+05, and torch.float16 ends at"
    ):
        fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base", dtype="fp16")
    assert not list(tmp_path.glob("out*"))
    fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base", dtype="bf16")


def test_fp16_overflow_of_the_base_itself_leaves_nothing_either(tmp_path):
    model = tiny("LlamaForCausalLM", tiny_config("llama"))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 7e4
    save_both(tmp_path, model, CAUSAL)
    with pytest.raises(UserError, match=r"lm_head.weight of the base model has values beyond the range of .*float16"):
        fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base", dtype="fp16")
    assert not list(tmp_path.glob("out*"))


BESIDE = {
    **{"modules.json": '[{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]'},
    **{"1_Pooling/config.json": "{}", "2_Dense/model.safetensors": "weights", "2_Dense/config.json": "{}"},
    **{"config_sentence_transformers.json": "{}", "source.spm": "s", "qwen.tiktoken": "t", "bpe.codes": "c"},
    **{"chat_templates/tool_use.jinja": "{}", "additional_chat_templates/rag.jinja": "{}", "modeling_own.py": "pass"},
    **{"LICENSE": "Apache", "generation_config.json": "{}"},
}
NOT_BESIDE = {
    **{"pytorch_model.bin": "", "tf_model.h5": "", "optimizer.pt": "", "onnx/model.onnx": "", "README.md": "base"},
    **{"old/model.safetensors": "", ".gitattributes": "", "runs/x": ""},
}


def test_what_a_base_s_folder_needs_is_copied(folders):
    for name, content in {**BESIDE, **NOT_BESIDE}.items():
        (folders / "base" / name).parent.mkdir(exist_ok=True)
        (folders / "base" / name).write_text(content)
    fold(folders / "adapter", folders / "out", folders / "base")
    found = {file.relative_to(folders / "out").as_posix() for file in (folders / "out").rglob("*") if file.is_file()}
    assert found == {*BESIDE, "config.json", "model.safetensors", "README.md"}
    assert all((folders / "out" / name).read_text() == content for name, content in BESIDE.items())
    assert (folders / "out" / "README.md").read_text() != "base"


@pytest.mark.parametrize("modules", ['[{"path": "../adapter"}]', '[{"path": "/etc"}]', "[1]", "{", "[{}]"])
def test_a_base_whose_modules_lead_elsewhere(folders, modules):
    (folders / "base" / "modules.json").write_text(modules)
    refused(folders, "modules.json: broken, it names no modules .*copy it again")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """A tiny BERT with random edits, in `base` and `adapter`."""
    save_both(tmp_path, tiny("BertForSequenceClassification", tiny_config("bert")), LABELS)
    return tmp_path


def refused(folders, match, **options):
    with pytest.raises(UserError, match=match):
        fold(folders / "adapter", folders / "out", **{"base": folders / "base", **options})
    assert not list(folders.glob("out*"))


def test_another_base_of_the_same_shape(folders):
    randomise(BertForSequenceClassification(tiny_config("bert")), seed=1).save_pretrained(folders / "other")
    refused(folders, "is for another base model than .*other: the weights differ", base=folders / "other")


def test_a_base_of_another_width(folders):
    config = tiny_config("bert", hidden_size=32)
    BertForSequenceClassification(config).save_pretrained(folders / "other")
    refused(folders, "width 32 there, and 64 in the adapter|does not fit Bert", base=folders / "other")


def test_a_base_of_another_architecture(folders):
    tiny("OPTForSequenceClassification", tiny_config("opt")).save_pretrained(folders / "other")
    refused(folders, "has no module bert.encoder|does not fit OPT", base=folders / "other")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (None, "adapter does not name its base model: give it with --base"),
        ("", "adapter does not name its base model: give it with --base"),
        ("/moved/away", "adapter names it as its base model: if it is elsewhere now, give its place with --base"),
    ],
)
def test_a_base_that_the_adapter_does_not_lead_to(folders, named, said):
    file = folders / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": named}))
    refused(folders, re.escape(said), base=None)
    assert fold(folders / "adapter", folders / "folded", folders / "base").sites


def test_a_base_with_pickled_weights_only(folders):
    (folders / "base" / "model.safetensors").rename(folders / "base" / "pytorch_model.bin")
    refused(folders, "no model.safetensors there, and redpeft reads no pickles; load the model with transformers")
    (folders / "base" / "pytorch_model.bin").unlink()
    refused(folders, "no model.safetensors there, so it holds no model with weights$")


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": ["model.safetensors"]}'])
def test_a_base_with_a_broken_index(folders, index):
    (folders / "base" / "model.safetensors.index.json").write_text(index)
    refused(folders, r"model.safetensors.index.json: broken, it names no files .*copy it again")


def test_a_truncated_base(folders):
    path = folders / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folders, "missing, corrupt or truncated")


def test_no_such_base(folders):
    refused(folders, "no such model folder", base=folders / "nowhere")


def test_a_folder_that_is_there_is_left_alone(folders):
    (folders / "out").mkdir()
    (folders / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        fold(folders / "adapter", folders / "out", folders / "base")
    assert [path.name for path in (folders / "out").iterdir()] == ["mine.txt"]


def test_a_head_that_nobody_brings(folders):
    """An adapter without a head on a base without one: the checkpoint would have a random head."""
    tiny("BertModel", tiny_config("bert")).save_pretrained(folders / "base")
    path = folders / "adapter" / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if "classifier" not in key}, path)
    config = json.loads((folders / "adapter" / "adapter_config.json").read_text())
    config["base_fingerprint"] = None
    (folders / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    refused(folders, r"does not load from what the fold would write: classifier\.")


# --- quantised bases -------------------------------------------------------------------------------------------------


def test_biases_fold_into_a_torchao_checkpoint(tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    tiny("LlamaForCausalLM", tiny_config("llama", mlp_bias=True)).save_pretrained(tmp_path / "plain")
    settings = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings).eval()
    model.save_pretrained(tmp_path / "base")
    adapted = edited(model, CAUSAL, use_scale=False)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted, token_ids())
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    folded = AutoModelForCausalLM.from_pretrained(result.out).eval()
    assert relative(logits(folded, token_ids()), expected) <= EXACT

    edited(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), CAUSAL).save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match=r"no place for the edits of .*or use the adapter as it is"):
        fold(tmp_path / "whole", tmp_path / "other", tmp_path / "base")


@pytest.fixture
def four_bits(tmp_path):
    """A 4-bit Llama with biases, saved as it is, and what it says; skipped without bitsandbytes."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny("LlamaForCausalLM", tiny_config("llama", mlp_bias=True, intermediate_size=128)).save_pretrained(
        tmp_path / "plain"
    )
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings).eval()
    model.save_pretrained(tmp_path / "base")
    return model


def test_biases_fold_into_a_quantised_checkpoint_and_its_weights_stay(four_bits, tmp_path):
    adapted = edited(four_bits, CAUSAL, use_scale=False)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted, token_ids())
    result = fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    assert {site.placement for site in result.sites} == {"weight and bias"}
    base, out = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert base.keys() == out.keys()
    changed = {key for key in base if not torch.equal(base[key], out[key])}
    assert changed == {f"model.layers.{index}.mlp.down_proj.bias" for index in range(3)}
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    leave_unpacked(folded)  # or bitsandbytes computes the folded one by another kernel, in bf16
    assert relative(logits(folded, token_ids()), expected) <= EXACT


def test_scales_on_quantised_weights_are_refused_with_the_choices(four_bits, tmp_path):
    edited(four_bits, CAUSAL).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"no place for the edits of .*write a bundle .* or use the adapter as it is"):
        fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")
    with pytest.raises(UserError, match=r"nothing of .* ship the base model and the adapter"):
        fold(tmp_path / "adapter", tmp_path / "out", tmp_path / "base", bundle=True)
