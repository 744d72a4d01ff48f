# SPDX-License-Identifier: Apache-2.0
"""Adds partial sums up in a fixed order, those of several results in one launch."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.configs import Config, cdiv
from fastlora_kernels.launch import Launch
from fastlora_kernels.locate import alike, locate, number_of, pointer_of
from fastlora_kernels.tiles import triton_dtype

# Of kernels that go over elements one by one: those of a program, and how it runs.
BLOCK = 1024
CONFIG = Config(block_m=16, block_n=16, num_warps=4, num_stages=2)


@triton.jit
def sum_kernel(
    part_ptrs, out_ptrs,
    sizes, odd_parts, scales,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, block = locate(tl.program_id(0), sizes, BLOCK)
    size = tl.cast(number_of(i, sizes, tl.int64), tl.int64)
    part_ptr = pointer_of(i, part_ptrs)
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK,), dtype=ACC)
    parts = tl.cast(number_of(i, odd_parts, tl.int32), tl.int32) // 2 - 1
    for part in range(parts):
        acc += tl.load(part_ptr + part * size + offs, mask=mask, other=0.0)
    acc *= tl.cast(number_of(i, scales, ACC), ACC)
    out_ptr = pointer_of(i, out_ptrs)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def add_up(parts: Sequence[Tensor], outs: Sequence[Tensor], scales: Sequence[float]) -> None:
    """Write ``scales[i]`` times the sum of ``parts[i]`` [parts, ...] to ``outs[i]``, contiguous."""
    sizes = tuple(out.numel() for out in outs)
    blocks = sum(cdiv(size, BLOCK) for size in sizes)
    # Triton makes programs for what 16 divides, and for 1, even where `do_not_specialize` names a
    # tuple: numbers of parts, which change with M, are odd and larger.
    odd = tuple(2 * len(of_one) + 3 for of_one in parts)
    rest = sizes, odd, alike(scales), triton_dtype(parts[0].dtype), BLOCK
    Launch(sum_kernel, (blocks,), CONFIG, *rest)(tuple(parts), tuple(outs))
