"""The ``torch`` implementation: library products only, for CPUs and for what Triton cannot do.

The low-rank product is added into the base product's own output, and nothing as wide as x or y
is kept for backward beyond x itself: dropout is drawn again from its seed. Work that needs a
temporary goes through it ``ROWS`` rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.dropout import keep_mask, kept_scale

# Rows of x or dy per temporary: large enough for the products, small enough for the cache.
ROWS = 256


def forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Return y [M, N] in the dtype of x and s = dropout(x) aᵀ [M, R] in the adapters' dtype."""
    y = F.linear(x, w, bias)
    if seed is None and a.dtype == x.dtype:
        s = x @ a.t()
        return _add_product(y, s, b.t(), scaling), s
    s = x.new_empty(x.shape[0], a.shape[0], dtype=a.dtype)
    for rows, keep in _blocks(x, seed, dropout_p):
        torch.mm(_dropped(x[rows], keep).to(a.dtype), a.t(), out=s[rows])
    if seed is not None:
        s.mul_(kept_scale(dropout_p))
    if a.dtype == y.dtype:
        return _add_product(y, s, b.t(), scaling), s
    for rows, _ in _blocks(x, None, 0.0):
        y[rows] = torch.addmm(y[rows].to(s.dtype), s[rows], b.t(), alpha=scaling)
    return y, s


def backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx [M, K], da [R, K] and db [N, R], each None unless its flag in ``needs`` is set."""
    need_x, need_a, need_b = needs
    dx = dy @ w if need_x else None
    ds, db = _ds_db(dy, b, s, scaling, need_x or need_a, need_b)
    if ds is None:
        return None, None, db
    if seed is not None:
        ds.mul_(kept_scale(dropout_p))
    if seed is None and a.dtype == x.dtype:
        if need_x:
            _add_product(dx, ds, a, 1.0)
        return dx, ds.t() @ x if need_a else None, db
    da = torch.zeros(a.shape, dtype=_sum_dtype(a), device=a.device) if need_a else None
    for rows, keep in _blocks(x, seed, dropout_p):
        if need_a:
            da += ds[rows].t() @ _dropped(x[rows], keep).to(a.dtype)
        if need_x:
            low_rank = ds[rows] @ a
            dx[rows] += low_rank if keep is None else low_rank.mul_(keep)
    return dx, da.to(a.dtype) if need_a else None, db


def _ds_db(
    dy: Tensor, b: Tensor, s: Tensor, scaling: float, need_ds: bool, need_db: bool
) -> tuple[Tensor | None, Tensor | None]:
    if b.dtype == dy.dtype:
        ds = (dy @ b).mul_(scaling) if need_ds else None
        return ds, (dy.t() @ s).mul_(scaling) if need_db else None
    ds = dy.new_empty(s.shape, dtype=b.dtype) if need_ds else None
    db = torch.zeros(b.shape, dtype=b.dtype, device=b.device) if need_db else None
    for rows, _ in _blocks(dy, None, 0.0):
        dy_rows = dy[rows].to(b.dtype)
        if need_ds:
            torch.mm(dy_rows, b, out=ds[rows])
        if need_db:
            db.addmm_(dy_rows.t(), s[rows])
    return ds.mul_(scaling) if need_ds else None, db.mul_(scaling) if need_db else None


def _add_product(out: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    return out.addmm_(left, right, alpha=alpha) if out.numel() else out


def _blocks(x: Tensor, seed: Tensor | None, p: float) -> Iterator[tuple[slice, Tensor | None]]:
    """Yield slices of the rows of x, each with its dropout mask in x's dtype (None: keep all)."""
    for start in range(0, x.shape[0], ROWS):
        stop = min(start + ROWS, x.shape[0])
        keep = None
        if seed is not None:
            keep = keep_mask(seed, range(start, stop), x.shape[1], p).to(x.dtype)
        yield slice(start, stop), keep


def _dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep


def _sum_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
