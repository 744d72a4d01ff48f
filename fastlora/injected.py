# SPDX-License-Identifier: Apache-2.0
"""`InjectedLinear`: the layer of `inject`, with named low-rank adapters on a frozen weight."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.layers.active import Adapter, lora_sum
from fastlora.layers.hyperparameters import (
    check_adapter_dtype,
    check_adapter_name,
    check_hyperparameters,
    default_adapter_dtype,
    initial_factors,
    scaling_of,
)
from fastlora.layers.lora import LoRALinear, _check_shared, is_conv1d, unsupported
from fastlora.layers.siblings import Group, Layer, handed

DEFAULT_ADAPTER = "default"


class InjectedLinear(LoRALinear):
    """``y = x Wᵀ + bias + Σ scaling · dropout(x) Aᵀ Bᵀ`` over the active adapters.

    State-dict keys: ``weight`` [out, in], ``bias`` [out], ``lora_A.<adapter>`` [r, in],
    ``lora_B.<adapter>`` [out, r]. A state dict without any adapter key, such as that of the
    plain layer, loads and leaves the adapters as they are.

    ``weight`` and ``bias`` are frozen. ``scaling`` is ``lora_alpha / r``, or
    ``lora_alpha / sqrt(r)`` with ``use_rslora`` (Kalajdzievski, arXiv:2312.03732).
    ``init_lora_weights``: True draws A Kaiming-uniform, "gaussian" with deviation 1 / r, both
    with B zero; "orthogonal" draws A and B with orthogonal row spaces (even r; B A is zero);
    False draws both, so that the layer differs from its base from the start.
    ``dtype`` is the base's; ``adapter_dtype`` defaults to float32 under a bfloat16 or float16
    base, as in PEFT, and to the base's dtype otherwise.
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
        nn.Linear.__init__(self, in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._init_adapters()
        self.add_adapter(
            DEFAULT_ADAPTER,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            adapter_dtype=adapter_dtype,
        )
        self.set_adapter(DEFAULT_ADAPTER)

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
    ) -> InjectedLinear:
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
        layer = cls._around(linear)
        layer.add_adapter(
            DEFAULT_ADAPTER,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            adapter_dtype=adapter_dtype,
        )
        layer.set_adapter(DEFAULT_ADAPTER)
        return layer

    @classmethod
    def _around(cls, linear: nn.Module) -> InjectedLinear:
        """Return a layer without adapters that shares everything with ``linear``."""
        layer = cls.__new__(cls)
        for key, value in vars(linear).items():
            layer.__dict__[key] = copy.copy(value) if isinstance(value, (dict, set)) else value
        if is_conv1d(linear):
            layer.fan_in_fan_out = True
            layer.in_features, layer.out_features = linear.weight.shape
        layer._init_adapters()
        return layer

    def _init_adapters(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.init_lora_weights: dict[str, bool | str] = {}
        self.active_adapters: tuple[str, ...] = ()
        self.merged_adapters: tuple[str, ...] = ()
        self.disable_adapters = False
        # While merged: the weight as it was, moved and cast with the module, not saved.
        self.register_buffer("_base_weight", None, persistent=False)

    # Adapters

    def add_adapter(
        self,
        name: str,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """Add an adapter, not yet active; arguments as for the class.

        Raises ValueError or TypeError before anything is changed.
        """
        check_adapter_name(name)
        if name in self.r:
            raise ValueError(f"adapter {name!r} exists already; delete_adapter({name!r}) first")
        check_hyperparameters(r, lora_alpha, lora_dropout, init_lora_weights)
        dtype = adapter_dtype or default_adapter_dtype(self.weight.dtype)
        check_adapter_dtype(dtype, self.weight.dtype)
        a, b = initial_factors(
            init_lora_weights, r, self.in_features, self.out_features, self.weight.device, dtype
        )
        self.lora_A[name] = nn.Parameter(a)
        self.lora_B[name] = nn.Parameter(b)
        self.r[name] = r
        self.lora_alpha[name] = lora_alpha
        self.scaling[name] = scaling_of(r, lora_alpha, use_rslora)
        self.lora_dropout[name] = lora_dropout
        self.use_rslora[name] = use_rslora
        self.init_lora_weights[name] = init_lora_weights

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Make exactly ``names`` active: one adapter, several (their outputs add up) or ``[]``.

        Active adapters train, the others are frozen. A merged layer is unmerged first.
        Raises ValueError for a name that does not exist, and changes nothing then.
        """
        names = self._known(names)
        if self.merged_adapters:
            warnings.warn("set_adapter() on a merged layer: it is unmerged first", stacklevel=2)
            self.unmerge()
        self.active_adapters = names
        for name in self.r:
            self.lora_A[name].requires_grad_(name in names)
            self.lora_B[name].requires_grad_(name in names)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; one that is merged is unmerged first. ValueError if unknown."""
        (name,) = self._known(name)
        if name in self.merged_adapters:
            warnings.warn(f"adapter {name!r} is merged: it is unmerged first", stacklevel=2)
            self.unmerge()
        self.active_adapters = tuple(n for n in self.active_adapters if n != name)
        for store in self._stores():
            del store[name]

    def _stores(self):
        return (
            self.lora_A,
            self.lora_B,
            self.r,
            self.lora_alpha,
            self.scaling,
            self.lora_dropout,
            self.use_rslora,
            self.init_lora_weights,
        )

    def _known(self, names: str | Sequence[str]) -> tuple[str, ...]:
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            if name not in self.r:
                known = ", ".join(map(repr, self.r)) or "none"
                raise ValueError(f"no adapter named {name!r}; adapters of this layer: {known}")
        if len(set(names)) != len(names):
            raise ValueError(f"adapter names must differ, got {list(names)}")
        return names

    # Merging

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @torch.no_grad()
    def delta_weight(self, name: str) -> Tensor:
        """Return ``scaling · B A`` of one adapter in float32 (float64 if it is), weight's shape."""
        (name,) = self._known(name)
        a, b = self.lora_A[name], self.lora_B[name]
        dtype = torch.promote_types(a.dtype, torch.float32)
        delta = (b.to(dtype) @ a.to(dtype)).mul_(self.scaling[name])
        return delta.t() if self.fan_in_fan_out else delta

    @torch.no_grad()
    def merge(self, safe: bool = False) -> None:
        """Add the active adapters to the weight, so that forward costs the base product alone.

        The original weight is kept aside, as `unmerge` gives it back bit for bit: a merged
        layer holds two weights. With ``safe``, raise ValueError and change nothing when the
        merged weight would hold a NaN or an infinity. No active adapter: nothing happens.
        """
        if self.merged_adapters:
            raise RuntimeError(
                f"already merged: {', '.join(self.merged_adapters)}; unmerge() first"
            )
        if not self.active_adapters:
            return
        merged = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32), copy=True)
        for name in self.active_adapters:
            merged += self.delta_weight(name)
        merged = merged.to(self.weight.dtype)
        if safe and not torch.isfinite(merged).all():
            names = ", ".join(self.active_adapters)
            raise ValueError(f"merging {names} would put NaN or infinity into the weight")
        self._buffers["_base_weight"] = self.weight  # as an attribute it would be a parameter
        self._parameters["weight"] = nn.Parameter(merged, requires_grad=False)
        self.merged_adapters = self.active_adapters

    def unmerge(self) -> None:
        """Give the weight back as it was before `merge`; a layer that is not merged stays."""
        if not self.merged_adapters:
            return
        base = self._base_weight
        if not isinstance(base, nn.Parameter):  # the module was moved or cast while merged
            base = nn.Parameter(base, requires_grad=False)
        self._parameters["weight"] = base
        self._buffers["_base_weight"] = None
        self.merged_adapters = ()

    # Forward

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., out] for input [..., in] in its dtype; see `fastlora.lora_linear`."""
        y = handed(self, input)
        if y is not None:
            return y
        if self.disable_adapters or self.merged_adapters or not self.active_adapters:
            return F.linear(input, self._oriented(self._forward_weight()), self.bias)
        return lora_sum(input, self._oriented(self.weight), self.bias, self.adapters())

    def adapters(self) -> list[Adapter]:
        """Return the active adapters as `lora_sum` takes them."""
        return [
            (
                self.lora_A[name],
                self.lora_B[name],
                self.scaling[name],
                self.lora_dropout[name] if self.training else 0.0,
            )
            for name in self.active_adapters
        ]

    def sibling_operands(self, x: Tensor | None = None) -> Layer | None:
        """Return what `siblings` computes with, None while the weight alone is used."""
        if self.disable_adapters or self.merged_adapters:
            return None
        return self._oriented(self.weight), self.bias, self.adapters()

    def _forward_weight(self) -> Tensor:
        if self.disable_adapters and self.merged_adapters:
            return self._base_weight
        return self.weight

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight.t() if self.fan_in_fan_out else weight

    # State

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weight, the bias and every adapter again, as at the start."""
        nn.Linear.reset_parameters(self)
        for name, method in vars(self).get("init_lora_weights", {}).items():
            a, b = self.lora_A[name], self.lora_B[name]
            shape = (self.r[name], self.in_features, self.out_features)
            new_a, new_b = initial_factors(method, *shape, a.device, a.dtype)
            a.copy_(new_a)
            b.copy_(new_b)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if self.merged_adapters:
            warnings.warn(f"{prefix or 'the layer '}is merged: unmerged for loading", stacklevel=2)
            self.unmerge()
        own = {
            f"{prefix}{store}.{name}": tensor
            for store in ("lora_A", "lora_B")
            for name, tensor in getattr(self, store).items()
        }
        if own.keys().isdisjoint(state_dict):  # a base checkpoint: the adapters stay
            state_dict.update(own)
        nn.Linear._load_from_state_dict(self, state_dict, prefix, *args)

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{n}: r={r}, scaling={self.scaling[n]:g}" for n, r in self.r.items())
        active = list(self.active_adapters)
        return f"{nn.Linear.extra_repr(self)}, adapters=[{adapters}], active={active}"
