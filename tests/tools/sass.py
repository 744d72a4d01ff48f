# SPDX-License-Identifier: Apache-2.0
"""Reads machine code as ``nvdisasm -c`` prints it: opcodes, loops, and the main loop among them."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import networkx  # PyTorch needs it, too

# Matrix instructions, the largest first: of two loops the one with the larger kind is the main one.
MATRIX = (("UTCHMMA",), ("HGMMA",), ("HMMA",), ("FFMA", "FFMA2"))
ASYNC = ("LDGSTS", "UTMALDG")  # loads that a pipeline is made of
LOADS = ("LDG", "LD", "UBLKCP", *ASYNC)

_INSTRUCTION = re.compile(
    r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(?P<guard>!?\w+) )?(?P<opcode>\w+)(?P<rest>.*)"
)
# What follows the opcode of a branch that is always taken: modifiers and a label.
_ALWAYS = re.compile(r"(\.\w+)* `\(\.L_\w+\)")
_ENDS = ("BRA", "EXIT", "RET", "BRX", "JMP", "JMX", "BRXU")


class Instruction(NamedTuple):
    """One instruction: its opcode without modifiers, the labels that it names, what may follow."""

    opcode: str
    targets: list[str]
    falls_through: bool

    @classmethod
    def of(cls, guard: str | None, opcode: str, rest: str) -> Instruction:
        if guard in (
            "!PT",
            "!UPT",
        ):  # never carried out, as loads beside cp.async that load nothing
            return cls("NOP", [], True)
        always = guard in (None, "PT", "UPT") and opcode in _ENDS
        if opcode == "BRA":
            always = always and ".DIV" not in rest and bool(_ALWAYS.match(rest))
        return cls(opcode, re.findall(r"\.L_\w+", rest), not always)


@dataclass(frozen=True)
class MainLoop:
    """A loop's opcodes, counted, and what one turn issues: matrix instructions and all.

    The turn is the way through its branches with the most matrix instructions, the shortest of
    these. That leaves out what a loop does now and then: waiting once more for a barrier, or the
    end of a tile where one loop makes all tiles. ``kind`` names the matrix instructions ("HGMMA",
    "HGMMA+HMMA"; "" if there are none).
    """

    kind: str
    opcodes: Counter
    matrix: int
    instructions: int


class Code:
    """The instructions of one kernel and the blocks that they form."""

    def __init__(self, text: str) -> None:
        """``text``: what nvdisasm prints."""
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in text.splitlines():
            if match := _INSTRUCTION.match(line):
                self.instructions.append(Instruction.of(*match.group("guard", "opcode", "rest")))
            elif line.startswith(".L_"):
                self.labels[line.split(":")[0]] = len(self.instructions)

    @property
    def opcodes(self) -> Counter:
        """How often each opcode occurs."""
        return Counter(i.opcode for i in self.instructions)

    @cached_property
    def graph(self) -> networkx.DiGraph:
        """What runs from one end to the other, by its first instruction, and what may follow it."""
        starts = {0, *self.labels.values()}
        for i, instruction in enumerate(self.instructions):
            if instruction.targets or not instruction.falls_through:
                starts.add(i + 1)
        bounds = [*sorted(s for s in starts if s < len(self.instructions)), len(self.instructions)]
        graph = networkx.DiGraph()
        for first, end in itertools.pairwise(bounds):
            block, last = self.instructions[first:end], self.instructions[end - 1]
            graph.add_node(first, opcodes=Counter(i.opcode for i in block))
            after = {end} if last.falls_through else set()
            if last.opcode != "BSSY":  # says where diverging threads meet: behind the next BSYNC
                after |= {self.labels[t] for t in last.targets if t in self.labels}
            graph.add_edges_from((first, b) for b in sorted(after) if b in bounds[:-1])
        return graph

    def loops(self) -> Iterator[set[int]]:
        """Yield the blocks of every loop, outer loops before the loops inside."""
        pending = [self.graph]
        while pending:
            graph = pending.pop()
            for part in networkx.strongly_connected_components(graph):
                if networkx.number_of_selfloops(graph.subgraph(part)) or len(part) > 1:
                    yield part
                    pending.append(self.graph.subgraph(part - self._entries(part)))

    def main_loop(self) -> MainLoop | None:
        """Return the innermost loop with the most matrix instructions of the largest kind.

        Loops that only wait inside it are part of it. Without matrix instructions in any loop, it
        is the one with the most loads; None without a loop that loads.
        """
        loops = [(part, self._count(part)) for part in self.loops()]
        for kinds in (*MATRIX, LOADS):

            def value(one, kinds=kinds) -> tuple[int, int, int]:
                # Of two alike the one with the pipeline, then the one with less around them.
                _, counts = one
                return _sum(counts, kinds), _sum(counts, ASYNC), -sum(counts.values())

            having = [(part, counts) for part, counts in loops if _sum(counts, kinds)]
            inner = [one for one in having if not any(part < one[0] for part, _ in having)]
            if inner:
                part, counts = max(inner, key=value)
                # All that the tensor cores do, or all that multiplies and adds.
                of = itertools.chain(*MATRIX[:-1]) if kinds in MATRIX[:-1] else kinds
                opcodes = [o for o in of if counts[o]]
                turn = self._count(self._turn(part, opcodes))
                if kinds is LOADS:
                    return MainLoop("", counts, 0, sum(turn.values()))
                return MainLoop("+".join(opcodes), counts, _sum(turn, opcodes), sum(turn.values()))
        return None

    def _turn(self, part: set[int], opcodes: Iterable[str]) -> list[int]:
        """Return the blocks of the way round a loop with the most ``opcodes``; the shortest."""

        def value(way: list[int]) -> tuple[int, int]:
            counts = self._count(way)
            return _sum(counts, opcodes), -sum(counts.values())

        start = min(self._entries(part))
        ways = {start: [start]}
        # Blocks in the order of the ways; several that lead to each other are a loop that waits.
        rest = networkx.condensation(self.graph.subgraph(part - {start}))
        for several in networkx.topological_sort(rest):
            blocks = rest.nodes[several]["members"]
            before = [way for b, way in ways.items() if blocks & {*self.graph[b]}]
            ways |= dict.fromkeys(blocks, max(before, key=value) + sorted(blocks))
        return max((way for b, way in ways.items() if start in self.graph[b]), key=value)

    def _entries(self, part: set[int]) -> set[int]:
        """Return the blocks of a loop that others lead to; there is one, but for odd code."""
        entries = {b for a, b in self.graph.in_edges(part) if a not in part}
        return entries or {min(part)}  # nothing leads to the endless loop behind the code

    def _count(self, blocks: Iterable[int]) -> Counter:
        return sum((self.graph.nodes[block]["opcodes"] for block in blocks), Counter())


def _sum(counts: Counter, opcodes: Iterable[str]) -> int:
    return sum(counts[o] for o in opcodes)
