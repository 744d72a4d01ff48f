# SPDX-License-Identifier: Apache-2.0
"""What a driver gets of our launches, of every kind: a JSON line for each, and what is wrong in it.

Run by test_launcher.py in a process of its own: the interpreter must be off.
"""

import ctypes
import itertools
import json
import re
import struct
from collections.abc import Iterator

import aot
import fastlora_kernels
import stub_driver
import torch
from covering import covering
from fastlora_kernels import gated, gated_backward, launch
from fastlora_kernels.gated import ACTIVATIONS
from joints import Joint, run
from recorder import Call
from stub_driver import CAPABILITIES, Launched

# Sizes, ranks (0: no adapter), dropout. Scalings differ, the second has no bias.
SHAPES = {
    "one": ((256,), (16,), (0.0,)),
    "one, dropout": ((256,), (16,), (0.1,)),
    "three": ((256, 128, 128), (16, 16, 16), (0.0, 0.0, 0.0)),
    "uneven": ((250, 128, 128), (8, 0, 16), (0.1, 0.0, 0.2)),
}
BYTES = {"*": "Q", "i32": "i", "i64": "q", "fp32": "f"}  # of an argument, by Triton's type
SIZES = {"u64": 8, "u32": 4, "f32": 4}  # of a parameter, by its type in PTX

devices = stub_driver.Devices(current=2)
devices.hold_tensors()
own, by_triton = launch.Launch.__call__, launch.Launch._by_triton
made: list[tuple[Call, bool, Launched, Launched]] = []
# A kernel's descriptors in device memory: of a size there is one here, which stays.
workspaces: dict[int, torch.Tensor] = {}
make = torch.empty
torch.empty = lambda size, device, **options: workspaces.setdefault(size, make(size, **options))


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
        kind, constant, _ = aot._argument(value, *about)
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
    scratch = [("Q", workspaces[scratch].data_ptr() if scratch else 0), ("Q", 0)]
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
        "kernel": program.name.decode() == call.kernel.__name__,
        "device": program.device == devices.home,
        "architecture": metadata.target.arch == CAPABILITIES[devices.home],
        "grid": (*launched.grid,) == (*call.grid, 1, 1)[:3],
        "block": (*launched.block,) == (32 * call.config.num_warps, 1, 1) == (int(threads), 1, 1),
        "shared": launched.shared == metadata.shared,
        "stream": launched.stream == devices.streams[devices.home],
        "attributes": launched.attributes == 0,
    }
    return [name for name, right in same.items() if not right]


def found() -> Iterator[dict]:
    """Yield what is to be said of each launch since this was asked before."""
    for call, prepared, one, other in made:
        alike = ["alike"] * (bytes(one) != bytes(other))
        yield {"kernel": call.kernel.__name__, "prepared": prepared, "wrong": wrong(call, one) + alike}
    made.clear()


def layer(shape: str, kind: str, rows: int = 64) -> None:
    sizes, ranks, p = SHAPES[shape]
    joint = Joint(rows, 256, sizes, ranks, kind, dropout_p=p)
    run(fastlora_kernels, joint, joint.tensors())


def elementwise(activation: str) -> None:
    gate, up, dh = torch.zeros(3, 64, 64, dtype=torch.bfloat16)
    gated(gate, up, activation)
    gated_backward(dh, gate, up, activation)


def kinds() -> Iterator[dict]:
    """Yield two rounds of all kinds of launches: what the first found out serves the second."""
    kinds = "bf16", "fp16", "fp32", "bf16-fp32"
    drawn = covering(range(len(CAPABILITIES)), kinds, tuple(SHAPES))
    calls = [(device, layer, shape, kind) for device, kind, shape in drawn]
    calls += [(2, elementwise, activation) for activation in ACTIVATIONS]
    for (device, call, *what), again in itertools.product(calls, (False, True)):
        devices.home = device
        devices.exchange(device)
        call(*what)
        for one in found():
            yield {"what": [CAPABILITIES[device], *what], "again": again, **one}


def main() -> None:
    for line in kinds():
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
