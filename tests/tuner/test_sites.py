import functools
import importlib.metadata
import itertools
import re

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from sites_expected import ATTENTION, CHANGES, EXPERTS, FFN, MIXED, NO_FFN, NOT_BUILT, QKV, READ_FROM, TWINS
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
    T5Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from redpeft import RedConfig, Site, find_sites
from redpeft.errors import UserError

DEPTHS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"}
DEPTHS |= {"num_encoder_layers", "num_decoder_layers"}
LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
FAMILIES = [name for name, config in CONFIG_MAPPING.items() if config in MODEL_MAPPING]
NO_FFN_FAMILIES = " ".join(NO_FFN.values()).split()

AS_READ = Version(importlib.metadata.version("transformers")) >= Version(READ_FROM)

as_read = pytest.mark.skipif(
    not AS_READ,
    reason=f"the names were read from the source of transformers {READ_FROM}",
)


def shorten(config):
    """What to change in a configuration, given as a dict, to have four blocks: its widths stay as they are."""
    changes = {}
    for key, value in config.items():
        if isinstance(value, dict):
            changes |= {key: value | short} if (short := shorten(value)) else {}
        elif (key in DEPTHS and isinstance(value, int) and value > 4) or (key in LISTS and value):
            changes[key] = 4 if isinstance(value, int) else value[:4]
    return changes


@functools.cache
def build(family):
    config_class, changes = CONFIG_MAPPING[family], CHANGES.get(family, {})
    try:
        config = config_class(**shorten(config_class().to_dict()) | changes)
    except Exception:  # a few configurations contradict themselves when they are shortened
        config = config_class(**changes)
    return on_meta(config)


def on_meta(config, auto_class=AutoModel):
    with torch.device("meta"):
        return auto_class.from_config(config)


def names(model, sites="ffn", **options):
    return [site.name for site in find_sites(model, sites, **options)]


def expand(patterns):
    found = []
    for pattern in patterns:
        counts = [range(int(count)) for count in re.findall(r"{(\d+)}", pattern)]
        found += [re.sub(r"{\d+}", "{}", pattern).format(*indices) for indices in itertools.product(*counts)]
    return sorted(found)


# --- every family ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_of_every_family_has_one_site(family):
    try:
        model = build(family)
    except Exception as error:
        reason = next((reason for reason, families in NOT_BUILT.items() if family in families.split()), None)
        if AS_READ and reason is None:
            raise
        pytest.skip(f"{family}: {reason or error}")
    if family in NO_FFN_FAMILIES:
        with pytest.raises(UserError, match="cannot tell the FFN's output"):
            find_sites(model)
        return
    sites = find_sites(model)
    modules = dict(model.named_modules())
    for site in sites:
        assert site.kind == "ffn"
        assert_one_in_each_member(site, sites, modules, whole=family not in MIXED.split())
        module = modules[site.name]
        assert getattr(module, "out_features", getattr(module, "nf", site.width)) == site.width
        assert not re.search(r"(^|\.)(\w*classifier|score|pooler|lm_head|qa_outputs)\b", site.name)
    if AS_READ and family not in f"{MIXED} {TWINS}".split():
        assert_none_left_out(sites, modules)


def assert_one_in_each_member(site, sites, modules, whole):
    """That among the lists above the site there is one of blocks: each member holds one site, which has its index."""
    path = site.name.split(".")
    for depth, key in enumerate(path):
        above = ".".join(path[:depth])
        if not isinstance(modules[above], (nn.ModuleList, nn.Sequential)) or key != str(site.layer):
            continue
        within = [other for other in sites if other.name.startswith(f"{above}.")]
        indices = [other.name[len(above) + 1 :].split(".")[0] for other in within]
        if [str(other.layer) for other in within] != indices or len(set(indices)) < len(indices):
            continue
        if not whole or len(indices) == len(modules[above]):
            return
    raise AssertionError(f"no list of blocks has one site in each member, {site.name} in this one")


def assert_none_left_out(sites, modules):
    """That in the towers with sites every module of a class that holds a site directly has one above or below."""
    towers = {site.name.split(".")[0] for site in sites}
    classes = {type(modules[site.name.rpartition(".")[0]]) for site in sites} - {nn.ModuleList, nn.Sequential}
    alike = [name for name, module in modules.items() if type(module) in classes and name.split(".")[0] in towers]
    dotted = [f"{site.name}." for site in sites]
    assert [
        name for name in alike if not any(f"{name}.".startswith(s) or s.startswith(f"{name}.") for s in dotted)
    ] == []


@as_read
def test_most_families_are_built():
    assert len(FAMILIES) - len(" ".join(NOT_BUILT.values()).split()) >= 570


def cases(table):
    return [pytest.param(family, patterns, id=family) for family, patterns in table.items()]


@as_read
@pytest.mark.parametrize(("family", "patterns"), cases(FFN))
def test_ffn_sites_are_those_read_in_the_source(family, patterns):
    assert sorted(names(build(family))) == expand(patterns)


@as_read
@pytest.mark.parametrize(("family", "patterns"), cases(ATTENTION))
def test_attention_sites_are_those_read_in_the_source(family, patterns):
    assert sorted(names(build(family), "attention")) == expand(patterns)


@as_read
@pytest.mark.parametrize(("family", "patterns"), cases(QKV))
def test_query_key_value_sites_are_those_read_in_the_source(family, patterns):
    assert sorted(names(build(family), "qkv")) == expand(patterns)


# --- the paper's counts ----------------------------------------------------------------------------------------------

ROBERTA_BASE = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
ROBERTA_LARGE = RobertaConfig(
    vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)
GPT2_MEDIUM = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
GPT2_LARGE = GPT2Config(n_embd=1280, n_layer=36, n_head=20)
T5_BASE = T5Config(vocab_size=32128, d_model=768, d_ff=3072, num_layers=12, num_heads=12)
LLAMA_2_7B = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)


@pytest.mark.parametrize(
    ("config", "sites", "count"),
    [
        pytest.param(ROBERTA_BASE, "ffn", 18_432, id="RoBERTa-base"),
        pytest.param(ROBERTA_LARGE, "ffn", 49_152, id="RoBERTa-large"),
        pytest.param(GPT2_MEDIUM, "ffn", 49_152, id="GPT-2 medium"),
        pytest.param(GPT2_LARGE, "ffn", 92_160, id="GPT-2 large"),
        pytest.param(T5_BASE, "ffn", 36_864, id="T5-base"),
        pytest.param(ROBERTA_BASE, "red+", 92_160, id="RoBERTa-base RED+"),
        pytest.param(ROBERTA_LARGE, "red+", 245_760, id="RoBERTa-large RED+"),
        pytest.param(GPT2_MEDIUM, "red+", 245_760, id="GPT-2 medium RED+"),
        pytest.param(GPT2_LARGE, "red+", 460_800, id="GPT-2 large RED+"),
    ],
)
def test_parameter_counts_are_the_papers(config, sites, count):
    assert sum(2 * site.width for site in find_sites(on_meta(config), sites)) == count


def test_llama_2_7b_has_the_papers_counts_and_ratios():
    model = on_meta(LLAMA_2_7B, AutoModelForCausalLM)
    count = sum(2 * site.width for site in find_sites(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    lora = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    assert (count, total, lora.get_nb_trainable_parameters()[0]) == (262_144, 6_738_415_616, 8_388_608)
    assert (round(total / count), 8_388_608 / count) == (25_705, 32)


# --- what is asked for -----------------------------------------------------------------------------------------------

TINY_LLAMA = LlamaConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TINY_GPT2 = GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4)
TINY_BERT = BertConfig(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)


def test_sites_say_kind_width_and_block_and_come_in_the_models_order():
    assert find_sites(on_meta(TINY_GPT2), "red+") == [
        Site("h.0.attn.c_attn", "qkv", 96, 0),
        Site("h.0.attn.c_proj", "attention", 32, 0),
        Site("h.0.mlp.c_proj", "ffn", 32, 0),
        Site("h.1.attn.c_attn", "qkv", 96, 1),
        Site("h.1.attn.c_proj", "attention", 32, 1),
        Site("h.1.mlp.c_proj", "ffn", 32, 1),
    ]


def test_key_and_value_have_their_own_widths_under_grouped_query_attention():
    widths = {site.name.rpartition(".")[2]: site.width for site in find_sites(on_meta(TINY_LLAMA), "qkv", layers=0)}
    assert widths == {"q_proj": 32, "k_proj": 16, "v_proj": 16}


@pytest.mark.parametrize(
    ("sites", "kinds"),
    [
        (["ffn", "attention"], {"ffn", "attention"}),
        (("qkv", "ffn"), {"qkv", "ffn"}),
        (["ffn", "red+"], {"ffn", "attention", "qkv"}),
    ],
)
def test_a_list_of_sites_is_their_union(sites, kinds):
    found = find_sites(on_meta(TINY_LLAMA), sites)
    assert {site.kind for site in found} == kinds
    assert len(set(names(on_meta(TINY_LLAMA), sites))) == len(found)


@pytest.mark.parametrize(("layers", "blocks"), [(1, {1}), ([0], {0}), ([1, 0], {0, 1}), (range(1), {0})])
def test_layers_keeps_the_blocks_with_these_indices(layers, blocks):
    assert {site.layer for site in find_sites(on_meta(TINY_LLAMA), layers=layers)} == blocks


def test_layers_counts_within_each_stack():
    model = on_meta(T5Config(num_layers=2, num_decoder_layers=3))
    assert names(model, layers=0) == [
        "encoder.block.0.layer.1.DenseReluDense.wo",
        "decoder.block.0.layer.2.DenseReluDense.wo",
    ]
    assert names(model, layers=2) == ["decoder.block.2.layer.2.DenseReluDense.wo"]


@pytest.mark.parametrize("layers", [7, -1, [0, 2]])
def test_a_block_that_exists_nowhere_is_refused(layers):
    with pytest.raises(UserError, match=r"no block to edit has the index \[(7|-1|2)\]; those .* have \[0, 1\]"):
        find_sites(on_meta(TINY_LLAMA), layers=layers)


@pytest.mark.parametrize("sites", ["mlp", [], ["ffn", "value"], ""])
def test_an_unknown_kind_of_site_is_refused(sites):
    with pytest.raises(UserError, match=r"choose among ffn, attention, qkv and 'red\+'"):
        find_sites(on_meta(TINY_LLAMA), sites)


# --- models in their many shapes -------------------------------------------------------------------------------------


def test_heads_are_no_sites():
    causal = on_meta(TINY_LLAMA, AutoModelForCausalLM)
    classifier = on_meta(RobertaConfig(num_hidden_layers=2), AutoModelForSequenceClassification)
    assert names(causal) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert names(classifier) == ["roberta.encoder.layer.0.output.dense", "roberta.encoder.layer.1.output.dense"]


@pytest.mark.parametrize(
    ("family", "changes", "site"),
    [
        ("gpt2", {"n_inner": 768}, "h.0.mlp.c_proj"),
        ("llama", {"intermediate_size": 4096}, "layers.0.mlp.down_proj"),
        ("phi3", {"intermediate_size": 1536}, "layers.0.mlp.down_proj"),  # fused: 3072 -> 2 * 1536
        ("bert", {"intermediate_size": 256}, "encoder.layer.0.output.dense"),
    ],
)
def test_the_way_back_is_found_where_up_and_down_look_alike_or_narrow(family, changes, site):
    assert names(on_meta(CONFIG_MAPPING[family](num_hidden_layers=1, **changes))) == [site]


def test_cross_attention_is_no_site():
    model = on_meta(GPT2Config(n_layer=1, add_cross_attention=True))
    assert names(model, ["attention", "qkv"]) == ["h.0.attn.c_attn", "h.0.attn.c_proj"]


def test_shared_layers_are_one_site_per_group():
    model = on_meta(CONFIG_MAPPING["albert"](num_hidden_layers=12, num_hidden_groups=2, inner_group_num=2))
    assert [(site.name[len("encoder.albert_layer_groups.") :], site.layer) for site in find_sites(model)] == [
        ("0.albert_layers.0.ffn_output", 0),
        ("0.albert_layers.1.ffn_output", 1),
        ("1.albert_layers.0.ffn_output", 0),
        ("1.albert_layers.1.ffn_output", 1),
    ]


def test_a_module_that_two_blocks_share_is_one_site():
    model = on_meta(TINY_LLAMA)
    model.layers[1].mlp = model.layers[0].mlp
    assert names(model) == ["layers.0.mlp.down_proj"]


def test_both_sides_of_an_encoder_decoder_and_the_text_side_of_a_captioner_are_edited():
    with torch.device("meta"):
        both = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(TINY_BERT, TINY_BERT))
        captioner = VisionEncoderDecoderModel(
            VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(num_hidden_layers=2), TINY_GPT2)
        )
    assert [name.split(".")[0] for name in names(both)] == ["encoder"] * 2 + ["decoder"] * 2
    assert names(captioner) == ["decoder.transformer.h.0.mlp.c_proj", "decoder.transformer.h.1.mlp.c_proj"]


@as_read
def test_all_experts_of_every_family_are_edited_together():
    found = {}
    for family in FAMILIES:
        if family in " ".join([*NOT_BUILT.values(), *NO_FFN.values()]).split():
            continue
        modules = dict(build(family).named_modules())
        for site in find_sites(build(family)):
            kept = [name for name in modules if name == site.name or name.startswith(f"{site.name}.")]
            if any(re.search("expert|moe$", f"{name} {type(modules[name]).__name__}", re.I) for name in kept):
                names = [name.rpartition(".")[2] for name in (site.name, site.added) if name]
                found.setdefault(" + ".join(names), set()).add(family)
    assert found == {module: set(families.split()) & set(FAMILIES) for module, families in EXPERTS.items()}


@as_read
def test_the_norm_behind_their_sum_is_the_site_where_experts_and_a_dense_ffn_are_added():
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
    config = CONFIG_MAPPING["gemma4_text"](num_hidden_layers=2, **experts)
    assert names(on_meta(config)) == [f"layers.{block}.post_feedforward_layernorm" for block in (0, 1)]


@as_read
def test_a_shared_expert_alone_is_the_ffn():
    config = CONFIG_MAPPING["granitemoehybrid"](num_hidden_layers=1, num_local_experts=0)
    assert find_sites(on_meta(config)) == [Site("layers.0.shared_mlp.output_linear", "ffn", 4096, 0)]


class Quantised(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("packed", torch.zeros(in_features * out_features // 2, dtype=torch.uint8))


def test_a_quantised_linear_of_any_maker_is_a_site():
    model = on_meta(TINY_BERT)
    for name, module in list(model.encoder.named_modules()):
        if isinstance(module, nn.Linear):
            model.encoder.set_submodule(name, Quantised(module.in_features, module.out_features))
    assert find_sites(model, "red+") == find_sites(on_meta(TINY_BERT), "red+")


def test_torchs_own_encoder_has_ffn_sites_but_never_calls_its_projections():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2)
    assert names(model) == ["layers.0.linear2", "layers.1.linear2"]
    with pytest.raises(UserError, match="cannot tell attention's output projection in TransformerEncoder"):
        find_sites(model, "attention")


class MLP(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)


class Block(nn.Module):
    def __init__(self, inner=64, back=32):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attn = nn.ModuleDict({name: nn.Linear(32, 32) for name in "qkvo"})
        self.mlp = MLP(32, inner)
        self.mlp.down = nn.Linear(inner, back)


def test_the_small_mlps_of_a_prediction_head_are_no_sites():
    model = nn.Module()
    model.blocks = nn.ModuleList([Block(), Block()])
    model.box_heads = nn.ModuleList([MLP(32, 32), MLP(32, 32)])
    assert names(model) == ["blocks.0.mlp.down", "blocks.1.mlp.down"]


# --- doubts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "sites", "message"),
    [
        (
            "mamba",
            "ffn",
            "cannot tell the FFN's output in MambaModel. Blocks seen: MambaBlock (mixer.in_proj 768->3072, "
            "mixer.x_proj 1536->80, mixer.dt_proj 48->1536, mixer.out_proj 1536->768). "
            "Name the modules to edit by target_modules instead",
        ),
        ("rwkv", "ffn", "feed_forward.receptance 4096->4096, feed_forward.value 16384->4096)"),
        (
            "lxmert",
            "ffn",
            "cannot tell the FFN's output: encoder.x_layers.0.lang_output.dense, encoder.x_layers.0.visn_output.dense "
            "could each be it. Blocks seen: LxmertXLayer (visual_attention.att.query 768->768",
        ),
        (
            "longcat_flash",
            "ffn",
            "cannot tell the FFN's output: layers.0.mlp, layers.0.mlps.0, layers.0.mlps.1 could each be it. Blocks",
        ),
        ("squeezebert", "ffn", "Blocks seen: SqueezeBertModule (no linears)"),
        ("resnet", "ffn", "Blocks seen: ResNetConvLayer (no linears)"),
        ("fnet", "attention", "cannot tell attention's output projection in FNetModel"),
        ("xlnet", "attention", "cannot tell attention's output projection in XLNetModel"),  # bare parameters
        ("wavlm", "attention", "cannot tell attention's output projection in WavLMModel"),  # torch's own function
        ("deepseek_v3", "qkv", "cannot tell query, key and value. Blocks seen: DeepseekV3DecoderLayer (self_attn.q_a"),
        ("longformer", "qkv", "attention.self.query_global 768->768"),
        ("rwkv", "qkv", "attention.receptance 4096->4096"),
        ("mamba", "red+", "cannot tell the FFN's output"),
    ],
)
def test_a_doubt_lists_what_was_seen(family, sites, message):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"no {family} in this transformers")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        find_sites(build(family), sites)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("Name the modules to edit by target_modules instead")


def test_a_block_without_a_site_beside_others_that_have_one_is_a_doubt():
    model = nn.Module()
    model.blocks = nn.ModuleList([Block(), Block(back=48), Block()])
    message = (
        "cannot tell the FFN's output in blocks.1, though in blocks that look the same. Blocks seen: Block (attn.q"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        find_sites(model)


def test_a_model_without_blocks_is_a_doubt():
    with pytest.raises(UserError, match="in Linear. Blocks seen: none"):
        find_sites(nn.Linear(4, 4))


# --- models that carry PEFT's layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "peft_config",
    [
        LoraConfig(target_modules="all-linear"),
        LoraConfig(target_modules=["down_proj"], modules_to_save=["lm_head"]),
        RedConfig(),
        RedConfig(sites="red+"),
    ],
    ids=["lora", "lora with a saved head", "red", "red+"],
)
@pytest.mark.parametrize("sites", ["ffn", "red+"])
def test_peft_layers_count_as_what_they_wrap(peft_config, sites):
    plain = find_sites(on_meta(TINY_LLAMA, AutoModelForCausalLM), sites)
    model = get_peft_model(AutoModelForCausalLM.from_config(TINY_LLAMA), peft_config)
    assert find_sites(model, sites) == plain
    assert find_sites(model.base_model.model, sites) == plain


def test_a_wrapped_block_of_experts_counts_as_itself():
    config = CONFIG_MAPPING["qwen2_moe"](num_hidden_layers=1, **MOE)
    plain = find_sites(on_meta(config))
    model = get_peft_model(AutoModel.from_config(config), RedConfig())
    assert [site.name for site in plain] == ["layers.0.mlp"]
    assert find_sites(model.base_model.model) == plain


@pytest.mark.skipif("target_parameters" not in LoraConfig.__dataclass_fields__, reason="older PEFT")
def test_experts_wrapped_within_a_block_of_experts_leave_the_block_the_site():
    config = CONFIG_MAPPING["qwen2_moe"](num_hidden_layers=1, **MOE)
    model = AutoModel.from_config(config)
    if not hasattr(model.layers[0].mlp.experts, "gate_up_proj"):
        pytest.skip("the experts are a list of modules in this transformers")
    lora = LoraConfig(target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    model = get_peft_model(model, lora)
    assert find_sites(model.base_model.model) == find_sites(on_meta(config))


def test_a_classifier_that_is_trained_in_full_is_no_site():
    model = AutoModelForSequenceClassification.from_config(TINY_BERT)
    plain = find_sites(model, "red+")
    lora = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    assert find_sites(lora, "red+") == plain


# --- what an edit there does -----------------------------------------------------------------------------------------

WIDTHS = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
MOE = WIDTHS | {
    "num_key_value_heads": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
T5_SMALL = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
WHISPER = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_source_positions": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
TOKENS = torch.arange(5, 15).reshape(2, 5)
PRE_NORM = {  # family: its configuration, its inputs, where a block and its attention's output are
    "gpt2": (TINY_GPT2.to_diff_dict(), {"input_ids": TOKENS}, "h.1", "h.1.attn.c_proj"),
    "llama": (TINY_LLAMA.to_diff_dict(), {"input_ids": TOKENS}, "layers.1", "layers.1.self_attn.o_proj"),
    "qwen2_moe": (MOE | {"num_hidden_layers": 2}, {"input_ids": TOKENS}, "layers.1", "layers.1.self_attn.o_proj"),
    "t5": (
        T5_SMALL | {"num_layers": 2},
        {"input_ids": TOKENS, "decoder_input_ids": TOKENS},
        "decoder.block.1",
        "decoder.block.1.layer.0.SelfAttention.o",
    ),
    "vit": (
        WIDTHS | {"num_hidden_layers": 2, "image_size": 8, "patch_size": 4},
        {"pixel_values": torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)},
        "layers.1",
        "layers.1.attention.o_proj",
    ),
    "whisper": (
        WHISPER,
        {"input_features": torch.linspace(-1, 1, 1280).reshape(1, 80, 16), "decoder_input_ids": TOKENS[:1]},
        "encoder.layers.1",
        "encoder.layers.1.self_attn.out_proj",
    ),
}


def outputs(model, inputs, watched, pushed=None, push=None):
    """The outputs of the watched modules in a forward pass, with `push` added to the output of the module `pushed`."""
    seen, handles = {}, []

    def first(output):
        return output[0] if isinstance(output, tuple) else output

    def add(module, arguments, output):
        return (output[0] + push, *output[1:]) if isinstance(output, tuple) else output + push

    modules = dict(model.named_modules())
    if pushed is not None:
        handles.append(modules[pushed].register_forward_hook(add))
    for name in watched:
        handles.append(
            modules[name].register_forward_hook(lambda _, __, output, name=name: seen.update({name: first(output)}))
        )
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


@as_read
@pytest.mark.parametrize("family", PRE_NORM)
def test_what_is_added_at_an_ffn_site_is_added_to_the_blocks_output(family):
    torch.manual_seed(0)
    options, inputs, block, attention = PRE_NORM[family]
    options = {key: value for key, value in options.items() if key != "model_type"}
    model = AutoModel.from_config(CONFIG_MAPPING[family](**options)).eval()
    site = next(site for site in find_sites(model) if site.name.startswith(f"{block}."))
    push = torch.randn(site.width)
    before = outputs(model, inputs, [block, attention])
    after = outputs(model, inputs, [block, attention], site.name, push)
    torch.testing.assert_close(after[attention], before[attention])
    torch.testing.assert_close(after[block] - before[block], push.expand_as(before[block]), atol=1e-5, rtol=1e-4)


@as_read
def test_the_sites_of_a_post_norm_block_act_where_their_kinds_say():
    torch.manual_seed(0)
    model = AutoModel.from_config(TINY_BERT).eval()
    sites = {kind: names(model, kind, layers=0)[-1] for kind in ("qkv", "attention", "ffn")}
    watched = ["encoder.layer.0.attention.self", "encoder.layer.0.attention", "encoder.layer.0"]
    before = outputs(model, {"input_ids": TOKENS}, watched)
    moved = {}
    for kind, site in sites.items():
        after = outputs(model, {"input_ids": TOKENS}, watched, site, torch.randn(32))
        moved[kind] = [not torch.allclose(after[name], before[name]) for name in watched]
    assert moved == {"qkv": [True, True, True], "attention": [False, True, True], "ffn": [False, False, True]}
