# SPDX-License-Identifier: Apache-2.0
"""Adapters that are each for some of the rows, joined to stacks: fewer and larger products."""

import bisect
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fastlora.operator.operands import Operands, Segments


def together(operands: Sequence[Operands]) -> list[Operands]:
    """Return operands in which neighbouring segments of one size are one, with stacked factors."""

    def kind(numbered: tuple[int, Operands]) -> Any:
        i, (w, a, _, _, _, scaling, p, _) = numbered
        size = w.stop - w.start if _is_cut(numbered[1]) else 0
        return (w.start - size * i, size, a.shape, a.dtype, scaling, p) if size else i

    found = []
    for _, group in itertools.groupby(enumerate(operands), kind):
        first, *others = (one for _, one in group)
        if others:
            a, b = (torch.stack([first[j], *(one[j] for one in others)]) for j in (1, 2))
            first = first._replace(w=slice(first.w.start, others[-1].w.stop), a=a, b=b)
        found.append(first)
    return found


def stacked(operands: Sequence[Operands], M: int) -> list[Operands]:
    """Return operands in which a projection has all that are for some of M rows as one stack.

    Its factors have zeros where rows have no adapter, and where one's rank is below the others'.
    """
    groups = [(cut, list(group)) for cut, group in itertools.groupby(operands, _is_cut)]
    rows = [[(one.w.start, one.w.stop) for one in group] for cut, group in groups if cut]
    # Those without rows stand behind all others: their gradients are zero.
    empty = max(sum(start == stop for start, stop in of) for of in rows)
    ends, found = [*sorted({0, M}.union(*itertools.chain(*rows))), *[M] * empty], []
    for cut, group in groups:
        if cut:
            found[-1] = _stack(found[-1], group, ends)
        else:
            found += group
    return found


def _is_cut(one: Operands) -> bool:
    return type(one.w) is slice and one.w.start is not None


def _stack(base: Operands, group: Sequence[Operands], ends: list[int]) -> Operands:
    rank, last, seed = max(len(one.a) for one in group), len(ends) - 1, None
    dtype = functools.reduce(torch.promote_types, (one.a.dtype for one in group))
    (_, a, b, *_), numbers = group[0], [(1.0, 0.0)] * last
    if len(group) < last:  # some rows have none
        a = a.new_zeros(rank, a.shape[1], dtype=dtype)
        b = b.new_zeros(len(b), rank, dtype=dtype)
    a, b = [a] * last, [b] * last
    for one in group:
        last -= one.w.start == one.w.stop
        g = bisect.bisect_left(ends, one.w.start) if one.w.start < one.w.stop else last
        missing = rank - len(one.a)
        a[g], b[g] = one.a.to(dtype), one.b.to(dtype)
        if missing:
            a[g], b[g] = F.pad(a[g], (0, 0, 0, missing)), F.pad(b[g], (0, missing))
        numbers[g] = one.scaling, 0.0 if one.seed is None else one.p
        seed = seed if one.seed is None else one.seed
    of = Segments(tuple(ends), *zip(*numbers, strict=True))
    return base._replace(a=torch.stack(a), b=torch.stack(b), seed=seed, scaling=of)
