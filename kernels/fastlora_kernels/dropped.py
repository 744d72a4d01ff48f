# SPDX-License-Identifier: Apache-2.0
"""What dropout leaves of a tensor, written: for wide products of it, which draw no mask."""

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.configs import Config, cdiv
from fastlora_kernels.dropout import keep_scales, keep_tile
from fastlora_kernels.launch import Launch, empty
from fastlora_kernels.replay import replayed
from fastlora_kernels.tiles import triton_dtype

CONFIG = Config(block_m=16, block_n=128, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["keep_from"])
def dropped_kernel(
    x_ptr, seed_ptr, added_ptr, out_ptr,
    M, K,
    stride_xm, stride_xk,
    factor, keep_from,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_k = tl.cdiv(K, BLOCK_K)
    first_k = tl.program_id(0) % tiles_k * BLOCK_K
    offs_m = tl.program_id(0) // tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = first_k + tl.arange(0, BLOCK_K)
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    columns = offs_k.to(tl.int64)[None, :]
    x = tl.load(x_ptr + rows * stride_xm + columns * stride_xk, mask=mask, other=0.0)
    keep = keep_tile(seed_ptr, offs_m, first_k, K, keep_from, BLOCK_K)
    acc = x.to(ACC) * (keep.to(ACC) * tl.cast(factor, ACC))
    if added_ptr is not None:
        acc += tl.load(added_ptr + rows * K + columns, mask=mask, other=0.0).to(ACC)
    tl.store(out_ptr + rows * K + columns, acc.to(out_ptr.dtype.element_ty), mask=mask)


@replayed
def dropped(
    x: Tensor, seed: Tensor, p: float, factor: float = 1.0, added: Tensor | None = None
) -> Tensor:
    """Return ``factor`` times what dropout keeps of x [M, K], zeros for the rest, in x's dtype.

    ``added`` [M, K], contiguous, is added before that is rounded. x may have any strides.
    """
    M, K = x.shape
    tiles, out = cdiv(M, CONFIG.block_m) * cdiv(K, CONFIG.block_n), empty(x, M, K)
    rest = M, K, *x.stride(), factor, *keep_scales((seed,), (p,))[1], triton_dtype(x.dtype)
    launch = Launch(dropped_kernel, (tiles,), CONFIG, *rest, CONFIG.block_m, CONFIG.block_n)
    launch(x, seed, added, out)
    return out
