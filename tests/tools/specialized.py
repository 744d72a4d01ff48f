# SPDX-License-Identifier: Apache-2.0
"""What Triton would compile for layers of many lengths: its own keys, without compiling anything.

As a script it prints a JSON line for each way to run a layer; the interpreter must be off.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable

import aot
import torch
from acceptance import KINDS
from fastlora_kernels import gated, gated_backward, steps
from fastlora_kernels.configs import Chip
from recorder import recording
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

LENGTHS = 150
# Two of each power of two, by which tiles are chosen: one that 16 divides and one that it does not.
FEW = (2, *(n - odd for n in (1 << k for k in range(2, 15)) for odd in (0, 1)))
BACKEND = make_backend(GPUTarget("cuda", 90, 32))


def programs(
    lengths: Iterable[int], chip: Chip, sizes: tuple[int, ...], K: int, R: int, p: float, kind: str
) -> set[str]:
    """Return a key for each program that forward and backward of projections of x run.

    And those of a gated product of the first one's outputs.
    """
    base, adapter = KINDS[kind]

    def empty(*shape, dtype=base):
        return torch.empty(*shape, dtype=dtype, device="meta")

    binders, found = {}, set()
    seed = empty(1, dtype=torch.int64) if p else None
    factors = [(empty(R, K, dtype=adapter), empty(n, R, dtype=adapter)) for n in sizes]
    weights = [empty(n, K) for n in sizes]
    each = [(w, a, b, None, seed, 0.5, p) for w, (a, b) in zip(weights, factors, strict=True)]
    all_of = [True] * len(each)
    for length in lengths:
        x = empty(length, K)
        with recording(chip) as calls:
            ss, scaled = steps.shrink(x, each)
            ys = steps.outputs(x, each, ss, scaled)
            dss, _ = steps.ds_db(ys, each, ss, all_of, all_of)
            steps.input_grad(ys, each, dss)
            steps.da(x, each, dss, all_of)
            gated_backward(ys[0], gated(ys[0], ys[0], "silu"), ys[0], "silu")
        for call in calls:
            kernel, config = call.kernel, call.config
            if kernel not in binders:
                binders[kernel] = create_function_from_signature(
                    kernel.signature, kernel.params, BACKEND
                )
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            _, key, *_ = binders[kernel](*call.values, **options)
            found.add(f"{kernel.__name__} {key} {options}")
    return found


def main() -> None:
    lengths = [random.Random(0).randint(2, 1 << 14) for _ in range(LENGTHS)]
    layers = ((4096,), 4096, 16), ((4096, 1024, 1024), 4096, 8), ((576,), 576, 33)
    kinds = "bf16", "bf16-fp32", "fp32"
    for (sizes, K, R), p, kind, chip in itertools.product(layers, (0.0, 0.1), kinds, (80, 90)):
        layer = aot.CHIPS[chip], sizes, K, R, p, kind
        few, many = programs(FEW, *layer), programs(lengths, *layer)
        name = f"{sizes} x {K}, r = {R}, {kind}, dropout {p:g}, sm_{chip}"
        print(json.dumps({"name": name, "few": len(few), "more": sorted(many - few)}), flush=True)


if __name__ == "__main__":
    main()
