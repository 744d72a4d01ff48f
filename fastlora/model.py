# SPDX-License-Identifier: Apache-2.0
"""The adapters of a whole model: find, switch, disable, merge and delete them in every layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from fastlora.config import LoRAConfig
from fastlora.injected import InjectedLinear as LoRALinear
from fastlora.layers.classes import unwrapped
from fastlora.trainable import TrainableModule

# What torch.compile, checkpoint_wrapper and FSDP put between a module and its name.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make exactly ``names`` active and trainable throughout ``model``: one, several or ``[]``.

    Each layer uses those of them that it has. A merged model is unmerged first.
    Raises ValueError for a name that no layer has, and changes nothing then.
    """
    model = unwrapped(model)
    names = _known(model, names)
    for module in _all(model, TrainableModule):
        own = [name for name in names if name in module.modules_to_save]
        if len(own) > 1:
            raise ValueError(
                f"adapters {own} cannot be active together: each has its own copy of a module"
            )
    if is_merged(model):
        warnings.warn("set_adapter() on a merged model: it is unmerged first", stacklevel=2)
        unmerge(model)
    for layer in _all(model, LoRALinear):
        layer.set_adapter([name for name in names if name in layer.r])
    for module in _all(model, TrainableModule):
        module.set_adapter(next((n for n in names if n in module.modules_to_save), None))
    for name, record in all_records(model):
        record.set_active(name in names)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Run ``model`` without its adapters inside a ``with`` block, and as before after it.

    Trained biases and modules trained in full step aside too. Blocks may be nested.
    Raises ValueError for a model without adapters.
    """
    model = unwrapped(model)
    modules = [*_all(model, LoRALinear), *_all(model, TrainableModule)]
    if not modules:
        raise ValueError(f"{type(model).__name__} has no adapters to disable")
    kept = [record for _, record in all_records(model)]
    flags = [(part, part.disable_adapters) for part in (*modules, *kept)]
    try:
        for part, _ in flags:
            part.disable_adapters = True
        for record in kept:
            record.put_biases()
        yield
    finally:
        for part, flag in flags:
            part.disable_adapters = flag
        for record in kept:
            record.put_biases()


def merge(model: nn.Module, safe: bool = False) -> None:
    """Add the active adapters to every layer's weight, as `LoRALinear.merge` does.

    All or nothing: when one layer fails, as with ``safe`` and a NaN (ValueError), the others are
    unmerged. Raises RuntimeError when a layer is merged already.
    """
    model = unwrapped(model)
    layers = list(_all(model, LoRALinear))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapters to merge")
    if is_merged(model):
        raise RuntimeError("the model is merged already: unmerge() it first")
    try:
        for layer in layers:
            layer.merge(safe=safe)
    except BaseException:
        unmerge(model)
        raise


def unmerge(model: nn.Module) -> None:
    """Give every layer its weight back bit for bit; layers that are not merged stay."""
    for layer in _all(unwrapped(model), LoRALinear):
        layer.unmerge()


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter from every layer; biases that it trained get their old values back.

    Where it alone was active, nothing is then. A merged adapter is unmerged first.
    Raises ValueError for a name that no layer has.
    """
    model = unwrapped(model)
    (name,) = _known(model, name)
    if any(name in layer.merged_adapters for layer in _all(model, LoRALinear)):
        warnings.warn(f"adapter {name!r} is merged: the model is unmerged first", stacklevel=2)
        unmerge(model)
    for module in _having(model, name):
        module.delete_adapter(name)
    for module in model.modules():
        record = records(module).pop(name, None)
        if record is not None:
            record.set_active(False)


# What a model remembers of its adapters.


@dataclass
class Record:
    """An adapter's config, and by their keys in a checkpoint the biases that it trains."""

    config: LoRAConfig
    owners: dict[str, nn.Module]
    aside: dict[str, Tensor]  # the values not in place: the original or the trained ones
    active: bool = True
    disable_adapters: bool = False
    in_place: bool = True

    def biases(self) -> dict[str, nn.Parameter]:
        """Return the model's own parameters, whichever values they hold."""
        return {key: module.bias for key, module in self.owners.items()}

    def set_active(self, active: bool) -> None:
        """Put the trained biases in place and train them, or the original ones and freeze them."""
        self.active = active
        self.put_biases()
        for bias in self.biases().values():
            bias.requires_grad_(active)

    def put_biases(self) -> None:
        """Put the values in place that ``active`` and ``disable_adapters`` ask for."""
        wanted = self.active and not self.disable_adapters
        if wanted != self.in_place:
            self.in_place = wanted
            for key, bias in self.biases().items():
                self.aside[key], bias.data = bias.data, self.aside[key].to(bias)


def records(model: nn.Module) -> dict[str, Record]:
    """Return by name the adapters that were injected into ``model`` itself."""
    return vars(model).get("_fastlora", {})


def all_records(model: nn.Module) -> list[tuple[str, Record]]:
    """Return those that were injected into a part of ``model`` too."""
    return [row for module in model.modules() for row in records(module).items()]


def parameters_of(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """Return the parameters that belong to an adapter: those that train while it is active."""
    found = list(records(model)[adapter].biases().values())
    for module in _having(model, adapter):
        if isinstance(module, LoRALinear):
            found += [module.lora_A[adapter], module.lora_B[adapter]]
        else:
            found += module.modules_to_save[adapter].parameters()
    return found


def tensors_of(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return an adapter's tensors by their keys in a checkpoint, without PEFT's prefix."""
    record = records(model)[adapter]
    found, seen = {}, set()
    for name, module, owner in walk(model):
        if owner is not None or id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, LoRALinear) and adapter in module.r:
            found[f"{name}.lora_A.weight"] = module.lora_A[adapter]
            found[f"{name}.lora_B.weight"] = module.lora_B[adapter]
        elif isinstance(module, TrainableModule) and adapter in module.modules_to_save:
            for key, tensor in module.modules_to_save[adapter].state_dict().items():
                found[f"{name}.{key}"] = tensor
    return found | (record.biases() if record.in_place else record.aside)


# The model's modules.


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Yield (name, module, owner) below ``model``, a shared module under each of its names.

    LoRA layers are leaves. What is inside a `TrainableModule` has that one's name as its owner.
    """

    def visit(module, prefix, above):
        for part, child in module._modules.items():
            if child is None or id(child) in above:
                continue
            name = prefix if part in _WRAPPERS else f"{prefix}.{part}".lstrip(".")
            if child._modules.keys().isdisjoint(_WRAPPERS):
                yield name, child, None
            if isinstance(child, TrainableModule):
                for key, inner in child.original_module.named_modules(prefix=name):
                    if key != name:
                        yield key, inner, name
            elif not isinstance(child, LoRALinear):
                yield from visit(child, name, {*above, id(child)})

    return visit(model, "", {id(model)})


def is_merged(model: nn.Module) -> bool:
    """Return whether any layer has adapters merged into its weight."""
    return any(layer.merged for layer in _all(model, LoRALinear))


def adapter_names(model: nn.Module) -> list[str]:
    """Return the name of every adapter in ``model``, of layers replaced by hand too."""
    names = {name: None for layer in _all(model, LoRALinear) for name in layer.r}
    copies = {name: None for m in _all(model, TrainableModule) for name in m.modules_to_save}
    return list(names | copies)


def _known(model: nn.Module, names: str | Sequence[str]) -> tuple[str, ...]:
    names, known = (names,) if isinstance(names, str) else tuple(names), adapter_names(model)
    for name in names:
        if name not in known:
            raise ValueError(
                f"no adapter named {name!r}; adapters of this model: "
                f"{', '.join(map(repr, known)) or 'none'}"
            )
    if len(set(names)) != len(names):
        raise ValueError(f"adapter names must differ, got {list(names)}")
    return names


def _having(model: nn.Module, adapter: str) -> list[nn.Module]:
    layers = [layer for layer in _all(model, LoRALinear) if adapter in layer.r]
    return layers + [m for m in _all(model, TrainableModule) if adapter in m.modules_to_save]


def _all(model: nn.Module, kind: type) -> Iterator:
    return (module for module in model.modules() if isinstance(module, kind))
