# SPDX-License-Identifier: Apache-2.0
"""Which segment the rows of a program are of, where rows are cut.

Each segment has an adapter of its own, or a weight, as the experts of a mixture have, or both.

The offsets [G + 1] lie in memory, and so do the numbers of a projection's segments, [3, G]: their
scalings, what kept elements are multiplied by, and ``keep_from`` of `keep_tile`.
"""

import triton
import triton.language as tl

from fastlora_kernels.locate import number_of


@triton.jit
def row_tiles(M, offsets_ptr, G, BLOCK):
    """Return how many tiles of BLOCK rows there are; with segments some of them are empty."""
    tiles = tl.cdiv(M, BLOCK)
    if offsets_ptr is not None:
        tiles = M // BLOCK + G
    return tiles


@triton.jit
def rows_of(tile, M, offsets_ptr, G, BLOCK):
    """Return the first row of a row tile, the end of those that it may have, and its segment.

    The tiles of segment g are numbered from offsets[g] // BLOCK + g on: there is room for as many
    as it needs, whatever the other segments are. An empty one starts at its end or behind it.
    """
    first = tile * BLOCK
    end = M
    g = tl.cast(0, tl.int32)
    if offsets_ptr is not None:
        beyond = tl.cast(G, tl.int32)
        while beyond - g > 1:
            middle = (g + beyond) // 2
            later = tl.load(offsets_ptr + middle) // BLOCK + middle > tile
            beyond = tl.where(later, middle, beyond)
            g = tl.where(later, g, middle)
        start = tl.load(offsets_ptr + g)
        end = tl.load(offsets_ptr + g + 1)
        first = start + (tile - start // BLOCK - g) * BLOCK
    return first, end, g


@triton.jit
def stack_at(pointers, g, strides):
    """Return pointers to tensor number ``g`` of each stack."""
    found = ()
    for i in tl.static_range(len(pointers)):
        offset = g.to(tl.int64) * number_of(i, strides, tl.int64)
        found = found + (pointers[i] + offset,)
    return found


@triton.jit
def own_numbers(numbers, number_ptrs, at, dtype: tl.constexpr):
    """Return number ``at`` of each projection, as `number_of` takes them, for those of all rows.

    Segment g's scaling is at g, what it multiplies kept elements by at G + g, ``keep_from`` at
    2 G + g.
    """
    found = numbers
    if number_ptrs is not None:
        found = ()
        for i in tl.static_range(len(number_ptrs)):
            found = found + (tl.load(number_ptrs[i] + at).to(dtype),)
    return found
