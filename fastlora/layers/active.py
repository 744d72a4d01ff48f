# SPDX-License-Identifier: Apache-2.0
"""What a layer's active adapters are to the operator: they add up, for all rows or for some."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastlora.functional import add_low_rank, checked, run_checked
from fastlora.layers.dora import scale_of
from fastlora.operator.operands import Projection, with_scaling
from fastlora.operator.weights import Opaque

# lora_A [R, K], lora_B [N, R], scaling, the dropout's probability: 0 where none is drawn now; the
# rows of x, all leading dimensions flattened, that it is for; and the module of DoRA's magnitude.
Adapter = tuple[Tensor, Tensor, "float | Tensor", float, slice, "nn.Module | None"]
ALL = slice(None)
# Weight [N, K], bias [N] and the active adapters.
Layer = tuple[Tensor, "Tensor | None", Sequence[Adapter]]


def lora_sum(
    x: Tensor, weight: Tensor | Opaque, bias: Tensor | None, adapters: Sequence[Adapter]
) -> Tensor:
    """Return ``x Wᵀ + bias + Σ scaling · dropout(x) Aᵀ Bᵀ`` over adapters.

    Shapes, dtypes and errors as for `lora_linear`; each adapter drops its own elements of x.
    """
    if type(weight) is Opaque:
        y = weight.layer(x)
        y = y if bias is None else y + bias
        return add_low_rank(y, x, [_projection(a) for a in stacked(weight.dtype, adapters)])
    ready = checked(x, projections_of([(weight, bias, adapters)]), "")
    return run_checked(*ready, training=True)[0]


def projections_of(layers: Sequence[Layer | None]) -> list[Projection]:
    """Return layers as projections, followed by adapters beside the first; TypeError for None."""
    found = []
    for weight, bias, adapters in layers:
        several = stacked(weight.dtype, adapters)
        if several and several[0][4] == ALL:
            (a, b, scaling, p, _, magnitude), *several = several
            scale = magnitude and scale_of(weight, a, b, scaling, magnitude)
            found.append(Projection(weight, a, b, bias, scaling, p, scale))
        else:
            found.append(Projection(weight, bias=bias))
        found += map(_projection, several)
    return found


def _projection(adapter: Adapter) -> Projection:
    a, b, scaling, p, rows, _ = adapter
    return Projection(rows, a, b, None, scaling, p)


def stacked(base: torch.dtype, adapters: Sequence[Adapter]) -> Sequence[Adapter]:
    """Return one adapter of the ranks' sum that adds what ``adapters`` do, where it can.

    It cannot where one drops, or is for some of the rows.
    """
    if len(adapters) < 2 or any(p or rows != ALL for *_, p, rows, _ in adapters):
        return adapters
    dtype = base if all(a.dtype == base for a, *_ in adapters) else torch.float32
    scaled = [with_scaling(a.to(dtype), b.to(dtype), scaling) for a, b, scaling, *_ in adapters]
    a, b = zip(*scaled, strict=True)
    return [(torch.cat(a, dim=-2), torch.cat(b, dim=-1), 1.0, 0.0, ALL, None)]
