# SPDX-License-Identifier: Apache-2.0
"""The ``library`` implementation: the vendor's product for what is wide, our kernels for the rest.

y and dx are one library product each, which adds itself to the low-rank product: that is written
first and read again in the product's epilogue, but no Triton product has to be as fast as the
library's. What is as narrow as the rank (s, ds, da, db) comes from the Triton kernels, dropout
drawn inside them; so does the low-rank product of float32 factors under a 16-bit x, in one launch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastlora_kernels import linears
from fastlora_kernels.columns import da as da_of
from fastlora_kernels.columns import ds_db
from fastlora_kernels.configs import Config
from fastlora_kernels.joint_product import product_all
from fastlora_kernels.joint_sum import product_sum
from fastlora_kernels.launch import NO_CONFIGS
from fastlora_kernels.shrink import shrink
from torch import Tensor

from fastlora.operator.blocks import expand, outputs
from fastlora.operator.operands import Operands


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
    ss = _shrinks(x, projections, configs)
    return outputs(x, projections, ss, _expanded(x, projections, ss)), ss


def _shrinks(
    x: Tensor, projections: Sequence[Operands], configs: Sequence[Mapping[str, Config]]
) -> list[Tensor | None]:
    if len(projections) > 1:
        return linears.shrinks(x, projections)
    (_, a, _, _, seed, _, p), config = projections[0], configs[0] if configs else NO_CONFIGS
    return [None if a is None else shrink(x, a, seed, dropout_p=p, config=config.get("shrink"))]


def _expanded(
    x: Tensor, projections: Sequence[Operands], ss: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return scaling · s bᵀ + bias [M, N] in the dtype of x where the factors are of another."""
    found: list[Tensor | None] = [None] * len(projections)
    mixed = [i for i, s in enumerate(ss) if s is not None and s.dtype != x.dtype]
    for which in linears.by_dtype([projections[i] for i in mixed]):
        few = [mixed[i] for i in which]
        w, _, b, biases, _, scalings, _ = zip(*(projections[i] for i in few), strict=True)
        # Main loops without steps: what is written is the low-rank products alone.
        none = x[:, :0], [t[:, :0] for t in w]
        ys = product_all(*none, [ss[i] for i in few], b, biases, scalings)
        for i, y in zip(few, ys, strict=True):
            found[i] = y
    return found


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
    if len(projections) == 1:
        found = _narrow_grads(dys, x, projections, ss, need_x, needs, configs)
    else:
        found = linears.narrow_grads(dys, x, projections, ss, need_x, needs, configs)
    dss, das, dbs = found
    dx = _low_rank_grad(x, dss, projections) if need_x else None
    for dy, (w, *_) in zip(dys, projections, strict=True):
        if need_x and dy is not None:
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
    return dx, das, dbs


def _narrow_grads(
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Operands],
    ss: Sequence[Tensor | None],
    need_x: bool,
    needs: Sequence[tuple[bool, bool]],
    configs: Sequence[Mapping[str, Config]],
) -> tuple[list[Tensor | None], ...]:
    """Return ds, da and db of one projection."""
    ((_, a, b, _, seed, scaling, p),), (dy,), ((need_a, need_b),) = projections, dys, needs
    if dy is None or a is None:
        return [None], [None], [None]
    config = configs[0] if configs else NO_CONFIGS
    wanted = {"need_ds": need_x or need_a, "need_db": need_b, "config": config.get("ds_db")}
    ds, db = ds_db(dy, ss[0], b, scaling=scaling, **wanted)
    da = da_of(x, ds, seed, dropout_p=p, config=config.get("da")) if need_a else None
    return [ds], [da], [db]


def _low_rank_grad(
    x: Tensor, dss: Sequence[Tensor | None], projections: Sequence[Operands]
) -> Tensor | None:
    """Return the sum of dropout'(ds a) [M, K] in the dtype of x, None where there is no ds."""
    there = [i for i, ds in enumerate(dss) if ds is not None]
    dx = None
    for which in linears.by_dtype([projections[i] for i in there]):
        few = [there[i] for i in which]
        _, a, _, _, seeds, _, p = zip(*(projections[i] for i in few), strict=True)
        ds = [dss[i] for i in few]
        if len(few) == 1 and seeds[0] is None and a[0].dtype == x.dtype:
            part = expand(ds[0], a[0], 1.0, x.new_empty(x.shape))
        else:
            # Main loops without steps here too.
            none = [x[:, :0]] * len(few), [x[:0]] * len(few)
            part = product_sum(*none, ds, a, seeds, dropout_p=p)
        dx = part if dx is None else dx.add_(part)
    return dx
