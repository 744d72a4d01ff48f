# SPDX-License-Identifier: Apache-2.0
"""The ``library`` implementation: the vendor's product for what is wide, our kernels for the rest.

y and dx are one library product each, which adds itself to the low-rank product: that is written
first and read again in the product's epilogue, but no Triton product has to be as fast as the
library's. What is as narrow as the rank (s, ds, da, db) comes from the Triton kernels, dropout
drawn inside them; so does the low-rank product of float32 factors under a 16-bit x, in one launch.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from fastlora_kernels import lists
from fastlora_kernels import steps as kernels
from torch import Tensor
from torch.nn import functional as F

from fastlora.operator import blocks
from fastlora.operator.grouped import grouped_mm
from fastlora.operator.operands import Each, Operands, Projections


def _narrow(step: Callable, **options: Any) -> Callable:
    """Return a step of the kernels that reads no w: here that may be quantised, or a slice."""

    @functools.wraps(step)
    def run(t: Any, projections: Projections, *rest: Any, **more: Any) -> Any:
        without = [(None, *one[1:]) for one in projections]
        return step(t, without, *rest, **options, **more)

    return run


shrink = _narrow(kernels.shrink, for_outputs=False)  # `outputs` scales s itself
ds_db, da = _narrow(kernels.ds_db), _narrow(kernels.da)
ds_db_of_scaled, dropped = _narrow(kernels.ds_db_of_scaled), kernels.dropped


def outputs(
    x: Tensor,
    projections: Projections,
    ss: Each,
    scaled: None = None,
    configs: Mapping | None = None,
    segments: lists.Segments | None = None,
) -> list[Tensor]:
    """Return y [M, N] of each projection: the frozen product added to the low-rank one."""
    wides, stacked = [], _are_stacked(projections)
    for one, s in zip(projections, ss, strict=True) if stacked else ():
        # No product of the vendor's adds a bias that no low-rank product has added.
        alone = s is None and one.bias is not None
        wides.append(None if alone else grouped_mm(x, one.w.mT, segments[0]))
        if wides[-1] is None:
            return kernels.outputs(x, projections, ss, segments=segments)
    there: list[Tensor | None] = [None] * len(projections)
    mixed = [i for i, s in enumerate(ss) if s is not None and (segments or s.dtype != x.dtype)]
    mixed = [i for i in mixed if type(projections[i][0]) is not slice]  # whose y is there
    if mixed:  # main loops without steps: what is written is scaling · s bᵀ + bias alone
        few, own = [], lists.of_few(segments, mixed)
        for w, a, b, bias, *rest in (projections[i] for i in mixed):
            few.append((x.new_empty(b.shape[-2], 0), a, b, None if w is None else bias, *rest))
        found = kernels.outputs(x[:, :0], few, [ss[i] for i in mixed], segments=own)
        for i, y in zip(mixed, found, strict=True):
            there[i] = y
    if stacked:
        return [w if y is None else y.add_(w) for w, y in zip(wides, there, strict=True)]
    return blocks.outputs(x, projections, ss, there)


def scaled_outputs(x: Tensor, projections: Projections, ss: Each, keep: bool) -> tuple[Each, Each]:
    """Return y and z [M, N] of projections with a scale: what the product makes is read once."""
    pairs = [_scaled_output(x, one, s, keep) for one, s in zip(projections, ss, strict=True)]
    return tuple(zip(*pairs, strict=True))


def _scaled_output(x: Tensor, one: Operands, s: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
    right, drops = one.w.t(), one.seed is not None  # dense from here on, and no other beside it
    w = right.t()
    z = F.linear(dropped(x, one.seed, one.p), w) if drops else F.linear(x, w, one.bias)
    without = one._replace(w=x.new_empty(len(w), 0))
    (y,), _ = kernels.scaled_outputs(x[:, :0], [without], [s], zs=[z])
    return y.addmm_(x, right) if drops else y, z if keep else None


def input_grad(
    dys: Each, projections: Projections, dss: Each,
    configs: Mapping | None = None, segments: lists.Segments | None = None,
) -> Tensor | None:  # fmt: skip
    """Return dx [M, K]: every product dy w added to the sum of dropout'(ds a)."""
    wides, stacked = [], _are_stacked(projections)
    for dy, one in zip(dys, projections, strict=True) if stacked else ():
        if dy is not None:
            wides.append(grouped_mm(dy, one.w, segments[0]))
            if wides[-1] is None:
                return kernels.input_grad(dys, projections, dss, segments=segments)
    dx, there = None, [i for i, ds in enumerate(dss) if ds is not None]
    few, ds = [projections[i] for i in there], [dss[i] for i in there]
    plain = len(there) == 1 and few[0].seed is None and ds[0].dtype == dys[there[0]].dtype
    if plain and not segments:
        dx = ds[0] @ few[0].a
    elif there:  # main loops without steps here too
        none = [dys[i][:, :0] for i in there]
        nothing = none[0].new_empty(0, few[0].a.shape[-1])
        own = lists.of_few(segments, there)
        dx = kernels.input_grad(none, [(nothing, *p[1:]) for p in few], ds, segments=own)
    for wide in wides:
        dx = wide if dx is None else dx.add_(wide)
    return dx if stacked else blocks.add_products(dx, dys, projections)


def _are_stacked(projections: Projections) -> bool:
    """Return whether each segment of rows has a weight of its own."""
    w = projections[0].w
    return w is not None and w.dim() == 3
