# SPDX-License-Identifier: Apache-2.0
"""Segments: rows of x that meet another adapter each, in one product with the weight."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from acceptance import accept

import fastlora
from fastlora import Projection
from fastlora.operator.dropout import keep_mask, kept_scale
from fastlora.operator.weights import Quantised

# By how rows are cut: ends, ranks (None: no adapter), scalings, dropout; one has no rows.
CUTS = {
    "ragged": (
        [0, 5, 5, 12, 13, 30],
        [4, 2, None, 3, 8],
        [0.5, 2.0, 1.0, -0.7, 0.3],
        [0.3, 0.3, 0.5, 0.0, 0.6],
    ),
    # Neighbours of one kind go in one batch of products.
    "alike": ([0, 6, 12, 18, 24, 30], [4, 4, None, 4, 4], [0.5] * 5, [0.3] * 5),
}
ENDS = CUTS["ragged"][0]
K = 24
WIDTHS = (16, 8)
KERNELS = dict.fromkeys(("library", "triton"), torch.float32)  # which take no float64


def problem(dtype=torch.float64, adapter=None, widths=WIDTHS, p=False, cut="ragged", times=1):
    """Return x and projections whose adapters differ by segment."""
    _, ranks, scalings, dropout = CUTS[cut]
    x, projections = torch.randn(2, 15 * times, K).to(dtype).requires_grad_(), []
    for n in widths:
        each = [
            (None, None) if r is None else (torch.randn(r, K) / 5, torch.randn(n, r)) for r in ranks
        ]
        a, b = (
            [None if t is None else t.to(adapter or dtype).requires_grad_() for t in of]
            for of in zip(*each, strict=True)
        )
        weight, bias = torch.randn(n, K).to(dtype) / 5, torch.randn(n).to(dtype)
        drops = dropout if p else 0.0
        projections.append(Projection(weight, a, b, bias, scalings, drops))
    return x, projections


def trained(projections):
    return [t for one in projections for of in one[1:3] for t in of if t is not None]


def loop(x, projections, seeds=None, ends=ENDS):
    """Return the formula's outputs, segment by segment."""
    flat, ys = x.reshape(-1, K), []
    for i, (w, a, b, bias, c, p, _) in enumerate(projections):
        parts = []
        for g, (start, end) in enumerate(itertools.pairwise(ends)):
            rows = flat[start:end]
            y = F.linear(rows, w, bias)
            if a[g] is not None:
                x_hat = rows.to(a[g].dtype)
                if seeds and p[g]:
                    keep = keep_mask(seeds[i], range(start, end), K, p[g])
                    x_hat = x_hat * keep * kept_scale(p[g])
                y = (y + (x_hat @ a[g].t() @ b[g].t() * c[g]).to(y.dtype)).to(y.dtype)
            parts.append(y)
        ys.append(torch.cat(parts).view(*x.shape[:-1], -1))
    return ys


def ways(*impls):
    """Each way of cutting by each implementation; the kernels, which see no difference, by one."""
    each = [*itertools.product(CUTS, impls), *itertools.product(["ragged"], KERNELS)]
    return pytest.mark.parametrize(("cut", "impl"), each)


def close(found, right, impl):
    near = {"rtol": 1e-4, "atol": 1e-4} if impl in KERNELS else {}
    torch.testing.assert_close(found, right, **near)


def results(ys, x, projections):
    total = sum((y.double() * torch.linspace(-1, 2, y.numel()).view_as(y)).sum() for y in ys)
    return [*ys, *torch.autograd.grad(total, [x, *trained(projections)])]


@pytest.mark.parametrize("widths", [(16,), WIDTHS])
@ways("auto", "blocks", "eager", "reference")
def test_as_a_loop(cut, impl, widths):
    x, projections = problem(KERNELS.get(impl, torch.float64), widths=widths, cut=cut)
    ends = CUTS[cut][0]
    right = results(loop(x, projections, ends=ends), x, projections)
    ys = fastlora.lora_linears(x, projections, segments=ends, impl=impl)
    found = results(ys, x, projections)
    close(found, right, impl)
    assert not found[len(ys) + 2].any() or cut != "ragged"  # a's of the segment without rows


@ways("blocks", "eager")
def test_what_a_row_drops_depends_on_its_number(cut, impl, monkeypatch):
    x, projections = problem(KERNELS.get(impl, torch.float64), p=True, cut=cut)
    ends = CUTS[cut][0]
    seeds, made = [torch.tensor([7]), torch.tensor([8])], []
    monkeypatch.setattr(
        "fastlora.functional.new_seed", lambda _: made.append(0) or seeds[len(made) - 1]
    )
    ys = fastlora.lora_linears(x, projections, segments=ends, training=True, impl=impl)
    found, right = (
        results(ys, x, projections),
        results(loop(x, projections, seeds, ends), x, projections),
    )
    assert len(made) == len(projections)
    close(found, right, impl)


@pytest.mark.parametrize(
    ("dtype", "adapter"), [(torch.bfloat16, torch.float32), (torch.bfloat16, None)]
)
@ways("auto")
def test_acceptance_rule(cut, impl, dtype, adapter):
    x, projections = problem(dtype, adapter, cut=cut, times=4)
    ends = [4 * end for end in CUTS[cut][0]]
    ys = fastlora.lora_linears(x, projections, segments=ends, impl=impl)
    found, plain = (
        results(ys, x, projections),
        results(loop(x, projections, ends=ends), x, projections),
    )
    wide = x.detach().double().requires_grad_()

    def doubled(t):
        return None if t is None else t.detach().double().requires_grad_()

    exact = [
        Projection(w.double(), list(map(doubled, a)), list(map(doubled, b)), bias.double(), c, p)
        for w, a, b, bias, c, p, _ in projections
    ]
    exact = results(loop(wide, exact, ends=ends), wide, exact)
    for i, values in enumerate(zip(found, plain, exact, strict=True)):
        accept(str(i), *values)


def test_stacked_factors_and_one_adapter_for_several_segments():
    x = torch.randn(6, K).requires_grad_()
    weight, a, b = torch.randn(8, K), torch.randn(3, 2, K), torch.randn(3, 8, 2)
    a, b = a.requires_grad_(), b.requires_grad_()
    (y,) = fastlora.lora_linears(x, [Projection(weight, a, b)], segments=[0, 1, 4, 6])
    of = torch.tensor([0, 1, 1, 1, 2, 2])
    right = F.linear(x, weight) + torch.einsum("mk,mrk,mnr->mn", x, a[of], b[of])
    torch.testing.assert_close(y, right)
    grads = torch.autograd.grad(y.square().sum(), [x, a, b])
    expected = torch.autograd.grad(right.square().sum(), [x, a, b])
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)
    again = Projection(weight, [a[0], None, a[0]], [b[0], None, b[0]])
    (y,) = fastlora.lora_linears(x, [again], segments=[0, 1, 4, 6])
    whole = F.linear(x[[0, 4, 5]], weight) + x[[0, 4, 5]] @ a[0].t() @ b[0].t()
    torch.testing.assert_close(y[[0, 4, 5]], whole)
    grads = torch.autograd.grad(y.square().sum(), [a, b])
    expected = torch.autograd.grad(whole.square().sum(), [a, b])
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("cut", "ends"), [("ragged", [0, 1, 3, 4, 6, 8]), ("alike", [*range(6)])])
def test_second_derivatives_and_transforms(cut, ends):
    x, projections = problem(widths=(4,), cut=cut)
    flat = x.detach().reshape(-1, K)[: ends[-1]].clone().requires_grad_()

    def layer(x, *factors):
        half = len(factors) // 2
        one = projections[0]._replace(
            lora_A=[*factors[:2], None, *factors[2:half]],
            lora_B=[*factors[half : half + 2], None, *factors[half + 2 :]],
        )
        return fastlora.lora_linears(x, [one], segments=ends)[0]

    inputs = flat, *trained(projections)
    assert torch.autograd.gradgradcheck(layer, inputs)
    y = layer(*inputs)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, y)
    (grads,), tangent = torch.func.vjp(layer, *inputs)[1](y)[:1], torch.randn_like(flat)
    torch.testing.assert_close(grads, torch.autograd.grad(y, flat, y)[0])
    found = torch.func.jvp(lambda x: layer(x, *inputs[1:]), (flat,), (tangent,))[1]
    torch.testing.assert_close((found * y).sum(), (grads * tangent).sum())


WRONG = [
    ([0, 5, 29], r"segments must rise from 0 to 30, the rows of x \(2, 15, 24\), got \[0, 5, 29\]"),
    ([1, 30], "segments must rise from 0 to 30"),
    ([0, 20, 10, 30], "segments must rise from 0 to 30"),
    ([0], "segments must rise from 0 to 30"),
    ([0, 5, 30], r"projections\[0\]: lora_A must be of 2, got 5"),
]


@pytest.mark.parametrize(("ends", "message"), WRONG)
def test_wrong_segments(ends, message):
    x, projections = problem()
    with pytest.raises(ValueError, match=message):
        fastlora.lora_linears(x, projections, segments=ends)


def test_a_wrong_adapter_is_named():
    x, projections = problem()
    projections[1].lora_B[3] = torch.zeros(8, 5, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"projections\[1\], rows 12 to 13: lora_B must be \[8, 3\]"
    ):
        fastlora.lora_linears(x, projections, segments=ENDS)


@pytest.mark.parametrize("impl", ["blocks", "library"])
def test_quantised_and_opaque_bases(impl, monkeypatch):
    x, projections = problem(torch.float32)
    right = results(loop(x, projections), x, projections)
    kept = [Quantised(one.weight, one.weight.shape, x.dtype, lambda w: w) for one in projections]
    given = [one._replace(weight=w) for one, w in zip(projections, kept, strict=True)]
    close(
        results(fastlora.lora_linears(x, given, segments=ENDS, impl=impl), x, projections),
        right,
        "library",
    )
    monkeypatch.setattr("fastlora.operator.plans.FORCED", impl)
    ys = []
    for one in projections:
        rows = itertools.pairwise(ENDS)
        each = zip(rows, *one[1:3], one.scaling, strict=True)
        adapters = [Projection(slice(*of), a, b, None, c) for of, a, b, c in each if a is not None]
        y = F.linear(x, one.weight, one.bias)
        ys.append(fastlora.functional.add_low_rank(y, x, adapters))
    close(results(ys, x, projections), right, "library")


def test_second_derivatives_where_kernels_run():
    x, projections = problem(torch.float32, widths=(4,))
    found = []
    for impl in ("blocks", "library"):
        (y,) = fastlora.lora_linears(x, projections, segments=ENDS, impl=impl)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [x, *trained(projections)]))
    close(*found, "library")
