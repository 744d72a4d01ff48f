# SPDX-License-Identifier: Apache-2.0
"""A LoRA linear layer, and several of one x, in five steps: each a launch for up to four of them.

``x`` is [M, K]. A projection is a tuple of w [N, K], a [R, K], b [N, R], bias [N], seed ([1],
int64), scaling and dropout's p, tensors of any strides; a and b are None without an adapter, seed
without dropout. Adapters are of the dtype of x or float32. Lists may be of any length. ``configs``
may hold one for each step, by its name; the others take their default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastlora_kernels import columns
from fastlora_kernels.configs import Config
from fastlora_kernels.joint import MOST
from fastlora_kernels.joint_columns import da_all
from fastlora_kernels.joint_product import config_of, product_all
from fastlora_kernels.joint_shrink import shrink_all
from fastlora_kernels.joint_sum import product_sum
from fastlora_kernels.launch import NO_CONFIGS, config_for
from fastlora_kernels.persistent import takes_scaled
from fastlora_kernels.product import product
from fastlora_kernels.shrink import shrink as shrink_one

Projection = tuple
Maybe = list[Tensor | None]


def shrink(
    x: Tensor, projections: Sequence[Projection], configs: Mapping[str, Config] = NO_CONFIGS
) -> tuple[Maybe, Maybe | None]:
    """Return s_i = dropout_i(x) a_iᵀ [M, R_i] in a's dtype, contiguous, None without an adapter.

    Second, the same times the scaling for `outputs`, or None where that scales s itself.
    """
    ss: Maybe = [None] * len(projections)
    scaled: Maybe = [None] * len(projections)
    for which in by_dtype(projections):
        few = [projections[i] for i in which]
        _, a, _, _, seeds, _, p = zip(*few, strict=True)
        made, factor = None, _factor(x, few, configs)
        if factor is not None:
            made = [x.new_empty(len(x), len(t)) for t in a]
        if len(few) == 1:
            into = None if made is None else made[0]
            config = configs.get("shrink")
            rest = {"scaled": into, "factor": factor or 1.0, "config": config}
            found = [shrink_one(x, a[0], seeds[0], dropout_p=p[0], **rest)]
        else:
            found = shrink_all(x, a, seeds, dropout_p=p, scaled=made, factor=factor or 1.0)
        for j, i in enumerate(which):
            ss[i], scaled[i] = found[j], None if made is None else made[j]
    return ss, scaled if any(t is not None for t in scaled) else None


def outputs(
    x: Tensor,
    projections: Sequence[Projection],
    ss: Sequence[Tensor | None],
    scaled: Sequence[Tensor | None] | None = None,
    configs: Mapping[str, Config] = NO_CONFIGS,
) -> list[Tensor]:
    """Return y_i = x w_iᵀ + scaling_i · s_i b_iᵀ + bias_i [M, N_i] in the dtype of x."""
    ys: Maybe = [None] * len(projections)
    for which in together(projections):
        w, _, b, biases, _, scalings, _ = zip(*(projections[i] for i in which), strict=True)
        s = [ss[i] for i in which]
        if scaled is not None and all(scaled[i] is not None or ss[i] is None for i in which):
            s, scalings = [scaled[i] for i in which], (1.0,) * len(which)
        if len(which) == 1 and b[0] is not None:
            config = _config(configs, "outputs", x, projections[which[0]])
            found = [product(x, w[0], s[0], b[0], biases[0], scaling=scalings[0], config=config)]
        else:
            found = product_all(x, w, s, b, biases, scalings)
        for i, y in zip(which, found, strict=True):
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
    for i, (_, _, b, _, _, scaling, _) in enumerate(projections):
        if dys[i] is not None and b is not None:
            needed = {"need_ds": need_ds[i], "need_db": need_db[i]}
            rest = {"scaling": scaling, "config": configs.get("ds_db")}
            dss[i], dbs[i] = columns.ds_db(dys[i], ss[i], b, **needed, **rest)
    return dss, dbs


def input_grad(
    dys: Sequence[Tensor | None],
    projections: Sequence[Projection],
    dss: Sequence[Tensor | None],
    configs: Mapping[str, Config] = NO_CONFIGS,
) -> Tensor | None:
    """Return dx = Σ (dy_i w_i + dropout_i'(ds_i a_i)) [M, K]; None where no dy is there."""
    there = [i for i, dy in enumerate(dys) if dy is not None]
    dx = None
    for which in together([projections[i] for i in there]):
        few = [there[i] for i in which]
        w, a, _, _, seeds, _, p = zip(*(projections[i] for i in few), strict=True)
        dy, ds = [dys[i] for i in few], [dss[i] for i in few]
        if len(few) == 1 and a[0] is not None:
            dropped = {"seed": seeds[0], "dropout_p": p[0], "config": configs.get("input_grad")}
            part = product(dy[0], w[0].t(), ds[0], a[0].t(), **dropped)
        else:
            part = product_sum(dy, w, ds, a, seeds, dropout_p=p)
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
    asked = [i for i, need in enumerate(needs) if need and dss[i] is not None]
    for which in by_dtype([projections[i] for i in asked]):
        few = [asked[i] for i in which]
        _, _, _, _, seeds, _, p = zip(*(projections[i] for i in few), strict=True)
        ds = [dss[i] for i in few]
        if len(few) == 1:
            config = configs.get("da")
            found = [columns.da(x, ds[0], seeds[0], dropout_p=p[0], config=config)]
        else:
            found = da_all(x, ds, seeds, dropout_p=p)
        for i, part in zip(few, found, strict=True):
            das[i] = part
    return das


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


def _config(configs: Mapping[str, Config], step: str, x: Tensor, projection: Projection) -> Config:
    w, a, _, _, seed, _, _ = projection
    return configs.get(step) or config_for("product", x, w, len(a), a.dtype, seed is not None)


def _factor(x: Tensor, few: Sequence[Projection], configs: Mapping[str, Config]) -> float | None:
    """Return what every s is scaled by before `outputs` folds it in; None if that scales it.

    Float16 might overflow where s alone does not.
    """
    w, a, b, _, _, scalings, _ = zip(*few, strict=True)
    if x.dtype != torch.bfloat16 or a[0].dtype != x.dtype or len(set(scalings)) > 1:
        return None
    config = _config(configs, "outputs", x, few[0]) if len(few) == 1 else config_of(x, w, b)
    return scalings[0] if takes_scaled(config) and scalings[0] != 1.0 else None
