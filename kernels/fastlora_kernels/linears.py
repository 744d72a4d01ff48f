# SPDX-License-Identifier: Apache-2.0
"""Several LoRA linear layers of one x from their kernels: forward and backward on 2-D tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora_kernels import linear
from fastlora_kernels.columns import ds_db
from fastlora_kernels.configs import Config
from fastlora_kernels.joint import MOST
from fastlora_kernels.joint_columns import da_all
from fastlora_kernels.joint_product import config_of, product_all
from fastlora_kernels.joint_shrink import shrink_all
from fastlora_kernels.joint_sum import product_sum
from fastlora_kernels.launch import NO_CONFIGS
from fastlora_kernels.persistent import takes_scaled

# w, a, b, bias, seed, scaling, dropout_p as `linear.forward` takes them; a, b None: no adapter.
Projection = tuple


def forward_all(
    x: Tensor, projections: Sequence[Projection], configs: Sequence[Mapping[str, Config]] = ()
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return y [M, N] and s [M, R] of each projection of x; s is None without an adapter.

    Up to four take two launches. ``configs`` may hold a mapping for each as `linear.forward` has
    it, which counts where there is one projection alone.
    """
    if len(projections) == 1:
        (w, a, b, bias, *rest), config = projections[0], configs[0] if configs else NO_CONFIGS
        if a is None:
            return [F.linear(x, w, bias)], [None]
        y, s = linear.forward(x, w, a, b, bias, *rest, config)
        return [y], [s]
    ys: list[Tensor | None] = [None] * len(projections)
    ss: list[Tensor | None] = [None] * len(projections)
    for few in together(projections):
        for i, y, s in zip(few, *_few_forward(x, [projections[i] for i in few]), strict=True):
            ys[i], ss[i] = y, s
    return ys, ss


def _few_forward(x: Tensor, few: Sequence[Projection]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return y and s of up to four projections whose adapters share a dtype."""
    w, a, b, bias, _, scaling, _ = zip(*few, strict=True)
    config, factor, scaled = config_of(x, w, b), _factor(x, few), None
    if takes_scaled(config) and factor not in (None, 1.0):
        scaled = [None if t is None else x.new_empty(len(x), len(t)) for t in a]
    s = shrinks(x, few, scaled)
    if scaled is None:
        return product_all(x, w, s, b, bias, scaling, config=config), s
    return product_all(x, w, scaled, b, bias, (1.0,) * len(few), config=config), s


def backward_all(
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Projection],
    ss: Sequence[Tensor | None],
    need_x: bool,
    needs: Sequence[tuple[bool, bool]],
    configs: Sequence[Mapping[str, Config]] = (),
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Return dx [M, K] of all projections together, and da [R, K] and db [N, R] of each.

    ``needs`` says of each projection whether da and db are asked for; what is not asked for, or
    has no dy, is None. ds and db take two launches for each projection, da two for up to four,
    dx one.
    """
    if len(projections) == 1 and projections[0][1] is not None and dys[0] is not None:
        (w, a, b, _, *rest), config = projections[0], configs[0] if configs else NO_CONFIGS
        asked = (need_x, *needs[0])
        dx, da, db = linear.backward(dys[0], x, w, a, b, ss[0], *rest, asked, config)
        return dx, [da], [db]
    dss, das, dbs = narrow_grads(dys, x, projections, ss, need_x, needs, configs)
    dx = None
    there = [i for i, dy in enumerate(dys) if dy is not None] if need_x else []
    for which in together([projections[i] for i in there]):
        few = [there[i] for i in which]
        w, a, _, _, seeds, _, p = zip(*(projections[i] for i in few), strict=True)
        part = product_sum([dys[i] for i in few], w, [dss[i] for i in few], a, seeds, dropout_p=p)
        dx = part if dx is None else dx.add_(part)
    return dx, das, dbs


def _factor(x: Tensor, few: Sequence[Projection]) -> float | None:
    """Return what scales every s in the dtype of x and cannot overflow it, None if nothing does."""
    found = {(a.dtype, scaling) for _, a, _, _, _, scaling, _ in few if a is not None}
    if len(found) != 1 or x.dtype != torch.bfloat16:
        return None
    ((dtype, scaling),) = found
    return scaling if dtype == x.dtype else None


def shrinks(
    x: Tensor,
    projections: Sequence[Projection],
    scaled: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """Return s [M, R] of each projection, None without an adapter: a launch for up to four.

    ``scaled`` as `shrink_all` takes it, for adapters of one dtype, with the first one's scaling.
    """
    found: list[Tensor | None] = [None] * len(projections)
    for same in by_dtype(projections):
        _, a, _, _, seeds, c, p = zip(*(projections[i] for i in same), strict=True)
        made = {} if scaled is None else {"scaled": [scaled[i] for i in same], "factor": c[0]}
        for i, s in zip(same, shrink_all(x, a, seeds, dropout_p=p, **made), strict=True):
            found[i] = s
    return found


def narrow_grads(
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Projection],
    ss: Sequence[Tensor | None],
    need_x: bool,
    needs: Sequence[tuple[bool, bool]],
    configs: Sequence[Mapping[str, Config]] = (),
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Return ds, da and db of each projection, None where it is not needed."""
    n = len(projections)
    dss, das, dbs = ([None] * n for _ in range(3))
    for i, (dy, (_, a, b, _, _, scaling, _)) in enumerate(zip(dys, projections, strict=True)):
        if dy is not None and a is not None:
            wanted = {"need_ds": need_x or needs[i][0], "need_db": needs[i][1]}
            config = configs[i].get("ds_db") if configs else None
            dss[i], dbs[i] = ds_db(dy, ss[i], b, scaling=scaling, **wanted, config=config)
    asked = [i for i in range(n) if dss[i] is not None and needs[i][0]]
    for same in by_dtype([projections[i] for i in asked]):
        few = [asked[i] for i in same]
        _, _, _, _, seeds, _, p = zip(*(projections[i] for i in few), strict=True)
        found = da_all(x, [dss[i] for i in few], seeds, dropout_p=p)
        for i, da in zip(few, found, strict=True):
            das[i] = da
    return dss, das, dbs


def together(projections: Sequence[Projection]) -> list[Sequence[int]]:
    """Return which projections a launch can take: up to four, their adapters of one dtype."""
    first, *others = by_dtype(projections, most=len(projections)) or [[]]
    frozen = [i for i, (_, a, *_) in enumerate(projections) if a is None]
    return [few for same in ([*first, *frozen], *others) for few in _parts(same)]


def by_dtype(projections: Sequence[Projection], most: int = MOST) -> list[Sequence[int]]:
    """Return which adapters a launch can take: up to ``most`` of one dtype."""
    found: dict = {}
    for i, (_, a, *_) in enumerate(projections):
        if a is not None:
            found.setdefault(a.dtype, []).append(i)
    return [few for same in found.values() for few in _parts(same, most)]


def _parts(items: Sequence, most: int = MOST) -> list[Sequence]:
    return [items[i : i + most] for i in range(0, len(items), most)]
