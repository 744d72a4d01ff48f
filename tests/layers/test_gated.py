# SPDX-License-Identifier: Apache-2.0
"""The operator of a gated MLP: values and gradients by the acceptance rule, and what it keeps."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from acceptance import KINDS, accept
from torch.autograd import gradcheck, gradgradcheck

from fastlora.layers import gated
from fastlora.operator.eager import reference
from fastlora.operator.operands import Operands

PLAIN = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def operands(ranks=(3, 2, 4), dtype=torch.float32, adapter=None, p=0.0, M=120, K=64, size=96, N=48):
    """Return x, dy and the projections gate, up and down; a rank of 0 is no adapter."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0, to=dtype):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(to)

    made = []
    for i, (r, (n, k)) in enumerate(zip(ranks, ((size, K), (size, K), (N, size)), strict=True)):
        a = draw(r, k, scale=k**-0.5, to=adapter or dtype) if r else None
        b = draw(n, r, scale=r**-0.5, to=adapter or dtype) if r else None
        bias = draw(n) if i != 1 else None
        seed = torch.tensor([7 + i]) if p and r else None
        made.append(Operands(draw(n, k, scale=k**-0.5), a, b, bias, seed, 0.8, p))
    return draw(M, K), draw(M, N), made


def formula(x, projections, act):
    """The plain torch formula, in the dtypes that are given."""
    gate, up, down = projections
    h = PLAIN[act](reference(x, *gate)) * reference(x, *up)
    return reference(h, *down)


def trained(x, projections):
    return [x, *(t for p in projections for t in (p.a, p.b) if t is not None)]


def all_of(function, x, dy, projections, act):
    """Return y and every gradient."""
    x = x.clone().requires_grad_()
    for i, p in enumerate(projections):
        if p.a is not None:
            a, b = (t.clone().requires_grad_() for t in (p.a, p.b))
            projections = [*projections[:i], p._replace(a=a, b=b), *projections[i + 1 :]]
    y = function(x, projections, act)
    return [y.detach(), *torch.autograd.grad(y, trained(x, projections), dy)]


@pytest.mark.parametrize("act", PLAIN)
@pytest.mark.parametrize("ranks", [(3, 2, 4), (3, 0, 0), (0, 0, 4), (16, 16, 16)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_acceptance_rule(act, ranks, kind, p):
    sizes = {"M": 200, "K": 140, "size": 190, "N": 150}
    x, dy, projections = operands(ranks, *KINDS[kind], p=p, **sizes)
    wide = [
        Operands(*(t.double() if getattr(t, "is_floating_point", bool)() else t for t in each))
        for each in projections
    ]
    found = all_of(gated.run, x, dy, projections, act)
    plain = all_of(formula, x, dy, projections, act)
    exact = all_of(formula, x.double(), dy.double(), wide, act)
    for i, (mine, theirs, right) in enumerate(zip(found, plain, exact, strict=True)):
        accept(f"{act} {i}", mine, theirs, right)


def twice(x, projections, act):
    return gated.run(gated.run(x, projections, act), projections, act)


def tied(x, projections, act):
    """gate and up have one A."""
    gate, up, down = projections
    return gated.run(x, [gate, up._replace(a=gate.a), down], act)


def of_itself(x, projections, act):
    """x, and the weight of down, are made from parameters of the same operator."""
    gate, up, down = projections
    x, w = x * gate.a.sum(), down.w + up.a.sum()
    return gated.run(x, [gate, up, down._replace(w=w)], act)


@pytest.mark.parametrize("act", PLAIN)
@pytest.mark.parametrize("function", [gated.run, twice, tied, of_itself])
def test_first_and_second_derivatives(function, act):
    """Also of trained weights and biases, and where inputs depend on each other."""
    x, _, projections = operands((2, 2, 1), torch.float64, p=0.5, M=2, K=3, size=4, N=3)
    inputs = [*trained(x, projections), projections[2].w, projections[0].bias]
    for t in inputs:
        t.requires_grad_()

    def value(*given):
        return function(x, projections, act)

    dy = torch.randn(2, 3, dtype=torch.float64)
    plain, differentiable = (
        torch.autograd.grad(value(), inputs, dy, create_graph=flag, materialize_grads=True)
        for flag in (False, True)
    )
    torch.testing.assert_close(differentiable, plain, rtol=1e-12, atol=1e-12)
    assert gradcheck(value, inputs)
    assert gradgradcheck(value, inputs)


def test_hooks_see_each_gradient_once():
    """Also where gradients are differentiated."""
    x, dy, projections = operands()
    seen = []
    for t in trained(x, projections):
        t.requires_grad_().register_hook(seen.append)
    y = gated.run(x, projections, "silu")
    grads = torch.autograd.grad(y, trained(x, projections), dy, create_graph=True)
    assert sorted(map(id, seen)) == sorted(map(id, grads))


def test_only_what_is_asked_for():
    """Every combination of trained factors: the same gradients, and none beside."""
    x, dy, projections = operands()
    full = all_of(gated.run, x, dy, projections, "silu")[1:]
    names = trained(x, projections)
    for asked in itertools.product((False, True), repeat=len(names)):
        for t, flag in zip(names, asked, strict=True):
            t.requires_grad_(flag)
        y = gated.run(x, projections, "silu")
        assert y.requires_grad == any(asked)
        if any(asked):
            expected = [grad for grad, flag in zip(full, asked, strict=True) if flag]
            found = torch.autograd.grad(y, [t for t in names if t.requires_grad], dy)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_kept_for_backward():
    """x, gate(x), up(x) and the small s: nothing else of their width."""
    x, _, projections = operands()
    for t in trained(x, projections):
        t.requires_grad_()
    held = {t.data_ptr() for p in projections for t in p if isinstance(t, torch.Tensor)}
    kept = {}

    def pack(t):
        if t.data_ptr() not in held:
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gated.run(x, projections, "silu")
    assert sum(kept.values()) == 120 * (64 + 2 * 96 + 3 + 2 + 4)


@pytest.mark.parametrize("act", PLAIN)
def test_the_kernels_of_the_product(act, monkeypatch):
    """The same results where the elementwise part is a Triton kernel."""
    import fastlora_kernels

    asked = []
    monkeypatch.setattr(gated, "_kernels", lambda *t: asked.append(t) or fastlora_kernels)
    x, dy, projections = operands()
    found, expected = (all_of(way, x, dy, projections, act) for way in (gated.run, formula))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(asked) == 2  # in forward, and in backward
