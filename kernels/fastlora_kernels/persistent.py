# SPDX-License-Identifier: Apache-2.0
"""y = x wᵀ + scale · dropout'(s bᵀ) + bias on sm_90 and later: tiles by TMA, persistent programs.

The same product as `product.py`, for operands that the tensor memory accelerator can read: a unit
stride, and rows at multiples of 16 bytes. The low-rank product joins the accumulator

- "first": before the main loop; takes a scale, a dropout mask, any rank and float32 factors;
- "after": behind it, with b loaded before the loop, and s too, unless it may still be made then;
- "fold": as the last steps of the main loop itself, inside its pipeline;
- "recompute": behind the loop, from an s that the loop makes of the same tiles of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.configs import Config, cdiv
from fastlora_kernels.dropout import kept_scale, lowest_kept
from fastlora_kernels.launch import INTERPRETED, chip_of, launch
from fastlora_kernels.tiles import halves, low_rank_tile, tile_of, wait_for_last, wrapped


@triton.jit(do_not_specialize=["keep_from"])
def persistent_kernel(
    x_ptr,
    w_ptr,
    a_ptr,
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
    stride_w,
    stride_ar,
    stride_bn,
    stride_br,
    stride_bias,
    scale,
    keep_from,
    LOW_RANK: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    FLATTEN: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    HALVES: tl.constexpr,
):
    dtype = y_ptr.dtype.element_ty
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    if W_BY_ROWS:
        w_desc = tl.make_tensor_descriptor(w_ptr, [N, K], [stride_w, 1], [BLOCK_N, BLOCK_K])
    else:
        w_desc = tl.make_tensor_descriptor(w_ptr, [K, N], [stride_w, 1], [BLOCK_K, BLOCK_N])
    if LOW_RANK == "fold" or SPECIALIZED:
        STEP_R: tl.constexpr = BLOCK_K if LOW_RANK == "fold" else BLOCK_R
        s_desc = tl.make_tensor_descriptor(s_ptr, [M, R], [R, 1], [BLOCK_M, STEP_R])
        if W_BY_ROWS:
            b_desc = tl.make_tensor_descriptor(b_ptr, [N, R], [stride_bn, 1], [BLOCK_N, STEP_R])
        else:
            b_desc = tl.make_tensor_descriptor(b_ptr, [R, N], [stride_br, 1], [STEP_R, BLOCK_N])
    if LOW_RANK == "recompute":
        a_desc = tl.make_tensor_descriptor(a_ptr, [R, K], [stride_ar, 1], [BLOCK_R, BLOCK_K])
    y_desc = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N // HALVES])

    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    all_steps = steps
    if LOW_RANK == "fold":
        all_steps += tl.cdiv(R, BLOCK_K)
    for tile in tl.range(
        tl.program_id(0),
        tiles_m * tiles_n,
        tl.num_programs(0),
        flatten=FLATTEN,
        warp_specialize=SPECIALIZED,
    ):
        pid_m, pid_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        first_m = pid_m * BLOCK_M
        first_n = pid_n * BLOCK_N
        offs_m = first_m + tl.arange(0, BLOCK_M)
        offs_n = first_n + tl.arange(0, BLOCK_N)
        rows = wrapped(offs_m, M)
        columns = wrapped(offs_n, N)
        offs_r = tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        s_ptrs = s_ptr + rows[:, None] * R + offs_r[None, :]
        b_ptrs = b_ptr + columns[None, :] * stride_bn + offs_r.to(tl.int64)[:, None] * stride_br

        if LOW_RANK == "first":
            acc = low_rank_tile(
                s_ptr,
                b_ptr,
                seed_ptr,
                offs_m,
                offs_n,
                first_n,
                M,
                N,
                R,
                stride_bn,
                stride_br,
                scale,
                keep_from,
                HAS_DROPOUT,
                dtype,
                tl.float32,
                BLOCK_M,
                BLOCK_N,
                BLOCK_R,
            )
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if LOW_RANK == "after" and not SPECIALIZED:
            b = tl.load(b_ptrs, mask=mask_r[:, None], other=0.0)
            if not EARLY:
                s = tl.load(s_ptrs, mask=mask_r[None, :], other=0.0)
        if LOW_RANK == "recompute":
            s_acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)

        for step in range(all_steps):
            # The descriptor is chosen and the load is shared: a load in a branch has no pipeline.
            x_from, w_from, k = x_desc, w_desc, step * BLOCK_K
            if LOW_RANK == "fold":  # noqa: SIM102, known when compiled, unlike what follows
                if step >= steps:
                    x_from, w_from, k = s_desc, b_desc, (step - steps) * BLOCK_K
            x = x_from.load([first_m, k])
            if W_BY_ROWS:
                w = w_from.load([first_n, k]).T
            else:
                w = w_from.load([k, first_n])
            acc = tl.dot(x, w, acc)  # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N]
            if LOW_RANK == "recompute":
                s_acc = tl.dot(x, a_desc.load([0, k]).T, s_acc)

        if EARLY:
            wait_for_last()
        if LOW_RANK == "after":
            if SPECIALIZED:
                s = s_desc.load([first_m, 0])
                if W_BY_ROWS:
                    b = b_desc.load([first_n, 0]).T
                else:
                    b = b_desc.load([0, first_n])
            elif EARLY:
                s = tl.load(s_ptrs, mask=mask_r[None, :], other=0.0)
            acc = tl.dot(s, b, acc)  # [BLOCK_M, BLOCK_R] @ [BLOCK_R, BLOCK_N]
        if LOW_RANK == "recompute":
            # Past the rank, an infinity of x has met zeros and left NaN.
            s_acc = tl.where(mask_r[None, :], s_acc, 0.0)
            b = tl.load(b_ptrs, mask=mask_r[:, None], other=0.0)
            acc = tl.dot((s_acc * tl.cast(scale, tl.float32)).to(dtype), b, acc)
            if pid_n == 0:
                mask = (offs_m < M)[:, None] & mask_r[None, :]
                tl.store(s_ptrs, s_acc.to(dtype), mask=mask)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + columns * stride_bias).to(tl.float32)[None, :]
        store_tile(y_desc, first_m, first_n, acc, dtype, HALVES)


@triton.jit
def store_tile(y_desc, first_m, first_n, acc, dtype: tl.constexpr, HALVES: tl.constexpr):
    """Write a tile by a descriptor as wide as it is, or half as wide."""
    if HALVES == 1:
        y_desc.store([first_m, first_n], acc.to(dtype))
    else:
        left, right = halves(acc)
        y_desc.store([first_m, first_n], left.to(dtype))
        y_desc.store([first_m, first_n + acc.shape[1] // 2], right.to(dtype))


def suits(x: Tensor, w: Tensor) -> bool:
    """Return whether the tensor memory accelerator can move ``x`` [M, K], ``w`` [N, K] and y.

    All of 16 bits an element. Rows that overlap, as those of an expanded tensor do, are outside of
    what it is documented for.
    """
    (M, K), N, w_stride = x.shape, w.shape[0], w.stride()
    return (
        M > 0 < K
        and N > 0
        and N % 8 == 0
        and lies_by_rows(x.stride(), K)
        and (lies_by_rows(w_stride, K) or lies_by_rows(w_stride[::-1], N))
        and x.data_ptr() % 16 == 0
        and w.data_ptr() % 16 == 0
    )


def lies_by_rows(stride: tuple[int, int], columns: int) -> bool:
    """Return whether rows of 16-bit elements lie apart, 16 bytes or a multiple from each other."""
    rows, step = stride
    return step == 1 and rows % 8 == 0 and rows >= columns


def takes_scaled(config: Config) -> bool:
    """Return whether the factor s has to come scaled, for want of a place to scale it."""
    return config.tma and config.low_rank in ("after", "fold")


def starts_early(config: Config) -> bool:
    """Return whether a product with ``config`` starts while the kernel before it still runs."""
    return config.tma and config.early and config.low_rank == "after" and not INTERPRETED


def recomputes(
    config: Config, x: Tensor, w: Tensor, a: Tensor, b: Tensor, seed: Tensor | None
) -> bool:
    """Return whether one launch makes both s and y, as ``config`` would have it."""
    return (
        config.tma
        and config.low_rank == "recompute"
        and config.rank_tile(a.shape[0]) >= a.shape[0]
        and seed is None
        and x.dtype == torch.bfloat16 == b.dtype  # scaled, float16 might overflow
        and suits(x, w)
        and lies_by_rows(a.stride(), x.shape[1])
        and a.data_ptr() % 16 == 0
    )


def persistent_product(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    config: Config,
    a: Tensor | None = None,
) -> Tensor:
    """Return ``x wᵀ + scaling · dropout'(s bᵀ) + bias`` [M, N] in the dtype of x, contiguous.

    ``x`` and ``w`` as `suits` asks for; the rest as for `product`. A config whose low-rank step
    takes no scale, no mask or not these factors runs with "first". With ``a`` [R, K], and a config
    that says "recompute", ``s`` [M, R] is written instead of read: x aᵀ, rounded to the dtype of x.
    """
    (M, K), N, R = x.shape, w.shape[0], s.shape[1]
    w_stride, b_stride = w.stride(), b.stride()
    by_rows, low_rank, block_r = w_stride[1] == 1, config.low_rank, config.rank_tile(R)
    if a is None and not (
        low_rank in ("after", "fold")
        and scaling == 1.0
        and seed is None
        and s.dtype == x.dtype
        and _takes_factors(config, s, b, b_stride, by_rows)
    ):
        low_rank, block_r = "first", min(block_r, 32)
    early = low_rank == "after" and starts_early(config)
    scale, keep_from = scaling, 0
    if seed is not None:
        scale, keep_from = scaling * kept_scale(dropout_p), lowest_kept(dropout_p)
    y = x.new_empty(M, N)
    tiles = cdiv(M, config.block_m) * cdiv(N, config.block_n)
    launch(
        *(persistent_kernel, (min(tiles, chip_of(x.device).processors),), config),
        *(x, w, a, s, b, bias, seed, y),
        *(M, N, K, R),
        *(x.stride(0), w_stride[not by_rows], 0 if a is None else a.stride(0)),
        *b_stride,
        0 if bias is None else bias.stride(0),
        *(scale, keep_from),
        *(low_rank, by_rows, bias is not None, seed is not None),
        *(low_rank == "fold", config.specialized and low_rank != "first", early),
        *(config.block_m, config.block_n, config.block_k, block_r, config.group_m),
        2 if config.block_n > 128 else 1,
        early=early,
    )
    return y


def _takes_factors(
    config: Config, s: Tensor, b: Tensor, b_stride: tuple[int, int], by_rows: bool
) -> bool:
    """Return whether the config's low-rank step can read ``s`` and ``b`` [N, R] as they lie."""
    R = s.shape[1]
    if config.low_rank == "after":
        if config.rank_tile(R) < R:
            return False
        if not config.specialized:
            return True
    aligned = R % 8 == 0 and s.data_ptr() % 16 == 0 == b.data_ptr() % 16
    # By descriptors, and the way that w lies.
    stride, columns = (b_stride, R) if by_rows else (b_stride[::-1], b.shape[0])
    return aligned and lies_by_rows(stride, columns)
