# SPDX-License-Identifier: Apache-2.0
"""What a driver gets of our launches, of every kind: a JSON line for each, and what is wrong in it.

Run by test_prepared.py in a process of its own: the interpreter must be off.
"""

import contextlib
import ctypes
import functools
import gc
import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from unittest.mock import patch

import aot
import fastlora_kernels
import stub_driver
import torch
import triton
from fastlora_kernels import gated, gated_backward, launch, replay
from fastlora_kernels.configs import Config
from joints import Joint, run
from recorder import Call
from stub_driver import CAPABILITIES, Launched

from fastlora.operator import steps

# Rows, sizes, ranks (0: no adapter), dropout, where experts begin. Scalings differ, the second has
# no bias.
SHAPES = {
    "one": (64, (256,), (16,), (0.1,)),
    "three": (64, (256, 128, 128), (16, 16, 16), (0.0, 0.0, 0.0)),
    "uneven": (1, (250, 128, 128), (8, 0, 16), (0.1, 0.0, 0.2)),
    "experts": (64, (256, 128), (16, 0), (0.1, 0.0), (0, 5, 64)),
}
# What is asked for where segments go through persistent programs.
BY_TMA = dict.fromkeys(("outputs", "input_grad"), Config(128, 128, 64, num_warps=8, tma=True))
BYTES = {"*": "Q", "i32": "i", "i64": "q", "fp32": "f"}  # of an argument, by Triton's type

devices = stub_driver.Devices(current=2)
devices.hold_tensors()
asked: list[Call] = []  # of Triton
by_triton, new_empty, cat = launch.Launch._by_triton, torch.Tensor.new_empty, torch.cat
kept: dict[tuple, torch.Tensor] = {}
turns: Counter = Counter()


def noting(self: launch.Launch, *tensors) -> None:
    asked.append(Call(self.kernel, self.grid, (*tensors, *self.rest), self.config))
    by_triton(self, *tensors)


def same_empty(like: torch.Tensor, *shape, **options) -> torch.Tensor:
    """Return the tensor that was made in the place of this one the time before."""
    made = new_empty(like, *shape, **options)
    key = made.shape, made.dtype
    turns[key] += 1
    return kept.setdefault((*key, turns[key]), made)


def same_cat(ts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return kept.setdefault((dim, *[t.data_ptr() for t in ts]), cat(ts, dim))


launch.Launch._by_triton, torch.Tensor.new_empty, torch.cat = noting, same_empty, same_cat
segments = functools.cache(Joint.segments)  # the same tensors each time, and on no GPU
Joint.segments = lambda self, device: segments(self, "cpu")
for name in ("forward", "backward"):  # as "triton" is planned to run
    direction = functools.partial(getattr(steps, name), fastlora_kernels.steps)
    direction = replay.replayed(direction)
    setattr(steps, name, lambda _, *given, own=direction: own(*given))


def parameters(call: Call) -> Iterator[tuple[str, int | float]]:
    """Yield code and value of each argument that is no constant of the program."""

    def flat(value, *about) -> Iterator:
        if isinstance(value, tuple):
            for part in value:
                yield from flat(part, *about)
            return
        kind, constant, _ = aot.argument(value, *about)
        if not constant:
            value = value.data_ptr() if kind[0] == "*" else value
            yield BYTES.get(kind, BYTES["*"]), value

    for name, value in call.args.items():
        yield from flat(value, aot.is_constexpr(name), name not in aot.unspecialized(call))


def declared(ptx: str) -> list[tuple[int, int]]:
    """Return offset and size of each parameter of a program, from its head: all are aligned."""
    (head,) = re.findall(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)
    end, found = 0, []
    for bits in re.findall(r"\.param \.[usf](\d+)", head):
        size = int(bits) // 8
        start = -(-end // size) * size
        found.append((start, size))
        end = start + size
    return found


def wrong(call: Call, launched: Launched) -> list[str]:
    """Return what of a launch is not as it was asked for or as the program has it."""
    program = launched.program.contents
    programs = call.kernel.device_caches[devices.home][0].values()
    (compiled,) = [c for c in programs if c.function == ctypes.addressof(program)]
    metadata, (places, expected) = compiled.metadata, (declared(compiled.asm["ptx"]), bytearray())
    scratch = metadata.global_scratch_size * launched.grid[0]
    scratch = [("Q", devices.memory[scratch,].data_ptr() if scratch else 0), ("Q", 0)]
    scratch = scratch[: 1 + hasattr(metadata, "profile_scratch_size")]  # not on Triton 3.4
    for (start, size), (code, value) in zip(places, [*parameters(call), *scratch], strict=True):
        packed = struct.pack(code, value)
        assert len(packed) == size, (call.kernel, start, size, code)
        expected += bytes(start - len(expected)) + packed
    noted = [(p.offset, p.size) for p in program.parameters[: program.count]]
    (threads,) = re.findall(r"\.reqntid (\d+)", compiled.asm["ptx"])
    same = {
        "parameters": noted == places,
        "bytes": bytes(launched.parameters) == bytes(expected).ljust(4096, b"\0"),
        "device": program.device == devices.home,
        "grid": (*launched.grid,) == (*call.grid, 1, 1)[:3],
        "block": (*launched.block,) == (32 * call.config.num_warps, 1, 1) == (int(threads), 1, 1),
        "shared": launched.shared == metadata.shared,
        "stream": launched.stream == devices.streams[devices.home],
        "attributes": launched.attributes == 0,
    }
    return [name for name, right in same.items() if not right]


@contextlib.contextmanager
def hooked(tell: Callable) -> Iterator[None]:
    """Have Triton ``tell`` of launches: nobody else can make them meanwhile."""
    runtime = triton.knobs.runtime
    before = runtime.launch_enter_hook  # a chain, but on Triton 3.4
    if chained := hasattr(before, "add"):
        before.add(tell)
    else:
        runtime.launch_enter_hook = tell
    yield
    if chained:
        before.remove(tell)
    else:
        runtime.launch_enter_hook = before


def compared(call: Callable) -> dict:
    """Return what is wrong with each launch of ``call``, and how many of them Triton made.

    Then it makes them all, of the same tensors: the driver has to get the same.
    """
    kept.clear()
    try:
        launched, by = [], []
        for way in (contextlib.nullcontext(), hooked(lambda metadata: None)):
            asked.clear()
            turns.clear()
            with way:
                call()
            launched.append(devices.launched())
            by.append(len(asked))
    except RuntimeError as error:
        return {"refused": str(error), "launched": len(devices.launched())}
    found = zip(asked, *launched, strict=True)
    all_wrong = [wrong(c, own) + ["alike"] * (bytes(one) != bytes(own)) for c, one, own in found]
    names = [c.kernel.__name__ for c in asked]
    return {"kernels": names, "wrong": all_wrong, "by_triton": by[0]}


def layer(device: int, shape: str, kind: str, way: str = "") -> dict:
    """Launch a layer, whose tensors are of ``device``."""
    devices.home, (rows, sizes, ranks, p, *cut) = device, SHAPES[shape]
    joint = Joint(rows, 256, sizes, ranks, kind, dropout_p=p, scaled=way == "scaled")
    joint = replace(joint, ends=cut[0], experts=True) if cut else joint
    ts = joint.tensors()
    if rows == 1:  # only such a stride needs no memory
        ts = [{**t, "x": t["x"].as_strided((1, 256), (1 << 33, 1))} for t in ts]
    configs = BY_TMA if way == "by TMA" else None
    return compared(lambda: run(fastlora_kernels, joint, ts, configs))


def elementwise(device: int, activation: str) -> dict:
    devices.home = device
    gate, up, dh = torch.zeros(3, 64, 64, dtype=torch.bfloat16)
    return compared(lambda: (gated(gate, up, activation), gated_backward(dh, gate, up, activation)))


def kinds() -> Iterator[dict]:
    """Yield two rounds of launches of every kind: what the first found out serves the second."""
    for call, device, *what in DRAWN:
        devices.exchange(device)
        for again in (False, True):
            yield {"what": [CAPABILITIES[device], *what], "again": again} | call(device, *what)


def circumstances() -> Iterator[dict]:
    """Yield how a layer of device 1 is launched while something is so, first without programs."""
    kernel, told = fastlora_kernels.shrink.shrink_kernel, []

    def tell(*_, **__) -> None:
        told.append(True)

    def forget() -> contextlib.nullcontext:
        kernel.device_caches.clear()
        gc.collect()
        return contextlib.nullcontext()

    captured = functools.partial(patch.object, devices, "capturing", True)
    elsewhere = functools.partial(torch.cuda.device, 2)
    ways = {
        "cold, captured": captured,
        "cold, elsewhere": elsewhere,
        "nothing": contextlib.nullcontext,
        "captured": captured,
        "elsewhere": elsewhere,
        "stream": lambda: patch.object(devices, "streams", [7] * len(CAPABILITIES)),
        "hook": lambda: hooked(tell),
        "hook of a kernel": lambda: patch.object(kernel, "pre_run_hooks", [tell]),
        "forgotten": forget,  # by Triton, which holds no program of that kernel any more
    }
    devices.exchange(1)
    for name, way in ways.items():
        told.clear()
        with way():
            found = layer(1, "one", "bf16")
            yield {"while": name, "told": len(told), "current": devices.current} | found


DRAWN = (
    *((layer, 0, "three", "fp16"), (layer, 0, "uneven", "fp32")),
    *((layer, 2, "experts", "bf16"), (layer, 3, "experts", "bf16", "by TMA")),
    *((layer, 2, "one", "bf16"), (layer, 2, "three", "bf16-fp32"), (layer, 2, "uneven", "fp16")),
    *((layer, 3, "one", "fp16"), (layer, 3, "three", "bf16"), (elementwise, 3, "silu")),
    *((layer, 0, "one", "bf16-fp32", "scaled"), (layer, 2, "three", "bf16", "scaled")),
)

if __name__ == "__main__":
    for line in (*kinds(), *circumstances()):
        print(json.dumps(line), flush=True)
