# SPDX-License-Identifier: Apache-2.0
"""Reads programs as Triton hands them to ptxas: where sums start, how long rings of buffers are.

As a script it compiles those that `test_ptx.py` asks about and prints a JSON line for each; the
interpreter must be off then.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from sass import Code

_LABEL = re.compile(r"(\$L\w+):")
_STATEMENT = re.compile(r"\s*(?P<guard>@!?%\w+\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*?);")
_REGISTER = re.compile(r"%\w+")
_ZEROS = ("0f00000000", "0")
# Of the opcodes that are looked at, those whose first operand is read.
_SET_NOTHING = ("st", "bra", "cp", "bar", "wgmma.wait", "ret")


@dataclass(frozen=True)
class Statement:
    """One instruction: the registers that it sets, and the operands that it reads."""

    opcode: str
    sets: tuple[str, ...]
    reads: tuple[str, ...]
    guarded: bool

    @property
    def targets(self) -> list[str]:
        """The labels that the statement names."""
        return list(self.reads[-1:]) if self.opcode.startswith("bra") else []

    @property
    def falls_through(self) -> bool:
        """Whether the next statement may follow."""
        return self.guarded or not self.opcode.startswith(("bra", "ret"))


class Ptx(Code):
    """The statements of one kernel and the blocks that they form."""

    def __init__(self, text: str) -> None:
        self.instructions: list[Statement] = []
        self.labels: dict[str, int] = {}
        for line in text.splitlines():
            if match := _LABEL.match(line):
                self.labels[match[1]] = len(self.instructions)
            elif match := _STATEMENT.match(line.partition("//")[0]):
                operands, opcode = _split(match["operands"]), match["opcode"]
                first = 0 if opcode.startswith(_SET_NOTHING) else 1
                sets = tuple(_REGISTER.findall(" ".join(operands[:first])))
                reads = tuple(operands[first:])
                self.instructions.append(Statement(opcode, sets, reads, bool(match["guard"])))

    @cached_property
    def predecessors(self) -> dict[int, set[int]]:
        """The blocks that may come before each block."""
        found = defaultdict(set)
        for block, after in self.successors.items():
            for other in after:
                found[other].add(block)
        return found

    def inner_loops(self) -> Iterator[frozenset[int]]:
        """Yield the blocks of each loop that holds no other."""
        loops = list(self.loops())
        yield from (part for part in loops if not any(other < part for other in loops))

    def sums_start_from(self) -> set[str]:
        """Return what chains of float32 multiply-adds are begun with in inner loops.

        "zero", or the opcode of what has been computed before the loop or in an earlier turn.
        """
        found = set()
        for part in self.inner_loops():
            brought = set()
            for at in (i for block in part for i in self.blocks[block]):
                statement = self.instructions[at]
                if statement.opcode.startswith("fma.rn.f32"):
                    added = statement.reads[-1]
                    found |= {"zero"} if added in _ZEROS else set()
                    for register in _REGISTER.findall(added):
                        brought |= {*self._set_before(at, register, part)}
            for at in brought:
                found |= self._made_by(at, set())
        return found

    def _set_before(
        self, at: int, register: str, part: frozenset[int] | None = None
    ) -> Iterator[int]:
        """Yield where ``register`` has been set as the statement ``at`` reads it.

        With ``part``, a loop, only where that was before the turn that ``at`` is of.
        """
        (block,) = (b for b, within in self.blocks.items() if at in within)
        entries = () if part is None else self._entries(part)
        pending, seen = [(block, at, part is None)], set()
        while pending:
            block, end, before_turn = pending.pop()
            setting = range(block, end)[::-1]
            found = next((i for i in setting if register in self.instructions[i].sets), None)
            if found is not None:
                if before_turn:
                    yield found
                elif self.instructions[found].opcode.startswith("mov"):
                    for copied in _REGISTER.findall(self.instructions[found].reads[0]):
                        yield from self._set_before(found, copied, part)
                continue
            before_turn = before_turn or block in entries
            for before in self.predecessors[block]:
                if (before, before_turn) not in seen:
                    seen.add((before, before_turn))
                    pending.append((before, self.blocks[before].stop, before_turn))

    def _made_by(self, at: int, seen: set[int]) -> set[str]:
        """Return the opcodes behind what is set at ``at``, moves left out, and "zero"."""
        statement = self.instructions[at]
        if at in seen:
            return set()
        seen.add(at)
        if not statement.opcode.startswith("mov"):
            return {statement.opcode}
        if statement.reads[0] in _ZEROS:
            return {"zero"}
        registers = _REGISTER.findall(statement.reads[0])
        places = [place for r in registers for place in self._set_before(at, r)]
        return set().union(*(self._made_by(place, seen) for place in places))

    @property
    def unfinished(self) -> int:
        """How many groups of wgmma may still read shared memory when a loop turns."""
        waits = [s.reads[0] for s in self.instructions if s.opcode.startswith("wgmma.wait_group")]
        return max(map(int, waits), default=0)

    def rings(self) -> set[int]:
        """Return of how many buffers the rings are that wgmma reads in loops by descriptors.

        A descriptor is made of the number of a buffer, which goes from the last one to 0.
        """
        found = set()
        for part in self.inner_loops():
            within = {i for block in part for i in self.blocks[block]}
            for i in within:
                if self.instructions[i].opcode.startswith("wgmma.mma_async"):
                    descriptors = re.findall(r"%rd\d+", " ".join(self.instructions[i].reads))
                    pending, seen = [(i, d) for d in descriptors], set()
                    while pending:
                        for at in {*self._set_before(*pending.pop())} & within - seen:
                            seen.add(at)
                            statement = self.instructions[at]
                            if statement.opcode.startswith("selp"):
                                found |= self._length(at)
                            else:
                                reads = _REGISTER.findall(" ".join(statement.reads))
                                pending += [(at, register) for register in reads]
        return found

    def _length(self, at: int) -> set[int]:
        """Return n of ``selp i, 0, i + 1, i + 1 > n - 1``."""
        zero, _, predicate = self.instructions[at].reads
        setting = [self.instructions[i] for i in self._set_before(at, predicate)]
        return {
            int(s.reads[1]) + s.opcode.startswith("setp.gt")
            for s in setting
            if zero == "0" and s.opcode.startswith(("setp.gt", "setp.ge")) and s.reads[1].isdigit()
        }


def _split(text: str) -> list[str]:
    """Return the operands of a statement; those in braces or brackets are one."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return [part.strip() for part in parts if part.strip()]


def main() -> None:
    import aot
    from compiled_cases import calls, key

    fp32 = itertools.product((80, 90, 100), ("fp32",), (16,), ("default",))
    rings = itertools.product((90,), ("bf16", "fp16", "bf16-fp32"), (16, 32, 128), ("every",))
    for capability, kind, r, which in (*fp32, *rings):
        seen = set()
        for call in calls(aot.CHIPS[capability], kind, r, "even", which):
            name = call.kernel.__name__
            if key(call) in seen or (which == "every" and "ds_db" not in name):
                continue
            seen.add(key(call))
            program = Ptx(aot.ptx(call, capability))
            report = {
                "kind": kind,
                "name": f"{name} of sm_{capability}, {kind}, r = {r}: {call.config}",
                "starts": sorted(program.sums_start_from()),
                "unfinished": program.unfinished,
                "rings": sorted(program.rings()),
                "stages": call.config.num_stages,
            }
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
