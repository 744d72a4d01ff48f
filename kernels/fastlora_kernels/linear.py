"""The LoRA linear layer from its kernels: forward and backward on 2-D tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastlora_kernels.columns import da as da_of
from fastlora_kernels.columns import ds_db
from fastlora_kernels.configs import Config
from fastlora_kernels.launch import NO_CONFIGS
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
    s = shrink(x, a, seed, dropout_p=dropout_p, config=configs.get("shrink"))
    return product(x, w, s, b, bias, scaling=scaling, config=configs.get("product")), s


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
    needed = {"need_ds": need_x or need_a, "need_db": need_b}
    ds, db = ds_db(dy, s, b, scaling=scaling, **needed, config=configs.get("ds_db"))
    dropped = {"seed": seed, "dropout_p": dropout_p}
    da = da_of(x, ds, **dropped, config=configs.get("da")) if need_a else None
    if not need_x:
        return None, da, db
    return product(dy, w.t(), ds, a.t(), **dropped, config=configs.get("product")), da, db
