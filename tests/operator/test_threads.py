# SPDX-License-Identifier: Apache-2.0
"""Eight threads at once: in inference on one model, in training on replicas, under PEFT too."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, get_peft_model

import fastlora

THREADS, ROUNDS = 8, 4
TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def replaced():
    model, how = tiny.llama(), {"input_ids": tiny.tokens()}
    fastlora.replace_linears(model, TARGETS, r=3, init_lora_weights=False, fuse_siblings=how)
    return model


def patched():
    torch.manual_seed(5)
    config = LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(tiny.llama(), config)
    fastlora.patch_peft(model, fuse_siblings={"input_ids": tiny.tokens()})
    return model


each_model = pytest.mark.parametrize("make", [replaced, patched])


def at_once(call) -> list:
    """Return what eight threads get that begin together."""
    barrier = threading.Barrier(THREADS)

    def run(i):
        barrier.wait()
        return [call(i) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


@each_model
def test_inference_on_one_model(make):
    model = make().eval()
    inputs = [tiny.tokens().roll(i, 1) for i in range(THREADS)]
    with torch.no_grad():
        expected = [model(ids).logits for ids in inputs]

    def answer(i):
        with torch.no_grad():
            return model(inputs[i]).logits

    for found, right in zip(at_once(answer), expected, strict=True):
        assert all(torch.equal(logits, right) for logits in found)


@each_model
def test_training_on_replicas(make):
    """Backward runs in autograd's own threads and in the caller's; each replica gets its own."""
    model = make()
    replicas = [copy.deepcopy(model) for _ in range(THREADS)]
    inputs = [tiny.tokens().roll(i, 1) for i in range(THREADS)]

    def gradients(i, on):
        ids = inputs[i]
        trained = [p for p in on.parameters() if p.requires_grad]
        return torch.autograd.grad(on(ids, labels=ids).loss, trained)

    expected = [gradients(i, model) for i in range(THREADS)]
    results = at_once(lambda i: gradients(i, replicas[i]))
    for found, right in zip(results, expected, strict=True):
        for grads in found:
            assert all(map(torch.equal, grads, right))


@each_model
def test_replicas_of_data_parallel(make):
    """`nn.DataParallel` makes shallow copies whose parameters are tensors of another's graph."""
    model = make().eval()
    ids = tiny.tokens()
    expected = model(ids).logits
    replicas = [_shallow(model) for _ in range(THREADS)]
    with torch.no_grad():
        results = at_once(lambda i: replicas[i](ids).logits)
    for found in results:
        for logits in found:  # its layers compute alone: other sums
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def _shallow(module):
    """Return what `torch.nn.parallel.replicate` makes of a module, but on the same device."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else _shallow(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter.view_as(parameter))
    for name, buffer in module._buffers.items():
        replica._buffers[name] = buffer
    return replica
