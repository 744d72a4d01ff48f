# SPDX-License-Identifier: Apache-2.0
"""How many blocks of a kernel a processor of a chip holds at the same time.

The limits are those of ``cuda_occupancy.h`` and of the CUDA programming guide's table of compute
capabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS, REGISTER_UNIT = 65536, 256  # 32-bit registers of a processor; a warp's come in units
QUARTERS = 4  # a processor's registers are split among four schedulers
SHARED_UNIT, SHARED_RESERVED = 128, 1024  # bytes; the driver keeps the latter of every block
TENSOR_COLUMNS = 512  # of tensor memory


@dataclass(frozen=True)
class Limits:
    """Of one processor: shared memory (bytes), threads and blocks."""

    shared: int
    threads: int
    blocks: int


LIMITS = {
    80: Limits(164 * 1024, 2048, 32),
    86: Limits(100 * 1024, 1536, 16),
    89: Limits(100 * 1024, 1536, 24),
    90: Limits(228 * 1024, 2048, 32),
    100: Limits(228 * 1024, 2048, 32),
    120: Limits(100 * 1024, 1536, 24),
}


def blocks_per_processor(
    capability: int, warps: int, registers: int, shared: int, tensor_columns: int = 0
) -> int:
    """Return how many blocks of ``warps`` warps fit.

    ``registers`` a thread, ``shared`` bytes a block, and the columns of tensor memory that a
    block allocates (sm_100).
    """
    limits = LIMITS[capability]
    of_a_warp = _up(registers * WARP, REGISTER_UNIT)
    return min(
        limits.blocks,
        limits.threads // (warps * WARP),
        REGISTERS // QUARTERS // of_a_warp * QUARTERS // warps,
        limits.shared // _up(shared + SHARED_RESERVED, SHARED_UNIT),
        TENSOR_COLUMNS // tensor_columns if tensor_columns else limits.blocks,
    )


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
