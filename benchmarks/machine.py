# SPDX-License-Identifier: Apache-2.0
"""What the model knows of a GPU: nominal rates by its properties, and the shares that are reached.

Nothing is measured here. Every number that is not on a data sheet is a named constant with its
source; `kernels/README.md` says how far predictions were from published measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fastlora_kernels.configs import Chip

# 16-bit FLOPs with float32 sums that a processor makes per clock (NVIDIA's data sheets: 312 TFLOP/s
# of an A100, 989 of an H100, 2250 of a B200, each divided by processors and clock). GeForce chips
# of 8.6, 8.9 and 12.0 make half: 165 TFLOP/s of an RTX 4090, 209.5 of an RTX 5090.
MATRIX = {(8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192, (12, 0): 1024}
GEFORCE = ((8, 6), (8, 9), (12, 0))
# Share of that peak, at the highest clock, inside a main loop: the vendor's library, Triton with
# TMA, Triton with cp.async. 9: the library fits published H100 products (test_machine.py),
# power holds its clock down; TMA from 666 to 689 TFLOP/s at 8192 x 8192 x 4096 to 16384
# (meta-pytorch/tritonbench#894); cp.async is 13% below TMA (triton-lang/triton#5461). 10: the
# library's 1756 TFLOP/s on a GB300 (facebookexperimental/triton#740); the others are guesses.
SHARES = {
    8: {"library": 0.85, "tma": 0.78, "cp.async": 0.78},
    9: {"library": 0.75, "tma": 0.665, "cp.async": 0.59},
    10: {"library": 0.70, "tma": 0.62, "cp.async": 0.35},
    12: {"library": 0.85, "tma": 0.78, "cp.async": 0.78},
}
SHARES_32 = {"library": 0.75, "tma": 0.4, "cp.async": 0.4}  # of the FFMA peak; guesses
COPY = 0.9  # of the nominal bandwidth: 3.0 of an H100's 3.35 TB/s
LAUNCH_GAP = 2e-6  # s from one kernel's last byte to the next one's first; assumed


@dataclass(frozen=True)
class Machine:
    """What a prediction depends on; rates are nominal, at the highest clock.

    ``matrix`` 16-bit and ``vector`` float32 FLOP/s, ``memory`` bytes/s, ``l2`` bytes, ``shared``
    bytes of one processor, ``block_shared`` those one block may use, ``gap`` seconds.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    matrix: float
    vector: float
    memory: float
    l2: int
    shared: int
    block_shared: int
    gap: float = LAUNCH_GAP

    @staticmethod
    def of(device: torch.device) -> Machine | None:
        """Return the machine behind ``device``; None where it is no NVIDIA GPU that is known."""
        if device.type != "cuda" or torch.version.hip:
            return None
        return Machine.from_properties(torch.cuda.get_device_properties(device))

    @staticmethod
    def from_properties(p) -> Machine | None:
        """Return the machine that PyTorch's device properties describe, or None."""
        known = ("clock_rate", "memory_clock_rate", "memory_bus_width")  # of newer PyTorch
        capability = next((c for c in ((p.major, p.minor), (p.major, 0)) if c in MATRIX), None)
        if capability is None or not all(hasattr(p, name) for name in known):
            return None
        count, shared = p.multi_processor_count, p.shared_memory_per_block_optin
        clocks = count * p.clock_rate * 1e3
        matrix = MATRIX[capability] * clocks
        matrix /= 2 if "GeForce" in p.name and capability in GEFORCE else 1
        vector = (128 if capability == (8, 0) else 256) * clocks
        memory = 2 * p.memory_clock_rate * 1e3 * p.memory_bus_width / 8
        l2 = getattr(p, "L2_cache_size", 32 << 20)
        of_one = getattr(p, "shared_memory_per_multiprocessor", shared)
        rates = matrix, vector, memory
        return Machine(p.name, (p.major, p.minor), count, *rates, l2, of_one, shared)

    @property
    def copy(self) -> float:
        """Bytes/s that a kernel which only streams reaches."""
        return COPY * self.memory

    @property
    def chip(self) -> Chip:
        """What the kernels' configs depend on."""
        return Chip(self.capability, self.block_shared, self.processors)

    def rate(self, how: str, kind: str) -> float:
        """Return FLOP/s in a main loop by ``how`` ("library", "tma", "cp.async")."""
        if kind == "32":
            return SHARES_32[how] * self.vector
        return SHARES[self.capability[0]][how] * self.matrix


# The data sheet of the H100 SXM with its highest clock, 1.98 GHz; 2.619 GHz x 5120 bits of memory.
H100 = Machine(
    *("H100 SXM", (9, 0), 132, 4096 * 132 * 1.98e9, 256 * 132 * 1.98e9, 3.352e12),
    *(50 << 20, 228 << 10, 227 << 10),
)
