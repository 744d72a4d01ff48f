# SPDX-License-Identifier: Apache-2.0
"""What the operators cost, for PyTorch's counter: ``FlopCounterMode(custom_mapping=FORMULAS)``."""

import torch

from fastlora.operator import op  # noqa: F401  defines the operators


def _forward(x, operands, *rest, **options) -> int:
    M, K = x
    return sum(2 * M * (N * K + R * (K + N)) for N, R in _sizes(operands))


def _backward(dy, x, operands, *rest, **options) -> int:
    (M, K), (need_x, need_A, need_B, *_) = x, rest[-5:]
    total = 0
    for (N, R), need_a, need_b in zip(_sizes(operands), need_A, need_B, strict=True):
        dx, ds, da, db = N * K + R * K, R * N, R * K, R * N
        total += need_x * dx + (need_x or need_a) * ds + need_a * da + need_b * db
    return 2 * M * total


def _sizes(operands) -> list[tuple[int, int]]:
    """Return N and R of each projection; R is 0 where an empty tensor stands for no adapter."""
    pairs = zip(operands[::6], operands[1::6], strict=True)
    return [(w[-2], a[-2] if len(a) > 1 else 0) for w, a in pairs]


# Not registered on import: that would cost every user the import of the counter, 0.2 s.
FORMULAS = {
    torch.ops.fastlora.lora_linears: _forward,
    torch.ops.fastlora.lora_linears_backward: _backward,
}
