# SPDX-License-Identifier: Apache-2.0
"""s_i = dropout_i(x) a_iᵀ for several adapters of one x, in one read of x."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.configs import Config, cdiv
from fastlora_kernels.dropout import keep_tile, kept_scale, lowest_kept
from fastlora_kernels.joint import (
    check,
    filled,
    locate,
    number_of,
    pointer_of,
    stacked,
    strides,
)
from fastlora_kernels.launch import config_for_all, launch
from fastlora_kernels.tiles import dot, triton_dtype, wrapped


@triton.jit(do_not_specialize=["keep_froms"])
def shrink_all_kernel(
    x_ptr,
    a_ptrs,
    seed_ptrs,
    s_ptrs,
    scaled_ptrs,
    M,
    K,
    ranks,
    tiles_r,
    stride_xm,
    stride_xk,
    strides_ar,
    strides_ak,
    scales,
    factor,
    keep_froms,
    TOGETHER: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_SCALED: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACC: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # Neighbours read the same rows of x.
    offs_m = tl.program_id(0) // tiles_r * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    rows = wrapped(offs_m, M)
    mask_m = offs_m < M
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk
    step_x = tl.cast(BLOCK_K, tl.int64) * stride_xk

    if TOGETHER:
        # A sum for each projection, all from the same tile of x.
        offs_r = tl.arange(0, BLOCK_R)
        sums = ()
        a_tiles = ()
        steps_a = ()
        for i in tl.static_range(COUNT):
            stride_ak = number_of(i, strides_ak, tl.int64)
            columns = wrapped(offs_r, ranks[i])[None, :] * number_of(i, strides_ar, tl.int64)
            a_tiles = a_tiles + (a_ptrs[i] + columns + offs_k.to(tl.int64)[:, None] * stride_ak,)
            steps_a = steps_a + (tl.cast(BLOCK_K, tl.int64) * stride_ak,)
            sums = sums + (tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC),)
        for k in range(0, K, BLOCK_K):
            mask_k = offs_k < K - k
            if EVEN_K:
                x = tl.load(x_ptrs)
            else:
                x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            added = ()
            moved = ()
            for i in tl.static_range(COUNT):
                if EVEN_K:
                    a = tl.load(a_tiles[i])
                else:
                    a = tl.load(a_tiles[i], mask=mask_k[:, None], other=0.0)
                x_hat = _dropped(x, seed_ptrs[i], offs_m, k, K, keep_froms[i], ACC, BLOCK_K)
                # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_R]
                added = added + (dot(x_hat, a, sums[i]),)
                moved = moved + (a_tiles[i] + steps_a[i],)
            sums = added
            a_tiles = moved
            x_ptrs += step_x
        for i in tl.static_range(COUNT):
            mask = mask_m[:, None] & (offs_r < ranks[i])[None, :]
            s = sums[i] * tl.cast(scales[i], ACC)
            offs = rows[:, None] * ranks[i] + offs_r[None, :]
            tl.store(s_ptrs[i] + offs, s.to(s_ptrs[i].dtype.element_ty), mask=mask)
            if HAS_SCALED:
                s *= tl.cast(factor, ACC)
                tl.store(scaled_ptrs[i] + offs, s.to(x_ptr.dtype.element_ty), mask=mask)
    else:
        # A rank tile of one projection.
        i, tile_r = locate(tl.program_id(0) % tiles_r, ranks, BLOCK_R)
        R = number_of(i, ranks, tl.int32)
        stride_ak = number_of(i, strides_ak, tl.int64)
        offs_r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
        columns = wrapped(offs_r, R)[None, :] * number_of(i, strides_ar, tl.int64)
        a_tile = pointer_of(i, a_ptrs) + columns + offs_k.to(tl.int64)[:, None] * stride_ak
        step_a = tl.cast(BLOCK_K, tl.int64) * stride_ak
        seed_ptr = None
        if HAS_DROPOUT:
            seed_ptr = pointer_of(i, seed_ptrs)
        keep_from = number_of(i, keep_froms, tl.int32)
        acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
        for k in range(0, K, BLOCK_K):
            if EVEN_K:
                x = tl.load(x_ptrs)
                a = tl.load(a_tile)
            else:
                mask_k = offs_k < K - k
                x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
                a = tl.load(a_tile, mask=mask_k[:, None], other=0.0)
            x = _dropped(x, seed_ptr, offs_m, k, K, keep_from, ACC, BLOCK_K)
            acc = dot(x, a, acc)  # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_R]
            x_ptrs += step_x
            a_tile += step_a
        acc *= tl.cast(number_of(i, scales, ACC), ACC)
        mask = mask_m[:, None] & (offs_r < R)[None, :]
        offs = rows[:, None] * R + offs_r[None, :]
        tl.store(pointer_of(i, s_ptrs) + offs, acc.to(s_ptrs[0].dtype.element_ty), mask=mask)
        if HAS_SCALED:
            acc *= tl.cast(factor, ACC)
            scaled_tile = pointer_of(i, scaled_ptrs) + offs
            tl.store(scaled_tile, acc.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dropped(x, seed_ptr, offs_m, k, K, keep_from, ACC: tl.constexpr, BLOCK_K: tl.constexpr):
    if seed_ptr is not None:
        keep = keep_tile(seed_ptr, offs_m, k, K, keep_from, BLOCK_K)
        x = (x.to(ACC) * keep.to(ACC)).to(x.dtype)
    return x


def shrink_all(
    x: Tensor,
    a: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    *,
    dropout_p: Sequence[float],
    scaled: Sequence[Tensor] | None = None,
    factor: float = 1.0,
    config: Config | None = None,
) -> list[Tensor]:
    """Return ``dropout_i(x) a_iᵀ`` [M, R_i] in the dtype of a, contiguous, in one launch.

    ``x`` [M, K] and one to four ``a`` [R_i, K], of one dtype: that of x, or float32; any strides.
    Dropout acts where there is a seed ([1], int64), by the mask of that seed. ``scaled`` ([M, R_i]
    in the dtype of x, contiguous) are filled with ``factor`` times the results, rounded once. Up to
    a rank that a config has a tile for, a program multiplies each tile of x by all; above it
    neighbouring programs read the same rows. Raises ValueError, which names the list, for lists of
    other lengths.
    """
    check(a=a, seeds=seeds, dropout_p=dropout_p, scaled=a if scaled is None else scaled)
    (M, K), ranks = x.shape, tuple(t.shape[0] for t in a)
    dropout, room = any(seed is not None for seed in seeds), stacked(ranks)
    config = config or config_for_all("shrink_all", (x,), a, room, a[0].dtype, dropout)
    together = room <= config.block_r
    block_r = room // len(a) if together else config.rank_tile(max(ranks))
    tiles_r = 1 if together else sum(cdiv(r, block_r) for r in ranks)
    drop = [0.0 if seed is None else p for p, seed in zip(dropout_p, seeds, strict=True)]
    scales, keep_froms = tuple(map(kept_scale, drop)), tuple(map(lowest_kept, drop))
    s = tuple(t.new_empty(M, r) for t, r in zip(a, ranks, strict=True))
    launch(
        *(shrink_all_kernel, (cdiv(M, config.block_m) * tiles_r,), config),
        *(x, tuple(a), tuple(seeds) if together else filled(seeds), s),
        None if scaled is None else tuple(scaled),
        *(M, K, ranks, tiles_r),
        *x.stride(),
        *(strides(a, 0), strides(a, 1)),
        # Where it is not used: one more argument, and on sm_120 a program spills.
        *(scales, None if scaled is None else factor, keep_froms),
        *(together, dropout, scaled is not None, K % config.block_k == 0, triton_dtype(x.dtype)),
        *(len(a), config.block_m, config.block_k, block_r),
    )
    return list(s)
