# SPDX-License-Identifier: Apache-2.0
"""The ``blocks`` implementation: library products only, for CPUs and for what Triton cannot do.

In forward the low-rank product is written first and the base product adds itself to it, but for
many rows on a CPU; in backward it is the other way round (`kernels/CPU.md`). Projections of one x
share what they can: their adapters read it stacked, and their gradients of it add up in one tensor.
Nothing as wide as x or y is kept for backward beyond x itself: dropout is drawn again from its
seed. What needs a temporary goes through it a block of rows at a time, in the same memory.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.operator.dropout import kept_ones, kept_scale
from fastlora.operator.operands import Each, Projections

# Rows of x or dy per temporary: on a CPU small enough for the cache, elsewhere large enough for
# the launches; and of narrow ones so many that Python does not count.
ROWS = {"cpu": 512}
MORE_ROWS = 4096
LEAST_ELEMENTS = 1 << 18
# Elements of a 16-bit result up to which float32 factors are multiplied as they are: one wide
# conversion then takes less time than the dozen small operations that split the factors.
FEW = 200_000
# Rows from which a CPU adds the low-rank product to the frozen one: for fewer it is the other way.
MANY = 1024
# Bytes of a column of dy up to which dyᵀ is multiplied as it lies, and not turned afterwards.
SHORT = 1024


def shrink(x: Tensor, projections: Projections) -> tuple[Each, None]:
    """Return s = dropout(x) aᵀ [M, R] of each projection, in the adapters' dtype."""
    if len(projections) == 1:
        _, a, _, _, seed, _, p, _ = projections[0]
        return [None if a is None else shrink_rows(x, a, seed, p)], None
    ss = [None] * len(projections)
    for same, rows, *of in _stacks(projections):
        _put(ss, same, shrink_rows(_part(x, rows), *of), projections, 1)
    return ss, None


def shrink_rows(x: Tensor, a: Tensor, seed: Tensor | None, p: float, begin: int = 0) -> Tensor:
    of = _blocks(x, a.dtype, seed, p, begin=begin, whole=a.dim() > 2)
    s = _joined([_flat(_each(x_hat, a) @ a.mT) for _, x_hat, _ in of])
    return s if seed is None else s.mul_(kept_scale(p))


def outputs(x: Tensor, projections: Projections, ss: Each, scaled=None) -> list[Tensor]:
    """Return y [M, N] of each projection from its s: the frozen product added to the low-rank.

    ``scaled`` may hold low-rank products, bias included, that are there already and become y.
    """
    ys = []
    for i, (w, _, b, bias, _, scaling, *_) in enumerate(projections):
        y = scaled[i] if scaled else None
        if type(w) is slice:
            part = _each(ys[-1][w], b)
            product(part, _each(ss[i], b), b.mT, part, scaling)
            continue
        if w is None:
            ys.append(bias if y is None else bias.add_(y))
            continue
        if ss[i] is None:
            ys.append(F.linear(x, w, bias))
            continue
        if y is None and x.is_cpu and len(x) >= MANY and b.dtype == x.dtype:
            ys.append(F.linear(x, w, bias).addmm_(ss[i], b.t(), alpha=scaling))
            continue
        if y is None:
            y = product(x.new_empty(x.shape[0], w.shape[0]), ss[i], b.t(), bias, scaling)
        ys.append(y.addmm_(x, w.t()))
    return ys


def ds_db(
    dys: Each, projections: Projections, ss: Each, need_ds: Sequence[bool], need_db: Sequence[bool]
) -> tuple[Each, Each]:
    """Return ds = scaling · dy b [M, R] and db = scaling · dyᵀ s [N, R] of each projection."""
    dss, dbs = [None] * len(dys), [None] * len(dys)
    for i, (dy, (_, _, b, _, _, scaling, *_)) in enumerate(zip(dys, projections, strict=True)):
        if dy is None or b is None:
            continue
        parts, db, short = [], None, _each(dy, b).shape[-2] * b.itemsize <= SHORT
        for rows, dy_rows, _ in _blocks(dy, b.dtype, whole=b.dim() > 2):
            dy_rows = _each(dy_rows, b)
            if need_ds[i]:
                parts.append(_flat(scaled_product(dy_rows, b, scaling)))
            if need_db[i]:
                s = _each(_part(ss[i], rows), b)
                left, right = (dy_rows, s) if short else (s, dy_rows)
                db = _added(db, scaled_product(left.mT, right, scaling))
        dss[i] = _joined(parts) if parts else None
        dbs[i] = db if db is None or short else db.mT.contiguous()
    return dss, dbs


def input_grad_and_da(
    dys: Each, x: Tensor, projections: Projections, dss: Each, needs: Sequence[bool]
) -> tuple[Tensor | None, Each]:
    """Return dx = Σ (dy w + dropout'(ds a)) [M, K] and da = dsᵀ dropout(x) [R, K] of each.

    Without a dy there is no dx. A mask that both need is drawn once, block after block.
    """
    dx = add_products(None, dys, projections)
    if dx is None and any(dy is not None for dy in dys):  # there are low-rank products alone
        dx = x.new_zeros(x.shape)
    if len(projections) == 1:
        (_, a, _, _, seed, _, p, _), ds = projections[0], dss[0]
        of = a, seed, p
        return dx, [None if ds is None else add_low_rank(dx, x, ds, *of, need_a=needs[0])]
    das = [None] * len(projections)
    for same, rows, *of in _stacks(projections, dss):
        ds, need_a = _joined([dss[i] for i in same], 1), any(needs[i] for i in same)
        part = None if dx is None else _part(dx, rows)
        da = add_low_rank(part, _part(x, rows), ds, *of, need_a=need_a)
        if need_a:
            _put(das, same, da, projections, -2)
    return dx, [da if need else None for da, need in zip(das, needs, strict=True)]


def add_products(dx: Tensor | None, dys: Each, projections: Projections) -> Tensor | None:
    """Return dx with the product dy w of each projection added to it."""
    for dy, (w, *_) in zip(dys, projections, strict=True):
        if dy is not None and w is not None and type(w) is not slice:
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
    return dx


def _stacks(projections: Projections, dss: Each | None = None) -> list[tuple]:
    """Return which adapters (that have a ds) go stacked along the rank, their rows, a, seed and p.

    And the number of the first row. Those of the same rows that drop nothing do, if they are of one
    dtype.
    """
    found: dict = {}
    for i, (w, a, _, _, seed, *_) in enumerate(projections):
        if a is not None and (dss is None or dss[i] is not None):
            rows = w if type(w) is slice else None
            at = (0, None) if rows is None else (rows.start or 0, rows.stop)
            of = a.dtype if seed is None else i, a.shape[:-2]
            found.setdefault((*at, of), (rows, []))[1].append(i)
    return [
        (
            same,
            rows,
            _joined([projections[i].a for i in same], -2),
            *projections[same[0]][4:7:2],
            at,
        )
        for (at, *_), (rows, same) in found.items()
    ]


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _put(found: list, same: list[int], whole: Tensor, projections: Projections, dim: int) -> None:
    """Put what is of each adapter in a stack into its place, in memory of its own."""
    if len(same) == 1:
        found[same[0]] = whole
        return
    sizes = [projections[i].a.shape[-2] for i in same]
    for i, part in zip(same, torch.split_with_sizes_copy(whole, sizes, dim), strict=True):
        found[i] = part


def add_low_rank(
    dx: Tensor | None, x, ds, a, seed, p: float, begin: int = 0, *, need_a: bool
) -> Tensor | None:
    """Add dropout'(ds a) to ``dx`` where there is one; return da [R, K] if it is asked for."""
    if seed is None and dx is not None:
        part = _each(dx, a)
        product(part, _each(ds, a), a, part)
        dx = None
    if dx is None and not need_a:
        return None
    da, left, right = None, _each(ds, a), a
    if dx is not None:
        left, right = _in_dtype(left, a, dx)
    for rows, x_hat, ones in _blocks(x, a.dtype, seed, p, need_a, begin, a.dim() > 2):
        if need_a:
            da = _added(da, _each(_part(ds, rows), a).mT @ _each(x_hat, a))
        if dx is not None:
            part = _flat(left[rows] @ right).to(dx.dtype)
            dx[rows].addcmul_(part, ones, value=kept_scale(p))
    if da is not None and seed is not None:
        da.mul_(kept_scale(p))
    return da if da is None or da.dtype == a.dtype else da.to(a.dtype)


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    """Return the sum of both, in float32 where it has more than one term of 16 bits."""
    if total is None:
        return part
    return total.to(torch.promote_types(total.dtype, torch.float32)).add_(part)


def scaled_product(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """Return ``alpha · left @ right``, scaled before it is rounded: float16 might overflow."""
    out = left.new_empty(*left.shape[:-1], right.shape[-1])
    return _add_of(out)(out, left, right, beta=0, alpha=alpha)


def _add_of(out: Tensor) -> Callable:
    return Tensor.addmm_ if out.dim() == 2 else Tensor.baddbmm_


def _each(t: Tensor, factors: Tensor) -> Tensor:
    """Return rows as they are, or [G, m, …] for G stacked factors: m for each of them."""
    return t if factors.dim() == 2 else t.unflatten(0, (len(factors), -1))


def _flat(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.flatten(0, 1)


def product(
    out: Tensor, left: Tensor, right: Tensor, plus: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """Write ``plus + alpha · left @ right`` to ``out``, rounded once; plus: a bias, ``out``, none.

    Factors in float32 may have a 16-bit ``out``.
    """
    if left.dtype != out.dtype:
        left, right = _in_dtype(left, right, out)
    if left.dtype == out.dtype:
        if plus is None or plus is out:
            return _add_of(out)(out, left, right, beta=0 if plus is None else 1, alpha=alpha)
        return torch.addmm(plus, left, right, alpha=alpha, out=out)
    # Float32 factors under float16, or few elements.
    for rows in _rows(out) if out.dim() == 2 else [slice(None)]:
        part = (left[rows] @ right).mul_(alpha)
        if plus is not None:
            part += plus[rows] if plus is out else plus
        out[rows].copy_(part)
    return out


def _in_dtype(left: Tensor, right: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of ``left @ right`` for a product that is rounded to out's dtype anyway.

    A float32 factor is the sum of two bfloat16 terms to 16 bits: side by side along the rank they
    make one bfloat16 product with all but the least of the four.
    """
    if left.dtype == out.dtype or out.dtype != torch.bfloat16 or out.numel() <= FEW:
        return left, right
    high, low = _terms(left)
    right_high, right_low = _terms(right)
    left, right = (high, high, low), (right_high, right_low, right_high)
    return torch.cat(left, dim=-1), torch.cat(right, dim=-2)


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
    x: Tensor,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    p=0.0,
    read=True,
    begin=0,
    whole=False,
) -> Iterable[tuple[slice | None, Tensor | None, Tensor | None]]:
    """Return the rows of each block, x there in ``dtype`` with dropout, and the mask in x's dtype.

    Both tensors are overwritten by the next block. The mask is ones and zeros (`kept_ones`): what
    is not a number stays so when it is dropped, and kept elements are not scaled. Without
    ``read`` the mask alone. No rows stand for all: views would take longer than small products.
    Dropout's rows begin with number ``begin``. ``whole``: all rows are one block.
    """
    if seed is None and (dtype == x.dtype or whole or len(_rows(x)) == 1):
        return ((None, x if dtype == x.dtype else x.to(dtype), None),)
    return _several(x, dtype, seed, p, read, begin, whole)


def _several(x, dtype, seed, p, read, begin, whole):
    rows, K = [slice(0, len(x))] if whole else _rows(x), x.shape[1]
    drawn = seed, x.shape, p, x.dtype, rows[0].stop, begin
    size, masks = rows[0].stop, [None] * len(rows) if seed is None else kept_ones(*drawn)
    dropped = x.new_empty(size, K) if read and seed is not None else None
    wide = x.new_empty(size, K, dtype=dtype) if read and dtype != x.dtype else None
    for here, ones in zip(rows, masks, strict=True):
        block = x[here] if read else None
        if dropped is not None:
            block = torch.mul(block, ones, out=dropped[: len(block)])
        if wide is not None:
            block = wide[: len(block)].copy_(block)
        yield here, block, ones


def _part(t: Tensor, rows: slice | None) -> Tensor:
    return t if rows is None else t[rows]


def _rows(t: Tensor) -> list[slice]:
    """Return the blocks of rows that ``t`` is read in: one of no rows where it has none."""
    M, K = t.shape
    size = max(ROWS.get(t.device.type, MORE_ROWS), LEAST_ELEMENTS // max(1, K))
    size = max(1, -(-M // max(1, round(M / size))))  # no short one after the others
    return [slice(start, min(start + size, M)) for start in range(0, max(1, M), size)]
