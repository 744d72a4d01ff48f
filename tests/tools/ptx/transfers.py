# SPDX-License-Identifier: Apache-2.0
"""Instructions that move bytes between registers, warps, shared and global memory."""

import re

import numpy as np

from ptx.arithmetic import DTYPES
from ptx.machine import Code, Machine, Mask, Step, handles, translates
from ptx.memory import COPYING, WORDS
from ptx.program import UnknownError


@handles(r"mov\.b(32|64)", "slots", "slots")
def mov(m: Machine, threads, to, of, bits: str) -> None:
    """Put two registers into one, or take one apart."""
    small, wide = WORDS[int(bits) // 16], WORDS[int(bits) // 8]
    shift, (low, *high) = wide(int(bits) // 2), [m.full(slot, threads) for slot in of]
    if high:
        m.put_at(to[0], high[0].astype(wide) << shift | low.astype(wide), threads)
    else:
        m.put_at(to[0], low.astype(small), threads)
        m.put_at(to[1], (low >> shift).astype(small), threads)


@translates(r"ld\.param\.([bsuf](?:8|16|32|64))")
def ld_param(code: Code, operands: list[str], kind: str) -> Step:
    to, address = code.slot(operands[0], kind), code.address(operands[1])
    kind, register = np.dtype(DTYPES[kind]), re.match(r"%[a-z]+", operands[0])[0]
    wide = code.program.registers[register] // 8

    def step(m: Machine, mask: Mask) -> None:
        at = address(m, m.all).astype(np.int64) // kind.itemsize
        found = m.params.view(kind)[at[:1] if (at == at[0]).all() else at]
        if kind.itemsize < wide:  # the register takes the sign
            found = found.astype(f"{kind.kind}{wide}")
        m.put(to, found.view(WORDS[wide]), mask)

    return step


@handles(r"ld\.(global|shared(?!.*8$))(?:\.v[24])?\.[bsuf](8|16|32|64)", "slots", "address")
def load(m: Machine, threads, slots, address, space: str, bits: str) -> None:
    memory = m.memory if space == "global" else m.shared
    found = memory.load(threads, address, int(bits) // 8, len(slots))
    for slot, value in zip(slots, found, strict=True):
        m.put_at(slot, value.astype(WORDS[max(2, value.itemsize)]), threads)


@handles(r"st\.(global|shared)(?:\.v[24])?\.[bsuf](16|32|64)", "address", "b{1}s")
def store(m: Machine, threads, address, values, space: str, bits: str) -> None:
    memory = m.memory if space == "global" else m.shared
    memory.store(threads, address, values, int(bits) // 8)


@handles(r"cp\.async\.c[ag]\.shared\.global", "address", "address", "text", "b32")
def cp_async(m: Machine, threads, to, of, size: str, given) -> None:
    size = int(size, 0)
    given, found = size if given is None else given, np.zeros((threads.size, size // 4), np.uint32)
    if not np.isin(given, (0, size)).all():
        raise UnknownError(f"cp.async of some of {size} bytes")
    read = np.broadcast_to(given, threads.shape) > 0
    if read.any():
        found[read] = np.stack(m.memory.load(threads[read], of[read], 4, size // 4), 1)
    units = m.shared.units(threads, to, size)
    m.shared.writing(threads, units, COPYING)

    def end(over: np.ndarray) -> None:
        m.shared.halves[units[over]] = found.view(np.uint16)[over]
        m.shared.writer[units[over]] = m.shared.own[threads[over]][:, None]

    m.copies.add(threads, end)


GROUPS = r"(cp\.async|cp\.async\.bulk|wgmma)"


@handles(GROUPS + r"\.commit_group(?:\.sync\.aligned)?")
def commit(m: Machine, threads, of: str) -> None:
    m.groups[of].count[threads] += 1


@handles(GROUPS + r"\.wait_group(?:\.read|\.sync\.aligned)?", "text")
def wait(m: Machine, threads, most: str, of: str) -> None:
    m.groups[of].wait(threads, int(most))


@handles(r"shfl\.sync\.(idx|bfly)\.b32", "slots", "b32", "b32", "text", "text")
def shfl(m: Machine, threads, to, of, lane, most: str, members: str, kind: str) -> None:
    if (most, members) != ("31", "-1"):
        raise UnknownError(f"shfl.sync of {most}, {members}")
    warps = m.warps(threads)
    lanes = (lane.reshape(warps.shape) & np.uint32(31)).astype(np.int64)
    lanes = lanes if kind == "idx" else lanes ^ np.arange(32)
    m.put_at(to[0], np.take_along_axis(of.reshape(warps.shape), lanes, 1).ravel(), threads)


@translates(r"elect\.sync")
def elect(code: Code, operands: list[str]) -> Step:
    lane, chosen = (code.slot(o, "pred") for o in operands[0].split("|"))
    if operands[1] != "-1":
        raise UnknownError(f"elect.sync {operands}")

    def step(m: Machine, mask: Mask) -> None:
        m.put(lane, np.zeros(1, np.uint32), mask)
        m.put(chosen, m.all % 32 == 0, mask)

    return step


@handles(r"bar\.warp\.sync", "text")
def bar_warp(m: Machine, threads, members: str) -> None:
    if members != "-1":
        raise UnknownError(f"bar.warp.sync {members}")
    m.shared.warp_barrier(m.warps(threads))


# Matrices of 8 rows of 16 bytes, of which each thread of a warp has two neighbours.
MATRIX = r"matrix\.sync\.aligned\.m8n8\.x(1|2|4)(\.trans)?\.shared\.b16"
TRANSPOSED = {".trans": (0, 1, 3, 2), None: (0, 1, 2, 3)}


def _rows(m: Machine, threads, address, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the threads that say where a row is, and its units."""
    first = m.warps(threads)[:, : 8 * count].ravel()
    return first, m.shared.units(first, address.reshape(-1, 32)[:, : 8 * count].ravel(), 16)


@handles("ld" + MATRIX, "slots", "address")
def ldmatrix(m: Machine, threads, slots, address, count: str, trans: str | None) -> None:
    n = int(count)
    first, units = _rows(m, threads, address, n)
    m.shared.reading(first, units)
    rows = m.shared.halves[units].reshape(-1, n, 8, 8).transpose(TRANSPOSED[trans])
    found = np.ascontiguousarray(rows).view(np.uint32).reshape(-1, n, 32)
    for i, slot in enumerate(slots):
        m.put_at(slot, found[:, i].ravel(), threads)


@handles("st" + MATRIX, "address", "b32s")
def stmatrix(m: Machine, threads, address, values, count: str, trans: str | None) -> None:
    n = int(count)
    first, units = _rows(m, threads, address, n)
    given = np.stack([v.reshape(-1, 32) for v in values], 1).view(np.uint16)
    given = given.reshape(-1, n, 8, 8).transpose(TRANSPOSED[trans]).reshape(-1, 8)
    m.shared.writing(first, units, given=given)
