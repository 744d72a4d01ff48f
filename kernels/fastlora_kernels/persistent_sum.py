# SPDX-License-Identifier: Apache-2.0
"""Σ_i dy_i w_i on sm_90 and later: one pipelined loop over all that is summed.

For operands that the tensor memory accelerator can read. The main loop of a tile goes from the
columns of one dy on to those of the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.configs import Config, cdiv
from fastlora_kernels.launch import chip_of, launch
from fastlora_kernels.persistent import suits
from fastlora_kernels.tiles import halves, tile_of


@triton.jit
def persistent_sum_kernel(
    dx_ptr,
    rest_ptr,
    dy_ptrs,
    w_ptrs,
    M,
    K,
    sizes,
    strides_dy,
    strides_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_REST: tl.constexpr,
):
    # As in a product: BLOCK_N columns of the result, BLOCK_K of what is summed over.
    dys = ()
    ws = ()
    ends = ()
    end = 0
    for i in tl.static_range(len(sizes)):
        N = sizes[i]
        dy_desc = tl.make_tensor_descriptor(
            dy_ptrs[i], [M, N], [strides_dy[i], 1], [BLOCK_M, BLOCK_K]
        )
        w_desc = tl.make_tensor_descriptor(w_ptrs[i], [N, K], [strides_w[i], 1], [BLOCK_K, BLOCK_N])
        end += tl.cdiv(N, BLOCK_K)
        dys = dys + (dy_desc,)
        ws = ws + (w_desc,)
        ends = ends + (end,)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // HALVES
    dx_desc = tl.make_tensor_descriptor(dx_ptr, [M, K], [K, 1], [BLOCK_M, WIDTH])
    if HAS_REST:
        rest_desc = tl.make_tensor_descriptor(rest_ptr, [M, K], [K, 1], [BLOCK_M, WIDTH])

    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_k = tl.cdiv(K, BLOCK_N)
    # The tile of the rest takes the place in shared memory where the loads of the next tile go.
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_k, tl.num_programs(0), flatten=not HAS_REST
    ):
        pid_m, pid_k = tile_of(tile, tiles_m, tiles_k, GROUP_M)
        first_m = pid_m * BLOCK_M
        first_k = pid_k * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(end):
            # The descriptors are chosen and the load is shared: a load in a branch has no pipeline.
            dy_from, w_from, n = dys[0], ws[0], step * BLOCK_K
            for i in tl.static_range(1, len(sizes)):
                if step >= ends[i - 1]:
                    dy_from, w_from, n = dys[i], ws[i], (step - ends[i - 1]) * BLOCK_K
            dy = dy_from.load([first_m, n])
            w = w_from.load([n, first_k])
            acc = tl.dot(dy, w, acc)  # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N]
        if HALVES == 1:
            if HAS_REST:
                acc += rest_desc.load([first_m, first_k]).to(tl.float32)
            dx_desc.store([first_m, first_k], acc.to(dtype))
        else:
            left, right = halves(acc)
            if HAS_REST:
                left += rest_desc.load([first_m, first_k]).to(tl.float32)
            dx_desc.store([first_m, first_k], left.to(dtype))
            if HAS_REST:
                right += rest_desc.load([first_m, first_k + WIDTH]).to(tl.float32)
            dx_desc.store([first_m, first_k + WIDTH], right.to(dtype))


def suits_sum(dy: Sequence[Tensor], w: Sequence[Tensor]) -> bool:
    """Return whether the tensor memory accelerator can move every ``dy``, ``w`` and the sum.

    Each w by rows, as a linear layer has it.
    """
    return all(m.stride(1) == 1 and suits(t, m.t()) for t, m in zip(dy, w, strict=True))


def persistent_sum(
    dy: Sequence[Tensor], w: Sequence[Tensor], rest: Tensor | None, config: Config
) -> Tensor:
    """Return ``Σ_i dy_i w_i + rest`` [M, K] in the dtype of dy, contiguous.

    ``dy`` [M, N_i] and ``w`` [N_i, K] as `suits_sum` asks for, ``rest`` [M, K] contiguous or None,
    all of one dtype.
    """
    M, K = dy[0].shape[0], w[0].shape[1]
    dx = dy[0].new_empty(M, K)
    tiles = cdiv(M, config.block_m) * cdiv(K, config.block_n)
    launch(
        *(persistent_sum_kernel, (min(tiles, chip_of(dx.device).processors),), config),
        *(dx, rest, tuple(dy), tuple(w)),
        *(M, K, tuple(t.shape[1] for t in dy)),
        *(tuple(t.stride(0) for t in dy), tuple(t.stride(0) for t in w)),
        *(config.block_m, config.block_n, config.block_k, config.group_m),
        *(2 if config.block_n > 128 else 1, rest is not None),
    )
    return dx
