# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel as each chip would run it and prints the resources, a JSON line each.

Or what other lengths of a batch would compile. Run by test_compiled.py and figures.py in a process
of its own: the interpreter must be off.
"""

import ast
import hashlib
import itertools
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import aot
import fastlora_kernels
import torch
from acceptance import KINDS
from covering import covering
from fastlora_kernels import gated, gated_backward
from fastlora_kernels.configs import DROPPING, LAUNCHERS, Chip, Config, candidates, kind_of
from fastlora_kernels.four_bits import four_bits
from fastlora_kernels.gated import ACTIVATIONS
from joints import Joint, recorded
from recorder import Call, recording

from fastlora.operator import library

# `make figures` compiles everything for every chip and keeps what it found with a hash of the
# kernels. The test suite compiles a sample, which has to come out as kept, where the matrix
# instructions differ: those that are left out have sm_80's. All defaults where what is kept is of
# another Triton or of other kernels.
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
EVEN, MIXED, FLOAT32 = itertools.product(("even",), ("bf16", "bf16-fp32", "fp32"), (16,))
RAGGED, UNEVEN = itertools.product(("ragged", "uneven"), ("bf16",), (16,))
# Also with every config that the tuner may try.
TUNED = tuple((*p, "every") for p in itertools.product(("even",), KINDS_COMPILED[:2], (16, 128)))
ON_THE_WAY = ("even", "bf16", 32), ("even", "fp16", 16)
AMD = {"gfx942": (EVEN, ("even", "bf16-fp32", 128))}  # is compiled to see that it compiles
# What is asked for: the problems of each chip.
ASKED = {
    "every": dict.fromkeys(CAPABILITIES + MORE_CAPABILITIES, PROBLEMS + TUNED),
    "defaults": {**dict.fromkeys(CAPABILITIES, PROBLEMS), **AMD},
    "sample": {80: (EVEN, RAGGED), 90: (EVEN, UNEVEN), 100: (MIXED, UNEVEN), **AMD},
    # Of what is tuned ds_db alone, at the ranks where it makes ds on the way, or does not.
    "order": {90: (FLOAT32, *TUNED[:2], *((*p, "every") for p in ON_THE_WAY))},
}
# The problems for which several projections are compiled too: for all chips by `make figures`, else
# for sm_90.
JOINT = (EVEN, ("even", "bf16", 128), MIXED, FLOAT32, RAGGED)
SEGMENTED = (EVEN, MIXED, FLOAT32)  # and for which rows are cut, of one projection and of several
ELEMENTWISE = ("sum_", "gated_", "four_", "dropped_")  # kernels without a matrix product
OF_SCALES = "scale_ptr", "z_ptr", "kept", "added_ptr"  # in the names of arguments: some have them
# What no program may have in its PTX.
FORBIDDEN = {
    "float64 instructions": r"\.f64",
    "TF32 where IEEE float32 was asked for": "tf32",
    "compiled to a trap": "trap;",
    "atomic operations on global memory": r"\b(?:atom|red)\.[\w.]*global",
}


def calls(
    chip, size: str, kind: str, r: int, which: str = "default", joint: bool = True
) -> list[Call]:
    """Return what a forward and a backward with and without dropout launch on ``chip``.

    And those of q, k and v if ``joint``. With the "default" configs, or "every" one that the tuner
    may try.
    """
    (M, N, K), found = SIZES[size], []
    joint = joint and which == "default" and (size, kind, r) in JOINT
    cuts = [(), (0, M // 3, M)] if joint and (size, kind, r) in SEGMENTED else [()]
    several = [(N,), (N, N // 4, N // 4)][: 1 + joint]
    for sizes, p, ends in itertools.product(several, (0.0, 0.1), cuts):
        ranks, drops = (r,) * len(sizes), (p,) * len(sizes)
        biases = (True,) * 3
        problem = Joint(M, K, sizes, ranks, kind, "both", drops, biases, scaling=0.5, ends=ends)
        chosen: list[dict[str, Config]] = [{}]
        if which == "every":
            chosen = [
                {step: config}
                for step in itertools.chain(*LAUNCHERS.values())
                for config in candidates(
                    step, kind_of(*KINDS[kind]), r, p > 0 and step in DROPPING, chip
                )
            ]
        for configs in chosen:
            found += recorded(chip, problem, configs)
    if joint:
        found += of_scaled(chip, Joint(M, K, several[-1], (r,) * len(several[-1]), kind))
    if which == "every" or len(cuts) > 1:
        found += by_tma(chip, size, kind, r, which)
    if len(cuts) > 1:  # experts: their weights lie either way, and they may be frozen
        for rank, p in ((r, 0.0), (r, 0.1), (0, 0.0)):
            of, biases = (M, K, (N,), (rank,), kind, "both", (p,)), (rank > 0,)
            problem = Joint(*of, biases, scaling=0.5, ends=cuts[1], experts=True)
            (t,) = problem.blank()
            for w in (t["w"], t["w"].mT.contiguous().mT):
                found += recorded(chip, problem, {}, [t | {"w": w}])
    if joint and (size, kind, r) == EVEN:
        y = torch.empty(M, N, dtype=KINDS[kind][0], device="meta")
        with recording(chip) as elementwise:
            for activation in ACTIVATIONS:
                gated(y, y, activation)
                gated_backward(y, y, y, activation)
            packed = y.new_empty(N * K // 2, dtype=torch.uint8)
            scales = y.new_empty(8, dtype=torch.float32)
            four_bits(packed, (N, K), y.dtype, scales, scales, 64)
            four_bits(packed, (N, K), y.dtype, scales, packed, 64, (scales, scales, 256, scales))
        found += elementwise
    return found


def of_scaled(chip, problem: Joint) -> list[Call]:
    """Return the launches of projections with scales: of kernels alone, and after a product."""
    of, found = {"scaled": True, "biases": (True,) * 3, "scaling": 0.5}, []
    for p in (0.0, 0.1):
        joint = replace(problem, dropout_p=(p,) * 3, **of)
        found += recorded(chip, joint)
        (t, *_), (one, *_) = joint.blank(), joint.projections(joint.blank())
        s = one.b.new_empty(problem.M, one.b.shape[1])
        with recording(chip) as calls:
            library.scaled_outputs(t["x"], [one], [s], True)
        found += calls
    return found


def by_tma(chip, size: str, kind: str, r: int, which: str) -> list[Call]:
    """Return the persistent launches of segments, which are no default: they have to be asked for.

    Of experts whose weights lie either way, of several projections, and of one weight for all; with
    "every" config that the tuner may try, or the first.
    """
    (M, N, K), found = SIZES[size], []
    several, most = (N, N // 4, N // 4), None if which == "every" else 1
    asked = ((N,), True, False), ((N,), True, True), (several, True, False), ((N,), False, False)
    for (sizes, experts, by_columns), p in itertools.product(asked, (0.0, 0.1)):
        count, cut = len(sizes), {"ends": (0, M // 3, M), "experts": experts}
        of = M, K, sizes, (r,) * count, kind, "both", (p,) * count, (True,) * count
        problem = Joint(*of, scaling=0.5, **cut)
        ts = problem.blank()
        for t in ts if by_columns else ():
            t["w"] = t["w"].mT.contiguous().mT
        for step in ("outputs", "input_grad"):
            case = step, kind_of(*KINDS[kind]), r, p > 0 and step in DROPPING, chip, count
            configs = [c for c in candidates(*case) if c.tma]
            # The s of segments is scaled by none before: y takes no fold.
            configs = [c for c in configs if step != "outputs" or c.low_rank == "first"]
            for config in configs[:most]:
                calls = recorded(chip, problem, {step: config}, ts)
                found += [call for call in calls if call.config.tma]
    return found


def jobs(asked: str) -> list[tuple[int | str, str, Call]]:
    """Return capability, name and launch of the programs of `ASKED`."""
    found = {}
    for capability, problems in ASKED[asked].items():
        seen = set()
        for size, kind, r, *which in problems:
            several = asked == "every" or capability in (90, "gfx942")
            for call in calls(aot.CHIPS[capability], size, kind, r, *which, joint=several):
                left_out = asked == "order" and which and call.kernel.__name__ != "ds_db_kernel"
                if left_out or key(call) in seen:
                    continue
                seen.add(key(call))
                name = program_name(call, f"{kind} r={r} {size}")
                if (capability, name) in found:
                    raise ValueError(f"two programs of {capability} are called {name!r}")
                found[capability, name] = call
    return [(*program, call) for program, call in found.items()]


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
        (name, getattr(value, "dtype", value) if aot.is_constexpr(name) else None)
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
    config, variant, tiles = call.config, [], []
    count = max(len(value) for value in (*call.values, ()) if isinstance(value, tuple))
    if count > 1:
        variant.append(f"of {count}")
    if call.args.get("offsets_ptr") is not None:
        variant.append("segments")
    given = (name for name, value in call.args.items() if value is not None)
    variant += [name for name in given if any(part in name for part in OF_SCALES)]
    if call.config.tma and call.args["strides_wg"][0] is not None:
        variant.append("stacked")
    for name, value in call.args.items():
        if isinstance(value, tuple) and len(value) == 1:
            (value,) = value
        if not aot.is_constexpr(name):
            if isinstance(value, int) and value == 1 and name not in aot.unspecialized(call):
                variant.append(f"{name}=1")
        elif isinstance(value, bool):
            variant += [name] if value else []
        elif value != getattr(config, name.lower(), None):
            variant.append(f"{name}={value}")
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            tiles += [field.name] if value else []
        elif isinstance(value, int) or value != field.default:
            tiles.append(f"{field.name.removeprefix('block_').removeprefix('num_')}={value}")
    return " | ".join((call.kernel.__name__, problem, " ".join(tiles), " ".join(variant)))


def report(capability: int | str, name: str, call: Call) -> dict:
    """Compile a program and return what is kept of it (`figures.py` says what each figure is).

    And what it has that none may have, and `order_of` it. Of one for gfx942 other figures: those of
    a thread, its spills and bytes of scratch, and the matrix instructions of the whole program.
    """
    about = {"capability": capability, "name": name, "stages": call.config.num_stages}
    try:
        program = aot.compiled(call, capability)
    except Exception as error:  # Triton 3.4 has no linker of its own for AMD chips
        if "ROCm linker" not in str(error):
            raise
        return about | {"no_linker": str(error)}
    if capability == "gfx942":
        code = program.asm["amdgcn"]
        fields = "vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"
        kept = {name: int(re.search(rf"\.{name}:\s*(\d+)", code)[1]) for name in fields}
        shared = {"shared": program.metadata.shared, "matrix": code.count("v_mfma")}
        return about | {"figures": kept | shared}
    registers, stack, code = aot.machine_code(program.asm["cubin"])
    uses, whole, loop = program.metadata, code.opcodes, code.main_loop()
    held = capability, uses.num_warps, registers, uses.shared, uses.tmem_size or 0
    kept = {"registers": registers, "stack": stack, "shared": uses.shared}
    kept |= {"blocks": aot.blocks_per_processor(*held), "total": sum(whole.values())}
    kept |= {"ldgsts": whole["LDGSTS"], "tma": whole["UTMALDG"]}
    if loop is not None:
        kept |= {"matrix": loop.kind, "loop_matrix": loop.matrix}
        kept |= {"loop_instructions": loop.instructions}
        kept |= {"loop_ldgsts": loop.opcodes["LDGSTS"], "loop_tma": loop.opcodes["UTMALDG"]}
        kept |= {"loop_lds": loop.opcodes["LDS"] + loop.opcodes["LDSM"]}
    found = {"figures": kept, "forbidden": forbidden(program.asm["ptx"])}
    return about | found | order_of(program.asm["ttgir"])


def forbidden(ptx: str) -> list[str]:
    return [what for what, pattern in FORBIDDEN.items() if re.search(pattern, ptx)]


def order_of(ir: str) -> dict:
    """Return what Triton makes of an order, by what ``ttgir`` says.

    What its float32 products start from, "zero" or a name; of how many buffers the rings are that
    wgmma reads; how many wgmma may still read when a loop turns.
    """
    zeros = re.findall(r"(%\w+) = arith\.constant dense<0\.0", ir)
    starts = re.findall(r" tt\.dot \S+, \S+, (%\w+)", ir)
    rings, read = {}, {}  # of a name as it was last given: those of two branches may be the same
    for i, line in enumerate(ir.splitlines()):
        if made := re.search(r"(%\w+) = ttg\.local_alloc\s*: \(\) -> \S+memdesc<(\d+)x\d+x", line):
            rings[made[1]] = i, int(made[2])
        elif made := re.search(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", line):
            rings[made[1]] = rings.get(made[2], (i, None))
        elif both := re.search(r"warp_group_dot (%\w+), (%\w+)", line):
            read |= dict(rings[tile] for tile in both.groups() if tile in rings)
    waits = map(int, re.findall(r"warp_group_dot_wait .*pendings = (\d+)", ir))
    return {
        "starts": ["zero" if start in zeros else start for start in starts],
        "rings": sorted(buffers for buffers in read.values() if buffers),
        "unfinished": max(waits, default=0),
    }


def faults(
    capability: int, name: str, figures: dict, forbidden: list[str] = (), spills: bool = True
) -> list[str]:
    """Return what no program may have, ``spills`` among it or not, and what it has to have."""
    kernel, problem, *_ = name.split(" | ")
    matrix, most = figures.get("matrix", ""), aot.CHIPS[capability].shared_memory
    wide = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}.get(capability, "HMMA")
    products = not kernel.startswith(ELEMENTWISE)
    expected = {"FFMA", "FFMA2"} if problem.startswith("fp32") else {wide, "HMMA"}
    if "outputs" in kernel or "input_grad" in kernel:
        expected -= {"HMMA"} - {wide}
    ahead = sum(figures[load] - figures.get(f"loop_{load}", 0) for load in ("ldgsts", "tma"))
    found = {
        f"spills, {figures['stack']} bytes of stack": spills and figures["stack"] > 0,
        f"{figures['registers']} registers": figures["registers"] > 255,
        f"{figures['shared']} bytes of shared memory": figures["shared"] > most,
        "no block fits a processor": figures["blocks"] == 0,
        f"matrix instructions {matrix!r}": products and expected.isdisjoint(matrix.split("+")),
        "nothing is loaded ahead": products and problem.endswith(" even") and ahead <= 0,
    }
    return [fault for fault, there in found.items() if there] + list(forbidden)


def keys(lengths: Iterable[int], chip: Chip, layer: Joint) -> set[str]:
    """Return Triton's key for each program that forward and backward of such lengths run.

    And a gated product of the first outputs. Nothing is compiled.
    """
    found = set()
    for length in lengths:
        calls = recorded(chip, replace(layer, M=length))
        y = torch.empty(length, layer.sizes[0], dtype=torch.bfloat16, device="meta")
        with recording(chip) as elementwise:
            gated_backward(y, gated(y, y, "silu"), y, "silu")
        for call in calls + elementwise:
            uses = {"num_warps": call.config.num_warps, "num_stages": call.config.num_stages}
            _, key, *_ = aot.binder(call.kernel, 90)[0](*call.values, **uses)
            found.add(f"{call.kernel.__name__} {key} {uses}")
    return found


def lengths() -> Iterator[dict]:
    """Yield how many programs lengths of a batch need, and which others than a few of them need.

    The few are a power of two, by which tiles are chosen, and one less: 16 divides one of the two.
    The others are 150 up to it and beyond the last one, at random.
    """
    others = [random.Random(0).randint(3, 1 << 14) for _ in range(150)]
    layers = (4096, (4096,), (16,)), (4096, (4096, 1024, 1024), (8,) * 3), (576, (576,), (33,))
    kinds = "bf16", "bf16-fp32", "fp32"
    for layer, p, kind, chip in covering(layers, (0.0, 0.1), kinds, (80, 90)):
        of = aot.CHIPS[chip], Joint(0, *layer, kind, "both", (p,) * 3, (False,) * 3, scaling=0.5)
        few, more = set(), set()
        for most in (1 << k for k in range(2, 15)):
            known = keys((most, most - 1), *of)
            few |= known
            more |= keys([n for n in others if most // 2 < n <= most], *of) - known
        yield {"name": f"{of}", "few": len(few), "more": sorted(more)}


def main(share: int, of: int, which: str) -> None:
    """Print what was asked for: "lengths", or the reports of a share of the jobs."""
    if share == 0 and which in ("every", "sample", "defaults"):
        programs = [job[:2] for job in jobs("every")]
        print(json.dumps({"all": programs, "kernels": fingerprint()}), flush=True)
    known = set(map(tuple, json.load(sys.stdin))) if which == "every" else ()
    todo = [job for job in jobs(which) if job[:2] not in known] if which in ASKED else []
    for row in lengths() if which == "lengths" else (report(*job) for job in todo[share::of]):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
