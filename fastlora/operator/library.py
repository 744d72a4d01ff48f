# SPDX-License-Identifier: Apache-2.0
"""The ``library`` implementation: the vendor's product for what is wide, our kernels for the rest.

y and dx are one library product each, which adds itself to the low-rank product: that is written
first and read again in the product's epilogue, but no Triton product has to be as fast as the
library's. What is as narrow as the rank (s, ds, da, db) comes from the Triton kernels, dropout
drawn inside them; so does the low-rank product of float32 factors under a 16-bit x, in one launch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastlora_kernels import steps as kernels
from torch import Tensor

from fastlora.operator import blocks
from fastlora.operator.operands import Operands

ds_db, da = kernels.ds_db, kernels.da
_DEFAULTS: Mapping[str, Any] = {}


def shrink(
    x: Tensor, projections: Sequence[Operands], configs: Mapping[str, Any] = _DEFAULTS
) -> tuple[list[Tensor | None], None]:
    """Return s = dropout(x) aᵀ [M, R] of each projection, which `outputs` scales itself."""
    return kernels.shrink(x, projections, configs, for_outputs=False)


def outputs(
    x: Tensor,
    projections: Sequence[Operands],
    ss: Sequence[Tensor | None],
    scaled: None = None,
    configs: Mapping[str, Any] = _DEFAULTS,
) -> list[Tensor]:
    """Return y [M, N] of each projection: the frozen product added to the low-rank one."""
    there: list[Tensor | None] = [None] * len(projections)
    mixed = [i for i, s in enumerate(ss) if s is not None and s.dtype != x.dtype]
    if mixed:  # main loops without steps: what is written is scaling · s bᵀ + bias alone
        few = [(p[0][:, :0], *p[1:]) for p in (projections[i] for i in mixed)]
        found = kernels.outputs(x[:, :0], few, [ss[i] for i in mixed])
        for i, y in zip(mixed, found, strict=True):
            there[i] = y
    return blocks.outputs(x, projections, ss, there)


def input_grad(
    dys: Sequence[Tensor | None],
    projections: Sequence[Operands],
    dss: Sequence[Tensor | None],
    configs: Mapping[str, Any] = _DEFAULTS,
) -> Tensor | None:
    """Return dx [M, K]: every product dy w added to the sum of dropout'(ds a)."""
    dx, there = None, [i for i, ds in enumerate(dss) if ds is not None]
    few, ds = [projections[i] for i in there], [dss[i] for i in there]
    if len(there) == 1 and few[0].seed is None and ds[0].dtype == dys[there[0]].dtype:
        a = few[0].a
        dx = blocks.expand(ds[0], a, 1.0, ds[0].new_empty(ds[0].shape[0], a.shape[1]))
    elif there:  # main loops without steps here too
        none = [dys[i][:, :0] for i in there]
        dx = kernels.input_grad(none, [(p[0][:0], *p[1:]) for p in few], ds)
    for dy, (w, *_) in zip(dys, projections, strict=True):
        if dy is not None:
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
    return dx
