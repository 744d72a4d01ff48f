# SPDX-License-Identifier: Apache-2.0
"""The ``blocks`` implementation: library products only, for CPUs and for what Triton cannot do.

In forward the low-rank product is written first and the base product adds itself to it; in
backward it is the other way round (`kernels/CPU.md`). Projections of one x share what they can:
their adapters read it stacked, and their gradients of it add up in one tensor. Nothing as wide as
x or y is kept for backward beyond x itself: dropout is drawn again from its seed. What needs a
temporary goes through it a block of rows at a time, in the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.operator.dropout import KeptOnes, kept_scale
from fastlora.operator.operands import Operands

# Rows of x or dy per temporary: on a CPU small enough for the cache, elsewhere large enough for
# the launches; and of narrow ones so many that Python does not count.
ROWS = {"cpu": 512}
MORE_ROWS = 4096
LEAST_ELEMENTS = 1 << 18
# Elements of a 16-bit result up to which float32 factors are multiplied as they are: one wide
# conversion then takes less time than the dozen small operations that split the factors.
FEW = 200_000
# Bytes of a column, and columns of the other operand, up to which transposed ones are multiplied as
# they lie.
SHORT, FEW_COLUMNS = 1024, 128


def shrink(
    x: Tensor, projections: Sequence[Operands]
) -> tuple[list[Tensor | None], list[Tensor | None] | None]:
    """Return s = dropout(x) aᵀ [M, R] of each projection, in the adapters' dtype."""
    if len(projections) == 1:
        (_, a, _, _, seed, _, p) = projections[0]
        return [None if a is None else _shrink(x, a, seed, p)], None
    ss: list[Tensor | None] = [None] * len(projections)
    for same in _stacks(projections):
        few = [projections[i] for i in same]
        s = _shrink(x, _stack([p.a for p in few]), few[0].seed, few[0].p)
        for i, part in zip(same, _parts(s, few, 1), strict=True):
            ss[i] = part
    return ss, None


def outputs(
    x: Tensor,
    projections: Sequence[Operands],
    ss: Sequence[Tensor | None],
    scaled: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Return y [M, N] of each projection from its s: the frozen product added to the low-rank.

    ``scaled`` may hold low-rank products, bias included, that are there already and become y.
    """
    ys = []
    for i, (w, _, b, bias, _, scaling, _) in enumerate(projections):
        s, y = ss[i], scaled[i] if scaled else None
        if s is None:
            ys.append(F.linear(x, w, bias))
            continue
        if y is None:
            y = expand(s, b.t(), scaling, x.new_empty(x.shape[0], w.shape[0]), bias)
        ys.append(y.addmm_(x, w.t()))
    return ys


def ds_db(
    dys: Sequence[Tensor | None],
    projections: Sequence[Operands],
    ss: Sequence[Tensor | None],
    need_ds: Sequence[bool],
    need_db: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return ds = scaling · dy b [M, R] and db = scaling · dyᵀ s [N, R] of each projection."""
    dss, dbs = [], []
    for dy, (_, _, b, _, _, scaling, _), s, *needed in zip(
        dys, projections, ss, need_ds, need_db, strict=True
    ):
        ds, db = (None, None) if dy is None or b is None else _ds_db(dy, b, s, scaling, *needed)
        dss.append(ds)
        dbs.append(db)
    return dss, dbs


def input_grad(
    dys: Sequence[Tensor | None],
    projections: Sequence[Operands],
    dss: Sequence[Tensor | None],
) -> Tensor | None:
    """Return dx = Σ (dy w + dropout'(ds a)) [M, K], None without a dy."""
    return input_grad_and_da(dys, None, projections, dss, [False] * len(projections))[0]


def da(
    x: Tensor,
    projections: Sequence[Operands],
    dss: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return da = dsᵀ dropout(x) [R, K] of each projection."""
    return input_grad_and_da([None] * len(projections), x, projections, dss, needs)[1]


def input_grad_and_da(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    projections: Sequence[Operands],
    dss: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return what the two steps do: a mask that both need is drawn once, block after block."""
    dx, das = None, [None] * len(projections)
    for dy, (w, *_) in zip(dys, projections, strict=True):
        if dy is not None:
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
    if len(projections) == 1:
        _, a, _, _, seed, _, p = projections[0]
        return dx, [None if dss[0] is None else _add_low_rank(dx, x, dss[0], a, seed, p, needs[0])]
    for same in _stacks(projections):
        same = [i for i in same if dss[i] is not None]
        need_a = any(needs[i] for i in same)
        if not same or (dx is None and not need_a):
            continue
        few = [projections[i] for i in same]
        ds, a = _stack([dss[i] for i in same], 1), _stack([p.a for p in few])
        found = _add_low_rank(dx, x, ds, a, few[0].seed, few[0].p, need_a)
        if need_a:
            for i, part in zip(same, _parts(found, few, 0), strict=True):
                das[i] = part if needs[i] else None
    return dx, das


def _stacks(projections: Sequence[Operands]) -> list[list[int]]:
    """Return which adapters read x together, stacked along the rank: those that drop nothing."""
    apart, together = [], {}
    for i, (_, a, _, _, seed, _, _) in enumerate(projections):
        if seed is not None:
            apart.append([i])
        elif a is not None:
            together.setdefault(a.dtype, []).append(i)
    return [*together.values(), *apart]


def _stack(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _parts(whole: Tensor, few: list[Operands], dim: int) -> Sequence[Tensor]:
    """Return the part of each adapter in a stack of theirs, in memory of its own."""
    if len(few) == 1:
        return (whole,)
    return torch.split_with_sizes_copy(whole, [p.a.shape[0] for p in few], dim)


def _shrink(x: Tensor, a: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Return dropout(x) aᵀ [M, R] in the dtype of a."""
    if seed is None and x.dtype == a.dtype:
        return x @ a.t()
    if seed is None and _at_once(x, a.dtype):
        return x.to(a.dtype) @ a.t()
    s = x.new_empty(x.shape[0], a.shape[0], dtype=a.dtype)
    for rows, x_hat, _ in _blocks(x, a.dtype, seed, p):
        torch.mm(x_hat, a.t(), out=_part(s, rows))
    return s if seed is None else s.mul_(kept_scale(p))


def _add_low_rank(
    dx: Tensor | None,
    x: Tensor | None,
    ds: Tensor,
    a: Tensor,
    seed: Tensor | None,
    p: float,
    need_a: bool,
) -> Tensor | None:
    """Add dropout'(ds a) to ``dx`` where there is one; return da [R, K] if it is asked for."""
    if seed is None:
        if dx is not None:
            _add_product(dx, ds, a)
        if not need_a:
            return None
        if x.dtype == a.dtype:
            return _turned(ds, x) @ x
        if _at_once(x, a.dtype):
            return _turned(ds, x) @ x.to(a.dtype)
    left, right = (ds, a) if dx is None else _in_dtype(ds, a, dx)
    total, wide = None, torch.promote_types(a.dtype, torch.float32)
    for rows, x_hat, ones in _blocks(x if need_a else dx, a.dtype, seed, p, need_a):
        if need_a:
            part = _turned(_part(ds, rows), x_hat) @ x_hat
            total = part.to(wide) if total is None else total.add_(part)
        if dx is not None and ones is not None:
            part = (_part(left, rows) @ right).to(dx.dtype)
            _part(dx, rows).addcmul_(part, ones, value=kept_scale(p))
    if not need_a:
        return None
    if total is None:  # no rows
        return torch.zeros_like(a)
    return (total if seed is None else total.mul_(kept_scale(p))).to(a.dtype)


def _ds_db(
    dy: Tensor, b: Tensor, s: Tensor, scaling: float, need_ds: bool, need_db: bool
) -> tuple[Tensor | None, Tensor | None]:
    if dy.dtype == b.dtype or _at_once(dy, b.dtype):
        dy = dy if dy.dtype == b.dtype else dy.to(b.dtype)
        ds = _scaled_product(dy, b, scaling) if need_ds else None
        if not need_db:
            return ds, None
        if dy.shape[0] * dy.itemsize <= SHORT:
            return ds, _scaled_product(dy.t(), s, scaling)
        return ds, _scaled_product(_turned(s, dy), dy, scaling).t().contiguous()
    ds = dy.new_empty(s.shape, dtype=b.dtype) if need_ds else None
    db = torch.zeros(b.shape[::-1], dtype=b.dtype, device=b.device) if need_db else None
    for rows, dy_rows, _ in _blocks(dy, b.dtype):
        if need_ds:
            torch.mm(dy_rows, b, out=ds[rows])
        if need_db:
            db.addmm_(s[rows].t(), dy_rows)
    if need_db:
        db = db.t().mul(scaling).contiguous()
    return ds.mul_(scaling) if need_ds else None, db


def _scaled_product(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """Return ``alpha · left @ right``, scaled before it is rounded: float16 might overflow."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return out.addmm_(left, right, beta=0, alpha=alpha)


def _turned(narrow: Tensor, wide: Tensor) -> Tensor:
    """Return the transpose of [M, R], laid out where that speeds its product with ``wide``."""
    if narrow.shape[0] * narrow.itemsize <= SHORT or wide.shape[1] <= FEW_COLUMNS:
        return narrow.t()
    return narrow.t().contiguous()


def expand(
    left: Tensor, right: Tensor, alpha: float, out: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Write ``alpha · left @ right + bias`` to ``out``, whose elements need not be set."""
    if left.dtype != out.dtype:
        left, right = _in_dtype(left, right, out)
    if left.dtype == out.dtype:
        if bias is not None:
            return torch.addmm(bias, left, right, alpha=alpha, out=out)
        return out.addmm_(left, right, beta=0, alpha=alpha)
    for rows in _rows(out):  # float32 factors under float16, or few elements
        part = (_part(left, rows) @ right).mul_(alpha)
        _part(out, rows).copy_(part if bias is None else part.add_(bias))
    return out


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``out`` in place, rounding the sum once."""
    if left.dtype != out.dtype:
        left, right = _in_dtype(left, right, out)
    if left.dtype == out.dtype:
        out.addmm_(left, right)
        return
    for rows in _rows(out):
        part = _part(out, rows)
        part.copy_(torch.addmm(part.to(left.dtype), _part(left, rows), right))


def _in_dtype(left: Tensor, right: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of ``left @ right`` for a product that is rounded to out's dtype anyway.

    A float32 factor is the sum of two bfloat16 terms to 16 bits: side by side along the rank they
    make one bfloat16 product with all but the least of the four.
    """
    if left.dtype == out.dtype or out.dtype != torch.bfloat16 or out.numel() <= FEW:
        return left, right
    high, low = _terms(left)
    right_high, right_low = _terms(right)
    return torch.cat([high, high, low], dim=1), torch.cat([right_high, right_low, right_high])


def _terms(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return two bfloat16 tensors whose sum is ``t`` to 16 bits, both of its sign.

    As `fastlora_kernels.tiles.terms` does, and for the same reasons: an infinity that one of them
    is multiplied by must not meet a zero or an infinity of the other sign.
    """
    first = (t.view(torch.int32) & -0x10000).view(t.dtype)
    # What is left of an infinity is NaN, and then a share of the infinity.
    rest = (t - first).nan_to_num_(0.0).add_(first, alpha=2.0**-32)
    return first.to(torch.bfloat16), rest.to(torch.bfloat16)


def _blocks(
    x: Tensor, dtype: torch.dtype, seed: Tensor | None = None, p: float = 0.0, read: bool = True
) -> Iterator[tuple[slice, Tensor | None, Tensor | None]]:
    """Yield the rows of each block, x there in ``dtype`` with dropout, and the mask in x's dtype.

    Both tensors are overwritten by the next block. The mask is ones and zeros (`KeptOnes`): what
    is not a number stays so when it is dropped, and kept elements are not scaled. Without
    ``read`` the mask alone, for what has the shape of ``x``.
    """
    size = min(_block_rows(x), x.shape[0])
    mask = dropped = wide = ones = block = None
    if seed is not None:
        mask = KeptOnes(seed, size, x.shape[1], p, x.dtype)
        dropped = x.new_empty(size, x.shape[1]) if read else None
    if dtype != x.dtype and read:
        wide = x.new_empty(size, x.shape[1], dtype=dtype)
    for rows in _rows(x):
        here = slice(0, rows.stop - rows.start)
        if mask is not None:
            ones = mask.draw(here.stop)
        if read:
            block = _part(x, rows)
            if mask is not None:
                block = torch.mul(block, ones, out=_part(dropped, here))
            if wide is not None:
                block = _part(wide, here).copy_(block)
        yield rows, block, ones


def _block_rows(t: Tensor) -> int:
    return max(ROWS.get(t.device.type, MORE_ROWS), LEAST_ELEMENTS // max(1, t.shape[1]))


def _at_once(t: Tensor, dtype: torch.dtype) -> bool:
    """Return whether ``t`` is read in ``dtype`` without blocks: as it is, or as a single one."""
    return t.dtype == dtype or t.shape[0] <= _block_rows(t)


def _part(t: Tensor, rows: slice) -> Tensor:
    """Return ``t[rows]``, without the time of a view where that is all of it."""
    return t if rows.stop - rows.start == t.shape[0] else t[rows]


def _rows(t: Tensor) -> Iterator[slice]:
    for start in range(0, t.shape[0], _block_rows(t)):
        yield slice(start, min(start + _block_rows(t), t.shape[0]))
