# SPDX-License-Identifier: Apache-2.0
"""`LoRALinear`, an ``nn.Linear`` with an adapter; `replace_linears` puts it into a model."""

from __future__ import annotations

import copy
import math
import re
import weakref
from collections.abc import Callable, Collection
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.functional import DTYPES, LARGEST
from fastlora.layers import sibling_search
from fastlora.layers.active import lora_sum
from fastlora.layers.classes import unwrapped
from fastlora.layers.report import PatchReport, counted
from fastlora.layers.siblings import FrozenLinear, Group, Layer, handed

# All that live, so that two layers of one weight do not merge into each other.
_layers: weakref.WeakSet[LoRALinear] = weakref.WeakSet()


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

        ``linear`` is an ``nn.Linear`` or a transformers ``Conv1D``; hooks, training mode and
        other attributes come along, and the module itself is left as it is. The other arguments
        are the class's; ``bias``, ``device`` and ``dtype`` are ``linear``'s own.
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
        layer = cls.__new__(cls)
        for key, value in vars(linear).items():
            layer.__dict__[key] = copy.copy(value) if isinstance(value, (dict, set)) else value
        if is_conv1d(linear):
            layer.fan_in_fan_out = True
            layer.in_features, layer.out_features = weight.shape
        layer._adapt(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)
        return layer

    def _adapt(self, r, lora_alpha, lora_dropout, use_rslora, init, adapter_dtype) -> None:
        for name, value, right, wanted in (
            ("r", r, type(r) is int and r >= 1, "an int, 1 or more"),
            ("lora_alpha", lora_alpha, _within(lora_alpha, -LARGEST, LARGEST), "a finite number"),
            ("lora_dropout", lora_dropout, _within(lora_dropout, 0, 1), "between 0 and 1"),
            ("init_lora_weights", init, init in (True, False, "gaussian"), "a bool or 'gaussian'"),
        ):
            if not right:
                raise ValueError(f"{name} must be {wanted}, got {value!r:.40}")
        base, device = self.weight.dtype, self.weight.device
        usual = default_adapter_dtype(base)
        dtype = adapter_dtype or usual
        if dtype not in (base, usual):
            raise TypeError(f"adapter_dtype must be {usual} or the weight's {base}, got {dtype}")
        self.r, self.lora_alpha, self.init_lora_weights = r, lora_alpha, init
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
        _layers.add(self)

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
        y = handed(self, input)
        if y is not None:
            return y
        found = self.sibling_operands()
        if found is None:
            return F.linear(input, self._oriented(), self.bias)
        return lora_sum(input, *found)

    def sibling_operands(self, x: Tensor | None = None) -> Layer | None:
        """Return weight, bias and adapter as the operator takes them, None while merged."""
        if self.merged:
            return None
        dropout = self.lora_dropout
        if not isinstance(dropout, (nn.Dropout, nn.Identity)):
            raise TypeError(f"lora_dropout must be an nn.Dropout, got {type(dropout).__name__}")
        p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        return self._oriented(), self.bias, [(self.lora_A, self.lora_B, self.scaling, p)]

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

        It is written into the weight's own memory, so that what shares the weight, such as a tied
        embedding, has it too. A copy of the weight as it was is kept, from which `unmerge` restores
        every bit, and saved, as ``base_weight``: a state dict loads as merged or not as it was
        saved. What takes known keys alone, such as torch.distributed.checkpoint, would leave it
        out: unmerge() before that saves.
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
        weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Write the weight back as it was before `merge`; a layer that is not merged stays."""
        if self.merged:
            self._weight_to_write("unmerge").copy_(self.base_weight)
            self.base_weight = None

    def _weight_to_write(self, what: str) -> Tensor:
        weight = self._parameters.get("weight")
        others = [layer for layer in list(_layers) if layer is not self and layer.merged]
        if weight is None:
            why = "is computed: it is parametrized, pruned or weight-normalised"
        elif weight.is_meta or self.lora_A.is_meta:
            why = "is on the meta device: not made yet, or there for a forward alone (offloading)"
        elif type(weight.data) is not Tensor:
            why = f"is a {type(weight.data).__name__}, not a plain tensor"
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
        elif self.merged and not own.keys().isdisjoint(state_dict):
            self.unmerge()
        adapter = {key: p for key, p in own.items() if key.startswith(f"{prefix}lora_")}
        if adapter.keys().isdisjoint(state_dict):  # a base checkpoint: the adapter stays
            state_dict.update(adapter)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _layers.add(self)

    def extra_repr(self) -> str:
        merged = ", merged" if self.merged else ""
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}{merged}"


def default_adapter_dtype(base: torch.dtype) -> torch.dtype:
    """Return float32 for a 16-bit base, as PEFT does, and the base's own dtype otherwise."""
    return torch.float32 if base in (torch.bfloat16, torch.float16) else base


def is_conv1d(module: nn.Module) -> bool:
    """Return whether ``module`` is transformers' Conv1D, a linear layer stored [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def unsupported(module: nn.Module) -> str | None:
    """Return why ``module`` cannot become a `LoRALinear`, or None when it can."""
    kind = type(module)
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return f"must be an nn.Linear or a transformers Conv1D, got {kind.__name__}"
    known = is_conv1d(module) or kind.forward in (nn.Linear.forward, FrozenLinear.forward)
    if not known or "forward" in vars(module):  # on the object: as accelerate's hooks set one
        return f"is a {kind.__name__} with a forward of its own, not that of nn.Linear"
    if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "belongs to nn.MultiheadAttention, which reads its weight and never calls it"
    if module._compiled_call_impl is not None:
        return "is compiled by itself: replace first, then compile"
    weight = module._parameters.get("weight")
    if weight is None or "bias" not in module._parameters:
        return "computes its weight or bias (parametrized, pruned, weight-normalised)"
    if weight.dtype not in DTYPES or type(weight.data) is not Tensor:
        return f"has a weight of {type(weight.data).__name__} {weight.dtype}, not a dense float"
    return None


def _within(number: float, least: float, most: float) -> bool:
    return isinstance(number, Real) and bool(least <= number <= most)


# In a model

Which = Collection[str] | str | Callable[[str, nn.Module], bool]

_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")  # parts of names, of what wraps modules
# Kinds of modules that a model may not hold. What DDP and FSDP hold is synchronised as they met it.
_REFUSED = {
    "DistributedDataParallel": "replace first, then wrap it",
    "FullyShardedDataParallel": "replace first, then wrap it",
    "BaseTunerLayer": "patch_peft() fuses PEFT's layers as they are",
}


def replace_linears(
    model: nn.Module, names: Which, *, fuse_siblings: sibling_search.How = False, **same: Any
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
    selected, unknown = _selected(model, names)
    report = PatchReport([], [(name, "no module has this name") for name in unknown])
    old: dict[int, nn.Module] = {}
    for name, module in selected:
        if why := unsupported(module):
            report.not_fused.append((name, why))
        elif id(module) not in old:
            report.fused.append(name)
            old[id(module)] = module
    if not old:
        linears = [name for name, m in model.named_modules() if unsupported(m) is None]
        there = f"the linear layers inside the model are {counted(linears) or 'none'}"
        raise ValueError(f"names={names!r:.300} replaces nothing: {report}\n  {there}")
    groups = []
    if fuse_siblings is not False:
        adapted = [m for m in model.modules() if id(m) in old or isinstance(m, LoRALinear)]
        groups = sibling_search.find(model, fuse_siblings, adapted)
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
        encoder = isinstance(parent, (nn.TransformerEncoder, nn.TransformerEncoderLayer))
        if encoder and not new.keys().isdisjoint(map(id, parent.modules())):
            # Its inference kernel would read weights past the adapters; these are its switches.
            parent.activation_relu_or_gelu, parent.use_nested_tensor = 0, False
        for name, child in parent._modules.items():
            parent._modules[name] = new.get(id(child), child)
    report.lookalikes = sibling_search.lookalikes(groups)
    report.siblings, report.gated_mlps = sibling_search.make(groups)
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
    """Return the modules that ``names`` selects by their names, and what in it selects none.

    Without the parts that checkpointing and compiling wrappers add to names. A layer that is
    compiled by itself is only found as its wrapper, which would never call what took its place.
    """
    named = []
    for path, module in model.named_modules(remove_duplicate=False):
        *parents, last = path.split(".")
        if last not in ("", "_orig_mod") and "_checkpoint_wrapped_module" not in module._modules:
            parts = [part for part in (*parents, last) if part not in _WRAPPERS]
            named.append((".".join(parts), module))
    if callable(names):
        return [each for each in named if names(*each)], []
    if isinstance(names, str):
        try:
            pattern = re.compile(names)
        except re.error as error:
            raise ValueError(f"names={names!r:.200} is no regular expression: {error}") from None
        return [each for each in named if pattern.fullmatch(each[0])], []
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"names must be a list of names, a regular expression or a function, got {names!r:.100}"
        )
    ends = tuple(f".{name}" for name in names)
    unknown = [end[1:] for end in ends if not any(f".{name}".endswith(end) for name, _ in named)]
    return [each for each in named if f".{each[0]}".endswith(ends)], unknown
