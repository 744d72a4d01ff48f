# SPDX-License-Identifier: Apache-2.0
"""How long each plan should take on a `Machine`: FLOPs, bytes, tiles, waves and launches.

Nothing is measured here. What is assumed or fitted is a named constant that says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from fastlora_kernels.columns import SUM_BLOCK, split
from fastlora_kernels.configs import (
    DROPPING,
    KERNEL_OF,
    LAUNCHERS,
    ON_THE_WAY_RANK,
    Chip,
    Config,
    candidates,
    cdiv,
    default_config,
    kind_of,
    step_bytes,
    widths,
)
from machine import Machine

# Reads from L2, by the copy bandwidth: 128 x 256 tiles at 700 TFLOP/s need 8.2 TB/s on an H100.
CACHE = 2.7
CACHED = 0.5  # share of L2 that keeps what is read again: its halves copy each other's data
LATENCY, CACHE_LATENCY = 0.7e-6, 0.35e-6  # s, of a loaded memory and a loaded L2; assumed
# s a tile spends filling its pipeline and storing, the tensor cores idle: fits published H100
# products with a short K. A persistent TMA loop fills early, and specialised warps store beside it.
TILE, PERSISTENT_TILE = 2.5e-6, 1e-6
LOW_RANK = 1e-6  # s of a dependent load and product outside the pipeline; assumed
NARROW = 0.6  # of the main loop's rate, for products as narrow as a rank of 64 or more; guess
SKINNY = 0.7  # of the copy bandwidth, for the library's products as narrow as the rank; guess
# Instructions a thread issues to draw and apply one element of the mask: compiled for sm_90 by
# Triton 3.7.1, 14.0 in the shrink and 13.5 in da.
MASK_OPS = 14
# Bytes an element that the torch implementation moves to draw its mask (64-bit hashes of 4), and
# kernels it launches for a block of rows: counted in `fastlora/dropout.py`.
MASK_BYTES, MASK_LAUNCHES = 66, 19
BLOCK_ROWS = 4096  # rows a block in the torch implementation
SUM_UNROLL = 4  # partial sums that a program loads at once (compiled)
# The library's tiles and their share of the largest one's rate; guesses.
LIBRARY_TILES = ((128, 256, 1.0), (128, 128, 0.9), (64, 128, 0.75), (64, 64, 0.5))
TERMS = {"16": 1, "fp16": 1, "mixed": 3, "32": 1}  # products that a low-rank product is split into


@dataclass(frozen=True)
class Step:
    """One kernel: useful FLOPs, bytes through device memory, programs, waves of them, seconds.

    ``bound`` is what arithmetic alone asks for: the useful FLOPs at the library's rate or every
    tensor moved once at the copy bandwidth, whichever is longer.
    """

    name: str
    flops: float
    bytes: float
    programs: int
    waves: float
    bound: float
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """The steps of one direction by one implementation, in the order of their launches."""

    op: str
    impl: str
    steps: tuple[Step, ...]

    @property
    def seconds(self) -> float:
        """Seconds from the first launch to the last store, the host never late."""
        return sum(step.seconds for step in self.steps)

    @property
    def bound(self) -> float:
        """Seconds by arithmetic alone."""
        return sum(step.bound for step in self.steps)

    def __str__(self) -> str:
        lines = [f"{self.op} by {self.impl}: {self.seconds * 1e6:.1f} µs predicted"]
        for s in self.steps:
            cost = f"{s.flops / 1e9:.1f} GFLOP, {s.bytes / 2**20:.1f} MiB"
            grid = f"{s.programs} programs, {s.waves:.2f} a processor"
            lines.append(f"  {s.name:10} {s.seconds * 1e6:7.1f} µs  {cost}, {grid}")
        return "\n".join(lines)


def predict(
    op: str, impl: str, problem, machine: Machine, configs: Mapping[str, Config] | None = None
) -> Prediction:
    """Return what ``impl`` ("blocks", "library", "triton") takes for ``op`` on ``machine``.

    ``problem`` has M, N, K, R, dtype, adapter, dropout; ``configs`` one for each launcher by its
    name, as in `linear.forward`, the others take their default. All gradients are asked for.
    """
    if problem.dtype == torch.float64:
        raise ValueError("problem.dtype is float64, of which no rates are known; use another")
    steps = {"blocks": _torch, "library": _library_plan, "triton": _triton}[impl]
    return Prediction(op, impl, tuple(steps(op, problem, machine, configs or {})))


def frozen(op: str, problem, machine: Machine) -> Prediction:
    """Return what the frozen layer alone takes: one product of the library in each direction."""
    kind = kind_of(problem.dtype, problem.dtype)
    return Prediction(op, "frozen", (library("product", machine, kind, *_sizes(op, problem)),))


def library(name: str, m: Machine, kind: str, M: int, N: int, K: int, reads_y=False) -> Step:
    """Return the library's product [M, K] @ [K, N], its tile the best of a few.

    ``reads_y``: it adds to what y holds, half of which is read while tensor cores wait.
    """
    e, flops, found = (4 if kind == "32" else 2), 2.0 * M * N * K, []
    for bm, bn, share in LIBRARY_TILES:
        tiles = cdiv(M, bm) * cdiv(N, bn)
        tile = 2 * bm * bn * K * m.processors / (m.rate("library", kind) * share) + TILE
        tile += reads_y * bm * bn * e * m.processors / m.copy / 2
        moved = product_bytes(m, M, N, K, e, bm, bn, 8) + reads_y * M * N * e
        seconds = m.gap + max(math.ceil(tiles / m.processors) * tile, moved / m.copy)
        found.append((seconds, moved, tiles))
    seconds, moved, tiles = min(found)
    bound = _bound(m, kind, flops, e * (M * K + N * K + M * N))
    return Step(name, flops, moved, tiles, tiles / m.processors, bound, seconds)


def product_bytes(
    m: Machine, M: int, N: int, K: int, e: int, bm: int, bn: int, group: int
) -> float:
    """Return the bytes of a tiled product [M, K] @ [K, N], elements of ``e`` bytes.

    The programs of a wave step through K together: each reads a band of both operands once, and
    only an operand that fits into L2 is still there for the next wave.
    """
    rows = max(1, min(cdiv(M, bm), group))
    columns = max(1, min(cdiv(N, bn), m.processors / rows))
    x, w, kept = M * K * e, N * K * e, CACHED * m.l2
    x *= 1 if x <= kept else cdiv(N, bn) / columns
    w *= 1 if w <= kept else cdiv(M, bm) / rows
    return x + w + M * N * e


def product(
    name: str, m: Machine, kind: str, M: int, N: int, K: int, R: int, config: Config, drops: bool
) -> Step:
    """Return our product with the low-rank one inside: whole tiles, whole waves.

    Programs of one processor share its tensor cores, so a wave is as many tiles as processors.
    """
    e, bm, bn, bk = (4 if kind == "32" else 2), config.block_m, config.block_n, config.block_k
    tma, low_rank = config.tma, config.low_rank
    specialized, rt = config.specialized, config.rank_tile(R)
    r = cdiv(R, rt) * rt
    depth, tiles = cdiv(K, bk) * bk, cdiv(M, bm) * cdiv(N, bn)
    beside = _beside(m, config, pipeline(config, "product", kind, R), bm * bn)
    extra, exposed = TERMS[kind] * 2 * bm * bn * r, LOW_RANK / beside
    if low_rank == "fold":
        extra, exposed = 2 * bm * bn * cdiv(R, bk) * bk, 0.0
    elif low_rank == "recompute":
        extra += 2 * bm * r * depth
    if specialized:
        exposed = 0.0
    else:
        exposed += PERSISTENT_TILE if tma else TILE / beside
    if drops:
        exposed += bm * bn * MASK_OPS * 2 * m.processors / m.vector
    rate = m.rate("tma" if tma else "cp.async", kind) / m.processors
    waves = tiles / m.processors
    computing = math.ceil(waves) * ((2 * bm * bn * depth + extra) / rate + exposed)
    moved = product_bytes(m, M, N, K, e, bm, bn, config.group_m)
    programs = min(tiles, m.processors) if tma else tiles
    # Of what is in flight, the bytes that no program beside has asked for.
    flight = pipeline(config, "product", kind, R) * moved / max(1, tiles * (bm + bn) * depth * e)
    streaming = streamed(m, moved, tiles, beside, flight, depth // bk) if K else moved / m.copy
    flops = 2.0 * M * N * (K + R) + (low_rank == "recompute") * 2.0 * M * K * R
    bound = _bound(m, kind, flops, e * (M * K + N * K + M * N))
    return Step(name, flops, moved, programs, waves, bound, m.gap + max(computing, streaming))


def pipeline(config: Config, kernel: str, kind: str, R: int) -> int:
    """Return the bytes of shared memory that a program's loads in flight go to."""
    stages = config.num_stages if config.tma else max(1, config.num_stages - 1)
    return step_bytes(config, kernel, kind, R) * stages


def streamed(
    m: Machine, moved: float, programs: int, beside: int, flight: float, steps: int, cached=False
) -> float:
    """Return the seconds that ``programs`` of ``steps`` loads each take to move so many bytes.

    Little's law: bytes/s are the bytes in flight by the latency, up to the bandwidth.
    ``beside`` programs share a processor; the last ones have the memory to themselves. A program
    fills its pipeline once, which a short one does not repay.
    """
    if not programs or not moved:
        return 0.0
    at_once = beside * m.processors
    most, latency = (CACHE * m.copy, CACHE_LATENCY) if cached else (m.copy, LATENCY)
    flight *= steps / (steps + 1)

    def seconds(some: int) -> float:
        return some * moved / programs / min(most, some * flight / latency) if some else 0.0

    rounds, rest = divmod(programs, at_once)
    return rounds * seconds(at_once) + seconds(rest)


def narrow(
    name: str,
    m: Machine,
    kind: str,
    work: tuple[float, float, int],
    sizes: tuple[float, float, float],
    drawn: float,
    programs: int,
    streaming: float,
) -> Step:
    """Return a kernel that reads something tall once for a product as narrow as the rank.

    ``work``: useful FLOPs, those of whole tiles, the width of one. ``sizes``: bytes through memory,
    each tensor's once, bytes from L2 beside them. ``drawn`` elements of a dropout mask.
    """
    (flops, computed, width), (moved, least, cached) = work, sizes
    busy = min(1.0, programs / m.processors) or 1.0
    share = busy if kind == "32" else busy * NARROW * min(1.0, width / 64)
    computing = TERMS[kind] * computed / (m.rate("cp.async", kind) * share)
    drawing = drawn * MASK_OPS * 2 / (m.vector * busy)
    reading = (moved + cached) / (CACHE * m.copy * busy)
    seconds = m.gap + max(streaming, computing, drawing, reading)
    bound = _bound(m, kind, flops, least)
    return Step(name, flops, moved, programs, programs / m.processors, bound, seconds)


def shrink(m: Machine, kind: str, M: int, K: int, R: int, config: Config, drops: bool) -> Step:
    """Return s = dropout(x) aᵀ: x once from memory, a once a program from L2."""
    e, wide, rt = *widths(kind), config.rank_tile(R)
    tiles_r, rows = cdiv(R, rt), cdiv(M, config.block_m)
    programs = rows * tiles_r
    moved = M * K * e + (R * K + M * R) * wide
    cached = (tiles_r - 1) * M * K * e + programs * rt * K * wide
    flight = pipeline(config, "shrink", kind, R)
    beside = _beside(m, config, flight, config.block_m * rt)
    # Rank tiles of the same rows wait for the same bytes.
    steps = cdiv(K, config.block_k)
    streaming = streamed(m, moved, programs, beside, flight / tiles_r, steps)
    work = 2.0 * M * K * R, 2.0 * rows * config.block_m * K * tiles_r * rt, rt
    drawn = drops * M * K * tiles_r
    return narrow("shrink", m, kind, work, (moved, moved, cached), drawn, programs, streaming)


def columns(
    launcher: str,
    m: Machine,
    kind: str,
    M: int,
    C: int,
    R: int,
    config: Config,
    drops: bool = False,
    splits: int | None = None,
) -> list[Step]:
    """Return the steps of "ds_db" (t = dy [M, C]) or "da" (t = x [M, C]): a pass and its sums.

    ``splits`` of the rows, or what the launcher takes. Partial sums are float32, written to memory
    and read from L2 where they fit.
    """
    e, wide, rt = *widths(kind), config.rank_tile(R)
    both = launcher == "ds_db"
    apart = both and R > ON_THE_WAY_RANK
    n, tiles_r, tiles_c = splits, cdiv(R, rt), cdiv(C, config.block_n)
    if n is None:
        n, steps = split(M, C, R, config, m.processors, 2 if apart else 1)
    else:
        steps = cdiv(cdiv(M, config.block_m), n)
    chunks = cdiv(tiles_c, steps) if apart else tiles_c
    programs = (tiles_c + (steps * chunks if apart else 0)) * tiles_r * n
    inner, outer = (4 * chunks * M * R if both else 0), 4 * n * C * R
    least = M * C * e + (M + C) * R * wide * (2 if both else 1)
    moved = least + inner + outer
    readers = tiles_r * (2 if apart else 1)
    cached = (readers - 1) * M * C * e + tiles_c * M * R * wide
    cached += both * (cdiv(M, config.block_m) if apart else n) * C * R * wide
    flight = pipeline(config, "columns", kind, R)
    beside = _beside(m, config, flight, config.block_n * rt)
    # Of what is in flight, only t comes from memory, and its other readers wait for the same bytes.
    alone = config.block_m * config.block_n * e * max(1, config.num_stages - 1) / readers
    streaming = streamed(m, moved, programs, beside, alone, steps)
    flops, padded = (2.0 * (1 + both) * M * C * x for x in (R, tiles_r * rt))
    work, sizes, drawn = (flops, padded, rt), (moved, least, cached), drops * M * C * tiles_r
    sums = [(chunks, M * R)] * both + [(n, C * R)]
    return [
        narrow(launcher, m, kind, work, sizes, drawn, programs, streaming),
        summed(f"sum {launcher}", m, sums, wide),
    ]


def summed(name: str, m: Machine, sums: list[tuple[int, int]], out: int) -> Step:
    """Return the sums of float32 ``(parts, numel)`` to elements of ``out`` bytes, in one launch."""
    read, written = (sum(4 * n * size for n, size in sums), sum(out * size for _, size in sums))
    programs, parts = sum(cdiv(size, SUM_BLOCK) for _, size in sums), max(n for n, _ in sums)
    fits = read <= CACHED * m.l2
    flight, rounds = 4 * SUM_BLOCK * min(parts, SUM_UNROLL), cdiv(parts, SUM_UNROLL)
    seconds = m.gap + streamed(m, read, programs, 16, flight, rounds, fits)
    moved = written + (0 if fits else read)
    return Step(name, read / 4, moved, programs, programs / m.processors, 0.0, seconds)


def best_configs(
    op: str, problem, chip: Chip, machine: Machine | None, measured: Mapping[str, Config]
) -> dict[str, Config]:
    """Return a config for each launcher of ``op``: what was ``measured``, or is predicted fastest.

    An unknown machine gets the defaults of its ``chip``. What starts early has to be measured: how
    much that hides is the least certain part of the model.
    """
    found = dict(measured)
    for name in LAUNCHERS[op]:
        if name in found:
            continue
        drops = problem.dropout and name in DROPPING
        rest = KERNEL_OF[name], kind_of(problem.dtype, problem.adapter), problem.R, drops, chip
        found[name] = default_config(*rest)
        if machine is not None:
            known = [c for c in candidates(*rest) if not c.early] or [found[name]]
            found[name] = min(
                known,
                key=lambda c, n=name: (
                    predict(op, "triton", problem, machine, {**found, n: c}).seconds
                ),
            )
    return found


def _triton(op: str, p, m: Machine, configs: Mapping[str, Config]) -> Iterator[Step]:
    """Yield what `fastlora_kernels.linear` runs."""
    kind, forward, sizes = kind_of(p.dtype, p.adapter), op == "forward", (*_sizes(op, p), p.R)
    launcher = "product" if forward else "dx"
    config = configs.get(launcher) or _default(launcher, kind, p, True, m)
    wide = product(launcher, m, kind, *sizes, config, p.dropout and not forward)
    if forward and config.low_rank == "recompute":
        yield wide
        return
    steps = list(_narrow_steps(op, p, m, configs))
    before = 1 if forward else 2  # dx follows the sum of ds, da comes last
    if config.early:
        steps[before - 1] = _hidden(steps[before - 1], wide, m, config, kind, p.R)
    yield from (*steps[:before], wide, *steps[before:])


def _library_plan(op: str, p, m: Machine, configs: Mapping[str, Config]) -> Iterator[Step]:
    """Yield what ``library`` runs: the low-rank product first, the wide one on top."""
    kind, (M, N, K) = kind_of(p.dtype, p.adapter), _sizes(op, p)
    yield from _narrow_steps(op, p, m, configs)
    if op == "backward" and p.dropout:
        config = default_config("dx", kind, p.R, True, m.chip, even=False)  # its x is empty
        yield replace(product("expand", m, kind, M, N, 0, p.R, config, True), bound=0.0)
    else:
        yield _pass("expand", m, M * N * p.dtype.itemsize)
    yield library("product", m, kind_of(p.dtype, p.dtype), M, N, K, reads_y=True)


def _narrow_steps(op: str, p, m: Machine, configs: Mapping[str, Config]) -> Iterator[Step]:
    """Yield what "triton" and "library" share: the shrink, or the gradients of the adapters."""
    kind, drops = kind_of(p.dtype, p.adapter), p.dropout
    if op == "forward":
        config = configs.get("shrink") or _default("shrink", kind, p, drops, m)
        yield shrink(m, kind, p.M, p.K, p.R, config, drops)
        return
    for launcher, C, drawn in (("ds_db", p.N, False), ("da", p.K, drops)):
        config = configs.get(launcher) or _default("columns", kind, p, drawn, m)
        yield from columns(launcher, m, kind, p.M, C, p.R, config, drawn)


def _torch(op: str, p, m: Machine, configs: Mapping[str, Config]) -> Iterator[Step]:
    """Yield what `fastlora.operator.blocks` runs: library products, dropout in blocks of rows."""
    (M, N, K), e, wide = _sizes(op, p), p.dtype.itemsize, p.adapter.itemsize
    x, dy, blocks = p.M * p.K, p.M * p.N, cdiv(p.M, BLOCK_ROWS)
    kind, mixed = kind_of(p.dtype, p.dtype), e != wide

    def skinny(name: str, elements: int) -> Iterator[Step]:
        if mixed:
            yield _pass(f"{name} copy", m, elements * (e + wide), blocks)
        work = 2.0 * elements * p.R
        once = _pass(name, m, elements * wide / SKINNY, blocks if mixed or p.dropout else 1)
        computing = work / m.rate("library", "32") if wide == 4 else 0.0
        seconds = max(once.seconds, m.gap + computing)
        bound = _bound(m, kind, work, elements * e)
        yield replace(once, flops=work, bytes=elements * wide, seconds=seconds, bound=bound)

    def mask() -> Iterator[Step]:
        yield _pass("mask", m, x * MASK_BYTES, MASK_LAUNCHES * blocks)
        yield _pass("drop", m, x * 3 * e, blocks)

    if op == "forward":
        if p.dropout:
            yield from mask()
        yield from skinny("s", x)
        yield _pass("expand", m, M * N * e)
        yield library("product", m, kind, M, N, K, reads_y=True)
        return
    yield library("product", m, kind, M, N, K)
    yield from skinny("ds", dy)
    yield from skinny("db", dy)
    if p.dropout:
        yield from mask()
        yield _pass("add", m, x * 5 * e, 2 * blocks)
    else:
        yield _pass("add", m, x * 2 * e)
    yield from skinny("da", x)


def _pass(name: str, m: Machine, moved: float, launches: int = 1) -> Step:
    """Return the library's kernels that stream so many bytes and compute nothing to speak of."""
    return Step(name, 0.0, moved, 0, 0.0, 0.0, launches * m.gap + moved / m.copy)


def _hidden(first: Step, last: Step, m: Machine, config: Config, kind: str, R: int) -> Step:
    """Return ``first`` with the time that ``last`` does not hide, launched early beside it.

    A block of the product finds room beside one of 32 KiB, needs the result at the end of its first
    tile, and shares the memory; where it finds none, or asks at once, only the launch is hidden.
    """
    stored = config.block_m * min(config.block_n, 128) * 2
    room = pipeline(config, "product", kind, R) + stored + (32 << 10) <= m.shared
    if config.low_rank == "first" or not room:
        return replace(first, seconds=max(0.0, first.seconds - m.gap))
    alone = first.seconds - last.seconds / max(1, math.ceil(last.waves))
    crowded = (first.bytes + last.bytes) / m.copy - last.seconds
    return replace(first, seconds=max(0.0, alone, crowded))


def _sizes(op: str, p) -> tuple[int, int, int]:
    """Return M, N, K of the wide product: dx [M, K] is dy [M, N] @ w [N, K]."""
    return (p.M, p.N, p.K) if op == "forward" else (p.M, p.K, p.N)


def _default(kernel: str, kind: str, p, drops: bool, m: Machine) -> Config:
    return default_config(kernel, kind, p.R, p.dropout and drops, m.chip)


def _beside(m: Machine, config: Config, shared: int, accumulators: int) -> int:
    """Return the programs that a processor holds: shared memory, warps, registers (65,536)."""
    registers = accumulators + 64 * 32 * config.num_warps
    warps = 64 if m.capability in ((8, 0), (9, 0), (10, 0)) else 48
    return max(1, min(m.shared // shared, warps // config.num_warps, 65536 // registers))


def _bound(m: Machine, kind: str, flops: float, least: float) -> float:
    return max(flops / m.rate("library", kind), least / m.copy)
