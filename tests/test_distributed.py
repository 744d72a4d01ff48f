"""An injected model under DDP and FSDP2 on two gloo processes trains as it does on one."""

from __future__ import annotations

import copy
import os
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastlora


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    config = fastlora.LoRAConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    fastlora.inject(model, config)
    return model


def train(model, batches, steps=3):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([model(x).square().mean() for x in batches]).mean().backward()
        optimizer.step()


def full(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def worker(rank, how, store):
    """Compare, and leave without freeing the process group.

    What frees it holds Python's lock and waits for a thread of gloo, which may be waiting for that
    lock to free a tensor: a deadlock, or an abort while Python ends (pytorch/pytorch#179291).
    """
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        torch.manual_seed(1)
        batches = torch.randn(2, 12, 16).unbind()
        expected, model = build(), build()
        before = copy.deepcopy(expected.state_dict())
        train(expected, batches)
        if how == "ddp":
            wrapped = DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (2,))
            for layer in (model[0], model[2]):
                fully_shard(layer, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        train(wrapped, [batches[rank]])
        for name, parameter in model.named_parameters():
            value = full(parameter.detach())
            torch.testing.assert_close(value, expected.state_dict()[name], msg=name)
            assert torch.equal(value, before[name]) == ("lora_" not in name), name
        dist.barrier()  # the other process may still be asking for this one's shards
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(how, tmp_path):
    mp.spawn(worker, (how, tmp_path / "store"), nprocs=2)
