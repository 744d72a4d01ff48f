# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: modules of transformers that hold all experts' weights in one tensor.

Rows are sorted by expert, and each projection of all experts is one operator with segments, as are
their adapters. The module's own gate, biases and norm stay its own.
"""

import torch
from torch import Tensor, nn

from fastlora import functional
from fastlora.layers import gated
from fastlora.layers.active import Layer, projections_of
from fastlora.operator import op, plans
from fastlora.operator.steps import exactly


def routed(
    module: nn.Module, up: Layer, down: Layer, p: float, x: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Return what experts make of x [T, H]: those of ``index`` [T, k], times ``weights`` [T, k].

    The projections ``up`` (of gate and up where there is a gate) and ``down`` hold weights
    [E, N, K], biases [E, N] and adapters [E, R, K] and [E, N, R], which drop with probability p.
    """
    E, k = len(up[0]), index.shape[-1]
    experts, order = index.flatten().sort(stable=True)
    numbers = torch.arange(E + 1, device=x.device, dtype=experts.dtype)
    ends, back = torch.searchsorted(experts, numbers, out_int32=True), order.argsort()
    rows = _sorted(x.to(up[0].dtype), order, back)
    y = exactly(x.device, _experts, module, up, down, p, rows, ends)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    y = _sorted(y, back, order).unflatten(0, (len(x), k))
    return (y * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def _sorted(t: Tensor, order: Tensor, back: Tensor) -> Tensor:
    if op.transformed():
        return t[order // (len(order) // max(1, len(t)))]
    return _Sorted.apply(t, order, back)


class _Sorted(torch.autograd.Function):
    """Rows of x by expert, or those of y by token; each token may have several of the former.

    In another order of rows the gradient is a sum over neighbours, and none of scattered ones.
    """

    @staticmethod
    def forward(ctx, x, order, back):
        ctx.save_for_backward(order, back)
        ctx.rows = len(x)
        return x[order // (len(order) // max(1, len(x)))]

    @staticmethod
    def backward(ctx, dy):
        _, back = ctx.saved_tensors
        dx = dy[back]
        return dx.unflatten(0, (ctx.rows, -1)).sum(1) if len(dx) > ctx.rows else dx, None, None


def batched(module: nn.Module, up: Layer, down: Layer, p: float, x: Tensor) -> Tensor:
    """Return what experts make of x [E · T, H], T rows for each of them."""
    E = len(up[0])
    ends = torch.arange(E + 1, device=x.device, dtype=torch.int32) * (len(x) // E)
    return exactly(x.device, _experts, module, up, down, p, x.to(up[0].dtype), ends)


def _experts(
    module: nn.Module, up: Layer, down: Layer, p: float, x: Tensor, ends: Tensor
) -> Tensor:
    """Return what experts make of rows in the dtype of their weights, which autocast leaves alone.

    As transformers' own grouped products do: it would cast all experts.
    """
    (h,) = functional.run_checked(*_checked(x, up, p, ends), True, ends=ends)
    impl = "auto" if plans.FORCED == "auto" else plans.named("auto", x)
    plain = op.unobserved(h, *down[:2], *(t for a in down[2] for t in a[:2]))
    plain = plain and impl not in ("eager", "reference")
    activation = gated.split_activation(module) if plain else None
    if activation is None:
        ready = _checked(_inner(module, h), down, p, ends)
        return functional.run_checked(*ready, True, ends=ends)[0]
    gate, value = h.chunk(2, dim=-1)
    ready = _checked(gate.new_empty(1, down[0].shape[-1]), down, p, ends)
    _, last = functional.drawn(*ready, True, impl, ends)
    return gated.joined(gate, value, last, activation, impl)


def _inner(module: nn.Module, h: Tensor) -> Tensor:
    if hasattr(module, "has_gate"):
        return module._apply_gate(h) if module.has_gate else module.act_fn(h)
    gate, up = h.chunk(2, dim=-1)
    return up * module.act_fn(gate)


def _checked(x: Tensor, layer: Layer, p: float, ends: Tensor) -> tuple[Tensor, list]:
    x, projections = functional.checked(x, projections_of([layer]), "", ends)
    return x, [one._replace(dropout_p=p) for one in projections]
