"""The ``library`` implementation: the vendor's product for what is wide, our kernels for the rest.

y and dx are one library product each, which adds itself to the low-rank product: that is written
first and read again in the product's epilogue, but no Triton product has to be as fast as the
library's. What is as narrow as the rank (s, ds, da, db) comes from the Triton kernels, dropout
drawn inside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch.nn.functional as F
from fastlora_kernels.columns import da as da_of
from fastlora_kernels.columns import ds_db
from fastlora_kernels.configs import Config
from fastlora_kernels.launch import NO_CONFIGS
from fastlora_kernels.product import product
from fastlora_kernels.shrink import shrink
from torch import Tensor

from fastlora.projection import Operands
from fastlora.torch_impl import expand


def forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    configs: Mapping[str, Config] = NO_CONFIGS,
) -> tuple[Tensor, Tensor]:
    """Return y [M, N] in the dtype of x and s = dropout(x) aᵀ [M, R] in the adapters' dtype."""
    one = (Operands(w, a, b, bias, seed, scaling, dropout_p),)
    (y,), (s,) = forward_all(x, one, (configs,))
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
    configs: Mapping[str, Config] = NO_CONFIGS,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx [M, K], da [R, K] and db [N, R], each None unless its flag in ``needs`` is set."""
    need_x, *needs = needs
    one = (Operands(w, a, b, None, seed, scaling, dropout_p),)
    dx, (da,), (db,) = backward_all((dy,), x, one, (s,), need_x, (needs,), (configs,))
    return dx, da, db


def forward_all(
    x: Tensor, projections: Sequence[Operands], configs: Sequence[Mapping[str, Config]] = ()
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return y [M, N] and s = dropout(x) aᵀ [M, R] of each projection, s None without an a."""
    ys, ss = [], []
    for (w, a, b, bias, seed, scaling, p), config in _configured(projections, configs):
        if a is None:
            y, s = F.linear(x, w, bias), None
        else:
            s = shrink(x, a, seed, dropout_p=p, config=config.get("shrink"))
            y = expand(s, b.t(), scaling, x.new_empty(x.shape[0], w.shape[0]), bias)
            y.addmm_(x, w.t())
        ys.append(y)
        ss.append(s)
    return ys, ss


def backward_all(
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Operands],
    ss: Sequence[Tensor | None],
    need_x: bool,
    needs: Sequence[tuple[bool, bool]],
    configs: Sequence[Mapping[str, Config]] = (),
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Return dx [M, K] of all projections together, and da [R, K] and db [N, R] of each.

    ``needs`` says of each projection whether da and db are asked for; what is not asked for, or
    has no dy, is None.
    """
    dx, das, dbs = None, [None] * len(projections), [None] * len(projections)
    for i, ((_, a, b, _, seed, scaling, p), config) in enumerate(_configured(projections, configs)):
        dy, (need_a, need_b) = dys[i], needs[i]
        if dy is None or a is None:
            continue
        wanted = {"need_ds": need_x or need_a, "need_db": need_b}
        ds, dbs[i] = ds_db(dy, ss[i], b, scaling=scaling, **wanted, config=config.get("ds_db"))
        if need_a:
            das[i] = da_of(x, ds, seed, dropout_p=p, config=config.get("da"))
        if need_x:
            low_rank = _masked(x, ds, a, seed, p)
            dx = low_rank if dx is None else dx.add_(low_rank)
    if need_x:
        for dy, (w, *_) in zip(dys, projections, strict=True):
            if dy is not None:
                dx = dy @ w if dx is None else dx.addmm_(dy, w)
    return dx, das, dbs


def _masked(x: Tensor, ds: Tensor, a: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Return dropout'(ds a) [M, K] in the dtype of x."""
    if seed is None:
        return expand(ds, a, 1.0, x.new_empty(x.shape))
    # The kernel's main loop has no steps: what it writes is the masked low-rank product alone.
    none = x[:, :0]
    return product(none, a.t()[:, :0].to(x.dtype), ds, a.t(), seed=seed, dropout_p=p)


def _configured(
    projections: Sequence[Operands], configs: Sequence[Mapping[str, Config]]
) -> Iterator[tuple[Operands, Mapping[str, Config]]]:
    return zip(projections, configs or [NO_CONFIGS] * len(projections), strict=True)
