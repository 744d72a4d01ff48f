# SPDX-License-Identifier: Apache-2.0
"""Compiles what the launchers would launch for a chip that need not be here, and reads the result.

With the tools of Triton's own package, in a process in which the interpreter is off.
"""

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from fastlora_kernels.configs import Chip, cdiv
from recorder import Call
from sass import Code
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

# Of a processor, as in ``cuda_occupancy.h``: shared memory (KiB), threads and blocks; and how many
# of them a chip of that compute capability has.
LIMITS = {
    80: (164, 2048, 32, 108),
    86: (100, 1536, 16, 84),
    89: (100, 1536, 24, 128),
    90: (228, 2048, 32, 132),
    100: (228, 2048, 32, 148),
    120: (100, 1536, 24, 170),
}
RESERVED = 1024  # bytes of shared memory of every block, by the driver
CHIPS = {
    capability: Chip(divmod(capability, 10), (kib << 10) - RESERVED, processors)
    for capability, (kib, _, _, processors) in LIMITS.items()
}
CHIPS["gfx942"] = Chip((0, 0), 65536, 304)  # an AMD Instinct MI300X

_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


def compiled(call: Call, capability: int | str):
    """Return what Triton compiles of a launch for that chip: 90 is sm_90, "gfx942" an AMD one."""
    signature, constexprs, attrs = {}, {}, {}

    def described(path: tuple[int, ...], value, constexpr: bool, special: bool):
        if isinstance(value, tuple):
            each = enumerate(value)
            return tuple(described((*path, i), v, constexpr, special) for i, v in each)
        kind, constant, divisible = argument(value, constexpr, special)
        if constant:
            constexprs[path] = value
        elif divisible:
            attrs[path] = [["tt.divisibility", 16]]
        return kind

    for i, name in enumerate(call.kernel.arg_names):
        special = name not in unspecialized(call)
        signature[name] = described((i,), call.args[name], is_constexpr(name), special)
    nvidia = isinstance(capability, int)
    target = GPUTarget("cuda" if nvidia else "hip", capability, 32 if nvidia else 64)
    options = {"num_warps": call.config.num_warps, "num_stages": call.config.num_stages}
    source = ASTSource(call.kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=options)


@functools.cache
def binder(kernel, capability: int) -> tuple[Callable, Any]:
    """Return what makes Triton's own key of a launch's arguments, and what it compiles by."""
    backend = make_backend(GPUTarget("cuda", capability, 32))
    return create_function_from_signature(kernel.signature, kernel.params, backend), backend


def is_constexpr(name: str) -> bool:
    """Return whether a kernel's argument is one: M, N and K are not."""
    return name.isupper() and len(name) > 1


def unspecialized(call: Call) -> list[str]:
    """Return the arguments whose value makes no program of its own."""
    kernel = call.kernel  # the interpreter keeps what it was decorated with
    return getattr(kernel, "kwargs", vars(kernel)).get("do_not_specialize") or []


def argument(value, constexpr: bool, special: bool) -> tuple[str, bool, bool]:
    """Return (type, is a constant, is divisible by 16) as Triton specialises an argument."""
    if constexpr or value is None or (special and isinstance(value, int) and value == 1):
        return "constexpr", True, False
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype], False, True
    if isinstance(value, float):
        return "fp32", False, False
    divisible = special and value % 16 == 0
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), False, divisible


def machine_code(cubin: bytes) -> tuple[int, int, Code]:
    """Return a thread's registers and bytes of stack, and the instructions."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def said(*command) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = said(tools / "cuobjdump", "-res-usage", file.name)
        code = Code(said(tools / "nvdisasm", "-c", file.name))
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, stack, code


def blocks_per_processor(
    capability: int, warps: int, registers: int, shared: int, tensor_columns: int = 0
) -> int:
    """Return how many blocks of so many warps fit.

    ``registers`` a thread, ``shared`` bytes a block, and the columns of tensor memory that a
    block allocates (sm_100).
    """
    kib, threads, blocks, _ = LIMITS[capability]
    # The 65,536 registers are split among four schedulers, a warp's come in units of 256. Shared
    # memory comes in units of 128 bytes.
    return min(
        blocks,
        threads // (32 * warps),
        65536 // 4 // (256 * cdiv(32 * registers, 256)) * 4 // warps,
        (kib << 10) // (128 * cdiv(shared + RESERVED, 128)),
        512 // tensor_columns if tensor_columns else blocks,
    )
