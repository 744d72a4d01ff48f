# SPDX-License-Identifier: Apache-2.0
"""y_i = x w_iᵀ + scale_i · s_i b_iᵀ + bias_i on sm_90 and later, for several projections of one x.

The same products as `joint_product.py`, for operands that the tensor memory accelerator can read,
by persistent programs as in `persistent.py`: the low-rank products join "first", or "fold" into
the main loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.configs import Config, cdiv
from fastlora_kernels.joint import alike, filled, locate, number_of, pointer_of, strides
from fastlora_kernels.launch import chip_of, launch
from fastlora_kernels.persistent import lies_by_rows, store_tile, suits
from fastlora_kernels.tiles import low_rank_tile, tile_of, wrapped


@triton.jit
def persistent_all_kernel(
    x_ptr,
    w_ptrs,
    s_ptrs,
    b_ptrs,
    bias_ptrs,
    y_ptrs,
    M,
    sizes,
    K,
    ranks,
    bias_sizes,
    tiles_n,
    stride_x,
    strides_w,
    strides_bn,
    strides_br,
    strides_bias,
    scales,
    LOW_RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    HALVES: tl.constexpr,
):
    dtype: tl.constexpr = y_ptrs[0].dtype.element_ty
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_x, 1], [BLOCK_M, BLOCK_K])
    w_descs = ()
    s_descs = ()
    b_descs = ()
    y_descs = ()
    for i in tl.static_range(len(sizes)):
        N = sizes[i]
        w_desc = tl.make_tensor_descriptor(w_ptrs[i], [N, K], [strides_w[i], 1], [BLOCK_N, BLOCK_K])
        y_desc = tl.make_tensor_descriptor(y_ptrs[i], [M, N], [N, 1], [BLOCK_M, BLOCK_N // HALVES])
        w_descs = w_descs + (w_desc,)
        y_descs = y_descs + (y_desc,)
        if LOW_RANK == "fold":
            # A projection without an adapter has rank 0 here, and another one's s and b.
            R = max(ranks[i], 8)
            s_desc = tl.make_tensor_descriptor(s_ptrs[i], [M, R], [R, 1], [BLOCK_M, BLOCK_K])
            b_desc = tl.make_tensor_descriptor(
                b_ptrs[i], [N, R], [number_of(i, strides_bn, tl.int64), 1], [BLOCK_N, BLOCK_K]
            )
            s_descs = s_descs + (s_desc,)
            b_descs = b_descs + (b_desc,)

    tiles_m = tl.cdiv(M, BLOCK_M)
    steps = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=LOW_RANK == "fold"
    ):
        pid_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        i_tile, pid_n = locate(tile_n, sizes, BLOCK_N)
        N_tile = number_of(i_tile, sizes, tl.int32)
        R_tile = number_of(i_tile, ranks, tl.int32)
        first_m = pid_m * BLOCK_M
        first_n = pid_n * BLOCK_N
        offs_m = first_m + tl.arange(0, BLOCK_M)
        offs_n = first_n + tl.arange(0, BLOCK_N)
        w_desc = pointer_of(i_tile, w_descs)
        all_steps = steps
        if LOW_RANK == "fold":
            s_desc = pointer_of(i_tile, s_descs)
            b_desc = pointer_of(i_tile, b_descs)
            all_steps += tl.cdiv(R_tile, BLOCK_K)
        if LOW_RANK == "first":
            acc = low_rank_tile(
                pointer_of(i_tile, s_ptrs),
                pointer_of(i_tile, b_ptrs),
                None,
                offs_m,
                offs_n,
                0,
                M,
                N_tile,
                R_tile,
                number_of(i_tile, strides_bn, tl.int64),
                number_of(i_tile, strides_br, tl.int64),
                number_of(i_tile, scales, tl.float32),
                0,
                False,
                dtype,
                tl.float32,
                BLOCK_M,
                BLOCK_N,
                BLOCK_R,
            )
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

        for step in range(all_steps):
            x_from, w_from, k = x_desc, w_desc, step * BLOCK_K
            if LOW_RANK == "fold":  # noqa: SIM102, known when compiled, unlike what follows
                if step >= steps:
                    x_from, w_from, k = s_desc, b_desc, (step - steps) * BLOCK_K
            x = x_from.load([first_m, k])
            w = w_from.load([first_n, k]).T
            acc = tl.dot(x, w, acc)  # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N]

        if HAS_BIAS:
            # One that is not there has size 0 here.
            columns = wrapped(offs_n, N_tile) * number_of(i_tile, strides_bias, tl.int64)
            mask = offs_n < number_of(i_tile, bias_sizes, tl.int32)
            bias = tl.load(pointer_of(i_tile, bias_ptrs) + columns, mask=mask, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        store_tile(pointer_of(i_tile, y_descs), first_m, first_n, acc, dtype, HALVES)


def suits_all(
    x: Tensor,
    w: Sequence[Tensor],
    s: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    scalings: Sequence[float],
    config: Config,
) -> bool:
    """Return whether the tensor memory accelerator can move ``x``, every ``w`` and every y.

    Each w by rows, as a linear layer has it; and, where ``config`` folds the low-rank products in,
    factors that need no scaling and lie likewise.
    """
    if not all(m.stride(1) == 1 and suits(x, m) for m in w):
        return False
    factors = [t for t in (*s, *b) if t is not None]
    if config.low_rank == "first" or not factors:
        return True
    scaled = all(c == 1.0 for c, t in zip(scalings, b, strict=True) if t is not None)
    return scaled and all(
        t.dtype == x.dtype and lies_by_rows(t.stride(), t.shape[1]) and t.data_ptr() % 16 == 0
        for t in factors
    )


def persistent_all(
    x: Tensor,
    w: Sequence[Tensor],
    s: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    config: Config,
) -> list[Tensor]:
    """Return ``x w_iᵀ + scaling_i · s_i b_iᵀ + bias_i`` [M, N_i] in x's dtype, contiguous.

    The operands as `suits_all` asks for, the rest as for `product_all`.
    """
    (M, K), sizes = x.shape, tuple(t.shape[0] for t in w)
    ranks = tuple(0 if t is None else t.shape[1] for t in b)
    block_r = min(config.rank_tile(max(1, *ranks)), 32)
    tiles_n = sum(cdiv(n, config.block_n) for n in sizes)
    tiles = cdiv(M, config.block_m) * tiles_n
    y = tuple(x.new_empty(M, n) for n in sizes)
    launch(
        *(persistent_all_kernel, (min(tiles, chip_of(x.device).processors),), config),
        *(x, tuple(w), filled(s), filled(b), filled(biases), y),
        *(M, sizes, K, ranks),
        *(tuple(0 if t is None else t.shape[0] for t in biases), tiles_n),
        *(x.stride(0), tuple(t.stride(0) for t in w)),
        *(strides(b, 0), strides(b, 1)),
        *(strides(biases, 0), alike(scalings)),
        *(config.low_rank if any(ranks) else None, any(t is not None for t in biases)),
        *(config.block_m, config.block_n, config.block_k, block_r, config.group_m),
        2 if config.block_n > 128 else 1,
    )
    return list(y)
