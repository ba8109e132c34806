"""Which text models of vLLM the plug-in serves: each of the pinned version's registry that transformers has too.

`models.py` builds vLLM's own models without memory and hands them to the plug-in. A module that moved, a class that
was renamed or an architecture that came shows as a difference from the tables below.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from redpeft.errors import UserError

pytestmark = pytest.mark.serving

# Architectures (`ForCausalLM` is left out) by the engine's module of a block's site.
SERVED = {
    "model.layers.N.mlp.down_proj": """Apertus Arcee Cohere Cohere2 Cwm Ernie4_5 Exaone4 Gemma Gemma2 Gemma3 Gemma3n
        Gemma4 Glm Glm4 Granite GraniteSWA HunYuanDenseV1 HyperCLOVAX Jais2 Llama MiniCPM3 Ministral3 Mistral Nemotron
        Olmo Olmo2 Olmo3 Phi3 Qwen2 Qwen3 SeedOss SmolLM3 StableLm VaultGemma""",
    "model.layers.N.mlp.c_proj": "Starcoder2",
    "model.layers.N.mlp.dense_4h_to_h": "GPTNeoX",
    "model.layers.N.mlp.fc2": "Phi",
    "model.layers.N.feed_forward.down_proj": "FalconH1",
    "model.layers.N.feed_forward.w2": "Lfm2",
    "model.H_module.layers.N.mlp.down_proj": "HrmText",
    "model.decoder.layers.N.fc2": "OPT",
    "model.h.N.mlp.c_proj": "GPTBigCode",
    "transformer.h.N.mlp.c_proj": "GPT2LMHeadModel",
    "transformer.h.N.mlp.dense_4h_to_h": "Bloom Falcon",
    "transformer.h.N.mlp.fc_out": "GPTJ",
    # mixtures of experts
    "model.layers.N.mlp": """AXK1 Cohere2Moe DeepseekV2 DeepseekV3 Ernie4_5_Moe ExaoneMoe FlexOlmo Glm4Moe Glm4MoeLite
        GptOss HunYuanMoEV1 Laguna Mellum Olmoe Qwen2Moe Qwen3Moe Qwen3Next""",
    "model.layers.N.block_sparse_moe": """GraniteMoe GraniteMoeHybrid GraniteMoeShared GraniteMoeSWA MiniMaxM2
        Mixtral""",
    "model.layers.N.feed_forward": "Jamba Lfm2Moe",
    "transformer.blocks.N.ffn": "Dbrx",
}

# vLLM has no LoRA for these, so that they serve RED adapters alone.
WITHOUT_LORA = "Bloom Cohere2Moe Dbrx Falcon GPT2LMHeadModel GPTJ Gemma3n HrmText StableLm"

REFUSED = {
    "its own kernels": """DeepseekV32 DeepseekV4 GlmMoeDsa HYV4 InklingForConditionalGeneration Inkling KimiLinear
        Qwen4Exp""",
    "cannot tell the FFN's output": "FalconMamba LongcatFlash Mamba",
}

# What cannot be built here, so that nothing is known of it: it is served if each of its sites has a module, and
# refused when the server starts if not.
NOT_BUILT = {
    "kernels for a GPU": "NemotronH OlmoHybrid Qwen3_5 Qwen3_5Moe",
    "transformers' default configuration is not one that vLLM takes": "Afmoe HYV3 Llama4 MiMoV2Flash Mamba2 Zamba2",
    "needs the files of a processor": """Emu3ForConditionalGeneration HunYuanVLForConditionalGeneration
        VibeVoiceAsrForConditionalGeneration""",
}


def architectures(names: str) -> set[str]:
    whole = r"(ForCausalLM|ForConditionalGeneration|LMHeadModel)$"
    return {name if re.search(whole, name) else f"{name}ForCausalLM" for name in names.split()}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, tuple[str, str, bool]]:
    file = tmp_path_factory.mktemp("models") / "rows.json"
    script = Path(__file__).with_name("vllm_architectures.py")
    run = subprocess.run([sys.executable, str(script), str(file)], capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(file.read_text())


def test_every_site_of_these_has_a_module(rows):
    found: dict[str, set[str]] = {}
    for name, (outcome, module, _) in rows.items():
        if outcome == "served":
            found.setdefault(re.sub(r"\.\d+\.", ".N.", module), set()).add(name)
    assert found == {module: architectures(names) for module, names in SERVED.items()}


def test_these_serve_red_alone(rows):
    assert {name for name, row in rows.items() if row[0] == "served" and not row[2]} == architectures(WITHOUT_LORA)


def test_these_are_refused_and_why(rows):
    found = {name: why for name, (outcome, why, _) in rows.items() if outcome == "refused"}
    expected = {name: why for why, names in REFUSED.items() for name in architectures(names)}
    assert found.keys() == expected.keys()
    assert all(why in found[name] for name, why in expected.items())


def test_of_these_nothing_is_known(rows):
    found = {name for name, (outcome, _, _) in rows.items() if outcome == "not built"}
    assert found == {name for names in NOT_BUILT.values() for name in architectures(names)}


def test_a_model_that_transformers_lacks_is_refused(rows):
    from transformers import PretrainedConfig

    from redpeft.serving.served_base import widths_of_sites

    config = PretrainedConfig(architectures=["BailingMoeForCausalLM"])
    assert rows["BailingMoeForCausalLM"][0] == "not in transformers"
    with pytest.raises(UserError, match="transformers cannot build"):
        widths_of_sites(config, ["ffn"])


# --- what is refused of a model that is served otherwise -------------------------------------------------------------


def told(fast_prefill: bool = False, ubatching: bool = False, dtype: str = "float32") -> SimpleNamespace:
    import torch

    return SimpleNamespace(
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=fast_prefill),
        parallel_config=SimpleNamespace(use_ubatching=ubatching),
        model_config=SimpleNamespace(dtype=getattr(torch, dtype)),
    )


def test_models_whose_modules_are_bypassed_or_see_only_part_of_the_tokens_are_refused():
    from torch import nn

    from redpeft.serving.vllm_internals.checks import FUSED, check_model

    own = type("OwnBlock", (nn.Module,), {"__module__": f"{FUSED}inkling.nvidia.model"})
    check_model(nn.Sequential(nn.Linear(2, 2)), told())
    with pytest.raises(UserError, match=r"vLLM runs Sequential with its own kernels.*fold the adapter"):
        check_model(nn.Sequential(own()), told())
    with pytest.raises(UserError, match="with --kv-sharing-fast-prefill some layers see only part"):
        check_model(nn.Linear(2, 2), told(fast_prefill=True))
    with pytest.raises(UserError, match="with --enable-dbo layers see only part"):
        check_model(nn.Linear(2, 2), told(ubatching=True))


@pytest.mark.parametrize(
    ("ranks", "parallel", "later", "factor", "dtype", "why"),
    [
        (2, False, False, 2.5, "bfloat16", None),
        (1, False, True, 1.0, "float16", None),  # one rank has nothing to sum
        (2, True, False, 1.0, "float32", "splits the tokens of blocks.0.mlp over the ranks"),
        (2, False, True, 1.0, "float32", "sums the output of blocks.0.mlp over the ranks elsewhere"),
        (1, False, False, 2.5, "float16", "runs blocks.0.mlp at another scale in fp16"),
    ],
)
def test_mixtures_whose_output_is_not_the_sites_are_refused(ranks, parallel, later, factor, dtype, why):
    from torch import nn
    from vllm.model_executor.layers.fused_moe import MoERunner

    from redpeft.serving.vllm_internals.checks import check_site

    experts = MoERunner.__new__(MoERunner)
    nn.Module.__init__(experts)
    config = SimpleNamespace(is_sequence_parallel=parallel, tp_size=ranks)
    experts.moe_config = SimpleNamespace(moe_parallel_config=config, skip_final_all_reduce=later)
    experts.routed_scaling_factor = factor
    block = nn.ModuleDict({"experts": experts})
    if why is None:
        check_site("blocks.0.mlp", block, told(dtype=dtype))
    else:
        with pytest.raises(UserError, match=why):
            check_site("blocks.0.mlp", block, told(dtype=dtype))
