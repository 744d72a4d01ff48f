"""Tile shapes: what a config is, which are valid for a chip, and which one a kernel runs with."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Up to this rank the program that has a tile of dy for db multiplies it by b on the way. With
# column tiles of 128 the float32 partial sums of ds, written and read, are then R / 32 of a 16-bit
# dy. Above it ds has programs of its own in the same launch, among those of db that read the same
# rows at the same time, so that the second reader finds them in the L2 cache.
ON_THE_WAY_RANK = 32


@dataclass(frozen=True)
class Chip:
    """What a config depends on: compute capability, shared memory a block (bytes), processors."""

    capability: tuple[int, int]
    shared_memory: int
    processors: int

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Chip:
        if device.type != "cuda":  # the interpreter: nothing is limited
            return Chip((0, 0), 1 << 30, 1)
        p = torch.cuda.get_device_properties(device)
        # ROCm has capabilities too, of other numbers: gfx942 is (9, 4) and no Hopper.
        capability = (0, 0) if torch.version.hip else (p.major, p.minor)
        return Chip(capability, p.shared_memory_per_block_optin, p.multi_processor_count)


@dataclass(frozen=True)
class Config:
    """Tile sizes and how a program runs.

    ``block_m`` rows; ``block_n`` columns of the output, or of the tall input that is read once;
    ``block_k`` of the reduced dimension where there is one; ``group_m`` row tiles share a pass
    over the columns. ``block_r`` is the widest tile of the rank: a higher rank takes several.
    """

    block_m: int
    block_n: int
    block_k: int = 16
    block_r: int = 128
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3

    def rank_tile(self, r: int) -> int:
        """Return the rank tile for rank r: a power of two that ``tl.dot`` takes."""
        return min(max(16, 1 << (r - 1).bit_length()), self.block_r)


def cdiv(size: int, block: int) -> int:
    """Return how many blocks cover ``size``; Triton's own takes 3 µs outside a kernel."""
    return -(-size // block)


def kind_of(base: torch.dtype, adapter: torch.dtype) -> str:
    """Return which products a kernel makes: "16" bits, "mixed" (float32 adapters) or "32" bits."""
    if base.itemsize > 2:
        return "32"
    return "16" if adapter == base else "mixed"


def is_valid(config: Config, kernel: str, kind: str, r: int, dropout: bool, chip: Chip) -> bool:
    """Return whether ``config`` can run ``kernel`` ("product", "shrink", "columns") on ``chip``.

    Tiles must be powers of two of at least 16, warps a power of two of at most 32; the pipeline
    must fit a block's shared memory: one step of both operands for each of ``num_stages``, less
    one where the tensor cores take operands from registers; and a thread must hold its
    accumulators in registers, fewer of them where it also draws a dropout mask of the same tile.
    """
    if config.num_warps not in (1, 2, 4, 8, 16, 32):
        return False
    m, n, k, r_tile = config.block_m, config.block_n, config.block_k, config.rank_tile(r)
    if any(b < 16 or b & (b - 1) for b in (m, n, k, r_tile)):
        return False
    if kind == "32" and dropout and chip.capability[0] == 10:
        # Triton 3.7 multiplies a masked float32 tile of 64 rows in TF32 there, asked or not.
        rows = {"product": 0, "shrink": m, "columns": max(m, n)}[kernel]
        if rows >= 64:
            return False
    if kind == "mixed" and kernel == "columns" and r > ON_THE_WAY_RANK and n > 64:
        return False  # the split terms of a wider tile of t, times b, overflow the registers
    wide = 2 if kind == "16" else 4
    base = 4 if kind == "32" else 2
    step = {
        "product": (m + n) * k * base,
        "shrink": m * k * base + r_tile * k * wide,
        # Beside t comes a tile of s, or one of b; the step that drops has no b.
        "columns": m * n * base + (m if dropout else max(m, n)) * r_tile * wide,
    }[kernel]
    accumulators = {"product": m * n, "shrink": m * r_tile, "columns": n * r_tile}[kernel]
    wgmma, from_shared = chip.capability[0] == 9, chip.capability[0] in (9, 10)
    most = 128
    if dropout:
        most = 32 if kernel == "shrink" else 64
    elif kernel == "columns" or (kind == "mixed" and not wgmma):
        # Without wgmma operands pass through registers too; sm_100's tensor memory holds 512
        # columns, and Triton 3.7 compiles a kernel that needs more to a trap.
        most = 64
    fits = accumulators <= most * 32 * config.num_warps
    copies = config.num_stages - (0 if from_shared or dropout else 1)
    return fits and step * copies <= chip.shared_memory


# By kernel and kind, best first; `default_config` picks. None is measured yet.
DEFAULTS: dict[tuple[str, str], tuple[Config, ...]] = {
    ("product", "16"): (
        Config(128, 256, 64, block_r=32, num_warps=8, num_stages=3),
        Config(128, 128, 64, block_r=32, num_warps=8, num_stages=3),
        Config(128, 128, 32, block_r=32, num_warps=8, num_stages=3),
    ),
    ("product", "mixed"): (
        Config(128, 256, 64, block_r=16, num_warps=8, num_stages=3),
        Config(128, 128, 64, block_r=16, num_warps=8, num_stages=3),
        Config(128, 128, 32, block_r=16, num_warps=8, num_stages=3),
    ),
    ("product", "32"): (Config(64, 64, 32, block_r=32, num_warps=4, num_stages=2),),
    ("product", "unaligned"): (Config(64, 64, 32, block_r=16, num_warps=4, num_stages=2),),
    ("shrink", "16"): (
        Config(64, 16, 64, num_warps=4, num_stages=4),
        Config(64, 16, 64, num_warps=8, num_stages=4),
    ),
    ("shrink", "mixed"): (
        Config(64, 16, 64, block_r=16, num_warps=4, num_stages=3),
        Config(64, 16, 32, block_r=64, num_warps=4, num_stages=3),
    ),
    ("shrink", "32"): (Config(32, 16, 64, block_r=32, num_warps=4, num_stages=3),),
    ("columns", "16"): (
        Config(64, 128, num_warps=4, num_stages=3),
        Config(64, 128, num_warps=8, num_stages=3),
        Config(32, 128, num_warps=8, num_stages=3),
    ),
    ("columns", "mixed"): (
        Config(32, 128, block_r=16, num_warps=8, num_stages=3),
        Config(32, 64, block_r=16, num_warps=8, num_stages=3),
    ),
    ("columns", "32"): (
        Config(32, 64, block_r=16, num_warps=4, num_stages=2),
        Config(32, 32, block_r=16, num_warps=4, num_stages=2),
    ),
}
# The kernel behind each launcher.
KERNEL_OF = {"product": "product", "shrink": "shrink", "ds_db": "columns", "da": "columns"}
# Runs anywhere: where nothing above fits, and where elements must be loaded one by one.
SMALL = Config(16, 32, 32, block_r=16, num_warps=4, num_stages=2)


def default_config(
    kernel: str, kind: str, r: int, dropout: bool, chip: Chip, aligned: bool = True
) -> Config:
    """Return the valid config of ``kernel`` with the widest rank tile, of those the first listed.

    A tile narrower than the rank has the tall input read again for the rest of it.
    ``aligned`` is false when rows do not start at multiples of 16 bytes: every element is then
    loaded by itself and needs a register for its address.
    """
    valid = candidates(kernel, kind, r, dropout, chip, aligned)
    return max(valid, key=lambda c: c.rank_tile(r), default=SMALL)


def candidates(
    kernel: str, kind: str, r: int, dropout: bool, chip: Chip, aligned: bool = True
) -> list[Config]:
    """Return the configs of ``kernel`` that are worth measuring on ``chip``: the valid ones."""
    listed = DEFAULTS.get((kernel, kind if aligned else "unaligned"), ())
    return [c for c in listed if is_valid(c, kernel, kind, r, dropout, chip)]
