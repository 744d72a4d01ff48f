# SPDX-License-Identifier: Apache-2.0
"""Reads PTX: its parameters, and its instructions in blocks that are entered at their first one."""

import itertools
import re
from typing import NamedTuple

KNOWN_VERSIONS = ("8.7",)  # others may mean something else by the same words
# What ends a block: threads may go different ways, or wait, after these.
ENDS = re.compile(r"(bra|ret|exit|bar\.sync|barrier\.\w+)\b(?!\.warp)")
_SCOPE = re.compile(r"^\{\n(.*?)^\}", re.M | re.S)
_STATEMENT = re.compile(r"\s*(?:([\w$.]+):(?!:)|(\})|([^;{}]*(?:\{[^}]*\}[^;{}]*)*);)")


class UnknownError(Exception):
    """An instruction, or a use of one, that the executor does not know."""


class Instruction(NamedTuple):
    """One instruction, its ``guard`` (%p1 or !%p1), and the line of Triton that it came from."""

    op: str
    operands: list[str]
    guard: str | None = None
    source: str = ""

    def __str__(self) -> str:
        guard = f"@{self.guard} " * bool(self.guard)
        return f"{guard}{self.op} {', '.join(self.operands)}; // {self.source}"


class Program:
    """A kernel: its parameters' names, threads a block, bits of registers, and ``blocks``.

    A block is a list of instructions; ``labels`` are numbers of blocks.
    """

    def __init__(self, ptx: str):
        self.version = re.search(r"^\.version\s+([\d.]+)", ptx, re.M)[1]
        self.target = int(re.search(r"^\.target\s+sm_(\d+)", ptx, re.M)[1])
        head, _, body = ptx.partition(".visible .entry ")[2].partition("{")
        self.name = re.match(r"[\w$]+", head)[0]
        self.threads = int(re.search(r"\.reqntid\s+(\d+)", head)[1])
        self.params = re.findall(r"\.param\s+\.[a-z]\d+\b[^,)]*?(\w+)(?=,|\s*\))", head)
        declared = re.findall(r"\.reg\s+\.[a-z]+(\d*)\s+(%\w+)<", body)
        self.registers = {name: int(bits or 1) for bits, name in declared}
        self.blocks: list[list[Instruction]] = [[]]
        self.labels: dict[str, int] = {}
        self._read(body)

    def _read(self, body: str) -> None:
        body = re.sub(r"^[^\S\n]*\.loc\b.*?//\s*(\S+).*$", r"@@\1;", body, flags=re.M)
        body, at, source, scopes = re.sub(r"//.*", "", body), 0, "", itertools.count()
        body = _SCOPE.sub(lambda scope: _renamed(scope[1], next(scopes)), body)
        while True:
            found = _STATEMENT.match(body, at)
            if found is None:
                raise UnknownError(f"PTX: {body[at : at + 80]!r}")
            at, (label, end, text) = found.end(), found.groups(default="")
            text = text.strip()
            if end:
                return
            if label:
                self.blocks += [[]] if self.blocks[-1] else []
                self.labels[label] = len(self.blocks) - 1
            elif text.startswith("@@"):
                source = text[2:]
            elif text and not text.startswith((".reg", ".pragma")):
                guard, op, rest = re.match(r"(?:@(\S+)\s+)?([\w.:]+)\s*(.*)", text, re.S).groups()
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{\[][^,]*", rest)
                operands = [operand.strip() for operand in operands]
                self.blocks[-1].append(Instruction(op, operands, guard, source))
                if ENDS.match(op):
                    self.blocks.append([])


def _renamed(scope: str, number: int) -> str:
    """Return what stands in braces of its own, with names that nothing else has."""
    for name in re.findall(r"\.reg\s+\.\w+\s+(\w+)|^\s*(\w+):", scope, re.M):
        new = f"%{name[0]}_{number}" if name[0] else f"{name[1]}_{number}"
        scope = re.sub(rf"(?<![\w%$.]){''.join(name)}(?!\w)", new, scope)
    return scope
