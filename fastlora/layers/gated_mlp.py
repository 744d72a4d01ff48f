# SPDX-License-Identifier: Apache-2.0
"""A gated MLP as one operator: ``down(act(gate(x)) · up(x))``, three projections between two.

Backward makes the product of the activation again from gate(x) and up(x); it is not kept.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.operator import op, plans
from fastlora.operator.operands import Operands

_aten = torch.ops.aten
# By name: the activation, and its gradient from that of its result and from its input.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, _aten.silu_backward),
    "gelu": (F.gelu, _aten.gelu_backward),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dy, x: _aten.gelu_backward(dy, x, approximate="tanh"),
    ),
}


def run(x: Tensor, projections: Sequence[Operands], activation: str, impl: str = "auto") -> Tensor:
    """Return y [M, N] for x [M, K] and the projections gate and up [F, K] and down [N, F].

    Only for what `op.unobserved` allows: no compiler, dispatch mode or transform looks on.
    """
    if impl == "eager" or (impl == "auto" and plans.is_few(*x.shape, x.device)):
        return _apart(x, projections, activation, impl)
    flat = [t for w, a, b, bias, *_ in projections for t in (w, a, b, bias)]
    if torch.is_grad_enabled() and (
        x.requires_grad or any(t is not None and t.requires_grad for t in flat)
    ):
        return _GatedMLP.apply(x, projections, activation, impl, *flat)
    return _forward(x, projections, activation, impl)[0]


def _apart(x: Tensor, projections: Sequence[Operands], activation: str, impl: str) -> Tensor:
    """Return y from two operators and the activation between them, each with its own backward."""
    g, u = op.run(x, projections[:2], impl)
    (y,) = op.run(ACTIVATIONS[activation][0](g) * u, projections[2:], impl)
    return y


def _forward(
    x: Tensor, projections: Sequence[Operands], activation: str, impl: str
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """Return y, gate(x), up(x) and s of each projection."""
    (g, u), ss = op.forward(x, projections[:2], impl)
    h = _Product(g, u, activation, impl).first()
    (y,), (s,) = op.forward(h, projections[2:], impl)
    return y, g, u, [*ss, s]


class _Product:
    """act(g) · u, and for backward its value once more and then the gradients of g and u."""

    def __init__(self, g: Tensor, u: Tensor, activation: str, impl: str) -> None:
        self.g, self.u, self.activation = g, u, activation
        self.kernels = _kernels(g, impl)
        self.act: Tensor | None = None  # act(g), where it has been made

    def first(self) -> Tensor:
        if self.kernels is not None:
            return self.kernels.gated(self.g, self.u, self.activation)
        return ACTIVATIONS[self.activation][0](self.g).mul_(self.u)

    def again(self) -> Tensor:
        """Return the product, and keep what `grads` can use of it."""
        if self.kernels is not None:
            return self.kernels.gated(self.g, self.u, self.activation)
        self.act = ACTIVATIONS[self.activation][0](self.g)
        return self.act * self.u

    def grads(self, dh: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of g and u from that of the product, whose memory is used."""
        if self.kernels is not None:
            found = self.kernels.gated_backward(dh, self.g, self.u, self.activation, need_h=False)
            return found[:2]
        act, act_backward = ACTIVATIONS[self.activation]
        du = (act(self.g) if self.act is None else self.act).mul_(dh)
        return act_backward(dh.mul_(self.u), self.g), du


def _kernels(t: Tensor, impl: str):
    """Return the Triton kernels where they are to run on tensors like ``t``, or None."""
    if impl == "auto":
        impl, _ = plans.default(t.dtype, t.device)
    return None if impl == "blocks" else importlib.import_module("fastlora_kernels")


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, projections, activation, impl, *_):
        y, g, u, ss = _forward(x, projections, activation, impl)
        ctx.activation, ctx.impl = activation, impl
        ctx.numbers = [(p.scaling, p.p) for p in projections]
        kept = [t for w, a, b, bias, seed, *_ in projections for t in (w, a, b, bias, seed)]
        ctx.save_for_backward(x, g, u, *ss, *kept)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, g, u, *rest = ctx.saved_tensors
        ss, kept = rest[:3], rest[3:]
        projections = [
            Operands(*kept[5 * i : 5 * i + 5], *numbers) for i, numbers in enumerate(ctx.numbers)
        ]
        need_x, _, _, _, *flat = ctx.needs_input_grad
        if op.looked_into(dy):
            dx, *grads = _differentiable_grads(dy, x, projections, ctx.activation, [need_x, *flat])
            return dx, None, None, None, *grads
        needs = [flat[i : i + 4] for i in (0, 4, 8)]
        need_inner = need_x or any(map(any, needs[:2]))
        # Only the gradients of down's own parameters read what it was given.
        own = projections[2].a is not None or any(needs[2])
        product, impl = _Product(g, u, ctx.activation, ctx.impl), ctx.impl
        h = product.again() if own else g
        dh, *outer = op.gradients([dy], h, projections[2:], ss[2:], impl, need_inner, needs[2:])
        del h
        dx, inner = None, [[None, None]] * 4
        if need_inner:
            dys = product.grads(dh)
            dx, *inner = op.gradients(dys, x, projections[:2], ss[:2], impl, need_x, needs[:2])
        of_each = zip(*(two + one for two, one in zip(inner, outer, strict=True)), strict=True)
        return dx, None, None, None, *(grad for row in of_each for grad in row)


def _differentiable_grads(dy, x, projections, activation, needs):
    """Return a gradient for x and for w, a, b and bias of each projection, or None."""
    inputs = [x, *(t for w, a, b, bias, *_ in projections for t in (w, a, b, bias))]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # An alias for each: x may depend on the others, and two of them may be one tensor.
        x, *flat = aliases = [t if t is None else t.view_as(t) for t in inputs]
        parts = [Operands(*flat[4 * i : 4 * i + 4], *p[4:]) for i, p in enumerate(projections)]
        y = _apart(x, parts, activation, "auto")
    wanted = [t for t, need in zip(aliases, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph))
    return [next(found) if need else None for need in needs]
