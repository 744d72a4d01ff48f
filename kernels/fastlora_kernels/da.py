# SPDX-License-Identifier: Apache-2.0
"""da_i = ds_iᵀ dropout_i(x) for the adapters of one x, in one pass over x.

As in `ds_db.py` a program owns a column tile and a share of the rows, partial sums are float32 and
a second kernel adds them in a fixed order.
"""

import torch
import triton
import triton.language as tl

from fastlora_kernels import lists
from fastlora_kernels.configs import Chip, Config, cdiv
from fastlora_kernels.dropout import keep_scales, keep_tile
from fastlora_kernels.ds_db import split
from fastlora_kernels.launch import Launch, default_of, empty
from fastlora_kernels.locate import locate, number_of, pointer_of
from fastlora_kernels.segments import own_numbers, rows_of
from fastlora_kernels.sums import KEPT_SCALE, add_up
from fastlora_kernels.tiles import dot, triton_dtype


@triton.jit(do_not_specialize=["tiles_r", "steps", "keep_froms", "G"])
def da_kernel(
    x_ptr, ds_ptrs, seed_ptrs, part_ptrs, offsets_ptr, number_ptrs,
    M, K, ranks, tiles_r, steps, G,
    stride_xm, stride_xk,
    keep_froms,
    TOGETHER: tl.constexpr, HAS_DROPOUT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Neighbours read the same elements of x.
    first_k = tl.program_id(0) // tiles_r * BLOCK_K
    split = tl.program_id(1)
    first_row = split * steps * BLOCK_M
    last = M
    if offsets_ptr is not None:
        first_row, last, g = rows_of(split, M, offsets_ptr, G, steps * BLOCK_M)
        if first_row >= last:
            return
        keep_froms = own_numbers(keep_froms, number_ptrs, 2 * G + g, tl.int32)
        if HAS_DROPOUT:  # a register less, which sm_120 would spill
            last = min(first_row + steps * BLOCK_M, last)
    end = min(first_row + steps * BLOCK_M, last)
    offs_k = first_k + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    columns = offs_k.to(tl.int64)

    offs_r = tl.arange(0, BLOCK_R)
    if not TOGETHER:
        # A rank tile of one projection; otherwise a sum for each, all from the same tile of x.
        of, tile_r = locate(tl.program_id(0) % tiles_r, ranks, BLOCK_R)
        offs_r += tile_r * BLOCK_R
        ds_ptrs = (pointer_of(of, ds_ptrs),)
        part_ptrs = (pointer_of(of, part_ptrs),)
        if HAS_DROPOUT:
            seed_ptrs = (pointer_of(of, seed_ptrs),)
        ranks = (number_of(of, ranks, tl.int32),)
        keep_froms = (number_of(of, keep_froms, tl.int32),)
    offs_r = offs_r.to(tl.int64)
    sums = ()
    for _ in tl.static_range(len(ds_ptrs)):
        sums = sums + (tl.zeros((BLOCK_K, BLOCK_R), dtype=ACC),)
    for m in range(first_row, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        rows = offs_m.to(tl.int64)
        mask_m = offs_m < last
        # Loaded the other way round: through tl.trans it would lose its cp.async pipeline.
        x_ptrs = x_ptr + columns[:, None] * stride_xk + rows[None, :] * stride_xm
        x = tl.load(x_ptrs, mask=mask_k[:, None] & mask_m[None, :], other=0.0)
        added = ()
        for i in tl.static_range(len(ds_ptrs)):
            mask = mask_m[:, None] & (offs_r < ranks[i])[None, :]
            offs = rows[:, None] * ranks[i] + offs_r[None, :]
            ds = tl.load(ds_ptrs[i] + offs, mask=mask, other=0.0)
            x_hat = x
            if seed_ptrs[i] is not None:
                keep = keep_tile(seed_ptrs[i], offs_m, first_k, K, keep_froms[i], BLOCK_K)
                x_hat = (x.to(ACC) * tl.trans(keep).to(ACC)).to(x.dtype)
            added = added + (dot(x_hat, ds, sums[i]),)  # [BLOCK_K, BLOCK_M] @ [BLOCK_M, BLOCK_R]
        sums = added
    for i in tl.static_range(len(ds_ptrs)):
        # Partial sums are [R, K] for each split.
        part_ptr = part_ptrs[i] + split.to(tl.int64) * K * ranks[i]
        mask = mask_k[:, None] & (offs_r < ranks[i])[None, :]
        tl.store(part_ptr + (columns[:, None] + offs_r[None, :] * K), sums[i], mask=mask)


def da(x, ds, seeds, p, config: Config | None = None, segments=None):
    """Return da of one to four adapters in one pass over x: `steps.da` says what that is."""
    (M, K), ranks, count = x.shape, lists.lengths(ds, 1), len(ds)
    offsets, numbers, G = lists.numbers_of(segments)
    dropout, room = any(seed is not None for seed in seeds), lists.stacked(ranks)
    config = config or default_of("da", (x,), (x,), room, ds[0].dtype, dropout, count)()
    together = count > 1 and room <= config.block_r
    block_r = room // count if together else config.rank_tile(max(ranks))
    tiles_r = 1 if together else sum(cdiv(r, block_r) for r in ranks)
    splits, steps = split(M, K, config, Chip.of(x.device).processors, tiles_r, G)
    acc = torch.promote_types(x.dtype, torch.float32)
    scales, keep_froms = keep_scales(seeds, p)
    launch = Launch(
        *(da_kernel, (cdiv(K, config.block_n) * tiles_r, splits), config),
        *(M, K, ranks, tiles_r, steps, G, *x.stride(), keep_froms),
        *(together, dropout, triton_dtype(x.dtype), config.block_m, config.block_n, block_r),
    )
    parts = tuple(empty(x, splits, r, K, dtype=acc) for r in ranks)
    launch(x, ds, seeds if together else lists.filled(seeds), parts, offsets, numbers)
    found = tuple(empty(ds[0], *(G,)[:G], r, K) for r in ranks)
    of_parts = (offsets, numbers, [steps * config.block_m] * count, KEPT_SCALE) if G else ()
    add_up(parts, found, scales, *of_parts)
    return found
