# SPDX-License-Identifier: Apache-2.0
"""Small mixtures of experts that PEFT has wrapped, and one patched beside the other."""

import copy
from unittest import mock

import tiny_models as tiny
import torch
from peft import LoraConfig, get_peft_model

from fastlora import patch_peft
from fastlora.layers import experts

IDS = torch.arange(24).view(2, 12) * 7 % tiny.VOCABULARY
BOTH = ("experts.gate_up_proj", "experts.down_proj")


def config(parameters=BOTH, **changes):
    given = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "init_lora_weights": False}
    return LoraConfig(**{**given, "target_parameters": list(parameters), **changes})


def wrapped(name="Mixtral", implementation="eager", dtype=torch.float64, **changes):
    """Return a model with adapters of PEFT's, which is 1 / 10 of what it would be."""
    model = tiny.experts(name, implementation).to(dtype)
    model = get_peft_model(model, config(**changes), autocast_adapter_dtype=False)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.mul_(0.3)
    return model.train()


def pair(*args, **changes):
    plain = wrapped(*args, **changes)
    patched = copy.deepcopy(plain)
    return plain, patched, patch_peft(patched)


def loss_of(model, ids=IDS):
    return model(input_ids=ids, labels=ids).loss


def grads(model):
    """Return the loss, and the gradient of each parameter by name."""
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **own}


def same(plain, patched, rtol=1e-12, atol=1e-13):
    torch.testing.assert_close(grads(patched), grads(plain), rtol=rtol, atol=atol)


def one_layer(**changes):
    """Return a patched layer of experts with an adapter on its first weights, and its input."""
    model = wrapped(parameters=BOTH[:1], target_modules=[], **changes)
    layer = model.base_model.model.model.layers[0].mlp.experts
    x = torch.randn(10, 16, dtype=torch.float64)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(10)])
    return model, layer, (x, index, torch.rand(10, 2, dtype=torch.float64))


def counted(monkeypatch):
    """Have what experts compute by the operator counted."""
    calls = mock.Mock(wraps=experts._experts)
    monkeypatch.setattr(experts, "_experts", calls)
    return calls
