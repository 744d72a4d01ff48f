# SPDX-License-Identifier: Apache-2.0
"""Several adapters on one frozen layer: their low-rank paths add up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.functional import add_low_rank, lora_linear
from fastlora.operator.operands import with_scaling
from fastlora.operator.weights import Opaque

# lora_A [R, K], lora_B [N, R], scaling, and the dropout's probability: 0 where none is drawn now.
Adapter = tuple[Tensor, Tensor, "float | Tensor", float]


def lora_sum(
    x: Tensor, weight: Tensor | Opaque, bias: Tensor | None, adapters: Sequence[Adapter]
) -> Tensor:
    """Return ``x Wᵀ + bias + Σ scaling · dropout(x) Aᵀ Bᵀ`` over one adapter or more.

    Shapes, dtypes and errors as for `lora_linear`; each adapter drops its own elements of x.
    """
    first, *others = adapters = stacked(weight.dtype, adapters)
    if type(weight) is Opaque:
        y, others = weight.layer(x), adapters
        y = y if bias is None else y + bias
    else:
        a, b, scaling, p = first
        y = lora_linear(x, weight, a, b, bias, scaling=scaling, dropout_p=p, training=p > 0.0)
    for a, b, scaling, p in others:
        y = add_low_rank(y, x, a, b, scaling, p)
    return y


def stacked(base: torch.dtype, adapters: Sequence[Adapter]) -> Sequence[Adapter]:
    """Return one adapter of the ranks' sum that adds what ``adapters`` do; them where any drops."""
    if len(adapters) < 2 or any(p for *_, p in adapters):
        return adapters
    dtype = base if all(a.dtype == base for a, *_ in adapters) else torch.float32
    scaled = [with_scaling(a.to(dtype), b.to(dtype), scaling) for a, b, scaling, _ in adapters]
    a, b = zip(*scaled, strict=True)
    return [(torch.cat(a), torch.cat(b, dim=1), 1.0, 0.0)]
