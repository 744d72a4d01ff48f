# SPDX-License-Identifier: Apache-2.0
"""q/k/v, o and a gated MLP as autograd functions of library products, fused by hand.

The schedule of Unsloth's kernels: one function for q, k and v and one for the MLP, products added
into one output, the activation's product made again in backward. No dropout, no bias on adapters.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# weight, bias, lora_A, lora_B
Projection = tuple[Tensor, "Tensor | None", Tensor, Tensor]


def projections(x: Tensor, of: Sequence[Projection], scaling: float) -> tuple[Tensor, ...]:
    """Return the outputs of several projections of one x."""
    return _Projections.apply(x, scaling, *(t for projection in of for t in projection))


def mlp(x: Tensor, of: Sequence[Projection], scaling: float) -> Tensor:
    """Return down(silu(gate(x)) · up(x)) for projections gate, up and down."""
    return _MLP.apply(x, scaling, *(t for projection in of for t in projection))


def _forward(x: Tensor, projection: Projection, c: float) -> Tensor:
    w, bias, a, b = projection
    return F.linear(x, w, bias).addmm_(x @ a.t(), b.t(), alpha=c)


def _backward(
    dy: Tensor, x: Tensor, projection: Projection, c: float, dx: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, to which an earlier one is added, da and db."""
    w, _, a, b = projection
    dx = dy @ w if dx is None else dx.addmm_(dy, w)
    ds = dy @ b
    dx.addmm_(ds, a, alpha=c)
    return dx, (ds.t() @ x).mul_(c), (dy.t() @ (x @ a.t())).mul_(c)


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, c, *flat):
        ctx.save_for_backward(x, *flat)
        ctx.c = c
        return tuple(_forward(x, flat[i : i + 4], c) for i in range(0, len(flat), 4))

    @staticmethod
    def backward(ctx, *dys):
        x, *flat = ctx.saved_tensors
        dx, grads = None, []
        for i, dy in enumerate(dys):
            dx, da, db = _backward(dy, x, flat[4 * i : 4 * i + 4], ctx.c, dx)
            grads += [None, None, da, db]
        return dx, None, *grads


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, c, *flat):
        gate, up, down = (flat[i : i + 4] for i in (0, 4, 8))
        g, u = _forward(x, gate, c), _forward(x, up, c)
        ctx.save_for_backward(x, g, u, *flat)
        ctx.c = c
        return _forward(F.silu(g).mul_(u), down, c)

    @staticmethod
    def backward(ctx, dy):
        x, g, u, *flat = ctx.saved_tensors
        gate, up, down = (flat[i : i + 4] for i in (0, 4, 8))
        act = F.silu(g)
        dh, da_down, db_down = _backward(dy, act * u, down, ctx.c, None)
        du = act.mul_(dh)
        dg = torch.ops.aten.silu_backward(dh.mul_(u), g)
        dx, da_up, db_up = _backward(du, x, up, ctx.c, None)
        dx, da_gate, db_gate = _backward(dg, x, gate, ctx.c, dx)
        pairs = ((da_gate, db_gate), (da_up, db_up), (da_down, db_down))
        return dx, None, *(grad for pair in pairs for grad in (None, None, *pair))
