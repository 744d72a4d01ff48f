# SPDX-License-Identifier: Apache-2.0
"""Several adapters on one frozen layer: their low-rank paths add up."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastlora.functional import lora_linear
from fastlora.operator.dropout import new_seed
from fastlora.operator.eager import low_rank
from fastlora.operator.op import transformed
from fastlora.operator.operands import with_scaling

# lora_A [R, K], lora_B [N, R], scaling, and the dropout's probability: 0 where none is drawn now.
Adapter = tuple[Tensor, Tensor, "float | Tensor", float]
_AGAIN = {"use_reentrant": False, "preserve_rng_state": False}


def lora_sum(x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter]) -> Tensor:
    """Return ``x Wᵀ + bias + Σ scaling · dropout(x) Aᵀ Bᵀ`` over one adapter or more.

    Shapes, dtypes and errors as for `lora_linear`; each adapter drops its own elements of x.
    """
    (a, b, scaling, p), *others = stacked(weight.dtype, adapters)
    y = lora_linear(x, weight, a, b, bias, scaling=scaling, dropout_p=p, training=p > 0.0)
    for a, b, scaling, p in others:
        operands = x, a, b, scaling, new_seed(x.device) if p else None, p
        # Backward makes the dropped input again instead of keeping it: `torch.func` has no way to.
        again = functools.partial(checkpoint, low_rank, **_AGAIN)
        y = y + (low_rank if transformed() else again)(*operands).to(y.dtype)
    return y


def stacked(base: torch.dtype, adapters: Sequence[Adapter]) -> Sequence[Adapter]:
    """Return one adapter of the ranks' sum that adds what ``adapters`` do; them where any drops."""
    if len(adapters) < 2 or any(p for *_, p in adapters):
        return adapters
    dtype = base if all(a.dtype == base for a, *_ in adapters) else torch.float32
    scaled = [with_scaling(a.to(dtype), b.to(dtype), scaling) for a, b, scaling, _ in adapters]
    a, b = zip(*scaled, strict=True)
    return [(torch.cat(a), torch.cat(b, dim=1), 1.0, 0.0)]
