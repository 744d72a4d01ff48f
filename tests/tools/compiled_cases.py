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
import triton
from acceptance import KINDS
from fastlora_kernels import (
    backward,
    da_all,
    forward,
    gated,
    gated_backward,
    launch,
    linears,
    product_sum,
)
from fastlora_kernels.configs import (
    DROPPING,
    EXPERIMENTAL,
    KERNEL_OF,
    LAUNCHERS,
    Config,
    candidates,
    is_valid,
    kind_of,
)
from fastlora_kernels.gated import ACTIVATIONS

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
# The problems for which the kernels of several projections are compiled too; in the test suite for
# sm_90 alone, by `make figures` for all chips.
JOINT = (
    ("even", "bf16", 16),
    ("even", "bf16", 128),
    ("even", "bf16-fp32", 16),
    ("even", "fp32", 16),
    ("ragged", "bf16", 16),
)


def calls(
    chip, kind: str, r: int, size: str, which: str = "default", joint: bool = True
) -> list[launch.Call]:
    """Return what a forward and a backward with and without dropout launch on ``chip``.

    And those of several projections if ``joint``. With the "default" configs, "every" one that the
    tuner may try, or those that start "early".
    """
    (M, N, K), (base, adapter) = SIZES[size], KINDS[kind]

    def empty(*shape, dtype=base):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def some(launcher: str, dropout: bool) -> list[dict[str, Config]]:
        if which == "default":
            return [{}]
        rest = KERNEL_OF[launcher], kind_of(base, adapter), r, dropout, chip
        tried = candidates(*rest) + [c for c in EXPERIMENTAL if is_valid(c, *rest)]
        return [{launcher: config} for config in tried if which == "every" or config.early]

    x, w, dy, bias = empty(M, K), empty(N, K), empty(M, N), empty(N)
    a, b, s = (empty(*d, dtype=adapter) for d in ((r, K), (N, r), (M, r)))
    with launch.recording(chip) as recorded:
        for seed, p in ((None, 0.0), (empty(1, dtype=torch.int64), 0.1)):
            for op, launchers in LAUNCHERS.items():
                for launcher in launchers[:1] if which == "default" else launchers:
                    for configs in some(launcher, p > 0 and launcher in DROPPING):
                        if op == "forward":
                            forward(x, w, a, b, bias, seed, 0.5, p, configs)
                        else:
                            needs = (True, True, True)
                            backward(dy, x, w, a, b, s, seed, 0.5, p, needs, configs)
        if joint and which == "default" and (size, kind, r) in JOINT:
            joint_calls(empty, (M, N, K), r, adapter)
        if joint and which == "default" and (size, kind, r) == JOINT[0]:
            for activation in ACTIVATIONS:
                gated(dy, dy, activation)
                gated_backward(dy, dy, dy, activation)
    return recorded


def joint_calls(empty, sizes: tuple[int, int, int], r: int, adapter: torch.dtype) -> None:
    """Launch what q, k and v take, with and without dropout."""
    (M, N, K), count = sizes, 3
    outputs = (N, N // 4, N // 4)
    x, w, dy = empty(M, K), [empty(n, K) for n in outputs], [empty(M, n) for n in outputs]
    a, b = [empty(r, K, dtype=adapter)] * count, [empty(n, r, dtype=adapter) for n in outputs]
    s, biases = [empty(M, r, dtype=adapter)] * count, [empty(n) for n in outputs]
    for seed, p in ((None, 0.0), (empty(1, dtype=torch.int64), 0.1)):
        dropped = {"dropout_p": [p] * count}
        drop = [seed] * count, [0.5] * count, [p] * count
        linears.forward_all(x, list(zip(w, a, b, biases, *drop, strict=True)))
        product_sum(dy, w, s, a, [seed] * count, **dropped)
        da_all(x, s, [seed] * count, **dropped)


def jobs(asked: str) -> list[tuple[int, str, str, launch.Call]]:
    """Return capability, problem, name and launch of programs: "every", "defaults" or "sample"."""
    every = asked == "every"
    found, names = [], set()
    problems = [(*problem, "default") for problem in (SAMPLE if asked == "sample" else PROBLEMS)]
    problems.append(("even", "bf16", 16, "early"))
    if every:
        more = itertools.product(("even",), ("bf16", "bf16-fp32"), (16, 128), ("every",))
        problems += more
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


def amd_jobs() -> list[tuple[str, launch.Call]]:
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


def key(call: launch.Call) -> tuple:
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
    return call.kernel.__name__, call.config, call.early, signature, pointers, ones


def program_name(call: launch.Call, problem: str) -> str:
    """Return what tells a program of a chip from all others, and means the same tomorrow.

    Kernel, problem, config, then the constexprs that the config does not give and the arguments
    that the program was compiled for because they are 1.
    """
    config, variant = call.config, ["launched early"] if call.early else []
    for name, value in call.args.items():
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


def around_the_wait(sass: str) -> dict[str, int] | None:
    """Return what an early program reads and writes before and after it waits for the one before.

    None where it does not wait. What is left to the copy engine before is not counted.
    """
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)", sass, re.M)
    if "ACQBULK" not in opcodes:
        return None
    at = opcodes.index("ACQBULK")
    before, after = opcodes[:at], opcodes[at:]
    return {
        "loads_before": before.count("LDG"),
        "loads_after": after.count("LDG"),
        "stores_before": before.count("STG") + before.count("UTMASTG"),
        "stores_after": after.count("STG") + after.count("UTMASTG"),
        "products_before": before.count("HGMMA") + before.count("UTCHMMA"),
    }


def pipelined_loads(call: launch.Call) -> int:
    """Return how many loads of 16 bytes a thread issues when the large operands are pipelined."""
    args, config = call.args, call.config
    m, n, k = config.block_m, config.block_n, config.block_k
    if call.kernel.__name__ == "product_sum_kernel":
        elements, tensor = (m + n) * k, args["dx_ptr"]
    elif call.kernel.__name__ in ("product_kernel", "product_all_kernel"):
        elements, tensor = (m + n) * k, args["x_ptr"]
    elif call.kernel.__name__.startswith("persistent"):
        return 2 * config.num_stages  # of a tile each
    elif call.kernel.__name__ in ("shrink_kernel", "shrink_all_kernel"):
        elements, tensor = m * k, args["x_ptr"]
    elif call.kernel.__name__ == "da_all_kernel":
        elements, tensor = m * n, args["x_ptr"]
    elif call.kernel.__name__ == "columns_kernel":
        elements, tensor = m * n, args["t_ptr"]
    else:
        return 0
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
            "triton": triton.__version__,
            "name": name,
            "problem": problem,
            "kernel": call.kernel.__name__,
            "dropout": bool(call.args.get("HAS_DROPOUT")),
            "config": str(call.config),
            "registers": found.registers,
            "stack": found.stack,
            "shared": found.shared,
            "warps": found.warps,
            "instructions": found.instructions,
            "figures": figures(found),
            "around_the_wait": around_the_wait(found.sass),
            "pipelined_loads": pipelined_loads(call),
            "ptx_f64": ".f64" in found.ptx,
            "ptx_tf32": "tf32" in found.ptx,
            "ptx_trap": "trap;" in found.ptx,
            "ptx_atomics": bool(re.search(r"\b(?:atom|red)\.[\w.]*global", found.ptx)),
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
