# SPDX-License-Identifier: Apache-2.0
"""One pass over a tall tensor t [M, C]: tᵀ s by column tiles, t b by row tiles.

ds and db come from one pass over dy (t = dy: dy b and dyᵀ s); da from one pass over x with
dropout drawn again (t = x: x̂ᵀ ds). Programs write partial sums in float32 and a second kernel
adds them in a fixed order, so results do not vary from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.configs import ON_THE_WAY_RANK, Config, cdiv
from fastlora_kernels.dropout import keep_tile, kept_scale, lowest_kept
from fastlora_kernels.launch import chip_of, config_for, launch
from fastlora_kernels.tiles import dot, let_next_start, sum_dtype, triton_dtype, wait_for_last

# Programs wanted for each processor, by splitting the rows.
PROGRAMS = 2
SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["steps", "keep_from"])
def columns_kernel(
    t_ptr,
    s_ptr,
    b_ptr,
    seed_ptr,
    outer_ptr,
    inner_ptr,
    M,
    C,
    R,
    steps,
    stride_tm,
    stride_tc,
    stride_br,
    stride_bc,
    stride_or,
    stride_oc,
    keep_from,
    TRIGGER: tl.constexpr,
    NEED_OUTER: tl.constexpr,
    NEED_INNER: tl.constexpr,
    ON_THE_WAY: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    if TRIGGER:
        let_next_start()
    # Programs that read the same elements are neighbours: rank tiles first, then tiles of a split.
    tiles_r = tl.cdiv(R, BLOCK_R)
    tiles_c = tl.cdiv(C, BLOCK_C)
    tile = tl.program_id(0) // tiles_r
    split = tl.program_id(1)
    offs_r = tl.program_id(0) % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    ranks = offs_r.to(tl.int64)
    first_row = split * steps * BLOCK_M

    if NEED_OUTER and (not NEED_INNER or ON_THE_WAY or tile < tiles_c):
        # tᵀ s of a column tile, over the rows of the split.
        offs_c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        columns = offs_c.to(tl.int64)
        mask_cr = mask_c[:, None] & mask_r[None, :]
        if ON_THE_WAY:
            b_ptrs = b_ptr + columns[:, None] * stride_bc + ranks[None, :] * stride_br
            b = tl.load(b_ptrs, mask=mask_cr, other=0.0)
        outer = tl.zeros((BLOCK_C, BLOCK_R), dtype=ACC)
        for m in range(first_row, min(first_row + steps * BLOCK_M, M), BLOCK_M):
            offs_m = m + tl.arange(0, BLOCK_M)
            mask_m = offs_m < M
            rows = offs_m.to(tl.int64)
            # Loaded the other way round: through tl.trans it would lose its cp.async pipeline.
            t_ptrs = t_ptr + columns[:, None] * stride_tc + rows[None, :] * stride_tm
            t = tl.load(t_ptrs, mask=mask_c[:, None] & mask_m[None, :], other=0.0)
            mask_mr = mask_m[:, None] & mask_r[None, :]
            s = tl.load(s_ptr + rows[:, None] * R + ranks[None, :], mask=mask_mr, other=0.0)
            if HAS_DROPOUT:
                keep = keep_tile(seed_ptr, offs_m, tile * BLOCK_C, C, keep_from, BLOCK_C)
                t = (t.to(ACC) * tl.trans(keep).to(ACC)).to(t.dtype)
            outer = dot(t, s, outer)  # [BLOCK_C, BLOCK_M] @ [BLOCK_M, BLOCK_R]
            if ON_THE_WAY:
                inner = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
                inner = dot(tl.trans(t), b, inner)  # [BLOCK_M, BLOCK_C] @ [BLOCK_C, BLOCK_R]
                inner_row = tile.to(tl.int64) * M + rows
                tl.store(inner_ptr + inner_row[:, None] * R + ranks[None, :], inner, mask=mask_mr)
        outer_ptrs = outer_ptr + split.to(tl.int64) * C * R
        outer_ptrs += columns[:, None] * stride_oc + ranks[None, :] * stride_or
        tl.store(outer_ptrs, outer, mask=mask_cr)
    else:
        # t b of a row tile, over as many column tiles as the others have row tiles.
        if NEED_OUTER:
            tile -= tiles_c
        chunk = tile // steps
        offs_m = first_row + tile % steps * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows = offs_m.to(tl.int64)
        mask_mr = mask_m[:, None] & mask_r[None, :]
        inner = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
        for c in range(chunk * steps * BLOCK_C, min((chunk + 1) * steps * BLOCK_C, C), BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            mask_c = offs_c < C
            columns = offs_c.to(tl.int64)
            t_ptrs = t_ptr + rows[:, None] * stride_tm + columns[None, :] * stride_tc
            t = tl.load(t_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
            b_ptrs = b_ptr + columns[:, None] * stride_bc + ranks[None, :] * stride_br
            b = tl.load(b_ptrs, mask=mask_c[:, None] & mask_r[None, :], other=0.0)
            inner = dot(t, b, inner)  # [BLOCK_M, BLOCK_C] @ [BLOCK_C, BLOCK_R]
        inner_row = chunk.to(tl.int64) * M + rows
        tl.store(inner_ptr + inner_row[:, None] * R + ranks[None, :], inner, mask=mask_mr)


@triton.jit
def add_up(part_ptr, out_ptr, block, numel, parts, scale, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Write a block of ``scale`` times the sum of ``parts``, each ``numel`` elements long."""
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    acc = tl.zeros((BLOCK,), dtype=ACC)
    for part in range(parts):
        acc += tl.load(part_ptr + part * numel + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, (acc * tl.cast(scale, ACC)).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_parts", "second_parts"])
def sum_kernel(
    first_ptr,
    second_ptr,
    first_out_ptr,
    second_out_ptr,
    first_numel,
    first_parts,
    second_numel,
    second_parts,
    scale,
    HAS_SECOND: tl.constexpr,
    EARLY: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if EARLY:
        # In this order: what comes next may start too, and waits for this kernel to end.
        let_next_start()
        wait_for_last()
    part_ptr, out_ptr = first_ptr, first_out_ptr
    numel = tl.cast(first_numel, tl.int64)
    parts = tl.cast(first_parts, tl.int32)
    block = tl.program_id(0)
    if HAS_SECOND:
        blocks = tl.cdiv(first_numel, BLOCK)
        if block >= blocks:
            part_ptr, out_ptr = second_ptr, second_out_ptr
            numel = tl.cast(second_numel, tl.int64)
            parts = tl.cast(second_parts, tl.int32)
            block -= blocks
    add_up(part_ptr, out_ptr, block, numel, parts, scale, ACC, BLOCK)


def ds_db(
    dy: Tensor,
    s: Tensor,
    b: Tensor,
    *,
    scaling: float = 1.0,
    need_ds: bool = True,
    need_db: bool = True,
    in_use: list[Tensor] | None = None,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``ds = scaling · dy b`` [M, R] and ``db = scaling · dyᵀ s`` [N, R], in b's dtype.

    ``dy`` [M, N] and ``b`` [N, R] of any strides, ``s`` [M, R] contiguous. One launch reads dy
    for both, another adds float32 partial sums up. With a list ``in_use`` an early kernel may
    start at once; it gets what is still being read then, to be held until that kernel is launched.
    """
    if not (need_ds or need_db):
        return None, None
    (M, N), R = dy.shape, b.shape[1]
    config = config or config_for("columns", dy, dy, R, b.dtype, False)
    on_the_way = need_ds and need_db and R <= ON_THE_WAY_RANK
    kinds = 2 if need_ds and need_db and not on_the_way else 1
    splits, steps = split(M, N, R, config, chip_of(dy.device).processors, kinds)
    acc = {"dtype": sum_dtype(dy.dtype), "device": dy.device}
    chunks = cdiv(cdiv(N, config.block_n), 1 if on_the_way else steps)
    inner = torch.empty(chunks, M, R, **acc) if need_ds else None
    outer = torch.empty(splits, N, R, **acc) if need_db else None
    early = in_use is not None
    _columns(dy, s, b, None, outer, inner, splits, steps, on_the_way, 0.0, (1, R), config, early)
    if early:
        in_use += [t for t in (inner, outer) if t is not None]
    ds = b.new_empty(M, R) if need_ds else None
    db = b.new_empty(N, R) if need_db else None
    _sum([(inner, ds), (outer, db)], scaling, early)
    return ds, db


def da(
    x: Tensor,
    ds: Tensor,
    seed: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    config: Config | None = None,
) -> Tensor:
    """Return ``dsᵀ dropout(x)`` [R, K] in the dtype of ds; one read of ``x`` [M, K], any strides.

    ``ds`` [M, R] is contiguous. Dropout acts where a ``seed`` ([1], int64) is given.
    """
    (M, K), R = x.shape, ds.shape[1]
    config = config or config_for("columns", x, x, R, ds.dtype, seed is not None)
    splits, steps = split(M, K, R, config, chip_of(x.device).processors)
    outer = torch.empty(splits, R, K, dtype=sum_dtype(x.dtype), device=x.device)
    _columns(x, ds, None, seed, outer, None, splits, steps, False, dropout_p, (K, 1), config)
    out = ds.new_empty(R, K)
    _sum([(outer, out)], 1.0 if seed is None else kept_scale(dropout_p))
    return out


def split(
    M: int, C: int, R: int, config: Config, processors: int, kinds: int = 1
) -> tuple[int, int]:
    """Return into how many splits the rows go, and the row tiles of each.

    ``kinds`` of program share the processors: a second one has as many programs as the first,
    each of as many tiles.
    """
    tiles = kinds * cdiv(C, config.block_n) * cdiv(R, config.rank_tile(R))
    blocks = max(1, cdiv(M, config.block_m))
    wanted = max(1, min(blocks, PROGRAMS * processors // max(1, tiles)))
    steps = cdiv(blocks, wanted)
    return cdiv(blocks, steps), steps


def _columns(
    t,
    s,
    b,
    seed,
    outer,
    inner,
    splits,
    steps,
    on_the_way,
    dropout_p,
    outer_strides,
    config,
    trigger=False,
) -> None:
    (M, C), R = t.shape, s.shape[1]
    block_r = config.rank_tile(R)
    tiles = cdiv(C, config.block_n) if outer is not None else 0
    if inner is not None and not on_the_way:
        tiles += steps * inner.shape[0]
    grid = tiles * cdiv(R, block_r), splits
    flags = trigger, outer is not None, inner is not None, on_the_way, seed is not None
    launch(
        *(columns_kernel, grid, config),
        *(t, s, b, seed, outer, inner),
        *(M, C, R, steps),
        *t.stride(),
        *((0, 0) if b is None else (b.stride(1), b.stride(0))),
        *outer_strides,
        lowest_kept(dropout_p),
        *flags,
        triton_dtype(t.dtype),
        *(config.block_m, config.block_n, block_r),
    )


def _sum(
    parts: list[tuple[Tensor | None, Tensor | None]], scale: float, early: bool = False
) -> None:
    """Write ``scale`` times the sum of each [parts, ...] to its output, in one launch."""
    parts = [pair for pair in parts if pair[1] is not None and pair[1].numel()]
    if not parts:
        return
    (first, out), (second, second_out) = parts[0], parts[1] if len(parts) > 1 else (None, None)
    sizes = [(o.numel(), p.shape[0]) for p, o in parts] + [(0, 0)]
    blocks = sum(cdiv(numel, SUM_BLOCK) for numel, _ in sizes)
    launch(
        *(sum_kernel, (blocks,), SUM_CONFIG),
        *(first, second, out, second_out),
        *(*sizes[0], *sizes[1], scale),
        *(second is not None, early, triton_dtype(first.dtype), SUM_BLOCK),
        early=early,
    )


SUM_CONFIG = Config(block_m=16, block_n=16, num_warps=4, num_stages=2)
