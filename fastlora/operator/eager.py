# SPDX-License-Identifier: Apache-2.0
"""The ``eager`` implementation: one formula of PyTorch's operations, which PyTorch differentiates.

Nothing of it runs in Python in backward, so that on a CPU it is the fastest for few tokens.
`torch.func` and forward-mode AD go through it, and so do the gradients of the others where they
are to be differentiated or are several at once. It keeps for backward what PyTorch does: with
dropout the mask and what it leaves of x, and x in float32 where the adapters are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.operator.dropout import KeptOnes, keep_mask, kept_scale
from fastlora.operator.operands import Operands


def outputs(x: Tensor, projections: Sequence[Operands], observed: bool) -> list[Tensor]:
    """Return y [M, N] of each projection of x [M, K].

    ``observed``: a compiler or a transform looks on, which memory that is written twice confuses.
    """
    return [_output(x, projection, observed) for projection in projections]


def _output(x: Tensor, projection: Operands, observed: bool) -> Tensor:
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


def gradients(
    function: Callable[[Tensor, list[Operands]], Sequence[Tensor]],
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Operands],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return gradients of what ``function`` makes of x and projections, by PyTorch's operations.

    They are differentiable again where grad mode is on. ``needs``: a flag for x, then for w, a, b
    and bias of each projection; the result has a gradient or None for each.
    """
    inputs = [x, *(t for w, a, b, bias, *_ in projections for t in (w, a, b, bias))]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # An alias for each: x may depend on the others, and two of them may be one tensor.
        x, *flat = aliases = [t if t is None else t.view_as(t) for t in inputs]
        for t, need in zip(aliases, needs, strict=True):
            if need and not t.requires_grad:  # what a hook has unpacked
                t.requires_grad_()
        made = [Operands(*flat[4 * i : 4 * i + 4], *p[4:]) for i, p in enumerate(projections)]
        ys = function(x, made)
    pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if dy is not None]
    wanted = [t for t, need in zip(aliases, needs, strict=True) if need and t is not None]
    if not (wanted and pairs):
        return [None] * len(needs)
    ys, dys = zip(*pairs, strict=True)
    options = {"create_graph": create_graph, "allow_unused": True}
    found = iter(torch.autograd.grad(ys, wanted, dys, **options))
    return [
        next(found) if need and t is not None else None
        for t, need in zip(aliases, needs, strict=True)
    ]
