"""Which text models of vLLM's registry the plug-in serves, of those that transformers has too: for `test_models`.

vLLM's own model is built from transformers' default configuration, with four layers and without memory for its
weights, and given to the plug-in's manager. The script writes a JSON object into the given file: by architecture the
outcome, what was found or the reason, and whether vLLM has LoRA for it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"VLLM_LOGGING_LEVEL": "CRITICAL", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

import torch
import transformers
from torch.overrides import TorchFunctionMode
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry, supports_lora
from vllm.utils.torch_utils import set_default_torch_dtype

from redpeft.errors import UserError
from redpeft.serving import plugin
from redpeft.serving.vllm_internals.checks import FUSED

DEPTHS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}
LISTS = {"layer_types", "mlp_layer_types", "layers_block_type"}

# What checkpoints say and a default configuration does not, or says in a way that makes no model.
MORE = {
    "AfmoeForCausalLM": {"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0},
    "DbrxForCausalLM": {"attn_config": {"kv_n_heads": 8, "rope_theta": 1e4}},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0},
    "Glm4MoeForCausalLM": {"head_dim": 128},
    "Glm4MoeLiteForCausalLM": {"first_k_dense_replace": 1},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 128},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 128},
    "HYV3ForCausalLM": {"first_k_dense_replace": 1, "expert_hidden_dim": 1536},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2ForCausalLM": {"block_dim": 2560},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "LongcatFlashForCausalLM": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"},
    "MiniMaxM2ForCausalLM": {"rotary_dim": 64, "scoring_func": "sigmoid"},
    "NemotronForCausalLM": {"head_dim": 128, "num_key_value_heads": 8},
}


class WithoutMemory(TorchFunctionMode):
    """Weights are on the meta device; what is computed from numbers is not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        on_meta = {"device": "meta"} if function in (torch.empty, torch.rand, torch.randn) else {}
        return function(*args, **(kwargs or {}) | on_meta)


def configuration(architecture: str) -> transformers.PretrainedConfig:
    kind = getattr(transformers, architecture).config_class
    more, values = MORE.get(architecture, {}), kind().to_dict()
    short = {key: 4 for key in DEPTHS & values.keys() if isinstance(values[key], int) and values[key] > 4}
    short |= {key: values[key][:4] for key in LISTS & values.keys() if values[key]}
    try:
        config = kind(**short | more)
    except Exception:  # a few configurations contradict themselves when they are shortened
        config = kind(**more)
    for key, value in more.items():
        if not isinstance(value, dict):
            setattr(config, key, value)
    config.architectures = [architecture]
    return config


def settings(architecture: str) -> VllmConfig:
    with tempfile.TemporaryDirectory() as folder:
        configuration(architecture).save_pretrained(folder)
        arguments = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=64,
            enforce_eager=True,
            enable_lora=True,
            additional_config={"redpeft": {"only": True}},
        )
        return arguments.create_engine_config()


def outcome(architecture: str) -> tuple[str, str, bool]:
    """ "served" and the engine's module of the last site, "refused" and why, or "not built" and the engine's error."""
    from redpeft.serving.vllm_internals.engine import RedModelManager

    if registry._VLLM_MODELS[architecture][0].startswith(FUSED):
        return "refused", "its own kernels", False  # `check_model`; most of them need a GPU to be built
    try:
        told = settings(architecture)
        with set_current_vllm_config(told), set_default_torch_dtype(torch.float32), WithoutMemory():
            model = initialize_model(told)
    except Exception as error:
        return "not built", f"{type(error).__name__}: {error}", False
    with set_current_vllm_config(told):
        try:
            manager = RedModelManager(
                model,
                max_num_seqs=2,
                max_num_batched_tokens=64,
                vocab_size=64,
                lora_config=told.lora_config,
                device=torch.device("cpu"),
                vllm_config=told,
            )
        except UserError as error:
            return "refused", str(error), supports_lora(model)
    assert set(manager.modules_of_sites) == set(manager.widths)  # every site has a module
    assert len(set(manager.modules_of_sites.values())) == len(manager.modules_of_sites)  # and each its own
    return "served", list(manager.modules_of_sites.values())[-1], supports_lora(model)


def main() -> None:
    plugin.register()
    registry._run_in_subprocess = lambda function: function()  # which takes ten seconds for each model
    names = {**registry._TEXT_GENERATION_MODELS, **registry._TRANSFORMERS_SUPPORTED_MODELS}
    rows: dict[str, tuple[str, str, bool]] = dict.fromkeys(names, ("not in transformers", "", False))
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/meet", 0, "gloo")
        initialize_model_parallel(1, 1)
    for name in names:
        if hasattr(transformers, name):
            rows[name] = outcome(name)
    Path(sys.argv[1]).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
