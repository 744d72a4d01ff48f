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

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlora.operator import eager, plans, steps
from fastlora.operator.operands import Operands, with_scaling
from fastlora.operator.steps import exact

if plans.TUNE:
    from fastlora.operator import tuning  # noqa: F401 - measures what plans meet first

SCHEMAS = (
    "lora_linears(Tensor x, Tensor[] weight, Tensor[] lora_A, Tensor[] lora_B, Tensor[] bias, "
    "Tensor[] seed, Scalar scaling, float[] dropout_p, str impl) -> (Tensor[], Tensor[])",
    "lora_linears_backward(Tensor[] dy, Tensor x, Tensor[] weight, Tensor[] lora_A, "
    "Tensor[] lora_B, Tensor[] s, Tensor[] seed, Scalar scaling, float[] dropout_p, str impl, "
    "bool need_x, bool[] need_A, bool[] need_B) -> (Tensor, Tensor[], Tensor[])",
)


def forward(
    x: Tensor, projections: Sequence[Operands], impl: str
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return y and s of each projection of x [M, K], s None without an adapter."""
    return _forward(x, projections, plans.find(impl, x, projections))


def _forward(x: Tensor, projections: Sequence[Operands], plan: plans.Pair):
    impl, configs = plan.forward
    if configs is not None and not plans.aligned(x, *_read(projections)):
        configs = None
    if not _autocast():
        return steps.forward(impl, x, projections, configs)
    with exact(x.device):
        return steps.forward(impl, x, projections, configs)


def _backward(dys, x, projections, ss, plan: plans.Pair, need_x, needs):
    impl, configs = plan.backward
    if configs is not None and not plans.aligned(x, *dys, *_read(projections)):
        configs = None
    if not _autocast():
        return steps.backward(impl, dys, x, projections, ss, need_x, needs, configs)
    with exact(x.device):
        return steps.backward(impl, dys, x, projections, ss, need_x, needs, configs)


_autocast = torch._C._is_any_autocast_enabled


def _read(projections: Sequence[Operands]) -> list[Tensor | None]:
    """Return what is read beside x and dy."""
    return [t for p in projections for t in p[:3]]


# The operators, which hold lists of tensors.


def _or_empty(x: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [x.new_empty(0) if t is None else t for t in tensors]


def _or_none(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if t.dim() == 1 and not t.shape[0] else t for t in tensors]


def _projections(weight, *lists, scaling, dropout_p) -> list[Operands]:
    """Return the lists of an operator's arguments by projection."""
    rows = zip(weight, *map(_or_none, lists), [scaling] * len(weight), dropout_p, strict=True)
    return [Operands(*row) for row in rows]


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
    rest = {"scaling": float(scaling), "dropout_p": dropout_p}
    ys, ss = forward(x, _projections(weight, lora_A, lora_B, bias, seed, **rest), impl)
    return ys, _or_empty(x, ss)


def _backward_op(
    dy, x, weight, lora_A, lora_B, s, seed, scaling, dropout_p, impl, need_x, need_A, need_B
):
    rest = {"scaling": float(scaling), "dropout_p": dropout_p}
    nothing = [x.new_empty(0)] * len(weight)
    projections = _projections(weight, lora_A, lora_B, nothing, seed, **rest)
    needs, plan = list(zip(need_A, need_B, strict=True)), plans.find(impl, x, projections)
    of = _or_none(dy), x, projections, _or_none(s), plan
    dx, da, db = _backward(*of, need_x, needs)
    return x.new_empty(0) if dx is None else dx, _or_empty(x, da), _or_empty(x, db)


def _forward_fake(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, impl):
    ys = [x.new_empty(x.shape[0], w.shape[0]) for w in weight]
    ss = [None if a is None else a.new_empty(x.shape[0], a.shape[0]) for a in _or_none(lora_A)]
    return ys, _or_empty(x, ss)


def _backward_fake(
    dy, x, weight, lora_A, lora_B, s, seed, scaling, dropout_p, impl, need_x, need_A, need_B
):
    def grads(factors, needs):
        return [
            a.new_empty(a.shape) if need and a.dim() == d.dim() == 2 else x.new_empty(0)
            for a, d, need in zip(factors, dy, needs, strict=True)
        ]

    dx = x.new_empty(x.shape) if need_x else x.new_empty(0)
    return dx, grads(lora_A, need_A), grads(lora_B, need_B)


def _setup_context(ctx, inputs, output):
    x, *lists, scaling, dropout_p, impl = inputs
    ctx.mark_non_differentiable(*output[1])
    projections = _projections(*lists, scaling=scaling, dropout_p=dropout_p)
    _save(ctx, x, projections, _or_none(output[1]), impl)


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


def _save(ctx, x, projections, ss, impl, plan=None) -> None:
    ctx.rest = [p[5:] for p in projections], impl, plan
    ctx.set_materialize_grads(False)
    kept = [x, *ss]
    for w, a, b, _, seed, _, _ in projections:
        kept += w, a, b, seed
    ctx.save_for_backward(*kept)


def _grads(ctx, dys, need_x, needs):
    numbers, impl, plan = ctx.rest
    x, *kept = ctx.saved_tensors
    n, projections = len(numbers), []
    for i, (scaling, p) in enumerate(numbers):
        w, a, b, seed = kept[n + 4 * i : n + 4 * i + 4]
        projections.append(Operands(w, a, b, None, seed, scaling, p))
    return gradients(dys, x, projections, kept[:n], impl, need_x, needs, plan)


def gradients(
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Operands],
    ss: Sequence[Tensor | None],
    impl: str,
    need_x: bool,
    needs: Sequence[Sequence[bool]],
    plan: plans.Pair | None = None,
) -> tuple[Tensor | None, ...]:
    """Return dx, and lists of the gradients of each weight, lora_A, lora_B and bias.

    ``needs`` holds a flag for each of those four, for each projection; what is not asked for, or
    has no dy, is None. ``plan``: what forward ran by, where it is known.
    """
    dw, da, db, dbias = ([None] * len(dys) for _ in range(4))
    dx, factors, some = None, [], False
    for i, dy in enumerate(dys):
        if dy is None:
            factors.append((False, False))
            continue
        need_w, need_a, need_b, need_bias = needs[i]
        factors.append((need_a, need_b))
        some = some or need_x or need_a or need_b
        if need_w:
            dw[i] = dy.t() @ x
        if need_bias:
            dbias[i] = dy.sum(0)
    if not some:
        pass
    elif looked_into(*dys):
        flags = [need_x, *(flag for a, b in factors for flag in (False, a, b, False))]
        with exact(x.device):
            dx, *flat = eager.gradients(_watched, dys, x, projections, flags)
        da, db = flat[1::4], flat[2::4]
    elif unobserved(x, *dys):  # what was saved beside x is as it was in forward
        plan = plan or plans.find(impl, x, projections)
        dx, da, db = _backward(dys, x, projections, ss, plan, need_x, factors)
    else:
        dx, da, db = _observed_backward(dys, x, projections, ss, impl, need_x, factors)
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
    da, db = _or_none(da), _or_none(db)
    if alike is not projections:
        of = list(zip(da, db, projections, strict=True))
        da = [None if g is None else g.to(p.a.dtype) for g, _, p in of]
        db = [None if g is None else (g * p.scaling).to(p.b.dtype) for _, g, p in of]
    return dx if need_x else None, da, db


def _by_four(flat: Sequence) -> list[Sequence]:
    return [flat[i : i + 4] for i in range(0, len(flat), 4)]


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, projections, impl, *_):
        plan = plans.find(impl, x, projections)
        ys, ss = _forward(x, projections, plan)
        _save(ctx, x, projections, ss, impl, plan)
        need_x, _, _, *flat = ctx.needs_input_grad
        if not need_x and len(ys) > 1:  # of frozen layers nothing that follows is to be kept
            pairs = zip(ys, _by_four(flat), strict=True)
            ctx.mark_non_differentiable(*(y for y, needs in pairs if not any(needs)))
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        need_x, _, _, *flat = ctx.needs_input_grad
        dx, *grads = _grads(ctx, dys, need_x, _by_four(flat))
        found = [dx, None, None]
        for row in zip(*grads, strict=True):
            found += row
        return tuple(found)


# Without Function.apply's preparations for functorch, which take 7 µs: `unobserved` excludes its
# tensors, also those that outlived their transform.
_apply = super(torch.autograd.Function, _Direct).apply


def transformed() -> bool:
    """Return whether `torch.func` or forward-mode AD looks on, which know PyTorch's operations."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def run(
    x: Tensor, projections: Sequence[Operands], impl: str, plain: bool = False
) -> Sequence[Tensor]:
    """Return y of each projection, by the shortest way that gives what the operator does.

    ``plain``: it is known that `unobserved` finds nothing in the tensors themselves.
    """
    flat: list[Tensor | None] = []
    for w, a, b, bias, _, _, _ in projections:
        flat += w, a, b, bias
    by_functions = transformed()
    observed = by_functions or not (unobserved() if plain else unobserved(x, *flat))
    if impl == "auto" and not observed and x.is_cpu and _is_few(x, projections):
        impl = "eager"
    if by_functions or impl == "eager":
        with exact(x.device):
            return eager.outputs(x, projections, observed)
    if observed:
        return torch.ops.fastlora.lora_linears(x, *_lists(x, _alike(projections)), impl)[0]
    if torch.is_grad_enabled():
        for t in (x, *flat):
            if t is not None and t.requires_grad:
                return _apply(x, projections, impl, *flat)
    return forward(x, projections, impl)[0]


def _is_few(x: Tensor, projections: Sequence[Operands]) -> bool:
    """Return what `plans.is_few` does of a tensor on a CPU, in a fifth of the time."""
    if x.numel() > plans.FEW or _autocast():
        return False
    for _, a, b, _, _, _, _ in projections:
        if a is not None and not (a.is_contiguous() and b.is_contiguous()):
            return False  # PyTorch's gradients of others round worse than the rule allows
    return True


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
        if t is not None and (type(t) not in PLAIN or wrapped(t) or t.is_neg()):
            return False
    return True


def looked_into(*dys: Tensor | None) -> bool:
    """Return whether gradients have to be made of PyTorch's operations.

    With create_graph=True they will be differentiated; under `is_grads_batched` and vmap a dy is
    several of them.
    """
    if torch.is_grad_enabled() or transformed():
        return True
    return any(dy is not None and (wrapped(dy) or _legacy(dy)) for dy in dys)


wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_legacy = torch._C._functorch.is_legacy_batchedtensor
PLAIN = (Tensor, torch.nn.Parameter)
_watched = functools.partial(eager.outputs, observed=True)
