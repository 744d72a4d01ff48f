# SPDX-License-Identifier: Apache-2.0
"""Small models that PEFT has wrapped, and one patched beside the other."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from tiny_models import mlp, train_a_little
from torch import nn

from fastlora import patch_peft

X = torch.linspace(-1, 1, 18).reshape(3, 6)


class Quantised(nn.Parameter):
    """As torchao's are: in a plain nn.Linear, and more than its elements."""


class Subclass(nn.Linear):
    """As quantised layers are: a linear layer of a kind that is not known here."""


def config(**changes):
    return LoraConfig(**{"r": 4, "target_modules": ["0", "2"], **changes})


def wrapped(model=None, **changes):
    """A PEFT model whose adapters all do something."""
    torch.manual_seed(3)
    model = get_peft_model(mlp() if model is None else model, config(**changes))
    return train_a_little(model)


def pair(*args, **changes):
    """The same model twice, the second one patched."""
    plain = wrapped(*args, **changes)
    patched = copy.deepcopy(plain)
    return plain, patched, patch_peft(patched)


def grads(model, x=X):
    model.zero_grad()
    (model(x).float() ** 2).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run(layer, *inputs):
    """Return the layer's output, or what its error says."""
    try:
        found = layer(*inputs)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return str(error)
    return found[0] if isinstance(found, tuple) else found


def same(plain, patched, x=X, **tolerance):
    """Assert that outputs, dtypes and gradients agree."""
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(patched(x), plain(x), **tolerance)
    expected = grads(plain, x)
    assert expected
    torch.testing.assert_close(grads(patched, x), expected, **tolerance)


def same_kinds(model, plain):
    """Assert that modules are of the same classes, and hold what the others do."""
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in plain.modules()]


def layers(model):
    return [module for module in model.modules() if isinstance(module, lora.LoraLayer)]


def add(model, name="other", **changes):
    torch.manual_seed(4)
    model.add_adapter(name, config(**changes))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.copy_(torch.randn_like(parameter) / 3)
