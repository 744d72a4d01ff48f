# SPDX-License-Identifier: Apache-2.0
"""`FusedExperts`: PEFT's wrapper of 3-D expert weights, without folding adapters into them.

PEFT adds B A to the weights of all experts in every forward. Here the rows that an expert gets meet
its adapter, as in any other layer.
"""

import math
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as module_hooks

from fastlora.functional import DTYPES
from fastlora.layers import experts
from fastlora.layers.active import ALL, Adapter, Layer
from fastlora.layers.gated import is_observed
from fastlora.operator.op import PLAIN

# Implementations of transformers that compute what experts' own forward does, by other products.
_ALIKE = (None, "eager", "grouped_mm", "batched_mm")
# Experts that get as many rows each, by class; they read weights as [E, in, out].
_BATCHED = ("transformers.models.llama4.modeling_llama4.Llama4TextExperts",)


class FusedExperts:
    """The forward of PEFT's wrapper where it is fused, and of those of the same experts inside."""

    _expert_dropout = 0.0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the experts make of x [T, H] and of where the router sends it."""
        if not kwargs:
            found = operands(self)
            adapted = type(found) is tuple and any(adapters for *_, adapters in found[1:])
            if adapted and _suit(*found[:2], x, args):
                run = experts.routed if args else experts.batched
                return run(*found, self._expert_dropout if self.training else 0.0, x, *args)
        return super().forward(x, *args, **kwargs)


def _suit(module: nn.Module, up: Layer, x: Tensor, args: tuple) -> bool:
    """Return whether x and what the router says are what experts take."""
    weight = up[0]
    if not all(type(t) in PLAIN and t.device == weight.device for t in (x, *args)):
        return False
    wanted, whole = ([2], len(x) % len(weight) == 0) if _is_batched(module) else ([2] * 3, True)
    return whole and x.dtype in DTYPES and [t.dim() for t in (x, *args)] == wanted


def operands(layer: ParamWrapper) -> str | tuple[nn.Module, Layer, Layer]:
    """Return the experts and both of their projections, or why PEFT's own code has to run."""
    wrappers, module = [layer], layer._modules["base_layer"]
    while isinstance(module, ParamWrapper):
        wrappers.append(module)
        module = module._modules["base_layer"]
    batched = _is_batched(module)
    why = None if batched else _not_known(module)
    if (why is None and any(is_observed(m) for m in (*wrappers[1:], module))) or module_hooks():
        why = "its experts have hooks, or a forward of their own, and would not be called"
    if why is not None:
        return why
    up = "gate_up_proj" if batched or module.has_gate else "up_proj"
    own = module._parameters
    by_columns = batched or module.is_transposed
    layers = {}
    for name in (up, "down_proj"):
        weight, bias = own.get(name), None
        if not batched and module.has_bias:
            bias = own.get(f"{name}_bias")
        for what, t in (name, weight), (f"{name}_bias", bias):
            if t is None and what.endswith("_bias"):
                continue
            if type(t) not in PLAIN or t.dtype not in DTYPES:
                found = f"{type(t).__name__} of {getattr(t, 'dtype', None)}"
                return f"its {what} is a {found}, not a dense float"
            if t.requires_grad:
                return f"its {what} is trained"
        layers[name] = (weight.mT if by_columns else weight), bias, []
    for wrapper in wrappers:
        name = wrapper.parameter_name
        if name not in layers:
            return f"it adapts {name}, not experts' weights"
        if wrapper.merged_adapters or wrapper._disable_adapters:
            continue
        weight, _, adapters = layers[name]
        for active in wrapper.active_adapters:
            if active in wrapper.lora_A:
                found = _adapter(wrapper, active, weight, by_columns)
                if type(found) is str:
                    return f"adapter {active!r} {found}"
                adapters.append(found)
    return module, *layers.values()


def _is_batched(module: nn.Module) -> bool:
    return f"{type(module).__module__}.{type(module).__qualname__}" in _BATCHED


def name_of(path: str, layer: nn.Module) -> str:
    """Return what a LoRA layer is called: the parameter's name where it wraps one of experts."""
    if isinstance(layer, ParamWrapper):
        return f"{path.replace('.base_layer', '')}.{layer.parameter_name}".lstrip(".")
    return path or "the layer"


def _adapter(wrapper: ParamWrapper, name: str, weight: Tensor, by_columns: bool) -> str | Adapter:
    """Return an adapter as stacks [E, R, K] and [E, N, R], or what keeps it from being fused."""
    lora_A, lora_B = wrapper.lora_A[name], wrapper.lora_B[name]
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
        return f"has {type(lora_A).__name__} and {type(lora_B).__name__} for nn.Linear"
    if is_observed(lora_A) or is_observed(lora_B):
        return "has hooks on its own parts, which would not be called"
    a, b = lora_A._parameters.get("weight"), lora_B._parameters.get("weight")
    if type(a) not in PLAIN or type(b) not in PLAIN:
        return f"has weights of {type(a).__name__} and {type(b).__name__}"
    E, dtype = len(weight), weight.dtype
    takes = a.dtype == dtype or (dtype.itemsize == 2 and a.dtype.itemsize == 4)
    if a.dtype != b.dtype or not takes or a.device != weight.device:
        return f"is {a.dtype} and {b.dtype} on {a.device}, its experts {dtype} on {weight.device}"
    scaling = wrapper.scaling[name]
    if type(scaling) not in (int, float) or not math.isfinite(scaling):
        return f"is scaled by {scaling!r:.60}, no finite number"
    # Experts are outermost in lora_A and innermost in lora_B.
    a, b = a.unflatten(0, (E, -1)), b.unflatten(1, (-1, E)).permute(2, 0, 1)
    if wrapper._did_swap_in_out_features == by_columns:  # PEFT takes their rows for columns
        a, b = b.mT, a.mT
    return a, b, float(scaling), 0.0, ALL, None


def _not_known(module: nn.Module) -> str | None:
    kind = f"{type(module).__module__}.{type(module).__name__}"
    forward = getattr(type(module).forward, "__wrapped__", None)
    if forward is None or not hasattr(module, "_is_expert_parallel"):
        return f"its experts are a {kind}, which is not known"
    how = getattr(module.config, "_experts_implementation", None)
    if how not in _ALIKE:
        return f"its experts run by {how!r}"
    if module._is_expert_parallel:
        return "its experts are on several devices (expert parallelism)"
    if len(module._parameters.get("down_proj", ())) < 2:
        return "it has one expert"
    return None
