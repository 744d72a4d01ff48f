# SPDX-License-Identifier: Apache-2.0
"""Global memory, which is the tensors' own, and shared memory; both know of every byte.

Of global memory: where allocations end, and which bytes anybody has written. Of shared memory: who
wrote and read each two bytes since the last barrier, and which are on their way in or out.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator

import numpy as np
import torch

BASE = 1024  # of shared memory: swizzles take bits of absolute addresses
UNIT = 2  # bytes that shared memory is watched by
# Who wrote a unit, or read it last: the epoch between two barriers, and a thread below it.
EPOCH = 1 << 16
MANY = EPOCH - 1  # several warps
WARP = 1 << 15  # a thread that bar.warp.sync has followed: its warp
SETTLED = 1  # long ago: every thread may know
COPYING = 1 << 60  # cp.async
ARRIVING = 1 << 61  # a bulk copy; above it the number of the copy
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class FaultError(Exception):
    """What no program may do; ``kind`` says what.

    "outside" of every allocation; "misaligned"; "uninitialised"; a "race" of threads without a
    barrier; "too early": a copy, or what tensor cores compute, is used before its wait;
    "overtaken": what is still read is written; "no fence" before a reader that is no thread;
    "bytes" of a copy that are not those expected; "deadlock"; "diverged": threads that have to run
    together; "undefined": a register that nothing has set.
    """

    def __init__(self, kind: str, text: str):
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Allocation:
    """The bytes of a tensor's storage, and which of them were written."""

    def __init__(self, storage: torch.UntypedStorage):
        self.storage, self.base, self.size = storage, storage.data_ptr(), storage.nbytes()
        self.bytes = torch.tensor([], dtype=torch.uint8).set_(storage).numpy()
        self.written, self.fresh = np.zeros(self.size, np.uint8), False

    def words(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return both as words: one that was written is all ones."""
        whole = self.size // width * width
        return self.bytes[:whole].view(WORDS[width]), self.written[:whole].view(WORDS[width])


class Global:
    """Storages by address."""

    def __init__(self):
        self.starts: list[int] = []
        self.allocations: list[Allocation] = []

    def add(self, t: torch.Tensor, fresh: bool = False) -> None:
        """Have a tensor whose elements, unless it is ``fresh``, were written before."""
        storage, size = t.untyped_storage(), t.element_size()
        at = bisect_right(self.starts, storage.data_ptr()) - 1
        if not storage.nbytes():
            return
        if at < 0 or self.starts[at] != storage.data_ptr():
            at += 1
            self.starts.insert(at, storage.data_ptr())
            self.allocations.insert(at, Allocation(storage))
            self.allocations[at].fresh = fresh
        if t.numel() and not self.allocations[at].fresh:
            shape, stride = (*t.shape, size), (*(size * s for s in t.stride()), 1)
            written = torch.from_numpy(self.allocations[at].written)
            written.as_strided(shape, stride, size * t.storage_offset()).fill_(255)

    def parts(self, address: np.ndarray, width: int) -> Iterator[tuple]:
        """Yield (allocation, which of the addresses are in it, the offset of each)."""
        odd = address[address % width > 0]
        if odd.size:
            raise FaultError("misaligned", f"{width} bytes of global memory at {odd[0]:#x}")
        todo = np.arange(address.size)
        while todo.size:
            first = int(address[todo[0]])
            at = bisect_right(self.starts, first) - 1
            found = self.allocations[max(at, 0)]
            past = first + width - found.base - found.size
            if at < 0 or past > 0:
                text = f", {past} bytes past the end of a tensor of {found.size}" * (at >= 0)
                raise FaultError("outside", f"{width} bytes of global memory at {first:#x}{text}")
            offset = address[todo] - np.uint64(found.base)  # of what is before it: huge
            inside = offset <= found.size - width
            yield found, todo[inside], offset[inside].astype(np.int64)
            todo = todo[~inside]

    def load(self, _, address: np.ndarray, width: int, count: int = 1) -> list[np.ndarray]:
        """Return ``count`` words of ``width`` bytes from each address, as a list of arrays."""
        out = [np.empty(address.size, WORDS[width]) for _ in range(count)]
        for found, which, offset in self.parts(address, width * count):
            words, written = found.words(width)
            for i, into in enumerate(out):
                at = offset // width + i
                if (~written[at]).any():
                    raise FaultError("uninitialised", f"{width} bytes of global memory are read")
                into[which] = words[at]
        return out

    def store(self, _, address: np.ndarray, values: list[np.ndarray], width: int) -> None:
        for found, which, offset in self.parts(address, width * len(values)):
            words, written = found.words(width)
            for i, value in enumerate(values):
                words[offset // width + i] = value[which]
                written[offset // width + i] = np.iinfo(WORDS[width]).max


class Copy:
    """A bulk copy into shared memory on its way, and which threads of its block wait no more."""

    codes = itertools.count(ARRIVING)

    def __init__(self, block: int, units: np.ndarray, threads: int, barrier: tuple, phase: int):
        self.code, self.block, self.units = next(self.codes), block, units
        self.seen, self.barrier, self.phase = np.zeros(threads, np.bool_), barrier, phase


class Shared:
    """Shared memory of several blocks that run in step, and who did what to it when."""

    def __init__(self, blocks: int, size: int, threads: int):
        self.size, self.threads, self.pitch = size, threads, -(-max(size, 16) // 16) * 16
        self.bytes = np.zeros(blocks * self.pitch, np.uint8)
        self.halves = self.bytes.view(np.uint16)
        units = self.halves.size
        self.writer, self.reader = np.zeros(units, np.int64), np.zeros(units, np.int64)
        self.busy = np.zeros(units, np.uint8)  # readers that are no threads and have not finished
        self.unfenced = np.zeros(units, np.bool_)  # from tensor cores and bulk copies
        self.copies: list[Copy] = []
        thread = np.arange(blocks * threads)
        self.block, self.thread = thread // threads, thread % threads
        self.epoch = np.zeros(thread.size, np.int64)
        self.barrier(np.ones(thread.size, np.bool_))

    def barrier(self, threads: np.ndarray) -> None:
        """Let what all threads of some blocks did be known to all of them."""
        self.epoch[threads] += EPOCH
        self.own, self.warp = self.epoch | self.thread, self.epoch | (self.thread // 32)
        for copy in list(self.copies):
            if copy.seen.any() and threads[copy.block * self.threads]:
                self.settle(copy)

    def warp_barrier(self, warps: np.ndarray) -> None:
        """Let what threads of warps [warps, 32] did be known to those of the same warp."""
        for first, *_ in warps:
            writer, own = self._of(self.block[first], self.writer), self.own[first]
            writer[(writer >= own) & (writer < own + 32)] = self.warp[first] | WARP

    def settle(self, copy: Copy) -> None:
        """Let the bytes of a copy be known to all threads."""
        self.copies.remove(copy)
        self.writer[copy.units[self.writer[copy.units] == copy.code]] = SETTLED

    def fence(self, threads: np.ndarray) -> None:
        """Let tensor cores and bulk copies see what threads wrote, or know to be written."""
        for block in np.unique(self.block[threads]):
            mine = threads[self.block[threads] == block]
            unfenced, writer = (self._of(block, units) for units in (self.unfenced, self.writer))
            if mine.size == self.threads:
                unfenced[:] = False
            unfenced &= (writer >= self.epoch[mine[0]]) & ~np.isin(writer, self.own[mine])

    def _of(self, block: int, units: np.ndarray) -> np.ndarray:
        size = self.pitch // UNIT
        return units[block * size : (block + 1) * size]

    def units(self, threads: np.ndarray, address: np.ndarray, width: int) -> np.ndarray:
        """Return the units [threads, n] of ``width`` bytes at each thread's address."""
        address = address.astype(np.int64)
        outside = (address < BASE) | (address + width > BASE + self.size)
        for bad, kind in ((outside, "outside"), (address % width > 0, "misaligned")):
            if bad.any():
                where = f"at {address[bad][0] - BASE} of {self.size} of shared memory"
                raise FaultError(kind, f"{width} bytes {where}")
        first = (address - BASE + self.block[threads] * self.pitch) // UNIT
        return first[:, None] + np.arange(width // UNIT)

    def reading(self, threads: np.ndarray, units: np.ndarray) -> None:
        """Check and remember that threads read units [threads, n]."""
        own, epoch, warp = (v[threads][:, None] for v in (self.own, self.epoch, self.warp))
        self._check(
            "read", threads, units, (self.writer[units] >= epoch) & (self.writer[units] != own)
        )
        others = (self.reader[units] >= epoch) & (self.reader[units] != warp)
        self.reader[units] = np.where(others, epoch | MANY, warp)
        several = self.reader[units] != warp
        if several.any():
            self.reader[units[several]] = np.broadcast_to(epoch | MANY, units.shape)[several]

    def writing(self, threads: np.ndarray, units: np.ndarray, code=None, given=None) -> None:
        """Check and remember that threads write units [threads, n], by a copy with a ``code``.

        Or what they are ``given``, at once: to write what is there already is no race.
        """
        own, epoch, warp = (v[threads][:, None] for v in (self.own, self.epoch, self.warp))
        new = (self.writer[units] >= epoch) & (self.writer[units] != own)
        read = (self.reader[units] >= epoch) & (self.reader[units] != warp)
        if given is not None:
            different = self.halves[units] != given
            new, read = new & different, read & different
        self._check("written", threads, units, new)
        if read.any():
            text = "is written after others have read it, without a barrier"
            raise FaultError("race", f"{self._where(units[read])} {text}")
        busy = self.busy[units] > 0
        if busy.any():
            raise FaultError("overtaken", f"{self._where(units[busy])} is written while it is read")
        self.writer[units] = own if code is None else code
        self.unfenced[units] = code is None or code < ARRIVING
        if given is not None:
            self.halves[units] = given
            if (self.halves[units] != given).any():
                raise FaultError(
                    "race", f"{self._where(units[0])} is written by two threads at once"
                )

    def _where(self, units: np.ndarray) -> str:
        block, at = divmod(int(units[0]) * UNIT, self.pitch)
        return f"shared memory at {at} of block {block}"

    def _check(self, how: str, threads, units: np.ndarray, new: np.ndarray) -> None:
        """Raise what is wrong with units that others wrote in this epoch, those that are ``new``.

        Or that nobody has written, if they are read.
        """
        if how == "read" and not self.writer[units].all():
            where = self._where(units[self.writer[units] == 0])
            raise FaultError("uninitialised", f"{where} is read, and nobody has written it")
        copies = {copy.code: copy for copy in self.copies} if new.any() else {}
        for row, column in zip(*np.nonzero(new), strict=True):
            code, thread = int(self.writer[units[row, column]]), self.thread[threads[row]]
            where = f"{self._where(units[row, column:])} is {how} by thread {thread}"
            if code >= ARRIVING and (how == "written" or not copies[code].seen[thread]):
                raise FaultError("too early", f"{where} before a bulk copy has arrived")
            if COPYING <= code < ARRIVING:
                raise FaultError("too early", f"{where} before a cp.async is waited for")
            if code < COPYING and code & MANY != WARP | (thread // 32):
                text = f"after {code & MANY} has written it, without a barrier"
                raise FaultError("race", f"{where} {text}")

    def load(self, threads, address, width: int, count: int = 1) -> list[np.ndarray]:
        """Return ``count`` words of ``width`` bytes from each address, as a list of arrays."""
        units = self.units(threads, address, width * count)
        self.reading(threads, units)
        return list(np.ascontiguousarray(self.halves[units]).view(WORDS[width]).T)

    def store(self, threads, address, values: list[np.ndarray], width: int) -> None:
        units = self.units(threads, address, width * len(values))
        self.writing(threads, units, given=np.stack(values, 1).view(np.uint16))

    def begin_read(self, threads: np.ndarray, units: np.ndarray) -> Callable[[np.ndarray], None]:
        """Have what is no thread read units [n] of a block for ``threads``; return what ends it."""
        new = self.writer[units] >= self.epoch[threads[0]]
        if threads.size == 1:
            new &= self.writer[units] != self.own[threads[0]]
        codes, first = np.unique(np.where(new, self.writer[units], 0), return_index=True)
        each = np.zeros((threads.size, codes.size), np.bool_) | (codes > 0)
        self._check("read", threads, np.broadcast_to(units[first], each.shape), each)
        self._check("read", threads[:1], units[None], np.zeros((1, units.size), np.bool_))
        unfenced = self.unfenced[units]
        if unfenced.any():
            text = "was written by threads, without a fence for other readers"
            raise FaultError("no fence", f"{self._where(units[unfenced])} {text}")
        self.busy[units] += 1

        def end(over: np.ndarray) -> None:
            if not over.all():
                raise FaultError("diverged", "some threads of a wgmma do not wait for it")
            self.busy[units] -= 1
            alone, epoch = self.warp[threads[0]], self.epoch[threads[0]]
            self.reader[units] = alone if threads.size == 1 else epoch | MANY

        return end
