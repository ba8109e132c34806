"""What redpeft knows of base models: their fingerprints, packed 4-bit weights, names when compiled."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from redpeft.errors import UserError
from redpeft.models import (
    PACKS,
    bf16_slowdown,
    ensure_pad_token,
    fingerprint,
    fingerprint_difference,
    input_limit,
    leave_unpacked,
    load_decoder,
    load_pretrained,
    load_tokenizer,
    pad_prompts,
    plain_name,
    positions,
    tokenizer_digest,
)


def model(seed=0, width=64):
    torch.manual_seed(seed)
    return nn.ModuleDict({"a": nn.Linear(width, width), "b": nn.Linear(width, 2 * width)})


def test_it_is_small_and_repeatable():
    first, second = fingerprint(model(), ["a", "b"]), fingerprint(model(), ["b", "a"])
    assert first == second
    assert len(str(first)) < 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_it_was_loaded_in_does_not_matter(dtype):
    base = model()
    cast = copy.deepcopy(base).to(dtype)
    assert fingerprint_difference(fingerprint(base, ["a", "b"]), fingerprint(cast, ["a", "b"])) is None


def test_a_fine_tuned_model_of_the_same_shape_differs():
    base, tuned = model(), model()
    with torch.no_grad():
        tuned["a"].weight.add_(1e-3 * torch.randn(64, 64))  # about 2 % of a weight
    line = fingerprint_difference(fingerprint(base, ["a", "b"]), fingerprint(tuned, ["a", "b"]))
    assert "weights differ" in line
    assert "of 32 sampled values" in line


def test_other_shapes_or_names_differ():
    line = fingerprint_difference(fingerprint(model(), ["a", "b"]), fingerprint(model(width=32), ["a", "b"]))
    assert "other names or shapes" in line
    assert "other names" in fingerprint_difference(fingerprint(model(), ["a", "b"]), fingerprint(model(), ["a"]))


def test_it_is_unknown_where_weights_cannot_be_read():
    assert fingerprint(model().to("meta"), ["a"]) is None
    quantised = model()
    quantised["a"].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    assert fingerprint(quantised, ["a", "b"]) is None
    assert fingerprint_difference(None, fingerprint(model(), ["a"])) is None


# bitsandbytes' packing of 4-bit weights, on any machine


class Packing(nn.Linear):
    """A linear layer with bitsandbytes' switch."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__(4, 4)
        setattr(self, PACKS, True)
        self.weight.quant_state = SimpleNamespace(packing_format_for_cpu=packed)


def test_weights_stay_unpacked():
    model = nn.Sequential(Packing(), nn.Linear(4, 4))
    leave_unpacked(model)
    assert not getattr(model[0], PACKS)
    assert not hasattr(model[1], PACKS)


def test_packed_weights_are_refused_and_nothing_is_changed():
    model = nn.Sequential(Packing(), Packing(packed=True))
    with pytest.raises(UserError, match=r"packed for inference \(at 1: .*load the base model again and add the ad"):
        leave_unpacked(model)
    assert all(getattr(linear, PACKS) for linear in model)


def test_plain_names_have_no_mark_of_compilation():
    assert plain_name("_orig_mod.model.layers.0._orig_mod.mlp") == "model.layers.0.mlp"
    assert plain_name("model.not_orig_mod") == "model.not_orig_mod"


def error_of(auto_class, base) -> str:
    with pytest.raises(UserError) as caught:
        load_pretrained(auto_class, base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_such_model_folder(tmp_path):
    for auto_class in (AutoTokenizer, AutoModelForCausalLM):
        assert error_of(auto_class, tmp_path / "none") == f"no such model folder: {tmp_path / 'none'}"
        assert error_of(auto_class, "./none") == "no such model folder: ./none"
    file = tmp_path / "model.bin"
    file.touch()
    assert "no such model folder" in error_of(AutoTokenizer, file)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "it holds no model, neither a config.json nor a GGUF file, and is empty: give another folder"),
        (
            dict.fromkeys(("a.txt", "b.txt", "c.txt", "d.txt", ".hidden"), ""),
            "it holds no model, neither a config.json nor a GGUF file, only a.txt, b.txt, c.txt and 1 more: give ",
        ),
        ({"adapter_config.json": "{}"}, "it holds an adapter and no model: give the adapter's base model, or fold "),
        ({"adapter/adapter_config.json": "{}", "recipe.yaml": ""}, "it holds an adapter and no model: "),
        (
            {"checkpoint-2/config.json": "{}"},
            "it holds no config.json, but {folder}/checkpoint-2 does: ",
        ),
        (
            {"snapshots/1f/config.json": "{}", "refs/main": "1f"},
            "it holds no config.json, but {folder}/snapshots/1f does: give that folder",
        ),
        (
            {"model.gguf": "GGUF", "adapter_model.safetensors": ""},
            "it holds weights without a config.json: for the GGUF file in it give {folder}/model.gguf",
        ),
        ({"config.json": '{"model_type": "ll'}, "its config.json is broken: copy it again"),
        ({"config.json": "[]"}, "its config.json is broken: copy it again"),
        ({"config.json": "{}"}, "its config.json names no architecture (model_type)"),
    ],
)
def test_a_folder_without_a_model_says_what_is_missing(files, says, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for auto_class in (AutoTokenizer, AutoModelForCausalLM, AutoConfig):
        start = f"cannot load {tmp_path} with {auto_class.__name__}: {says.format(folder=tmp_path)}"
        assert error_of(auto_class, tmp_path).startswith(start)


def test_a_folder_with_a_tokenizer_alone(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path)) == len(tiny_tokenizer)  # as an adapter's folder has one
    assert "it holds no model, neither a config.json nor a GGUF file, only " in error_of(
        AutoModelForCausalLM, tmp_path
    )


def test_a_folder_without_weights(tiny_encoder_folder, tmp_path):
    shutil.copytree(tiny_encoder_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    assert error_of(AutoModelForSequenceClassification, tmp_path).endswith(
        ": its weights are missing: model.safetensors, or several files and model.safetensors.index.json"
    )


def test_an_architecture_that_transformers_does_not_know(tiny_encoder_folder, tmp_path):
    shutil.copytree(tiny_encoder_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wondrous"}))
    says = f"transformers {transformers.__version__} does not know the architecture wondrous: a newer one may"
    assert error_of(AutoModelForSequenceClassification, tmp_path).endswith(f": {says}")


def test_a_hub_name_that_does_not_load():
    class Offline:
        @staticmethod
        def from_pretrained(name):
            raise OSError(f"We couldn't connect for {name}\nlong story")

    assert error_of(Offline, "owner/model") == (
        "cannot load owner/model, a name on the Hugging Face hub since there is no such folder, with Offline: "
        "We couldn't connect for owner/model"
    )


def test_an_architecture_without_such_a_head(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    for auto_class, advice in (
        (AutoModelForSequenceClassification, "choose another task"),
        (AutoModelForCausalLM, "the task needs a decoder, such as Llama or GPT-2"),
    ):
        message = error_of(auto_class, tmp_path)
        assert message.endswith(
            f" with {auto_class.__name__}: transformers has no such class for this architecture; {advice}"
        )


def test_truncated_weights(tiny_encoder_folder, tmp_path):
    shutil.copytree(tiny_encoder_folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"cannot load {tmp_path} with " in error_of(AutoModelForSequenceClassification, tmp_path)


def test_a_model_is_loaded(tiny_encoder_folder):
    assert load_pretrained(AutoModelForSequenceClassification, str(tiny_encoder_folder), num_labels=3).num_labels == 3


def test_an_encoder_cannot_write(tiny_encoder_folder, tiny_tokenizer):
    with pytest.raises(
        UserError, match="is an encoder .BertLMHeadModel., which cannot generate text: the task needs a"
    ):
        load_decoder(tiny_encoder_folder, tiny_tokenizer)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_a_tokenizer_without_a_vocabulary(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=f"^the tokenizer of {tmp_path} has no vocabulary: its files"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("broken", ["{}", "{", '{"model": {"type": "X"}}', ""])
def test_a_tokenizer_with_a_broken_file(tiny_encoder_folder, tmp_path, broken):
    shutil.copytree(tiny_encoder_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text(broken)
    assert f"cannot load {tmp_path} with AutoTokenizer: " in error_of(AutoTokenizer, tmp_path)


def test_any_token_pads_where_none_is_meant_to():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<s>": 2, "<u>": 3}, unk_token="<u>"))
    for special, pad in (
        ({"bos_token": "<s>", "unk_token": "<u>"}, "<s>"),
        ({"unk_token": "<u>"}, "<u>"),
        ({}, "a"),
    ):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        ensure_pad_token(tokenizer)
        assert tokenizer.pad_token == pad
        batch = pad_prompts(tokenizer, [[1, 1], [1]], "left")
        assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]


# --- how long a row may be ------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
ENCODER = {**SIZES, "max_position_embeddings": 40}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2}
BOTH = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
BOTH |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
DEBERTA = {**ENCODER, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p"]}
LIMITS = [  # class of model, its configuration, how many tokens it reads, and how many more it is known to read
    ("BertForSequenceClassification", ENCODER, 40, 0),
    ("RobertaForSequenceClassification", {**ENCODER, "max_position_embeddings": 42}, 40, 0),  # counts from 2
    ("MPNetForTokenClassification", {**ENCODER, "max_position_embeddings": 42}, 40, 0),
    ("NystromformerModel", {**ENCODER, "segment_means_seq_len": 40, "num_landmarks": 8}, 40, 0),
    ("DebertaV2Model", DEBERTA, None, 60),
    ("GPT2LMHeadModel", {**GPT, "n_positions": 40}, 40, 0),
    ("GPTJForCausalLM", {**GPT, "n_positions": 40, "rotary_dim": 4}, 40, 0),
    ("OPTForCausalLM", {**ENCODER, "ffn_dim": 32, "word_embed_proj_dim": 16}, 40, 0),
    ("MptForCausalLM", {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 40}, 40, 0),
    ("BloomForCausalLM", {"hidden_size": 16, "n_layer": 1, "n_head": 2}, None, 60),
    ("LlamaForCausalLM", ENCODER, 40, 60),  # computes positions, and knows those that it was trained with
    ("T5ForConditionalGeneration", {**T5, "n_positions": 40}, None, 60),
    ("BartForConditionalGeneration", {**BOTH, "max_position_embeddings": 40}, 40, 0),
    ("BartForSequenceClassification", {**BOTH, "max_position_embeddings": 40}, 40, 0),
    ("PegasusForConditionalGeneration", {**BOTH, "max_position_embeddings": 40}, 40, 0),
]


def tiny(name, values):
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(vocab_size=50, pad_token_id=1, eos_token_id=2, **values)).eval()


def reads(model, length) -> bool:
    ids = torch.full((1, length), 5)
    ids[0, -1] = 2
    decoder = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder and model.can_generate() else {}
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize(("name", "values", "limit", "more"), LIMITS)
def test_how_long_a_row_may_be(name, values, limit, more):
    model = tiny(name, values)
    found = positions(model)
    assert found == (None if limit is None else (limit, f"the {limit} positions of {name}"))
    assert reads(model, limit or 40)
    assert reads(model, (limit or 40) + (more or 1)) is bool(more)


def test_an_encoder_and_a_decoder_of_other_lengths():
    lengths = {"max_encoder_position_embeddings": 48, "max_decoder_position_embeddings": 24, "attention_window": 8}
    model = tiny("LEDForConditionalGeneration", {**BOTH, **lengths})
    assert positions(model).tokens == 48
    assert positions(model, decoder=True).tokens == 24


def test_the_least_limit_counts(tiny_tokenizer):
    model = tiny("BertModel", ENCODER)
    assert input_limit(model, tiny_tokenizer, 30) == (30, "max_length 30")
    assert input_limit(model, tiny_tokenizer, 40) == (40, "max_length 40")
    assert input_limit(model, tiny_tokenizer) == (40, "the 40 positions of BertModel")
    long = tiny("BertModel", {**SIZES, "max_position_embeddings": 100})
    assert input_limit(long, tiny_tokenizer, 200) == (64, "the tokenizer's model_max_length 64")


@pytest.mark.parametrize(
    ("name", "values", "task_type", "reads", "writes"),
    [
        ("RobertaForSequenceClassification", {**ENCODER, "max_position_embeddings": 42}, "SEQ_CLS", 30, None),
        ("GPT2LMHeadModel", {**GPT, "n_positions": 40}, "CAUSAL_LM", 30, None),
        ("BartForConditionalGeneration", {**BOTH, "max_position_embeddings": 40}, "SEQ_2_SEQ_LM", 30, 40),
    ],
)
def test_virtual_tokens_take_positions(name, values, task_type, reads, writes):
    options = {"task_type": task_type, "num_virtual_tokens": 10}
    prompt = get_peft_model(tiny(name, values), PromptTuningConfig(num_transformer_submodules=1, **options))
    assert positions(prompt) == (reads, f"the 40 positions of {name} behind 10 virtual tokens")
    prefix = get_peft_model(tiny(name, values), PrefixTuningConfig(**options))
    if writes is None:
        assert positions(prefix).tokens == reads
    else:  # the keys and values stand in the decoder
        assert positions(prompt, decoder=True).tokens == writes
        assert (positions(prefix).tokens, positions(prefix, decoder=True).tokens) == (writes, reads)
    full = get_peft_model(tiny(name, values), PromptTuningConfig(**{**options, "num_virtual_tokens": 40}))
    with pytest.raises(UserError, match="^40 virtual tokens do not fit into the 40 positions of"):
        positions(full)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no instructions for bf16")
def test_bf16_is_slow_without_instructions_for_it():
    with_them = bf16_slowdown()
    with torch.backends.mkldnn.flags(enabled=False):  # every CPU is then as if it had none
        assert bf16_slowdown() > 2 * with_them


def test_a_tokenizers_digest_tells_other_tokens_and_not_its_use(tiny_encoder_folder):
    def digest(change=lambda tokenizer: None):
        tokenizer = AutoTokenizer.from_pretrained(tiny_encoder_folder)
        change(tokenizer)
        return tokenizer_digest(tokenizer)

    def use(tokenizer):
        tokenizer(["a", "a long text"], truncation=True, max_length=5, padding="max_length")

    own = digest()
    assert digest(use) == own
    for change in (
        lambda tokenizer: tokenizer.add_tokens(["<mine>"]),
        lambda tokenizer: setattr(tokenizer, "pad_token", "a"),
        lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
        lambda tokenizer: setattr(tokenizer, "model_max_length", 17),
        lambda tokenizer: setattr(tokenizer, "padding_side", "left" if tokenizer.padding_side == "right" else "right"),
    ):
        assert digest(change) != own
