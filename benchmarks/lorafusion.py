# SPDX-License-Identifier: Apache-2.0
"""LoRAFusion's GPU kernels (Zhu et al., EuroSys 2026), written from the paper to compare with.

The graph is split at s. One pass over dy adds tiles of ds and db to float32 sums by atomics; dx
is one product to which the low-rank term is added under the mask that forward stored. The forward
product, with s at hand, is the same as ours: `fastlora_kernels.steps.outputs`.
"""

import torch
import triton
import triton.language as tl
from fastlora_kernels.configs import Config, cdiv
from torch import Tensor

DY = Config(64, 128, num_warps=8, num_stages=2)
DX = Config(128, 128, 64, num_warps=8, num_stages=3)


@triton.jit
def dy_kernel(
    dy_ptr,
    s_ptr,
    b_ptr,
    ds_ptr,
    db_ptr,
    M,
    N,
    R,
    scaling,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    mask_mr = mask_m[:, None] & mask_r[None, :]
    mask_nr = mask_n[:, None] & mask_r[None, :]
    at_mr = offs_m[:, None] * R + offs_r[None, :]
    at_nr = offs_n[:, None] * R + offs_r[None, :]
    at = offs_m[:, None] * N + offs_n[None, :]
    dy = tl.load(dy_ptr + at, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
    b = tl.load(b_ptr + at_nr, mask=mask_nr, other=0.0)
    s = tl.load(s_ptr + at_mr, mask=mask_mr, other=0.0)
    ds = tl.dot(dy, b) * tl.cast(scaling, tl.float32)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_R]
    db = tl.dot(tl.trans(dy), s)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_R]
    tl.atomic_add(ds_ptr + at_mr, ds, mask=mask_mr)
    tl.atomic_add(db_ptr + at_nr, db, mask=mask_nr)


@triton.jit
def dx_kernel(
    dy_ptr,
    w_ptr,
    ds_ptr,
    a_ptr,
    keep_ptr,
    dx_ptr,
    M,
    N,
    K,
    R,
    keep_scale,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tiles_m, tiles_k = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    group = tl.program_id(0) // (GROUP_M * tiles_k)
    group_m = min(tiles_m - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * tiles_k)
    offs_m = (group * GROUP_M + within % group_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = within // group_m * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n, offs_r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    rows, columns = (offs_m % M).to(tl.int64), offs_k % K

    dy_ptrs = dy_ptr + rows[:, None] * N + offs_n[None, :]
    w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * K + columns[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for n in range(0, N, BLOCK_N):
        dy = tl.load(dy_ptrs, mask=offs_n[None, :] < N - n, other=0.0)
        w = tl.load(w_ptrs, mask=offs_n[:, None] < N - n, other=0.0)
        acc = tl.dot(dy, w, acc)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_K]
        dy_ptrs += BLOCK_N
        w_ptrs += tl.cast(BLOCK_N, tl.int64) * K
    mask_r = offs_r < R
    ds = tl.load(ds_ptr + rows[:, None] * R + offs_r[None, :], mask=mask_r[None, :], other=0.0)
    a = tl.load(a_ptr + offs_r[:, None] * K + columns[None, :], mask=mask_r[:, None], other=0.0)
    low_rank = tl.dot(ds, a)  # [BLOCK_M, BLOCK_R] @ [BLOCK_R, BLOCK_K]
    at = rows[:, None] * K + columns[None, :]
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    if HAS_DROPOUT:
        keep = tl.load(keep_ptr + at, mask=mask, other=0)
        low_rank *= keep.to(tl.float32) * tl.cast(keep_scale, tl.float32)
    tl.store(dx_ptr + at, (acc + low_rank).to(dx_ptr.dtype.element_ty), mask=mask)


def ds_db(dy: Tensor, s: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return ``scaling · dy b`` [M, R] and ``dyᵀ s`` [N, R], s scaled; all inputs contiguous."""
    (M, N), R = dy.shape, b.shape[1]
    ds, db = (t.new_zeros(t.shape, dtype=torch.float32) for t in (s, b))
    tiles = DY.block_m, DY.block_n, max(16, triton.next_power_of_2(R))
    grid = cdiv(M, DY.block_m), cdiv(N, DY.block_n)
    dy_kernel[grid](dy, s, b, ds, db, M, N, R, scaling, *tiles, **_options(DY))
    return ds.to(dy.dtype), db.to(dy.dtype)


def dx(
    dy: Tensor, w: Tensor, ds: Tensor, a: Tensor, keep: Tensor | None, keep_scale: float
) -> Tensor:
    """Return ``dy w + keep_scale · keep · (ds a)`` [M, K]; all inputs contiguous."""
    (M, N), (R, K) = dy.shape, a.shape
    out = dy.new_empty(M, K)
    tiles = DX.block_m, DX.block_n, DX.block_k, max(16, triton.next_power_of_2(R)), DX.group_m
    grid = (cdiv(M, DX.block_m) * cdiv(K, DX.block_n),)
    operands = dy, w, ds, a, keep, out
    rest = M, N, K, R, keep_scale, keep is not None, *tiles
    dx_kernel[grid](*operands, *rest, **_options(DX))
    return out


def _options(config: Config) -> dict[str, int]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}
