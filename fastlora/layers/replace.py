# SPDX-License-Identifier: Apache-2.0
"""`LoRALinear` in a model: `replace_linears` puts it there, `lora_state_dict` is what to save."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from fastlora.layers import siblings
from fastlora.layers.classes import unwrapped
from fastlora.layers.lora import LoRALinear, is_conv1d, unsupported
from fastlora.layers.report import PatchReport, counted

Which = Collection[str] | str | Callable[[str, nn.Module], bool]

# Parts of names that wrappers of modules add.
_WRAPPERS = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")
_PEFT_LAYER = "peft.tuners.tuners_utils.BaseTunerLayer"
_SPREAD = {
    "torch.nn.parallel.distributed.DistributedDataParallel",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
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
    model = _replaceable(model)
    selected, left = _selected(model, names)
    compiled = {id(m._modules.get("_orig_mod")) for m in model.modules()}
    old: dict[int, nn.Module] = {}
    report = PatchReport([], left)
    for name, module in selected:
        why = unsupported(module)
        if id(module) in compiled:
            why = "is compiled by itself: replace first, then compile"
        if why is None:
            report.fused.append(name)
            old[id(module)] = module
        else:
            left.append((name, why))
    if not old:
        raise ValueError(f"names={names!r:.300} replaces nothing: {report}\n  {_linears(model)}")
    groups = []
    if fuse_siblings is not False:
        adapted = [m for m in model.modules() if id(m) in old or isinstance(m, LoRALinear)]
        groups = siblings.find(model, fuse_siblings, adapted)
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        new = {key: LoRALinear.from_linear(module, **same) for key, module in old.items()}
    except BaseException:
        for parameter, value in required:
            parameter.requires_grad_(value)
        raise
    adapters = _adapters(model)
    for parameter, _ in required:
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[name] = new[id(child)]
    _keep_off_fast_path(model)
    siblings.make(groups, report)
    return report


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters of a model's LoRALinears by their names in it: what there is to save.

    The same tensors, not copies. ``model.load_state_dict(..., strict=False)`` takes them.
    Raises ValueError where there is no LoRALinear, or where an adapter is on the meta device.
    """
    model = unwrapped(model)
    own, found = _adapters(model), {}
    if not own:
        raise ValueError(f"{type(model).__name__} has no LoRALinear; replace_linears() makes some")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in own:
            own.remove(id(tensor))  # once, whatever its names
            if tensor.is_meta:
                raise ValueError(f"{name} is on the meta device: offloaded, or not made yet")
            found[name] = tensor.detach()
    return found


def _adapters(model: nn.Module) -> set[int]:
    """Return the ids of the adapters' parameters."""
    layers = (module for module in model.modules() if isinstance(module, LoRALinear))
    return {id(p) for layer in layers for name, p in layer.named_parameters() if "lora_" in name}


def _replaceable(model: nn.Module) -> nn.Module:
    """Return the model that torch.compile holds, or raise where no layer can be replaced."""
    inner = unwrapped(model)
    for name, module in model.named_modules():
        kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__}
        if spread := kinds & _SPREAD:  # it would never synchronise what comes now
            what = spread.pop().rpartition(".")[2]
            raise ValueError(f"{name or 'model'} is in {what}: replace first, then wrap it")
        if _PEFT_LAYER in kinds:
            raise ValueError(f"{name!r} is a layer of PEFT's: patch_peft() fuses it as it is")
    if _is_linear(inner):
        raise ValueError("model is one linear layer: LoRALinear.from_linear() takes it")
    return inner


def _selected(
    model: nn.Module, names: Which
) -> tuple[list[tuple[str, nn.Module]], list[tuple[str, str]]]:
    """Return the modules that ``names`` selects, each by its first name; and what selects none."""
    named = []
    for path, module in model.named_modules(remove_duplicate=False):
        name = ".".join(part for part in path.split(".") if part not in _WRAPPERS)
        if name and module._modules.keys().isdisjoint(_WRAPPERS):
            named.append((name, module))
    unknown = []
    if isinstance(names, str):
        try:
            pattern = re.compile(names)
        except re.error as error:
            raise ValueError(f"names={names!r:.200} is no regular expression: {error}") from None
        chosen = [pattern.fullmatch(name) is not None for name, _ in named]
    elif callable(names):
        chosen = [bool(names(name, module)) for name, module in named]
    elif isinstance(names, Collection) and all(isinstance(name, str) for name in names):
        ends = [{name.split(".", i)[-1] for i in range(name.count(".") + 1)} for name, _ in named]
        chosen = [not each.isdisjoint(names) for each in ends]
        known = set().union(*ends)
        unknown = [(name, "no module has this name") for name in names if name not in known]
    else:
        raise TypeError(
            f"names must be a list of names, a regular expression or a function, got {names!r:.100}"
        )
    first = {id(module): name for name, module in reversed(named)}
    found = {id(m): m for (_, m), take in zip(named, chosen, strict=True) if take}
    return [(first[key], module) for key, module in found.items()], unknown


def _linears(model: nn.Module) -> str:
    """Return what the linear layers of a model are called."""
    names = [name for name, module in model.named_modules() if _is_linear(module)]
    return f"the model's linear layers are {counted(names) or 'none'}"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _keep_off_fast_path(model: nn.Module) -> None:
    """Have PyTorch's encoder call its layers: its inference kernel only reads their weights."""
    encoders = nn.TransformerEncoder, nn.TransformerEncoderLayer
    for module in model.modules():
        if isinstance(module, encoders) and _adapters(module):
            module.activation_relu_or_gelu = 0  # the layer's switch
            module.use_nested_tensor = False  # the encoder's
