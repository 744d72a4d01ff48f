"""What several kernels do to a tile: offsets, and products of tiles of mixed dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def wrapped(offs, size):
    """Return offs as int64 with those past the end sent to 0: loads need no mask, stores do."""
    return tl.where(offs < size, offs, 0).to(tl.int64)


@triton.jit
def dot(left, right, acc, PRECISION: tl.constexpr):
    """Return acc + left @ right; tiles of different dtype meet in float32."""
    if left.dtype != right.dtype:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=acc.dtype)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what products of ``dtype`` are summed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the accumulator's dtype as kernels name it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def low_rank_precision(base: torch.dtype) -> str:
    """Return how float32 tiles of the low-rank path are multiplied.

    Under a 16-bit base one operand is exact in TF32, so three TF32 products on the tensor cores
    give a float32 result; a float32 base asks for IEEE float32.
    """
    return "tf32x3" if base.itemsize == 2 else "ieee"
