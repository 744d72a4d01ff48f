# SPDX-License-Identifier: Apache-2.0
"""Compiles what the launchers would launch for a chip that need not be here, and reads the result.

Everything comes from the tools inside Triton's own package: ``ptxas`` while compiling,
``cuobjdump`` and ``nvdisasm`` to read the machine code. Needs a process in which the interpreter
is off.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from fastlora_kernels.configs import Chip
from occupancy import blocks_per_processor
from recorder import Call
from sass import Code, MainLoop
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory a block may use (bytes) and processors of a chip of that compute capability.
CHIPS = {
    80: Chip((8, 0), 166912, 108),
    86: Chip((8, 6), 101376, 84),
    89: Chip((8, 9), 101376, 128),
    90: Chip((9, 0), 232448, 132),
    100: Chip((10, 0), 232448, 148),
    120: Chip((12, 0), 101376, 170),
}

# What configs depend on of an AMD Instinct MI300X.
GFX942 = Chip((0, 0), 65536, 304)

_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses: per thread registers and stack bytes, per block shared bytes.

    ``blocks`` a processor; ``instructions`` counts the opcodes of the machine code.
    """

    registers: int
    stack: int
    shared: int
    blocks: int
    instructions: Counter = field(repr=False)
    ptx: str = field(repr=False)
    sass: str = field(repr=False)
    main_loop: MainLoop | None = field(repr=False)


def compile_call(call: Call, capability: int) -> Resources:
    """Compile one recorded launch for ``capability`` (80 for sm_80) and return what it uses."""
    compiled = _compile(call, GPUTarget("cuda", capability, 32))
    usage, sass = _disassemble(compiled.asm["cubin"])
    registers, code, uses = int(re.search(r"REG:(\d+)", usage)[1]), Code(sass), compiled.metadata
    held = capability, uses.num_warps, registers, uses.shared, uses.tmem_size or 0
    return Resources(
        registers=registers,
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=uses.shared,
        blocks=blocks_per_processor(*held),
        instructions=code.opcodes,
        ptx=compiled.asm["ptx"],
        sass=sass,
        main_loop=code.main_loop(),
    )


def ptx(call: Call, capability: int) -> str:
    """Compile one recorded launch for ``capability`` and return what ptxas is given."""
    return _compile(call, GPUTarget("cuda", capability, 32)).asm["ptx"]


def compile_for_amd(call: Call) -> dict[str, int]:
    """Compile one recorded launch for gfx942 and return what it uses.

    Vector registers and bytes of scratch of a thread, bytes of shared memory of a block, and the
    matrix instructions in the whole program.
    """
    compiled = _compile(call, GPUTarget("hip", "gfx942", 64))
    code = compiled.asm["amdgcn"]

    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:\s*(\d+)", code)[1])

    return {
        "registers": number("vgpr_count"),
        "spilled": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "scratch": number("private_segment_fixed_size"),
        "shared": compiled.metadata.shared,
        "matrix": code.count("v_mfma"),
    }


def _compile(call: Call, target: GPUTarget):
    signature, constexprs, attrs = {}, {}, {}

    def described(path: tuple[int, ...], value, constexpr: bool, special: bool):
        if isinstance(value, tuple):
            each = enumerate(value)
            return tuple(described((*path, i), v, constexpr, special) for i, v in each)
        kind, constant, divisible = _argument(value, constexpr, special)
        if constant:
            constexprs[path] = value
        elif divisible:
            attrs[path] = [["tt.divisibility", 16]]
        return kind

    for i, name in enumerate(call.kernel.arg_names):
        constexpr = name.isupper() and len(name) > 1
        special = name not in unspecialized(call)
        signature[name] = described((i,), call.args[name], constexpr, special)
    options = {"num_warps": call.config.num_warps, "num_stages": call.config.num_stages}
    source = ASTSource(call.kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=options)


def unspecialized(call: Call) -> list[str]:
    """Return the arguments whose value makes no program of its own."""
    kernel = call.kernel  # the interpreter keeps what it was decorated with
    return getattr(kernel, "kwargs", vars(kernel)).get("do_not_specialize") or []


def _argument(value, constexpr: bool, special: bool) -> tuple[str, bool, bool]:
    """Return (type, is a constant, is divisible by 16) as Triton specialises an argument."""
    if constexpr or value is None or (special and isinstance(value, int) and value == 1):
        return "constexpr", True, False
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype], False, True
    if isinstance(value, float):
        return "fp32", False, False
    divisible = special and value % 16 == 0
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), False, divisible


def _disassemble(cubin: bytes) -> tuple[str, str]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        return usage, _run(tools / "nvdisasm", "-c", file.name)


def _run(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
