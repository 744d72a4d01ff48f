# SPDX-License-Identifier: Apache-2.0
"""The dropout mask as a function of a seed and a position, so that it is never stored.

Element (m, k) of an [M, K] input belongs to group ``i = m * ceil(K / 4) + k // 4``. SplitMix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) hashes
``seed + i * GAMMA`` to 64 bits, the group's four elements take 16 of them each, lowest first, and
one is kept when its bits, as a signed integer, are at least ``lowest_kept(p)``. Every
implementation on every device draws this same mask: `fastlora_kernels.dropout` is the twin of
this file in Triton.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

GROUP = 4


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


GAMMA = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)


def new_seed(device: torch.device) -> Tensor:
    """Draw a seed ([1], int64) from torch's generator for ``device``, without synchronising."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def lowest_kept(p: float) -> int:
    """Return the lowest 16-bit signed integer that keeps an element: p to within 1 / 131,072."""
    return min(round(p * 65536), 65535) - 32768


def kept_scale(p: float) -> float:
    """Return what a kept element is multiplied by, ``1 / (1 - p)``; 0 when p is 1."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def keep_mask(seed: Tensor, rows: range, columns: int, p: float) -> Tensor:
    """Return [len(rows), columns]: True where an input ``columns`` wide is kept in ``rows``."""
    # In new memory each time: under vmap there may be a seed for each sample.
    z = _mixed(torch.add(*_numbers(seed, rows, columns)), None, None)
    return z.view(torch.int16)[:, :columns] >= lowest_kept(p)


# 1.0 of a 16-bit dtype as the integer of the same bits.
_ONE_BITS = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}


def kept_ones(
    seed: Tensor, shape: Sequence[int], p: float, dtype: torch.dtype, rows: int, begin: int = 0
) -> Iterator[Tensor]:
    """Yield the mask of an [M, K] input as ones (kept) and zeros, ``rows`` of them at a time.

    Its rows are those from ``begin`` on of what the seed was drawn for.
    All are drawn in the same memory. On a CPU 16-bit integers are several times as fast as
    comparisons and Booleans, which PyTorch does not vectorise, and as conversions.
    """
    (M, K), lowest = shape, lowest_kept(p)
    firsts, groups = _numbers(seed, range(begin, begin + M), K)
    z = torch.empty(rows, groups.shape[0], dtype=torch.int64, device=seed.device)
    other = torch.empty_like(z)
    for first in range(0, max(1, M), max(1, rows)):
        here = min(rows, M - first)
        mine = torch.add(firsts[first : first + here], groups, out=z[:here])
        bits = _mixed(mine, mine, other[:here]).view(torch.int16)
        if lowest == -32768:
            bits.fill_(1)
        else:
            bits.clamp_(lowest - 1, lowest).sub_(lowest - 1)
        one = _ONE_BITS.get(dtype)
        ones = bits.to(dtype) if one is None else bits.mul_(one).view(dtype)
        yield ones[:, :K]


def _numbers(seed: Tensor, rows: range, columns: int) -> tuple[Tensor, Tensor]:
    """Return what is hashed as a sum: of each row [M, 1], and of each group in a row [groups]."""
    groups = -(-columns // GROUP)
    first = torch.arange(rows.start, rows.stop, device=seed.device)
    first = first.mul_(_signed(groups * GAMMA % (1 << 64))) + seed
    return first.unsqueeze(1), torch.arange(groups, device=seed.device).mul_(GAMMA)


def _mixed(z: Tensor, out: Tensor | None, other: Tensor | None) -> Tensor:
    """Return the hash of every element of ``z``, in ``out`` and ``other`` where these are given."""
    for shift, factor in ((30, MIX_1), (27, MIX_2), (31, 1)):
        # torch shifts int64 arithmetically; the mask clears the copies of the sign bit.
        shifted = torch.bitwise_right_shift(z, shift, out=other)
        z = torch.bitwise_xor(z, shifted.bitwise_and_((1 << (64 - shift)) - 1), out=out)
        if factor != 1:
            z.mul_(factor)
    return z
