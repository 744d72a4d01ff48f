# SPDX-License-Identifier: Apache-2.0
"""y = x wᵀ + scale · dropout'(s bᵀ) + bias: the forward product, and dx with other names.

One accumulator: the low-rank product comes first, is scaled and masked in float32, and the main
loop adds the frozen product to it. y is written once and never read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.configs import MOST_UNEVEN, Config, cdiv
from fastlora_kernels.dropout import kept_scale, lowest_kept
from fastlora_kernels.launch import config_for, launch
from fastlora_kernels.persistent import persistent_product, suits
from fastlora_kernels.tiles import dot, low_rank_tile, tile_of, triton_dtype, wrapped


@triton.jit
def add_product(
    acc,
    x_ptr,
    w_ptr,
    rows,
    columns,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return acc + x wᵀ for a tile of ``rows`` of x and ``columns``, which are rows of w."""
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk
    w_ptrs = w_ptr + columns[None, :] * stride_wn + offs_k.to(tl.int64)[:, None] * stride_wk
    step_x = tl.cast(BLOCK_K, tl.int64) * stride_xk
    step_w = tl.cast(BLOCK_K, tl.int64) * stride_wk
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            mask_k = offs_k < K - k
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_k[:, None], other=0.0)
        acc = dot(x, w, acc)  # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N]
        x_ptrs += step_x
        w_ptrs += step_w
    return acc


@triton.jit(do_not_specialize=["keep_from"])
def product_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bn,
    stride_br,
    stride_bias,
    scale,
    keep_from,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = wrapped(offs_m, M)
    columns = wrapped(offs_n, N)

    acc = low_rank_tile(
        s_ptr,
        b_ptr,
        seed_ptr,
        offs_m,
        offs_n,
        pid_n * BLOCK_N,
        M,
        N,
        R,
        stride_bn,
        stride_br,
        scale,
        keep_from,
        HAS_DROPOUT,
        y_ptr.dtype.element_ty,
        ACC,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
    )
    acc = add_product(
        acc,
        x_ptr,
        w_ptr,
        rows,
        columns,
        K,
        stride_xm,
        stride_xk,
        stride_wn,
        stride_wk,
        EVEN_K,
        BLOCK_K,
    )

    mask_n = offs_n < N
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(ACC)[None, :]
    y_ptrs = y_ptr + rows[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & mask_n[None, :])


def product(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    config: Config | None = None,
) -> Tensor:
    """Return ``x wᵀ + scaling · dropout'(s bᵀ) + bias`` [M, N] in the dtype of x, contiguous.

    ``x`` [M, K], ``w`` [N, K], ``b`` [N, R] and ``bias`` [N] of any strides; ``s`` [M, R]
    contiguous. ``s`` and ``b`` share a dtype: that of x, or float32. With a ``seed`` ([1],
    int64) the low-rank product is masked at (m, n) and scaled by 1 / (1 - dropout_p).
    """
    (M, K), N, R = x.shape, w.shape[0], s.shape[1]
    config = config or config_for("dx", x, w, R, b.dtype, seed is not None)
    if config.tma and suits(x, w):
        return persistent_product(x, w, s, b, bias, seed, scaling, dropout_p, config)
    large = N * x.element_size() % 16 != 0 and config.block_m * config.block_n > MOST_UNEVEN
    if config.tma or large:
        config = config_for("dx", x, w, R, b.dtype, seed is not None, even=False)
    y = x.new_empty(M, N)
    grid = (cdiv(M, config.block_m) * cdiv(N, config.block_n),)
    scale, keep_from = scaling, 0
    if seed is not None:
        scale, keep_from = scaling * kept_scale(dropout_p), lowest_kept(dropout_p)
    even_k = K % config.block_k == 0
    flags = bias is not None, seed is not None, even_k, triton_dtype(x.dtype)
    tiles = config.block_m, config.block_n, config.block_k, config.rank_tile(R), config.group_m
    launch(
        *(product_kernel, grid, config),
        *(x, w, s, b, bias, seed, y),
        *(M, N, K, R),
        *x.stride(),
        *w.stride(),
        *b.stride(),
        0 if bias is None else bias.stride(0),
        *(scale, keep_from),
        *flags,
        *tiles,
    )
    return y
