"""The dropout mask as a function of a seed and a position, so that it is never stored.

Element (m, k) of an [M, K] input belongs to group ``i = m * ceil(K / 4) + k // 4``. SplitMix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) hashes
``seed + i * GAMMA`` to 64 bits, the group's four elements take 16 of them each, lowest first, and
one is kept when its bits, as a signed integer, are at least ``lowest_kept(p)``. Every
implementation on every device draws this same mask: `fastlora_kernels.dropout` is the twin of
this file in Triton.
"""

from __future__ import annotations

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
    groups = -(-columns // GROUP)
    z = torch.arange(rows.start * groups, rows.stop * groups, device=seed.device)
    z.mul_(GAMMA).add_(seed)
    bits = _mixed(z, torch.empty_like(z)).view(torch.int16).view(len(rows), GROUP * groups)
    return bits[:, :columns] >= lowest_kept(p)


class KeptOnes:
    """The mask as the integers 1 (kept) and 0, drawn a block of rows at a time.

    Every block is drawn in the same memory. On a CPU 16-bit integers are several times as fast as
    comparisons and Booleans, which PyTorch does not vectorise.
    """

    def __init__(self, seed: Tensor, rows: int, columns: int, p: float) -> None:
        self.columns, self.p = columns, p
        self.groups = -(-columns // GROUP)
        self.first = torch.arange(rows * self.groups, device=seed.device).mul_(GAMMA).add_(seed)
        self.z, self.other = torch.empty_like(self.first), torch.empty_like(self.first)

    def draw(self, rows: range) -> Tensor:
        """Return [len(rows), columns], int16; the next call overwrites it."""
        size = len(rows) * self.groups
        z, other = self.z[:size], self.other[:size]
        skipped = _signed(rows.start * self.groups * GAMMA % (1 << 64))
        torch.add(self.first[:size], skipped, out=z)
        bits = _mixed(z, other).view(torch.int16)
        lowest = lowest_kept(self.p)
        if lowest == -32768:
            bits.fill_(1)
        else:
            bits.clamp_(lowest - 1, lowest).sub_(lowest - 1)
        return bits.view(len(rows), GROUP * self.groups)[:, : self.columns]


def _mixed(z: Tensor, other: Tensor) -> Tensor:
    """Hash every element of ``z`` in place; ``other`` is as large and is overwritten."""
    _xor_shifted(z, 30, other).mul_(MIX_1)
    _xor_shifted(z, 27, other).mul_(MIX_2)
    return _xor_shifted(z, 31, other)


def _xor_shifted(z: Tensor, shift: int, other: Tensor) -> Tensor:
    # torch shifts int64 arithmetically; the mask clears the copies of the sign bit.
    torch.bitwise_right_shift(z, shift, out=other)
    return z.bitwise_xor_(other.bitwise_and_((1 << (64 - shift)) - 1))
