# SPDX-License-Identifier: Apache-2.0
"""Adapted models under DDP and FSDP2 on two gloo processes train as they do on one, and resume."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from sharding import AVERAGES, WHY_NOT
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastlora
from fastlora import functional
from fastlora.layers import gated, siblings
from fastlora.operator import plans
from fastlora.peft import linear as peft_layer

LORA = {"r": 4, "init_lora_weights": False}
STEPS = 4
CASES = list(itertools.product(("ours", "patched", "siblings"), ("ddp", "fsdp2")))


class Block(nn.Module):
    """Two siblings, and a gated MLP."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)
        self.mlp = MLP()

    def forward(self, x):
        return self.mlp(self.q(x) * self.k(x))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def build(whose):
    torch.manual_seed(0)
    if whose in ("siblings", "apart"):
        model = nn.Sequential(Block())
        how = whose == "siblings" and torch.ones(1, 16)
        fastlora.replace_linears(model, ["q", "gate", "down"], fuse_siblings=how, **LORA)
        return model
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    if whose == "ours":
        fastlora.replace_linears(model, ["0", "2"], **LORA)
        return model
    model = get_peft_model(model, LoraConfig(target_modules=["0", "2"], **LORA))
    if whose == "patched":
        assert len(fastlora.patch_peft(model).fused) == 2
    return model


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def train(model, optimizer, batches, steps=STEPS):
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([model(x).square().mean() for x in batches]).mean().backward()
        optimizer.step()


def wrap(model, how):
    if how == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    kinds = fastlora.LoRALinear, peft_layer.lora.Linear
    if any(isinstance(module, Block) for module in model.modules()):
        kinds = Block, MLP  # what shards its own layers one by one has no siblings left
    for module in reversed(list(model.modules())):
        if isinstance(module, kinds):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check(model, expected, before):
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        torch.testing.assert_close(value, expected[name], msg=name)
        assert torch.equal(value, before[name]) == ("lora_" not in name), name


def trains_as_one(rank, whose, how, folder):
    torch.manual_seed(1)
    batches = torch.randn(2, 12, 16).unbind()
    expected = build({"patched": "peft", "siblings": "apart"}.get(whose, whose))
    model = build(whose)
    before = copy.deepcopy(expected.state_dict())
    train(expected, optimizer_of(expected), batches)
    expected = expected.state_dict()

    calls, own = [], peft_layer.lora_sum
    peft_layer.lora_sum = lambda *args: calls.append(1) or own(*args)
    mlps = []
    siblings.functional, gated.run = Counted(calls), counted(mlps, gated.run)
    wrapped = wrap(model, how)
    optimizer = optimizer_of(model)
    train(wrapped, optimizer, [batches[rank]], STEPS // 2)
    if how == "fsdp2":  # saved, and taken up by another model
        state, states = get_state_dict(wrapped, optimizer)
        dcp.save({"model": state, "optimizer": states}, checkpoint_id=folder)
        model = build(whose)
        torch.nn.init.zeros_(next(p for p in model.parameters() if p.requires_grad))
        wrapped = wrap(model, how)
        optimizer = optimizer_of(model)
        state, states = get_state_dict(wrapped, optimizer)
        saved = {"model": state, "optimizer": states}
        dcp.load(saved, checkpoint_id=folder)
        set_state_dict(
            wrapped,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )
    train(wrapped, optimizer, [batches[rank]], STEPS - STEPS // 2)
    check(model, expected, before)
    assert len(calls) == {"patched": 2 * STEPS, "siblings": STEPS}.get(whose, 0)
    assert len(mlps) == (STEPS if whose == "siblings" else 0)


def counted(calls, own):
    return lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)


class Counted:
    """The module `functional` as siblings see it."""

    checked = staticmethod(functional.checked)

    def __init__(self, calls):
        self.run_checked = counted(calls, functional.run_checked)


def worker(rank, folder):
    """Note what each case comes to, and leave without freeing the process group.

    What frees it holds Python's lock and waits for a thread of gloo, which may be waiting for that
    lock to free a tensor: a deadlock, or an abort while Python ends (pytorch/pytorch#179291).
    """
    torch.set_num_threads(1)
    plans.FEW = 0  # tiny tensors stand for large ones, as in conftest.py
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        for whose, how in CASES:
            if how == "fsdp2" and not AVERAGES:
                continue
            trains_as_one(rank, whose, how, folder / f"{whose}-{how}-saved")
            dist.barrier()  # the other process may still be asking for this one's shards
            (folder / f"{whose}-{how}-{rank}").touch()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where both processes have noted the cases that went well; the first that did not ends it."""
    path = tmp_path_factory.mktemp("distributed")
    with contextlib.suppress(mp.ProcessExitedException):
        mp.spawn(worker, (path,), nprocs=2)
    return path


@pytest.mark.parametrize(("whose", "how"), CASES)
def test_two_processes_train_as_one(whose, how, folder):
    if how == "fsdp2" and not AVERAGES:
        pytest.skip(WHY_NOT)
    for rank in range(2):
        assert (folder / f"{whose}-{how}-{rank}").exists(), "see the traceback printed above"
