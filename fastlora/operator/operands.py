# SPDX-License-Identifier: Apache-2.0
"""Projections of x, each a frozen weight with an adapter or none, and the problem they pose."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

OPS = ("forward", "backward")


class Projection(NamedTuple):
    """What `lora_linears` makes of x: ``x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ``.

    ``weight`` [N, K], ``lora_A`` [R, K], ``lora_B`` [N, R] and ``bias`` [N], dtypes as for
    `lora_linear`. Without ``lora_A`` and ``lora_B`` there is no adapter: x Wᵀ + bias.

    ``scale`` [N], in the dtype of x or float32, multiplies the columns of all but the bias, and has
    a gradient: in DoRA (Liu et al., arXiv:2402.09353) it is the magnitude by the norm. As in PEFT,
    while x is dropped what scale changes in the frozen product is of dropout(x) as well:
    ``x Wᵀ + bias + (scale - 1) · dropout(x) Wᵀ + scale · scaling · dropout(x) Aᵀ Bᵀ``.
    """

    weight: Tensor
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    bias: Tensor | None = None
    scaling: float | Tensor = 1.0
    dropout_p: float = 0.0
    scale: Tensor | None = None


def with_scaling(a: Tensor, b: Tensor, scaling: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return lora_A and lora_B with ``scaling`` in the latter.

    Both as float32 where they are float16: a small product would lose most of its bits.
    """
    if b.dtype == torch.float16:
        a, b = a.float(), b.float()
    return a, b * scaling


class Segments(NamedTuple):
    """How rows are cut, [G + 1], and the scaling and dropout of each of G stacked adapters.

    Where weights are stacked as well, ``ends`` is a tensor on the device of x, which nobody waits
    for, and there is one scaling and one p for all.
    """

    ends: tuple[int, ...] | Tensor
    scalings: tuple[float, ...]
    p: tuple[float, ...]

    def sizes(self) -> list[int]:
        """Return how many rows each segment has."""
        ends = self.ends.tolist() if isinstance(self.ends, Tensor) else self.ends
        return [end - start for start, end in itertools.pairwise(ends)]


class Operands(NamedTuple):
    """A projection as implementations take it: checked, and with dropout's seed drawn.

    ``a`` and ``b`` are None without an adapter; ``seed`` ([1], int64) is None without dropout.
    Without ``w`` the bias [M, N] is y but for the adapters that follow, which are added in place. A
    slice as ``w`` is one more adapter of the projection before, for those rows of it; or several,
    ``a`` and ``b`` stacked, each for as many of the rows. With `Segments` in the place of a scaling
    the projection's own are stacked, and ``w`` [G, N, K] and the bias [G, N] may be.
    A ``scale`` [N] is that of the frozen product: ``b`` has been multiplied by it.
    """

    w: Tensor | slice | None
    a: Tensor | None
    b: Tensor | None
    bias: Tensor | None
    seed: Tensor | None
    scaling: float | Segments
    p: float
    scale: Tensor | None = None

    def width(self) -> int:
        """Return the columns of the output of a projection without an adapter."""
        return self.bias.shape[1] if self.w is None else self.w.shape[-2]


def spread(each: Each, projections: Sequence[Operands]) -> Each:
    """Return what there is of each output, such as dy [M, N], for each projection: its rows."""
    found, outputs, of = [], iter(each), None
    for w, *_ in projections:
        if type(w) is not slice:
            of = next(outputs)
        found.append(of[w] if type(w) is slice and of is not None else of)
    return found


Projections = Sequence[Operands]
# An element for each projection, None where there is none.
Each = Sequence[Tensor | None]


class Problem(NamedTuple):
    """What a plan is chosen for: M tokens, N outputs, K inputs, rank R, dtypes, dropout.

    ``others``: N and R of further projections of the same x, R 0 without an adapter. A bias costs
    every implementation the same and is no part of it.
    """

    M: int
    N: int
    K: int
    R: int = 16
    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.bfloat16
    dropout: bool = False
    others: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(x: Tensor, projections: Projections) -> Problem | None:
        """Return the problem that projections of x [M, K] pose; None if none has an adapter."""
        adapted = [p for p in projections if p.a is not None]
        if not adapted:
            return None
        sizes = [(p.width(), 0) if p.a is None else (*p.b.shape[-2:],) for p in projections]
        dropout = any(p.seed is not None for p in adapted)
        return Problem.together(*x.shape, sizes, x.dtype, adapted[0].a.dtype, dropout)

    @staticmethod
    def together(
        M: int, K: int, sizes: Sequence, dtype: torch.dtype, adapter: torch.dtype, dropout: bool
    ) -> Problem:
        """Return the problem of projections of N and R each, in whatever order they come."""
        (n, r), *others = sorted(sizes, key=lambda size: (size[1] == 0, -size[0], -size[1]))
        return Problem(M, n, K, r, dtype, adapter, dropout, tuple(others))

    def bucketed(self) -> Problem:
        """Return the problem with M and R rounded up to powers of two, R to 16 at least."""
        others = tuple((n, _bucket(r, 16)) for n, r in self.others)
        return self._replace(M=_bucket(self.M or 1, 1), R=_bucket(self.R, 16), others=others)

    def __str__(self) -> str:
        if self.others:
            sizes = ", ".join(f"{n} (r = {r})" if r else f"{n} (frozen)" for n, r in self.others)
            return f"{self._replace(others=())}, and of the same x: {sizes}"
        names = [str(d).removeprefix("torch.") for d in (self.dtype, self.adapter)]
        adapters = f", {names[1]} adapters" if names[0] != names[1] else ""
        dropout = ", dropout" * self.dropout
        return f"{self.M} x {self.N} x {self.K}, r = {self.R}, {names[0]}{adapters}{dropout}"


def _bucket(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length()) if size else 0
