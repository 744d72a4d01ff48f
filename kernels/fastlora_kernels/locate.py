# SPDX-License-Identifier: Apache-2.0
"""Which projection a program is of, where several of one input (q, k, v; gate, up) share a launch.

What differs between the projections goes to a kernel as tuples. A program that has to find its
projection at run time chooses among their items by `pointer_of` and `number_of`, on scalars, so
that loads stay pipelined.
"""

import triton
import triton.language as tl


@triton.jit
def locate(tile, sizes, BLOCK: tl.constexpr):
    """Return the projection that tile number ``tile`` is of, and its number among those."""
    i = tl.cast(0, tl.int32)
    first = tl.cast(0, tl.int32)
    for j in tl.static_range(len(sizes) - 1):
        end = first + tl.cdiv(sizes[j], BLOCK)
        past = (i == j) & (tile >= end)
        first = tl.where(past, end, first)
        i += past.to(tl.int32)
    return i, tile - first


@triton.jit
def pointer_of(i, pointers):
    """Return the pointer numbered ``i``."""
    chosen = pointers[0]
    for j in tl.static_range(1, len(pointers)):
        if i == j:
            chosen = pointers[j]
    return chosen


@triton.jit
def number_of(i, numbers, dtype: tl.constexpr):
    """Return the number of projection ``i`` as ``dtype``; a single one is for all, and as it is."""
    chosen = numbers[0]
    if len(numbers) > 1:
        chosen = tl.cast(chosen, dtype)
        for j in tl.static_range(1, len(numbers)):
            if i == j:
                chosen = tl.cast(numbers[j], dtype)
    return chosen
