# SPDX-License-Identifier: Apache-2.0
"""What Python takes to launch a layer, with a driver that does nothing; and what it would be given.

Without a GPU: Triton compiles for sm_90 and launches CPU tensors through its own code, up to a
launcher that only notes its arguments or drops them. The interpreter must be off. As a script:

    python tests/tools/host_time.py          microseconds by way, the best and the median of rounds
    python tests/tools/host_time.py check    a JSON line for each launch: first and prepared alike?
"""

import functools
import itertools
import json
import statistics
import sys
import timeit
from collections.abc import Iterator
from types import SimpleNamespace

import aot
import torch
import triton
from fastlora_kernels import launch, outputs, replay
from fastlora_kernels import steps as kernels
from fastlora_kernels.configs import Chip
from triton.backends.compiler import GPUTarget

from fastlora import Projection, lora_linears
from fastlora.operator import plans, steps

launched: list[dict] | None = None  # what the launcher is given, where somebody asks


class Launcher:
    """In the place of Triton's: of the same arguments, but without a driver behind it."""

    def __init__(self, src, metadata) -> None:
        self.metadata, self.name = metadata, src.fn.__name__

    def __call__(self, gridX, gridY, gridZ, stream, function, *args) -> None:
        if launched is not None:
            uses = self.metadata.num_warps, self.metadata.num_stages, self.metadata.shared
            given = {"grid": (gridX, gridY, gridZ), "stream": stream, "function": function}
            # Between them the hooks, and what they would be told.
            given |= {"name": self.name, "uses": uses, "packed": args[0], "args": _plain(args[4:])}
            launched.append(given)


def _plain(value):
    """Return arguments as what the driver gets: a tensor is its address."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def stub() -> None:
    """Have Triton launch into nothing from here on: a device of sm_90, modules load at once."""
    loaded = itertools.count(1)
    utils = SimpleNamespace(
        load_binary=lambda *_: (object(), next(loaded), 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )
    driver = SimpleNamespace(launcher_cls=Launcher, utils=utils, device=0)
    driver.get_current_device = lambda: driver.device
    driver.get_current_stream = lambda device: 1000 + device
    driver.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(driver)
    Chip.of = staticmethod(lambda device: aot.CHIPS[90])


def layer(count: int, p: float, adapter: torch.dtype = torch.bfloat16):
    """Return a forward and a backward of projections of one x, as "triton" is planned to run."""
    x, r, sizes = torch.zeros(64, 256, dtype=torch.bfloat16), 16, (256, 128, 128)[:count]
    seed = torch.ones(1, dtype=torch.int64) if p else None
    zeros = torch.zeros
    factors = [(zeros(r, 256, dtype=adapter), zeros(n, r, dtype=adapter)) for n in sizes]
    of = [(x.new_zeros(len(b), 256), a, b, x.new_zeros(len(b)), seed, 2.0, p) for a, b in factors]
    each = [functools.partial(f, kernels) for f in (steps.forward, steps.backward)]
    forward, backward = map(replay.replayed, each)
    dys, ss = forward(x, of)
    needs = [(True, True)] * count
    return lambda: forward(x, of), lambda: backward(dys, x, of, ss, True, needs)


def numbered(launches: list[dict]) -> list[dict]:
    """Return launches with the addresses of tensors numbered as they come up."""
    found: dict[int, int] = {}

    def number(value):
        if isinstance(value, list):
            return [number(part) for part in value]
        address = isinstance(value, int) and value > 1 << 40
        return ("tensor", found.setdefault(value, len(found))) if address else value

    return [one | {"args": number(one["args"])} for one in launches]


def pairs() -> Iterator[dict]:
    """Yield for each launch of some layers whether the prepared one gives what Triton's does."""
    global launched
    kept = []  # so that each address is of one tensor
    for place, name in ((torch.Tensor, "new_empty"), (torch, "cat")):
        make = getattr(place, name)
        setattr(
            place, name, lambda *args, make=make, **o: kept.append(make(*args, **o)) or kept[-1]
        )
    kinds = (0.0, torch.bfloat16), (0.1, torch.bfloat16), (0.1, torch.float32)
    for count, (p, dtype) in itertools.product((1, 3), kinds):
        for call in layer(count, p, dtype):
            ways = []
            for by_triton in (True, False):
                launched, replay.RECORDS = [], not by_triton
                call()
                if not by_triton:  # the first goes by Triton in any case
                    launched = []
                    call()
                ways.append(numbered(launched))
                launched = None
            for one, other in zip(*ways, strict=True):
                same = {name: one[name] == other[name] for name in one}
                yield {"name": one["name"], "count": count, "same": same}


def ways() -> Iterator[dict]:
    """Yield how many launches of a warm forward go by Triton's own way, by what was changed."""
    count, own = 0, launch.Launch._by_triton

    def counted(self, *tensors) -> None:
        nonlocal count
        count += 1
        own(self, *tensors)

    launch.Launch._by_triton = counted
    forward, _ = layer(1, 0.0)
    driver, runtime = triton.runtime.driver.active, triton.knobs.runtime
    kernel, hook = outputs.persistent_outputs_kernel, lambda *_, **__: None

    def hooks(on: bool) -> None:
        if hasattr(runtime.launch_enter_hook, "calls"):
            (runtime.launch_enter_hook.add if on else runtime.launch_enter_hook.remove)(hook)
        else:
            runtime.launch_enter_hook = hook if on else None

    def own_hooks(on: bool) -> None:
        kernel.add_pre_run_hook(hook) if on else kernel.pre_run_hooks.clear()

    changes = {
        "nothing": lambda on: None,
        "a hook": hooks,
        "a hook of the kernel": own_hooks,
        "another device": lambda on: setattr(driver, "device", int(on)),
    }
    for name, change in changes.items():
        forward()
        change(True)
        count = 0
        forward()
        change(False)
        yield {"changed": name, "by_triton": count}
    launch.Launch._by_triton = own


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
    stub()
    if sys.argv[1:] == ["check"]:
        for found in (*ways(), *pairs()):
            print(json.dumps(found), flush=True)
        return
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
