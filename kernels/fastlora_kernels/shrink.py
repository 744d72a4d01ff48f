# SPDX-License-Identifier: Apache-2.0
"""s_i = dropout_i(x) a_iᵀ for the adapters of one x: one read of x, dropout drawn in the kernel."""

from typing import Any

import triton
import triton.language as tl

from fastlora_kernels import lists
from fastlora_kernels.configs import Config, cdiv
from fastlora_kernels.dropout import keep_scales, keep_tile
from fastlora_kernels.launch import Launch, default_of, empty
from fastlora_kernels.locate import locate, number_of, pointer_of
from fastlora_kernels.outputs import scaled_before
from fastlora_kernels.segments import own_numbers, rows_of, stack_at
from fastlora_kernels.tiles import dot, triton_dtype, wrapped


@triton.jit(do_not_specialize=["keep_froms", "G"])
def shrink_kernel(
    x_ptr, a_ptrs, seed_ptrs, s_ptrs, scaled_ptrs, offsets_ptr, number_ptrs,
    M, K, ranks, tiles_r, G,
    stride_xm, stride_xk,
    strides_ag, strides_ar, strides_ak,
    scales, factor, keep_froms,
    TOGETHER: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_SCALED: tl.constexpr,
    EVEN_K: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Neighbours read the same rows of x.
    first_m, end, g = rows_of(tl.program_id(0) // tiles_r, M, offsets_ptr, G, BLOCK_M)
    if offsets_ptr is not None:
        if first_m >= end:
            return
        a_ptrs = stack_at(a_ptrs, g, strides_ag)
        keep_froms = own_numbers(keep_froms, number_ptrs, 2 * G + g, tl.int32)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    rows = wrapped(offs_m, M)
    mask_m = offs_m < end
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk
    step_x = tl.cast(BLOCK_K, tl.int64) * stride_xk

    offs_r = tl.arange(0, BLOCK_R)
    if not TOGETHER:
        # A rank tile of one projection; otherwise a sum for each, all from the same tile of x.
        of, tile_r = locate(tl.program_id(0) % tiles_r, ranks, BLOCK_R)
        offs_r += tile_r * BLOCK_R
        a_ptrs = (pointer_of(of, a_ptrs),)
        s_ptrs = (pointer_of(of, s_ptrs),)
        if HAS_SCALED:
            scaled_ptrs = (pointer_of(of, scaled_ptrs),)
        if HAS_DROPOUT:
            seed_ptrs = (pointer_of(of, seed_ptrs),)
        ranks = (number_of(of, ranks, tl.int32),)
        strides_ar = (number_of(of, strides_ar, tl.int64),)
        strides_ak = (number_of(of, strides_ak, tl.int64),)
        scales = (number_of(of, scales, ACC),)
        if offsets_ptr is not None:
            number_ptrs = (pointer_of(of, number_ptrs),)
        keep_froms = (number_of(of, keep_froms, tl.int32),)
    sums = ()
    a_tiles = ()
    steps_a = ()
    for i in tl.static_range(len(a_ptrs)):
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
        for i in tl.static_range(len(a_ptrs)):
            if EVEN_K:
                a = tl.load(a_tiles[i])
            else:
                a = tl.load(a_tiles[i], mask=mask_k[:, None], other=0.0)
            x_hat = x
            if seed_ptrs[i] is not None:
                keep = keep_tile(seed_ptrs[i], offs_m, k, K, keep_froms[i], BLOCK_K)
                x_hat = (x.to(ACC) * keep.to(ACC)).to(x.dtype)
            added = added + (dot(x_hat, a, sums[i]),)  # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_R]
            moved = moved + (a_tiles[i] + steps_a[i],)
        sums = added
        a_tiles = moved
        x_ptrs += step_x
    scales = own_numbers(scales, number_ptrs, G + g, ACC)
    for i in tl.static_range(len(s_ptrs)):
        mask = mask_m[:, None] & (offs_r < ranks[i])[None, :]
        s = sums[i] * tl.cast(scales[i], ACC)
        offs = rows[:, None] * ranks[i] + offs_r[None, :]
        tl.store(s_ptrs[i] + offs, s.to(s_ptrs[i].dtype.element_ty), mask=mask)
        if HAS_SCALED:
            s *= tl.cast(factor, ACC)
            tl.store(scaled_ptrs[i] + offs, s.to(x_ptr.dtype.element_ty), mask=mask)


def shrink(x, a, seeds, p, config: Config | None = None, *into: Any, segments=None):
    """Return s of one to four adapters in one launch, and what of it `outputs` may read scaled.

    The second, in the dtype of x and rounded once, is None unless the product ``into`` which it
    goes, as `scaled_before` takes it, needs it so. Up to a rank that a config has a tile for, a
    program multiplies each tile of x by all; above it neighbouring programs read the same rows.
    """
    factor = scaled_before(x, *into) if into else None
    (M, K), ranks, count = x.shape, lists.lengths(a, -2), len(a)
    offsets, numbers, G = lists.numbers_of(segments)
    dropout, room = any(seed is not None for seed in seeds), lists.stacked(ranks)
    config = config or default_of("shrink", (x,), a, room, a[0].dtype, dropout, count)()
    together = room <= config.block_r
    block_r = room // count if together else config.rank_tile(max(ranks))
    tiles_r = 1 if together else sum(cdiv(r, block_r) for r in ranks)
    scales, keep_froms = keep_scales(seeds, p)
    launch = Launch(
        *(shrink_kernel, (lists.count_of(M, G, config.block_m) * tiles_r,), config),
        *(M, K, ranks, tiles_r, G, *x.stride(), *lists.strides(a, 3)),
        # A factor that is not used would be one more argument: on sm_120 a program then spills.
        *(scales, factor, keep_froms),
        *(together, dropout, factor is not None, K % config.block_k == 0, triton_dtype(x.dtype)),
        *(config.block_m, config.block_k, block_r),
    )
    s = tuple(empty(a[0], M, r) for r in ranks)
    scaled = None if factor is None else tuple(empty(x, M, r) for r in ranks)
    launch(x, a, seeds if together else lists.filled(seeds), s, scaled, offsets, numbers)
    return s, scaled
