# SPDX-License-Identifier: Apache-2.0
"""A LoRA linear layer, and several of one x, in five steps: each a launch for up to four of them.

``x`` is [M, K]. A projection is a tuple of w [N, K], a [R, K], b [N, R], bias [N], seed ([1],
int64), scaling and dropout's p, tensors of any strides; a and b are None without an adapter, seed
without dropout. Adapters are of the dtype of x or float32. Lists may be of any length. ``configs``
may hold one for each step, by the step's name; others take their default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastlora_kernels import da as da_of
from fastlora_kernels import ds_db as ds_db_of
from fastlora_kernels import input_grad as input_grad_of
from fastlora_kernels import outputs as outputs_of
from fastlora_kernels import shrink as shrink_of
from fastlora_kernels.configs import Config
from fastlora_kernels.launch import NO_CONFIGS
from fastlora_kernels.locate import MOST

Projection = tuple
Maybe = list[Tensor | None]
_THE_ONE = [(0,)]


def shrink(
    x: Tensor,
    projections: Sequence[Projection],
    configs: Mapping[str, Config] = NO_CONFIGS,
    *,
    for_outputs: bool = True,
) -> tuple[Maybe, Maybe | None]:
    """Return s_i = dropout_i(x) a_iᵀ [M, R_i] in a's dtype, contiguous, None without an adapter.

    Second, the same times the scaling for `outputs`, or None where that scales s itself, or s is
    not ``for_outputs`` of this file.
    """
    ss: Maybe = [None] * len(projections)
    scaled: Maybe = [None] * len(projections)
    any_scaled = False
    for few in adapted(projections):
        w, a, b, _, seeds, scalings, p = _columns(projections, few)
        # What `outputs` folds in has to be scaled before. Float16 might overflow then.
        into = w, b, scalings, configs.get("outputs")
        into = into if for_outputs and a[0].dtype == x.dtype == torch.bfloat16 else ()
        found, made = shrink_of.shrink(x, a, seeds, p, configs.get("shrink"), *into)
        for j, i in enumerate(few):
            ss[i] = found[j]
            if made is not None:
                scaled[i], any_scaled = made[j], True
    return ss, scaled if any_scaled else None


def outputs(
    x: Tensor,
    projections: Sequence[Projection],
    ss: Sequence[Tensor | None],
    scaled: Sequence[Tensor | None] | None = None,
    configs: Mapping[str, Config] = NO_CONFIGS,
) -> list[Tensor]:
    """Return y_i = x w_iᵀ + scaling_i · s_i b_iᵀ + bias_i [M, N_i] in the dtype of x."""
    ys: Maybe = [None] * len(projections)
    config = configs.get("outputs")
    for few in together(projections):
        w, _, b, biases, _, scalings, _ = _columns(projections, few)
        s = tuple([ss[i] for i in few])
        if scaled is not None and all(scaled[i] is not None or ss[i] is None for i in few):
            s, scalings = tuple([scaled[i] for i in few]), (1.0,) * len(few)
        for i, y in zip(few, outputs_of.outputs(x, w, s, b, biases, scalings, config), strict=True):
            ys[i] = y
    return ys


def ds_db(
    dys: Sequence[Tensor | None],
    projections: Sequence[Projection],
    ss: Sequence[Tensor | None],
    need_ds: Sequence[bool],
    need_db: Sequence[bool],
    configs: Mapping[str, Config] = NO_CONFIGS,
) -> tuple[Maybe, Maybe]:
    """Return ds_i = scaling_i · dy_i b_i [M, R_i] and db_i = scaling_i · dy_iᵀ s_i [N_i, R_i].

    In b's dtype, each None where it is not needed, or there is no dy or no adapter.
    """
    dss: Maybe = [None] * len(projections)
    dbs: Maybe = [None] * len(projections)
    config = configs.get("ds_db")
    for few in adapted(projections, dys):
        _, _, b, _, _, scalings, _ = _columns(projections, few)
        dy, s = tuple([dys[i] for i in few]), tuple([ss[i] for i in few])
        needs = tuple([need_ds[i] for i in few]), tuple([need_db[i] for i in few])
        found = ds_db_of.ds_db(dy, s, b, scalings, *needs, config)
        for i, ds, db in zip(few, *found, strict=True):
            dss[i], dbs[i] = ds, db
    return dss, dbs


def input_grad(
    dys: Sequence[Tensor | None],
    projections: Sequence[Projection],
    dss: Sequence[Tensor | None],
    configs: Mapping[str, Config] = NO_CONFIGS,
) -> Tensor | None:
    """Return dx = Σ (dy_i w_i + dropout_i'(ds_i a_i)) [M, K]; None where no dy is there."""
    dx, config = None, configs.get("input_grad")
    for few in together(projections, dys):
        w, a, _, _, seeds, _, p = _columns(projections, few)
        dy, ds = tuple([dys[i] for i in few]), tuple([dss[i] for i in few])
        part = input_grad_of.input_grad(dy, w, ds, a, seeds, p, config)
        dx = part if dx is None else dx.add_(part)
    return dx


def da(
    x: Tensor,
    projections: Sequence[Projection],
    dss: Sequence[Tensor | None],
    needs: Sequence[bool],
    configs: Mapping[str, Config] = NO_CONFIGS,
) -> Maybe:
    """Return da_i = ds_iᵀ dropout_i(x) [R_i, K] in the dtype of ds, None where not needed."""
    das: Maybe = [None] * len(projections)
    config = configs.get("da")
    asked = [ds if need else None for ds, need in zip(dss, needs, strict=True)]
    for few in adapted(projections, asked):
        _, _, _, _, seeds, _, p = _columns(projections, few)
        found = da_of.da(x, tuple([dss[i] for i in few]), seeds, p, config)
        for i, part in zip(few, found, strict=True):
            das[i] = part
    return das


def together(
    projections: Sequence[Projection], there: Sequence[Tensor | None] | None = None
) -> list[Sequence[int]]:
    """Return which projections a launch can take: up to four, their adapters of one dtype.

    Those for which there is something in ``there``.
    """
    if len(projections) == 1 and (there is None or there[0] is not None):
        return _THE_ONE
    groups = _by_dtype(projections, there)
    frozen = groups.pop(None, [])
    first, *others = groups.values() or [[]]
    return [few for same in ([*first, *frozen], *others) for few in _parts(same)]


def adapted(
    projections: Sequence[Projection], there: Sequence[Tensor | None] | None = None
) -> list[Sequence[int]]:
    """Return the same of the projections that have an adapter."""
    if (
        len(projections) == 1
        and projections[0][1] is not None
        and (there is None or there[0] is not None)
    ):
        return _THE_ONE
    groups = _by_dtype(projections, there)
    groups.pop(None, None)
    return [few for same in groups.values() for few in _parts(same)]


def _by_dtype(
    projections: Sequence[Projection], there: Sequence[Tensor | None] | None
) -> dict[torch.dtype | None, list[int]]:
    found: dict[torch.dtype | None, list[int]] = {}
    for i, projection in enumerate(projections):
        if there is None or there[i] is not None:
            a = projection[1]
            found.setdefault(None if a is None else a.dtype, []).append(i)
    return found


def _parts(items: Sequence[int]) -> list[Sequence[int]]:
    return [items[i : i + MOST] for i in range(0, len(items), MOST)]


def _columns(projections: Sequence[Projection], few: Sequence[int]) -> tuple[tuple, ...]:
    """Return what some of the projections are made of, a tuple for each field."""
    if len(few) == 1:
        return tuple([(value,) for value in projections[few[0]]])
    return tuple(zip(*[projections[i] for i in few], strict=True))
