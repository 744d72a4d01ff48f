# SPDX-License-Identifier: Apache-2.0
"""The ``plain`` implementation: PyTorch's own operations, which PyTorch differentiates.

Nothing of it runs in Python in backward, so that on a CPU it is the fastest for few tokens, and
`torch.func` and forward-mode AD can go through it. It keeps for backward what PyTorch does: with
dropout the mask and what it leaves of x, and x in float32 where the adapters are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.operator.dropout import KeptOnes, keep_mask, kept_scale
from fastlora.operator.operands import Operands


def forward_all(x: Tensor, projections: Sequence[Operands], observed: bool) -> list[Tensor]:
    """Return y [M, N] of each projection of x [M, K].

    ``observed``: a compiler or a transform looks on, which memory that is written twice confuses.
    """
    return [_forward(x, projection, observed) for projection in projections]


def _forward(x: Tensor, projection: Operands, observed: bool) -> Tensor:
    w, a, b, bias, seed, scaling, p = projection
    if a is None:
        return F.linear(x, w, bias)
    x_hat, narrow = x, a.dtype == torch.float16
    if seed is not None:
        x_hat, kept = x * _ones(x, seed, p, observed), kept_scale(p)
        x_hat, scaling = (x_hat * kept, scaling) if narrow else (x_hat, scaling * kept)
    s = F.linear(x_hat.to(a.dtype), a)
    if narrow:  # as written down: another order might overflow where this does not
        return torch.add(F.linear(x, w, bias), F.linear(s, b), alpha=scaling)
    if a.dtype == x.dtype:
        return torch.addmm(F.linear(x, w, bias), s, b.t(), alpha=scaling)
    low_rank = F.linear(s * scaling, b)
    if bias is not None:
        low_rank = low_rank + bias
    return torch.addmm(low_rank.to(x.dtype), x, w.t())


def _ones(x: Tensor, seed: Tensor, p: float, observed: bool) -> Tensor:
    """Return dropout's mask as ones and zeros [M, K] in the dtype of x."""
    if observed:
        return keep_mask(seed, range(x.shape[0]), x.shape[1], p).to(x.dtype)
    return KeptOnes(seed, *x.shape, p, x.dtype).draw(x.shape[0])
