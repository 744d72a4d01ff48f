# SPDX-License-Identifier: Apache-2.0
"""A projection's scale: DoRA's formula, with dropout too, whatever computes the rest."""

import pytest
import torch
import torch.nn.functional as F
from acceptance import accept
from torch.library import opcheck

from fastlora import Projection, lora_linears
from fastlora.operator import scaled
from fastlora.operator.dropout import keep_mask

OP = torch.ops.fastlora.lora_linears
M, K, R = 37, 24, 3
SEED = torch.tensor([7])
IMPLS = {"auto": torch.float64, "blocks": torch.float64, "eager": torch.float64}
IMPLS |= {"library": torch.float32, "triton": torch.float32}
CLOSE = {torch.float64: {}, torch.float32: {"rtol": 2e-4, "atol": 2e-4}}
each_p = pytest.mark.parametrize("p", [0.0, 0.4])


@pytest.fixture(autouse=True)
def one_seed(monkeypatch):
    monkeypatch.setattr("fastlora.functional.new_seed", lambda _: SEED)
    monkeypatch.setattr(scaled, "ROWS", 8)  # several pieces of a mask
    monkeypatch.setattr(scaled, "ELEMENTS", 0)


def problem(dtype=torch.float64, p=0.0, adapter=None, bias=True, seed=0, rows=M):
    """Return x and three projections: two with a scale, one of them without an adapter."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype, plus=0.0):
        t = torch.randn(shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5
        return (t + plus).to(dtype).requires_grad_()

    adapter, found = adapter or dtype, []
    for i, n in enumerate((16, 8, 24)):
        a, b = draw(R, K, dtype=adapter), draw(n, R, dtype=adapter)
        factors = (None, None) if i == 1 else (a, b)
        scale = None if i == 2 else draw(n, plus=1.5, dtype=adapter)
        plus = draw(n).detach() if bias and i < 2 else None
        found.append(Projection(draw(n, K).detach(), *factors, plus, 0.5 + i, p, scale))
    return draw(rows, K), found


def formula(x, one, training=True):
    """Return DoRA's as PEFT computes it."""
    w, a, b, bias, scaling, p, scale = one
    y, x_hat = F.linear(x, w, bias), x
    inner = y if bias is None else y - bias
    if training and p and a is not None:
        x_hat = x * keep_mask(SEED, range(len(x)), K, p) / (1 - p)
        inner = F.linear(x_hat, w)
    if scale is not None:
        y = y + (scale - 1) * inner
    if a is None:
        return y.to(x.dtype)
    g = 1 if scale is None else scale
    return (y + g * F.linear(F.linear(x_hat.to(a.dtype), a), b) * scaling).to(x.dtype)


def leaves(x, projections):
    return [x, *(t for one in projections for t in one if getattr(t, "requires_grad", False))]


def results(ys, wanted):
    total = sum((y.double() * torch.linspace(-1, 2, y.numel()).view_as(y)).sum() for y in ys)
    return [*ys, *torch.autograd.grad(total, wanted, allow_unused=True)]


@each_p
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_as_the_formula(impl, adapted, p):
    """Kernels have steps for projections that have adapters."""
    dtype = IMPLS[impl]
    x, projections = problem(dtype, p)
    projections = projections[::2] if adapted else projections
    ys = lora_linears(x.unflatten(0, (1, -1)), projections, training=True, impl=impl)
    found = results([y[0] for y in ys], leaves(x, projections))
    right = results([formula(x, one) for one in projections], leaves(x, projections))
    torch.testing.assert_close(found, right, **CLOSE[dtype])
    with torch.no_grad():
        ys = lora_linears(x, projections, training=True, impl=impl)
    torch.testing.assert_close(ys, found[: len(ys)], **CLOSE[dtype])


@each_p
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("impl", ["auto", "blocks", "library", "triton"])
def test_acceptance_rule(impl, adapter, adapted, p):
    x, projections = problem(torch.bfloat16, p, adapter, rows=300)
    projections = projections[::2] if adapted else projections
    wanted = leaves(x, projections)
    wide = [t.detach().double().requires_grad_() for t in wanted]
    of = dict(zip(map(id, wanted), wide, strict=True))
    exact = [
        Projection(*(of.get(id(t), t.double()) if hasattr(t, "dtype") else t for t in one))
        for one in projections
    ]
    found = results(lora_linears(x, projections, training=True, impl=impl), wanted)
    plain = results([formula(x, one) for one in projections], wanted)
    right = results([formula(wide[0], one) for one in exact], wide)
    for i, values in enumerate(zip(found, plain, right, strict=True)):
        accept(str(i), *values)


@each_p
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("impl", ["auto", "blocks", "eager", "library", "triton", "reference"])
def test_a_scale_of_one_changes_no_bit(impl, bias, p):
    """Also where a second rounding would: of what has a bias."""
    x, (one, *_) = problem(torch.bfloat16, p, torch.float32, bias, rows=300)
    one = one._replace(lora_B=torch.zeros_like(one.lora_B), scale=torch.ones_like(one.scale))
    (y,) = lora_linears(x, [one], training=True, impl=impl)
    frozen = one._replace(lora_A=None, lora_B=None, scale=None)
    (expected,) = lora_linears(x, [frozen], impl=impl)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_adapters_keep_their_digits(dtype):
    """Their gradients are of dy as it comes, not as it is scaled and rounded."""
    x, (one, *_) = problem(dtype, adapter=torch.float32, rows=300)
    wanted, dy = [one.lora_A, one.lora_B], torch.randn(300, 16).to(dtype)
    (y,) = lora_linears(x, [one], impl="blocks")
    wide = [t if isinstance(t, float) else t.detach().double().requires_grad_() for t in one]
    right = torch.autograd.grad(formula(x.double(), wide), wide[1:3], dy.double())
    found = torch.autograd.grad(y, wanted, dy)
    for mine, theirs in zip(found, right, strict=True):
        assert (mine - theirs).norm() < 1e-6 * theirs.norm()


@each_p
@pytest.mark.parametrize("impl", ["blocks", "eager"])
def test_second_derivatives_and_transforms(impl, p):
    x, (one, *_) = problem(p=p, rows=3)
    inputs = leaves(x, [one])

    def layer(x, a, b, scale):
        of = one._replace(lora_A=a, lora_B=b, scale=scale)
        return lora_linears(x, [of], training=True, impl=impl)[0]

    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)
    right = formula(x, one)
    y, back = torch.func.vjp(layer, *inputs)
    torch.testing.assert_close(y, right)
    torch.testing.assert_close(back(y), torch.autograd.grad(right, inputs, right))


@each_p
@pytest.mark.parametrize("impl", ["blocks", "eager"])
def test_trained_weights_and_biases(impl, p):
    x, projections = problem(p=p)
    trained = [
        t.requires_grad_() for one in projections for t in (one.weight, one.bias) if t is not None
    ]
    found = results(lora_linears(x, projections, training=True, impl=impl), [x, *trained])
    right = results([formula(x, one) for one in projections], [x, *trained])
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("impl", IMPLS)
def test_segments(impl):
    """Adapters of rows each under one scale, which the weight has."""
    x, (one, *_) = problem(IMPLS[impl])
    ends, ones = [0, 10, 10, M], []
    for g in range(3):
        _, (of, *_) = problem(IMPLS[impl], seed=g + 1)
        ones.append(one._replace(lora_A=of.lora_A, lora_B=of.lora_B, scaling=0.3 + g))
    a, b, scalings = zip(*((of.lora_A, of.lora_B, of.scaling) for of in ones), strict=True)
    ys = lora_linears(
        x, [one._replace(lora_A=a, lora_B=b, scaling=scalings)], segments=ends, impl=impl
    )
    right = torch.cat([formula(x[s:e], of) for of, s, e in zip(ones, ends, ends[1:], strict=False)])
    wanted = [x, one.scale, *a, *b]
    torch.testing.assert_close(results(ys, wanted), results([right], wanted), **CLOSE[IMPLS[impl]])


@each_p
@pytest.mark.parametrize("impl", ["blocks", "library"])
def test_the_operator(impl, p):
    x, projections = problem(torch.float32, p)
    nothing = torch.empty(0)
    operands = [
        t
        for one in projections
        for t in (*one[:4], one.scale, SEED if p and one.lora_A is not None else None)
    ]
    operands = [nothing if t is None else t for t in operands]
    rest = 0.5, [p] * 3, impl
    opcheck(
        OP.default,
        (x, operands, *rest, None),
        test_utils=["test_schema", "test_autograd_registration", "test_faketensor"],
    )
    ys, ss = OP(x, operands, *rest, None)
    given = [torch.randn_like(y).detach() for y in ys], x.detach(), [t.detach() for t in operands]
    for need in (True, False):
        needs = [True, False, need], [need, False, True], [need, True, False]
        opcheck(
            torch.ops.fastlora.lora_linears_backward.default,
            (*given, ss, *rest, need, *needs, None),
            test_utils=["test_schema", "test_faketensor"],
        )


@each_p
def test_compiled(p, inductor):
    x, projections = problem(torch.float32, p)

    def function(x):
        return lora_linears(x, projections, training=True)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=inductor, fullgraph=True)
    found = results(compiled(x), leaves(x, projections))
    right = results([formula(x, one) for one in projections], leaves(x, projections))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def kept_by(call):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return kept


@each_p
@pytest.mark.parametrize("impl", ["blocks", "library", "triton"])
def test_what_is_kept(impl, p):
    """x, s, and what scale multiplies only where it trains; nothing else that is as large."""
    for trains, most in ((True, 1), (False, 0)):
        x, (one, *_) = problem(torch.float32, p, rows=512)
        one = one._replace(scale=one.scale.detach().requires_grad_(trains))
        kept = kept_by(lambda: lora_linears(x, [one], training=True, impl=impl))  # noqa: B023
        wide = [t for t in kept if t.numel() >= 512 * 16 and t.data_ptr() != x.data_ptr()]
        assert len(wide) == most


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("impl", ["blocks", "library", "triton"])
def test_hardly_any_rows(impl, rows):
    x, projections = problem(IMPLS[impl], p=0.4, rows=rows)
    projections = projections[::2]
    ys = lora_linears(x, projections, training=True, impl=impl)
    right = [formula(x, one) for one in projections]
    found, right = (results(of, leaves(x, projections)) for of in (ys, right))
    torch.testing.assert_close(found, right, **CLOSE[IMPLS[impl]])


def test_nan_stays_in_its_row_and_column():
    x, (one, *_) = problem()
    bad, scale = x.detach().clone(), one.scale.detach().clone()
    bad[3, 2], scale[5] = float("nan"), float("nan")
    (y,) = lora_linears(bad, [one._replace(scale=scale)], impl="blocks")
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[3], expected[:, 5] = True, True
    assert torch.equal(y.isnan(), expected)


WRONG = {
    "shape": ({"scale": torch.ones(3)}, ValueError, r"scale must be \[16\] to match"),
    "dtype": ({"scale": torch.ones(16).half()}, TypeError, "scale must have the dtype of x"),
    "kind": ({"scale": 2.0}, TypeError, "scale must be a Tensor or None, got float"),
    "experts": (
        {"weight": torch.ones(1, 16, K), "lora_A": None, "lora_B": None, "bias": None},
        ValueError,
        "scale must be None for stacked weights",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(wrong):
    x, (one, *_) = problem(torch.float32)
    changes, kind, said = WRONG[wrong]
    segments = [0, M] if wrong == "experts" else None
    with pytest.raises(kind, match=said):
        lora_linears(x, [one._replace(**changes)], segments=segments)


def test_no_dropout_under_segments_with_a_scale(monkeypatch):
    monkeypatch.undo()  # seeds are drawn, and none for what is refused
    x, (one, *_) = problem(torch.float32, 0.4)
    one = one._replace(lora_A=[one.lora_A], lora_B=[one.lora_B])
    lora_linears(x, [one], segments=[0, M])
    bare = Projection(one.weight, one.lora_A[0], one.lora_B[0], None, 1.0, 0.4)
    before = torch.get_rng_state()
    said = r"projections\[1\]: dropout_p must be 0 in training with segments under a scale, got 0.4"
    with pytest.raises(ValueError, match=said):
        lora_linears(
            x,
            [bare._replace(lora_A=one.lora_A, lora_B=one.lora_B), one],
            segments=[0, M],
            training=True,
        )
    assert torch.equal(torch.get_rng_state(), before)
