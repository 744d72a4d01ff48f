# SPDX-License-Identifier: Apache-2.0
"""Eight threads at once: in inference on one model, in training on replicas."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, get_peft_model

import fastlora

THREADS, ROUNDS = 8, 4
INPUTS = [tiny.tokens().roll(i, 1) for i in range(THREADS)]


@pytest.fixture
def model():
    torch.manual_seed(5)
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
    made = get_peft_model(tiny.llama(), config)
    fastlora.patch_peft(made, fuse_siblings={"input_ids": tiny.tokens()})
    return made


def at_once(call) -> list:
    """Return what eight threads get that begin together."""
    barrier = threading.Barrier(THREADS)

    def run(i):
        barrier.wait()
        return [call(i) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def test_inference_on_one_model_and_on_replicas_of_data_parallel(model):
    """`nn.DataParallel` makes shallow copies whose parameters are tensors of another's graph."""
    model = model.eval()
    with torch.no_grad():
        expected = [model(ids).logits for ids in INPUTS]
    replicas = [_shallow(model) for _ in range(THREADS)]

    def answers(i):
        with torch.no_grad():
            return model(INPUTS[i]).logits, replicas[i](INPUTS[i]).logits

    for found, right in zip(at_once(answers), expected, strict=True):
        for logits, of_replica in found:
            assert torch.equal(logits, right)
            # Its layers compute alone: other sums.
            torch.testing.assert_close(of_replica, right, rtol=1e-4, atol=1e-5)


def test_training_on_replicas(model):
    """Backward runs in autograd's own threads and in the caller's; each replica gets its own."""
    replicas = [copy.deepcopy(model) for _ in range(THREADS)]

    def gradients(i, on):
        trained = [p for p in on.parameters() if p.requires_grad]
        return torch.autograd.grad(on(INPUTS[i], labels=INPUTS[i]).loss, trained)

    expected = [gradients(i, model) for i in range(THREADS)]
    results = at_once(lambda i: gradients(i, replicas[i]))
    for found, right in zip(results, expected, strict=True):
        assert all(torch.equal(*pair) for grads in found for pair in zip(grads, right, strict=True))


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
    return replica
