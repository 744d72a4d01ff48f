"""Compiles every kernel as each chip would run it and prints the resources, a JSON line each.

Run by test_compiled.py in processes of their own: the compiler needs the interpreter off.
"""

from __future__ import annotations

import itertools
import json
import os
import sys

import aot
import torch
from acceptance import KINDS
from fastlora_kernels import backward, forward, launch

CAPABILITIES = (80, 89, 90, 100, 120)
SIZES = {"even": (4096, 4096, 4096), "ragged": (1000, 1001, 999)}
# (size, kind, rank): every mix of dtypes, the ranks that need other tiles, and the masked variants.
PROBLEMS = tuple(itertools.product(SIZES, ("bf16", "bf16-fp32", "fp16-fp32", "fp32"), (16, 128)))


def calls(chip, kind: str, r: int, size: str) -> list[launch.Call]:
    """Return what a forward and a backward with and without dropout launch on ``chip``."""
    (M, N, K), (base, adapter) = SIZES[size], KINDS[kind]

    def empty(*shape, dtype=base):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, w, dy, bias = empty(M, K), empty(N, K), empty(M, N), empty(N)
    a, b, s = (empty(*d, dtype=adapter) for d in ((r, K), (N, r), (M, r)))
    with launch.recording(chip) as recorded:
        for seed, p in ((None, 0.0), (empty(1, dtype=torch.int64), 0.1)):
            forward(x, w, a, b, bias, seed, 0.5, p)
            backward(dy, x, w, a, b, s, seed, 0.5, p, (True, True, True))
    return recorded


def key(call: launch.Call) -> tuple:
    """Return what makes two launches the same program."""
    signature = tuple(
        (name, getattr(value, "dtype", value) if name.isupper() and len(name) > 1 else None)
        for name, value in call.args.items()
    )
    pointers = tuple(
        v.dtype if isinstance(v, torch.Tensor) else v is None for v in call.args.values()
    )
    ones = tuple(isinstance(v, int) and v == 1 for v in call.args.values())
    return call.kernel.__name__, call.config, signature, pointers, ones


def pipelined_loads(call: launch.Call) -> int:
    """Return how many loads of 16 bytes a thread issues when the large operands are pipelined."""
    args, config = call.args, call.config
    m, n, k = config.block_m, config.block_n, config.block_k
    if call.kernel.__name__ == "product_kernel":
        elements, tensor = (m + n) * k, args["x_ptr"]
    elif call.kernel.__name__ == "shrink_kernel":
        elements, tensor = m * k, args["x_ptr"]
    elif call.kernel.__name__ == "columns_kernel":
        elements, tensor = m * n, args["t_ptr"]
    else:
        return 0
    return config.num_stages * elements * tensor.dtype.itemsize // (16 * 32 * config.num_warps)


def main(share: int, of: int) -> None:
    os.nice(10)  # the tests that run meanwhile go first
    jobs = []
    for capability in CAPABILITIES:
        seen = set()
        for size, kind, r in PROBLEMS:
            for call in calls(aot.CHIPS[capability], kind, r, size):
                if key(call) not in seen:
                    seen.add(key(call))
                    jobs.append((capability, f"{kind} r={r} {size}", call))
    for capability, problem, call in jobs[share::of]:
        found = aot.compile_call(call, capability)
        report = {
            "capability": capability,
            "problem": problem,
            "kernel": call.kernel.__name__,
            "dropout": bool(call.args.get("HAS_DROPOUT")),
            "config": str(call.config),
            "registers": found.registers,
            "stack": found.stack,
            "shared": found.shared,
            "instructions": found.instructions,
            "pipelined_loads": pipelined_loads(call),
            "ptx_f64": ".f64" in found.ptx,
            "ptx_tf32": "tf32" in found.ptx,
            "ptx_trap": "trap;" in found.ptx,
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
