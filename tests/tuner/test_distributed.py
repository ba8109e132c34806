"""Edits under FSDP2: learning must not be cut off, also where FSDP computes in bf16. One process, gloo."""

import pytest
import torch
from peft import get_peft_model
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM

from redpeft import RedConfig, calibrate

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("this torch has no FSDP2", allow_module_level=True)


@pytest.fixture
def mesh(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def losses(dtype, mesh, steps=4):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), RedConfig(task_type="CAUSAL_LM")).train()
    if dtype is not None:
        policy = fsdp.MixedPrecisionPolicy(param_dtype=dtype)
        for block in model.get_base_model().model.layers:
            fsdp.fully_shard(block, mesh=mesh, mp_policy=policy)
        fsdp.fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    tokens = torch.randint(0, 60, (2, 8), generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(steps):
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    return found


def test_sharded_edits_learn_as_whole_ones_do(mesh):
    plain, sharded, rounded = (losses(dtype, mesh) for dtype in (None, torch.float32, torch.bfloat16))
    assert plain[0] - plain[-1] > 0.01
    assert sharded == pytest.approx(plain, abs=1e-4)
    assert rounded == pytest.approx(plain, abs=0.01)
    assert rounded[0] - rounded[-1] > 0.5 * (plain[0] - plain[-1])


def _one_of_two(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), RedConfig()).train()
    tokens = torch.randint(0, 60, (2, 5), generator=torch.Generator().manual_seed(rank))
    if rank == 0:
        model(tokens)  # the other one does not take part
    distributed.barrier()
    model(tokens)
    units = torch.tensor(list(calibrate(model).values()))
    found = [torch.empty_like(units) for _ in range(2)]
    distributed.all_gather(found, units)
    assert torch.equal(*found)
    assert (units != 1).all()
    distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_measure_the_same_without_waiting_for_each_other(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
