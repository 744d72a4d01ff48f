# SPDX-License-Identifier: Apache-2.0
"""Tensors that are not read as they lie, numbers that are not finite, dtypes that nobody casts."""

import math

import pytest
import torch
import torch.nn.functional as F
from measuring import run_python
from peft import LoraConfig, get_peft_model
from torch import nn

import fastlora
from fastlora import Projection, lora_linear, lora_linears
from fastlora.layers.active import ALL, lora_sum
from fastlora.operator import blocks

each_impl = pytest.mark.parametrize("impl", ("eager", "blocks", "library", "triton"))


def factors(n=12, k=16, r=4):
    return torch.randn(n, k), torch.randn(r, k), torch.randn(n, r)


def formula(x, w, a, b, scaling=1.0):
    """The plain formula as PEFT writes it, in the adapters' dtype."""
    low_rank = F.linear(F.linear(x.to(a.dtype), a), b) * scaling
    return (F.linear(x, w) + low_rank).to(x.dtype)


def results(function, x, w, a, b, dy, **options):
    """Return y and the gradients of x, a and b."""
    x, a, b = (t.detach().requires_grad_() for t in (x, a, b))
    y = function(x, w, a, b, **options)
    return y.detach(), *torch.autograd.grad(y, (x, a, b), dy)


def negated(t):
    """Return ``t`` as a tensor whose negation PyTorch has put off."""
    t = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert t.is_neg()
    return t


@each_impl
@pytest.mark.parametrize("which", ["x", "w", "a", "b", "bias", "dy"])
def test_a_put_off_negation_is_carried_out(impl, which):
    t = dict(zip("xwab", (torch.randn(8, 16), *factors()), strict=True), dy=torch.randn(8, 12))
    t["bias"] = torch.randn(12)
    right = results(lora_linear, **t, impl="reference")
    t[which] = negated(t[which])
    for found, expected in zip(results(lora_linear, **t, impl=impl), right, strict=True):
        torch.testing.assert_close(found, expected)


@each_impl
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exact", [True, False], ids=["factors of few bits", "any factors"])
@pytest.mark.parametrize("rows", [8, 2000])
def test_infinities_stay_under_float32_adapters(impl, base, exact, rows):
    """A float32 factor goes to tensor cores as terms; none may be zero, or of another sign."""
    if rows > 8 and impl == "triton":
        rows = 100  # the interpreter takes long
    # Other ranks PyTorch's own product pads on a CPU with AMX, and makes NaN of infinities.
    w, a, b = torch.rand(128, 16).to(base), torch.rand(8, 16) + 0.1, torch.rand(128, 8) + 0.1
    if exact:
        a, b = torch.full_like(a, 0.25), torch.full_like(b, -0.5)
    x, dy = torch.randn(rows, 16).to(base), torch.rand(rows, 128).to(base)
    x[3, 2], x[5, 7], dy[2, 4] = math.inf, -math.inf, math.inf
    right = results(formula, x, w, a, b, dy)
    for found, expected in zip(results(lora_linear, x, w, a, b, dy, impl=impl), right, strict=True):
        for is_so in (torch.isposinf, torch.isneginf, torch.isnan):
            assert is_so(found).sum() == is_so(expected).sum()


# Float16: the scaling comes before the rounding


@each_impl
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_float16_is_scaled_before_it_overflows(impl, p):
    """Products that are too large until they are scaled: finite where the formula's are."""
    x, w, a = (torch.randn(n, 256).half() / d for n, d in ((64, 1), (64, 16), (4, 16)))
    given = x, w, a, torch.rand(64, 4).half(), torch.full((64, 64), 6000.0).half()
    options = {"dropout_p": p, "training": True, "impl": impl}
    _, dx, _, db = results(lora_linear, *given, scaling=1 / 64, **options)
    assert dx.isfinite().all() and db.isfinite().all()
    if not p:
        right = results(formula, *given, scaling=1 / 64)
        torch.testing.assert_close((dx, db), right[1::2], rtol=0.02, atol=50.0)


@pytest.mark.parametrize("impl", ["eager", "blocks"])
def test_what_is_kept_by_dropout_is_not_scaled_early(impl):
    """ds may be large where the product of ds and a is not: 1 / (1 - p) belongs to the product."""
    x, w, a = torch.full((64, 32), 0.01), torch.zeros(8, 32), torch.full((1, 32), 1e-4)
    given = (t.half() for t in (x, w, a, torch.ones(8, 1), torch.full((64, 8), 5000.0)))
    dx = results(lora_linear, *given, dropout_p=0.5, training=True, impl=impl)[1]
    assert dx.isfinite().all()
    assert dx[dx != 0].float().mean().item() == pytest.approx(8.0, rel=0.02)


def small():
    """float16 factors whose product with 1 / 512 has almost no bits left in float16."""
    shapes = (40, 64, 30), (4, 64, 30), (32, 4, 2e-3)
    return [(torch.randn(n, k) * scale).half() for n, k, scale in shapes]


@pytest.mark.parametrize("way", ["tensor", "several scalings, observed", "two adapters"])
def test_small_scalings_of_float16_adapters_keep_their_bits(way):
    """Where the scaling becomes part of lora_B, that is float32 then."""
    (x, a, b), w, c = small(), torch.zeros(32, 64).half(), 1 / 512
    if way == "tensor":
        found = lora_linear(x, w, a, b, scaling=torch.tensor(c))
    elif way == "two adapters":
        nothing = torch.zeros_like(a), torch.zeros_like(b), 1.0, 0.0, ALL, None
        found = lora_sum(x, w, None, [(a, b, c, 0.0, ALL, None), nothing])
    else:
        ones = [Projection(w, a, b, None, c), Projection(w, a, b, None, 2.0)]
        found = torch.compile(lambda: lora_linears(x, ones)[0], backend="eager", fullgraph=True)()
    right = (x.double() @ a.double().t()) @ b.double().t() * c
    assert (found.double() - right).norm() < 1e-3 * right.norm()


def test_gradients_of_float16_adapters_of_several_scalings():
    """An observed backward of a direct forward: in the dtypes of the adapters."""
    (x, a, b), w = small(), torch.zeros(32, 64).half()
    ab = [t.requires_grad_() for t in (a, b)]
    ys = lora_linears(x, [Projection(w, a, b, None, c) for c in (1 / 512, 2.0)])
    dys = [torch.randn(40, 32).half() for _ in ys]
    right = torch.autograd.grad(ys, ab, dys, retain_graph=True)
    for one, other in zip(torch.autograd.grad(ys, ab, map(negated, dys)), right, strict=True):
        assert one.dtype == torch.float16
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-2)


# Outputs


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_are_no_views(bias, few, request):
    """What runs under PEFT runs patched: in-place use after no_grad, and detach_()."""
    if few:
        request.getfixturevalue("few")
    model = get_peft_model(
        nn.Sequential(nn.Linear(16, 12, bias=bias)), LoraConfig(target_modules=["0"])
    )
    fastlora.patch_peft(model)
    x, t = torch.randn(2, 5, 16), torch.zeros(12, requires_grad=True)
    with torch.no_grad():
        y = model(x)
    y += t
    assert y.requires_grad and y.shape == (2, 5, 12)
    assert not model(x).detach_().requires_grad
    w, a, b = factors()
    for y in lora_linears(x, [Projection(w, a, b), Projection(w, a, b)]):
        assert not y._is_view() and y.shape == (2, 5, 12)


# What nobody casts


def refused(given) -> str:
    with pytest.raises(TypeError) as found:
        lora_linear(*given)
    return str(found.value)


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex32]
)
def test_autocast_casts_what_pytorch_s_casts(dtype):
    given = torch.ones(2, 16).to(dtype), *factors()
    without = refused(given)
    assert without.startswith("x must be float32, bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        assert refused(given) == without


@pytest.mark.parametrize(("name", "those"), [("weight", (1,)), ("lora_A", (2, 3)), ("bias", (4,))])
def test_autocast_leaves_float64_alone(name, those):
    given = [torch.ones(2, 16), *factors(), torch.zeros(12)]
    for i in those:
        given[i] = given[i].double()
    with torch.autocast("cpu", torch.bfloat16):
        assert refused(given).startswith(f"{name} must")


# Another import


def test_a_second_import_works_and_leaves_the_first_as_it_is():
    """As importlib.reload, a notebook's autoreload or a test that clears sys.modules has it."""
    code = """
import importlib, sys, torch, fastlora
first = fastlora.lora_linear
t = torch.randn(8, 16), torch.randn(4, 16), torch.randn(2, 16), torch.randn(4, 2)
right = first(*t)
for name in [name for name in sys.modules if name.startswith("fastlora")]:
    del sys.modules[name]
import fastlora, gc
gc.collect()
assert fastlora.lora_linear is not first
for function in (first, fastlora.lora_linear):
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for found in (function(*t), compiled(*t)):
        torch.testing.assert_close(found, right)
from fastlora.operator import op
importlib.reload(op)
gc.collect()
torch.testing.assert_close(torch.compile(first, backend="aot_eager")(*t), right)
print("ok")
"""
    assert run_python(code) == "ok\n"


# Many rows of a tiny layer


@pytest.mark.usefixtures("few")
def test_many_rows_of_a_tiny_layer_take_few_calls(monkeypatch):
    """Python's time of a block must not exceed that of its products."""
    seen, rows = [], blocks._rows

    def counted(t):
        seen.extend(found := rows(t))
        return found

    monkeypatch.setattr(blocks, "_rows", counted)
    x = torch.randn(400_000, 4, requires_grad=True)
    w, a, b = torch.randn(4, 4), torch.randn(2, 4).requires_grad_(), torch.randn(4, 2)
    y = lora_linear(x, w, a, b, dropout_p=0.5, training=True)
    assert y.grad_fn.name() == "_DirectBackward"  # not as few tokens
    y.sum().backward()
    assert 2 <= len(seen) < 20
