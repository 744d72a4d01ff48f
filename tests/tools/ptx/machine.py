# SPDX-License-Identifier: Apache-2.0
"""Runs a program: all threads of some blocks in step, each instruction as one NumPy operation.

Threads that go different ways run one way after the other, those that are furthest behind first,
under a mask.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ptx.arithmetic import BITS, DTYPES, bits_of, made
from ptx.memory import BASE, FaultError, Global, Shared
from ptx.program import ENDS, Instruction, Program, UnknownError

Mask = np.ndarray | None  # which threads run; None: all
Step = Callable[["Machine", Mask], None]
END = 1 << 30  # after the last block of code
HANDLERS: list[tuple[re.Pattern, Callable]] = []  # what translates instructions, by their name
NO_RESULT = ("st", "cp.", "mbarrier", "tensormap", "fence")
GROUP = 128  # threads that make a product of wgmma together
_IMMEDIATE = re.compile(r"0[fF]([0-9a-fA-F]{8})$|(-?(?:0[xX][0-9a-fA-F]+|\d+))U?$")


class Code:
    """A program translated: blocks of steps, whose registers and constants are numbered slots."""

    def __init__(self, program: Program):
        self.program, self.slots, self.constants = program, {}, {}
        self.params = {name: 8 * i for i, name in enumerate(program.params)}  # where each lies
        every = [each for block in program.blocks for each in block]
        self.together = GROUP if any(each.op.startswith("wgmma") for each in every) else 32
        self.blocks = []
        for following, block in enumerate(program.blocks, 1):
            end = block.pop() if block and ENDS.match(block[-1].op) else None
            steps = [(self._step(each), *self._touched(each), each) for each in block]
            self.blocks.append((steps, *self._end(end, following)))

    def _guard(self, guard: str | None) -> tuple[int | None, bool]:
        """Return the slot of a guard, and whether it is negated."""
        return guard and self.slot(guard.lstrip("!"), "pred"), bool(guard) and guard[0] == "!"

    def _end(self, end: Instruction | None, following: int) -> tuple:
        """Return where threads go (None: nowhere, at a barrier), the guard, and where else to."""
        target, guard = following, self._guard(end and end.guard)
        if end is not None:
            branch = end.op in ("bra", "bra.uni")
            target = self.program.labels[end.operands[0]] if branch else END
            if end.op == "bar.sync" and end.operands == ["0"] and guard[0] is None:
                target = None
            elif not branch and end.op not in ("ret", "exit"):
                raise UnknownError(str(end))
        return target, *guard, following

    def _touched(self, instruction: Instruction) -> tuple[set[int], set[int]]:
        """Return the registers of an instruction, and which it sets, but for tensor cores' sums."""
        first, rest = (
            {self.slots[r] for r in re.findall(r"%[\w.]+", " ".join(part)) if r in self.slots}
            for part in (instruction.operands[:1], instruction.operands[1:])
        )
        if instruction.op.startswith("wgmma"):
            return rest, set()
        return first | rest, set() if instruction.op.startswith(NO_RESULT) else first

    def slot(self, operand: str, kind: str) -> int:
        """Return the slot of a register, or of what is constant, as ``kind``."""
        if operand.startswith("%") or operand == "_":
            return self.slots.setdefault(operand, len(self.slots))
        key = f"{operand} as {kind}"
        if key not in self.slots:
            at = self.slots[key] = len(self.slots)
            self.constants[at] = self._constant(operand, kind)
        return self.slots[key]

    def _constant(self, operand: str, kind: str) -> np.ndarray:
        known, found = self.params | {"global_smem": BASE}, _IMMEDIATE.match(operand)
        if not found and operand not in known:
            raise UnknownError(f"operand {operand}")
        value = (int(found[1] or "0", 16) or int(found[2] or "0", 0)) if found else known[operand]
        if kind == "pred":
            return np.array([value != 0])
        bits = bits_of(kind)
        return np.array([value & ((1 << bits) - 1)], BITS[bits])

    def address(self, operand: str) -> Callable[["Machine", np.ndarray], np.ndarray]:
        """Return what gives the addresses of some threads that [register + offset] says."""
        base, _, offset = operand.strip("[] ").partition("+")
        slot, offset = self.slot(base.strip(), "b64"), int(offset.strip() or 0)

        def addresses(m: "Machine", threads: np.ndarray) -> np.ndarray:
            found = m.full(slot, threads)
            return found + found.dtype.type(offset % (1 << 8 * found.itemsize))

        return addresses

    def reader(self, operand: str | None, kind: str) -> Callable[["Machine", np.ndarray], Any]:
        """Return what gives a handler an operand: what `handles` says of each kind."""
        if operand is None or kind == "text":
            return lambda m, threads: operand
        if kind == "address":
            return self.address(operand)
        if kind == "tensor":
            base, _, corner = operand.strip("[] ").partition(",")
            address, corner = self.address(base), self.reader(corner, "b32s")
            return lambda m, threads: (address(m, threads), corner(m, threads))
        bits = "b32" if kind == "slots" else kind.removesuffix("s")
        slots = [self.slot(each.strip(), bits) for each in operand.strip("{} ").split(",")]
        if kind == "slots":
            return lambda m, threads: slots
        if kind.endswith("s"):
            return lambda m, threads: [m.full(slot, threads) for slot in slots]
        return lambda m, threads: m.full(slots[0], threads)

    def _step(self, instruction: Instruction) -> Step:
        step, (slot, negated) = self._unguarded(instruction), self._guard(instruction.guard)
        if slot is None:
            return step

        def guarded(m: "Machine", mask: Mask) -> None:
            on = m.value(slot) ^ negated
            on = on if mask is None else on & mask
            if on.any():
                step(m, None if on.all() else on)

        return guarded

    def _unguarded(self, instruction: Instruction) -> Step:
        op, operands = instruction.op, instruction.operands
        if operands and "{" not in operands[0] + operands[-1]:
            computed = made(op)
            if computed is not None and len(operands) == 1 + len(computed.of):
                return self._computing(operands, *computed)
        for pattern, handler in HANDLERS:
            if found := pattern.fullmatch(op):
                return handler(self, operands, *found.groups())
        raise UnknownError(str(instruction))

    def _computing(self, operands: list[str], function, kinds: tuple[str, ...], to: str) -> Step:
        slot, storage = self.slot(operands[0], to), np.bool_ if to == "pred" else BITS[bits_of(to)]
        of = [(self.slot(o, k), DTYPES[k]) for o, k in zip(operands[1:], kinds, strict=True)]

        def step(m: "Machine", mask: Mask) -> None:
            values = [cut(m.value(s), kind) for s, kind in of]
            m.put(slot, function(*values).view(storage), mask)

        return step


def cut(value: np.ndarray, kind: type) -> np.ndarray:
    """Return a register as ``kind``, of which it may have more bits."""
    if value.dtype != kind:
        size = np.dtype(kind).itemsize
        if value.dtype.itemsize > size:
            value = value.astype(BITS[8 * size])
        value = value.view(kind)
    return value


def translates(pattern: str) -> Callable:
    """Have a function translate the instructions whose name is ``pattern``, given its groups."""

    def keep(translate: Callable) -> Callable:
        HANDLERS.append((re.compile(pattern), translate))
        return translate

    return keep


def handles(pattern: str, *kinds: str) -> Callable:
    """Have a function run the instructions whose name is ``pattern``.

    It gets the machine, the threads, each operand and the groups of the name. Operands are of
    ``kinds``: "slots", the registers that it sets; "b32", a value for each thread, or "b32s", a
    list of such; "address", one for each thread; "tensor", the address of a descriptor and
    coordinates; "text". Groups may stand in them: "b{0}".
    """

    def keep(run: Callable) -> Callable:
        @translates(pattern)
        def translate(code: Code, operands: list[str], *groups: str) -> Step:
            padded = [*operands, *[None] * len(kinds)]
            reads = [code.reader(o, k.format(*groups)) for o, k in zip(padded, kinds, strict=False)]

            def step(m: "Machine", mask: Mask) -> None:
                threads = m.all if mask is None else np.flatnonzero(mask)
                run(m, threads, *[read(m, threads) for read in reads], *groups)

            return step

        return run

    return keep


class Groups:
    """What threads have begun and wait for in groups: cp.async, bulk copies, wgmma."""

    def __init__(self, threads: int):
        self.count, self.begun = np.zeros(threads, np.int64), []

    def add(self, threads: np.ndarray, end: Callable, sums: Sequence = (), of: Sequence = ()):
        """Begin what ``end`` ends for threads, and which meanwhile reads registers and adds."""
        self.begun.append((threads, self.count[threads], end, {*sums}, {*of}))

    def wait(self, waiting: np.ndarray, most: int) -> None:
        """End, for threads that are ``waiting``, all but what ``most`` groups have begun."""
        begun, self.begun = self.begun, []
        for threads, group, end, *registers in begun:
            over = np.isin(threads, waiting) & (group < self.count[threads] - most)
            if over.any():
                end(over)
            if not over.all():
                self.begun.append((threads, np.where(over, END, group), end, *registers))


class Machine:
    """Some blocks of a launch while they run.

    With ``skew`` not in step: some warps as far as they come, then the others.
    """

    def __init__(self, code: Code, memory: Global, params, blocks, grid, shared: int, skew=None):
        self.code, self.memory, self.params = code, memory, params
        self.block_threads = code.program.threads
        self.size = len(blocks) * self.block_threads
        self.all, self.everyone = np.arange(self.size), np.ones(self.size, np.bool_)
        self.shared = Shared(len(blocks), shared, self.block_threads)
        self.registers: list = [None] * len(code.slots)
        given = {"%tid.x": self.all % self.block_threads}
        for axis, name in enumerate("xyz"):
            given[f"%ctaid.{name}"] = np.repeat([b[axis] for b in blocks], self.block_threads)
            given[f"%nctaid.{name}"] = np.array([grid[axis]])
        given = {code.slots[n]: v.astype(np.uint32) for n, v in given.items() if n in code.slots}
        for slot, value in (code.constants | given).items():
            self.registers[slot] = value
        self.copies, self.bulk, self.products = (Groups(self.size) for _ in range(3))
        self.groups = {"cp.async": self.copies, "cp.async.bulk": self.bulk, "wgmma": self.products}
        self.mbarriers: dict = {}  # by block and address
        self.descriptors: dict = {}  # by address: the warp that a fence made them known to
        self.left: tuple = (None,) * 6  # side of the last product, and what it was made of
        self.overwritten = False  # was a register that a wgmma may still have read
        self.fenced: list = []  # registers as they were at the last wgmma.fence
        self.at = np.zeros(self.size, np.int64)  # the block of code a thread is before
        self.waiting = np.zeros(self.size, np.bool_)
        self.trying = np.zeros(self.size, np.bool_)  # for an mbarrier, in vain
        self.progress, self.alone = False, self.everyone
        if skew is not None:
            units = -(-self.block_threads // code.together)
            drawn = np.array([skew.random() < 0.5 for _ in range(units)])
            self.alone = drawn[self.all % self.block_threads // code.together]

    def value(self, slot: int) -> np.ndarray:
        """Return a register: an element for each thread, or one for all."""
        found = self.registers[slot]
        if found is None:
            name = next(n for n, s in self.code.slots.items() if s == slot)
            raise FaultError("undefined", f"{name} is read before it is set")
        return found

    def full(self, slot: int, threads: np.ndarray) -> np.ndarray:
        """Return a register of some threads."""
        found = self.value(slot)
        return found[threads] if found.size > 1 else np.broadcast_to(found, threads.shape)

    def put(self, slot: int, value: np.ndarray, mask: Mask) -> None:
        if mask is not None:
            old = self.registers[slot]
            value = np.where(mask, value, value.dtype.type(0) if old is None else old)
        self.registers[slot] = value

    def put_at(self, slot: int, value: np.ndarray, threads: np.ndarray) -> None:
        """Set a register of some threads."""
        if threads.size < self.size:
            new, old = np.zeros(self.size, value.dtype), self.registers[slot]
            new[:] = 0 if old is None else old
            new[threads] = value
            value = new
        self.registers[slot] = value

    def warps(self, threads: np.ndarray, size: int = 32) -> np.ndarray:
        """Return threads by whole warps [warps, 32], or by groups of them."""
        whole = threads.size % size == 0
        found = threads.reshape(-1, size) if whole else threads
        if not whole or (found[:, 0] % size).any() or (found[:, -1] - found[:, 0] >= size).any():
            raise FaultError("diverged", f"not all of {size} threads that have to run together")
        return found

    def run(self) -> bool:
        instruction = None
        try:
            while (at := self._next()) is not None:
                on, (steps, target, guard, negated, following) = at
                mask = None if on.all() else on
                for step, *touched, instruction in steps:  # noqa: B007, for the note
                    if self.products.begun:
                        self._check_products(on, *touched)
                    step(self, mask)
                if target is None:
                    self.at[on] = following
                    self._arrive(on)
                elif guard is None:
                    self.at[on] = target
                else:
                    taken = self.full(guard, self.all) ^ negated
                    self.at[on] = np.where(taken, target, following)[on]
        except Exception as error:
            error.add_note(f"at or after {instruction} of {self.code.program.name}")
            raise
        if self.bulk.begun:
            raise FaultError("too early", "a block ends while a bulk copy reads its shared memory")
        return self.overwritten

    def _next(self) -> tuple | None:
        """Return which threads run next, and the block of code they are before; None at the end."""
        ready = ~self.waiting & ~self.trying & (self.at < END)
        if not ready.any() and self.trying.any() and self.progress:
            ready, self.trying, self.progress = self.trying, ~self.everyone, False
        if not ready.any():
            if (self.at == END).all():
                return None
            raise FaultError("deadlock", "threads wait for what never comes")
        if not (ready & self.alone).any():
            self.alone = ~self.alone
        ready = ready & self.alone
        at = int(self.at[ready].min())
        return ready & (self.at == at), self.code.blocks[at]

    def _check_products(self, on: np.ndarray, touched: set[int], changed: set[int]) -> None:
        for threads, _, _, sums, of in self.products.begun:
            if not touched.isdisjoint(sums) and on[threads].any():
                raise FaultError("too early", "a register is used that a wgmma still computes")
            self.overwritten |= not changed.isdisjoint(of) and on[threads].any()

    def _arrive(self, on: np.ndarray) -> None:
        """Have threads wait for all others of their block, or let all go on."""
        self.waiting, self.progress = self.waiting | on, True
        there = (self.waiting | (self.at == END)).reshape(-1, self.block_threads).all(1)
        free = np.repeat(there, self.block_threads) & self.waiting
        if free.any():
            self.waiting &= ~free
            self.shared.barrier(free)


def launch(
    code: Code, memory: Global, params: np.ndarray, grid: tuple[int, ...], shared: int,
    most: int = 8192, skew: random.Random | None = None,
) -> bool:  # fmt: skip
    """Run all blocks of a launch, as many at a time as have ``most`` threads.

    Return whether registers were overwritten that a wgmma may still have read.
    """
    grid = (*grid, 1, 1)[:3]
    blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    together = max(1, min(most // code.program.threads, (1 << 21) // max(shared, 1)))
    shares = [blocks[i : i + together] for i in range(0, len(blocks), together)]
    of = code, memory, params
    with np.errstate(all="ignore"):
        overwritten = [Machine(*of, share, grid, shared, skew).run() for share in shares]
    return any(overwritten)
