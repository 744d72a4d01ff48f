# SPDX-License-Identifier: Apache-2.0
"""`FusedLinear`: PEFT's LoRA layer with the fused forward; else PEFT's code."""

import functools
import importlib
import math
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as module_hooks

from fastlora.functional import DTYPES
from fastlora.layers import dora
from fastlora.layers.active import ALL, Adapter, Layer, lora_sum
from fastlora.layers.gated import may_differ
from fastlora.layers.lora import is_conv1d
from fastlora.layers.mixed import Block, Runs, runs_of
from fastlora.layers.siblings import FrozenLinear, Group, handed, separate
from fastlora.operator import weights
from fastlora.operator.op import PLAIN
from fastlora.peft import experts

_DROPOUTS = (nn.Identity, nn.Dropout)
_LIKE_WEIGHT = object()


class Fused:
    """The forward of PEFT's layers where they are fused, and nothing beside.

    Attributes, keys, merging and saving are those of the layer, which becomes fused, and again
    PEFT's, by its ``__class__`` alone. Whether a forward is fused is decided each time, as adapters
    come, go and change.
    """

    _siblings: Group | None = None
    _by_sample: Block | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return [..., out] for x [..., in], in the dtype of the base layer's output."""
        mixed = self._by_sample is not None or "adapter_names" in kwargs
        if mixed and (y := _mixed(self, x, *args, **kwargs)) is not None:
            return y
        if not (args or kwargs or self._disable_adapters or self.merged_adapters):
            if self._siblings is not None and (y := handed(self, x)) is not None:
                return y
            found = operands(self, x)
            if type(found) is tuple and found[2]:
                return lora_sum(x, *found)
        return super().forward(x, *args, **kwargs)

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode; norms of DoRA that were kept are made again."""
        for magnitude in self.lora_magnitude_vector.values():
            dora.forget(magnitude)
        return super().train(mode)

    def sibling_operands(self, x: Tensor) -> Layer | None:
        """Return what `siblings` computes with, None while PEFT's own code has to run."""
        if self._disable_adapters or self.merged_adapters:
            return None
        block = _block(self)
        found = operands(self, x, None if block is None else block.runs(x))
        if type(found) is not tuple or type(found[0]) is weights.Opaque:
            return None
        return found if found[1] is self._modules["base_layer"].bias else None


@torch.compiler.disable
def _mixed(layer: Fused, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return what a layer whose samples differ in adapters makes of x, None for PEFT's code."""
    block, names = _block(layer), kwargs.pop("adapter_names", None)
    if layer._disable_adapters or (block is None and (args or kwargs or layer.merged_adapters)):
        return None
    if args or kwargs or layer.merged_adapters:
        raise ValueError("adapters_by_sample(): a layer is merged, or has other arguments than x")
    if names is not None:
        layer._check_forward_args(x, adapter_names=names)
        each = x.shape[1:-1].numel()
        runs = runs_of([None if n == "__base__" else n for n in names], [each] * len(names))
    elif block is None:
        return None
    else:
        y = None if layer._siblings is None else handed(layer, x)
        if y is not None:
            return y
        runs = block.runs(x)
    found = operands(layer, x, runs)
    if type(found) is tuple:
        return lora_sum(x, *found)
    if names is None:
        raise ValueError(f"adapters_by_sample(): adapters cannot be mixed in a layer: {found}")
    return None


def _block(layer: Fused) -> Block | None:
    """Return the block of `adapters_by_sample` that a layer is in, or whose checkpoint it is."""
    block = layer._by_sample
    if block is not None and block.ended and torch._C._current_graph_task_id() == -1:
        layer._by_sample = block = None
    return block


class _Fusing:
    """For PEFT's tuners: new layers are fused, and the model is plain once it is unloaded."""

    _expert_dropout = 0.0

    def _create_new_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        return fuse(super()._create_new_module(*args, **kwargs), self._expert_dropout)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        separate(model)
        return model


# What stands in for which class of PEFT's, by names: that may need a library that is not there.
_STAND_INS = {
    "FusedModel": (_Fusing, "peft.tuners.lora.model", "LoraModel"),
    "FusedMixedModel": (_Fusing, "peft.tuners.mixed.model", "MixedModel"),
    "FusedLinear": (Fused, "peft.tuners.lora.layer", "Linear"),
    # PEFT knows this one by its name.
    "ParamWrapper": (experts.FusedExperts, "peft.tuners.lora.layer", "ParamWrapper"),
    "FusedLinear4bit": (Fused, "peft.tuners.lora.bnb", "Linear4bit"),
    "FusedLinear8bitLt": (Fused, "peft.tuners.lora.bnb", "Linear8bitLt"),
    "FusedTorchaoLoraLinear": (Fused, "peft.tuners.lora.torchao", "TorchaoLoraLinear"),
    "FusedHqqLoraLinear": (Fused, "peft.tuners.lora.hqq", "HqqLoraLinear"),
    "FusedGPTQLoraLinear": (Fused, "peft.tuners.lora.gptq", "GPTQLoraLinear"),
    "FusedAwqLoraLinear": (Fused, "peft.tuners.lora.awq", "AwqLoraLinear"),
}


@functools.cache
def __getattr__(name: str) -> type:  # by which pickle finds them too
    if name not in _STAND_INS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    ours, module, kind = _STAND_INS[name]
    own = getattr(importlib.import_module(module), kind)
    about = {"__module__": __name__, "__doc__": f"PEFT's ``{kind}``.", "_stands_for": own}
    return type(name, (ours, own), about)


def _stand_in(kind: type) -> type | None:
    """Return the class that stands in for one of PEFT's, None for one that has none."""
    own = [kind.__module__, kind.__qualname__]
    return next((__getattr__(name) for name, (_, *of) in _STAND_INS.items() if of == own), None)


def fuse(module: nn.Module, expert_dropout: float | None = None) -> nn.Module:
    """Have a layer or a tuner of PEFT's run the fused code where it can; return it."""
    fused = _stand_in(type(module))
    if fused is not None:
        module.__class__ = fused
        base = module._modules.get("base_layer")
        if type(base) is FrozenLinear:  # the layer takes its place among its siblings
            base.__class__ = nn.Linear
            module._siblings = vars(base).pop("_siblings", None)
    if expert_dropout is not None and isinstance(module, (experts.FusedExperts, _Fusing)):
        module._expert_dropout = float(expert_dropout)
    return module


def registered_layer(
    target: nn.Module, adapter_name: str, config: Any, **kwargs: Any
) -> nn.Module | None:
    """Return a fused layer around a plain linear one; None leaves the target to PEFT."""
    if _is_plain(target) and _is_dense(target.weight):
        return fuse(lora.layer.dispatch_default(target, adapter_name, config=config, **kwargs))
    return None


def why_not(layer: nn.Module) -> str | None:
    """Return why PEFT's own code runs in ``layer``'s forward as it stands, or None: it is fused.

    For an input of the weight's dtype. Merged or disabled adapters are no reason: then there is
    only the base layer to run.
    """
    of_experts = isinstance(layer, lora.layer.ParamWrapper)
    if not (of_experts or isinstance(layer, Fused) or _stand_in(type(layer))):
        others = "bitsandbytes, torchao, HQQ, GPTQ or AWQ"
        return f"{_kind(layer)}, not PEFT's plain lora.Linear, nor one of {others}"
    if "forward" in layer.__dict__:
        return "it has a forward set on the object, as accelerate's hooks and X-LoRA do"
    found = experts.operands(layer) if of_experts else operands(layer)
    return found if isinstance(found, str) else None


def operands(
    layer: lora.Linear, x: Any = _LIKE_WEIGHT, runs: Runs | None = None
) -> str | tuple[Tensor, Tensor | None, list[Adapter]]:
    """Return weight [N, K], bias [N] and active adapters, or why PEFT's own code has to run.

    For an input ``x``, or one of the weight's dtype and device; with ``runs`` not the active ones,
    but those that are named for their rows. Each call of the layer pays for
    this: members are read from their dictionaries, as the way through a module's attributes would
    take longer than the operator does.
    """
    parts = layer._modules
    base = parts["base_layer"]
    linear = type(base) is nn.Linear
    opaque = not linear and weights.is_opaque(base)
    theirs = opaque or (not linear and weights.is_linear(base))
    if not (linear or theirs or _is_plain(base)):
        return f"its base layer is {_kind(base)}, not a plain nn.Linear or Conv1D"
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias", base)
    if theirs:
        bias = None if opaque else getattr(base, "bias", None)
    elif bias is base:
        return "its base layer's bias is no parameter"
    quantised = theirs or not _is_dense(weight)
    if quantised:
        own = getattr(layer, "_by_sample", None) is not None or layer.lora_variant
        weight = _quantised(base, weight, x, bool(own))
        if type(weight) is str:
            return f"its weight {weight}"
    if _is_observed(base) or module_hooks():
        return "its base layer has hooks, or a forward of its own, and would not be called"
    dtype, device = weight.dtype, weight.device
    autocast = torch._C._is_any_autocast_enabled() and device.type != "meta"
    autocast = autocast and torch.is_autocast_enabled(device.type)
    if autocast and quantised:  # whose output is in the dtype of x in any case
        autocast = False
        if dtype != torch.get_autocast_dtype(device.type):
            return f"its weight is quantised, and a product in {dtype} is to be cast by autocast"
    if x is not _LIKE_WEIGHT and not _suits(x, dtype, device, autocast):
        found = f"{type(x).__name__} of {getattr(x, 'dtype', None)}"
        return f"its input is a {found}, not a dense {dtype} on {device}"
    if bias is not None and bias.dtype != dtype and not autocast:
        return f"its weight is {dtype}, its bias {bias.dtype}"
    active, adapters = layer._active_adapter, []
    factors = parts["lora_A"]._modules
    if runs is not None:
        return _of_runs(layer, weight, bias, runs, autocast)
    for name in (active,) if isinstance(active, str) else active:
        if name not in factors:
            continue
        found = _adapter(layer, name, weight, autocast)
        if type(found) is str:
            return f"adapter {name!r} {found}"
        adapter, extra = found
        adapters.append(adapter)
        if extra is not None:
            extra = extra * adapter[2]
            bias = extra if bias is None else bias + extra
    if len(adapters) > 1 and any(of is not None for *_, of in adapters):
        return "several adapters are active, and some are DoRA's, which apply one after another"
    return weight if linear or not is_conv1d(base) else weight.t(), bias, adapters


def _of_runs(layer: lora.Linear, weight: Any, bias: Tensor | None, runs: Runs, autocast: bool):
    """Return what `operands` does for adapters of some rows each."""
    known, adapters = {}, []
    for name, rows in runs:
        if name not in layer.lora_A:  # None, for the base, or of other layers
            continue
        if name not in known:
            known[name] = _adapter(layer, name, weight, autocast)
        found = known[name]
        if type(found) is str:
            return f"adapter {name!r} {found}"
        if found[1] is not None:
            return f"adapter {name!r} has a bias"
        if found[0][5] is not None:
            return f"adapter {name!r} is a variant of LoRA (DoRA)"
        adapters.append((*found[0][:4], rows, None))
    return weight.t() if is_conv1d(layer.base_layer) else weight, bias, adapters


def _adapter(
    layer: lora.Linear, name: str, weight: Tensor, autocast: bool
) -> str | tuple[Adapter, Tensor | None]:
    """Return an adapter and the bias of its lora_B, or what keeps it from being fused."""
    magnitude = None
    if name in layer.lora_variant:
        kind = type(layer.lora_variant[name]).__name__
        if kind != "DoraLinearVariant" or type(weight) is weights.Opaque:
            of = " on a layer that alone knows its weight" if kind == "DoraLinearVariant" else ""
            return f"is a variant of LoRA ({kind}){of}"
        magnitude = layer.lora_magnitude_vector[name]
    parts = layer._modules
    down, up = parts["lora_A"]._modules[name], parts["lora_B"]._modules.get(name)
    dropout = parts["lora_dropout"]._modules.get(name)
    if type(down) is not nn.Linear or type(up) is not nn.Linear:
        return f"has {_kind(down)} and {_kind(up)} for nn.Linear"
    if type(dropout) not in _DROPOUTS:
        return f"drops by {_kind(dropout)}"
    if _is_observed(down) or _is_observed(up) or _is_observed(dropout):
        return "has hooks on its own parts, which would not be called"
    a, b = down._parameters.get("weight"), up._parameters.get("weight")
    if type(a) not in PLAIN or type(b) not in PLAIN:
        return f"has weights of {type(a).__name__} and {type(b).__name__}"
    dtype, device, own = weight.dtype, weight.device, a.dtype
    if not a.device == b.device == device:
        return f"is on {a.device}, its base layer on {device}"
    takes = own == dtype or (own == torch.float32 and dtype.itemsize == 2)
    if autocast:
        takes = torch.float64 not in (dtype, own)
    if b.dtype != own or not takes:
        return f"is {own} and {b.dtype} on a base of {dtype}"
    if own != dtype and not layer.cast_input_dtype_enabled:
        return f"is {own}, and the input is not to be cast from {dtype}"
    if down._parameters["bias"] is not None:
        return "has a bias between its factors"
    extra = up._parameters["bias"]
    if extra is not None and extra.dtype != dtype:
        return f"has a bias of {extra.dtype} on a base of {dtype}"
    scaling = layer.scaling.get(name)
    if type(scaling) is int:
        scaling = float(scaling)
    if type(scaling) in PLAIN:
        scales = scaling.dim() == 0 and scaling.device.type in (device.type, "cpu")
    else:  # PEFT also takes arrays, and numbers of NumPy
        scales = type(scaling) is float and -math.inf < scaling < math.inf
    if not scales:
        return f"is scaled by {scaling!r:.60}, no finite number"
    p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    if magnitude is not None:
        m = magnitude.weight
        if type(m) not in PLAIN or (m.dtype, m.device) != (own, device):
            return f"has a magnitude of {type(m).__name__}, {m.dtype} on {m.device}"
        if _is_observed(magnitude):
            return "has hooks on its magnitude, which would not be called"
        if extra is not None:
            return "is a variant of LoRA (DoRA) with a bias"
        p = p if layer.training else 0.0  # as PEFT asks
    return (a, b, scaling, p, ALL, magnitude), extra


def _quantised(base: nn.Module, weight: Any, x: Any, mixed: bool) -> weights.Quantised | str:
    """Return the weight of a quantised layer for a product as the layer would compute it."""
    known = mixed or x is _LIKE_WEIGHT or base.training or torch.is_grad_enabled()
    if not (known or weights.is_opaque(base)):
        return "is quantised, and in inference its library multiplies by it as it is"
    like = None if x is _LIKE_WEIGHT else x.dtype
    own = getattr(base, "compute_dtype", None)
    dtype = own if getattr(base, "compute_type_is_set", False) else like or own
    if dtype is None:  # int8 weights keep none of their own
        bias = getattr(base, "bias", None)
        kept = getattr(weight if bias is None else bias, "dtype", None)
        dtype = like or (kept if kept in DTYPES else torch.bfloat16)
    return weights.quantised(weight, dtype, base)


def _is_plain(base: nn.Module) -> bool:
    return type(base) in (nn.Linear, FrozenLinear) or is_conv1d(base)  # and no subclass of one


def _is_dense(weight: Any) -> bool:
    return type(weight) in PLAIN and weight.dtype in DTYPES


def _suits(x: Any, dtype: torch.dtype, device: torch.device, autocast: bool) -> bool:
    """Return whether the operator takes this input, where PEFT would too."""
    return (
        type(x) in PLAIN
        and x.device == device
        and (x.dtype == dtype or (autocast and x.is_floating_point() and x.dtype != torch.float64))
        and x.layout is torch.strided
        and not x.is_nested
        and not torch.jit.is_tracing()
    )


def _is_observed(m: nn.Module) -> bool:
    """Return whether someone would see that ``m`` itself is not called."""
    return bool(m._forward_hooks or may_differ(m))


def _kind(module: nn.Module) -> str:
    return f"a {type(module).__module__}.{type(module).__name__}"
