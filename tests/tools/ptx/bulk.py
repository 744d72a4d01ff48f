# SPDX-License-Identifier: Apache-2.0
"""Instructions of sm_90's bulk copies: mbarriers, descriptors of tensors, copies of tiles.

A copy happens at once; that on a GPU it does not is what `memory.Shared` keeps track of.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ptx.machine import Machine, handles
from ptx.memory import UNIT, Copy, FaultError
from ptx.program import UnknownError

# What is where in the 128 bytes of a descriptor, in words of 4: a GPU's own order is a secret.
FIELDS = {"global_address": 0, "rank": 2, "global_dim": 4, "global_stride": 8, "box_dim": 12}
FIELDS |= {"element_stride": 16, "elemtype": 20, "interleave_layout": 21, "swizzle_mode": 22}
FIELDS |= {"fill_mode": 23}
TWO_BYTES = (6, 10)  # float16 and bfloat16 among the element types


@dataclass
class Mbarrier:
    """Completes a phase when all arrivals and bytes that it expects have come."""

    count: int
    left: int
    bytes: int = 0
    phase: int = 0  # so many are complete

    def change(self, arrivals: int, expected: int) -> None:
        self.left, self.bytes = self.left - arrivals, self.bytes + expected
        if self.left < 0 or (self.left == 0 and self.bytes < 0):
            text = f"an mbarrier gets {-self.left} arrivals and {-self.bytes} bytes too many"
            raise FaultError("bytes", text)
        if self.left == self.bytes == 0:
            self.phase, self.left = self.phase + 1, self.count


def swizzled(at: np.ndarray, mode: int) -> np.ndarray:
    """Return where a byte of shared memory goes: in rows of 32, 64 or 128 bytes for 1, 2, 3."""
    return at ^ ((at >> 7 & (1 << mode) - 1) << 4)


def _mbarriers(m: Machine, threads: np.ndarray, address: np.ndarray) -> list[tuple]:
    """Return (thread, key, mbarrier) of threads that use one."""
    m.shared.reading(threads, m.shared.units(threads, address, 8))
    keys = list(zip(m.shared.block[threads].tolist(), address.tolist(), strict=True))
    if unknown := {*keys} - m.mbarriers.keys():
        raise FaultError("uninitialised", f"there is no mbarrier at {unknown.pop()[1]:#x}")
    return [(t, key, m.mbarriers[key]) for t, key in zip(threads.tolist(), keys, strict=True)]


@handles(r"mbarrier\.(init|inval)\.shared(?:::cta)?\.b64", "address", "b32")
def init(m: Machine, threads, address, counts, what: str) -> None:
    m.shared.store(threads, address, [np.full(threads.size, what == "init", np.uint64)], 8)
    for i, key in enumerate(zip(m.shared.block[threads].tolist(), address.tolist(), strict=True)):
        if what == "init":
            m.mbarriers[key] = Mbarrier(int(counts[i]), int(counts[i]))
        else:
            m.mbarriers.pop(key, None)


@handles(r"mbarrier\.arrive\.expect_tx\.shared(?:::cta)?\.b64", "text", "address", "b32")
def arrive(m: Machine, threads, _, address, expected) -> None:
    found = _mbarriers(m, threads, address)
    for (*_, mbarrier), many in zip(found, expected.tolist(), strict=True):
        mbarrier.change(1, many)
    m.progress = True


@handles(r"mbarrier\.try_wait\.parity\.shared(?:::cta)?\.b64", "slots", "address", "b32")
def try_wait(m: Machine, threads, to, address, parity) -> None:
    found = _mbarriers(m, threads, address)
    phases = np.array([mbarrier.phase for *_, mbarrier in found])
    done = phases & 1 != parity & 1
    for copy in list(m.shared.copies):
        here = np.array([key == copy.barrier for _, key, _ in found])
        copy.seen[m.shared.thread[threads[here & done & (copy.phase < phases)]]] = True
        if copy.seen.all():
            m.shared.settle(copy)
    m.put_at(to[0], done, threads)
    m.trying[threads] = ~done


@handles(r"fence\.proxy\.async(?:\.shared::cta)?")
def fence(m: Machine, threads) -> None:
    m.shared.fence(threads)


REPLACE = r"tensormap\.replace\.tile\.({})\.shared::cta\.b1024\.b(32|64)"


@handles(REPLACE.format(r"\w+_dim|\w+_stride"), "address", "text", "b{1}")
def replace(m: Machine, threads, address, order: str, value, name: str, bits: str) -> None:
    width = int(bits) // 8
    offset = np.uint64(4 * FIELDS[name] + width * int(order, 0))
    m.shared.store(threads, address + offset, [value], width)


@handles(REPLACE.format(r"\w+"), "address", "b{1}")
def replace_single(m: Machine, threads, address, value, *of: str) -> None:
    replace(m, threads, address, "0", value, *of)


PUBLISH = r"tensormap\.cp_fenceproxy\.global\.shared::cta\.tensormap::generic\.release\.gpu"


@handles(PUBLISH + r"\.sync\.aligned", "address", "address")
def publish(m: Machine, threads, to, of) -> None:
    m.shared.warp_barrier(m.warps(threads))
    threads, to, of = threads[::32], to[::32], of[::32]
    for i, word in enumerate(m.shared.load(threads, of, 8, 16)):
        m.memory.store(threads, to + np.uint64(8 * i), [word], 8)
    for address in to.tolist():
        m.descriptors.pop(address, None)


@handles(r"fence\.proxy\.tensormap::generic\.acquire\.gpu", "address")
def acquire(m: Machine, threads, address) -> None:
    m.descriptors |= zip(address.tolist(), m.shared.warp[threads], strict=True)


class Tile:
    """What a copy is about: addresses of a tensor's elements, and their units of shared memory."""

    def __init__(self, m: Machine, thread: int, descriptor: int, corner: list[int], shared: int):
        maker = m.descriptors.get(descriptor)
        if maker is None:
            raise FaultError("no fence", "a descriptor is used without fence.proxy.tensormap")
        if maker >= m.shared.epoch[thread] and maker != m.shared.warp[thread]:
            raise FaultError("race", "a descriptor is used by another warp, without a barrier")
        words = np.array(m.memory.load(None, np.array([descriptor], np.uint64), 8, 16)).ravel()
        get = {name: words.view(np.int32)[i : i + 4] for name, i in FIELDS.items()}
        base, stride, mode = int(words[0]), int(words[4]), int(get["swizzle_mode"][0])
        (columns, rows), known = map(int, get["box_dim"][:2]), get["elemtype"][0] in TWO_BYTES
        dims = len(corner)  # two, or three of which a tile has one of the last
        known &= (
            get["rank"][0] == dims - 1 and 1 <= mode <= 3 and (get["box_dim"][2:dims] == 1).all()
        )
        known &= (get["element_stride"][:dims] == 1).all()
        if not known or get["interleave_layout"][0] or get["fill_mode"][0]:
            raise UnknownError(f"a descriptor of {words.view(np.int32)}")
        stack = int(words[5]) if dims > 2 else 0
        if 2 * columns > 16 << mode or base % 16 or (stride | stack) % 16 or shared % 128:
            text = f"{columns} columns from {base:#x}, stride {stride}, to {shared:#x}"
            raise FaultError("misaligned", f"a bulk copy of {text}")
        column, row = np.arange(columns) + corner[0], np.arange(rows)[:, None] + corner[1]
        inside = (row >= 0) & (column >= 0)
        if dims > 2:
            inside &= 0 <= corner[2] < get["global_dim"][2]
            base += corner[2] * stack
        inside &= (column < get["global_dim"][0]) & (row < get["global_dim"][1])
        self.inside, self.size = inside.ravel(), 2 * rows * columns
        self.address = (base + row * stride + 2 * column)[inside].astype(np.uint64)
        where = swizzled(shared + np.arange(0, self.size, 2), mode)
        self.units = m.shared.units(np.full(where.size, thread), where, UNIT).ravel()


def _tiles(m: Machine, threads, tensor: tuple, shared: np.ndarray) -> Iterator[Tile]:
    """Yield the tile of each thread."""
    corners = np.stack(tensor[1], 1).view(np.int32).tolist()
    of = zip(threads, tensor[0].tolist(), corners, shared.tolist(), strict=True)
    return itertools.starmap(functools.partial(Tile, m), of)


LOAD = r"cp\.async\.bulk\.tensor\.[23]d\.shared::cta\.global\.mbarrier::complete_tx::bytes"


@handles(LOAD, "address", "tensor", "address")
def bulk_load(m: Machine, threads, shared, tensor, barrier) -> None:
    tiles = _tiles(m, threads, tensor, shared)
    for tile, (thread, key, mbarrier) in zip(tiles, _mbarriers(m, threads, barrier), strict=True):
        copy = Copy(key[0], tile.units, m.block_threads, key, mbarrier.phase)
        m.shared.writing(np.array([thread]), tile.units[None], copy.code)
        m.shared.copies.append(copy)
        m.shared.halves[tile.units] = 0
        m.shared.halves[tile.units[tile.inside]] = m.memory.load(None, tile.address, 2)[0]
        mbarrier.change(0, -tile.size)
    m.progress = True


@handles(r"cp\.async\.bulk\.tensor\.2d\.global\.shared::cta\.bulk_group", "tensor", "address")
def bulk_store(m: Machine, threads, tensor, shared) -> None:
    for thread, tile in zip(threads[:, None], _tiles(m, threads, tensor, shared), strict=True):
        m.bulk.add(thread, m.shared.begin_read(thread, tile.units))
        m.memory.store(None, tile.address, [m.shared.halves[tile.units[tile.inside]]], 2)
