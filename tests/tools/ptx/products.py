# SPDX-License-Identifier: Apache-2.0
"""Instructions of tensor cores: products are exact, and their sum is added with one rounding."""

import numpy as np

from ptx.arithmetic import widened
from ptx.bulk import swizzled
from ptx.machine import GROUP, Machine, handles
from ptx.memory import UNIT, FaultError
from ptx.program import UnknownError


def floats(bits: np.ndarray, kind: str) -> np.ndarray:
    """Return 16-bit numbers as float64."""
    return (widened(bits) if kind == "bf16" else bits.view(np.float16)).astype(np.float64)


def pairs(m: Machine, slot: int, warps: np.ndarray, kind: str) -> np.ndarray:
    """Return registers of two numbers as 8 rows of 8 columns [warps, 8, 8]."""
    bits = np.ascontiguousarray(m.full(slot, warps)).view(np.uint16)
    return floats(bits, kind).reshape(-1, 8, 8)


def left_of(m: Machine, slots: list[int], warps: np.ndarray, kind: str) -> np.ndarray:
    """Return four registers as the left side of a product [warps, 16, 16]."""
    a, b, c, d = (pairs(m, slot, warps, kind) for slot in slots)
    return np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)], 2)


MMA = r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.\1\.f32"


@handles(MMA, "slots", "slots", "slots", "b32s")
def mma(m: Machine, threads, to, a, b, sums, kind: str) -> None:
    warps = m.warps(threads)
    key = (*map(m.value, a), threads)  # the one before often had the same left side
    if not all(x is y for x, y in zip(key, m.left[:5], strict=True)):
        m.left = (*key, left_of(m, a, warps, kind))
    right = np.concatenate([pairs(m, s, warps, kind) for s in b], 2)  # [warps, 8 n, 16 k]
    product = m.left[5] @ right.transpose(0, 2, 1)  # [warps, 16, 8]
    for i, old in enumerate(sums):
        part = product[:, i // 2 * 8 : i // 2 * 8 + 8, i % 2 :: 2].ravel()
        total = (old.view(np.float32) + part).astype(np.float32)
        m.put_at(to[i], total.view(np.uint32), threads)


def _units(m: Machine, groups, descriptor: np.ndarray, size: int, transposed: bool) -> np.ndarray:
    """Return where the elements [groups, size, 16] of a side of a product lie in shared memory.

    By a descriptor: rows of 32, 64 or 128 bytes, eight of which are a pattern; or, transposed, as
    many columns, of which the next ones and the next eight rows lie at offsets of their own.
    """
    modes = np.unique(descriptor >> 62 & 3)
    if modes.size != 1 or modes[0] == 0 or (descriptor >> 49 & 7).any():
        raise UnknownError(f"descriptors {[hex(d) for d in descriptor]} of a product")
    mode = 4 - int(modes[0])  # 1 says 128 bytes
    fields = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    start, leading, stride = (v.astype(np.int64)[:, None, None] for v in fields)
    i, k, wide = np.arange(size)[:, None], np.arange(16), 16 << mode
    if transposed:
        many = wide // 2
        at = i // many * leading + i % many * 2 + k // 8 * stride + k % 8 * wide
    else:
        at = i // 8 * stride + i % 8 * wide + 2 * k
    at = swizzled(start + at, mode)
    threads = np.repeat(groups[:, 0], at[0].size)
    return m.shared.units(threads, at.ravel(), UNIT).reshape(at.shape)


WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2"


@handles(WGMMA, "slots", "slots", "b64", "pred", *["text"] * 4)
def wgmma(m: Machine, threads, sums, a, b, add, *rest) -> None:
    *flags, n, kind = rest
    groups, n, registers = m.warps(threads, GROUP), int(n), len(a) == 4
    if flags[:2] != ["1", "1"] or (flags[3] is None) != registers:
        raise UnknownError(f"wgmma of {flags}")
    _check_fence(m, [*sums, *a * registers], threads)
    read = [(b.reshape(groups.shape)[:, 0], n, flags[3 - registers] == "1")]
    if not registers:
        read.insert(0, (m.full(a[0], groups[:, 0]), 64, flags[2] == "1"))
    units = [_units(m, groups, *of) for of in read]
    for group, *parts in zip(groups, *units, strict=True):
        read = np.concatenate([part.ravel() for part in parts])
        m.products.add(group, m.shared.begin_read(group, read), sums, a if registers else ())
    left, right = [None, *(floats(m.shared.halves[u], kind) for u in units)][-2:]
    if registers:
        left = left_of(m, a, groups.reshape(-1, 32), kind).reshape(-1, 64, 16)
    total = left @ right.transpose(0, 2, 1)  # [groups, 64, n]
    # A warp has 16 rows; of each 8 rows and 8 columns a thread has two neighbours.
    total = total.reshape(-1, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
    for slot, part in zip(sums, total.reshape(n // 2, -1), strict=True):
        if add.any():
            part = part + np.where(add, m.full(slot, threads).view(np.float32), 0)
        m.put_at(slot, part.astype(np.float32).view(np.uint32), threads)


def _check_fence(m: Machine, slots: list[int], threads: np.ndarray) -> None:
    """Check that threads set registers before the last wgmma.fence, or tensor cores did."""
    computing = {s for *_, sums, _ in m.products.begun for s in sums}
    for slot in {*slots} - computing:
        now, then = m.registers[slot], m.fenced[slot] if m.fenced else None
        same = now is None or now is then
        if not same and then is not None:
            same = (m.full(slot, threads) == np.broadcast_to(then, m.size)[threads]).all()
        if not same:
            text = "a wgmma uses a register that was set after the last wgmma.fence"
            raise FaultError("no fence", text)


@handles(r"wgmma\.fence\.sync\.aligned")
def fence(m: Machine, threads) -> None:
    m.fenced = list(m.registers)
