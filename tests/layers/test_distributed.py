# SPDX-License-Identifier: Apache-2.0
"""Adapted models under DDP and FSDP2 on two gloo processes train as they do on one, and resume."""

import contextlib
import copy
import itertools
import os
import traceback
from unittest import mock

import pytest
import tiny_models as tiny
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
CASES = [*itertools.product(("ours", "patched", "siblings"), ("ddp", "fsdp2")), ("mixed", "ddp")]


def build(whose, alone=False):
    """A model, or the one on a process of its own that it has to train as."""
    torch.manual_seed(0)
    if whose == "siblings":
        model = nn.Sequential(tiny.Block())
        how = False if alone else torch.ones(1, 8)
        fastlora.replace_linears(model, ["q", "gate", "down"], fuse_siblings=how, **LORA)
        return model
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
    if whose == "ours":
        fastlora.replace_linears(model, ["0", "2"], **LORA)
        return model
    model = get_peft_model(model, LoraConfig(target_modules=["0", "2"], **LORA))
    assert alone or len(fastlora.patch_peft(model).fused) == 2
    return model


def wrap(model, how):
    """The model in its wrapper, and an optimizer."""
    if how == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        kinds = fastlora.LoRALinear, peft_layer.lora.Linear
        if any(isinstance(module, tiny.Block) for module in model.modules()):
            kinds = tiny.Block, tiny.MLP  # what shards its own layers has no siblings left
        for module in reversed(list(model.modules())):
            if isinstance(module, kinds):
                fully_shard(module, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    return wrapped, optimizer_of(model)


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def train(model, optimizer, batches, steps=STEPS):
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([model(x).square().mean() for x in batches]).mean().backward()
        optimizer.step()


def trains_as_one(rank, whose, how, folder):
    torch.manual_seed(1)
    batches = torch.randn(2, 12, 8).unbind()
    expected, model = build(whose, alone=True), build(whose)
    before = copy.deepcopy(expected.state_dict())
    train(expected, optimizer_of(expected), batches)
    expected = expected.state_dict()
    wrapped, optimizer = wrap(model, how)
    train(wrapped, optimizer, [batches[rank]], STEPS // 2)
    if how == "fsdp2":  # saved, and taken up by another model
        states = get_state_dict(wrapped, optimizer)
        dcp.save(dict(zip(("model", "optim"), states, strict=True)), checkpoint_id=folder)
        model = build(whose)
        nn.init.zeros_(next(p for p in model.parameters() if p.requires_grad))
        wrapped, optimizer = wrap(model, how)
        states = get_state_dict(wrapped, optimizer)
        saved = dict(zip(("model", "optim"), states, strict=True))
        dcp.load(saved, checkpoint_id=folder)
        own = {f"{name}_state_dict": state for name, state in saved.items()}
        set_state_dict(wrapped, optimizer, **own)
    train(wrapped, optimizer, [batches[rank]], STEPS - STEPS // 2)
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        torch.testing.assert_close(value, expected[name], msg=name)
        assert torch.equal(value, before[name]) == ("lora_" not in name), name


def mixes_as_one(rank):
    """Each process has names of its own, whose gradients are those of both batches on one."""
    names = [["a", "a", "b", None], ["b", "c", "c", "c"]]
    torch.manual_seed(1)
    batches = torch.randn(2, 4, 3, 8).unbind()
    model = build("patched", alone=True)
    for name in "abcd":  # and d is nobody's
        model.add_adapter(name, LoraConfig(target_modules=["0", "2"], **LORA))
    model.set_requires_grad(list("abcd"))
    fastlora.patch_peft(model)
    alone = copy.deepcopy(model)
    with fastlora.adapters_by_sample(alone, [*names[0], *names[1]]):
        y = alone(torch.cat(batches))
    (y.square().mean((1, 2)).sum() / 2).backward()
    found = {n.split(".")[-2] for n, p in alone.named_parameters() if p.grad is not None}
    assert found == set("abc")
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for again in (False, True):
        model.zero_grad()
        with fastlora.adapters_by_sample(wrapped, names[rank]):
            y = wrapped(batches[rank])
        y.square().mean((1, 2)).sum().backward()
        for (name, mine), other in zip(model.named_parameters(), alone.parameters(), strict=True):
            if other.grad is None:
                assert mine.grad is None or not mine.grad.any(), name
            else:
                torch.testing.assert_close(mine.grad, other.grad, msg=f"{name}, {again}")


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
    # The calls of PEFT's layers, of siblings and of gated MLPs are counted as they run.
    fused = peft_layer.lora_sum = mock.Mock(wraps=peft_layer.lora_sum)
    groups = siblings.functional = mock.Mock(wraps=functional)
    mlps = gated.run = mock.Mock(wraps=gated.run)
    try:
        for whose, how in CASES:
            if how == "fsdp2" and not AVERAGES:
                continue
            for each in (fused, groups, mlps):
                each.reset_mock()
            if whose == "mixed":
                mixes_as_one(rank)
            else:
                trains_as_one(rank, whose, how, folder / f"{whose}-{how}-saved")
            calls = fused.call_count, groups.run_checked.call_count, mlps.call_count
            wanted = {"patched": (2 * STEPS, 0, 0), "siblings": (0, STEPS, STEPS)}
            wanted["mixed"] = (2 * 3, 0, 0)
            assert calls == wanted.get(whose, (0, 0, 0)), calls
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
