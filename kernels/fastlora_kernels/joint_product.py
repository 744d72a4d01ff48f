# SPDX-License-Identifier: Apache-2.0
"""y_i = x w_iᵀ + scale_i · s_i b_iᵀ + bias_i for several projections of one x: one wide product.

The column tiles of all projections are numbered one after the other, so that programs which run
at the same time share rows of x whatever projection they are of.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.configs import Config, cdiv
from fastlora_kernels.joint import alike, check, filled, locate, number_of, pointer_of, strides
from fastlora_kernels.launch import config_for_all, launch
from fastlora_kernels.persistent_all import persistent_all, suits_all
from fastlora_kernels.product import add_product
from fastlora_kernels.tiles import low_rank_tile, tile_of, triton_dtype, wrapped


@triton.jit
def product_all_kernel(
    x_ptr,
    w_ptrs,
    s_ptrs,
    b_ptrs,
    bias_ptrs,
    y_ptrs,
    M,
    sizes,
    K,
    ranks,
    bias_sizes,
    tiles_n,
    stride_xm,
    stride_xk,
    strides_wn,
    strides_wk,
    strides_bn,
    strides_br,
    strides_bias,
    scales,
    HAS_LOW_RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACC: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, GROUP_M)
    i, pid_n = locate(tile_n, sizes, BLOCK_N)
    N = number_of(i, sizes, tl.int32)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = wrapped(offs_m, M)
    columns = wrapped(offs_n, N)

    if HAS_LOW_RANK:
        # A projection without an adapter has rank 0 here.
        acc = low_rank_tile(
            pointer_of(i, s_ptrs),
            pointer_of(i, b_ptrs),
            None,
            offs_m,
            offs_n,
            0,
            M,
            N,
            number_of(i, ranks, tl.int32),
            number_of(i, strides_bn, tl.int64),
            number_of(i, strides_br, tl.int64),
            number_of(i, scales, ACC),
            0,
            False,
            y_ptrs[0].dtype.element_ty,
            ACC,
            BLOCK_M,
            BLOCK_N,
            BLOCK_R,
        )
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    acc = add_product(
        acc,
        x_ptr,
        pointer_of(i, w_ptrs),
        rows,
        columns,
        K,
        stride_xm,
        stride_xk,
        number_of(i, strides_wn, tl.int64),
        number_of(i, strides_wk, tl.int64),
        EVEN_K,
        BLOCK_K,
    )

    mask_n = offs_n < N
    if HAS_BIAS:
        # One that is not there has size 0 here.
        bias_tile = pointer_of(i, bias_ptrs) + columns * number_of(i, strides_bias, tl.int64)
        mask_bias = offs_n < number_of(i, bias_sizes, tl.int32)
        acc += tl.load(bias_tile, mask=mask_bias, other=0.0).to(ACC)[None, :]
    y_tile = pointer_of(i, y_ptrs) + rows[:, None] * N + offs_n[None, :]
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    tl.store(y_tile, acc.to(y_ptrs[0].dtype.element_ty), mask=mask)


def config_of(
    x: Tensor,
    w: Sequence[Tensor],
    b: Sequence[Tensor | None],
    even: bool = True,
    fold: bool = True,
) -> Config:
    """Return the default config; ``even`` and ``fold`` as `default_config` has them."""
    adapters = [t for t in b if t is not None]
    rank = max((t.shape[1] for t in adapters), default=1)
    dtype = adapters[0].dtype if adapters else x.dtype
    even = even and all(t.shape[0] * x.element_size() % 16 == 0 for t in w)
    return config_for_all("product_all", (x,), w, rank, dtype, False, even, fold)


def product_all(
    x: Tensor,
    w: Sequence[Tensor],
    s: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    *,
    config: Config | None = None,
) -> list[Tensor]:
    """Return ``x w_iᵀ + scaling_i · s_i b_iᵀ + bias_i`` [M, N_i] in x's dtype, in one launch.

    ``x`` [M, K], one to four ``w`` [N_i, K], ``b`` [N_i, R_i] and ``biases`` [N_i] of any strides,
    ``s`` [M, R_i] contiguous. s and b share a dtype, that of x or float32, and so do the biases.
    s and b may be None, and so may a bias. The results are contiguous. Raises ValueError, which
    names the list, for lists of other lengths.
    """
    check(w=w, s=s, b=b, biases=biases, scalings=scalings)
    (M, K), sizes = x.shape, tuple(t.shape[0] for t in w)
    ranks = tuple(0 if t is None else t.shape[1] for t in b)
    config = config or config_of(x, w, b)
    if config.tma and not suits_all(x, w, s, b, scalings, config):
        config = config_of(x, w, b, fold=False)
    if config.tma:
        if suits_all(x, w, s, b, scalings, config):
            return persistent_all(x, w, s, b, biases, scalings, config)
        config = config_of(x, w, b, even=False)
    tiles_n = sum(cdiv(n, config.block_n) for n in sizes)
    y = tuple(x.new_empty(M, n) for n in sizes)
    bias_sizes = tuple(0 if t is None else t.shape[0] for t in biases)
    launch(
        *(product_all_kernel, (cdiv(M, config.block_m) * tiles_n,), config),
        *(x, tuple(w), filled(s), filled(b), filled(biases), y),
        *(M, sizes, K, ranks, bias_sizes, tiles_n),
        *x.stride(),
        *(strides(w, 0), strides(w, 1)),
        *(strides(b, 0), strides(b, 1)),
        *(strides(biases, 0), alike(scalings)),
        *(any(ranks), any(t is not None for t in biases)),
        *(K % config.block_k == 0, triton_dtype(x.dtype), len(w)),
        *(config.block_m, config.block_n, config.block_k),
        *(config.rank_tile(max(1, *ranks)), config.group_m),
    )
    return list(y)
