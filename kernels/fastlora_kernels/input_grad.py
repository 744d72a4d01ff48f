# SPDX-License-Identifier: Apache-2.0
"""dx = Σ_i (dy_i w_i + dropout_i'(ds_i a_i)): what the projections of one x pass down to it.

One accumulator and one write. In the portable kernel the low-rank terms come first, each masked by
the seed of its projection, and then a main loop for each. On sm_90 and later one pipelined loop
goes from the columns of one dy on to those of the next; the low-rank terms are a "fold", one more
dy and w. Where dropout or float32 factors forbid that, the term of a single projection comes
"first", and those of several are a "rest", made by an earlier launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels import lists
from fastlora_kernels.configs import Chip, Config, cdiv
from fastlora_kernels.dropout import keep_scales, keep_tile
from fastlora_kernels.launch import Launch, default_of, empty, noted
from fastlora_kernels.locate import number_of, pointer_of
from fastlora_kernels.outputs import read_strides, readable, runnable
from fastlora_kernels.segments import own_numbers, row_tiles, rows_of, stack_at
from fastlora_kernels.tiles import (
    add_low_rank,
    add_product,
    descriptor,
    load_tile,
    store_tile,
    tile_of,
    triton_dtype,
    wrapped,
)


@triton.jit(do_not_specialize=["keep_froms", "G"])
def input_grad_kernel(
    dx_ptr, dy_ptrs, w_ptrs, ds_ptrs, a_ptrs, seed_ptrs, offsets_ptr, number_ptrs,
    M, K, sizes, ranks, G,
    strides_dym, strides_dyn,
    strides_wg, strides_wn, strides_wk,
    strides_ag, strides_ar, strides_ak,
    scales, keep_froms,
    HAS_LOW_RANK: tl.constexpr, HAS_DROPOUT: tl.constexpr, EVEN_N: tl.constexpr, ACC: tl.constexpr,
    COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # As in a product: BLOCK_N columns of the result, BLOCK_K of what is summed over.
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    tiles_m = row_tiles(M, offsets_ptr, G, BLOCK_M)
    pid_m, pid_k = tile_of(tl.program_id(0), tiles_m, tl.cdiv(K, BLOCK_N), GROUP_M)
    first_m, end, g = rows_of(pid_m, M, offsets_ptr, G, BLOCK_M)
    if offsets_ptr is not None:
        if first_m >= end:
            return
        w_ptrs = stack_at(w_ptrs, g, strides_wg)
        if HAS_LOW_RANK:
            a_ptrs = stack_at(a_ptrs, g, strides_ag)
            scales = own_numbers(scales, number_ptrs, G + g, ACC)
            keep_froms = own_numbers(keep_froms, number_ptrs, 2 * G + g, tl.int32)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = wrapped(offs_m, M)
    columns = wrapped(offs_k, K)

    # Loops over the projections, so that one does not hold registers for the next.
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if HAS_LOW_RANK:
        for i in tl.range(0, COUNT, num_stages=1):
            of_a = ranks, strides_ak, strides_ar
            part = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC) if HAS_DROPOUT else acc
            part = add_low_rank(part, i, ds_ptrs, a_ptrs, rows, columns, *of_a, dtype, BLOCK_R)
            if HAS_DROPOUT:
                part *= tl.cast(number_of(i, scales, ACC), ACC)
                keep_from = number_of(i, keep_froms, tl.int32)
                first_k = pid_k * BLOCK_N
                seed_ptr = pointer_of(i, seed_ptrs)
                part *= keep_tile(seed_ptr, offs_m, first_k, K, keep_from, BLOCK_N).to(ACC)
                if COUNT > 1:
                    part += acc
            acc = part
    for i in tl.range(0, COUNT, num_stages=1):
        dy_ptr = pointer_of(i, dy_ptrs)
        w_ptr = pointer_of(i, w_ptrs)
        N = number_of(i, sizes, tl.int32)
        of_dy = number_of(i, strides_dym, tl.int64), number_of(i, strides_dyn, tl.int64)
        of_w = number_of(i, strides_wk, tl.int64), number_of(i, strides_wn, tl.int64)
        acc = add_product(acc, dy_ptr, w_ptr, rows, columns, N, *of_dy, *of_w, EVEN_N, BLOCK_K)
    mask = (offs_m < end)[:, None] & (offs_k < K)[None, :]
    tl.store(dx_ptr + rows[:, None] * K + offs_k[None, :], acc.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["keep_from", "G"])
def persistent_input_grad_kernel(
    dx_ptr, rest_ptr, dy_ptrs, w_ptrs, ds_ptr, a_ptr, seed_ptr, offsets_ptr, number_ptrs,
    M, K, sizes, R, G,
    strides_dy, strides_wg, strides_w,
    stride_ag, stride_ar, stride_ak,
    scale, keep_from,
    LOW_RANK: tl.constexpr, W_BY_ROWS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    # As in a product: BLOCK_N columns of the result, BLOCK_K of what is summed over.
    dys = ()
    ws = ()
    ends = ()
    end = 0
    for i in tl.static_range(len(sizes)):
        N = sizes[i]
        dys = dys + (descriptor(dy_ptrs[i], M, N, strides_dy[i], True, BLOCK_M, BLOCK_K),)
        of_w = w_ptrs[i], N, K, strides_w[i]
        ws = ws + (descriptor(*of_w, W_BY_ROWS, BLOCK_K, BLOCK_N, G, strides_wg[i]),)
        end += tl.cdiv(N, BLOCK_K)
        ends = ends + (end,)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    dx = dx_ptr
    if offsets_ptr is None:
        dx = descriptor(dx_ptr, M, K, K, True, BLOCK_M, BLOCK_N // HALVES)
    rest_desc = None
    if LOW_RANK == "rest":
        rest_desc = descriptor(rest_ptr, M, K, K, True, BLOCK_M, BLOCK_N // HALVES)

    tiles_m = row_tiles(M, offsets_ptr, G, BLOCK_M)
    tiles_k = tl.cdiv(K, BLOCK_N)
    # A tile of the rest takes the place in shared memory where the loads of the next tile go.
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_k, tl.num_programs(0), flatten=LOW_RANK == "fold"
    ):
        pid_m, pid_k = tile_of(tile, tiles_m, tiles_k, GROUP_M)
        first_m, last_m, g = rows_of(pid_m, M, offsets_ptr, G, BLOCK_M)
        first_k = pid_k * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        steps, rank = end, R
        if offsets_ptr is not None:
            # An empty tile has no steps: a loop over tiles cannot return.
            steps = tl.where(first_m < last_m, end, 0)
            rank = tl.where(first_m < last_m, R, 0)
        if LOW_RANK == "first":
            offs_m = first_m + tl.arange(0, BLOCK_M)
            rows = wrapped(offs_m, M)
            columns = wrapped(first_k + tl.arange(0, BLOCK_N), K)
            own_a, of_a = stack_at((a_ptr,), g, (stride_ag,)), ((rank,), (stride_ak,), (stride_ar,))
            acc = add_low_rank(acc, 0, (ds_ptr,), own_a, rows, columns, *of_a, dtype, BLOCK_R)
            if HAS_DROPOUT:
                acc *= tl.cast(own_numbers((scale,), number_ptrs, G + g, tl.float32)[0], tl.float32)
                least = own_numbers((keep_from,), number_ptrs, 2 * G + g, tl.int32)[0]
                keep = keep_tile(seed_ptr, offs_m, first_k, K, least, BLOCK_N)
                acc *= keep.to(tl.float32)
        for step in range(steps):
            # The descriptors are chosen and the load is shared: a load in a branch has no pipeline.
            dy_from, w_from, n = dys[0], ws[0], step * BLOCK_K
            for i in tl.static_range(1, len(sizes)):
                if step >= ends[i - 1]:
                    dy_from, w_from, n = dys[i], ws[i], (step - ends[i - 1]) * BLOCK_K
            dy = dy_from.load([first_m, n])
            w = load_tile(w_from, g, n, first_k, W_BY_ROWS)
            acc = tl.dot(dy, w, acc)  # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N]
        bounds = None if offsets_ptr is None else (last_m, K)
        store_tile(dx, rest_desc, first_m, first_k, acc, dtype, HALVES, bounds)


def input_grad(dy, w, ds, a, seeds, p, config: Config | None = None, segments=None):
    """Return dx of one to four projections, in one launch: `steps.input_grad` says what that is.

    ds and a are of one dtype and both None for a projection without an adapter.
    """
    K, several, ranks, whole = w[0].shape[-1], len(w) > 1, lists.lengths(a, -2), segments is None
    there, bf16 = [t for t in a if t is not None], dy[0].dtype == torch.bfloat16
    dropout = any(seed is not None for seed in seeds)
    adapter = there[0].dtype if there else dy[0].dtype
    asked = dy, w, max(1, *ranks), adapter, dropout, len(w), (len(dy[0]), (K,))
    default = default_of("input_grad", *asked)
    even, by_rows = K * dy[0].element_size() % 16 == 0, w[0].stride(-1) == 1
    # The ds and a are one more dy and w, of stacks a stack; of several they are copied into one.
    folds = not dropout and adapter == dy[0].dtype and sum(ranks) % 8 == 0
    folds = folds and (whole or w[0].dim() > 2)
    folds = folds and (not there or (by_rows and (several or readable(there[0]))))
    suited = even and all(map(readable, dy)) and all(readable(t, by_rows) for t in w)
    # Masks and float32 terms of several would need a second tile beside the accumulator, and come
    # from a launch before. Float16 might overflow where the sum of both does not.
    suited = suited and (folds or bf16 or not several)
    config = runnable(config, default, even and whole, suited, folds or several)
    if not config.tma:
        return _portable(dy, w, ds, a, seeds, p, config, segments)
    low_rank = "rest" if several and not folds else "fold"
    if there and not several:
        low_rank = config.low_rank if folds else "first"
    return _persistent(dy, w, ds, a, seeds, p, config, segments, low_rank, default(even=False))


def _portable(dy, w, ds, a, seeds, p, config: Config, segments):
    (M, _), K = dy[0].shape, w[0].shape[-1]
    sizes, ranks = lists.lengths(dy, 1), lists.lengths(a, -2)
    offsets, numbers, G = lists.numbers_of(segments)
    scales, keep_froms = map(lists.alike, keep_scales(seeds, p))
    tiles = lists.count_of(M, G, config.block_m) * cdiv(K, config.block_n)
    launch = Launch(
        *(input_grad_kernel, (tiles,), config),
        *(M, K, sizes, ranks, G, *lists.strides(dy), *lists.strides(w, 3), *lists.strides(a, 3)),
        *(scales, keep_froms),
        *(any(ranks), any(seed is not None for seed in seeds)),
        *(all(n % config.block_k == 0 for n in sizes), triton_dtype(dy[0].dtype), len(dy)),
        *(config.block_m, config.block_n, config.block_k),
        *(config.rank_tile(max(1, *ranks)), config.group_m),
    )
    dx = empty(dy[0], M, K)
    launch(dx, dy, w, lists.filled(ds), lists.filled(a), lists.filled(seeds), offsets, numbers)
    return dx


def _persistent(
    dy, w, ds, a, seeds, p, config: Config, segments, low_rank: str, portable: Config
):  # fmt: skip
    (M, _), K, by_rows = dy[0].shape, w[0].shape[-1], w[0].stride(-1) == 1
    offsets, numbers, G = lists.numbers_of(segments)
    adapted, first = [i for i, t in enumerate(a) if t is not None], low_rank == "first"
    dys, ws, rest = dy, w, None
    if low_rank == "fold" and adapted:  # one more dy and w: all ds side by side, all a stacked
        beside, below = tuple(ds[i] for i in adapted), tuple(a[i] for i in adapted)
        several = len(w) > 1
        dys = *dy, noted(torch.cat, beside, 1) if several else beside[0]
        ws = *w, noted(torch.cat, below, -2) if several else below[0]
    elif low_rank == "rest":
        none = tuple(noted(Tensor.narrow, t, 1, 0, 0) for t in dy)
        nothing = tuple(noted(Tensor.narrow, t, -2, 0, 0) for t in w)
        rest = input_grad(none, nothing, ds, a, seeds, p, portable, segments)
    scales, keep_froms = keep_scales(seeds, p)
    R, strides_a = (a[0].shape[-2], (0, *a[0].stride())[-3:]) if first else (0, (0, 0, 0))
    tiles = lists.count_of(M, G, config.block_m) * cdiv(K, config.block_n)
    launch = Launch(
        *(persistent_input_grad_kernel, (min(tiles, Chip.of(w[0].device).processors),), config),
        *(M, K, lists.lengths(dys, 1), R, G),
        *(tuple(t.stride(0) for t in dys), *read_strides(ws, by_rows)),
        *(*strides_a, scales[0], keep_froms[0]),
        *(low_rank, by_rows, first and seeds[0] is not None),
        *(config.block_m, config.block_n, config.block_k, min(config.rank_tile(max(1, R)), 32)),
        *(config.group_m, 2 if config.block_n > 128 else 1),
    )
    dx, factors = empty(dy[0], M, K), (ds[0], a[0], seeds[0]) if first else (None, None, None)
    launch(dx, rest, dys, ws, *factors, offsets, numbers)
    return dx
