# SPDX-License-Identifier: Apache-2.0
"""Gated MLPs: modules that compute ``down(act(gate(x)) · up(x))``, run as one operator.

Numbers can't show what a module computes: a config or the shape of x may change it. Code that only
loads, calls and multiplies can: it runs once on stand-ins, which note a formula such as
``$self.down(($self.act($self.gate($x)) * $self.up($x)))``; what that loads is looked up each time.
"""

from __future__ import annotations

import dis
import functools
import importlib
import re
from collections.abc import Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastlora import functional
from fastlora.layers.active import projections_of
from fastlora.operator import eager, op, plans
from fastlora.operator.operands import Operands

_CALL, _aten = nn.Module.__call__, torch.ops.aten
# By name: the function, its keywords, and its gradient from that of its result and its input.
ACTIVATIONS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "silu": (F.silu, {"inplace": False}, lambda dh, g, inplace: _aten.silu_backward(dh, g)),
    "gelu": (F.gelu, {"approximate": "none"}, _aten.gelu_backward),
    "gelu_tanh": (F.gelu, {"approximate": "tanh"}, _aten.gelu_backward),
}

# The formula of a gated MLP, and that of an activation's forward: what is called, how, on what.
_ACT, _HOW, _LAYER = r"([\w.$]+)", r"(?:, (\w+)=([\w.$']+))?", r"\$self\.(\w+)\(\$x\)"
_GATED = re.compile(rf"\$self\.(\w+)\(\({_ACT}\({_LAYER}{_HOW}\) \* {_LAYER}\)\)")
_ACTIVATION = re.compile(rf"{_ACT}\(\$x{_HOW}\)")
# Instructions of Python 3.10 to 3.14. Of binary operations stand-ins know the product alone.
_FOLLOWED = re.compile(
    r"LOAD_(FAST|GLOBAL|ATTR|METHOD|CONST)\w*|STORE_FAST\w*|CALL(_FUNCTION|_METHOD)?(_KW)?|PRECALL|"
    r"KW_NAMES|PUSH_NULL|BINARY_(MULTIPLY|OP)|ROT_TWO|SWAP|RESUME|NOP|EXTENDED_ARG|RETURN_VALUE"
)


def may_share(x: Any) -> bool:
    """Return whether x is large and tells when it is written to, and nobody looks on."""
    if torch.compiler.is_compiling() or op.transformed() or _has_any_global_hook():
        return False
    return type(x) in op.PLAIN and not x.is_inference() and not plans.is_few(x.numel(), x.device)


def may_differ(member: nn.Module) -> bool:
    """Return whether ``member``, when it is called, might compute with another tensor."""
    hooks = member._forward_pre_hooks or member._backward_hooks or member._backward_pre_hooks
    return bool(hooks) or "forward" in member.__dict__


def run(x: Tensor, projections: Sequence[Operands], activation: str, impl: str = "auto") -> Tensor:
    """Return y [M, N] for x [M, K] and the projections gate and up [F, K] and down [N, F].

    Backward makes act(gate(x)) · up(x) again. Only for what `op.unobserved` allows.
    """
    _, _, last = (i for i, one in enumerate(projections) if type(one.w) is not slice)
    g, u = op.run(x, projections[:last], impl)
    return joined(g, u, projections[last:], activation, impl)


def joined(g: Tensor, u: Tensor, down: Sequence[Operands], activation: str, impl: str) -> Tensor:
    """Return y [M, N] for what gate and up have made of x, [M, F] each: the rest of `run`."""
    apply = super(torch.autograd.Function, _GatedMLP).apply  # without preparing for transforms
    own = [t if isinstance(t, Tensor) else None for one in down for t in (*one[:4], one.scale)]
    return apply(g, u, activation, impl, down, *own)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, u, activation, impl, down, *_):
        (y,), ss = op.forward(_product(g, u, activation, _kernels(g, impl)), down, impl)
        op.save(ctx, (g, u), down, ss, impl)
        ctx.set_materialize_grads(True)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx, dy):
        (g, u), down, ss, impl, _ = op.saved(ctx, 2)
        activation = ctx.activation
        need_g, need_u, _, _, _, *needs = ctx.needs_input_grad
        again = op.looked_into(dy)
        need_h = need_g or need_u
        kernels = None if again else _kernels(g, impl)
        # Their gradients alone read what down was given.
        read = any(one.a is not None for one in down) or any(needs)
        with torch.set_grad_enabled(again):
            h = _product(g, u, activation, kernels) if read or again else g
        dh, grads = op.gradients([dy], h, down, ss, impl, need_h, needs)
        del h
        act, how, act_backward = ACTIVATIONS[activation]
        if not need_h:
            dg = du = None
        elif again:  # of operations that PyTorch can differentiate
            (dg,) = eager.gradients(lambda g, _: [act(g, **how)], [dh * u], g, (), [True])
            du = act(g, **how) * dh
        elif kernels:
            dg, du, _ = kernels.gated_backward(dh, g, u, activation, need_h=False)
        else:
            du = act(g, **how).mul_(dh)
            dg = act_backward(dh.mul_(u), g, **how)
        return dg, du, None, None, None, *grads


def _product(g: Tensor, u: Tensor, activation: str, kernels: ModuleType | None) -> Tensor:
    if kernels:
        return kernels.gated(g, u, activation)
    act, how, _ = ACTIVATIONS[activation]
    return act(g, **how).mul_(u)


def _kernels(t: Tensor, impl: str) -> ModuleType | None:
    if impl == "auto":
        impl, _ = plans.default(t.dtype, t.device)
    return None if impl == "blocks" else importlib.import_module("fastlora_kernels")


def read(module: nn.Module) -> tuple[tuple[str, ...], str]:
    """Return what a gated MLP calls gate, up and down, and its activation; or () and why not."""
    forward = getattr(type(module), "_stands_for", type(module)).forward  # not that of `fused`
    formula = _formula(getattr(forward, "__code__", None))
    found = _GATED.fullmatch(formula)
    if found is None:
        return (), f"its forward is {formula.replace('$self.', '').replace('$', '')}"
    down, act, gate, *how, up = found.groups()
    if activation := _activation(module, forward, act, *how):
        return (gate, up, down), activation
    return (), f"its activation is {getattr(module, act.removeprefix('$self.'), act)!r:.60}"


def split_activation(module: nn.Module) -> str | None:
    """Return the activation of experts that halve what they get, as transformers' own gate does."""
    own = getattr(type(module), "_apply_gate", None)
    name = f"{getattr(own, '__module__', '')}.{getattr(own, '__name__', '')}"
    if name == "transformers.integrations.moe._default_apply_gate" and module.has_gate:
        return _activation(module, None, "$self.act_fn", "", "")
    return None


class _StandIn(str):
    """What a forward loads or makes; as text, how."""

    __repr__, __add__, __mod__, __imul__ = str.__str__, None, None, None

    def __getattribute__(self, name: str) -> _StandIn:
        return _StandIn(f"{self}.{name}")

    def __call__(self, *args: Any, **keywords: Any) -> _StandIn:
        given = [*map(repr, args), *(f"{name}={value!r}" for name, value in keywords.items())]
        return _StandIn(f"{self}({', '.join(given)})")

    def __mul__(self, other: Any) -> _StandIn:
        less, more = sorted([repr(self), repr(other)], key=lambda text: text.count("("))
        return _StandIn(f"({more} * {less})")  # the activated one comes first


@functools.lru_cache
def _formula(code: CodeType) -> str:
    """Return what a forward of self and x returns; it holds once what is made. Or why not."""
    try:
        done = [operation.opname for operation in dis.get_instructions(code)]
        why = next((what for what in done if not _FOLLOWED.fullmatch(what)), "")
        if not why:
            loaded = {name: _StandIn(name) for name in code.co_names}
            formula = repr(FunctionType(code, loaded)(_StandIn("$self"), _StandIn("$x")))
            if formula.count("(") == sum(what.startswith(("CALL", "BINARY")) for what in done):
                return formula
    except Exception as error:  # it is no function, or takes more than x, say
        why = str(error)
    return f"more than calls and products of x, each used once ({why or 'one is not'})"


def _activation(module: nn.Module, forward: Any, act: Any, keyword: Any, value: Any) -> str | None:
    """Return which activation a call in the forward of a module is, as things are, or None."""

    def loaded(text: str) -> Any:
        if text[0] == "'":
            return text[1:-1]
        first, *rest = text.split(".")
        value = module if first == "$self" else forward.__globals__.get(first)
        return functools.reduce(lambda value, name: getattr(value, name, None), rest, value)

    act, given = loaded(act), {keyword: loaded(value)} if keyword else {}
    if isinstance(act, nn.Module):
        forward = type(act).forward
        found = _ACTIVATION.fullmatch(_formula(getattr(forward, "__code__", None)))
        followed = found and not given and not is_observed(act)
        return _activation(act, forward, *found.groups()) if followed else None
    if type(act) is functools.partial and not act.args:
        act, given = act.func, {**act.keywords, **given}
    for name, (function, how, _) in ACTIVATIONS.items():
        if act is function and given.items() <= how.items():
            return name
    return None


def is_observed(module: nn.Module) -> bool:
    """Return whether someone would see that ``module`` is not called."""
    return bool(type(module).__call__ is not _CALL or module._forward_hooks or may_differ(module))


def _is_layer(module: Any) -> bool:
    """Return whether a call of ``module`` would give what its operands say."""
    own = next((vars(kind) for kind in type(module).__mro__ if "forward" in vars(kind)), ())
    return "sibling_operands" in own and not is_observed(module)


@functools.cache
def fused(kind: type) -> type:
    """Return the class of those modules of a class that run as one operator where they can."""

    def forward(self, *args, **kwargs):
        y = _output(self, *args) if len(args) == 1 and not kwargs else None
        return kind.forward(self, *args, **kwargs) if y is None else y

    def reduce_ex(self, protocol):  # pickle does not find a class that is made here by its name
        _, _, *state = kind.__reduce_ex__(self, protocol)
        return _new, (kind,), *state

    own = {"forward": forward, "__reduce_ex__": reduce_ex, "_stands_for": kind}
    return type(f"Fused{kind.__name__}", (kind,), own)


def _new(kind: type) -> nn.Module:
    return fused(kind).__new__(fused(kind))


def _output(module: nn.Module, x: Tensor) -> Tensor | None:
    """Return what ``module`` makes of x by one operator, None where it has to run as it is."""
    names, activation = read(module) if may_share(x) else ((), "")
    members = [getattr(module, name, None) for name in names]
    if not names or not all(map(_is_layer, members)):
        return None
    try:
        *first, down = [member.sibling_operands(x) for member in members]
        wide, checked = functional.checked(x, projections_of(first))
        gate, up = (one for one in checked if type(one.weight) is not slice)
        inner = wide.new_empty(1, gate.weight.shape[0])
        _, last = functional.checked(inner, projections_of([down]))
    except (TypeError, ValueError):  # alone each says what is wrong with it, or takes it
        return None
    impl = "auto" if plans.FORCED == "auto" else plans.named("auto", x)
    same_size = gate.weight.shape[0] == up.weight.shape[0]
    tensors = [t for p in (*checked, *last) for t in p if isinstance(t, Tensor)]
    if impl in ("eager", "reference") or not (same_size and op.unobserved(wide, *tensors)):
        return None
    wide, ready = functional.drawn(wide, [*checked, *last], True, impl)
    y = run(wide, ready, activation, impl)
    return y if x.dim() == 2 else functional.shaped(y, x.shape)
