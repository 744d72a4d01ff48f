# SPDX-License-Identifier: Apache-2.0
"""Gated MLPs: modules that compute ``down(act(gate(x)) · up(x))``, run as one operator.

Numbers can't show what a module computes: a limit in a config or a branch on the shape of x may
change them later. Code without a jump can: it does the same each time, with what it loads. It is
followed once, into a formula such as ``$self.down(($self.act($self.gate($x)) * $self.up($x)))``;
what that loads is looked up each time.
"""

from __future__ import annotations

import dis
import functools
import importlib
import re
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastlora import functional
from fastlora.layers.classes import rebased
from fastlora.layers.siblings import is_plain, may_differ, module_hooks, projection_of
from fastlora.operator import eager, op, plans
from fastlora.operator.operands import Operands

_aten = torch.ops.aten
# By name: the activation, and its gradient from that of its result and from its input.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, _aten.silu_backward),
    "gelu": (F.gelu, _aten.gelu_backward),
    "gelu_tanh": (
        functools.partial(F.gelu, approximate="tanh"),
        functools.partial(_aten.gelu_backward, approximate="tanh"),
    ),
}
_CALL, _SILU, _GELU = nn.Module.__call__, F.silu, F.gelu

# The formula of a gated MLP, its groups the fields of `Form`; and that of an activation's forward.
_CALLED, _LAYER, _KEYWORD = r"([\w.$]+)", r"\$self\.(\w+)\(\$x\)", r"(?:, (\w+)=([\w.$']+))?"
_GATED = re.compile(rf"\$self\.(\w+)\(\({_CALLED}\({_LAYER}{_KEYWORD}\) \* {_LAYER}\)\)")
_ACTIVATION = re.compile(rf"{_CALLED}\(\$x{_KEYWORD}\)")

# Instructions of Python 3.10 to 3.14. The NULL that some put beside a function is left out.
_NOTHING = {"RESUME", "NOP", "EXTENDED_ARG", "PUSH_NULL", "PRECALL"}
_CALLS = {"CALL", "CALL_KW", "CALL_FUNCTION", "CALL_FUNCTION_KW", "CALL_METHOD"}
_VARIABLES = re.compile("(LOAD|STORE)_FAST(?:_CHECK|_(LOAD|STORE)_FAST)?")


# The operator


def run(x: Tensor, projections: Sequence[Operands], activation: str, impl: str = "auto") -> Tensor:
    """Return y [M, N] for x [M, K] and the projections gate and up [F, K] and down [N, F].

    Only for what `op.unobserved` allows: no compiler, dispatch mode or transform looks on.
    Backward makes the product of the activation again from gate(x) and up(x); it is not kept.
    """
    flat = _tensors(projections)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *flat)):
        return _GatedMLP.apply(x, projections, activation, impl, *flat)
    return _forward(x, projections, activation, impl)[0]


def _tensors(projections: Sequence[Operands]) -> list[Tensor | None]:
    """Return w, a, b and bias of each."""
    return [t for projection in projections for t in projection[:4]]


def _forward(
    x: Tensor, projections: Sequence[Operands], activation: str, impl: str
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """Return y, gate(x), up(x) and s of each projection."""
    (g, u), ss = op.forward(x, projections[:2], impl)
    (y,), (s,) = op.forward(_product(g, u, activation, impl), projections[2:], impl)
    return y, g, u, [*ss, s]


def _product(g: Tensor, u: Tensor, activation: str, impl: str) -> Tensor:
    """Return act(g) · u."""
    if kernels := _kernels(g, impl):
        return kernels.gated(g, u, activation)
    return ACTIVATIONS[activation][0](g).mul_(u)


def _product_grads(
    dh: Tensor, g: Tensor, u: Tensor, activation: str, impl: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients of g and u from that of their product, whose memory is used."""
    if kernels := _kernels(g, impl):
        return kernels.gated_backward(dh, g, u, activation, need_h=False)[:2]
    act, act_backward = ACTIVATIONS[activation]
    du = act(g).mul_(dh)
    return act_backward(dh.mul_(u), g), du


def _kernels(t: Tensor, impl: str) -> ModuleType | None:
    """Return the Triton kernels where they are to run on tensors like ``t``, or None."""
    if impl == "auto":
        impl, _ = plans.default(t.dtype, t.device)
    return None if impl == "blocks" else importlib.import_module("fastlora_kernels")


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, projections, activation, impl, *_):
        y, g, u, ss = _forward(x, projections, activation, impl)
        ctx.how = activation, impl
        ctx.numbers = [p[5:] for p in projections]
        ctx.save_for_backward(x, g, u, *ss, *(t for p in projections for t in p[:5]))
        return y

    @staticmethod
    def backward(ctx, dy):
        x, g, u, *rest = ctx.saved_tensors
        ss, kept = rest[:3], rest[3:]
        projections = [
            Operands(*kept[5 * i : 5 * i + 5], *numbers) for i, numbers in enumerate(ctx.numbers)
        ]
        (activation, impl), (need_x, _, _, _, *flat) = ctx.how, ctx.needs_input_grad
        if op.looked_into(dy):
            y_of, needs = functools.partial(_outputs, activation), [need_x, *flat]
            dx, *grads = eager.gradients(y_of, [dy], x, projections, needs)
            return dx, None, None, None, *grads
        needs = [flat[i : i + 4] for i in (0, 4, 8)]
        need_inner = need_x or any(map(any, needs[:2]))
        # Only the gradients of down's own parameters read what it was given.
        own = projections[2].a is not None or any(needs[2])
        h = _product(g, u, activation, impl) if own else g
        dh, *outer = op.gradients([dy], h, projections[2:], ss[2:], impl, need_inner, needs[2:])
        del h
        dx, inner = None, [[None, None]] * 4
        if need_inner:
            dys = _product_grads(dh, g, u, activation, impl)
            dx, *inner = op.gradients(dys, x, projections[:2], ss[:2], impl, need_x, needs[:2])
        of_each = zip(*([*two, *one] for two, one in zip(inner, outer, strict=True)), strict=True)
        return dx, None, None, None, *(grad for row in of_each for grad in row)


def _outputs(activation: str, x: Tensor, projections: Sequence[Operands]) -> Sequence[Tensor]:
    """Return y, of two operators that PyTorch can differentiate again."""
    g, u = op.run(x, projections[:2], "auto")
    return op.run(ACTIVATIONS[activation][0](g) * u, projections[2:], "auto")


# Which modules are one


class Form(NamedTuple):
    """What ``down(act(gate(x), keyword=value) · up(x))`` is called in the code of a forward."""

    down: str
    act: str
    gate: str
    keyword: str | None
    value: str | None
    up: str

    @property
    def names(self) -> tuple[str, str, str]:
        return self.gate, self.up, self.down


def form_of(module: nn.Module, pair: Sequence[str], is_linear: Callable) -> tuple[Form | None, str]:
    """Return the form of ``module`` whose children named ``pair`` take its input, or why none.

    There has to be one more child that ``is_linear``; without, there is nothing to explain.
    """
    downs = [n for n, child in module._modules.items() if is_linear(child) and n not in pair]
    if len(pair) != 2 or len(downs) != 1:
        return None, ""
    kind = getattr(type(module), "_gated_of", type(module))  # without what `fuse` makes of it
    form, why = _form(_code(kind))
    if form is None:
        return None, why
    if "forward" in vars(module):
        return None, "it has a forward of its own"
    if {form.gate, form.up} != set(pair) or form.down != downs[0]:
        return None, f"its forward calls {', '.join(form.names)}"
    if any(getattr(module, name, None) is not module._modules[name] for name in form.names):
        return None, "something hides its layers"
    if _activation(module, kind, form.act, form.keyword, form.value) is None:
        act = _loaded(module, kind, form.act)
        return None, f"its activation is {getattr(act, '__name__', type(act).__name__)}"
    try:
        _fused_class(kind)
    except Exception as error:  # whatever the class says to it
        return None, f"its class takes no subclass: {error!s:.60}"
    return form, ""


def _code(kind: type) -> CodeType | None:
    """Return the code of a class's forward as it is now, None if it is no plain function."""
    return kind.forward.__code__ if type(kind.forward) is FunctionType else None


@functools.lru_cache
def _form(code: CodeType | None) -> tuple[Form | None, str]:
    """Return the form that a forward has, or why none; so that each call can ask."""
    formula, why = _formula(code)
    found = _GATED.fullmatch(formula)
    if found and len(set(Form(*found.groups()).names)) == 3:
        return Form(*found.groups()), ""
    return None, why or f"its forward is {formula.replace('$self.', '').replace('$', '')}"


@functools.lru_cache
def _formula(code: CodeType | None) -> tuple[str, str]:
    """Return what a forward of self and x returns, or why that is not known.

    It may load, call and multiply, and nothing else; the formula holds once what is made.
    """
    if code is None or (code.co_argcount, code.co_kwonlyargcount) != (2, 0):
        return "", "its forward is no function of x alone"
    operations = list(dis.get_instructions(code))
    # Where exceptions are caught no jump leads, from Python 3.11 on.
    if getattr(code, "co_exceptiontable", b"") or any("JUMP" in each.opname for each in operations):
        return "", "its forward branches"
    variables = dict(zip(code.co_varnames, ("$self", "$x"), strict=False))
    stack, keywords, constant, made = [], (), None, 0
    for operation in operations:
        what, value = operation.opname.replace("_BORROW", ""), operation.argval
        if found := _VARIABLES.fullmatch(what):  # Python 3.13 has two in one
            names = value if type(value) is tuple else (value,)
            for access, name in zip(found.groups(), names, strict=False):
                if access == "LOAD":
                    stack.append(variables.get(name, "?"))
                else:
                    variables[name] = stack.pop()
        elif what == "LOAD_GLOBAL":
            stack.append(value)
        elif what in ("LOAD_ATTR", "LOAD_METHOD"):
            stack.append(f"{stack.pop()}.{value}")
        elif what == "LOAD_CONST":
            constant = value
            stack.append(repr(value))
        elif what == "KW_NAMES":
            keywords = code.co_consts[operation.arg]
        elif what in _CALLS:
            if what.endswith("_KW"):
                stack.pop()
                keywords = constant
            given = [stack.pop() for _ in range(operation.arg)][::-1]
            plain = operation.arg - len(keywords)
            given[plain:] = map("=".join, zip(keywords, given[plain:], strict=True))
            stack.append(f"{stack.pop()}({', '.join(given)})")
            keywords, made = (), made + 1
        elif what == "BINARY_MULTIPLY" or (what == "BINARY_OP" and operation.argrepr == "*"):
            factors = sorted([stack.pop(), stack.pop()], key=lambda text: text.count("("))
            stack.append(f"({factors[1]} * {factors[0]})")  # the activated one comes first
            made += 1
        elif what == "RETURN_VALUE" and stack[-1].count("(") == made:
            return stack[-1], ""
        elif what not in _NOTHING:
            return "", f"its forward is more than calls and products, each used once ({what})"
    raise AssertionError("code that never returns")


def _activation(
    module: nn.Module, kind: type, called: str, keyword: str | None, value: str | None
) -> str | None:
    """Return which activation a call in the forward of a module is, as things are, or None."""
    act = _loaded(module, kind, called)
    given = {keyword: _loaded(module, kind, value)} if keyword else {}
    if isinstance(act, nn.Module):
        found = _ACTIVATION.fullmatch(_formula(_code(type(act)))[0])
        if not found or given or _is_observed(act):
            return None
        return _activation(act, type(act), *found.groups())
    if type(act) is functools.partial and not act.args:
        act, given = act.func, {**act.keywords, **given}
    if act is _SILU and given.keys() <= {"inplace"} and given.get("inplace", False) is False:
        return "silu"
    if act is _GELU and given.keys() <= {"approximate"}:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(given.get("approximate", "none")))
    return None


def _loaded(module: nn.Module, kind: type, text: str) -> Any:
    """Return what the code of a module's forward loads at this place of its formula."""
    if text[0] == "'":
        return text[1:-1]
    first, *rest = text.split(".")
    value = module if first == "$self" else kind.forward.__globals__.get(first)
    for name in rest:
        known = value is module or isinstance(value, ModuleType)
        value = getattr(value, name, None) if known else None
    return value


def _is_observed(module: nn.Module) -> bool:
    """Return whether someone would see that ``module`` is not called."""
    other_call = type(module).__call__ is not _CALL
    return other_call or bool(module._forward_hooks) or may_differ(module)


def _is_layer(module: Any) -> bool:
    """Return whether a call of ``module`` would give what its operands say."""
    own = next((vars(kind) for kind in type(module).__mro__ if "forward" in vars(kind)), ())
    return "sibling_operands" in own and not _is_observed(module)


# Running as one


def fuse(module: nn.Module, form: Form) -> None:
    """Have ``module`` run as one operator where it can, by a class of its own."""
    if not hasattr(type(module), "_gated_of"):
        module.__class__ = _fused_class(type(module))
    module._gated_form = form


def unfused(module: nn.Module) -> type:
    """Return the class that ``module`` would have if `fuse` had never changed it."""
    kind = type(module)
    fused = next((k for k in kind.__mro__ if "_gated_of" in vars(k)), None)
    return kind if fused is None else rebased(kind, fused, fused._gated_of)


@functools.cache
def _fused_class(kind: type) -> type:
    def forward(self, *args, **kwargs):
        y = _output(self, *args) if len(args) == 1 and not kwargs else None
        return kind.forward(self, *args, **kwargs) if y is None else y

    def reduce_ex(self, protocol):  # pickle does not find a class that is made here by its name
        state = self.__getstate__() if hasattr(self, "__getstate__") else vars(self)
        return _new, (kind,), state

    own = {"forward": forward, "__reduce_ex__": reduce_ex, "_gated_of": kind}
    return type(f"Fused{kind.__name__}", (kind,), own)


def _new(kind: type) -> nn.Module:
    fused = _fused_class(kind)
    return fused.__new__(fused)


def _output(module: nn.Module, x: Tensor) -> Tensor | None:
    """Return what ``module`` makes of x by one operator, None where it has to run as it is."""
    form: Form | None = module.__dict__.get("_gated_form")  # torch 2.8 does not compile vars()
    if form is None or torch.compiler.is_compiling() or not is_plain(x) or module_hooks():
        return None
    if plans.is_few(x.numel(), x.device):  # nothing that would pay for the way
        return None
    kind = type(module)._gated_of
    if _form(_code(kind))[0] != form:
        return None
    activation = _activation(module, kind, form.act, form.keyword, form.value)
    members = [getattr(module, name, None) for name in form.names]
    if activation is None or not all(map(_is_layer, members)):
        return None
    layers = [member.sibling_operands(x) for member in members]
    projections = [layer and projection_of(layer) for layer in layers]
    if not all(projections):
        return None
    try:
        wide, checked = functional.checked(x, projections[:2])
        inner = wide.new_empty(1, checked[0].weight.shape[0])
        _, last = functional.checked(inner, projections[2:])
    except (TypeError, ValueError):  # alone each says what is wrong with it, or takes it
        return None
    impl = "auto" if plans.FORCED == "auto" else plans.named("auto", x)
    if impl in ("eager", "reference") or forward_ad._current_level >= 0:
        return None
    same_size = checked[0].weight.shape[0] == checked[1].weight.shape[0]
    tensors = [t for p in (*checked, *last) for t in p[:4]]
    if not (same_size and op.unobserved(wide, *tensors)):  # before a seed is drawn
        return None
    wide, ready = functional.drawn(wide, [*checked, *last], training=True)
    y = run(wide, ready, activation, impl)
    return y if x.dim() == 2 else functional.shaped(y, x.shape)
