# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel as each chip would run it and prints the resources, a JSON line each.

Run by test_compiled.py and figures.py in a process of its own: the interpreter must be off.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import itertools
import json
import re
import sys
from pathlib import Path

import aot
import fastlora_kernels
import torch
from acceptance import KINDS
from fastlora_kernels import gated, gated_backward, steps
from fastlora_kernels.configs import DROPPING, candidates, kind_of
from fastlora_kernels.gated import ACTIVATIONS
from recorder import Call, recording

# `make figures` compiles everything and keeps what it found with a hash of the kernels. The test
# suite compiles for the chips whose matrix instructions differ, without those that have sm_80's and
# less shared memory: a sample, which has to come out as kept, of the problems that another kind of
# loop is compiled for; all defaults where what is kept is of another Triton or of other kernels.
CAPABILITIES = (80, 90, 100)
MORE_CAPABILITIES = (86, 89, 120)
SIZES = {"even": (4096, 4096, 4096), "ragged": (1000, 1001, 999), "uneven": (1000, 1001, 1008)}
# (size, kind, rank): every mix of dtypes, the ranks that need other tiles, and the masked variants.
KINDS_COMPILED = ("bf16", "bf16-fp32", "fp16-fp32", "fp32")
PROBLEMS = (
    *itertools.product(("even",), KINDS_COMPILED, (16, 128)),
    *itertools.product(("ragged",), KINDS_COMPILED, (16,)),  # its rank tile is 16 for any rank
    *itertools.product(("uneven",), KINDS_COMPILED[:2], (16,)),  # y has odd rows, x and w do not
    ("even", "fp16", 16),
)
SAMPLE = (
    *itertools.product(("even",), ("bf16", "bf16-fp32", "fp32"), (16,)),
    ("ragged", "bf16", 16),
    ("uneven", "bf16", 16),
)
# The problems for which several projections are compiled too; in the test suite for sm_90 alone, by
# `make figures` for all chips.
JOINT = (
    ("even", "bf16", 16),
    ("even", "bf16", 128),
    ("even", "bf16-fp32", 16),
    ("even", "fp32", 16),
    ("ragged", "bf16", 16),
)


def calls(
    chip, kind: str, r: int, size: str, which: str = "default", joint: bool = True
) -> list[Call]:
    """Return what a forward and a backward with and without dropout launch on ``chip``.

    And those of q, k and v if ``joint``. With the "default" configs, or "every" one that the tuner
    may try.
    """
    (M, N, K), (base, adapter) = SIZES[size], KINDS[kind]

    def empty(*shape, dtype=base):
        return torch.empty(*shape, dtype=dtype, device="meta")

    joint = joint and which == "default" and (size, kind, r) in JOINT
    with recording(chip) as recorded:
        for count, p in itertools.product((1, 3) if joint else (1,), (0.0, 0.1)):
            seed, outputs = empty(1, dtype=torch.int64) if p else None, (N, N // 4, N // 4)[:count]
            x, dys, all_of = empty(M, K), [empty(M, n) for n in outputs], [True] * count
            a, s = empty(r, K, dtype=adapter), [empty(M, r, dtype=adapter)] * count
            bs = [empty(n, r, dtype=adapter) for n in outputs]
            of = [(empty(len(b), K), a, b, empty(len(b)), seed, 0.5, p) for b in bs]
            # By step, in the order in which layers run them.
            run = {
                "shrink": lambda c, x=x, of=of: steps.shrink(x, of, c),
                "outputs": lambda c, x=x, of=of: steps.outputs(x, of, *steps.shrink(x, of, c), c),
                "ds_db": lambda c, dys=dys, of=of, s=s, n=all_of: steps.ds_db(dys, of, s, n, n, c),
                "input_grad": lambda c, dys=dys, of=of, s=s: steps.input_grad(dys, of, s, c),
                "da": lambda c, x=x, of=of, s=s, n=all_of: steps.da(x, of, s, n, c),
            }
            for step, launches in run.items():
                if which == "default":
                    launches({})
                    continue
                dropout = p > 0 and step in DROPPING
                for config in candidates(step, kind_of(base, adapter), r, dropout, chip):
                    launches({step: config})
        if joint and (size, kind, r) == JOINT[0]:
            for activation in ACTIVATIONS:
                gated(dys[0], dys[0], activation)
                gated_backward(dys[0], dys[0], dys[0], activation)
    return recorded


def jobs(asked: str) -> list[tuple[int, str, str, Call]]:
    """Return capability, problem, name and launch of programs: "every", "defaults" or "sample"."""
    every = asked == "every"
    found, names = [], set()
    problems = [(*problem, "default") for problem in (SAMPLE if asked == "sample" else PROBLEMS)]
    if every:
        problems += itertools.product(("even",), ("bf16", "bf16-fp32"), (16, 128), ("every",))
    for capability in CAPABILITIES + (MORE_CAPABILITIES if every else ()):
        seen = set()
        for size, kind, r, which in problems:
            problem = f"{kind} r={r} {size}"
            joint = every or capability == 90
            for call in calls(aot.CHIPS[capability], kind, r, size, which, joint):
                if key(call) in seen:
                    continue
                seen.add(key(call))
                name = program_name(call, problem)
                if (capability, name) in names:
                    raise ValueError(f"two programs of sm_{capability} are called {name!r}")
                names.add((capability, name))
                found.append((capability, problem, name, call))
    return found


def amd_jobs() -> list[tuple[str, Call]]:
    """Return problem and launch of the programs that are compiled for an AMD chip."""
    found = {}
    for size, kind, r in (("even", "bf16", 16), ("even", "bf16-fp32", 128), ("ragged", "bf16", 16)):
        for call in calls(aot.GFX942, kind, r, size):
            found.setdefault(key(call), (f"{kind} r={r} {size}", call))
    return list(found.values())


def fingerprint() -> str:
    """Return a hash of the kernels' code without its comments."""
    code = []
    for path in sorted(Path(fastlora_kernels.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            decorators = map(ast.unparse, getattr(node, "decorator_list", ()))
            if any(name.startswith("triton.jit") for name in decorators):
                if ast.get_docstring(node) is not None:
                    del node.body[0]
                code.append(ast.unparse(node))
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


def key(call: Call) -> tuple:
    """Return what makes two launches the same program."""
    signature = tuple(
        (name, getattr(value, "dtype", value) if name.isupper() and len(name) > 1 else None)
        for name, value in call.args.items()
    )
    args = {n: v for n, v in call.args.items() if n not in aot.unspecialized(call)}
    values = [v for v in args.values() if not isinstance(v, tuple)]
    values += [(len(v), *v) for v in args.values() if isinstance(v, tuple)]
    values = [v for part in values for v in (part if isinstance(part, tuple) else (part,))]
    pointers = tuple(v.dtype if isinstance(v, torch.Tensor) else v is None for v in values)
    ones = tuple(isinstance(v, int) and v == 1 for v in values)
    return call.kernel.__name__, call.config, signature, pointers, ones


def program_name(call: Call, problem: str) -> str:
    """Return what tells a program of a chip from all others, and means the same tomorrow.

    Kernel, problem, config, then the constexprs that the config does not give and the arguments
    that the program was compiled for because they are 1.
    """
    config, variant = call.config, []
    count = max(len(value) for value in (*call.values, ()) if isinstance(value, tuple))
    if count > 1:
        variant.append(f"of {count}")
    for name, value in call.args.items():
        if isinstance(value, tuple) and len(value) == 1:
            (value,) = value
        if not (name.isupper() and len(name) > 1):
            if isinstance(value, int) and value == 1 and name not in aot.unspecialized(call):
                variant.append(f"{name}=1")
        elif isinstance(value, bool):
            variant += [name] if value else []
        elif value != getattr(config, name.lower(), None):
            variant.append(f"{name}={value}")
    tiles = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            tiles += [field.name] if value else []
        elif isinstance(value, int) or value != field.default:
            tiles.append(f"{field.name.removeprefix('block_').removeprefix('num_')}={value}")
    return " | ".join((call.kernel.__name__, problem, " ".join(tiles), " ".join(variant)))


def figures(found: aot.Resources) -> dict:
    """Return what is kept of a program: `figures.py` says what each figure is."""
    loop, whole = found.main_loop, found.instructions
    kept = {
        "registers": found.registers,
        "stack": found.stack,
        "shared": found.shared,
        "blocks": found.blocks,
        "total": sum(whole.values()),
        "ldgsts": whole["LDGSTS"],
        "tma": whole["UTMALDG"],
    }
    if loop is not None:
        kept |= {
            "matrix": loop.kind,
            "loop_matrix": loop.matrix,
            "loop_instructions": loop.instructions,
            "loop_ldgsts": loop.opcodes["LDGSTS"],
            "loop_tma": loop.opcodes["UTMALDG"],
            "loop_lds": loop.opcodes["LDS"] + loop.opcodes["LDSM"],
        }
    return kept


def faults(report: dict, spills: bool = True) -> list[str]:
    """Return what no program may have, whatever the chip; ``spills`` among it or not."""
    found = {
        f"spills, {report['stack']} bytes of stack": spills and report["stack"] > 0,
        "local memory": spills and not {"LDL", "STL"}.isdisjoint(report["instructions"]),
        "compiled to a trap": report["ptx_trap"],
        "atomic operations on global memory": report["ptx_atomics"],
        f"{report['registers']} registers": report["registers"] > 255,
        f"{report['shared']} bytes of shared memory": report["shared"]
        > aot.CHIPS[report["capability"]].shared_memory,
        "float64 instructions": report["ptx_f64"],
        "TF32 where IEEE float32 was asked for": report["ptx_tf32"],
    }
    return [fault for fault, there in found.items() if there]


def pipelined_loads(call: Call) -> int:
    """Return how many loads of 16 bytes a thread issues when the large operands are pipelined."""
    args, config = call.args, call.config
    m, n, k = config.block_m, config.block_n, config.block_k
    kernel = call.kernel.__name__.removesuffix("_kernel")
    if kernel.startswith("persistent"):
        return 2 * config.num_stages  # of a tile each
    # By kernel: the elements of a step, and an argument of their dtype.
    loads = {
        "outputs": ((m + n) * k, "x_ptr"),
        "input_grad": ((m + n) * k, "dx_ptr"),
        "shrink": (m * k, "x_ptr"),
        "da": (m * n, "x_ptr"),
        "ds_db": (m * n, "dy_ptr"),
    }
    if kernel not in loads:
        return 0
    elements, name = loads[kernel]
    tensor = args[name]
    return config.num_stages * elements * tensor.dtype.itemsize // (16 * 32 * config.num_warps)


def main(share: int, of: int, which: str) -> None:
    if share == 0:
        programs = [(capability, name) for capability, _, name, _ in jobs("every")]
        print(json.dumps({"all": programs, "kernels": fingerprint()}), flush=True)
    for problem, call in amd_jobs()[share::of]:
        try:
            found = aot.compile_for_amd(call)
        except Exception as error:  # Triton 3.4 has no linker of its own
            if "ROCm linker" not in str(error):
                raise
            found = {"no_linker": str(error)}
        about = {"problem": problem, "kernel": call.kernel.__name__, "config": str(call.config)}
        print(json.dumps({"capability": "gfx942", **about, **found}), flush=True)
    known = set(map(tuple, json.load(sys.stdin))) if which == "every" else ()
    todo = [job for job in jobs(which) if (job[0], job[2]) not in known]
    for capability, problem, name, call in todo[share::of]:
        found = aot.compile_call(call, capability)
        report = {
            "capability": capability,
            "name": name,
            "problem": problem,
            "kernel": call.kernel.__name__,
            "dropout": bool(call.args.get("HAS_DROPOUT")),
            "registers": found.registers,
            "stack": found.stack,
            "shared": found.shared,
            "instructions": found.instructions,
            "figures": figures(found),
            "pipelined_loads": pipelined_loads(call),
            "ptx_f64": ".f64" in found.ptx,
            "ptx_tf32": "tf32" in found.ptx,
            "ptx_trap": "trap;" in found.ptx,
            "ptx_atomics": bool(re.search(r"\b(?:atom|red)\.[\w.]*global", found.ptx)),
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
