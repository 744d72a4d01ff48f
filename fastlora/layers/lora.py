# SPDX-License-Identifier: Apache-2.0
"""`LoRALinear`: a drop-in for ``nn.Linear`` with a low-rank adapter on a frozen weight."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.functional import DTYPES, LARGEST, lora_linear
from fastlora.layers.active import Adapter
from fastlora.layers.siblings import FrozenLinear, Group, Layer, handed

INIT_METHODS = (True, False, "gaussian")

# What is merged, so that two layers of one weight do not merge into each other.
_merged: weakref.WeakSet[LoRALinear] = weakref.WeakSet()


class LoRALinear(nn.Linear):
    """``y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ`` (LoRA, Hu et al., arXiv:2106.09685).

    Parameters: ``weight`` [out, in] and ``bias`` [out], frozen; ``lora_A`` [r, in] and ``lora_B``
    [out, r]. Dropout is the child ``lora_dropout``, an ``nn.Dropout``, whose ``p`` and mode are
    read at each call. A state dict without an adapter, such as that of the plain layer, loads and
    leaves the adapter as it is.

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
        self._add_adapter(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)

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

        ``linear`` is an ``nn.Linear`` or a transformers ``Conv1D``; hooks, training mode and
        other attributes come along, and the module itself is left as it is. The other arguments
        are the class's; ``bias``, ``device`` and ``dtype`` are ``linear``'s own.
        Raises TypeError for any other module, and ValueError where one of those three differs.
        """
        why = unsupported(linear)
        if why is not None:
            raise TypeError(f"linear {why}")
        _check_shared(linear, bias, device, dtype)
        layer = cls.__new__(cls)
        for key, value in vars(linear).items():
            layer.__dict__[key] = copy.copy(value) if isinstance(value, (dict, set)) else value
        if is_conv1d(linear):
            layer.fan_in_fan_out = True
            layer.in_features, layer.out_features = linear.weight.shape
        layer._add_adapter(
            r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype
        )
        return layer

    def _add_adapter(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        init_lora_weights: bool | str,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        _check_hyperparameters(r, lora_alpha, lora_dropout, init_lora_weights)
        base, device = self.weight.dtype, self.weight.device
        dtype = adapter_dtype or default_adapter_dtype(base)
        if dtype not in (base, default_adapter_dtype(base)):
            raise TypeError(
                f"adapter_dtype must be the base's {base} or, under a 16-bit base, torch.float32; "
                f"got {dtype}"
            )
        self.r, self.lora_alpha, self.init_lora_weights = r, lora_alpha, init_lora_weights
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout = nn.Dropout(lora_dropout).train(self.training)
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, device=device, dtype=dtype))
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
        if self.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B)

    def reset_parameters(self) -> None:
        """Draw the weight, the bias and the adapter again, as at the start; nothing is merged."""
        super().reset_parameters()
        if "lora_A" in self._parameters:  # not while nn.Linear is made
            self.base_weight = None
            self._draw_adapter()

    # Forward

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., out] for input [..., in] in its dtype; see `fastlora.lora_linear`."""
        y = handed(self, input)
        if y is not None:
            return y
        if self.merged:
            return F.linear(input, self._oriented(), self.bias)
        ((a, b, scaling, p),) = self.adapters()
        return lora_linear(
            input, self._oriented(), a, b, self.bias, scaling=scaling, dropout_p=p, training=p > 0.0
        )

    def adapters(self) -> list[Adapter]:
        """Return the adapter as the operator takes it, in a list; an empty one while merged."""
        if self.merged:
            return []
        dropout = self.lora_dropout
        if not isinstance(dropout, (nn.Dropout, nn.Identity)):
            raise TypeError(f"lora_dropout must be an nn.Dropout, got {type(dropout).__name__}")
        p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        return [(self.lora_A, self.lora_B, self.scaling, p)]

    def sibling_operands(self, x: Tensor | None = None) -> Layer | None:
        """Return what `siblings` computes with, None while the weight alone is used."""
        adapters = self.adapters()
        return (self._oriented(), self.bias, adapters) if adapters else None

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

        It is written into the weight's own memory: whatever shares the weight, such as a tied
        embedding, has the merged one from then on. A copy of the weight as it was is kept beside,
        from which `unmerge` restores every bit. It is saved too, as ``base_weight``, and a state
        dict loads as merged or not as it was saved. What takes known keys alone, such as
        torch.distributed.checkpoint, would leave it out: unmerge() before that saves.
        Raises RuntimeError where the weight is no plain tensor of this layer's own, or merged
        already, and with ``safe`` ValueError where it would hold a NaN or an infinity.
        """
        if self.merged:
            raise RuntimeError("already merged: unmerge() first")
        weight = self._weight_to_write("merge")
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        merged = merged.add_(self.delta_weight()).to(weight.dtype)
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
        if weight is None:
            why = "is computed: it is parametrized, pruned or weight-normalised"
        elif weight.is_meta or self.lora_A.is_meta:
            why = "is on the meta device: not made yet, or there for a forward alone (offloading)"
        elif type(weight.data) is not Tensor:
            why = f"is a {type(weight.data).__name__}, not a plain tensor"
        elif any(self._is_shared_with(other) for other in list(_merged)):
            why = "is shared with another layer that is merged: unmerge that one first"
        else:
            return weight
        raise RuntimeError(f"cannot {what}: the weight {why}")

    def _is_shared_with(self, other: LoRALinear) -> bool:
        same = other._parameters.get("weight") is self._parameters["weight"]
        return same and other.merged and other is not self

    # State

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Become what the state says: merged with both weights, or unmerged."""
        weight, base = (state_dict.get(f"{prefix}{name}") for name in ("weight", "base_weight"))
        saved_merged = weight is not None and base is not None and base.shape == self.weight.shape
        if self.merged and any(f"{prefix}{name}" in state_dict for name in self._parameters):
            if not saved_merged:
                what = prefix or "the layer "
                warnings.warn(f"{what}is merged: unmerged for loading", stacklevel=2)
            self.unmerge()
        if saved_merged:
            self.base_weight = torch.empty_like(self.weight, requires_grad=False)
            _merged.add(self)
        own = {f"{prefix}{name}": self._parameters.get(name) for name in ("lora_A", "lora_B")}
        if own.keys().isdisjoint(state_dict):  # a base checkpoint: the adapter stays
            state_dict.update((key, value) for key, value in own.items() if value is not None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.merged:
            _merged.add(self)

    def extra_repr(self) -> str:
        merged = ", merged" if self.merged else ""
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}{merged}"


def default_adapter_dtype(base: torch.dtype) -> torch.dtype:
    """Return float32 for a 16-bit base, as PEFT does, and the base's own dtype otherwise."""
    return torch.float32 if base in (torch.bfloat16, torch.float16) else base


def is_conv1d(module: nn.Module) -> bool:
    """Return whether ``module`` is transformers' Conv1D, a linear layer stored [in, out]."""
    return (
        type(module).__name__ == "Conv1D"
        and type(module).__module__ == "transformers.pytorch_utils"
    )


def unsupported(module: nn.Module) -> str | None:
    """Return why ``module`` cannot become a `LoRALinear`, or None when it can."""
    kind = type(module)
    if isinstance(module, LoRALinear):
        return "is a LoRALinear already"
    if not is_conv1d(module):
        if not isinstance(module, nn.Linear):
            return f"must be an nn.Linear or a transformers Conv1D, got {kind.__name__}"
        if kind.forward is not nn.Linear.forward and kind is not FrozenLinear:
            return f"is a {kind.__name__}, whose forward is not that of nn.Linear"
        if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
            return "belongs to nn.MultiheadAttention, which reads its weight and never calls it"
    if "forward" in vars(module):  # it would be copied, and run in place of LoRALinear's
        return "has a forward set on the object itself, as accelerate's hooks do"
    if module._compiled_call_impl is not None:
        return "is compiled by itself: replace first, then compile"
    weight = module._parameters.get("weight")
    if weight is None or "bias" not in module._parameters:
        return "computes its weight or bias (parametrized, pruned, weight-normalised)"
    if weight.dtype not in DTYPES or type(weight.data) is not Tensor:
        return f"has a weight of {type(weight.data).__name__} {weight.dtype}, not a dense float"
    return None


def _check_shared(
    linear: nn.Module,
    bias: bool | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    own = linear.weight.device
    if bias is not None and bias != (linear.bias is not None):
        has = "has no bias" if linear.bias is None else "has a bias"
        raise ValueError(f"bias={bias}, but the linear layer, whose bias is shared, {has}")
    if device is not None:
        wanted = torch.device(device)
        if wanted.type != own.type or wanted.index not in (None, own.index):
            raise ValueError(f"device={device}, but the weight, which is shared, is on {own}")
    if dtype is not None and dtype != linear.weight.dtype:
        raise ValueError(
            f"dtype={dtype}, but the weight, which is shared, is {linear.weight.dtype}"
        )


def _check_hyperparameters(
    r: int, lora_alpha: float, lora_dropout: float, init_lora_weights: bool | str
) -> None:
    if not isinstance(r, int) or isinstance(r, bool):
        raise TypeError(f"r must be an int, got {type(r).__name__}")
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    for name, value in (("lora_alpha", lora_alpha), ("lora_dropout", lora_dropout)):
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not abs(lora_alpha) <= LARGEST:
        raise ValueError(f"lora_alpha must be finite, got {lora_alpha!s:.40}")
    if not 0.0 <= lora_dropout <= 1.0:
        raise ValueError(f"lora_dropout must be between 0 and 1, got {lora_dropout}")
    if type(init_lora_weights) not in (bool, str) or init_lora_weights not in INIT_METHODS:
        raise ValueError(
            f"init_lora_weights must be True, False or 'gaussian', got {init_lora_weights!r}"
        )
