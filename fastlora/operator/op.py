# SPDX-License-Identifier: Apache-2.0
"""The ``torch.library`` operators behind `lora_linear`: schema, fake, autograd, bodies.

``fastlora::lora_linears`` returns y and what backward needs of the low-rank path (s) for each of
several projections of one x; ``fastlora::lora_linears_backward`` returns the gradients of x, of
adapters and of scales. Both take 2-D tensors and the name of an implementation; "auto" is resolved
inside, for the sizes that come, so that one compiled graph serves them all. ``operands`` holds w,
a, b, bias, scale and seed of each projection; an empty tensor stands for what there is none of, as
it does for gradients. There is one scaling: in a list it would be part of a compiled graph. With
``offsets`` all are stacks, the i-th of each for the rows from offsets[i] on. The
gradients of trained base weights and biases are plain products, written in the autograd formula.

`run` calls the bodies without the dispatcher where nothing could tell: in eager mode the way
through it and back costs as much Python time as ten small products.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fastlora.operator import eager, plans, scaled
from fastlora.operator.operands import (
    Each,
    Operands,
    Projections,
    Segments,
    spread,
    with_scaling,
)
from fastlora.operator.steps import exactly
from fastlora.operator.weights import Quantised, dense

if plans.TUNE:
    from fastlora.operator import tuning  # noqa: F401 - measures what plans meet first


def forward(
    x: Tensor,
    projections: Projections,
    impl: str,
    plan: plans.Pair | None = None,
    trains: bool | None = None,
) -> tuple[list[Tensor], Each]:
    """Return y and s of each projection of x [M, K], s None without an adapter.

    With scales what those multiply follows, [M, N], or None for a projection without one. Where it
    is known whether gradients are made, ``trains``, None also for a scale that needs none.
    """
    plan = plan or _plan(impl, x, projections)
    if trains is None or not _are_scaled(projections):
        return exactly(x.device, plan.forward, x, projections)
    keep = [trains and p.scale is not None and p.scale.requires_grad for p in projections]
    return exactly(x.device, plan.forward, x, projections, keep)


def _plan(impl: str, x: Tensor, projections: Projections) -> plans.Pair:
    """Return what runs projections; those with scales are some that others run."""
    if not _are_scaled(projections):
        return plans.find(impl, x, projections)
    of = functools.partial(plans.find, impl)
    return plans.Pair(*(functools.partial(f, of) for f in (scaled.forward, scaled.backward)))


def _are_scaled(projections: Projections) -> bool:
    for one in projections:  # noqa: SIM110 - a generator takes longer, for each layer call
        if one.scale is not None:
            return True
    return False


# The operators, which hold lists of tensors.

SCHEMAS = (
    "lora_linears(Tensor x, Tensor[] operands, Scalar scaling, float[] dropout_p, str impl, "
    "Tensor? offsets) -> (Tensor[], Tensor[])",
    "lora_linears_backward(Tensor[] dy, Tensor x, Tensor[] operands, Tensor[] s, Scalar scaling, "
    "float[] dropout_p, str impl, bool need_x, bool[] need_A, bool[] need_B, "
    "bool[] need_scale, Tensor? offsets) -> (Tensor, Tensor[], Tensor[], Tensor[])",
)


def _or_empty(x: Tensor, tensors: Each) -> list[Tensor]:
    return [x.new_empty(0) if t is None else t for t in tensors]


def _or_none(tensors: Sequence[Tensor]) -> Each:
    return [None if t.dim() == 1 and not t.shape[0] else t for t in tensors]


def _listed(x: Tensor, projections: Projections) -> tuple[list[Tensor], float, list[float]]:
    """Return operands, scaling and dropout_p."""
    operands: list[Tensor | None] = []
    # PyTorch 2.8 compiles no part of a namedtuple.
    for w, a, b, bias, seed, _, _, scale in projections:
        operands += w, a, b, bias, scale, seed
    return _or_empty(x, operands), _number(projections[0]), [one.p for one in projections]


def _number(one: Operands) -> float:
    """Return the scaling, of all its segments where weights are stacked."""
    return one.scaling.scalings[0] if type(one.scaling) is Segments else one.scaling


def _offsets(projections: Projections) -> Tensor | None:
    of = projections[0].scaling
    return of.ends if type(of) is Segments else None


def _projections(operands, scaling, dropout_p, offsets) -> list[Operands]:
    found = []
    for (*of, scale, seed), p in zip(_split(_or_none(operands), 6), dropout_p, strict=True):
        own = scaling if offsets is None else Segments(offsets, (scaling,), (p,))
        found.append(Operands(*of, seed, own, p, scale))
    return found


def _split(flat: Sequence, size: int) -> list[Sequence]:
    return [flat[i : i + size] for i in range(0, len(flat), size)]


def _forward_op(x, operands, scaling, dropout_p, impl, offsets):
    ys, ss = forward(x, _projections(operands, float(scaling), dropout_p, offsets), impl)
    return ys, _or_empty(x, ss)


def _backward_op(
    dy, x, operands, s, scaling, dropout_p, impl, need_x, need_A, need_B, need_scale, offsets
):
    projections = _projections(operands, float(scaling), dropout_p, offsets)
    needs = list(zip(need_A, need_B, strict=True)), need_scale
    dx, *grads = _by_plan(_or_none(dy), x, projections, _or_none(s), impl, need_x, *needs)
    return (*_or_empty(x, [dx]), *(_or_empty(x, each) for each in grads))


def _by_plan(dys, x, projections, ss, impl, need_x, needs, need_scale, plan=None) -> tuple:
    """Return dx, and the gradients of lora_A, lora_B and scale of each projection."""
    plan, given = plan or _plan(impl, x, projections), (dys, x, projections, ss, need_x, needs)
    if _are_scaled(projections):
        return exactly(x.device, plan.backward, *given, need_scale)
    return *exactly(x.device, plan.backward, *given), [None] * len(projections)


def _forward_fake(x, operands, scaling, dropout_p, impl, offsets):
    M, each = x.shape[0], _projections(operands, scaling, dropout_p, offsets)
    ss = [one.a if one.a is None else one.a.new_empty(M, one.a.shape[-2]) for one in each]
    ys = [x.new_empty(M, one.w.shape[-2]) for one in each]
    if _are_scaled(each):
        pairs = zip(each, ys, strict=True)
        ss += [None if one.scale is None else torch.empty_like(y) for one, y in pairs]
    return ys, _or_empty(x, ss)


def _backward_fake(
    dy, x, operands, s, scaling, dropout_p, impl, need_x, need_A, need_B, need_scale, offsets
):
    def grads(tensors, needs):
        return [
            t.new_empty(t.shape) if need and t.numel() and d.dim() == 2 else x.new_empty(0)
            for t, d, need in zip(tensors, dy, needs, strict=True)
        ]

    dx, of = x.new_empty(x.shape if need_x else 0), (need_A, need_B, need_scale)
    return dx, *(grads(operands[i::6], need) for i, need in zip((1, 2, 4), of, strict=True))


def _setup_context(ctx, inputs, output):
    x, *rest, impl, offsets = inputs
    ctx.mark_non_differentiable(*output[1])
    save(ctx, [x], _projections(*rest, offsets), _or_none(output[1]), impl)


def _autograd(ctx, dys, _):
    need_x, needs = ctx.needs_input_grad[:2]
    dx, grads = _grads(ctx, dys, need_x, [need for i, need in enumerate(needs) if i % 6 < 5])
    return dx, [g for five in _split(grads, 5) for g in (*five, None)], None, None, None, None


# A second import of this file, or a reload, leaves them to the first, which may be in use.
if not hasattr(torch.ops.fastlora, "lora_linears"):
    _lib = torch.library.Library("fastlora", "FRAGMENT")
    _bodies = (_forward_op, _forward_fake), (_backward_op, _backward_fake)
    for _schema, (_body, _fake) in zip(SCHEMAS, _bodies, strict=True):
        _name = _schema.partition("(")[0]
        _lib.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
        _lib.impl(_name, _body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastlora::{_name}", _fake, lib=_lib)
    torch.library.register_autograd(
        "fastlora::lora_linears", _autograd, setup_context=_setup_context, lib=_lib
    )


# Gradients


def save(ctx, inputs: Sequence[Tensor], projections, ss: Each, impl: str, plan=None) -> None:
    """Keep for backward what `saved` returns; weights that are no tensors as they are."""
    kept, numbers = [*inputs, *ss], []
    for w, a, b, bias, seed, scaling, p, scale in projections:
        own = type(w) is Quantised or type(w) is slice
        kept += None if own else w, a, b, seed, None if scale is None else bias, scale
        numbers.append((w if own else None, scaling, p))
    ctx.rest = impl, plan, numbers, len(ss)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*kept)


def saved(ctx, count: int) -> tuple:
    """Return ``count`` inputs, projections, biases under scales alone, ss, impl and plan."""
    impl, plan, numbers, of_ss = ctx.rest
    tensors = ctx.saved_tensors  # once: checkpoints make them again
    inputs, kept = tensors[:count], tensors[count:]
    at, projections = of_ss, []
    for own, scaling, p in numbers:
        w, a, b, seed, bias, scale = kept[at : at + 6]
        projections.append(Operands(own or w, a, b, bias, seed, scaling, p, scale))
        at += 6
    return inputs, projections, kept[:of_ss], impl, plan


def _grads(ctx, dys, need_x, needs) -> tuple[Tensor | None, Each]:
    (x,), projections, ss, impl, plan = saved(ctx, 1)
    return gradients(dys, x, projections, ss, impl, need_x, needs, plan)


def gradients(
    dys: Each, x: Tensor, projections: Projections, ss: Each, impl, need_x, needs, plan=None
) -> tuple[Tensor | None, Each]:
    """Return dx, and the gradients of weight, lora_A, lora_B, bias and scale of each in a row.

    ``needs`` holds a flag for each of those; what is not asked for, or has no dy, is None.
    ``plan``: what forward ran by, where it is known.
    """
    dx, grads, factors, scales, some, i = None, [None] * len(needs), [], [], False, 0
    outer, dys = dys, spread(dys, projections) if 5 * len(dys) < len(needs) else dys
    trained = False
    for dy in dys:
        need_w, need_a, need_b, need_bias, need_scale = needs[i : i + 5]
        if dy is None:
            need_a = need_b = need_scale = False
        else:
            one = projections[i // 5]
            if need_w and one.scale is not None:
                trained = True
            elif need_w:
                grads[i] = _weight_grad(dy, x, one)
            some = some or need_x or need_a or need_b or need_scale or trained
            if need_bias:
                grads[i + 3] = _bias_grad(dy, one)
        factors.append((need_a, need_b))
        scales.append(need_scale)
        i += 5
    if not some:
        return dx, grads
    # With a plan, what was saved beside x is as it was in forward.
    kept = [] if plan else [t for p in projections for t in (*p[:3], p.scale)]
    kept = [t for t in kept if isinstance(t, Tensor)]
    observed = not unobserved(x, *dys, *kept)
    whole = all(isinstance(p.w, Tensor) and _is_whole(p.scaling) for p in projections)
    if trained or looked_into(*dys) or (observed and not (whole and _alike(projections))):
        projections = [one._replace(w=dense(one.w)) for one in projections]
        flags = [need_x]
        for i, (one, of, scale) in enumerate(zip(projections, factors, scales, strict=True)):
            flags += needs[5 * i] and one.scale is not None, *of, False, scale
        given = _observed, outer, x, projections, flags
        dx, *flat = exactly(x.device, eager.gradients, *given)
        if trained:
            grads[::5] = [
                grad if dw is None else dw for grad, dw in zip(grads[::5], flat[::5], strict=True)
            ]
        da, db, dscale = flat[1::5], flat[2::5], flat[4::5]
    elif observed:
        operands, *numbers = _listed(x, projections)
        given = _or_empty(x, dys), x, operands, _or_empty(x, ss), *numbers, impl, need_x
        needed = (list(flags) for flags in zip(*factors, strict=True))
        of = *needed, scales, _offsets(projections)
        dx, *each = torch.ops.fastlora.lora_linears_backward(*given, *of)
        dx, (da, db, dscale) = dx if need_x else None, map(_or_none, each)
    else:
        given = dys, x, projections, ss, impl, need_x, factors, scales, plan
        dx, da, db, dscale = _by_plan(*given)
    grads[1::5], grads[2::5], grads[4::5] = da, db, dscale
    return dx, grads


def _weight_grad(dy: Tensor, x: Tensor, one: Operands) -> Tensor:
    if one.w.dim() == 2:
        return dy.t() @ x
    pairs = zip(*(t.split(one.scaling.sizes()) for t in (dy, x)), strict=True)
    return torch.stack([dy_g.t() @ x_g for dy_g, x_g in pairs])


def _bias_grad(dy: Tensor, one: Operands) -> Tensor:
    if one.w is None or one.w.dim() == 2:
        return dy if one.w is None else dy.sum(0)
    return torch.stack([dy_g.sum(0) for dy_g in dy.split(one.scaling.sizes())])


def _observed(x: Tensor, projections: Projections) -> list[Tensor]:
    return eager.outputs(x, projections, observed=True)


def _alike(projections: Projections) -> bool:
    """Return whether they have one scaling."""
    first, *others = projections  # a symbolic one would lose that by being compared with itself
    return all(_number(one) == _number(first) for one in others)


def _is_whole(scaling: float | Segments) -> bool:
    """Return whether the operator takes it: segments have weights of their own."""
    return type(scaling) is not Segments or isinstance(scaling.ends, Tensor)


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, projections, impl, *_):
        plan = _plan(impl, x, projections)
        ys, ss = forward(x, projections, impl, plan, trains=True)
        for one in projections:
            if one.w is None:
                ctx.mark_dirty(one.bias)
        save(ctx, [x], projections, ss, impl, plan)
        need_x, _, _, *flat = ctx.needs_input_grad
        if not need_x and len(ys) > 1:  # of frozen layers nothing that follows is to be kept
            trained, at = [False] * len(ys), -1
            for one, needs in zip(projections, _split(flat, 5), strict=True):
                at += type(one.w) is not slice
                trained[at] |= any(needs)
            frozen = [y for y, some in zip(ys, trained, strict=True) if not some]
            ctx.mark_non_differentiable(*frozen)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        need_x, _, _, *flat = ctx.needs_input_grad
        dx, grads = _grads(ctx, dys, need_x, flat)
        return dx, None, None, *grads


# Without Function.apply's preparations for functorch, which take 7 µs: `unobserved` excludes its
# tensors, also those that outlived their transform.
_apply = super(torch.autograd.Function, _Direct).apply


# Which way a call goes


def run(x: Tensor, projections: Projections, impl: str) -> Sequence[Tensor]:
    """Return y of each projection, by the shortest way that gives what the operator does."""
    flat: list[Tensor | None] = []
    whole = True
    for w, a, b, bias, _, scaling, _, scale in projections:
        whole = whole and _is_whole(scaling)
        if not isinstance(w, Tensor):  # compiled code would be guarded by a class of ours
            whole, w = False, None
        flat += w, a, b, bias, scale
    observed = not unobserved(x, *flat)
    if impl == "auto" and not observed and x.is_cpu and whole and _is_few(x, projections):
        impl = "eager"
    if impl == "eager" or (observed and (transformed() or not whole)):
        return exactly(x.device, eager.outputs, x, projections, observed)
    if observed:
        if not _alike(projections):
            projections = [_scaled(one) for one in projections]
        given = *_listed(x, projections), impl, _offsets(projections)
        return torch.ops.fastlora.lora_linears(x, *given)[0]
    if torch.is_grad_enabled():
        for t in (x, *flat):
            if t is not None and t.requires_grad:
                return _apply(x, projections, impl, *flat)
    return forward(x, projections, impl, trains=False)[0]


def _scaled(one: Operands) -> Operands:
    """Return a projection whose scaling is part of its b."""
    a, b = (None, None) if one.a is None else with_scaling(one.a, one.b, _number(one))
    of = one.scaling
    of = Segments(of.ends, (1.0,), of.p) if type(of) is Segments else 1.0
    return Operands(one.w, a, b, one.bias, one.seed, of, one.p, one.scale)


def _is_few(x: Tensor, projections: Projections) -> bool:
    """Return what `plans.is_few` does of a tensor on a CPU, in a fifth of the time."""
    if x.numel() > plans.FEW or torch._C._is_any_autocast_enabled():
        return False
    for _, a, b, _, _, scaling, *_ in projections:
        if type(scaling) is Segments:
            return False
        if a is not None and not (a.is_contiguous() and b.is_contiguous()):
            return False  # PyTorch's gradients of others round worse than the rule allows
    return True


def transformed() -> bool:
    """Return whether `torch.func` or forward-mode AD looks on, which know PyTorch's operations."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def unobserved(*tensors: Tensor | None) -> bool:
    """Return whether no compiler, dispatch mode, transform or subclass would see an operator.

    Nor the dispatcher: it resolves tensors whose negation is still to be carried out.
    """
    if (
        is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
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
    for dy in dys:  # noqa: SIM110 - a generator takes longer
        if dy is not None and (wrapped(dy) or _legacy(dy)):
            return True
    return False


wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_legacy = torch._C._functorch.is_legacy_batchedtensor
PLAIN = (Tensor, torch.nn.Parameter)
