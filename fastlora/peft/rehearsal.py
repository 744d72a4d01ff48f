# SPDX-License-Identifier: Apache-2.0
"""What PEFT would make of a config, tried without memory; and a model as it was, should it fail."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)
_CONTAINERS = (dict, list, set, OrderedDict)


@dataclass
class Expected:
    """What PEFT will ask a file for: tensors on the meta device, by their keys in it.

    ``embeddings``: keys of the model's own embeddings, which PEFT may save beside the adapter;
    ``ranks``: by layer (r, the smaller side of its weight); ``tokens``: by embedding (the largest
    index that is trained, how many there are).
    """

    tensors: dict[str, Tensor]
    embeddings: set[str]
    ranks: dict[str, tuple[int, int]]
    tokens: dict[str, tuple[int, int]]


def rehearsed(model: nn.Module, values: dict[str, Any], adapter_name: str) -> Expected:
    """Have PEFT put an adapter with the config's ``values`` into a copy of ``model``.

    The copy's weights are on the meta device. Raises ValueError when PEFT does not take it.
    """
    from peft import PeftModel, get_peft_model, get_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # it will warn again
        try:
            made = _skeleton(model, {})
            kind = PEFT_TYPE_TO_CONFIG_MAPPING[values["peft_type"]]
            known = {field.name for field in fields(kind)}  # an older PEFT lacks some switches
            given = {k: v for k, v in values.items() if k in known or v is not False}
            config = kind(**copy.deepcopy(given))  # which refuses other keys
            if isinstance(made, PeftModel):
                made.add_adapter(adapter_name, config)
            else:
                made = get_peft_model(made, config, adapter_name)
            alone, beside = (
                get_peft_model_state_dict(
                    made, adapter_name=adapter_name, save_embedding_layers=embeddings
                )
                for embeddings in (False, True)
            )
        except Exception as error:  # whatever a file may make PEFT do
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"PEFT does not take it for this model: {said!r:.500}") from None
    ranks, tokens = {}, {}
    for name, layer in made.named_modules():
        for kind, of in (("", "weight"), ("embedding_", "data")):
            down, up = (getattr(layer, f"lora_{kind}{part}", {}) for part in "AB")
            if adapter_name in down and adapter_name in up:
                a, b = (getattr(part[adapter_name], of) for part in (down, up))
                width = min(a.numel() // a.shape[0], b.numel() // b.shape[1])
                ranks[name.removeprefix("base_model.model.")] = layer.r[adapter_name], width
        indices = getattr(layer, "token_indices", {}).get(adapter_name)
        if indices:
            tokens[name] = max(indices), layer.get_base_layer().weight.shape[0]
    return Expected(alone, beside.keys() - alone.keys(), ranks, tokens)


def _skeleton(module: nn.Module, copies: dict[int, Any]) -> nn.Module:
    """Return a copy that shares everything but structure, with dense weights on the meta device."""
    if id(module) in copies:
        return copies[id(module)]
    copied = copies[id(module)] = object.__new__(type(module))
    state = _shallow(vars(module))
    for kind in ("_parameters", "_buffers"):
        state[kind] = {name: _on_meta(value, copies) for name, value in state[kind].items()}
    if "config" in state:  # PEFT changes it
        state["config"] = copy.deepcopy(state["config"])
    vars(copied).update(state)
    for name, child in module._modules.items():
        copied._modules[name] = child if child is None else _skeleton(child, copies)
    return copied


def _on_meta(tensor: Tensor | None, copies: dict[int, Any]) -> Tensor | None:
    if type(tensor) not in _PLAIN:  # None; a quantised weight has more to it than its elements
        return tensor
    if id(tensor) not in copies:
        copied = torch.empty_like(tensor, device="meta")
        if type(tensor) is nn.Parameter:
            copied = nn.Parameter(copied, tensor.requires_grad)
        copies[id(tensor)] = copied
    return copies[id(tensor)]


def _shallow(state: dict[str, Any]) -> dict[str, Any]:
    return {k: copy.copy(v) if type(v) in _CONTAINERS else v for k, v in state.items()}


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module, overwritten: list[Tensor]) -> Iterator[None]:
    """Take back what a block that fails has done to the modules, and to ``overwritten`` values."""
    modules = [(module, type(module), _shallow(vars(module))) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    kept = [(tensor, tensor.detach().clone()) for tensor in overwritten]
    try:
        yield
    except BaseException:
        for module, kind, state in modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
        for parameter, requires_grad in trained:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        for tensor, value in kept:
            tensor.detach().copy_(value)
        raise
