"""What several kernels do to a tile: offsets, and products of tiles of mixed dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def wrapped(offs, size):
    """Return offs as int64, those past the end sent inside: loads need no mask, stores do.

    The remainder keeps what the compiler knows of contiguity when 16 divides size.
    """
    return (offs % size).to(tl.int64)


@triton.jit
def dot(left, right, acc):
    """Return acc + left @ right for a tile of the base's dtype and one of the adapters'.

    Equal dtypes go to one product (IEEE for float32). A float32 ``right`` under a 16-bit
    ``left`` is split into three bfloat16 terms, and a float16 ``left`` into two, which hold every
    bit: the tensor cores then give a float32 result. That sum is added to acc in IEEE float32.
    """
    if left.dtype == right.dtype:
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
def terms(tile):
    """Return three bfloat16 tiles whose sum is ``tile``; an infinity is all in the first."""
    wide = tile.to(tl.float32)
    high = wide.to(tl.bfloat16)
    rest = tl.where(tl.abs(wide) < float("inf"), wide - high.to(tl.float32), 0.0)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what products of ``dtype`` are summed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the accumulator's dtype as kernels name it."""
    return tl.float64 if dtype == torch.float64 else tl.float32
