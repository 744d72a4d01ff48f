# SPDX-License-Identifier: Apache-2.0
"""A projection of x: a frozen weight, and beside it an adapter or none."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Projection(NamedTuple):
    """What `lora_linears` makes of x: ``x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ``.

    ``weight`` [N, K], ``lora_A`` [R, K], ``lora_B`` [N, R] and ``bias`` [N], dtypes as for
    `lora_linear`. Without ``lora_A`` and ``lora_B`` there is no adapter: x Wᵀ + bias.
    """

    weight: Tensor
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    bias: Tensor | None = None
    scaling: float | Tensor = 1.0
    dropout_p: float = 0.0


def with_scaling(a: Tensor, b: Tensor, scaling: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return lora_A and lora_B with ``scaling`` in the latter.

    Both as float32 where they are float16: a small product would lose most of its bits.
    """
    if b.dtype == torch.float16:
        a, b = a.float(), b.float()
    return a, b * scaling


class Operands(NamedTuple):
    """A projection as implementations take it: checked, and with dropout's seed drawn.

    ``a`` and ``b`` are None without an adapter; ``seed`` ([1], int64) is None without dropout.
    """

    w: Tensor
    a: Tensor | None
    b: Tensor | None
    bias: Tensor | None
    seed: Tensor | None
    scaling: float
    p: float
