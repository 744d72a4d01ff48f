"""What the operators cost, for PyTorch's counter: ``FlopCounterMode(custom_mapping=FORMULAS)``."""

from __future__ import annotations

import torch

from fastlora import ops  # noqa: F401  defines the operators


def _forward(x, weight, lora_A, lora_B, *rest, **options) -> int:
    (M, K), (N, R) = x, lora_B
    return 2 * M * (N * K + R * (K + N))


def _backward(dy, x, weight, lora_A, lora_B, *rest, **options) -> int:
    (M, K), (N, R) = x, lora_B
    need_x, need_A, need_B = rest[-3:]
    dx, ds, da, db = N * K + R * K, R * N, R * K, R * N
    return 2 * M * (need_x * dx + (need_x or need_A) * ds + need_A * da + need_B * db)


# Not registered on import: that would cost every user the import of the counter, 0.2 s.
FORMULAS = {
    torch.ops.fastlora.lora_linear: _forward,
    torch.ops.fastlora.lora_linear_backward: _backward,
}
