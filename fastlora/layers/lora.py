# SPDX-License-Identifier: Apache-2.0
"""`LoRALinear`: a drop-in for ``nn.Linear`` with a low-rank adapter on a frozen weight."""

from __future__ import annotations

import copy
import functools
import math
import warnings
import weakref
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.functional import DTYPES, LARGEST
from fastlora.layers.active import ALL, Layer, lora_sum
from fastlora.layers.siblings import FrozenLinear, Group, handed
from fastlora.operator import weights
from fastlora.operator.eager import low_rank
from fastlora.operator.op import PLAIN

COMPILED = "is compiled by itself: replace first, then compile"
# What was merged, so that two layers of one weight do not merge into each other.
_merged: weakref.WeakSet[LoRALinear] = weakref.WeakSet()


class LoRALinear(nn.Linear):
    """``y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ`` (LoRA, Hu et al., arXiv:2106.09685).

    Parameters: ``weight`` [out, in] and ``bias`` [out], frozen; ``lora_A`` [r, in] and ``lora_B``
    [out, r]. Dropout is the child ``lora_dropout``, an ``nn.Dropout`` that is read at each call.
    A state dict without an adapter, such as the plain layer's, leaves the adapter as it is.

    ``scaling`` is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``
    (Kalajdzievski, arXiv:2312.03732). ``init_lora_weights``: True draws A Kaiming-uniform,
    "gaussian" with deviation 1 / r, both with B zero; False draws both, so that the layer differs
    from its base from the start. ``dtype`` is the base's; ``adapter_dtype`` defaults to float32
    under a bfloat16 or float16 base, as in PEFT, and to the base's dtype otherwise.
    Raises TypeError or ValueError naming the argument that no adapter can have.
    """

    # True when ``weight`` is stored [in, out], as in transformers' Conv1D.
    fan_in_fan_out = False
    _siblings: Group | None = None
    _quantised = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._adapt(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        bias: bool | None = None,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRALinear:
        """Return a layer that shares ``linear``'s weight and bias, which it freezes.

        ``linear`` is an ``nn.Linear``, also one that torchao has quantised, a ``Linear4bit`` or
        ``Linear8bitLt`` of bitsandbytes, or a transformers ``Conv1D``; hooks, training mode and
        other attributes come along, and the module itself is left as it is. The other arguments
        are the class's; ``bias``, ``device`` and ``dtype`` are ``linear``'s own. What is quantised
        cannot be merged.
        Raises TypeError for any other module, and ValueError where one of those three differs.
        """
        if why := unsupported(linear):
            raise TypeError(f"linear {why}")
        weight, device = linear.weight, device and torch.device(device)
        for name, asked, own in (
            ("bias", bias, (linear.bias is not None,)),
            ("device", device, (weight.device, torch.device(weight.device.type))),
            ("dtype", dtype, (weight.dtype,)),
        ):
            if asked is not None and asked not in own:
                raise ValueError(f"{name}={asked}, but linear's, which is shared, is {own[0]}")
        kind = _around(cls, type(linear)) if weights.is_linear(linear) else cls
        layer = kind.__new__(kind)
        for key, value in vars(linear).items():
            layer.__dict__[key] = copy.copy(value) if isinstance(value, (dict, set)) else value
        if is_conv1d(linear):
            layer.fan_in_fan_out = True
            layer.in_features, layer.out_features = weight.shape
        layer._adapt(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)
        return layer

    def _adapt(self, r, alpha, p, use_rslora, init, adapter_dtype) -> None:
        usual = default_adapter_dtype(self.weight.dtype)
        dtype = adapter_dtype or usual
        for name, value, kind, right, wanted in (
            ("r", r, int, lambda: r >= 1, "an int, 1 or more"),
            ("lora_alpha", alpha, Real, lambda: abs(alpha) <= LARGEST, "finite"),
            ("lora_dropout", p, Real, lambda: 0 <= p <= 1, "between 0 and 1"),
        ):
            typed = isinstance(value, kind) and not isinstance(value, bool)
            if not (typed and right()):
                error = ValueError if typed else TypeError
                raise error(f"{name} must be {wanted}, got {value!r:.40}")
        if type(init) not in (bool, str) or init not in (True, False, "gaussian"):
            raise ValueError(f"init_lora_weights must be a bool or 'gaussian', got {init!r:.40}")
        if dtype not in (self.weight.dtype, usual):
            raise TypeError(f"adapter_dtype must be {usual} or the base's, got {dtype!r:.40}")
        self.r, self.lora_alpha, self.init_lora_weights = r, alpha, init
        self.scaling = alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout = nn.Dropout(float(p)).train(self.training)
        like = {"device": self.weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **like))
        self._draw_adapter()
        # While merged: the weight as it was. Saved, as it tells that the other one is merged.
        self.register_buffer("base_weight", None)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def _draw_adapter(self) -> None:
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if not self.init_lora_weights:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    def reset_parameters(self) -> None:
        """Draw the weight, the bias and the adapter again, as at the start; nothing is merged."""
        super().reset_parameters()
        if "lora_A" in self._parameters:  # not while nn.Linear is made
            self.base_weight = None
            self._draw_adapter()

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., out] for input [..., in] in its dtype; see `fastlora.lora_linear`."""
        if (y := handed(self, input)) is not None:
            return y
        found = self.sibling_operands(input)
        if found is None:
            return F.linear(input, self._oriented(), self.bias)
        if type(found[0]) is weights.Quantised and not (self.training or torch.is_grad_enabled()):
            # In inference its library multiplies by it as it is.
            y, ((a, b, scaling, *_),) = super().forward(input), found[2]
            return y + low_rank(input, a, b, scaling, None, 0.0).to(y.dtype)
        return lora_sum(input, *found)

    def sibling_operands(self, x: Tensor) -> Layer | None:
        """Return weight, bias and adapter as the operator takes them, None while merged."""
        if self.merged:
            return None
        dropout = self.lora_dropout
        if not isinstance(dropout, (nn.Dropout, nn.Identity)):
            raise TypeError(f"lora_dropout must be an nn.Dropout, got {type(dropout).__name__}")
        p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        weight, adapter = self._oriented(), (self.lora_A, self.lora_B, self.scaling, p, ALL, None)
        if self._quantised or type(weight) not in PLAIN:
            found = weights.quantised(weight, x.dtype, self)
            if type(found) is not str:
                weight = found
            elif self._quantised or not weight.is_floating_point():
                raise TypeError(f"weight {found}")
        return weight, self.bias, [adapter]

    def _oriented(self) -> Tensor:
        return self.weight.t() if self.fan_in_fan_out else self.weight

    # Merging

    @property
    def merged(self) -> bool:
        """Whether the weight holds the adapter."""
        return self._buffers.get("base_weight") is not None

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return ``scaling · B A`` in float32 (float64 if they are), of the weight's shape."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        delta = (self.lora_B.to(dtype) @ self.lora_A.to(dtype)).mul_(self.scaling)
        return delta.t() if self.fan_in_fan_out else delta

    @torch.no_grad()
    def merge(self, safe: bool = False) -> None:
        """Add the adapter to the weight, so that forward costs the base product alone.

        In the weight's own memory: what shares it, such as a tied embedding, has it too. The weight
        as it was is kept, for `unmerge`, and saved as ``base_weight``: a state dict loads as merged
        or not as it was saved; unmerge() before what saves known keys alone, such as
        torch.distributed.checkpoint.
        Raises RuntimeError where the weight is no plain tensor of this layer's own, or merged
        already, and with ``safe`` ValueError where it would hold a NaN or an infinity.
        """
        if self.merged:
            raise RuntimeError("already merged: unmerge() first")
        weight = self._weight_to_write("merge")
        merged = self.delta_weight().add_(weight).to(weight.dtype)
        if safe and not torch.isfinite(merged).all():
            raise ValueError("merging would put NaN or infinity into the weight")
        self.base_weight = weight.detach().clone(memory_format=torch.preserve_format)
        _merged.add(self)
        weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Write the weight back as it was before `merge`; a layer that is not merged stays."""
        if self.merged:
            self._weight_to_write("unmerge").copy_(self.base_weight)
            self.base_weight = None

    def _weight_to_write(self, what: str) -> Tensor:
        weight = self._parameters.get("weight")
        others = [layer for layer in list(_merged) if layer is not self and layer.merged]
        if weight is None:
            why = "is computed: it is parametrized, pruned or weight-normalised"
        elif weight.is_meta or self.lora_A.is_meta:
            why = "is on the meta device: not made yet, or there for a forward alone (offloading)"
        elif self._quantised or type(weight) not in PLAIN:
            but = ", but quantised" if self._quantised else ""
            why = f"is a {type(weight).__name__}, not a plain tensor{but}"
        elif any(layer._parameters.get("weight") is weight for layer in others):
            why = "is shared with another layer that is merged: unmerge that one first"
        else:
            return weight
        raise RuntimeError(f"cannot {what}: the weight {why}")

    # State

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Become what the state says: merged with both weights, or unmerged."""
        own = {f"{prefix}{name}": p for name, p in self._parameters.items() if p is not None}
        base = state_dict.get(f"{prefix}base_weight")
        if f"{prefix}weight" in state_dict and base is not None and base.shape == self.weight.shape:
            self.base_weight = torch.empty_like(self.weight, requires_grad=False)
            _merged.add(self)
        elif self.merged and not own.keys().isdisjoint(state_dict):
            what = prefix or "the layer "
            warnings.warn(f"{what}is merged: unmerged for loading", stacklevel=2)
            self.unmerge()
        adapter = {key: p for key, p in own.items() if key.startswith(f"{prefix}lora_")}
        if adapter.keys().isdisjoint(state_dict):  # a base checkpoint: the adapter stays
            state_dict.update(adapter)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.merged:
            _merged.add(self)

    def extra_repr(self) -> str:
        own = f"r={self.r}, scaling={self.scaling:g}{', merged' if self.merged else ''}"
        return f"{super().extra_repr()}, {own}"


def default_adapter_dtype(base: torch.dtype) -> torch.dtype:
    """Return float32 for a base of 16 bits or less, as PEFT, and the base's own dtype otherwise."""
    return base if base in (torch.float32, torch.float64) else torch.float32


def is_conv1d(module: nn.Module) -> bool:
    """Return whether ``module`` is transformers' Conv1D, a linear layer stored [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def unsupported(module: nn.Module) -> str | None:
    """Return why ``module`` cannot become a `LoRALinear`, or None when it can."""
    kind = type(module)
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return f"must be an nn.Linear or a transformers Conv1D, got {kind.__name__}"
    quantised = weights.is_linear(module)
    plain = is_conv1d(module) or kind.forward in (nn.Linear.forward, FrozenLinear.forward)
    if not (plain or quantised) or "forward" in vars(module):  # as accelerate's hooks set one
        return f"is a {kind.__name__} with a forward of its own, not that of nn.Linear"
    if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "belongs to nn.MultiheadAttention, which reads its weight and never calls it"
    if module._compiled_call_impl is not None:
        return COMPILED
    weight = module._parameters.get("weight")
    if weight is None or "bias" not in module._parameters:
        return "computes its weight or bias (parametrized, pruned, weight-normalised)"
    if not quantised and type(weight.data) is Tensor and weight.dtype in DTYPES:
        return None
    found = weights.quantised(weight, torch.float32, module)
    return f"has a weight that {found}" if type(found) is str else None


@functools.cache
def _around(cls: type, kind: type) -> type:
    """Return the class for a layer whose weight a library has quantised and knows how to save."""
    return type(f"{cls.__name__}Of{kind.__name__}", (cls, kind), {"_quantised": True})
