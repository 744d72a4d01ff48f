# SPDX-License-Identifier: Apache-2.0
"""The dropout mask, drawn from a seed and a position inside any kernel; PyTorch draws the same.

Element (m, k) of an [M, K] tensor belongs to group ``m * ceil(K / 4) + k // 4``; SplitMix64 of
``seed + group * GAMMA`` gives the group 64 bits, 16 an element, lowest first; an element is kept
when they are, as a signed integer, at least ``keep_from``: 65536 p - 32768.
"""

import triton
import triton.language as tl
from torch import Tensor

GAMMA: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2: tl.constexpr = tl.constexpr(0x94D049BB133111EB)


def kept_scale(p: float) -> float:
    """Return what a kept element is multiplied by; 0 when p is 1."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def keep_scales(
    seeds: tuple[Tensor | None, ...], p: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return `kept_scale` of each mask, and its ``keep_from``; without a seed none drops."""
    drop = [0.0 if seed is None else p for seed, p in zip(seeds, p, strict=True)]
    return tuple(map(kept_scale, drop)), tuple(min(round(q * 65536), 65535) - 32768 for q in drop)


@triton.jit
def keep_tile(seed_ptr, offs_m, start_k, K, keep_from, BLOCK_K: tl.constexpr):
    """Return the tile [BLOCK_M, BLOCK_K] of the mask from column start_k (a multiple of 4)."""
    groups = start_k // 4 + tl.arange(0, BLOCK_K // 4)
    position = offs_m.to(tl.int64)[:, None] * tl.cdiv(K, 4) + groups[None, :]
    z = tl.load(seed_ptr).to(tl.uint64) + position.to(tl.uint64) * GAMMA
    z = (z ^ (z >> 30)) * MIX_1
    z = (z ^ (z >> 27)) * MIX_2
    z = z ^ (z >> 31)
    low = z.to(tl.uint32)
    high = (z >> 32).to(tl.uint32)
    even = tl.join(low.to(tl.int16), high.to(tl.int16))
    odd = tl.join((low >> 16).to(tl.int16), (high >> 16).to(tl.int16))
    bits = tl.join(even, odd)  # [BLOCK_M, BLOCK_K / 4, 2, 2], last dimension fastest
    return tl.reshape(bits, (offs_m.shape[0], BLOCK_K)) >= keep_from
