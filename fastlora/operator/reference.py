# SPDX-License-Identifier: Apache-2.0
"""The oracle: a LoRA linear layer in plain torch, which every implementation is compared with.

Nothing here is fast. The low-rank path runs in the adapters' dtype, and all is differentiable.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastlora.operator.dropout import keep_mask, kept_scale


def output(
    x: Tensor,
    w: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    p: float = 0.0,
) -> Tensor:
    """Return ``x wᵀ + bias + scaling · dropout(x) aᵀ bᵀ`` [..., N] for x [..., K], as PEFT does."""
    y = F.linear(x, w, bias)
    return y if a is None else (y + low_rank(x, a, b, seed, scaling, p)).to(x.dtype)


def low_rank(
    x: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, scaling: float | Tensor, p: float
) -> Tensor:
    """Return ``scaling · dropout(x) aᵀ bᵀ`` [..., N] in the adapters' dtype."""
    x_hat = x.to(a.dtype)
    if seed is not None:
        keep = keep_mask(seed, range(x.shape[:-1].numel()), x.shape[-1], p)
        x_hat = x_hat * keep.view(x.shape).to(a.dtype) * kept_scale(p)
    return F.linear(F.linear(x_hat, a), b) * scaling
