# SPDX-License-Identifier: Apache-2.0
"""s = dropout(x) aᵀ: one read of x, dropout drawn in the kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.configs import Config, cdiv
from fastlora_kernels.dropout import keep_tile, kept_scale, lowest_kept
from fastlora_kernels.launch import config_for, launch
from fastlora_kernels.tiles import dot, let_next_start, triton_dtype, wrapped


@triton.jit(do_not_specialize=["keep_from"])
def shrink_kernel(
    x_ptr,
    a_ptr,
    seed_ptr,
    s_ptr,
    scaled_ptr,
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    scale,
    factor,
    keep_from,
    HAS_DROPOUT: tl.constexpr,
    HAS_SCALED: tl.constexpr,
    TRIGGER: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILES_R: tl.constexpr,
):
    if TRIGGER:
        let_next_start()
    # Neighbours read the same rows of x.
    offs_m = tl.program_id(0) // TILES_R * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(0) % TILES_R * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    rows = wrapped(offs_m, M)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk
    a_ptrs = (
        a_ptr + wrapped(offs_r, R)[None, :] * stride_ar + offs_k.to(tl.int64)[:, None] * stride_ak
    )
    step_x = tl.cast(BLOCK_K, tl.int64) * stride_xk
    step_a = tl.cast(BLOCK_K, tl.int64) * stride_ak

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            a = tl.load(a_ptrs)
        else:
            mask_k = offs_k < K - k
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            a = tl.load(a_ptrs, mask=mask_k[:, None], other=0.0)
        if HAS_DROPOUT:
            keep = keep_tile(seed_ptr, offs_m, k, K, keep_from, BLOCK_K)
            x = (x.to(ACC) * keep.to(ACC)).to(x.dtype)
        acc = dot(x, a, acc)  # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_R]
        x_ptrs += step_x
        a_ptrs += step_a
    acc *= tl.cast(scale, ACC)

    offs = rows[:, None] * R + offs_r[None, :]
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    tl.store(s_ptr + offs, acc.to(s_ptr.dtype.element_ty), mask=mask)
    if HAS_SCALED:
        acc *= tl.cast(factor, ACC)
        tl.store(scaled_ptr + offs, acc.to(scaled_ptr.dtype.element_ty), mask=mask)


def shrink(
    x: Tensor,
    a: Tensor,
    seed: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    scaled: Tensor | None = None,
    factor: float = 1.0,
    trigger: bool = False,
    config: Config | None = None,
) -> Tensor:
    """Return ``scaling · dropout(x) aᵀ`` [M, R] in the dtype of a, contiguous.

    ``x`` [M, K] and ``a`` [R, K] of any strides; a's dtype is that of x, or float32. Dropout
    acts where a ``seed`` ([1], int64) is given. ``scaled`` ([M, R], contiguous) is filled with
    ``factor`` times the result, rounded once. With ``trigger`` an early kernel may start at once.
    """
    (M, K), R = x.shape, a.shape[0]
    config = config or config_for("shrink", x, a, R, a.dtype, seed is not None)
    s = a.new_empty(M, R)
    block_r = config.rank_tile(R)
    tiles_r = cdiv(R, block_r)
    grid = (cdiv(M, config.block_m) * tiles_r,)
    scale, keep_from = scaling, 0
    if seed is not None:
        scale, keep_from = scaling * kept_scale(dropout_p), lowest_kept(dropout_p)
    flags = seed is not None, scaled is not None, trigger
    even_k, acc = K % config.block_k == 0, triton_dtype(x.dtype)
    tiles = config.block_m, config.block_k, block_r, tiles_r
    launch(
        *(shrink_kernel, grid, config),
        *(x, a, seed, s, scaled),
        *(M, K, R),
        *x.stride(),
        *a.stride(),
        *(scale, factor, keep_from),
        *flags,
        *(even_k, acc),
        *tiles,
    )
    return s
