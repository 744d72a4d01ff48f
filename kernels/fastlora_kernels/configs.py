"""Tile shapes: what a config is, which are valid for a chip, and which one a kernel runs with."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


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
        return Chip((p.major, p.minor), p.shared_memory_per_block_optin, p.multi_processor_count)


@dataclass(frozen=True)
class Config:
    """Tile sizes and how a program runs.

    ``block_m`` rows; ``block_n`` columns of the output, or of the tall input that is read once;
    ``block_k`` of the reduced dimension where there is one; ``group_m`` row tiles share a pass
    over the columns.
    """

    block_m: int
    block_n: int
    block_k: int = 16
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3


def block_r(r: int) -> int:
    """Return the rank tile: a power of two that ``tl.dot`` takes; ranks above 128 take several."""
    return min(max(16, 1 << (r - 1).bit_length()), 128)


def is_valid(config: Config, itemsize: int, r: int, chip: Chip) -> bool:
    """Return whether ``config`` can run on ``chip`` for elements of ``itemsize`` bytes and rank r.

    Tiles must be powers of two of at least 16 and the pipeline, ``num_stages`` steps of both
    operands of the larger product, must fit the shared memory of a block.
    """
    blocks = (config.block_m, config.block_n, config.block_k)
    if any(b < 16 or b & (b - 1) for b in blocks):
        return False
    product = (config.block_m + config.block_n) * config.block_k
    column = config.block_m * (config.block_n + block_r(r))
    step = product if config.block_k > 16 else column
    return step * itemsize * config.num_stages <= chip.shared_memory


# Per kernel and element size in bytes, best first: the first valid one runs. None is measured yet.
DEFAULTS: dict[tuple[str, int], tuple[Config, ...]] = {
    ("product", 2): (
        Config(128, 256, 64, num_warps=8, num_stages=3),
        Config(128, 128, 64, num_warps=8, num_stages=3),
        Config(128, 128, 32, num_warps=8, num_stages=3),
    ),
    ("product", 4): (Config(64, 64, 32, num_warps=4, num_stages=2),),
    ("shrink", 2): (Config(64, 16, 128, num_warps=4, num_stages=4), Config(64, 16, 64)),
    ("shrink", 4): (Config(32, 16, 64, num_warps=4, num_stages=3),),
    ("columns", 2): (
        Config(64, 128, num_warps=4, num_stages=3),
        Config(32, 64, num_warps=4, num_stages=3),
    ),
    ("columns", 4): (Config(32, 64, num_warps=4, num_stages=2),),
}


def default_config(kernel: str, dtype: torch.dtype, r: int, chip: Chip) -> Config:
    """Return the first valid config of ``kernel`` ("product", "shrink" or "columns")."""
    # The interpreter also takes float64, for checking gradients; it has no limits to respect.
    itemsize = min(dtype.itemsize, 4)
    return next(c for c in DEFAULTS[kernel, itemsize] if is_valid(c, itemsize, r, chip))
