# SPDX-License-Identifier: Apache-2.0
"""Has what the launchers launch compiled for a chip and run, on CPU tensors, from the PTX."""

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from unittest.mock import patch

import numpy as np
import torch
import triton
from aot import binder
from fastlora_kernels.configs import Chip
from recorder import Call, recording
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ptx import bulk, products, transfers
from ptx.machine import Code, launch
from ptx.memory import Global
from ptx.program import KNOWN_VERSIONS, Program

KNOWN_TRITON = ("3.7.1",)
HANDLERS = bulk, products, transfers  # know their instructions from now on


class UntriedError(Exception):
    """A version that the executor was not tried on."""


class Executor:
    """Runs launches one after the other.

    ``edit`` may change the PTX of each before; what it has changed runs with ``skew``. ``ran``
    names the kernels, and ``overwriting`` those that set registers which a wgmma may still read.
    """

    compiled: dict = {}  # noqa: RUF012, by all executors

    def __init__(self, capability: int, edit: Callable = str, skew: random.Random | None = None):
        self.target, self.edit, self.skew = GPUTarget("cuda", capability, 32), edit, skew
        self.memory, self.ran, self.overwriting = Global(), [], set()

    def __call__(self, call: Call) -> None:
        compiled, _ = self.compiled_for(call)
        ptx = self.edit(compiled.asm["ptx"])
        skew = self.skew if ptx != compiled.asm["ptx"] else None
        size = compiled.metadata.global_scratch_size * int(np.prod(call.grid))
        scratch = torch.empty(size + 128, dtype=torch.uint8)
        self.memory.add(scratch, fresh=True)
        # Triton appends memory for descriptors, and for a profiler.
        values = [*self.have(call), scratch.data_ptr() + -scratch.data_ptr() % 128, 0]
        code, shared = code_of(ptx), compiled.metadata.shared
        params = [_bits(value) for value, _ in zip(values, code.params, strict=True)]
        if launch(code, self.memory, np.array(params, np.uint64), call.grid, shared, skew=skew):
            self.overwriting.add(call.kernel.__name__)
        self.ran.append(call.kernel.__name__)

    def have(self, call: Call) -> list:
        """Have the tensors of a launch, and return the values of its program's parameters."""
        values = list(_flat(self.compiled_for(call)[1], call.values))
        for value in values:
            if isinstance(value, torch.Tensor):
                self.memory.add(value)
        return values

    def compiled_for(self, call: Call) -> tuple:
        """Return what Triton's launch would compile for these addresses, and the types."""
        bind, backend = binder(call.kernel, self.target.arch)
        uses = {"num_warps": call.config.num_warps, "num_stages": call.config.num_stages}
        bound, special, options = bind(*call.values, **uses)
        key = call.kernel.__name__, self.target.arch, str(special), str(uses)
        if key not in self.compiled:
            packed = call.kernel._pack_args(backend, uses, bound, special, options)
            source = ASTSource(call.kernel, *packed[1:])
            program = triton.compile(source, target=self.target, options=uses)
            self.compiled[key] = program, list(packed[1].values())
        return self.compiled[key]


def _flat(kinds, values) -> Iterator:
    """Yield the value of each of a program's parameters."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield value


@functools.cache
def code_of(ptx: str) -> Code:
    program = Program(ptx)
    if program.version not in KNOWN_VERSIONS:
        raise UntriedError(f"PTX {program.version} is not one of {KNOWN_VERSIONS}")
    return Code(program)


def _bits(value) -> int:
    """Return a parameter, of at most eight bytes, as bits."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return int(np.float32(value).view(np.uint32) if isinstance(value, float) else value) % (1 << 64)


@contextlib.contextmanager
def executing(chip: Chip, kind: type[Executor] = Executor, **options) -> Iterator[Executor]:
    """Run the launches made inside as ``chip`` would; what `new_empty` makes holds nothing yet.

    An executor of some ``kind`` runs them, made with ``options``.
    """
    if triton.__version__ not in KNOWN_TRITON:
        raise UntriedError(f"Triton {triton.__version__} is not one of {KNOWN_TRITON}")
    executor = kind(10 * chip.capability[0] + chip.capability[1], **options)
    new_empty = torch.Tensor.new_empty

    def fresh(t: torch.Tensor, *args, **options) -> torch.Tensor:
        made = new_empty(t, *args, **options)
        executor.memory.add(made, fresh=True)
        return made

    with recording(chip, executor), patch.object(torch.Tensor, "new_empty", fresh):
        yield executor
