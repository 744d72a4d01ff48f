# SPDX-License-Identifier: Apache-2.0
"""The ``torch.library`` operators behind `lora_linear`: schema, fake, autograd, bodies.

``fastlora::lora_linears`` returns y and what backward needs of the low-rank path (s) for each of
several projections of one x; ``fastlora::lora_linears_backward`` returns the gradients of x and of
the adapters. Both take 2-D tensors and the name of an implementation; "auto" is resolved inside,
for the sizes that come, so that one compiled graph serves them all. Lists hold an element for each
projection; where it has no adapter, bias, seed or gradient, an empty tensor stands for it. There is
one scaling: in a list its value would be part of a compiled graph. The gradients of trained base
weights and biases are plain products and are written in the autograd formula.

`run` calls the bodies without the dispatcher where nothing could tell: in eager mode the way
through it and back costs as much Python time as ten small products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlora.operator import eager, plans
from fastlora.operator.dropout import keep_mask, kept_scale
from fastlora.operator.operands import Operands, with_scaling

SCHEMAS = (
    "lora_linears(Tensor x, Tensor[] weight, Tensor[] lora_A, Tensor[] lora_B, Tensor[] bias, "
    "Tensor[] seed, Scalar scaling, float[] dropout_p, str impl) -> (Tensor[], Tensor[])",
    "lora_linears_backward(Tensor[] dy, Tensor x, Tensor[] weight, Tensor[] lora_A, "
    "Tensor[] lora_B, Tensor[] s, Tensor[] seed, Scalar scaling, float[] dropout_p, str impl, "
    "bool need_x, bool[] need_A, bool[] need_B) -> (Tensor, Tensor[], Tensor[])",
)


def exact(device: torch.device) -> contextlib.AbstractContextManager:
    """Keep autocast from rounding float32 adapters once more inside an implementation."""
    if not torch._C._is_any_autocast_enabled() or device.type == "meta":
        return _NOTHING
    return torch.autocast(device.type, enabled=False)


_NOTHING = contextlib.nullcontext()


def forward(
    x: Tensor, projections: Sequence[Operands], impl: str
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return y and s of each projection of x [M, K], s None without an adapter."""
    body = plans.function("forward", impl, x, projections)
    with exact(x.device):
        return body(x, projections)


def _backward(
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Operands],
    ss: Sequence[Tensor | None],
    impl: str,
    need_x: bool,
    needs: Sequence[tuple[bool, bool]],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    body = plans.function("backward", impl, x, projections, dys)
    with exact(x.device):
        return body(dys, x, projections, ss, need_x, needs)


# The operators, which hold lists of tensors.


def _or_empty(x: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [x.new_empty(0) if t is None else t for t in tensors]


def _or_none(tensors: Sequence[Tensor], there: Sequence[bool]) -> list[Tensor | None]:
    return [t if flag else None for t, flag in zip(tensors, there, strict=True)]


def _projections(weight, lora_A, lora_B, bias, seed, scaling, dropout_p) -> list[Operands]:
    """Return the lists of an operator's arguments by projection."""
    adapted = [a.dim() == 2 for a in lora_A]
    return [
        Operands(*row)
        for row in zip(
            weight,
            _or_none(lora_A, adapted),
            _or_none(lora_B, adapted),
            _or_none(bias, [t.numel() == w.shape[0] for t, w in zip(bias, weight, strict=True)]),
            _or_none(seed, [t.numel() > 0 for t in seed]),
            [scaling] * len(weight),
            dropout_p,
            strict=True,
        )
    ]


def _lists(x: Tensor, projections: Sequence[Operands]) -> list[list]:
    """Return projections as the operator takes them."""
    w, a, b, bias, seed, scaling, p = (list(field) for field in zip(*projections, strict=True))
    return [w, *(_or_empty(x, tensors) for tensors in (a, b, bias, seed)), scaling[0], p]


def _alike(projections: Sequence[Operands]) -> Sequence[Operands]:
    """Return projections of one scaling: where they differ, it becomes part of each b."""
    first, *others = projections  # a symbolic scaling would lose that by being compared with itself
    if all(p.scaling == first.scaling for p in others):
        return projections
    return [  # torch 2.8 does not compile _replace()
        Operands(
            *(p.w, *((None, None) if p.a is None else with_scaling(p.a, p.b, p.scaling))),
            *(p.bias, p.seed, 1.0, p.p),
        )
        for p in projections
    ]


def _forward_op(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, impl):
    projections = _projections(weight, lora_A, lora_B, bias, seed, float(scaling), dropout_p)
    ys, ss = forward(x, projections, impl)
    return ys, _or_empty(x, ss)


def _backward_op(
    dy, x, weight, lora_A, lora_B, s, seed, scaling, dropout_p, impl, need_x, need_A, need_B
):
    nothing = [x.new_empty(0)] * len(weight)
    projections = _projections(weight, lora_A, lora_B, nothing, seed, float(scaling), dropout_p)
    dys = _or_none(dy, [d.dim() == 2 for d in dy])
    ss = _or_none(s, [p.a is not None for p in projections])
    needs = list(zip(need_A, need_B, strict=True))
    dx, da, db = _backward(dys, x, projections, ss, impl, need_x, needs)
    return x.new_empty(0) if dx is None else dx, _or_empty(x, da), _or_empty(x, db)


def _forward_fake(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, impl):
    ys = [x.new_empty(x.shape[0], w.shape[0]) for w in weight]
    adapted = [
        x.new_empty(x.shape[0], a.shape[0], dtype=a.dtype) if a.dim() == 2 else None for a in lora_A
    ]
    return ys, _or_empty(x, adapted)


def _backward_fake(
    dy, x, weight, lora_A, lora_B, s, seed, scaling, dropout_p, impl, need_x, need_A, need_B
):
    def grads(factors, needs):
        wanted = [
            need and a.dim() == d.dim() == 2 for a, d, need in zip(factors, dy, needs, strict=True)
        ]
        return _or_empty(
            x,
            [
                a.new_empty(a.shape) if flag else None
                for a, flag in zip(factors, wanted, strict=True)
            ],
        )

    dx = x.new_empty(x.shape) if need_x else x.new_empty(0)
    return dx, grads(lora_A, need_A), grads(lora_B, need_B)


def _setup_context(ctx, inputs, output):
    x, *lists, impl = inputs
    ctx.mark_non_differentiable(*output[1])
    projections = _projections(*lists)
    ss = _or_none(output[1], [p.a is not None for p in projections])
    _save(ctx, x, projections, ss, impl)


def _autograd(ctx, dys, _):
    need_x, *needs = ctx.needs_input_grad[:5]
    dx, *grads = _grads(ctx, dys, need_x, list(zip(*needs, strict=True)))
    return (dx, *grads, [None] * len(dys), None, None, None)


def _registered() -> torch.library.Library:
    """Make the operators known to PyTorch."""
    lib = torch.library.Library("fastlora", "FRAGMENT")
    of = {"lora_linears": (_forward_op, _forward_fake)}
    of["lora_linears_backward"] = (_backward_op, _backward_fake)
    for schema, (name, (body, fake)) in zip(SCHEMAS, of.items(), strict=True):
        lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        lib.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastlora::{name}", fake, lib=lib)
    torch.library.register_autograd(
        "fastlora::lora_linears", _autograd, setup_context=_setup_context, lib=lib
    )
    return lib


# A second import of this file, or a reload, leaves them to the first, which may be in use.
if not hasattr(torch.ops.fastlora, "lora_linears"):
    _lib = _registered()


# Gradients


def _save(ctx, x, projections, ss, impl) -> None:
    ctx.rest = [p[5:] for p in projections], impl
    ctx.set_materialize_grads(False)
    kept = [t for w, a, b, _, seed, _, _ in projections for t in (w, a, b, seed)]
    ctx.save_for_backward(x, *kept, *ss)


def _grads(ctx, dys, need_x, needs):
    x, *kept = ctx.saved_tensors
    rest, impl = ctx.rest
    n = len(rest)
    projections = [
        Operands(w, a, b, None, seed, *numbers)
        for (w, a, b, seed), numbers in zip(_by_four(kept[: 4 * n]), rest, strict=True)
    ]
    return gradients(dys, x, projections, kept[4 * n :], impl, need_x, needs)


def gradients(
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Operands],
    ss: Sequence[Tensor | None],
    impl: str,
    need_x: bool,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, ...]:
    """Return dx, and lists of the gradients of each weight, lora_A, lora_B and bias.

    ``needs`` holds a flag for each of those four, for each projection; what is not asked for, or
    has no dy, is None.
    """
    n = len(projections)
    needs = [
        flags if dy is not None else (False,) * 4 for dy, flags in zip(dys, needs, strict=True)
    ]
    need_x = need_x and any(dy is not None for dy in dys)
    dx, da, db = None, [None] * n, [None] * n
    if looked_into(*dys):
        dx, da, db = _differentiable_grads(dys, x, projections)
    elif need_x or any(need_a or need_b for _, need_a, need_b, _ in needs):
        factors = [(need_a, need_b) for _, need_a, need_b, _ in needs]
        direct = unobserved(x, *dys, *(t for p in projections for t in p[:3]))
        body = _backward if direct else _observed_backward
        dx, da, db = body(dys, x, projections, ss, impl, need_x, factors)
    dw = [dy.t() @ x if flags[0] else None for dy, flags in zip(dys, needs, strict=True)]
    dbias = [dy.sum(0) if flags[3] else None for dy, flags in zip(dys, needs, strict=True)]
    return dx, dw, da, db, dbias


def _observed_backward(dys, x, projections, ss, impl, need_x, needs):
    """Do what `_backward` does through the operator, for whom it may concern."""
    alike = _alike(projections)
    if alike is not projections:  # float16 factors have become float32 there
        ss = [None if s is None else s.to(p.a.dtype) for s, p in zip(ss, alike, strict=True)]
    w, a, b, _, *rest = _lists(x, alike)
    lists = [_or_empty(x, dys), x, w, a, b, _or_empty(x, ss), *rest]
    need_a, need_b = (list(flags) for flags in zip(*needs, strict=True))
    dx, da, db = torch.ops.fastlora.lora_linears_backward(*lists, impl, need_x, need_a, need_b)
    da, db = _or_none(da, need_a), _or_none(db, need_b)
    if alike is not projections:
        of = list(zip(da, db, projections, strict=True))
        da = [None if g is None else g.to(p.a.dtype) for g, _, p in of]
        db = [None if g is None else (g * p.scaling).to(p.b.dtype) for _, g, p in of]
    return dx if need_x else None, da, db


def _by_four(flat: Sequence) -> list[Sequence]:
    return [flat[i : i + 4] for i in range(0, len(flat), 4)]


def _differentiable_grads(dys, x, projections):
    dx, da, db = None, [None] * len(dys), [None] * len(dys)
    for i, (dy, (w, a, b, _, seed, scaling, p)) in enumerate(zip(dys, projections, strict=True)):
        if dy is None:
            continue
        part = dy @ w
        if a is not None:
            keep = _kept(x, a, seed, p)
            x_hat = x.to(a.dtype) if keep is None else x.to(a.dtype) * keep
            dy_scaled = dy.to(b.dtype) * scaling
            ds = dy_scaled @ b
            low_rank = ds @ a if keep is None else (ds @ a) * keep
            part = part + low_rank.to(x.dtype)
            da[i], db[i] = ds.t() @ x_hat, dy_scaled.t() @ (x_hat @ a.t())
        dx = part if dx is None else dx + part
    return dx, da, db


def _kept(x, a, seed, p):
    """Return what dropout multiplies x with, [M, K] in the dtype of a, or None."""
    if seed is None:
        return None
    return keep_mask(seed, range(x.shape[0]), x.shape[1], p).to(a.dtype) * kept_scale(p)


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, projections, impl, *_):
        ys, ss = forward(x, projections, impl)
        _save(ctx, x, projections, ss, impl)
        need_x, _, _, *flat = ctx.needs_input_grad
        if not need_x and len(ys) > 1:  # of frozen layers nothing that follows is to be kept
            pairs = zip(ys, _by_four(flat), strict=True)
            ctx.mark_non_differentiable(*(y for y, needs in pairs if not any(needs)))
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        need_x, _, _, *flat = ctx.needs_input_grad
        dx, *grads = _grads(ctx, dys, need_x, _by_four(flat))
        return (dx, None, None, *(grad for row in zip(*grads, strict=True) for grad in row))


# Without Function.apply's preparations for functorch, which take 7 µs: `unobserved` excludes its
# tensors, also those that outlived their transform.
_apply = super(torch.autograd.Function, _Direct).apply


def transformed() -> bool:
    """Return whether `torch.func` or forward-mode AD looks on, which know PyTorch's operations."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def run(x: Tensor, projections: Sequence[Operands], impl: str) -> Sequence[Tensor]:
    """Return y of each projection, by the shortest way that gives what the operator does."""
    by_functions = transformed()
    flat = [t for w, a, b, bias, _, _, _ in projections for t in (w, a, b, bias)]
    observed = by_functions or not unobserved(x, *flat)
    few = impl == "auto" and x.is_cpu and not observed and _is_few(x, projections)
    if by_functions or few or impl == "eager":
        with exact(x.device):
            return eager.forward_all(x, projections, observed)
    if observed:
        return torch.ops.fastlora.lora_linears(x, *_lists(x, _alike(projections)), impl)[0]
    if torch.is_grad_enabled():
        for t in (x, *flat):
            if t is not None and t.requires_grad:
                return _apply(x, projections, impl, *flat)
    return forward(x, projections, impl)[0]


def _is_few(x: Tensor, projections: Sequence[Operands]) -> bool:
    keeps_more = len(projections) > 1
    for _, a, b, _, seed, _, _ in projections:
        if a is not None:
            if not (a.is_contiguous() and b.is_contiguous()):
                return False  # PyTorch's gradients of others round worse than the rule allows
            keeps_more |= seed is not None or a.dtype != x.dtype
    return plans.is_few(*x.shape, x.device, keeps_more)


def unobserved(*tensors: Tensor | None) -> bool:
    """Return whether no compiler, dispatch mode, transform or subclass would see an operator.

    Nor the dispatcher: it resolves tensors whose negation is still to be carried out.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    for t in tensors:  # a generator takes longer, for each layer call
        if t is not None and (type(t) not in _PLAIN or _wrapped(t) or t.is_neg()):
            return False
    return True


def looked_into(*dys: Tensor | None) -> bool:
    """Return whether gradients have to be made of PyTorch's operations.

    With create_graph=True they will be differentiated; under `is_grads_batched` and vmap a dy is
    several of them.
    """
    return (
        torch.is_grad_enabled()
        or transformed()
        or any(dy is not None and (_wrapped(dy) or _legacy(dy)) for dy in dys)
    )


_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_legacy = torch._C._functorch.is_legacy_batchedtensor
_PLAIN = (Tensor, torch.nn.Parameter)
