# SPDX-License-Identifier: Apache-2.0
"""Reads machine code as ``nvdisasm -c`` prints it: opcodes, loops, and the main loop among them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import networkx  # PyTorch needs it, too

# Matrix instructions, the largest first: of two loops the one with the larger kind is the main one.
MATRIX = (("UTCHMMA",), ("HGMMA",), ("HMMA",), ("FFMA", "FFMA2"))
ASYNC = ("LDGSTS", "UTMALDG")  # loads that a pipeline is made of
LOADS = ("LDG", "LD", "UBLKCP", *ASYNC)

_INSTRUCTION = re.compile(
    r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(?P<guard>!?\w+) )?(?P<opcode>\w+)(?P<rest>.*)"
)
_NEVER = ("!PT", "!UPT")
_LABEL = re.compile(r"(\.L_\w+)")
# What follows the opcode of a branch that is always taken: modifiers and a label.
_ALWAYS = re.compile(r"(\.\w+)* `\(\.L_\w+\)")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its ``opcode`` without modifiers, and the text after it."""

    opcode: str
    rest: str = field(repr=False)
    guarded: bool = False

    @property
    def targets(self) -> list[str]:
        """The labels that the instruction names."""
        return _LABEL.findall(self.rest)

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        if self.guarded:
            return True
        if self.opcode == "BRA":
            return ".DIV" in self.rest or not _ALWAYS.match(self.rest)
        return self.opcode not in ("EXIT", "RET", "BRX", "JMP", "JMX", "BRXU")


@dataclass(frozen=True)
class MainLoop:
    """The opcodes of a loop, counted: all of them, and those of one ``turn``.

    The turn is the way through its branches with the most matrix instructions, the shortest of
    these. That leaves out what a loop does now and then: waiting once more for a barrier, or the
    end of a tile where one loop makes all tiles. ``kind`` names the matrix instructions ("HGMMA",
    "HGMMA+HMMA"; "" if there are none).
    """

    kind: str
    opcodes: Counter
    turn: Counter

    @property
    def matrix(self) -> int:
        """The number of matrix instructions of a turn."""
        return _sum(self.turn, self.kind.split("+"))

    @property
    def instructions(self) -> int:
        """The number of instructions of a turn."""
        return sum(self.turn.values())


class Code:
    """The instructions of one kernel and the blocks that they form."""

    def __init__(self, text: str) -> None:
        """``text``: what nvdisasm prints. Instructions that are never carried out become NOPs."""
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in text.splitlines():
            if match := _INSTRUCTION.match(line):
                guard, opcode, rest = match.group("guard", "opcode", "rest")
                if guard in _NEVER:  # such as the loads beside cp.async that load nothing
                    opcode, rest = "NOP", ""
                guarded = guard not in (None, "PT", "UPT")
                self.instructions.append(Instruction(opcode, rest, guarded))
            elif line.startswith(".L_"):
                self.labels[line.split(":")[0]] = len(self.instructions)

    @property
    def opcodes(self) -> Counter:
        """How often each opcode occurs."""
        return Counter(i.opcode for i in self.instructions)

    @cached_property
    def blocks(self) -> dict[int, range]:
        """The instructions that run one after the other, by the index of the first."""
        starts = {0, *self.labels.values()}
        for i, instruction in enumerate(self.instructions):
            if instruction.targets or not instruction.falls_through:
                starts.add(i + 1)
        bounds = [*sorted(s for s in starts if s < len(self.instructions)), len(self.instructions)]
        return {first: range(first, end) for first, end in pairwise(bounds)}

    @cached_property
    def successors(self) -> dict[int, set[int]]:
        """The blocks that may follow each block."""
        found = {}
        for first, block in self.blocks.items():
            last = self.instructions[block[-1]]
            after = {block.stop} if last.falls_through else set()
            if last.opcode != "BSSY":  # says where diverging threads meet: behind the next BSYNC
                after |= {self.labels[t] for t in last.targets if t in self.labels}
            found[first] = after & self.blocks.keys()
        return found

    def loops(self) -> Iterator[frozenset[int]]:
        """Yield the blocks of every loop, outer loops before the loops inside."""
        pending = [frozenset(self.blocks)]
        while pending:
            for part in _components(pending.pop(), self.successors):
                if len(part) == 1 and not self.successors[next(iter(part))] & part:
                    continue
                yield part
                pending.append(part - self._entries(part))

    def main_loop(self) -> MainLoop | None:
        """Return the innermost loop with the most matrix instructions of the largest kind.

        Loops that only wait inside it are part of it. Without matrix instructions in any loop, it
        is the one with the most loads; None without a loop that loads.
        """
        loops = [(part, self._count(part)) for part in self.loops()]
        for kinds in (*MATRIX, LOADS):
            # Of two alike the one with the pipeline, then the one with less around them.
            having = [
                ((_sum(counts, kinds), _sum(counts, ASYNC), -sum(counts.values())), part, counts)
                for part, counts in loops
                if _sum(counts, kinds)
            ]
            inner = [one for one in having if not any(other < one[1] for _, other, _ in having)]
            if inner:
                _, part, counts = max(inner, key=lambda one: one[0])
                opcodes = LOADS if kinds is LOADS else _largest(counts, kinds)
                turn = self._count(self._turn(part, opcodes))
                return MainLoop("" if kinds is LOADS else "+".join(opcodes), counts, turn)
        return None

    def _turn(self, part: frozenset[int], opcodes: Iterable[str]) -> list[int]:
        """Return the blocks of the way round a loop with the most ``opcodes``; the shortest."""

        def value(way: list[int]) -> tuple[int, int]:
            counts = self._count(way)
            return _sum(counts, opcodes), -sum(counts.values())

        start = min(self._entries(part))
        ways = {start: [start]}
        # Components come in the order of the ways; one of several blocks is a loop that waits.
        for blocks in _components(part - {start}, self.successors):
            before = [way for b, way in ways.items() if self.successors[b] & blocks]
            way = max(before, key=value) + sorted(blocks)
            ways |= dict.fromkeys(blocks, way)
        return max((way for b, way in ways.items() if start in self.successors[b]), key=value)

    def _entries(self, part: frozenset[int]) -> frozenset[int]:
        """Return the blocks of a loop that others lead to; there is one, but for odd code."""
        entries = {b for a, to in self.successors.items() if a not in part for b in to & part}
        # Nothing leads to the endless loop behind the code.
        return frozenset(entries or {min(part)})

    def _count(self, blocks: Iterable[int]) -> Counter:
        return Counter(self.instructions[i].opcode for b in blocks for i in self.blocks[b])


def _sum(counts: Counter, opcodes: Iterable[str]) -> int:
    return sum(counts[o] for o in opcodes)


def _largest(counts: Counter, largest: tuple[str, ...]) -> list[str]:
    """Return the matrix instructions of the tensor cores that occur, or those that multiply-add."""
    among = largest if largest is MATRIX[-1] else [o for kinds in MATRIX[:-1] for o in kinds]
    return [o for o in among if counts[o]]


def _components(nodes: frozenset[int], successors: dict[int, set[int]]) -> list[frozenset[int]]:
    """Return the strongly connected components among ``nodes``, each before those it leads to."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(sorted(nodes))
    graph.add_edges_from((n, after) for n in sorted(nodes) for after in successors[n] & nodes)
    parts = networkx.condensation(graph)
    return [frozenset(parts.nodes[n]["members"]) for n in networkx.topological_sort(parts)]
