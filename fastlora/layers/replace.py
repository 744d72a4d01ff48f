# SPDX-License-Identifier: Apache-2.0
"""`LoRALinear` in a model: `replace_linears` puts it there, `lora_state_dict` is what to save."""

import re
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from fastlora.layers import siblings
from fastlora.layers.classes import unwrapped
from fastlora.layers.lora import COMPILED, LoRALinear, unsupported
from fastlora.layers.report import PatchReport, counted

Which = Collection[str] | str | Callable[[str, nn.Module], bool]

# Parts of names that wrappers of modules add.
_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")
# Kinds of modules that a model may not hold. What DDP and FSDP hold is synchronised as they met it.
_REFUSED = {
    "DistributedDataParallel": "replace first, then wrap it",
    "FullyShardedDataParallel": "replace first, then wrap it",
    "BaseTunerLayer": "patch_peft() fuses PEFT's layers as they are",
}


def replace_linears(
    model: nn.Module, names: Which, *, fuse_siblings: siblings.How = False, **same: Any
) -> PatchReport:
    """Put `LoRALinear` in the place of linear layers of ``model``, in place; freeze the rest.

    ``names`` selects modules: a list of names, whole or their last parts (``["q_proj"]``); a
    regular expression that matches whole names; or a function of a name and a module. A module
    under several names stays one. ``same`` are the arguments of `LoRALinear.from_linear`. The
    adapters of LoRALinears that are there already stay as they are.
    With ``fuse_siblings`` layers that are called with the same tensor, such as q, k and v, run as
    one operator, the frozen ``nn.Linear`` among them included; see `patch_peft` for its values.

    Returns what was replaced, and what was selected but not, with the reason.
    Raises ValueError where nothing would be replaced, and ValueError or TypeError for arguments
    that are wrong. The model is then as it was.
    """
    outer, model = model, unwrapped(model)
    for name, module in outer.named_modules():
        for kind in {kind.__name__ for kind in type(module).__mro__} & _REFUSED.keys():
            raise ValueError(f"{name or 'model'} is a {kind}: {_REFUSED[kind]}")
    if unsupported(model) is None:
        raise ValueError("model is one linear layer: LoRALinear.from_linear() takes it")
    selected, unknown = _selected(model, names)
    compiled = {module._modules.get("_orig_mod") for module in model.modules()}
    report = PatchReport([], [(name, "no module has this name") for name in unknown])
    old: dict[int, nn.Module] = {}
    for name, module in selected:
        # It is called through its wrapper, which would go on calling it.
        why = COMPILED if module in compiled else unsupported(module)
        if why is not None:
            report.not_fused.append((name, why))
        elif id(module) not in old:
            report.fused.append(name)
            old[id(module)] = module
    if not old:
        others = [(name, m) for name, m in model.named_modules() if m not in compiled]
        able = counted(name for name, m in others if unsupported(m) is None)
        able = f"what could be replaced: {able or 'nothing'}"
        raise ValueError(f"names={names!r:.300} replaces nothing: {report}\n  {able}")
    adapted = [m for m in model.modules() if id(m) in old or isinstance(m, LoRALinear)]
    groups = siblings.find(model, fuse_siblings, adapted)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        new = {key: LoRALinear.from_linear(module, **same) for key, module in old.items()}
    except BaseException:
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    adapters = _adapters(model)
    for parameter in trained:
        parameter.requires_grad_(id(parameter) in adapters)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = new.get(id(child), child)
    for parent in model.modules():
        encoder = isinstance(parent, (nn.TransformerEncoder, nn.TransformerEncoderLayer))
        if encoder and any(isinstance(module, LoRALinear) for module in parent.modules()):
            # Its inference kernel would read weights past the adapters; these are its switches.
            parent.activation_relu_or_gelu, parent.use_nested_tensor = 0, False
    siblings.make(groups, report)
    return report


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters of a model's LoRALinears by their names in it: what there is to save.

    The same tensors, not copies. ``model.load_state_dict(..., strict=False)`` takes them.
    Raises ValueError where there is no LoRALinear, or where an adapter is on the meta device.
    """
    model = unwrapped(model)
    adapters, found = _adapters(model), {}
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no LoRALinear; replace_linears() makes some")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if adapters.pop(id(tensor), None) is not None:  # once, whatever its names
            if tensor.is_meta:
                raise ValueError(f"{name} is on the meta device: offloaded, or not made yet")
            found[name] = tensor.detach()
    return found


def _adapters(model: nn.Module) -> dict[int, Tensor]:
    """Return the adapters' parameters by id."""
    layers = (module for module in model.modules() if isinstance(module, LoRALinear))
    return {id(p): p for layer in layers for name, p in layer.named_parameters() if "lora_" in name}


def _selected(model: nn.Module, names: Which) -> tuple[list[tuple[str, nn.Module]], list[str]]:
    """Return the modules that ``names`` selects, by their names, and what in it selects none."""
    named = [
        (".".join(part for part in path.split(".") if part not in _WRAPPERS), module)
        for path, module in model.named_modules(remove_duplicate=False)
        if path and module._modules.keys().isdisjoint(_WRAPPERS)
    ]
    if callable(names):
        return [each for each in named if names(*each)], []
    if isinstance(names, str):
        try:
            pattern = re.compile(names)
        except re.error as error:
            raise ValueError(f"names={names!r:.200} is no regular expression: {error}") from None
        return [each for each in named if pattern.fullmatch(each[0])], []
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        right = "a list of names, a regular expression or a function"
        raise TypeError(f"names must be {right}, got {names!r:.100}")
    ends = tuple(f".{name}" for name in names)
    unknown = [end[1:] for end in ends if not any(f".{name}".endswith(end) for name, _ in named)]
    return [each for each in named if f".{each[0]}".endswith(ends)], unknown
