# SPDX-License-Identifier: Apache-2.0
"""What PEFT would make of a config, tried without memory; and a model as it was, should it fail."""

import contextlib
import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.operator.op import PLAIN

_CONTAINERS = (dict, list, set, OrderedDict)


def rehearsed(
    model: nn.Module, values: dict[str, Any], adapter_name: str, trusted: bool
) -> tuple[dict[str, Tensor], set[str]]:
    """Have PEFT put an adapter with the config's ``values`` into a copy of ``model``.

    Returns what a file of it holds, by key and on the meta device, and the keys of the model's own
    embeddings, which PEFT may save beside it. Raises ValueError when PEFT does not take the config,
    for a token that the model does not have, and for an r that has to be ``trusted``.
    """
    from peft import PeftModel, get_peft_model, get_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # it will warn again
        try:
            made = _without_memory(model)
            kind = PEFT_TYPE_TO_CONFIG_MAPPING[values["peft_type"]]
            known = {field.name for field in fields(kind)}  # an older PEFT lacks some switches
            given = {k: v for k, v in values.items() if k in known or v is not False}
            config = kind(**copy.deepcopy(given))  # which refuses other keys
            if isinstance(made, PeftModel):
                made.add_adapter(adapter_name, config)
            else:
                made = get_peft_model(made, config, adapter_name)
            own = get_peft_model_state_dict(made, None, adapter_name, save_embedding_layers=False)
            every = get_peft_model_state_dict(made, None, adapter_name, save_embedding_layers=True)
        except Exception as error:  # whatever a file may make PEFT do
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"PEFT does not take it for this model: {said!r:.500}") from None
    for name, layer in made.named_modules():
        _check_sizes(name.removeprefix("base_model.model."), layer, adapter_name, trusted)
    return own, every.keys() - own.keys()


def _check_sizes(name: str, layer: nn.Module, adapter: str, trusted: bool) -> None:
    for kind, of in (("", "weight"), ("embedding_", "data")):
        down, up = (getattr(layer, f"lora_{kind}{part}", {}) for part in "AB")
        if adapter in down and adapter in up and not trusted:
            a, b = (getattr(part[adapter], of) for part in (down, up))
            r, width = layer.r[adapter], min(a.numel() // a.shape[0], b.numel() // b.shape[1])
            if r > width:
                most = f"{width}, the smaller side of its weight"
                cure = "pass trusted=True where you trust the file"
                raise ValueError(f"r={r} for {name!r} is more than {most}; {cure}")
    tokens = getattr(layer, "token_indices", {}).get(adapter)
    if tokens and max(tokens) >= (count := layer.get_base_layer().weight.shape[0]):
        raise ValueError(f"token {max(tokens)} is to be trained in {name!r}, which has {count}")


def _without_memory(model: nn.Module) -> nn.Module:
    """Return a copy that shares everything but structure, with dense weights on the meta device."""
    copies: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in PLAIN:  # a quantised weight has more to it than its elements
            copied = copies[id(tensor)] = torch.empty_like(tensor, device="meta")
            if type(tensor) is nn.Parameter:
                copies[id(tensor)] = nn.Parameter(copied, tensor.requires_grad)
    for module in model.modules():
        copied = copies[id(module)] = object.__new__(type(module))
        vars(copied).update(_shallow(module))
    for module in model.modules():
        state = vars(copies[id(module)])
        for kind in ("_parameters", "_buffers", "_modules"):
            state[kind] = {name: copies.get(id(v), v) for name, v in state[kind].items()}
        if "config" in state:  # PEFT changes it
            state["config"] = copy.deepcopy(state["config"])
    return copies[id(model)]


def _shallow(module: nn.Module) -> dict[str, Any]:
    state = vars(module)
    return {k: copy.copy(v) if type(v) in _CONTAINERS else v for k, v in state.items()}


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module, overwritten: list[Tensor]) -> Iterator[None]:
    """Take back what a block that fails has done to the modules, and to ``overwritten`` values."""
    modules = [(module, type(module), _shallow(module)) for module in model.modules()]
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
            parameter.requires_grad_(requires_grad)
        for tensor, value in kept:
            tensor.detach().copy_(value)
        raise
