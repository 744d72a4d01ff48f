# SPDX-License-Identifier: Apache-2.0
"""What the operators cost, for PyTorch's counter: ``FlopCounterMode(custom_mapping=FORMULAS)``."""

from __future__ import annotations

import torch

from fastlora.operator import op  # noqa: F401  defines the operators


def _forward(x, weight, lora_A, *rest, **options) -> int:
    M, K = x
    return sum(
        2 * M * (N * K + _rank(a) * (K + N)) for (N, _), a in zip(weight, lora_A, strict=True)
    )


def _backward(dy, x, weight, lora_A, *rest, **options) -> int:
    (M, K), (need_x, need_A, need_B) = x, rest[-3:]
    total = 0
    for (N, _), a, need_a, need_b in zip(weight, lora_A, need_A, need_B, strict=True):
        R = _rank(a)
        dx, ds, da, db = N * K + R * K, R * N, R * K, R * N
        total += need_x * dx + (need_x or need_a) * ds + need_a * da + need_b * db
    return 2 * M * total


def _rank(lora_A) -> int:
    return lora_A[0] if len(lora_A) == 2 else 0  # an empty tensor stands for no adapter


# Not registered on import: that would cost every user the import of the counter, 0.2 s.
FORMULAS = {
    torch.ops.fastlora.lora_linears: _forward,
    torch.ops.fastlora.lora_linears_backward: _backward,
}
