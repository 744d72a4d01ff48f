# SPDX-License-Identifier: Apache-2.0
"""The ``eager`` implementation: one formula of PyTorch's operations, which PyTorch differentiates.

Nothing of it runs in Python in backward, so that on a CPU it is the fastest for few tokens.
`torch.func` and forward-mode AD go through it, and so do the gradients of the others where they
are to be differentiated or are several at once. It keeps for backward what PyTorch does: with
dropout the mask and what it leaves of x, and x in float32 where the adapters are.

``reference`` is the oracle that every implementation is compared with: nothing in it is fast.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.operator.dropout import keep_mask, kept_ones, kept_scale
from fastlora.operator.operands import Each, Operands, Projections, Segments


def outputs(x: Tensor, projections: Projections, observed: bool, naive=False) -> list[Tensor]:
    """Return y [M, N] of each projection of x [M, K]; ``observed`` as for `output`."""
    ys: list[Tensor] = []
    for one in projections:
        if type(one.w) is slice:
            ys[-1] = _joined(ys[-1], x, one)
        elif type(one.scaling) is Segments:
            if one.scale is None:
                y = _frozen(x, *one[:7])
            else:
                y = reference(x, one.w, None, None, one.bias, scale=one.scale)
            ys.append(y if one.a is None else _joined(y, x, one._replace(w=slice(None))))
        elif naive or one.scale is not None:
            ys.append(reference(x, *one))
        else:
            ys.append(one.bias if one.w is None else output(x, one, observed))
    return ys


def _frozen(x: Tensor, w: Tensor, a, b, bias: Tensor | None, seed, of: Segments, p) -> Tensor:
    """Return y [M, N] without an adapter; weights may be stacked, each for a segment of rows."""
    if w.dim() == 2:
        return F.linear(x, w, bias)
    biases = [None] * len(w) if bias is None else bias
    return torch.cat([F.linear(*one) for one in zip(x.split(of.sizes()), w, biases, strict=True)])


def _joined(y: Tensor | None, x: Tensor, one: Operands) -> Tensor:
    """Return y [M, N] with one more adapter for some of its rows; no y is zeros, for gradients."""
    rows, (_, a, b, _, seed, scaling, p, _) = one.w, one
    y = x.new_zeros(x.shape[0], b.shape[0]) if y is None else y
    begin, end, _ = rows.indices(x.shape[0])
    part = y[rows] + low_rank(x[rows], a, b, scaling, seed, p, begin).to(y.dtype)
    return torch.slice_scatter(y, part, 0, begin, end)


def output(x: Tensor, projection: Operands, observed: bool) -> Tensor:
    """Return y [M, N] of a projection of x [M, K].

    ``observed``: a compiler or a transform looks on, which memory that is written twice confuses.
    """
    w, a, b, bias, seed, scaling, p, _ = projection
    if a is None:
        return F.linear(x, w, bias)
    x_hat, narrow = x, a.dtype == torch.float16
    if seed is not None:
        (M, K), kept = x.shape, kept_scale(p)
        if observed:
            x_hat = x * keep_mask(seed, range(M), K, p).to(x.dtype)
        else:
            x_hat = x * next(kept_ones(seed, x.shape, p, x.dtype, M))
        x_hat, scaling = (x_hat * kept, scaling) if narrow else (x_hat, scaling * kept)
    s = F.linear(x_hat.to(a.dtype), a)
    if narrow:  # as written down: another order might overflow where this does not
        return torch.add(F.linear(x, w, bias), F.linear(s, b), alpha=scaling)
    if a.dtype == x.dtype:
        add = torch.addmm if observed else Tensor.addmm_
        return add(F.linear(x, w, bias), s, b.t(), alpha=scaling)
    added = F.linear(s * scaling, b)
    if bias is not None:
        added = added + bias
    return torch.addmm(added.to(x.dtype), x, w.t())


def gradients(
    function: Callable, dys: Each, x: Tensor, projections: Projections, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return gradients of the ys that ``function`` makes of x and projections, by PyTorch.

    They are differentiable again where grad mode is on. ``needs``: a flag for x, then for w, a, b,
    bias and scale of each projection; the result has a gradient or None for each.
    """
    inputs = [x]
    for w, a, b, bias, *_, scale in projections:
        inputs += None if type(w) is slice else w, a, b, bias, scale
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # An alias for each: x may depend on the others, and two of them may be one tensor.
        x, *flat = aliases = [t if t is None else t.view_as(t) for t in inputs]
        wanted = [i for i, t in enumerate(aliases) if needs[i] and t is not None]
        for i in wanted:
            if not aliases[i].requires_grad:  # what a hook has unpacked
                aliases[i].requires_grad_()
        made = []
        for i, p in enumerate(projections):
            w, *of, scale = flat[5 * i : 5 * i + 5]
            made.append(Operands(p.w if type(p.w) is slice else w, *of, *p[4:7], scale))
        ys = function(x, made)
    pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if dy is not None and y.requires_grad]
    found: list[Tensor | None] = [None] * len(inputs)
    if wanted and pairs:
        ys, dys = zip(*pairs, strict=True)
        options = {"create_graph": create_graph, "allow_unused": True}
        grads = torch.autograd.grad(ys, [aliases[i] for i in wanted], dys, **options)
        for i, grad in zip(wanted, grads, strict=True):
            found[i] = grad
    return found


def reference(
    x, w, a, b, bias=None, seed=None, scaling=1.0, p: float = 0.0, scale: Tensor | None = None
) -> Tensor:
    """Return ``x wᵀ + bias + scaling · dropout(x) aᵀ bᵀ`` [..., N] for x [..., K], as PEFT does.

    What ``scale`` changes in the frozen product is added to it: nothing, where it is 1.
    """
    if scale is None:
        y = F.linear(x, w, bias)
    else:
        plus = None if bias is None else bias.detach()
        y = inner = F.linear(x, w, plus)
        if seed is not None:
            inner = F.linear(_dropped(x, seed, p), w)
        elif bias is not None:
            inner = y - plus
        y = y + (scale.to(torch.promote_types(scale.dtype, torch.float32)) - 1.0) * inner
        if bias is not None:  # which has no part in what is scaled
            y = y + (bias - plus)
    return (y if a is None else y + low_rank(x, a, b, scaling, seed, p)).to(x.dtype)


def low_rank(
    x: Tensor, a: Tensor, b: Tensor, scaling, seed: Tensor | None, p: float, begin: int = 0
) -> Tensor:
    """Return ``scaling · dropout(x) aᵀ bᵀ`` [..., N] in the adapters' dtype.

    Dropout's rows begin with number ``begin``.
    """
    if type(scaling) is Segments:
        numbers = (of if len(of) == len(a) else of * len(a) for of in scaling[1:])
        parts, begin = [], 0
        each = zip(x.split(scaling.sizes()), a, b, *numbers, strict=True)
        for x_g, a_g, b_g, scaling_g, p_g in each:
            parts.append(low_rank(x_g, a_g, b_g, scaling_g, seed if p_g else None, p_g, begin))
            begin += len(x_g)
        return torch.cat(parts)
    x_hat = x.to(a.dtype) if seed is None else _dropped(x.to(a.dtype), seed, p, begin)
    if a.dim() > 2:  # stacked: each for as many rows
        return ((x_hat.unflatten(0, (len(a), -1)) @ a.mT @ b.mT) * scaling).flatten(0, 1)
    return F.linear(F.linear(x_hat, a), b) * scaling


def _dropped(x: Tensor, seed: Tensor, p: float, begin: int = 0) -> Tensor:
    rows = range(begin, begin + x.shape[:-1].numel())
    keep = keep_mask(seed, rows, x.shape[-1], p)
    return x * keep.view(x.shape).to(x.dtype) * kept_scale(p)
