# SPDX-License-Identifier: Apache-2.0
"""The ``blocks`` implementation where each segment of rows meets a weight of its own.

Weights are stacks [G, N, K], adapters and biases too. The steps are those of `blocks`, for one
segment that has rows after the other: on a CPU PyTorch's ``grouped_mm`` is such a loop as well, and
takes neither float64 nor every rank.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.operator import blocks
from fastlora.operator.operands import Each, Projections, Segments


def shrink(x: Tensor, projections: Projections) -> tuple[Each, None]:
    """Return s = dropout(x) aᵀ [M, R] of each projection, in the adapters' dtype."""
    return [None if one.a is None else _shrink(x, *one[:7]) for one in projections], None


def _shrink(x: Tensor, w, a: Tensor, b, bias, seed: Tensor | None, of: Segments, p) -> Tensor:
    a = a.contiguous()
    s = grouped_mm(x, a.mT, of.ends) if seed is None else None
    if s is None:
        s = x.new_empty(len(x), a.shape[1], dtype=a.dtype)
        for begin, x_g, s_g, a_g in cut(of, (x, s), (a,)):
            s_g.copy_(blocks.shrink_rows(x_g, a_g, seed, p, begin))
    return s


def outputs(x: Tensor, projections: Projections, ss: Each, scaled: None = None) -> list[Tensor]:
    """Return y [M, N] of each projection from its s: the frozen product joins the low-rank one."""
    ys = []
    for (w, _, b, bias, _, of, *_), s in zip(projections, ss, strict=True):
        y = right = None
        if s is not None:
            right = b.contiguous().mT
            if bias is None:
                y = grouped_mm(s * of.scalings[0], right, of.ends)
        there = y is not None
        y = y.to(x.dtype) if there else x.new_empty(len(x), w.shape[1])
        for _, x_g, s_g, y_g, w_g, right_g, plus in cut(of, (x, s, y), (w.mT, right, bias)):
            if s is not None and not there:
                plus = blocks.product(y_g, s_g, right_g, plus, of.scalings[0])
            blocks.product(y_g, x_g, w_g, y_g if there else plus)
        ys.append(y)
    return ys


def ds_db(
    dys: Each, projections: Projections, ss: Each, need_ds: Sequence[bool], need_db: Sequence[bool]
) -> tuple[Each, Each]:
    """Return ds = scaling · dy b [M, R] and db = scaling · dyᵀ s [G, N, R] of each projection."""
    dss, dbs = [None] * len(dys), [None] * len(dys)
    for i, (dy, s, (_, _, b, _, _, of, *_)) in enumerate(zip(dys, ss, projections, strict=True)):
        if dy is None or b is None:
            continue
        scaling, b = of.scalings[0], b.contiguous()
        if need_ds[i]:
            dss[i] = grouped_mm(dy, b, of.ends, scaling)
            if dss[i] is None:
                dss[i] = torch.empty_like(s)
                for _, dy_g, ds_g, b_g in cut(of, (dy, dss[i]), (b,)):
                    blocks.product(ds_g, dy_g.to(b.dtype), b_g, None, scaling)
        if need_db[i]:
            dbs[i] = grouped_mm(dy.t(), s, of.ends, scaling)
            if dbs[i] is None:
                dbs[i] = _stack(of, b)
                for _, dy_g, s_g, db_g in cut(of, (dy, s), (dbs[i],)):
                    blocks.product(db_g, dy_g.t().to(b.dtype), s_g, None, scaling)
    return dss, dbs


def input_grad_and_da(
    dys: Each, x: Tensor, projections: Projections, dss: Each, needs: Sequence[bool]
) -> tuple[Tensor | None, Each]:
    """Return dx = Σ (dy w + dropout'(ds a)) [M, K] and da = dsᵀ dropout(x) [G, R, K] of each.

    Without a dy there is no dx. A mask that both need is drawn once.
    """
    dx, das = None, [None] * len(dys)
    for i, one in enumerate(projections):
        (w, a, _, _, seed, of, p, _), dy, ds = one, dys[i], dss[i]
        a = a if a is None else a.contiguous()
        asked, plain = ds is not None and needs[i], ds is not None and seed is None
        da = grouped_mm(ds.t(), x, of.ends) if asked and plain else None
        looped = _stack(of, a) if asked and da is None else None
        das[i] = looped if da is None else da
        added = dx is not None  # to what is there
        if dy is not None and not added:
            dx = grouped_mm(ds, a, of.ends) if plain else None
            added = dx is not None
            plain, dx = plain and not added, dx.to(x.dtype) if added else x.new_empty(x.shape)
        stacks = w, a, looped
        for begin, x_g, dy_g, dx_g, ds_g, w_g, a_g, da_g in cut(of, (x, dy, dx, ds), stacks):
            if dy is not None:
                blocks.product(dx_g, dy_g, w_g, dx_g if added else None)
                if plain:
                    blocks.product(dx_g, ds_g, a_g, dx_g)
            if looped is not None or (seed is not None and ds is not None):
                of_g = x_g, ds_g, a_g, seed, p, begin
                masked = None if seed is None else dx_g
                made = blocks.add_low_rank(masked, *of_g, need_a=asked)
                if asked:
                    da_g.copy_(made)
    return dx, das


def grouped_mm(left: Tensor, right: Tensor, ends: Tensor, scaling: float = 1.0) -> Tensor | None:
    """Return ``scaling · left @ right`` of all segments by PyTorch's, None where it can't.

    In float16 it might overflow before it is scaled. What PyTorch returns has rows at multiples of
    16 bytes.
    """
    found = getattr(F, "grouped_mm", None)  # since PyTorch 2.10
    dtypes = (torch.float32, torch.bfloat16)
    if left.is_cuda:  # where it does not wait for the device
        chip, _ = torch.cuda.get_device_capability(left.device)
        dtypes = (torch.bfloat16,) if chip in (9, 10) else ()
    if found is None or left.dtype != right.dtype or left.dtype not in dtypes:
        return None
    if not (_grouped(left) and _grouped(right)):
        return None
    made = found(left, right, offs=ends[1:]).contiguous()
    return made if scaling == 1.0 else made.mul_(scaling)


def _grouped(t: Tensor) -> bool:
    """Return whether ``grouped_mm`` takes ``t``: rows or columns of 16 bytes, that do not overlap.

    Those of a gradient that is expanded do.
    """
    (*stacks, rows, columns), (*_, height, width) = t.stride(), t.shape
    if rows == 1 and columns >= max(1, height):
        apart = columns
    elif columns == 1 and rows >= max(1, width):
        apart = rows
    else:
        return False
    return not any(n * t.itemsize % 16 for n in (apart, *stacks)) and t.data_ptr() % 16 == 0


def cut(
    of: Segments, rows: Sequence[Tensor | None], stacks: Sequence[Tensor | None]
) -> list[tuple]:
    """Return of each segment that has rows the first, and its part of what there is."""
    sizes = of.sizes()
    parts = [[None] * len(sizes) if t is None else t.split(sizes) for t in rows]
    parts += [[None] * len(sizes) if t is None else t.unbind() for t in stacks]
    begins = itertools.accumulate(sizes, initial=0)
    return [found for size, *found in zip(sizes, begins, *parts, strict=False) if size]


def _stack(of: Segments, like: Tensor) -> Tensor:
    """Return memory for gradients of a stack, zeros where some are of no rows."""
    new = like.new_empty if all(of.sizes()) else like.new_zeros
    return new(like.shape)
