# SPDX-License-Identifier: Apache-2.0
"""Several gradients at once, and per-sample gradients: as PyTorch's own layers give them."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call, grad, vmap

import fastlora
from fastlora import Projection, lora_linears
from fastlora.operator.dropout import new_seed
from fastlora.operator.eager import reference

each_impl = pytest.mark.parametrize("impl", ["auto", "blocks", "library", "triton"])


def by_batched_grads(y, inputs, vs):
    return torch.autograd.grad(y, inputs, vs, is_grads_batched=True, retain_graph=True)


def by_vmap(y, inputs, vs):
    return vmap(lambda v: torch.autograd.grad(y, inputs, v, retain_graph=True))(vs)


WAYS = {"is_grads_batched": by_batched_grads, "vmap": by_vmap}


@pytest.mark.parametrize("way", WAYS)
@each_impl
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradients_of_several_outputs_at_once(way, impl, p):
    """Of x, the adapter, and a weight and bias that train; of two projections."""
    shapes, vs = ((7, 16), (12, 16), (4, 16), (12, 4), (12,)), torch.randn(3, 7, 12)
    x, w, a, b, bias = t = [torch.randn(shape, requires_grad=True) for shape in shapes]
    ones = [Projection(w, a, b, bias, 0.5, p), Projection(w, None, None, bias)]
    torch.manual_seed(1)
    first, second = lora_linears(x, ones, training=True, impl=impl)
    torch.manual_seed(1)
    right = reference(x, w, a, b, bias, new_seed(x.device) if p else None, 0.5, p)
    right = WAYS[way](right * F.linear(x, w, bias), t, vs)
    for one, other in zip(WAYS[way](first * second, t, vs), right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_a_batch_of_adapters_on_one_x():
    """As an ensemble of them runs by vmap: what is x's alone has no dimension of the batch."""
    x, w, a, b = (torch.randn(s) for s in ((7, 16), (12, 16), (3, 4, 16), (3, 12, 4)))
    ys = vmap(lambda a, b: fastlora.lora_linear(x, w, a, b, scaling=0.5))(a, b)
    for y, *factors in zip(ys, a, b, strict=True):
        torch.testing.assert_close(y, fastlora.lora_linear(x, w, *factors, scaling=0.5))


def model(names, p, patched):
    """A layer of PEFT's with adapters that do something, patched or not."""
    torch.manual_seed(0)
    made = None
    for name in names:
        config = LoraConfig(r=2, target_modules=["0"], lora_dropout=p, init_lora_weights=False)
        if made is None:
            made = get_peft_model(nn.Sequential(nn.Linear(8, 4)), config, adapter_name=name)
        else:
            made.add_adapter(name, config)
    made.base_model.set_adapter(names)
    if patched:
        fastlora.patch_peft(made)
    return made.train()


def per_sample(made, x, randomness):
    trained = {n: t.detach() for n, t in made.named_parameters() if t.requires_grad}

    def loss(parameters, row):
        return functional_call(made, parameters, (row[None],)).square().sum()

    return vmap(grad(loss), (None, 0), randomness=randomness)(trained, x)


@pytest.mark.parametrize("names", [["one"], ["one", "two"]], ids=len)
@pytest.mark.parametrize(("p", "randomness"), [(0.0, "error"), (0.5, "same"), (0.5, "different")])
def test_per_sample_gradients(names, p, randomness):
    if randomness == "different" and torch.__version__.startswith("2.8."):
        pytest.skip("PyTorch 2.8 has no vmap of views of another dtype")
    x = torch.randn(64, 8)
    found = per_sample(model(names, p, True), x, randomness)
    right = per_sample(model(names, p, False), x, randomness)
    assert found.keys() == right.keys()
    for name, one in found.items():
        assert one.shape == right[name].shape and one.isfinite().all()
        if not p:
            torch.testing.assert_close(one, right[name], rtol=1e-4, atol=1e-5)
    if p:  # each sample has a mask of its own, or all have the same one
        name = next(n for n in found if "lora_A" in n)
        dropped = (found[name].abs().sum(1) == 0).float()  # [samples, inputs]
        assert 0 < dropped.mean() < 1
        alike = bool((dropped == dropped[0]).all())
        assert alike == (randomness == "same")


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def gated_mlp():
    config = LoraConfig(r=2, target_modules=["gate", "up", "down"], init_lora_weights=False)
    made = get_peft_model(nn.Sequential(MLP()), config)
    report = fastlora.patch_peft(made, fuse_siblings=[("gate", "up")])
    assert "gated MLP: gate, up, down" in str(report)
    return made


MADE = {
    "several adapters": lambda: model(["one", "two"], 0.0, True),
    "several adapters that drop": lambda: model(["one", "two"], 0.5, True),
    "a gated MLP": gated_mlp,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MADE)
def test_several_gradients_at_once_are_what_each_is_alone(way, name):
    made, x = MADE[name](), torch.randn(9, 8, requires_grad=True)
    trained, y = [x, *(t for t in made.parameters() if t.requires_grad)], made(x)
    assert (y.grad_fn.name() == "_GatedMLPBackward") == (name == "a gated MLP")
    vs = torch.randn(3, *y.shape)
    found = WAYS[way](y, trained, vs)
    for i, v in enumerate(vs):
        right = torch.autograd.grad(y, trained, v, retain_graph=True)
        for one, other in zip(found, right, strict=True):
            torch.testing.assert_close(one[i], other, rtol=1e-4, atol=1e-5)
