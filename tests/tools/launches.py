# SPDX-License-Identifier: Apache-2.0
"""What a driver gets of our launches, of every kind: a JSON line for each, and what is wrong in it.

Run by test_prepared.py in a process of its own: the interpreter must be off.
"""

import ctypes
import gc
import json
import re
import struct
from collections.abc import Callable, Iterator

import aot
import fastlora_kernels
import stub_driver
import torch
import triton
from fastlora_kernels import gated, gated_backward, launch
from joints import Joint, run
from recorder import Call
from stub_driver import CAPABILITIES, Launched

# Rows, sizes, ranks (0: no adapter), dropout. Scalings differ, the second has no bias.
SHAPES = {
    "one": (64, (256,), (16,), (0.1,)),
    "three": (64, (256, 128, 128), (16, 16, 16), (0.0, 0.0, 0.0)),
    "uneven": (1, (250, 128, 128), (8, 0, 16), (0.1, 0.0, 0.2)),
}
BYTES = {"*": "Q", "i32": "i", "i64": "q", "fp32": "f"}  # of an argument, by Triton's type
SIZES = {"u64": 8, "u32": 4, "f32": 4}  # of a parameter, by its type in PTX

devices = stub_driver.Devices(current=2)
devices.hold_tensors()
own, by_triton = launch.Launch.__call__, launch.Launch._by_triton
made: list[tuple[Call, bool, Launched, Launched]] = []
kept: list = []  # so that nothing lies again where it was


def twice(self: launch.Launch, *tensors) -> None:
    """Launch as ever and then by Triton; note whether that was the way in the first place."""
    if self.empty:
        return
    asked = []
    launch.Launch._by_triton = lambda *given: asked.append(by_triton(*given))
    own(self, *tensors)
    by_triton(self, *tensors)
    call = Call(self.kernel, self.grid, (*tensors, *self.rest), self.config)
    made.append((call, not asked, *devices.launched()))


launch.Launch.__call__ = twice


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
    for line in head.strip().split("\n"):
        size = SIZES[re.match(r"\s*\.param \.(\w+) ", line)[1]]
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


def layer(device: int, shape: str, kind: str) -> dict:
    """Launch a layer, whose tensors are of ``device``, and say what is wrong with it."""
    devices.home, (rows, sizes, ranks, p) = device, SHAPES[shape]
    joint = Joint(rows, 256, sizes, ranks, kind, dropout_p=p)
    ts = joint.tensors()
    if rows == 1:  # only such a stride needs no memory
        ts = [{**t, "x": t["x"].as_strided((1, 256), (1 << 33, 1))} for t in ts]
    return of(lambda: run(fastlora_kernels, joint, ts))


def elementwise(device: int, activation: str) -> dict:
    devices.home = device
    gate, up, dh = torch.zeros(3, 64, 64, dtype=torch.bfloat16)
    return of(lambda: (gated(gate, up, activation), gated_backward(dh, gate, up, activation)))


def of(call: Callable) -> dict:
    """Return of each launch the kernel, what is wrong, and whether Triton was not asked."""
    refused = None
    try:
        call()
    except RuntimeError as error:
        refused = str(error)
    found = {"kernels": [], "wrong": [], "prepared": [], "refused": refused}
    for asked, prepared, one, other in made:
        found["kernels"].append(asked.kernel.__name__)
        found["wrong"].append(wrong(asked, one) + ["alike"] * (bytes(one) != bytes(other)))
        found["prepared"].append(prepared)
    kept.append(made.copy())
    made.clear()
    return found


def kinds() -> Iterator[dict]:
    """Yield two rounds of launches of every kind: what the first found out serves the second."""
    for call, device, *what in DRAWN:
        devices.exchange(device)
        for again in (False, True):
            yield {"what": [CAPABILITIES[device], *what], "again": again} | call(device, *what)


def circumstances() -> Iterator[dict]:
    """Yield how a layer of device 1 is launched while something is so, first without programs."""
    kernel, told = fastlora_kernels.shrink.shrink_kernel, []
    runtime = triton.knobs.runtime
    chain = runtime.launch_enter_hook  # None on Triton 3.4

    def tell(*_, **__) -> None:
        told.append(True)

    def hook(on: bool) -> None:
        if chain is None:
            runtime.launch_enter_hook = tell if on else None
        else:
            (chain.add if on else chain.remove)(tell)

    changes = {
        "cold, captured": lambda on: setattr(devices, "capturing", on),
        "cold, elsewhere": lambda on: devices.exchange(2 if on else 1),
        "nothing": lambda on: None,
        "stream": lambda on: devices.streams.__setitem__(1, 7 if on else 200),
        "hook": hook,
        "hook of a kernel": lambda on: kernel.pre_run_hooks.__setitem__(slice(None), [tell] * on),
    }
    changes["captured"], changes["elsewhere"] = [change for _, change in [*changes.items()][:2]]
    devices.exchange(1)
    for name, change in changes.items():
        told.clear()
        change(True)
        found = layer(1, "one", "bf16")
        yield {"while": name, "told": len(told), "current": devices.current} | found
        change(False)
    # No program is held by Triton any more, and so none of these launches is made again by it.
    launch.Launch.__call__ = own
    kernel.device_caches.clear()
    gc.collect()
    yield {"while": "forgotten", "told": 0, "current": 1} | layer(1, "one", "bf16")


DRAWN = (
    *((layer, 0, "three", "fp16"), (layer, 0, "uneven", "fp32")),
    *((layer, 2, "one", "bf16"), (layer, 2, "three", "bf16-fp32"), (layer, 2, "uneven", "fp16")),
    *((layer, 3, "one", "fp16"), (layer, 3, "three", "bf16"), (elementwise, 3, "silu")),
)

if __name__ == "__main__":
    for line in (*kinds(), *circumstances()):
        print(json.dumps(line), flush=True)
