# SPDX-License-Identifier: Apache-2.0
"""What several kernels do to a tile: offsets, and products of tiles of mixed dtype."""

import torch
import triton
import triton.language as tl

from fastlora_kernels.locate import number_of, pointer_of

SHARE = tl.constexpr(2.0**-32)  # of a float32 number, in the place of what it has no bits for


@triton.jit
def wrapped(offs, size):
    """Return offs as int64, those past the end sent inside: loads need no mask, stores do.

    The remainder keeps what the compiler knows of contiguity when 16 divides size.
    """
    return (offs % size).to(tl.int64)


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return the row and the column of a tile, GROUP_M rows sharing a pass over the columns."""
    group = tile // (GROUP_M * tiles_n)
    group_m = min(tiles_m - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return group * GROUP_M + within % group_m, within // group_m


@triton.jit
def dot(left, right, acc):
    """Return acc + left @ right for a tile of the base's dtype and one of the adapters'.

    Equal dtypes go to one product. Of float32 (IEEE) it is a chain of fused multiply-adds, each
    rounded at the size of the sum so far: it starts from zero, and its end is added to acc. A
    float32 ``right`` under a 16-bit ``left`` is split into three bfloat16 terms, and a float16
    ``left`` into two, which hold every bit: the tensor cores then give a float32 result. That sum
    is added to acc in IEEE float32.
    """
    if left.dtype == tl.float32 and right.dtype == tl.float32:
        part = tl.dot(left, right, input_precision="ieee")
        # Written as a sum, the compiler would start the chain from acc all the same.
        acc = tl.fma(part, tl.full(acc.shape, 1.0, tl.float32), acc)
    elif left.dtype == right.dtype:
        acc = tl.dot(left, right, acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        high, middle, low = terms(right)
        if left.dtype == tl.bfloat16:
            part = tl.dot(left, low)
            part = tl.dot(left, middle, part)
            part = tl.dot(left, high, part)
        else:
            left_high, left_low, _ = terms(left)
            part = tl.dot(left_high, low)
            part = tl.dot(left_low, middle, part)
            part = tl.dot(left_high, middle, part)
            part = tl.dot(left_low, high, part)
            part = tl.dot(left_high, high, part)
        acc += part
    return acc


@triton.jit
def dot_16(left, right, acc):
    """Return acc + left @ right for two float32 tiles, to 16 bits: enough for a 16-bit result."""
    left_high, left_low, _ = terms(left)
    right_high, right_low, _ = terms(right)
    acc = tl.dot(left_low, right_high, acc)
    acc = tl.dot(left_high, right_low, acc)
    return tl.dot(left_high, right_high, acc)


@triton.jit
def add_product(
    acc, x_ptr, w_ptr, rows, columns, K,
    stride_xm, stride_xk, stride_wn, stride_wk,
    EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return acc + x wᵀ for a tile of ``rows`` of x and ``columns``, which are rows of w."""
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk
    w_ptrs = w_ptr + columns[None, :] * stride_wn + offs_k.to(tl.int64)[:, None] * stride_wk
    step_x = tl.cast(BLOCK_K, tl.int64) * stride_xk
    step_w = tl.cast(BLOCK_K, tl.int64) * stride_wk
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            mask_k = offs_k < K - k
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_k[:, None], other=0.0)
        acc = dot(x, w, acc)  # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N]
        x_ptrs += step_x
        w_ptrs += step_w
    return acc


@triton.jit
def add_low_rank(
    acc, i, s_ptrs, b_ptrs, rows, columns, ranks,
    strides_bn, strides_br,
    dtype: tl.constexpr, BLOCK_R: tl.constexpr, factor=None,
):  # fmt: skip
    """Return acc + s bᵀ of projection ``i``, for ``rows`` of s and ``columns``, which are b's rows.

    For a result of ``dtype``; with a ``factor`` s is multiplied by it. A projection without an
    adapter has rank 0.
    """
    s_ptr = pointer_of(i, s_ptrs)
    b_ptr = pointer_of(i, b_ptrs)
    R = number_of(i, ranks, tl.int32)
    stride_bn = number_of(i, strides_bn, tl.int64)
    stride_br = number_of(i, strides_br, tl.int64)
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        s = tl.load(s_ptr + rows[:, None] * R + offs_r[None, :], mask=mask_r[None, :], other=0.0)
        b_tile = b_ptr + columns[None, :] * stride_bn + offs_r.to(tl.int64)[:, None] * stride_br
        b = tl.load(b_tile, mask=mask_r[:, None], other=0.0)
        if factor is not None:
            s = s.to(acc.dtype) * factor
        if s.dtype == dtype:
            acc = dot(s, b, acc)  # [BLOCK_M, BLOCK_R] @ [BLOCK_R, BLOCK_N]
        else:
            acc = dot_16(s, b, acc)
    return acc


@triton.jit
def descriptor(
    ptr, N, K, stride, BY_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    G=None, stride_g=None,
):  # fmt: skip
    """Return the descriptor of a matrix [N, K], or of its transpose where columns lie together.

    Or of a stack of G: a tile of one matrix has zeros where that ends, and nothing of the next.
    """
    first, second = (N, K) if BY_ROWS else (K, N)
    FIRST: tl.constexpr = BLOCK_N if BY_ROWS else BLOCK_K
    SECOND: tl.constexpr = BLOCK_K if BY_ROWS else BLOCK_N
    if stride_g is None:
        desc = tl.make_tensor_descriptor(ptr, [first, second], [stride, 1], [FIRST, SECOND])
    else:
        desc = tl.make_tensor_descriptor(
            ptr, [G, first, second], [stride_g, stride, 1], [1, FIRST, SECOND]
        )
    return desc


@triton.jit
def load_tile(desc, g, n, k, BY_ROWS: tl.constexpr):
    """Return the tile at row ``n`` and column ``k`` of a matrix, number ``g`` of a stack."""
    first, second = (n, k) if BY_ROWS else (k, n)
    if len(desc.block_shape) > 2:
        tile = desc.load([g, first, second])
        tile = tl.reshape(tile, tile.shape[1:])
    else:
        tile = desc.load([first, second])
    return tile if BY_ROWS else tile.T


@triton.jit
def store_tile(
    y, rest_desc, first_m, first_n, acc, dtype: tl.constexpr, HALVES: tl.constexpr, bounds=None
):
    """Write a tile, and what ``rest_desc`` has there added, by descriptors as wide or half as wide.

    A half takes half the shared memory on its way out: room for one more stage of a pipeline.
    With ``bounds``, where a segment's rows and all columns end, y is a pointer: a descriptor would
    go on to the rows of the next segment.
    """
    if HALVES == 1:
        _store(y, rest_desc, first_m, first_n, acc, dtype, bounds)
    else:
        BLOCK_M: tl.constexpr = acc.shape[0]
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        _store(y, rest_desc, first_m, first_n, left, dtype, bounds)
        _store(y, rest_desc, first_m, first_n + HALF, right, dtype, bounds)


@triton.jit
def _store(y, rest_desc, first_m, first_n, tile, dtype: tl.constexpr, bounds):
    if rest_desc is not None:
        tile += rest_desc.load([first_m, first_n]).to(tl.float32)
    if bounds is None:
        y.store([first_m, first_n], tile.to(dtype))
    else:
        offs_m = first_m + tl.arange(0, tile.shape[0])
        offs_n = first_n + tl.arange(0, tile.shape[1])
        mask = (offs_m < bounds[0])[:, None] & (offs_n < bounds[1])[None, :]
        y_tile = y + offs_m.to(tl.int64)[:, None] * bounds[1] + offs_n[None, :]
        tl.store(y_tile, tile.to(dtype), mask=mask)


@triton.jit
def terms(tile):
    """Return three bfloat16 tiles whose sum is ``tile``, all of its sign: it is cut, not rounded.

    An infinity then meets no other of the opposite sign. Nor a zero, whose product with it is NaN:
    a term for which nothing is left is a share of the first, too small to count.
    """
    wide = tile.to(tl.float32)
    high = wide.to(tl.uint32, bitcast=True) & 0xFFFF0000
    first = high.to(tl.float32, bitcast=True)
    rest = tl.where(tl.abs(first) < float("inf"), wide - first, first)
    second = tl.where(rest == 0.0, first * SHARE, rest)
    middle = second.to(tl.uint32, bitcast=True) & 0xFFFF0000
    last = second - middle.to(tl.float32, bitcast=True)
    low = tl.where(tl.abs(last) > 0.0, last, first * SHARE)
    return _upper(high), _upper(middle), _upper(low.to(tl.uint32, bitcast=True))


@triton.jit
def _upper(bits):
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return what kernels sum products of ``dtype`` in."""
    return tl.float64 if dtype == torch.float64 else tl.float32
