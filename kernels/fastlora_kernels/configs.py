# SPDX-License-Identifier: Apache-2.0
"""Tile shapes: what a config is, which are valid for a chip, and which one a kernel runs with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

# Before 3.6 a wide tile on its way out by TMA takes more shared memory than an sm_100 has.
WIDE_TMA_ON_SM_100 = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)

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
        if torch.version.hip:  # it has capabilities too, of other numbers: gfx942 is (9, 4)
            return Chip((0, 0), p.shared_memory_per_block, p.multi_processor_count)
        shared = p.shared_memory_per_block_optin
        return Chip((p.major, p.minor), shared, p.multi_processor_count)


@dataclass(frozen=True)
class Config:
    """Tile sizes and how a program runs.

    ``block_m`` rows; ``block_n`` columns of the output, or of the tall input that is read once;
    ``block_k`` of the reduced dimension where there is one; ``group_m`` row tiles share a pass
    over the columns. ``block_r`` is the widest tile of the rank: a higher rank takes several.

    With ``tma`` a product is made by persistent programs whose tiles the tensor memory accelerator
    fetches; ``low_rank`` says when the low-rank product joins it: "first", or as a "fold".
    """

    block_m: int
    block_n: int
    block_k: int = 16
    block_r: int = 128
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    tma: bool = False
    low_rank: str = "first"

    def rank_tile(self, r: int) -> int:
        """Return the rank tile for rank r: a power of two that ``tl.dot`` takes."""
        return min(max(16, 1 << (r - 1).bit_length()), self.block_r)


def cdiv(size: int, block: int) -> int:
    """Return how many blocks cover ``size``; Triton's own takes 3 µs outside a kernel."""
    return -(-size // block)


def kind_of(base: torch.dtype, adapter: torch.dtype) -> str:
    """Return which products a kernel makes: "16" or "32" bits, or "mixed" (float32 adapters).

    Float16 is a kind of its own, "fp16", because it can overflow; it takes the configs of "16".
    """
    if base.itemsize > 2:
        return "32"
    if adapter != base:
        return "mixed"
    return "fp16" if base == torch.float16 else "16"


def is_valid(
    config: Config, kernel: str, kind: str, r: int, dropout: bool, chip: Chip, count: int = 1
) -> bool:
    """Return whether ``config`` can run ``kernel``, by the step's name, on ``chip``.

    ``count`` projections: ``r`` is then their largest rank for the wide products, and what the
    ranks come to if stacked for "shrink" and "da". The pipeline must fit a block's shared memory:
    a step of both operands for each of ``num_stages``, less one where the tensor cores take
    operands from registers; and a thread must hold its accumulators in registers, fewer of them
    where it also draws a dropout mask of the same tile.
    """
    m, n, k, r_tile = config.block_m, config.block_n, config.block_k, config.rank_tile(r)
    warps, major, several, mixed = config.num_warps, chip.capability[0], count > 1, kind == "mixed"
    if warps not in (1, 2, 4, 8, 16, 32) or any(b < 16 or b & (b - 1) for b in (m, n, k, r_tile)):
        return False
    # The s of "outputs" is not that of x as it is, and "ds_db" has no x.
    dropout, threads = dropout and kernel not in ("outputs", "ds_db"), 32 * warps
    if config.tma:
        return _is_valid_tma(config, kernel, kind, r, dropout, chip, several)
    shrinks, masks_da = kernel == "shrink", kernel == "da" and dropout
    masks_dx = kernel == "input_grad" and dropout
    sums = {"shrink": m * r_tile, "ds_db": max(m, n) * r_tile, "da": max(m, n) * r_tile}
    masked_rows = {"shrink": m, "da": max(m, n)}.get(kernel, 0) if dropout else 0
    on_the_way = kernel == "ds_db" and kind in ("16", "fp16") and r <= ON_THE_WAY_RANK
    refused = (
        config.low_rank != "first",
        # Both wgmma and mma would read t, and Triton (3.7) makes the ring of its tiles one buffer
        # too short: a copy would overtake the wgmma that still reads the one before.
        on_the_way and major == 9 and m < 64 <= n,
        # A masked 16-bit x comes to wgmma in registers, and Triton (3.7) sets them again in the
        # next step while the last product may still read them (triton#9433).
        shrinks and dropout and major == 9 and kind in ("16", "fp16") and m >= 64,
        # Triton 3.7 multiplies a masked float32 tile of 64 rows in TF32 there, asked or not.
        kind == "32" and major == 10 and masked_rows >= 64,
        # All else spills. 4 warps under masks on sm_100, 8 on sm_120:
        shrinks and mixed and config.block_r == 64 and warps != (8 if major == 10 else 4),
        shrinks and mixed and config.block_r == 64 and major == 8 and r_tile == 16,
        masks_da and major == 10 and (n > 128 or (mixed and r_tile > 16)),
        # the split terms of a wider tile of dy, times b;
        kernel == "ds_db" and mixed and r > ON_THE_WAY_RANK and n > 64,
        # a scaled copy of the s of several;
        several and shrinks and major == 10 and m * r_tile > 32 * threads,
        # a tile masked for each projection, beside their sums;
        several and masks_da and m * n + sums["da"] > 80 * threads,
        several and masks_da and kind == "32" and chip.capability in ((8, 6), (8, 9)) and n > 32,
        # the sums of two projections and the split terms of one.
        several and masks_dx and mixed and major == 12 and m * n > 32 * threads,
    )
    most = 128
    if dropout:
        most = 32 if shrinks else 64
    elif kernel in ("ds_db", "da") or (mixed and major != 9):
        # Without wgmma operands pass through registers too; sm_100's tensor memory holds 512
        # columns, and Triton 3.7 compiles a kernel that needs more to a trap.
        most = 64
    copies = config.num_stages - (0 if major in (9, 10) or dropout else 1)
    shared = step_bytes(config, kernel, kind, r, dropout) * copies
    fits = sums.get(kernel, m * n) <= most * threads and shared <= chip.shared_memory
    return fits and not any(refused)


def _is_valid_tma(
    config: Config, kernel: str, kind: str, r: int, dropout: bool, chip: Chip, several: bool
) -> bool:
    m, n, k, major = config.block_m, config.block_n, config.block_k, chip.capability[0]
    first, of_y = config.low_rank == "first", kernel == "outputs"
    mixed, fp16 = kind == "mixed", kind == "fp16"
    rocm = chip.capability == (0, 0) and chip.shared_memory < 1 << 30
    refused = (
        rocm or 0 < major < 9 or kind == "32" or kernel not in ("outputs", "input_grad"),
        max(m, n, k) > 256 or config.num_warps % 4 or config.low_rank not in ("first", "fold"),
        # What cannot be folded in, an earlier launch makes, rounded: float16 might overflow.
        several and not of_y and (first or (dropout and fp16)),
        # Float32 factors, a mask, odd rows, or an s that scaled might overflow.
        not first and (of_y or not several) and (mixed or dropout or r % 8 or (of_y and fp16)),
        # What else is compiled spills: on sm_100 with four projections.
        several and of_y and major == 10 and (n > 128 or (first and not mixed)),
        several and of_y and first and not mixed and r > 16 and n > 128,
        # A second accumulator overfills the tensor memory (Triton 3.7 compiles a trap), a mask
        # the registers.
        major == 10 and n > 128 and ((first and (mixed or dropout)) or not WIDE_TMA_ON_SM_100),
    )
    # The pipeline, the tile on its way out (a bias takes another way on sm_100), and the factors of
    # a low-rank product that comes first.
    out = m * (n // 2 if n > 128 else n) + (1 << 13 if major == 10 else 0)
    factors = (m + n) * min(32, config.rank_tile(r)) if first else 0
    shared = ((m + n) * k * config.num_stages + out + factors) * 2 + 1024
    fits = m * n <= 160 * 32 * config.num_warps and shared <= chip.shared_memory
    return fits and not any(refused)


def widths(kind: str) -> tuple[int, int]:
    """Return the bytes of an element of the base and of the adapters, float64 apart."""
    return (4 if kind == "32" else 2), (2 if kind in ("16", "fp16") else 4)


def step_bytes(config: Config, kernel: str, kind: str, r: int, dropout: bool = False) -> int:
    """Return the shared memory, in bytes, that one step of the main loop of ``kernel`` loads to."""
    m, n, k, r_tile = config.block_m, config.block_n, config.block_k, config.rank_tile(r)
    base, wide = widths(kind)
    if kernel == "shrink":
        return m * k * base + r_tile * k * wide
    if kernel in ("ds_db", "da"):
        # Beside the tall one comes a tile of s, or one of b; the step that drops has no b.
        return m * n * base + (m if dropout else max(m, n)) * r_tile * wide
    return (m + n) * k * base


WIDE = (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 32, 8, 3)
FOLDED = (128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (128, 128, 64, 8, 4)
# Kernel, kind, by TMA when the low-rank product joins, the widest rank tile, and then configs, best
# first: block_m, block_n, block_k, warps, stages. None is measured yet.
TABLE = (
    ("outputs", "16", "fold", 128, *FOLDED, (64, 128, 64, 4, 6), (64, 64, 128, 4, 5)),
    ("outputs", "16", "first", 128, (128, 256, 64, 8, 3), (128, 128, 64, 8, 4)),
    ("outputs", "16", "", 32, *WIDE),
    ("outputs", "mixed", "first", 16, (128, 256, 64, 8, 3), (128, 128, 64, 8, 4)),
    ("outputs", "mixed", "", 16, *WIDE),
    ("outputs", "32", "", 16, (64, 64, 32, 4, 2)),
    ("outputs", "unaligned", "", 16, (64, 64, 32, 4, 2)),
    ("input_grad of several", "mixed", "fold", 128, *FOLDED),
    ("input_grad of several", "mixed", "", 16, *WIDE, (128, 64, 64, 8, 3)),
    ("input_grad of several", "32", "", 16, (64, 64, 32, 8, 2)),
    ("shrink", "16", "", 128, (64, 16, 64, 4, 4), (64, 16, 64, 8, 4)),
    ("shrink", "16", "", 128, (32, 16, 128, 4, 5), (16, 16, 128, 2, 6)),
    ("shrink", "mixed", "", 16, (64, 16, 64, 4, 3)),
    ("shrink", "mixed", "", 64, (64, 16, 32, 4, 3), (64, 16, 32, 8, 3)),
    ("shrink", "32", "", 32, (32, 16, 32, 4, 6)),
    ("ds_db", "16", "", 128, (64, 128, 16, 4, 3), (64, 128, 16, 8, 3), (32, 128, 16, 8, 3)),
    ("ds_db", "16", "", 128, (32, 256, 16, 8, 3), (128, 64, 16, 4, 3), (128, 128, 16, 8, 3)),
    ("ds_db", "mixed", "", 16, (32, 128, 16, 8, 3), (32, 64, 16, 4, 3)),
    ("ds_db", "32", "", 16, (32, 64, 16, 4, 2), (32, 32, 16, 4, 2)),
    ("ds_db", "unaligned", "", 16, (16, 32, 16, 2, 2)),
    # No product with b: the terms of a wider tile of ds leave room, so all ranks fit into one.
    ("da", "mixed", "", 16, (32, 128, 16, 8, 3)),
    ("da", "mixed", "", 64, (32, 64, 16, 4, 3)),
)
# What is not listed for several projections, or for a kernel at all, is as for one, or its like.
LIKE = {"input_grad": "outputs", "da": "ds_db"}
DEFAULTS: dict[tuple[str, str], list[Config]] = {}
for _kernel, _kind, _low_rank, _block_r, *_tiles in TABLE:
    for _m, _n, _k, _warps, _stages in _tiles:
        _by = {"num_warps": _warps, "num_stages": _stages}
        _by |= {"tma": True, "low_rank": _low_rank} if _low_rank else {}
        DEFAULTS.setdefault((_kernel, _kind), []).append(Config(_m, _n, _k, _block_r, **_by))
# The launchers of each direction, and those to which dropout matters.
LAUNCHERS = {"forward": ("shrink", "outputs"), "backward": ("ds_db", "da", "input_grad")}
DROPPING = ("shrink", "outputs", "da", "input_grad")
FILLED = 0.9  # of the processors have a tile: smaller tiles, for more of them, would not pay
# Elements of a tile that is stored one by one: more need more addresses than there are registers.
MOST_UNEVEN = 128 * 128
# Runs anywhere: where nothing above fits, and where elements must be loaded one by one.
SMALL = Config(16, 32, 32, block_r=16, num_warps=4, num_stages=2)


def default_config(
    kernel: str, kind: str, r: int, dropout: bool, chip: Chip, count: int = 1,
    aligned: bool = True, even: bool = True, fold: bool = True,
    result: tuple[int, Sequence[int]] | None = None,
) -> Config:  # fmt: skip
    """Return the valid config of ``kernel`` with the widest rank tile, of those the first listed.

    A tile narrower than the rank has the tall input read again for the rest of it. False is
    ``aligned`` when rows do not start at multiples of 16 bytes: every element is then loaded by
    itself and needs a register for its address; ``even`` when the rows of the result do not, or the
    tensor memory accelerator cannot take an operand; ``fold`` when it cannot take the factors.
    With the rows and columns of the ``result`` it is the first whose tiles nearly fill the chip, or
    the one with most. Rows count as the next power of two, or many lengths had many programs.
    """
    valid = candidates(kernel, kind, r, dropout, chip, count, aligned)
    if not fold:
        valid = [c for c in valid if c.low_rank != "fold"]
    if not even:
        valid = [c for c in valid if not c.tma and c.block_m * c.block_n <= MOST_UNEVEN]
    first = max(valid, key=lambda c: c.rank_tile(r), default=SMALL)
    if result is None or first == SMALL:
        return first
    valid = [c for c in valid if (c.rank_tile(r), c.tma) == (first.rank_tile(r), first.tma)]
    rows, columns = 1 << (result[0] - 1).bit_length(), result[1]
    tiles = [cdiv(rows, c.block_m) * sum(cdiv(n, c.block_n) for n in columns) for c in valid]
    enough = min(max(tiles), FILLED * chip.processors)
    return next(c for c, count in zip(valid, tiles, strict=True) if count >= enough)


def candidates(
    kernel: str, kind: str, r: int, dropout: bool, chip: Chip, count: int = 1, aligned: bool = True
) -> list[Config]:
    """Return the configs of ``kernel`` that are worth measuring on ``chip``: the valid ones.

    The interpreter, which measures nothing, gets those that run on every chip.
    """
    kind_name = {"fp16": "16"}.get(kind, kind) if aligned else "unaligned"
    names = [f"{kernel} of several"] * (count > 1) + [kernel, LIKE.get(kernel, kernel)]
    listed = next((DEFAULTS[n, kind_name] for n in names if (n, kind_name) in DEFAULTS), [])
    everywhere = chip.capability == (0, 0)
    valid = [c for c in listed if is_valid(c, kernel, kind, r, dropout, chip, count)]
    return [c for c in valid if not (everywhere and c.tma)]
