# SPDX-License-Identifier: Apache-2.0
"""What launchers make of the tensors of several projections, for kernels that `locate` theirs."""

from collections.abc import Sequence

from torch import Tensor

from fastlora_kernels.configs import cdiv

MOST = 4  # projections: the compiler makes code for each
# Offsets [G + 1], int32, and the numbers [3, G] of each projection, None of one without stacks.
Segments = tuple[Tensor, "Sequence[Tensor | None]"]


def alike(values: Sequence) -> tuple:
    """Return the values as `number_of` takes them: one where all are equal.

    What the compiler knows of that one, that it is 1 above all, then holds for all.
    """
    return (values[0],) if all(v == values[0] for v in values) else tuple(values)


def lengths(tensors: Sequence[Tensor | None], dim: int) -> tuple[int, ...]:
    """Return the sizes along ``dim``, 0 for None: a projection without an adapter has rank 0."""
    return tuple(0 if t is None else t.shape[dim] for t in tensors)


def strides(tensors: Sequence[Tensor | None], dims: int = 0) -> tuple[tuple[int, ...], ...]:
    """Return the strides of each dimension as `number_of` takes them; None goes with any other.

    Those of ``dims`` dimensions at least: of factors that are no stack the first is 0.
    """
    there = next((t.stride() for t in tensors if t is not None), (0, 0))
    each = [there if t is None else t.stride() for t in tensors]
    found = tuple(map(alike, zip(*each, strict=True)))
    return ((0,),) * (dims - len(found)) + found


def count_of(M: int, G: int, block: int) -> int:
    """Return what `row_tiles` does."""
    return M // block + G if G else cdiv(M, block)


def of_few(segments: Segments | None, few: Sequence[int]) -> Segments | None:
    """Return segments as some of the projections have them, None if none of these is cut."""
    own = tuple([segments[1][i] for i in few]) if segments else ()
    return (segments[0], own) if any(numbers is not None for numbers in own) else None


def numbers_of(segments: Segments | None) -> tuple:
    """Return the offsets, each projection's numbers, and how many segments there are."""
    if segments is None:
        return None, None, 0
    offsets, numbers = segments
    return offsets, filled(numbers), len(offsets) - 1


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
