# SPDX-License-Identifier: Apache-2.0
"""The oracle: a LoRA linear layer in plain torch.

Nothing here is fast and nothing else in the package imports it except by name; tests compare
every implementation with it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastlora.operator.dropout import keep_mask, kept_scale


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Return ``x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ`` step by step, as PEFT computes it.

    Shapes: x [..., K], weight [N, K], lora_A [R, K], lora_B [N, R], bias [N]; the result is
    [..., N] in the dtype of ``x``. ``mask`` has the shape of ``x`` and is true where dropout
    keeps an element; ``None`` keeps all. The low-rank path runs in the adapters' dtype.
    Differentiable by autograd.
    """
    x_hat = x.to(lora_A.dtype)
    if mask is not None:
        x_hat = x_hat * mask * kept_scale(dropout_p)
    low_rank = F.linear(F.linear(x_hat, lora_A), lora_B) * scaling
    return (F.linear(x, weight, bias) + low_rank).to(x.dtype)


def output(
    x: Tensor,
    w: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    p: float,
) -> Tensor:
    """Return y [M, N] of x [M, K] and an operator's operands."""
    if a is None:
        return F.linear(x, w, bias)
    mask = None if seed is None else keep_mask(seed, range(x.shape[0]), x.shape[1], p)
    return lora_linear(x, w, a, b, bias, scaling=scaling, dropout_p=p, mask=mask)
