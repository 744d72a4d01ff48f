# SPDX-License-Identifier: Apache-2.0
"""dx = Σ_i (dy_i w_i + dropout_i'(ds_i a_i)): what several projections pass down to one x.

One accumulator and one write. The low-rank terms come first, each masked by the seed of its
projection, and then a main loop for each projection adds to the sum of all before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.configs import Config, cdiv
from fastlora_kernels.dropout import kept_scale, lowest_kept
from fastlora_kernels.joint import alike, check, filled, number_of, pointer_of, strides
from fastlora_kernels.launch import config_for_all, launch
from fastlora_kernels.persistent_sum import persistent_sum, suits_sum
from fastlora_kernels.product import add_product
from fastlora_kernels.tiles import add_low_rank, low_rank_tile, tile_of, triton_dtype, wrapped


@triton.jit(do_not_specialize=["keep_froms"])
def product_sum_kernel(
    dx_ptr,
    dy_ptrs,
    w_ptrs,
    ds_ptrs,
    a_ptrs,
    seed_ptrs,
    M,
    K,
    sizes,
    ranks,
    strides_dym,
    strides_dyn,
    strides_wn,
    strides_wk,
    strides_ar,
    strides_ak,
    scales,
    keep_froms,
    HAS_LOW_RANK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    EVEN_N: tl.constexpr,
    ACC: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # As in a product: BLOCK_N columns of the result, BLOCK_K of what is summed over.
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    pid_m, pid_k = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = wrapped(offs_m, M)
    columns = wrapped(offs_k, K)

    # Loops over the projections, so that one does not hold registers for the next.
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if HAS_LOW_RANK:
        for i in tl.range(0, COUNT, num_stages=1):
            # A projection without an adapter has rank 0 here.
            ds_ptr = pointer_of(i, ds_ptrs)
            a_ptr = pointer_of(i, a_ptrs)
            R = number_of(i, ranks, tl.int32)
            stride_ar = number_of(i, strides_ar, tl.int64)
            stride_ak = number_of(i, strides_ak, tl.int64)
            if HAS_DROPOUT:
                acc += low_rank_tile(
                    ds_ptr,
                    a_ptr,
                    pointer_of(i, seed_ptrs),
                    offs_m,
                    offs_k,
                    pid_k * BLOCK_N,
                    M,
                    K,
                    R,
                    stride_ak,
                    stride_ar,
                    number_of(i, scales, ACC),
                    number_of(i, keep_froms, tl.int32),
                    True,
                    dtype,
                    ACC,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_R,
                )
            else:
                acc = add_low_rank(
                    acc, ds_ptr, a_ptr, rows, columns, R, stride_ak, stride_ar, dtype, BLOCK_R
                )
    for i in tl.range(0, COUNT, num_stages=1):
        acc = add_product(
            acc,
            pointer_of(i, dy_ptrs),
            pointer_of(i, w_ptrs),
            rows,
            columns,
            number_of(i, sizes, tl.int32),
            number_of(i, strides_dym, tl.int64),
            number_of(i, strides_dyn, tl.int64),
            number_of(i, strides_wk, tl.int64),
            number_of(i, strides_wn, tl.int64),
            EVEN_N,
            BLOCK_K,
        )
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    tl.store(dx_ptr + rows[:, None] * K + offs_k[None, :], acc.to(dtype), mask=mask)


def product_sum(
    dy: Sequence[Tensor],
    w: Sequence[Tensor],
    ds: Sequence[Tensor | None],
    a: Sequence[Tensor | None],
    seeds: Sequence[Tensor | None],
    *,
    dropout_p: Sequence[float],
    config: Config | None = None,
) -> Tensor:
    """Return ``Σ_i (dy_i w_i + dropout_i'(ds_i a_i))`` [M, K] in the dtype of dy, contiguous.

    One to four ``dy`` [M, N_i], ``w`` [N_i, K] and ``a`` [R_i, K] of any strides; ``ds`` [M, R_i]
    contiguous. ds and a share a dtype, that of dy or float32, and are both None for a projection
    without an adapter. With a seed ([1], int64) a low-rank term is masked at (m, k) and scaled by
    1 / (1 - dropout_p). Raises ValueError, which names the list, for lists of other lengths.
    """
    check(dy=dy, w=w, ds=ds, a=a, seeds=seeds, dropout_p=dropout_p)
    M, K = dy[0].shape[0], w[0].shape[1]
    sizes, ranks = (tuple(0 if t is None else t.shape[i] for t in ts) for ts, i in ((w, 0), (a, 0)))
    dropout = any(seed is not None for seed in seeds)
    adapter = next((t.dtype for t in a if t is not None), dy[0].dtype)
    rest = dy, w, max(1, *ranks), adapter, dropout
    config = config or config_for_all("product_sum", *rest, even=K * dy[0].element_size() % 16 == 0)
    if config.tma:
        suited = suits_sum(dy, w)
        folds = not dropout and adapter == dy[0].dtype and sum(ranks) % 8 == 0
        if suited and folds:
            # All ds beside each other and all a below each other are one more product.
            if any(ranks):
                dy = *dy, torch.cat([t for t in ds if t is not None], 1)
                w = *w, torch.cat([t for t in a if t is not None])
            return persistent_sum(dy, w, None, config)
        portable = config_for_all("product_sum", *rest, even=False)
        if suited and dy[0].dtype == torch.bfloat16:
            # Masks and float32 terms would need a second tile beside the accumulator. Float16
            # might overflow where the sum of both does not.
            none = [t[:, :0] for t in dy], [t[:0] for t in w]
            low_rank = product_sum(*none, ds, a, seeds, dropout_p=dropout_p, config=portable)
            return persistent_sum(dy, w, low_rank, config)
        config = portable
    drop = [0.0 if seed is None else p for p, seed in zip(dropout_p, seeds, strict=True)]
    dx = dy[0].new_empty(M, K)
    launch(
        *(product_sum_kernel, (cdiv(M, config.block_m) * cdiv(K, config.block_n),), config),
        *(dx, tuple(dy), tuple(w), filled(ds), filled(a), filled(seeds)),
        *(M, K, sizes, ranks),
        *(strides(dy, 0), strides(dy, 1)),
        *(strides(w, 0), strides(w, 1)),
        *(strides(a, 0), strides(a, 1)),
        *(alike([*map(kept_scale, drop)]), alike([*map(lowest_kept, drop)])),
        *(any(ranks), dropout, all(n % config.block_k == 0 for n in sizes)),
        *(triton_dtype(dx.dtype), len(dy)),
        *(config.block_m, config.block_n, config.block_k),
        *(config.rank_tile(max(1, *ranks)), config.group_m),
    )
    return dx
