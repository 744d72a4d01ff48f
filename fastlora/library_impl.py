"""The ``library`` implementation: the vendor's product for what is wide, our kernels for the rest.

y and dx are one library product each, which adds itself to the low-rank product: that is written
first and read again in the product's epilogue, but no Triton product has to be as fast as the
library's. What is as narrow as the rank (s, ds, da, db) comes from the Triton kernels, dropout
drawn inside them.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastlora_kernels.columns import da as da_of
from fastlora_kernels.columns import ds_db
from fastlora_kernels.configs import Config
from fastlora_kernels.launch import NO_CONFIGS
from fastlora_kernels.product import product
from fastlora_kernels.shrink import shrink
from torch import Tensor

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
    s = shrink(x, a, seed, dropout_p=dropout_p, config=configs.get("shrink"))
    y = expand(s, b.t(), scaling, x.new_empty(x.shape[0], w.shape[0]), bias)
    return y.addmm_(x, w.t()), s


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
    if seed is None:
        return expand(ds, a, 1.0, x.new_empty(x.shape)).addmm_(dy, w), da, db
    # The kernel's main loop has no steps: what it writes is the masked low-rank product alone.
    none = slice(0, 0)
    dx = product(dy[:, none], w.t()[:, none], ds, a.t(), **dropped)
    return dx.addmm_(dy, w), da, db
