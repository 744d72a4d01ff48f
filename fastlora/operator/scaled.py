# SPDX-License-Identifier: Apache-2.0
"""Projections with a scale [N] for the columns of their frozen product, as DoRA's have.

Implementations of kernels have steps for them. For others, and for rows that are cut, they are
problems that every implementation solves: a frozen product, which is multiplied, and then
adapters that are added to it. In backward the frozen layer's dy is multiplied, the adapters' is
not: rounded once more it would cost float32 adapters their last digits. Under dropout what scale
changes is a problem of dropout(x), which is made for it and made again.
"""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.operator.dropout import kept_ones, kept_scale
from fastlora.operator.operands import Each, Operands, Projections, Segments
from fastlora.operator.weights import Quantised, dense

# Rows of a mask, drawn at a time on a CPU: at least so many, or elements.
ROWS, ELEMENTS = 512, 1 << 18


def forward(
    find: Callable, x: Tensor, projections: Projections, keep: Sequence[bool] | None = None
) -> tuple[list[Tensor], Each]:
    """Return each y [M, N]; and each s, and after them what each scale multiplies [M, N], or None.

    The last where ``keep`` says so. ``find`` returns what runs projections without a scale.
    """
    n, ys, groups, first, then = len(projections), {}, [], [], []
    kept: list[Tensor | None] = [None] * (2 * n)
    impl, mine, others = _split(find, x, projections, 0)
    if mine:
        numbers, ones = zip(*mine, strict=True)
        ss, _ = impl.shrink(x, ones)
        each = impl.scaled_outputs(x, ones, ss, keep is None or any(keep))
        for i, s, y, z in zip(numbers, ss, *each, strict=True):
            kept[i], ys[i], kept[n + i] = s, y, z
    for i, one in others:
        if type(one.w) is not slice:
            groups.append([])
        groups[-1].append((i, one))
    for (i, one), *slices in groups:
        if one.scale is None:
            first += [(i, one), *slices]
        elif one.seed is None:
            first.append((i, _frozen(one)))
    there = iter(_forward(find, x, first, kept))
    for (i, one), *slices in groups:
        if one.scale is None:
            ys[i] = next(there)
        elif one.seed is None:
            kept[n + i] = z = next(there)
            ys[i] = columns(z, one.scale, one.bias)
            then += [*_added(i, one, ys[i]), *slices]
        else:
            w, (x_hat, _) = dense(one.w), dropped(x, one)
            kept[n + i], y = F.linear(x_hat, w), F.linear(x, w, one.bias)
            del w  # before another one is made dense
            ys[i] = columns(kept[n + i], _changed(one)).add_(y)
            _forward(find, x_hat, _added(i, _on_dropped(one), ys[i]), kept)
    _forward(find, x, then, kept)
    if keep:
        kept[n:] = [z if k else None for z, k in zip(kept[n:], keep, strict=True)]
    return [ys[i] for i in sorted(ys)], kept


def backward(
    find: Callable, dys: Each, x: Tensor, projections: Projections, kept: Each, need_x: bool,
    needs: Sequence, need_scales: Sequence[bool],
) -> tuple[Tensor | None, Each, Each, Each]:  # fmt: skip
    """Return dx [M, K], and da, db and the gradient of scale [N] of each, as `steps.backward`."""
    n, given, of_dropped = len(projections), [], []
    found = das, dbs, dscales = [[None] * n for _ in range(3)]
    impl, mine, others = _split(find, x, projections, 1, dys)
    part = None
    if mine:
        needed = [needs[i] for i, _ in mine], [need_scales[i] for i, _ in mine]
        part = _backward_by_kernels(impl, dys, x, mine, kept, need_x, *needed, found)
    for i, one in others:
        dy = dys[i]
        if one.scale is None:
            given.append((i, dy, one, kept[i], needs[i]))
        elif dy is not None and one.seed is None:
            of = dy, kept[n + i], one.scale, one.bias
            dz, dscales[i] = _columns_backward(*of, need_x, need_scales[i])
            given.append((i, dz, _frozen(one), None, (False, False)))
            if one.a is not None:
                given.append((i, dy, _adapter(one), kept[i], needs[i]))
        elif dy is not None:
            given.append((i, dy, _frozen(one), None, (False, False)))
            of_dropped.append((i, dy, one))
    dx = _backward(find, x, given, need_x, found) if given else None
    dx = part if dx is None else dx if part is None else dx.add_(part)
    for i, dy, one in of_dropped:
        x_hat, ones = dropped(x, one, masked=need_x)
        of = dy, kept[n + i], _changed(one), None
        dz, dscale = _columns_backward(*of, need_x, need_scales[i])
        dscales[i] = None if dscale is None else dscale.mul_(kept_scale(one.p))
        wide = i, dz, _frozen(one), None, (False, False)
        narrow = i, dy, _adapter(_on_dropped(one)), kept[i], needs[i]
        part = _backward(find, x_hat, [wide, narrow], need_x, found)
        dx = dx if part is None else dx.addcmul_(part, ones)
    dscales = [
        None if dscale is None else dscale.to(one.scale.dtype)
        for dscale, one in zip(dscales, projections, strict=True)
    ]
    return dx, das, dbs, dscales


def _split(
    find: Callable, x: Tensor, projections: Projections, op: int, dys: Each | None = None
) -> tuple[ModuleType | None, list, list]:
    """Return an implementation with steps for scales, numbered projections for it, and the others.

    Forward is ``op`` 0. Those that have no dy are neither.
    """
    each = list(enumerate(projections))
    mine, taken = [(i, one) for i, one in each if one.scale is not None], True
    for _, one in each:
        taken &= isinstance(one.w, Tensor | Quantised) and type(one.scaling) is not Segments
        taken &= one.scale is None or one.a is not None
    impls = find(x, [one for _, one in mine]).impls if taken else ()
    if not impls or not hasattr(impls[op], "ds_db_of_scaled"):
        return None, [], each
    others = [(i, one) for i, one in each if one.scale is None]
    mine = [(i, one) for i, one in mine if dys is None or dys[i] is not None]
    return impls[op], [(i, p._replace(scale=p.scale.contiguous())) for i, p in mine], others


def _backward_by_kernels(
    impl: ModuleType, dys: Each, x: Tensor, mine: list, kept: Each, need_x: bool, needs: Sequence,
    need_scales: Sequence[bool], found: Sequence[list],
) -> Tensor | None:  # fmt: skip
    """Return dx of projections that kernels have steps for; put other gradients into ``found``."""
    numbers, ones = zip(*mine, strict=True)
    n, (need_a, need_b) = len(kept) // 2, zip(*needs, strict=True)
    dys, ss = [dys[i] for i in numbers], [kept[i] for i in numbers]
    zs = [kept[n + i] if need else None for i, need in zip(numbers, need_scales, strict=True)]
    of = dys, ones, ss, zs, [need_x or need for need in need_a], need_b, need_x
    dss, *dbs, dzs, dscales = impl.ds_db_of_scaled(*of)
    grads = impl.da(x, ones, dss, need_a), *dbs, dscales
    for into, each in zip(found, grads, strict=True):
        for i, grad in zip(numbers, each, strict=True):
            into[i] = grad
    if not need_x:
        return None
    wide = []
    for one, dy, dz, ds in zip(ones, dys, dzs, dss, strict=True):
        wide.append((dz, one, ds) if one.seed is None else (dy, _frozen(one), None))
    dx = impl.input_grad(*zip(*wide, strict=True))
    for one, dz, ds in zip(ones, dzs, dss, strict=True):
        if one.seed is not None:
            part = impl.input_grad([dz], [one._replace(seed=None, p=0.0)], [ds])
            dx = impl.dropped(part, one.seed, one.p, kept_scale(one.p), dx)
    return dx


def _forward(find: Callable, x: Tensor, numbered: Sequence, kept: list) -> list[Tensor]:
    if not numbered:
        return []
    numbers, ones = zip(*numbered, strict=True)
    ys, ss = find(x, ones).forward(x, ones)
    for i, s in zip(numbers, ss, strict=True):
        kept[i] = kept[i] if s is None else s
    return list(ys)


def _backward(find, x: Tensor, numbered: Sequence, need_x: bool, found: Sequence[list]):
    numbers, dys, ones, ss, needs = zip(*numbered, strict=True)
    if all(dy is None for dy in dys) or not (need_x or any(map(any, needs))):
        return None
    dx, *grads = find(x, ones).backward(dys, x, ones, ss, need_x, needs)
    for into, each in zip(found[:2], grads, strict=True):
        for i, grad in zip(numbers, each, strict=True):
            into[i] = into[i] if grad is None else grad
    return dx


def _frozen(one: Operands) -> Operands:
    return Operands(one.w, None, None, one.bias, None, 1.0, 0.0)


def _adapter(one: Operands) -> Operands:
    w = None if type(one.scaling) is Segments else slice(None)
    return one._replace(w=w, bias=None, scale=None)


def _added(i: int, one: Operands, y: Tensor) -> list[tuple[int, Operands]]:
    """Return what adds an adapter to y, numbered."""
    if type(one.scaling) is Segments:
        return [(i, _adapter(one)._replace(bias=y))]
    there = i, Operands(None, None, None, y, None, 1.0, 0.0)
    return [there] if one.a is None else [there, (i, _adapter(one))]


def _on_dropped(one: Operands) -> Operands:
    """Return a projection of the elements that are kept of x, which nobody has multiplied."""
    return one._replace(seed=None, scaling=one.scaling * kept_scale(one.p), p=0.0)


def _changed(one: Operands) -> Tensor:
    """Return what scale makes of the frozen product of those elements, but for the product."""
    return (_wide(one.scale) - 1.0) * kept_scale(one.p)


def dropped(x: Tensor, one: Operands, masked: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return the elements of x [M, K] that are kept, zeros for the others; and the mask as x."""
    M, K = x.shape
    rows = min(M, max(ROWS, ELEMENTS // max(1, K))) if x.is_cpu else M
    parts = kept_ones(one.seed, x.shape, one.p, x.dtype, rows)
    if rows == M:
        return x * (ones := next(parts)), ones
    x_hat, ones = torch.empty_like(x), torch.empty_like(x) if masked else None
    for at, part in zip(range(0, M, rows), parts, strict=True):
        torch.mul(x[at : at + rows], part, out=x_hat[at : at + rows])
        if masked:
            ones[at : at + rows] = part
    return x_hat, ones


def columns(z: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``(z - bias) · scale + bias`` [M, N] in z's dtype: z where scale is 1, to the bit.

    A batch norm in evaluation is that in one pass, and in float32 under 16 bits.
    """
    plus, one = _as_statistics(z, bias)
    of = _wide(scale), plus, plus, one
    return torch.native_batch_norm(z, *of, False, 0.0, 0.0)[0]


def _columns_backward(
    dy: Tensor, z: Tensor | None, scale: Tensor, bias: Tensor | None, need_z: bool, need_scale: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of z and of scale, in float32 for the latter."""
    if not need_scale:
        return columns(dy, scale) if need_z else None, None
    if not len(dy):  # PyTorch would divide by that
        return dy, torch.zeros_like(_wide(scale))
    plus, one = _as_statistics(z, bias)
    of = dy.contiguous(), z, _wide(scale), plus, one, None, None, False, 0.0
    dz, dscale, _ = torch.ops.aten.native_batch_norm_backward(*of, [need_z, True, False])
    return dz if need_z else None, dscale


def _as_statistics(z: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    one = z.new_ones(z.shape[1], dtype=torch.promote_types(z.dtype, torch.float32))
    return torch.zeros_like(one) if bias is None else bias.to(one.dtype), one


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
