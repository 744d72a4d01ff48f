# SPDX-License-Identifier: Apache-2.0
"""How long each implementation should take on a `Machine`: FLOPs, bytes, tiles, waves, launches.

Nothing is measured here. What is assumed or fitted is a named constant that says so.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from fastlora_kernels import sums
from fastlora_kernels.configs import (
    LAUNCHERS,
    ON_THE_WAY_RANK,
    Config,
    candidates,
    cdiv,
    default_config,
    kind_of,
    step_bytes,
    widths,
)
from fastlora_kernels.ds_db import split
from machine import Machine

OPS = ("forward", "backward")
DRAWING = ("shrink", "input_grad", "da")  # dropout's mask

# Reads from L2, by the copy bandwidth: 128 x 256 tiles at 700 TFLOP/s need 8.2 TB/s on an H100.
CACHE = 2.7
CACHED = 0.5  # share of L2 that keeps what is read again: its halves copy each other's data
LATENCY, CACHE_LATENCY = 0.7e-6, 0.35e-6  # s, of a loaded memory and a loaded L2; assumed
# s a tile spends filling its pipeline and storing, the tensor cores idle: fits published H100
# products with a short K. A persistent TMA loop fills early.
TILE, PERSISTENT_TILE = 2.5e-6, 1e-6
LOW_RANK = 1e-6  # s of a dependent load and product outside the pipeline; assumed
NARROW = 0.6  # of the main loop's rate, for products as narrow as a rank of 64 or more; guess
SKINNY = 0.7  # of the copy bandwidth, for the library's products as narrow as the rank; guess
# Instructions a thread issues to draw and apply one element of the mask: compiled for sm_90 by
# Triton 3.7.1, 14.0 in the shrink and 13.5 in da.
MASK_OPS = 14
# Bytes an element that "blocks" moves to draw its mask (64-bit hashes of 4), and kernels it
# launches for a block of rows: counted in `fastlora/operator/dropout.py`.
MASK_BYTES, MASK_LAUNCHES = 66, 19
BLOCK_ROWS = 4096  # rows a block in "blocks"
SUM_UNROLL = 4  # partial sums that a program loads at once (compiled)
# The library's tiles and their share of the largest one's rate; guesses.
LIBRARY_TILES = ((128, 256, 1.0), (128, 128, 0.9), (64, 128, 0.75), (64, 64, 0.5))
TERMS = {"16": 1, "fp16": 1, "mixed": 3, "32": 1}  # products that a low-rank product is split into


@dataclass(frozen=True)
class Step:
    """One launch: useful FLOPs, bytes through device memory, programs, seconds."""

    name: str
    flops: float
    bytes: float
    programs: int
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

    def __str__(self) -> str:
        lines = [f"{self.op} by {self.impl}: {self.seconds * 1e6:.1f} µs predicted"]
        for s in self.steps:
            cost = f"{s.flops / 1e9:.1f} GFLOP, {s.bytes / 2**20:.1f} MiB, {s.programs} programs"
            lines.append(f"  {s.name:10} {s.seconds * 1e6:7.1f} µs  {cost}")
        return "\n".join(lines)


def predict(
    op: str, impl: str, problem, machine: Machine, configs: Mapping[str, Config] | None = None
) -> Prediction:
    """Return what ``impl`` ("blocks", "library", "triton") takes for ``op`` on ``machine``.

    ``problem`` has M, N, K, R, dtype, adapter, dropout; "frozen" is the frozen layer alone.
    ``configs`` hold one by a launcher's name, others take their default. All gradients are made.
    """
    if problem.dtype == torch.float64:
        raise ValueError("problem.dtype is float64, of which no rates are known; use another")
    steps = {"blocks": _blocks, "library": _library, "triton": _triton, "frozen": _frozen}[impl]
    return Prediction(op, impl, tuple(steps(op, problem, machine, configs or {})))


def best_configs(op: str, problem, machine: Machine) -> dict[str, Config]:
    """Return for each launcher of ``op`` the config that is predicted fastest."""
    found: dict[str, Config] = {}
    for name in LAUNCHERS[op]:
        asked = *_asked(name, problem), machine.chip
        known = candidates(*asked) or [default_config(*asked)]
        seconds = [predict(op, "triton", problem, machine, {name: c}).seconds for c in known]
        found[name] = known[seconds.index(min(seconds))]
    return found


def library(name: str, m: Machine, kind: str, M: int, N: int, K: int, reads_y=False) -> Step:
    """Return the library's product [M, K] @ [K, N], its tile the best of a few.

    ``reads_y``: it adds to what y holds, half of which is read while tensor cores wait.
    """
    e, found = (4 if kind == "32" else 2), []
    for bm, bn, share in LIBRARY_TILES:
        tiles = cdiv(M, bm) * cdiv(N, bn)
        tile = 2 * bm * bn * K * m.processors / (m.rate("library", kind) * share) + TILE
        tile += reads_y * bm * bn * e * m.processors / m.copy / 2
        moved = product_bytes(m, M, N, K, e, bm, bn, 8) + reads_y * M * N * e
        seconds = m.gap + max(math.ceil(tiles / m.processors) * tile, moved / m.copy)
        found.append((seconds, moved, tiles))
    seconds, moved, tiles = min(found)
    return Step(name, 2.0 * M * N * K, moved, tiles, seconds)


def product_bytes(m: Machine, M: int, N: int, K: int, e: int, bm: int, bn: int, group: int):
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
    depth, tiles = cdiv(K, bk) * bk, cdiv(M, bm) * cdiv(N, bn)
    loading = pipeline(config, "outputs", kind, R)
    beside = _beside(m, config, loading, bm * bn)
    exposed = PERSISTENT_TILE if config.tma else TILE / beside
    if config.low_rank == "fold":
        extra = 2 * bm * bn * cdiv(R, bk) * bk
    else:
        extra = TERMS[kind] * 2 * bm * bn * cdiv(R, config.rank_tile(R)) * config.rank_tile(R)
        exposed += LOW_RANK / beside
    if drops:
        exposed += bm * bn * MASK_OPS * 2 * m.processors / m.vector
    rate = m.rate("tma" if config.tma else "cp.async", kind) / m.processors
    computing = math.ceil(tiles / m.processors) * ((2 * bm * bn * depth + extra) / rate + exposed)
    moved = product_bytes(m, M, N, K, e, bm, bn, config.group_m)
    # Of what is in flight, the bytes that no program beside has asked for.
    flight = loading * moved / max(1, tiles * (bm + bn) * depth * e)
    streaming = streamed(m, moved, tiles, beside, flight, depth // bk) if K else moved / m.copy
    programs = min(tiles, m.processors) if config.tma else tiles
    return Step(name, 2.0 * M * N * (K + R), moved, programs, m.gap + max(computing, streaming))


def pipeline(config: Config, step: str, kind: str, R: int) -> int:
    """Return the bytes of shared memory that a program's loads in flight go to."""
    stages = config.num_stages if config.tma else max(1, config.num_stages - 1)
    return step_bytes(config, step, kind, R) * stages


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
    most, latency = (CACHE * m.copy, CACHE_LATENCY) if cached else (m.copy, LATENCY)
    flight *= steps / (steps + 1)

    def seconds(some: int) -> float:
        return some * moved / programs / min(most, some * flight / latency) if some else 0.0

    rounds, rest = divmod(programs, beside * m.processors)
    return rounds * seconds(beside * m.processors) + seconds(rest)


def narrow(
    name: str, m: Machine, kind: str, M: int, C: int, R: int, config: Config, drops: bool
) -> tuple[Step, ...]:
    """Return the steps of "shrink" (of x [M, C]), "ds_db" (of dy [M, C]) or "da" (of x [M, C]).

    What is tall comes once from memory, for products as narrow as the rank. Partial sums of
    "ds_db" and "da" are float32, written to memory and read from L2 where they fit.
    """
    e, wide, rt = *widths(kind), config.rank_tile(R)
    tiles_r, both, sums_of = cdiv(R, rt), name == "ds_db", []
    if name == "shrink":
        rows, steps, readers = cdiv(M, config.block_m), cdiv(C, config.block_k), tiles_r
        programs, moved, padded = rows * tiles_r, (C + M) * R * wide, rows * config.block_m
        cached, held = programs * rt * C * wide, config.block_m * rt
        flight = pipeline(config, name, kind, R)
    else:
        apart, tiles_c, padded = both and R > ON_THE_WAY_RANK, cdiv(C, config.block_n), M
        readers = tiles_r * (2 if apart else 1)
        n, steps = split(M, C, config, m.processors, readers)
        chunks = cdiv(tiles_c, steps) if apart else tiles_c
        programs = (tiles_c + (steps * chunks if apart else 0)) * tiles_r * n
        sums_of = [(chunks, M * R)] * both + [(n, C * R)]
        moved = (M + C) * R * wide * (1 + both) + sum(4 * parts * size for parts, size in sums_of)
        again = both * (cdiv(M, config.block_m) if apart else n)
        cached, held = (tiles_c * M + again * C) * R * wide, config.block_n * rt
        # Of what is in flight, only what is tall comes from memory.
        flight = config.block_m * config.block_n * e * max(1, config.num_stages - 1)
    moved, cached = moved + M * C * e, cached + (readers - 1) * M * C * e
    beside = _beside(m, config, pipeline(config, name, kind, R), held)
    busy, flops = min(1.0, programs / m.processors) or 1.0, 2.0 * (1 + both) * M * C * R
    share = busy if kind == "32" else busy * NARROW * min(1.0, rt / 64)
    computed = TERMS[kind] * 2.0 * (1 + both) * padded * C * tiles_r * rt
    seconds = m.gap + max(
        # Other readers of the same rows wait for the same bytes.
        streamed(m, moved, programs, beside, flight / readers, steps),
        computed / (m.rate("cp.async", kind) * share),
        drops * M * C * tiles_r * MASK_OPS * 2 / (m.vector * busy),
        (moved + cached) / (CACHE * m.copy * busy),
    )
    found = Step(name, flops, moved, programs, seconds)
    return (found, summed(f"sum {name}", m, sums_of, wide)) if sums_of else (found,)


def summed(name: str, m: Machine, of: list[tuple[int, int]], out: int) -> Step:
    """Return the sums of float32 ``(parts, numel)`` to elements of ``out`` bytes, in one launch."""
    read, written = (sum(4 * n * size for n, size in of), sum(out * size for _, size in of))
    programs, parts = sum(cdiv(size, sums.BLOCK) for _, size in of), max(n for n, _ in of)
    fits = read <= CACHED * m.l2
    flight, rounds = 4 * sums.BLOCK * min(parts, SUM_UNROLL), cdiv(parts, SUM_UNROLL)
    seconds = m.gap + streamed(m, read, programs, 16, flight, rounds, fits)
    return Step(name, read / 4, written + (0 if fits else read), programs, seconds)


def _triton(op: str, p, m: Machine, configs: Mapping[str, Config]) -> Iterator[Step]:
    """Yield what `fastlora_kernels` runs: dx follows ds, da comes last."""
    for name in sorted(LAUNCHERS[op], key="da".__eq__):
        _, kind, _, drops = asked = _asked(name, p)
        wide = name in ("outputs", "input_grad")
        result = (p.M, _sizes(op, p)[1:2]) if wide else None
        config = configs.get(name) or default_config(*asked, m.chip, result=result)
        if wide:
            yield product(name, m, kind, *_sizes(op, p), p.R, config, drops)
        else:
            sizes = p.M, (p.N if name == "ds_db" else p.K), p.R
            yield from narrow(name, m, kind, *sizes, config, drops)


def _library(op: str, p, m: Machine, configs: Mapping[str, Config]) -> Iterator[Step]:
    """Yield what "library" runs: the low-rank product before the wide one on top."""
    kind, (M, N, K) = kind_of(p.dtype, p.adapter), _sizes(op, p)
    yield from (s for s in _triton(op, p, m, configs) if s.name not in ("outputs", "input_grad"))
    if op == "backward" and p.dropout:
        config = default_config("input_grad", kind, p.R, True, m.chip, even=False)  # its x is empty
        yield product("expand", m, kind, M, N, 0, p.R, config, True)
    else:
        yield _pass("expand", m, M * N * p.dtype.itemsize)
    yield library("product", m, kind_of(p.dtype, p.dtype), M, N, K, reads_y=True)


def _blocks(op: str, p, m: Machine, _: Mapping[str, Config]) -> Iterator[Step]:
    """Yield what "blocks" runs: library products, dropout in blocks of rows."""
    e, wide, x, dy = p.dtype.itemsize, p.adapter.itemsize, p.M * p.K, p.M * p.N
    forward, kind, blocks = op == "forward", kind_of(p.dtype, p.dtype), cdiv(p.M, BLOCK_ROWS)
    if not forward:
        yield library("product", m, kind, *_sizes(op, p))
    if p.dropout:
        yield _pass("mask", m, x * MASK_BYTES, MASK_LAUNCHES * blocks)
        yield _pass("drop", m, x * 3 * e, blocks)
    for name, elements in {"s": x}.items() if forward else {"ds": dy, "db": dy, "da": x}.items():
        if e != wide:
            yield _pass(f"{name} copy", m, elements * (e + wide), blocks)
        launches = blocks if e != wide or p.dropout else 1
        once, flops = _pass(name, m, elements * wide / SKINNY, launches), 2.0 * elements * p.R
        computing = flops / m.rate("library", "32") if wide == 4 else 0.0
        yield replace(once, flops=flops, seconds=max(once.seconds, m.gap + computing))
    if forward:
        yield _pass("expand", m, dy * e)
        yield library("product", m, kind, *_sizes(op, p), reads_y=True)
    else:
        yield _pass("add", m, x * (5 if p.dropout else 2) * e, 2 * blocks if p.dropout else 1)


def _frozen(op: str, p, m: Machine, _: Mapping[str, Config]) -> Iterator[Step]:
    yield library("product", m, kind_of(p.dtype, p.dtype), *_sizes(op, p))


def _pass(name: str, m: Machine, moved: float, launches: int = 1) -> Step:
    """Return the library's kernels that stream so many bytes and compute nothing to speak of."""
    return Step(name, 0.0, moved, 0, launches * m.gap + moved / m.copy)


def _sizes(op: str, p) -> tuple[int, int, int]:
    """Return M, N, K of the wide product: dx [M, K] is dy [M, N] @ w [N, K]."""
    return (p.M, p.N, p.K) if op == "forward" else (p.M, p.K, p.N)


def _asked(launcher: str, p) -> tuple[str, str, int, bool]:
    """Return what a launcher's config depends on beside the chip."""
    return launcher, kind_of(p.dtype, p.adapter), p.R, p.dropout and launcher in DRAWING


def _beside(m: Machine, config: Config, shared: int, accumulators: int) -> int:
    """Return the programs that a processor holds: shared memory, warps, registers (65,536)."""
    registers = accumulators + 64 * 32 * config.num_warps
    warps = 64 if m.capability in ((8, 0), (9, 0), (10, 0)) else 48
    return max(1, min(m.shared // shared, warps // config.num_warps, 65536 // registers))
