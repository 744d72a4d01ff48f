# SPDX-License-Identifier: Apache-2.0
"""Adds partial sums up in a fixed order, those of several results in one launch."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels import lists
from fastlora_kernels.configs import Config, cdiv
from fastlora_kernels.launch import Launch
from fastlora_kernels.locate import locate, number_of, pointer_of
from fastlora_kernels.tiles import triton_dtype

# Of kernels that go over elements one by one: those of a program, and how it runs.
BLOCK = 1024
KEPT_SCALE = 1  # the row of it in the numbers of segments; that of their scalings is 0
CONFIG = Config(block_m=16, block_n=16, num_warps=4, num_stages=2)


@triton.jit
def sum_kernel(
    part_ptrs, out_ptrs, offsets_ptr, number_ptrs,
    sizes, odd_parts, odd_rows, scales,
    ROW: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, block = locate(tl.program_id(0), sizes, BLOCK)
    size = tl.cast(number_of(i, sizes, tl.int64), tl.int64)
    part_ptr = pointer_of(i, part_ptrs)
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK,), dtype=ACC)
    parts = tl.cast(number_of(i, odd_parts, tl.int32), tl.int32) // 2 - 1
    out_ptr = pointer_of(i, out_ptrs)
    first = tl.cast(0, tl.int32)
    scale = tl.cast(number_of(i, scales, ACC), ACC)
    if offsets_ptr is not None:
        g = tl.program_id(1)
        rows = tl.cast(number_of(i, odd_rows, tl.int32), tl.int32) // 2 - 1
        if rows > 0:  # of a part, which is numbered as `rows_of` numbers it
            start = tl.load(offsets_ptr + g)
            parts = tl.cdiv(tl.load(offsets_ptr + g + 1) - start, rows)
            first = start // rows + g
            out_ptr += g * size
            number_ptr = pointer_of(i, number_ptrs) + ROW * tl.num_programs(1)
            scale = tl.load(number_ptr + g).to(ACC)
        elif g > 0:  # the first program has added up all
            parts = tl.cast(0, tl.int32)
            mask = offs < 0
    for part in range(first, first + parts):
        acc += tl.load(part_ptr + part * size + offs, mask=mask, other=0.0)
    acc *= scale
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def add_up(
    parts: Sequence[Tensor], outs: Sequence[Tensor], scales: Sequence[float],
    offsets: Tensor | None = None, numbers: Sequence[Tensor | None] | None = None,
    rows: Sequence[int] | None = None, row: int = 0,
) -> None:  # fmt: skip
    """Write ``scales[i]`` times the sum of ``parts[i]`` [parts, ...] to ``outs[i]``, contiguous.

    With ``offsets`` [G + 1] of segments an out is [G, ...], and each of its G has the parts of its
    own rows, ``rows[i]`` of them a part, and its own scale, in that ``row`` of ``numbers[i]``; or
    it is as without them, where ``rows[i]`` is 0.
    """
    G = 1 if offsets is None else len(offsets) - 1
    rows = rows or [0] * len(outs)
    sizes = tuple(out.numel() // (G if n else 1) for out, n in zip(outs, rows, strict=True))
    blocks = sum(cdiv(size, BLOCK) for size in sizes)
    # Triton makes programs for what 16 divides, and for 1, even where `do_not_specialize` names a
    # tuple: numbers of parts, which change with M, are odd and larger.
    odd = tuple(2 * len(of_one) + 3 for of_one in parts)
    odd_rows = tuple(2 * n + 3 for n in rows)
    rest = sizes, odd, odd_rows, lists.alike(scales), row, triton_dtype(parts[0].dtype), BLOCK
    Launch(sum_kernel, (blocks, G), CONFIG, *rest)(tuple(parts), tuple(outs), offsets, numbers)
