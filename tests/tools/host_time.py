# SPDX-License-Identifier: Apache-2.0
"""What Python takes to launch a layer: microseconds, the best and the median of rounds.

Without a GPU: Triton compiles for sm_90 and launches CPU tensors. The interpreter must be off.

    python tests/tools/host_time.py             up to Triton's launcher, which is left out
    python tests/tools/host_time.py launcher    with it, up to a driver that only remembers
"""

import functools
import itertools
import statistics
import sys
import timeit

import torch
from fastlora_kernels import replay
from fastlora_kernels import steps as kernels
from stub_driver import Devices

from fastlora import Projection, lora_linears
from fastlora.operator import plans, steps


class Nothing:
    """In the place of Triton's launcher: of the same arguments, and does nothing with them."""

    def __init__(self, src, metadata) -> None:
        pass

    def __call__(self, gridX, gridY, gridZ, stream, function, *args) -> None:
        pass


def layer(count: int, p: float):
    """Return a forward and a backward of projections of one x, as "triton" is planned to run."""
    x, r, sizes = torch.zeros(64, 256, dtype=torch.bfloat16), 16, (256, 128, 128)[:count]
    seed = torch.ones(1, dtype=torch.int64) if p else None
    factors = [(x.new_zeros(r, 256), x.new_zeros(n, r)) for n in sizes]
    of = [(x.new_zeros(len(b), 256), a, b, x.new_zeros(len(b)), seed, 2.0, p) for a, b in factors]
    each = [functools.partial(f, kernels) for f in (steps.forward, steps.backward)]
    forward, backward = map(replay.replayed, each)
    dys, ss = forward(x, of)
    needs = [(True, True)] * count
    return lambda: forward(x, of), lambda: backward(dys, x, of, ss, True, needs)


def whole(count: int, p: float):
    """Return a forward of `lora_linears` by the kernels, and a backward of what it made."""
    plans.triton_unusable, plans.FEW = lambda device: None, 0
    plans.default = lambda *_: ("triton", "as a GPU's")
    zeros = functools.partial(torch.zeros, dtype=torch.bfloat16)
    x, sizes, made = zeros(64, 256).requires_grad_(), (256, 128, 128)[:count], []
    factors = [(zeros(16, 256).requires_grad_(), zeros(n, 16).requires_grad_()) for n in sizes]
    of = [Projection(zeros(len(b), 256), a, b, zeros(len(b)), 2.0, p) for a, b in factors]
    trained, dys = [x, *itertools.chain(*factors)], [zeros(64, n) for n in sizes]

    def forward() -> None:
        made[:] = lora_linears(x, of, training=True)

    return forward, lambda: torch.autograd.grad(made, trained, dys, retain_graph=True)


def main() -> None:
    driver = Devices(current=2).driver
    if sys.argv[1:] != ["launcher"]:
        driver.launcher_cls = Nothing
    cases = ("a layer", 1, 0.0), ("dropout", 1, 0.1), ("q/k/v", 3, 0.0)
    for (name, *case), (of, make) in itertools.product(
        cases, {"steps": layer, "all": whole}.items()
    ):
        for direction, call in zip(("forward", "backward"), make(*case), strict=True):
            found = [seconds * 1e6 for seconds in timeit.repeat(call, call, repeat=150, number=1)]
            best, median = min(found), statistics.median(found)
            print(f"{name:8} {of:6} {direction:8} best {best:6.1f} µs, median {median:6.1f} µs")


if __name__ == "__main__":
    main()
