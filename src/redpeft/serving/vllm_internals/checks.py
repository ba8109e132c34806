"""Refuse, when the server starts, models and sites where vLLM works in a way that would make an edit wrong."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear, RowParallelLinear

from redpeft.errors import UserError

FOLD = "fold the adapter into its base (redpeft fold) and serve that"
FUSED = "vllm.models."  # vLLM's package of models with kernels of their own


def check_model(model: nn.Module, vllm_config: VllmConfig) -> None:
    """`UserError` for a model whose modules are bypassed, or do not see the batch's tokens in their order."""
    if any(type(module).__module__.startswith(FUSED) for module in model.modules()):
        raise UserError(
            f"vLLM runs {type(model).__name__} with its own kernels, which can bypass a module, so an edit of "
            f"its output would be lost; {FOLD}"
        )
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        raise UserError(
            f"with --kv-sharing-fast-prefill some layers see only part of the tokens; leave it out, or {FOLD}"
        )
    if vllm_config.parallel_config.use_ubatching:
        raise UserError(f"with --enable-dbo layers see only part of the tokens; leave it out, or {FOLD}")


def check_site(name: str, module: nn.Module, vllm_config: VllmConfig) -> None:
    """`UserError` for a module whose output is not the site's: packed, split, or scaled or summed elsewhere."""
    layer = _without_lora(module)
    if isinstance(layer, LinearBase) and not isinstance(layer, RowParallelLinear | ReplicatedLinear):
        raise UserError(f"vLLM packs or splits {name} ({type(layer).__name__}), so it cannot be edited; {FOLD}")
    if getattr(layer, "skip_bias_add", False) and layer.bias is not None:
        raise UserError(f"vLLM adds the bias of {name} elsewhere, so its output cannot be edited; {FOLD}")
    for part in layer.modules():
        if isinstance(part, MoERunner):
            _check_experts(name, part, vllm_config)


def _check_experts(name: str, experts: MoERunner, vllm_config: VllmConfig) -> None:
    ranks = experts.moe_config.moe_parallel_config
    if ranks.is_sequence_parallel:
        raise UserError(f"vLLM splits the tokens of {name} over the ranks here, so it cannot be edited; {FOLD}")
    if experts.moe_config.skip_final_all_reduce and ranks.tp_size > 1:
        raise UserError(f"vLLM sums the output of {name} over the ranks elsewhere, so it cannot be edited; {FOLD}")
    # DeepSeek in fp16: the whole residual stream is divided by this factor, against overflow
    if experts.routed_scaling_factor != 1 and vllm_config.model_config.dtype == torch.float16:
        raise UserError(
            f"vLLM runs {name} at another scale in fp16, so it cannot be edited; serve it in bf16, or {FOLD}"
        )


def is_partial(module: nn.Module) -> bool:
    """Whether a module's output is this rank's part of a sum, to which the first rank adds the bias."""
    layer = _without_lora(module)
    return isinstance(layer, RowParallelLinear) and not layer.reduce_results and layer.tp_rank > 0


def _without_lora(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, BaseLayerWithLoRA) else module
