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
    z = _xor_shifted(z, 30).mul_(MIX_1)
    z = _xor_shifted(z, 27).mul_(MIX_2)
    z = _xor_shifted(z, 31)
    bits = z.view(torch.int16).view(len(rows), GROUP * groups)[:, :columns]
    return bits >= lowest_kept(p)


def _xor_shifted(z: Tensor, shift: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask clears the copies of the sign bit.
    return z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1))
