# SPDX-License-Identifier: Apache-2.0
"""Which projection a program is of, where several of one input (q, k, v; gate, up) share a launch.

What differs between the projections goes to a kernel as tuples. A program that has to find its
projection at run time chooses among their items by `pointer_of` and `number_of`, on scalars, so
that loads stay pipelined.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

MOST = 4  # projections: the compiler makes code for each


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


def alike(values: Sequence) -> tuple:
    """Return the values as `number_of` takes them: one where all are equal.

    What the compiler knows of that one, that it is 1 above all, then holds for all.
    """
    return (values[0],) if all(v == values[0] for v in values) else tuple(values)


def lengths(tensors: Sequence[Tensor | None], dim: int) -> tuple[int, ...]:
    """Return the sizes along ``dim``, 0 for None: a projection without an adapter has rank 0."""
    return tuple(0 if t is None else t.shape[dim] for t in tensors)


def strides(tensors: Sequence[Tensor | None]) -> tuple[tuple[int, ...], ...]:
    """Return the strides of each dimension as `number_of` takes them; None goes with any other."""
    there = next((t.stride() for t in tensors if t is not None), (0, 0))
    each = [there if t is None else t.stride() for t in tensors]
    return tuple(map(alike, zip(*each, strict=True)))


def filled(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return the tensors with another one in the place of each None, for `pointer_of`."""
    there = [t for t in tensors if t is not None]
    if len(there) in (0, len(tensors)):
        return tensors
    return tuple([there[0] if t is None else t for t in tensors])


def stacked(ranks: Sequence[int]) -> int:
    """Return the rank of one factor that takes as much room as those of all projections.

    What a config is chosen for and judged by where a program keeps a sum for each projection.
    """
    return len(ranks) * max(16, 1 << (max(ranks) - 1).bit_length())
