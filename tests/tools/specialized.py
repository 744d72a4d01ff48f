# SPDX-License-Identifier: Apache-2.0
"""What Triton would compile for layers of many lengths: its own keys, without compiling anything.

As a script it prints a JSON line for each way to run a layer; the interpreter must be off.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace

import aot
import torch
from covering import covering
from fastlora_kernels import gated, gated_backward, launch
from fastlora_kernels.configs import Chip
from joints import Joint, recorded
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

LENGTHS = 150
BACKEND = make_backend(GPUTarget("cuda", 90, 32))
# K, outputs and ranks.
LAYERS = (
    (4096, (4096,), (16,)),
    (4096, (4096, 1024, 1024), (8,) * 3),
    (576, (576,), (33,)),
)


def programs(lengths: Iterable[int], chip: Chip, layer: Joint) -> set[str]:
    """Return a key for each program that forward and backward of projections of x run.

    And those of a gated product of the first one's outputs.
    """
    binders, found = {}, set()
    for length in lengths:
        calls = recorded(chip, replace(layer, M=length))
        y = torch.empty(length, layer.sizes[0], dtype=torch.bfloat16, device="meta")
        with launch.recording(chip) as elementwise:
            gated_backward(y, gated(y, y, "silu"), y, "silu")
        for call in calls + elementwise:
            kernel, config = call.kernel, call.config
            if kernel not in binders:
                about = kernel.signature, kernel.params, BACKEND
                binders[kernel] = create_function_from_signature(*about)
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            _, key, *_ = binders[kernel](*call.values, **options)
            found.add(f"{kernel.__name__} {key} {options}")
    return found


def main() -> None:
    lengths = [random.Random(0).randint(2, 1 << 14) for _ in range(LENGTHS)]
    kinds = "bf16", "bf16-fp32", "fp32"
    for (K, sizes, ranks), p, kind, chip in covering(LAYERS, (0.0, 0.1), kinds, (80, 90)):
        layer = Joint(0, K, sizes, ranks, kind, dropout_p=(p,) * 3, biases=(False,) * 3)
        layer = replace(layer, scaling=0.5)
        few, many = (programs(of, aot.CHIPS[chip], layer) for of in ((4096, 4095), lengths))
        print(json.dumps({"name": f"{layer}, sm_{chip}", "few": len(few), "more": [*many - few]}))


if __name__ == "__main__":
    main()
