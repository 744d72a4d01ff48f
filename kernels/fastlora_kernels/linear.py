# SPDX-License-Identifier: Apache-2.0
"""The LoRA linear layer from its kernels: forward and backward on 2-D tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastlora_kernels.columns import da as da_of
from fastlora_kernels.columns import ds_db
from fastlora_kernels.configs import Config
from fastlora_kernels.launch import NO_CONFIGS, config_for
from fastlora_kernels.persistent import (
    persistent_product,
    recomputes,
    starts_early,
    takes_scaled,
)
from fastlora_kernels.product import product
from fastlora_kernels.shrink import shrink


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
    """Return y [M, N] in the dtype of x, and s = dropout(x) aᵀ [M, R] in the dtype of a.

    ``x`` [M, K], ``w`` [N, K], ``a`` [R, K], ``b`` [N, R], ``bias`` [N]; any strides. Dropout
    acts where a ``seed`` ([1], int64, on x's device) is given. ``configs`` may hold one for each
    launcher, by its name; the others take their default.
    """
    config = configs.get("product") or config_for(
        "product", x, w, a.shape[0], a.dtype, seed is not None
    )
    if recomputes(config, x, w, a, b, seed):
        s = a.new_empty(x.shape[0], a.shape[0])
        return persistent_product(x, w, s, b, bias, None, scaling, 0.0, config, a), s
    early = starts_early(config)
    # Float16 might overflow where s alone does not.
    apart = takes_scaled(config) and scaling != 1.0 and x.dtype == torch.bfloat16 == a.dtype
    scaled = x.new_empty(x.shape[0], a.shape[0]) if apart else None
    s = shrink(
        *(x, a, seed),
        dropout_p=dropout_p,
        scaled=scaled,
        factor=scaling,
        trigger=early,
        config=configs.get("shrink"),
    )
    if apart:
        return product(x, w, scaled, b, bias, config=config), s
    return product(x, w, s, b, bias, scaling=scaling, config=config), s


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
    need_x, need_a, need_b = needs
    dropped = {"seed": seed, "dropout_p": dropout_p}
    config = configs.get("dx") or config_for("dx", dy, w, a.shape[0], a.dtype, seed is not None)
    in_use = [] if need_x and starts_early(config) else None
    needed = {"need_ds": need_x or need_a, "need_db": need_b, "config": configs.get("ds_db")}
    ds, db = ds_db(dy, s, b, scaling=scaling, in_use=in_use, **needed)
    dx = product(dy, w.t(), ds, a.t(), **dropped, config=config) if need_x else None
    del in_use  # dx is launched
    return dx, da_of(x, ds, **dropped, config=configs.get("da")) if need_a else None, db
