# SPDX-License-Identifier: Apache-2.0
"""Segments whose rows meet a weight of their own as well, as in a mixture of experts."""

import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from acceptance import accept
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora import Projection, lora_linears
from fastlora.flops import FORMULAS
from fastlora.operator import grouped
from fastlora.operator.dropout import keep_mask, kept_scale

ENDS = (0, 7, 7, 10, 30, 41, 41)  # two have no rows, one of them the last
KERNELS = dict.fromkeys(("library", "triton"), torch.float32)  # which take no float64
IMPLS = ("auto", "blocks", "eager", "reference", *KERNELS)
SIZES = {"aligned": (32, 40, 8), "odd": (27, 35, 3)}  # K, N, R; the former PyTorch groups itself


def problem(dtype=torch.float64, adapter=None, sizes="odd", by_columns=False, ends=ENDS, p=0.0):
    """Return x and a projection of every expert; weights may lie as [G, K, N]."""
    (K, N, R), G = SIZES[sizes], len(ends) - 1
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    w = draw(G, K, N, scale=K**-0.5).mT if by_columns else draw(G, N, K, scale=K**-0.5)
    a, b = (
        draw(G, R, K, scale=K**-0.5, dtype=adapter or dtype),
        draw(G, N, R, dtype=adapter or dtype),
    )
    one = Projection(w, a.requires_grad_(), b.requires_grad_(), draw(G, N), 0.7, p)
    return draw(ends[-1], K).requires_grad_(), one


def loop(x, one, seed=None, ends=ENDS):
    """Return what the formula makes of each expert's rows."""
    w, a, b, bias, scaling, p, _ = one
    parts = []
    for g, (start, end) in enumerate(itertools.pairwise(ends)):
        x_hat = x[start:end]
        y = F.linear(x_hat, w[g], None if bias is None else bias[g])
        if a is not None:
            x_hat = x_hat.to(a.dtype)
            if seed is not None:
                x_hat = x_hat * keep_mask(seed, range(start, end), x.shape[1], p) * kept_scale(p)
            y = y + (x_hat @ a[g].t() @ b[g].t() * scaling).to(y.dtype)
        parts.append(y)
    return torch.cat(parts)


def results(y, *inputs):
    total = (y.double() * torch.linspace(-1, 2, y.numel()).view_as(y)).sum()
    return [y, *torch.autograd.grad(total, inputs)]


def close(found, right, impl=""):
    near = {"rtol": 1e-4, "atol": 1e-4} if impl in KERNELS else {}
    torch.testing.assert_close(found, right, **near)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("impl", IMPLS)
def test_as_a_loop(impl, sizes, by_columns):
    x, one = problem(KERNELS.get(impl, torch.float64), sizes=sizes, by_columns=by_columns)
    bare = Projection(one.weight.flip(0))  # neither adapter nor bias
    given = [one._replace(bias=None), bare, one]
    ys = lora_linears(x.unflatten(0, (1, -1)), given, segments=ENDS, impl=impl)
    inputs = x, one.lora_A, one.lora_B
    found = results(torch.cat([y[0] for y in ys], 1), *inputs)
    right = results(torch.cat([loop(x, of) for of in given], 1), *inputs)
    close(found, right, impl)
    assert not found[2][[1, 5]].any() and not found[3][[1, 5]].any()


@pytest.mark.parametrize("impl", [*IMPLS[1:3], *KERNELS])
def test_what_a_row_drops_depends_on_its_number(impl, monkeypatch):
    x, one = problem(KERNELS.get(impl, torch.float64), p=0.4)
    seed, inputs = torch.tensor([7]), (x, one.lora_A, one.lora_B)
    monkeypatch.setattr("fastlora.functional.new_seed", lambda _: seed)
    (y,) = lora_linears(x, [one], segments=torch.tensor(ENDS), training=True, impl=impl)
    close(results(y, *inputs), results(loop(x, one, seed), *inputs), impl)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("adapter", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_acceptance_rule(dtype, adapter, sizes):
    ends = [4 * end for end in ENDS]
    x, one = problem(dtype, adapter, sizes, ends=ends)
    inputs = x, one.lora_A, one.lora_B
    wide = [t.detach().double().requires_grad_() for t in (*inputs, one.weight, one.bias)]
    exact = one._replace(lora_A=wide[1], lora_B=wide[2], weight=wide[3], bias=wide[4])
    (y,) = lora_linears(x, [one], segments=ends)
    found, plain = results(y, *inputs), results(loop(x, one, ends=ends), *inputs)
    exact = results(loop(wide[0], exact, ends=ends), *wide[:3])
    for name, *values in zip(("y", "dx", "da", "db"), found, plain, exact, strict=True):
        accept(name, *values)


@pytest.mark.parametrize("impl", ["blocks", "eager", "triton"])
def test_hundreds_of_experts_with_a_few_rows(impl):
    sizes = [g % 4 for g in range(300)]
    ends = [0, *itertools.accumulate(sizes)]
    x, one = problem(torch.float32, ends=ends)
    inputs = x, one.lora_A, one.lora_B
    (y,) = lora_linears(x, [one], segments=ends, impl=impl)
    close(results(y, *inputs), results(loop(x, one, ends=ends), *inputs), "triton")


def test_experts_without_rows_are_not_read():
    x, one = problem()
    with torch.no_grad():
        for t in (one.weight, one.lora_A, one.lora_B, one.bias):
            t[[1, 5]] = torch.nan
    for impl in ("blocks", "eager"):
        (y,) = lora_linears(x, [one], segments=ENDS, impl=impl)
        found = results(y, x, one.lora_A, one.lora_B)
        assert all(torch.isfinite(t).all() for t in found[: 4 if impl == "blocks" else 2])


def test_pytorch_groups_what_it_can(monkeypatch):
    for sizes, dtype, grouped_by_pytorch in [
        ("aligned", torch.float32, True),
        ("odd", torch.float32, False),
        ("aligned", torch.float64, False),
    ]:
        x, one = problem(dtype, sizes=sizes)
        function = mock.Mock(wraps=F.grouped_mm)
        monkeypatch.setattr(F, "grouped_mm", function)
        (y,) = lora_linears(x, [one], segments=ENDS, impl="blocks")
        results(y, x, one.lora_A, one.lora_B)
        # s, ds, db, da and the low-rank part of dx; that of y joins the bias.
        assert function.call_count == (5 if grouped_by_pytorch else 0)
    monkeypatch.delattr(F, "grouped_mm")  # PyTorch before 2.10
    assert grouped.grouped_mm(x, one.lora_A.mT, torch.tensor(ENDS)) is None


def test_frozen_layers_of_either_kind():
    x, one = problem(torch.float32)
    for weight in (one.weight[0], one.weight):
        bare = Projection(weight)
        segments = None if weight.dim() == 2 else ENDS
        (y,) = lora_linears(x, [bare], segments=segments, impl="blocks")
        close(y, F.linear(x, weight) if segments is None else loop(x, bare))


def test_float16_is_scaled_before_it_is_rounded():
    x, one = problem(torch.float16, sizes="aligned")
    one = one._replace(lora_B=torch.full_like(one.lora_B, 300.0).requires_grad_(), scaling=1e-4)
    (y,) = lora_linears(x, [one], segments=ENDS)
    dx, db = torch.autograd.grad(y, [x, one.lora_B], torch.full_like(y, 300.0))
    assert torch.isfinite(dx).all() and torch.isfinite(db).all()
    wide = [t if t is None or isinstance(t, float) else t.detach().double() for t in one]
    right = torch.func.vjp(lambda x: loop(x, wide), x.detach().double())[1](
        torch.full(y.shape, 300.0, dtype=torch.float64)
    )[0]
    torch.testing.assert_close(dx.double(), right, rtol=0.01, atol=0.1)


def test_weights_and_biases_that_are_trained():
    x, one = problem()
    inputs = x, one.weight.requires_grad_(), one.bias.requires_grad_(), one.lora_A, one.lora_B
    (y,) = lora_linears(x, [one], segments=ENDS)
    close(results(y, *inputs), results(loop(x, one), *inputs))


def test_second_derivatives_transforms_and_the_compiler():
    ends = torch.tensor([0, 2, 2, 5])
    x, one = problem(ends=ends.tolist())

    def layer(x, a, b):
        return lora_linears(x, [one._replace(lora_A=a, lora_B=b)], segments=ends)[0]

    inputs = x, one.lora_A, one.lora_B
    assert torch.autograd.gradgradcheck(layer, inputs)
    y = layer(*inputs)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs)
    close(results(compiled, *inputs), results(layer(*inputs), *inputs))
    grads, tangent = torch.func.vjp(layer, *inputs)[1](y)[0], torch.randn_like(x)
    close(grads, torch.autograd.grad(y, x, y)[0])
    found = torch.func.jvp(lambda x: layer(x, *inputs[1:]), (x,), (tangent,))[1]
    close((found * y).sum(), (grads * tangent).sum())


@pytest.mark.parametrize("impl", ["blocks", "library"])
def test_the_operator(impl):
    x, one = problem(torch.float32)
    nothing, offsets = torch.empty(0), torch.tensor(ENDS, dtype=torch.int32)
    operands = [one.weight, one.lora_A, one.lora_B, one.bias, nothing, nothing]
    rest = 0.7, [0.0], impl
    opcheck(torch.ops.fastlora.lora_linears.default, (x, operands, *rest, offsets))
    ys, ss = torch.ops.fastlora.lora_linears(x, operands, *rest, offsets)
    given = [ys[0].detach()], x.detach(), [t.detach() for t in operands], ss, *rest
    given = *given, True, [True], [True], [False], offsets
    backward = torch.ops.fastlora.lora_linears_backward.default
    opcheck(backward, given, test_utils=["test_schema", "test_faketensor"])


def test_flops_are_counted():
    x, one = problem(torch.float32)
    (K, N, R), M = SIZES["odd"], ENDS[-1]
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        (y,) = lora_linears(x, [one], segments=ENDS, impl="blocks")
        assert counter.get_total_flops() == 2 * M * (N * K + R * (K + N))
        results(y, x, one.lora_A, one.lora_B)
    assert counter.get_total_flops() == 2 * M * (2 * N * K + 3 * R * (K + N))


def test_autocast_and_no_rows():
    x, one = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = lora_linears(x, [one], segments=ENDS)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), loop(x, one), rtol=0.05, atol=0.05)
    (y,) = lora_linears(x[:0], [one], segments=[0] * 7)
    assert y.shape == (0, 35)
    assert not any(t.any() for t in torch.autograd.grad(y.sum(), [one.lora_A, one.lora_B]))


WRONG = [
    ({"segments": [0, 41]}, ValueError, r"weight must be \[1, N, 27\] to match x .*\(6, 35, 27\)"),
    ({"segments": [*ENDS[:-1], 40]}, ValueError, "segments must rise from 0 to 41"),
    ({"segments": torch.tensor([*ENDS[:-1], 40])}, ValueError, "segments must rise from 0 to 41"),
    ({"segments": torch.zeros(7)}, ValueError, r"segments must be \[G \+ 1\] integers on cpu, got"),
    ({"lora_A": torch.zeros(5, 3, 27)}, ValueError, r"lora_A must be \[6, R, 27\]"),
    ({"lora_B": torch.zeros(6, 35, 4)}, ValueError, r"lora_B must be \[6, 35, 3\]"),
    ({"bias": torch.zeros(35)}, ValueError, r"bias must be 2-D, got shape \(35,\)"),
    ({"scaling": [0.5] * 6}, TypeError, "scaling must be a number or a 0-d tensor, got list"),
    ({"dropout_p": 2.0}, ValueError, "dropout_p must be between 0 and 1, got 2.0"),
    ({"segments": None}, ValueError, r"weight must be 2-D, got shape \(6, 35, 27\)"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_named(changes, kind, message):
    x, one = problem(torch.float32)
    own = {name: t for name, t in changes.items() if name != "segments"}
    with pytest.raises(kind, match=message):
        lora_linears(x, [one._replace(**own)], segments=changes.get("segments", ENDS))


def test_all_weights_are_stacked_or_none():
    x, one = problem()
    with pytest.raises(ValueError, match=r"projections\[1\]: weight must be 3-D"):
        fastlora.lora_linears(x, [one, Projection(one.weight[0])], segments=ENDS)
