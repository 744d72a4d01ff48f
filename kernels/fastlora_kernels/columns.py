"""One read of a tall tensor t [M, C], column tile by column tile: tᵀ s, and t b on the way.

ds and db come from one pass over dy (t = dy: dyᵀ s and dy b); da from one pass over x with
dropout drawn again (t = x: x̂ᵀ ds). Programs split the rows; each writes its partial sums in
float32 and a second kernel adds them in a fixed order, so results do not vary from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.configs import Config
from fastlora_kernels.dropout import keep_tile, kept_scale, lowest_kept
from fastlora_kernels.launch import chip_of, config_for, launch
from fastlora_kernels.shrink import shrink
from fastlora_kernels.tiles import dot, sum_dtype, triton_dtype

# Programs wanted for each processor, by splitting the rows.
PROGRAMS = 4
SUM_BLOCK = 1024
# With column tiles of 128 the float32 partial sums of ds, written and read, are R / 32 of a 16-bit
# dy: above this rank a second read of dy, by the shrink kernel, moves fewer bytes.
ONE_PASS_RANK = 32


@triton.jit
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
    rows_per_split,
    stride_tm,
    stride_tc,
    stride_br,
    stride_bc,
    stride_or,
    stride_oc,
    keep_from,
    NEED_OUTER: tl.constexpr,
    NEED_INNER: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    pid_c = tl.program_id(0)
    split = tl.program_id(1)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_c = offs_c < C
    mask_r = offs_r < R
    columns = offs_c.to(tl.int64)
    ranks = offs_r.to(tl.int64)
    mask_cr = mask_c[:, None] & mask_r[None, :]
    if NEED_INNER:
        b_ptrs = b_ptr + columns[:, None] * stride_bc + ranks[None, :] * stride_br
        b = tl.load(b_ptrs, mask=mask_cr, other=0.0)

    outer = tl.zeros((BLOCK_C, BLOCK_R), dtype=ACC)
    first = split * rows_per_split
    last = min(first + rows_per_split, M)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < last
        rows = offs_m.to(tl.int64)
        t_ptrs = t_ptr + rows[:, None] * stride_tm + columns[None, :] * stride_tc
        t = tl.load(t_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        mask_mr = mask_m[:, None] & mask_r[None, :]
        if HAS_DROPOUT:
            keep = keep_tile(seed_ptr, offs_m, pid_c * BLOCK_C, C, keep_from, BLOCK_C)
            t = (t.to(ACC) * keep.to(ACC)).to(t.dtype)
        if NEED_OUTER:
            s = tl.load(s_ptr + rows[:, None] * R + ranks[None, :], mask=mask_mr, other=0.0)
            outer = dot(tl.trans(t), s, outer)  # [BLOCK_C, BLOCK_M] @ [BLOCK_M, BLOCK_R]
        if NEED_INNER:
            inner = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
            inner = dot(t, b, inner)  # [BLOCK_M, BLOCK_C] @ [BLOCK_C, BLOCK_R]
            inner_row = pid_c.to(tl.int64) * M + rows
            tl.store(inner_ptr + inner_row[:, None] * R + ranks[None, :], inner, mask=mask_mr)
    if NEED_OUTER:
        outer_ptrs = outer_ptr + split.to(tl.int64) * C * R
        outer_ptrs += columns[:, None] * stride_oc + ranks[None, :] * stride_or
        tl.store(outer_ptrs, outer, mask=mask_cr)


@triton.jit
def sum_kernel(
    part_ptr,
    out_ptr,
    numel,
    parts,
    scale,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    acc = tl.zeros((BLOCK,), dtype=ACC)
    for part in range(parts):
        acc += tl.load(part_ptr + tl.cast(part, tl.int64) * numel + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, (acc * tl.cast(scale, ACC)).to(out_ptr.dtype.element_ty), mask=mask)


def ds_db(
    dy: Tensor,
    s: Tensor,
    b: Tensor,
    *,
    scaling: float = 1.0,
    need_ds: bool = True,
    need_db: bool = True,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``ds = scaling · dy b`` [M, R] and ``db = scaling · dyᵀ s`` [N, R], in b's dtype.

    ``dy`` [M, N] and ``b`` [N, R] of any strides, ``s`` [M, R] contiguous. One read of dy up to
    rank `ONE_PASS_RANK`, two above it.
    """
    (M, N), R = dy.shape, b.shape[1]
    if need_ds and R > ONE_PASS_RANK:
        ds = shrink(dy, b.t(), scaling=scaling)
        _, db = ds_db(dy, s, b, scaling=scaling, need_ds=False, need_db=need_db, config=config)
        return ds, db
    if not (need_ds or need_db):
        return None, None
    config = config or config_for("columns", dy, R, b.dtype, False, dy)
    acc = {"dtype": sum_dtype(dy.dtype), "device": dy.device}
    splits, rows = _split(M, N, R, config, chip_of(dy.device).processors)
    inner = torch.empty(triton.cdiv(N, config.block_n), M, R, **acc) if need_ds else None
    outer = torch.empty(splits, N, R, **acc) if need_db else None
    _columns(dy, s, b, None, outer, inner, rows, 0.0, (1, R), config)
    ds = _summed(inner, (M, R), b.dtype, scaling) if need_ds else None
    return ds, _summed(outer, (N, R), b.dtype, scaling) if need_db else None


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
    config = config or config_for("columns", x, R, ds.dtype, seed is not None, x)
    splits, rows = _split(M, K, R, config, chip_of(x.device).processors)
    outer = torch.empty(splits, R, K, dtype=sum_dtype(x.dtype), device=x.device)
    _columns(x, ds, None, seed, outer, None, rows, dropout_p, (K, 1), config)
    scale = 1.0 if seed is None else kept_scale(dropout_p)
    return _summed(outer, (R, K), ds.dtype, scale)


def _split(M: int, C: int, R: int, config: Config, processors: int) -> tuple[int, int]:
    """Return into how many programs the rows are split, and the rows of each."""
    tiles = triton.cdiv(C, config.block_n) * triton.cdiv(R, config.rank_tile(R))
    blocks = max(1, triton.cdiv(M, config.block_m))
    wanted = max(1, min(blocks, PROGRAMS * processors // max(1, tiles)))
    rows = triton.cdiv(blocks, wanted) * config.block_m
    return max(1, triton.cdiv(M, rows)), rows


def _columns(t, s, b, seed, outer, inner, rows, dropout_p, outer_strides, config) -> None:
    (M, C), R = t.shape, s.shape[1]
    block_r = config.rank_tile(R)
    launch(
        columns_kernel,
        (triton.cdiv(C, config.block_n), max(1, triton.cdiv(M, rows)), triton.cdiv(R, block_r)),
        config,
        t_ptr=t,
        s_ptr=s,
        b_ptr=b,
        seed_ptr=seed,
        outer_ptr=outer,
        inner_ptr=inner,
        M=M,
        C=C,
        R=R,
        rows_per_split=rows,
        stride_tm=t.stride(0),
        stride_tc=t.stride(1),
        stride_br=0 if b is None else b.stride(1),
        stride_bc=0 if b is None else b.stride(0),
        stride_or=outer_strides[0],
        stride_oc=outer_strides[1],
        keep_from=lowest_kept(dropout_p),
        NEED_OUTER=outer is not None,
        NEED_INNER=inner is not None,
        HAS_DROPOUT=seed is not None,
        ACC=triton_dtype(t.dtype),
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_n,
        BLOCK_R=block_r,
    )


def _summed(parts: Tensor, shape: tuple[int, int], dtype: torch.dtype, scale: float) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=parts.device)
    launch(
        sum_kernel,
        (triton.cdiv(out.numel(), SUM_BLOCK),),
        SUM_CONFIG,
        part_ptr=parts,
        out_ptr=out,
        numel=out.numel(),
        parts=parts.shape[0],
        scale=scale,
        ACC=triton_dtype(parts.dtype),
        BLOCK=SUM_BLOCK,
    )
    return out


SUM_CONFIG = Config(block_m=16, block_n=16, num_warps=4, num_stages=2)
