# SPDX-License-Identifier: Apache-2.0
"""da_i = ds_iᵀ dropout_i(x) for several adapters of one x, in one pass over x.

As in `columns.py` a program owns a column tile and a share of the rows, partial sums are float32
and a second kernel adds them in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.columns import SUM_BLOCK, SUM_CONFIG, add_up, split
from fastlora_kernels.configs import Config, cdiv
from fastlora_kernels.dropout import keep_tile, kept_scale, lowest_kept
from fastlora_kernels.joint import alike, check, filled, locate, number_of, pointer_of, stacked
from fastlora_kernels.launch import chip_of, config_for_all, launch
from fastlora_kernels.tiles import dot, sum_dtype, triton_dtype


@triton.jit(do_not_specialize=["steps", "keep_froms"])
def da_all_kernel(
    x_ptr,
    ds_ptrs,
    seed_ptrs,
    part_ptrs,
    M,
    K,
    ranks,
    tiles_r,
    steps,
    stride_xm,
    stride_xk,
    keep_froms,
    TOGETHER: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # Neighbours read the same elements of x.
    first_k = tl.program_id(0) // tiles_r * BLOCK_C
    split = tl.program_id(1)
    first_row = split * steps * BLOCK_M
    end = min(first_row + steps * BLOCK_M, M)
    offs_k = first_k + tl.arange(0, BLOCK_C)
    mask_k = offs_k < K
    columns = offs_k.to(tl.int64)

    if TOGETHER:
        # A sum for each projection, all from the same tile of x.
        offs_r = tl.arange(0, BLOCK_R)
        sums = ()
        for _ in tl.static_range(COUNT):
            sums = sums + (tl.zeros((BLOCK_C, BLOCK_R), dtype=ACC),)
        for m in range(first_row, end, BLOCK_M):
            offs_m = m + tl.arange(0, BLOCK_M)
            x = _turned(x_ptr, offs_m, columns, stride_xm, stride_xk, M, mask_k)
            added = ()
            for i in tl.static_range(COUNT):
                part = _add(
                    sums[i],
                    x,
                    ds_ptrs[i],
                    seed_ptrs[i],
                    offs_m,
                    offs_r,
                    first_k,
                    M,
                    K,
                    ranks[i],
                    keep_froms[i],
                    ACC,
                    BLOCK_C,
                )
                added = added + (part,)
            sums = added
        for i in tl.static_range(COUNT):
            _store(part_ptrs[i], sums[i], split, columns, offs_r, K, ranks[i], mask_k)
    else:
        # A rank tile of one projection.
        i, tile_r = locate(tl.program_id(0) % tiles_r, ranks, BLOCK_R)
        R = number_of(i, ranks, tl.int32)
        ds_ptr = pointer_of(i, ds_ptrs)
        seed_ptr = None
        if HAS_DROPOUT:
            seed_ptr = pointer_of(i, seed_ptrs)
        keep_from = number_of(i, keep_froms, tl.int32)
        offs_r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=ACC)
        for m in range(first_row, end, BLOCK_M):
            offs_m = m + tl.arange(0, BLOCK_M)
            x = _turned(x_ptr, offs_m, columns, stride_xm, stride_xk, M, mask_k)
            acc = _add(
                acc,
                x,
                ds_ptr,
                seed_ptr,
                offs_m,
                offs_r,
                first_k,
                M,
                K,
                R,
                keep_from,
                ACC,
                BLOCK_C,
            )
        _store(pointer_of(i, part_ptrs), acc, split, columns, offs_r, K, R, mask_k)


@triton.jit
def _turned(x_ptr, offs_m, columns, stride_xm, stride_xk, M, mask_k):
    """Return the tile [BLOCK_C, BLOCK_M] of xᵀ, loaded the other way round."""
    # Through tl.trans it would lose its cp.async pipeline.
    x_ptrs = x_ptr + columns[:, None] * stride_xk + offs_m.to(tl.int64)[None, :] * stride_xm
    return tl.load(x_ptrs, mask=mask_k[:, None] & (offs_m < M)[None, :], other=0.0)


@triton.jit
def _add(
    acc,
    x,
    ds_ptr,
    seed_ptr,
    offs_m,
    offs_r,
    first_k,
    M,
    K,
    R,
    keep_from,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return acc + dropout(x)ᵀ ds for a tile of xᵀ."""
    rows = offs_m.to(tl.int64)
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    ds = tl.load(ds_ptr + rows[:, None] * R + offs_r[None, :], mask=mask, other=0.0)
    if seed_ptr is not None:
        keep = keep_tile(seed_ptr, offs_m, first_k, K, keep_from, BLOCK_C)
        x = (x.to(ACC) * tl.trans(keep).to(ACC)).to(x.dtype)
    return dot(x, ds, acc)  # [BLOCK_C, BLOCK_M] @ [BLOCK_M, BLOCK_R]


@triton.jit
def _store(part_ptr, acc, split, columns, offs_r, K, R, mask_k):
    """Store a tile of partial sums, [R, K] for each split."""
    tile = part_ptr + split.to(tl.int64) * K * R + columns[:, None]
    mask = mask_k[:, None] & (offs_r < R)[None, :]
    tl.store(tile + offs_r.to(tl.int64)[None, :] * K, acc, mask=mask)


@triton.jit(do_not_specialize=["parts"])
def sum_all_kernel(
    part_ptrs,
    out_ptrs,
    sizes,
    parts,
    scales,
    ACC: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i, block = locate(tl.program_id(0), sizes, BLOCK)
    add_up(
        pointer_of(i, part_ptrs),
        pointer_of(i, out_ptrs),
        block,
        tl.cast(number_of(i, sizes, tl.int64), tl.int64),
        tl.cast(parts, tl.int32),
        number_of(i, scales, ACC),
        ACC,
        BLOCK,
    )


def da_all(
    x: Tensor,
    ds: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    *,
    dropout_p: Sequence[float],
    config: Config | None = None,
) -> list[Tensor]:
    """Return ``ds_iᵀ dropout_i(x)`` [R_i, K] in the dtype of ds; one pass over ``x`` [M, K].

    x of any strides, one to four ``ds`` [M, R_i] contiguous, of one dtype: that of x, or float32.
    Dropout acts where there is a seed ([1], int64), by the mask of that seed. Two runs give the
    same bits. Raises ValueError, which names the list, for lists of other lengths.
    """
    check(ds=ds, seeds=seeds, dropout_p=dropout_p)
    (M, K), ranks = x.shape, tuple(t.shape[1] for t in ds)
    dropout, room = any(seed is not None for seed in seeds), stacked(ranks)
    config = config or config_for_all("da_all", (x,), (x,), room, ds[0].dtype, dropout)
    together = room <= config.block_r
    block_r = room // len(ds) if together else config.rank_tile(max(ranks))
    tiles_r = 1 if together else sum(cdiv(r, block_r) for r in ranks)
    splits, steps = split(M, K, 1, config, chip_of(x.device).processors, tiles_r)
    acc = {"dtype": sum_dtype(x.dtype), "device": x.device}
    parts = tuple(torch.empty(splits, r, K, **acc) for r in ranks)
    drop = [0.0 if seed is None else p for p, seed in zip(dropout_p, seeds, strict=True)]
    launch(
        *(da_all_kernel, (cdiv(K, config.block_n) * tiles_r, splits), config),
        *(x, tuple(ds), tuple(seeds) if together else filled(seeds), parts),
        *(M, K, ranks, tiles_r, steps),
        *x.stride(),
        tuple(map(lowest_kept, drop)),
        *(together, dropout, triton_dtype(x.dtype), len(ds)),
        *(config.block_m, config.block_n, block_r),
    )
    da = tuple(t.new_empty(r, K) for t, r in zip(ds, ranks, strict=True))
    sizes = tuple(t.numel() for t in da)
    launch(
        *(sum_all_kernel, (sum(cdiv(size, SUM_BLOCK) for size in sizes),), SUM_CONFIG),
        *(parts, da, sizes, splits, alike(tuple(map(kept_scale, drop)))),
        *(triton_dtype(x.dtype), len(da), SUM_BLOCK),
    )
    return list(da)
