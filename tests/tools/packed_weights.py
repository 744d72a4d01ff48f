# SPDX-License-Identifier: Apache-2.0
"""Random weights of 4 bits, and what they are dense: every rounding is float32's."""

import torch
from torch import Tensor

BLOCKSIZE, OUTER = 16, 32


def drawn(shape: tuple[int, int], nested: bool, dtype: torch.dtype, device: str = "cpu"):
    """Return what `four_bits` takes, and what it has to make of it."""
    size = shape[0] * shape[1] // 2
    packed = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    code, absmax = torch.randn(16, device=device), torch.rand(size, device=device)
    scales, inner, at = absmax, None, torch.arange(size, device=device)
    if nested:
        table, outer, offset = (torch.rand(n, device=device) for n in ((256,), (size,), ()))
        absmax = torch.randint(256, (size,), dtype=torch.uint8, device=device)
        rounded = table[absmax.long()] * outer[at // OUTER]
        scales, inner = rounded + offset, (table, outer, OUTER, offset)
    pairs = torch.stack([packed >> 4, packed & 15], 1).long()
    dense: Tensor = code[pairs] * scales[at // (BLOCKSIZE // 2)][:, None]
    given = packed, shape, dtype, code, absmax, BLOCKSIZE, inner
    return given, dense.reshape(shape).to(dtype)
