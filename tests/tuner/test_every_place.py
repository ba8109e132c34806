"""An edit acts wherever its site is used: in a sum that the block makes itself, in every block that shares a module,
and in an encoder that does not call its linears."""

import copy
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from redpeft import RedConfig, calibrate
from redpeft.tuner.units import typical_size


def granite(family: str, layers: int = 1) -> nn.Module:
    config = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 16,
        "shared_intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
    }
    if family == "GraniteMoeHybrid":
        config |= {"layer_types": ["attention"] * layers, "mamba_n_heads": 4}
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**config)).eval()


@torch.no_grad()
def parts(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the first block's experts, its shared expert and the block itself give."""
    block, seen = model.model.layers[0], {}
    modules = {"experts": block.block_sparse_moe, "shared": block.shared_mlp, "block": block}

    def keep(name: str, output: Any) -> None:  # older transformers adds to some the router's logits, or nothing
        seen[name] = output[0] if isinstance(output, tuple) else output

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name, module in modules.items()
    ]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["GraniteMoeShared", "GraniteMoeHybrid", "GraniteMoeSWA"])
def test_one_edit_acts_on_the_sum_of_experts_that_a_block_makes_itself(family, tiny):
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"no {family} in this transformers")
    ids, plain = tiny.tokens(), granite(family)
    base = parts(plain, ids)
    model = tiny.with_edits(granite(family))
    [edit] = tiny.edits(model)
    assert model.get_nb_trainable_parameters()[0] == 2 * 32

    total = (base["experts"] + base["shared"]).double()
    scale, bias = edit.effective
    residual = base["block"].double() - 0.5 * total
    expected = residual + 0.5 * (scale.double() * total + bias.double())
    edited = parts(model.get_base_model(), ids)["block"]
    torch.testing.assert_close(edited.double(), expected, rtol=1e-5, atol=1e-5)

    with model.disable_adapter():
        assert torch.equal(parts(model.get_base_model(), ids)["block"], base["block"])
    mixed = model(input_ids=ids, adapter_names=["default", "__base__", "default", "__base__"]).logits
    alone, unedited = model(input_ids=ids).logits, plain(input_ids=ids).logits
    torch.testing.assert_close(mixed, torch.stack([alone[0], unedited[1], alone[2], unedited[3]]))


def test_the_unit_of_such_a_sum_is_that_of_the_sum(tiny):
    ids, model = tiny.tokens(), get_peft_model(granite("GraniteMoeShared"), RedConfig())
    base = parts(granite("GraniteMoeShared"), ids)
    expected = typical_size(base["experts"] + base["shared"], "")
    assert list(calibrate(model, {"input_ids": ids}).values()) == pytest.approx([float(expected)])


def test_such_an_edit_is_saved_copied_and_unloaded_whole(tiny, tmp_path):
    ids, model = tiny.tokens(), tiny.with_edits(granite("GraniteMoeShared", layers=2))
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(granite("GraniteMoeShared", layers=2), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=0)

    other = tiny.far(copy.deepcopy(model), seed=1)
    assert not torch.allclose(other(input_ids=ids).logits, expected)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=0)

    plain = model.unload()
    assert torch.equal(plain(input_ids=ids).logits, granite("GraniteMoeShared", layers=2)(input_ids=ids).logits)
    assert not any(module._forward_hooks for module in plain.modules())


def test_both_parts_of_a_sum_are_trained_by_its_edit(tiny):
    model = get_peft_model(granite("GraniteMoeShared"), RedConfig(unit=1))
    [edit] = tiny.edits(model)
    ids = tiny.tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    base = granite("GraniteMoeShared")
    seen = parts(base, ids)
    total = (seen["experts"] + seen["shared"]).requires_grad_()
    base.model.layers[0].block_sparse_moe.register_forward_hook(
        lambda _, __, output: (total, *output[1:]) if isinstance(output, tuple) else total
    )
    base.model.layers[0].shared_mlp.register_forward_hook(lambda *_: torch.zeros_like(total))
    base(input_ids=ids, labels=ids).loss.backward()
    expected = (total.grad * total).sum((0, 1))
    [scale] = [vector for name, vector in edit.named_parameters() if name.startswith("scale")]
    torch.testing.assert_close(scale.grad, expected.detach(), rtol=1e-4, atol=1e-7)


def shared_linear(tiny) -> nn.Module:
    model = tiny.llama()
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    return model


def test_a_linear_that_blocks_share_is_edited_wherever_it_is_used(tiny, tmp_path):
    ids, model = tiny.tokens(), tiny.with_edits(shared_linear(tiny))
    [edit] = tiny.edits(model)
    scale, bias = edit.effective
    naive = tiny.llama()
    linear = naive.model.layers[0].mlp.down_proj
    for layer in naive.model.layers:
        layer.mlp.down_proj.load_state_dict(linear.state_dict())
        layer.mlp.down_proj.register_forward_hook(lambda _, __, output: scale * output + bias)
    expected = naive(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(shared_linear(tiny), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)

    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert merged.model.layers[0].mlp.down_proj is merged.model.layers[1].mlp.down_proj
    assert type(merged.model.layers[1].mlp.down_proj) is nn.Linear


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "the last layer alone"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_an_edit_acts_in_torchs_own_encoder_in_evaluation(tiny, masked, layers):
    hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    inputs = {"src": hidden, "src_key_padding_mask": padding if masked else None}
    model = tiny.with_edits(encoder(), layers_to_transform=layers)
    naive = encoder().train()  # no fused kernel; there is no dropout
    edited = naive.layers if layers is None else [naive.layers[1]]
    for layer, edit in zip(edited, tiny.edits(model), strict=True):
        layer.linear2.register_forward_hook(
            lambda _, __, output, edit=edit: edit.effective[0] * output + edit.effective[1]
        )
    with torch.no_grad():
        real = ~padding if masked else torch.ones_like(padding)
        torch.testing.assert_close(model(**inputs)[real], naive(**inputs)[real])
    plain = model.unload()
    assert (plain.use_nested_tensor, plain.layers[0].activation_relu_or_gelu) == (True, 1)
