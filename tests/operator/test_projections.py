# SPDX-License-Identifier: Apache-2.0
"""Several projections of one x: each as if alone, x read and its gradient added up for all."""

import itertools

import pytest
import torch
from acceptance import KINDS, NAMES, Case, accept, oracle, plain
from bodies import bodies
from torch._inductor.compile_fx import compile_fx
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora.flops import FORMULAS
from fastlora.operator import blocks, op
from fastlora.operator.operands import Operands, Projection

BODIES = bodies()
each_body = pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
each_impl = pytest.mark.parametrize("impl", BODIES)

# Cases of one x: M and K are the same, and all else may differ. A rank of 0 is no adapter.
GROUPS = {
    "q, k, v": [(144, 13, 0.0), (72, 13, 0.0), (72, 13, 0.0)],
    "q and v": [(144, 13, 0.0), (72, 0, 0.0), (72, 13, 0.0)],
    "other ranks": [(99, 17, 0.0), (110, 13, 0.0)],
    "dropped": [(144, 13, 0.3), (72, 13, 0.3), (72, 13, 0.3)],
    "some dropped": [(144, 5, 0.3), (72, 0, 0.0), (60, 3, 0.0), (72, 5, 0.6), (88, 2, 0.0)],
    "frozen": [(144, 0, 0.0), (72, 0, 0.0)],
    "one": [(99, 4, 0.0)],
}
each_group = pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)


def cases(group, M=37, K=70, **options):
    return [
        Case(M, n, K, r or 1, dropout_p=p, seed=i, scaling=0.7 + i / 10, bias=i != 1, **options)
        for i, (n, r, p) in enumerate(group)
    ]


def tensors(group, given):
    """Draw the tensors of each projection; x is that of the first."""
    drawn = [case.tensors() for case in given]
    for t, (_, r, _) in zip(drawn, group, strict=True):
        t["x"] = drawn[0]["x"]
        if not r:
            t["a"] = t["b"] = None
    return drawn


def operands(given, drawn):
    return [
        Operands(
            *(t[name] for name in ("w", "a", "b", "bias")),
            *(None if t["a"] is None else t["seed"], case.scaling, case.dropout_p),
        )
        for case, t in zip(given, drawn, strict=True)
    ]


def whole(function, given, drawn):
    """Return what ``function`` of `acceptance` makes of each; the gradients of x are added."""
    found = []
    for case, t in zip(given, drawn, strict=True):
        if t["a"] is None:  # a plain linear layer: an adapter that does nothing
            dtype = KINDS[case.kind][1]
            t = t | {"a": torch.zeros(1, case.K, dtype=dtype), "seed": None}
            t["b"] = torch.zeros(case.N, 1, dtype=dtype)
        found.append(function(case, t))
    total = found[0]["x"]
    for each in found[1:]:
        total = total + each["x"]
    return found, total


def verify_together(body, group, **options):
    """Apply the acceptance rule to the y, da and db of each projection and to their common dx."""
    given = cases(group, **options)
    drawn = tensors(group, given)
    projections, x, dys = operands(given, drawn), drawn[0]["x"], [t["dy"] for t in drawn]
    ys, ss = body.forward_all(x, projections)
    needs = [(True, True)] * len(given)
    dx, das, dbs = body.backward_all(dys, x, projections, ss, True, needs)
    expected, expected_dx = whole(plain, given, drawn)
    exact, exact_dx = whole(oracle, given, drawn)
    accept("x", dx, expected_dx, exact_dx)
    for i, results in enumerate(zip(ys, (None,) * len(ys), das, dbs, strict=True)):
        for name, result in zip(NAMES, results, strict=True):
            if name == "y" or (name != "x" and group[i][1]):
                accept(f"{i}: {name}", result, expected[i][name], exact[i][name])
            else:
                assert result is None


MODES = ("base", "low_rank", "both")


@each_group
@pytest.mark.parametrize("kind", KINDS)
def test_acceptance_rule(group, kind):
    for mode in MODES:
        verify_together(BODIES["blocks"], group, kind=kind, mode=mode)


@pytest.mark.parametrize("name", ["library", "triton"])
@pytest.mark.parametrize("number", range(len(GROUPS)), ids=GROUPS)
def test_acceptance_rule_of_the_kernels(name, number):
    """Dtypes and modes take turns: tests of the kernels themselves have them all."""
    group, turn = list(GROUPS.values())[number], number + (name == "triton")
    kind, mode = list(KINDS)[turn % len(KINDS)], MODES[turn % 3]
    verify_together(BODIES[name], group, kind=kind, mode=mode)


@pytest.mark.parametrize("number", range(len(GROUPS)), ids=GROUPS)
def test_large_inputs_in_blocks(number, monkeypatch):
    """Dtypes take turns here too."""
    for name in ("FEW", "SHORT"):
        monkeypatch.setattr(blocks, name, 0)
    monkeypatch.setitem(blocks.ROWS, "cpu", 16)
    for turn in (0, 2):
        kind = list(KINDS)[(number + turn) % len(KINDS)]
        verify_together(BODIES["blocks"], list(GROUPS.values())[number], kind=kind)


def nearly(found, wanted):
    """Products of other shapes may add in another order."""
    return (found - wanted).norm() <= 1e-6 * wanted.norm()


@each_body
@pytest.mark.parametrize("which", ["some dropped", "q, k, v"])
def test_only_what_is_asked_for(body, which):
    """Every combination of gradients and of outputs that were used: the same, or None."""
    group = GROUPS[which][:3]
    given = cases(group)
    drawn = tensors(group, given)
    projections, x = operands(given, drawn), drawn[0]["x"]
    _, ss = body.forward_all(x, projections)
    for used in itertools.product((True, False), repeat=3 if body is BODIES["blocks"] else 1):
        used = (*used, True, True)[:3]
        dys = [t["dy"] if flag else None for t, flag in zip(drawn, used, strict=True)]
        every = [(True, True)] * 3
        full = body.backward_all(dys, x, projections, ss, True, every)
        assert (full[0] is not None) == any(used)
        for need_x, first, second in itertools.product((True, False), repeat=3):
            needs = [(first, second), (True, True), (second, first)]
            dx, das, dbs = body.backward_all(dys, x, projections, ss, need_x, needs)
            assert (dx is not None) == (need_x and any(used))
            assert dx is None or nearly(dx, full[0])
            for i in range(3):
                for found, wanted, needed in zip(
                    (das[i], dbs[i]), (full[1][i], full[2][i]), needs[i], strict=True
                ):
                    asked = needed and used[i] and projections[i].a is not None
                    assert (found is not None) == asked
                    assert found is None or nearly(found, wanted)


# The operator


def given(group=GROUPS["some dropped"], dtype=torch.float32, adapter=None, grad=True, K=10, M=7):
    """Return x and projections with trained adapters."""
    x = torch.randn(M, K).to(dtype).requires_grad_(grad)
    projections = []
    for i, (n, r, p) in enumerate(group):
        w, a, b = torch.randn(n, K) * K**-0.5, torch.randn(r, K) * K**-0.5, torch.randn(n, r)
        a, b = (t.to(adapter or dtype).requires_grad_(grad) if r else None for t in (a, b))
        bias = torch.randn(n).to(dtype) if i % 2 else None
        projections.append(Projection(w.to(dtype), a, b, bias, 0.5 + i / 4, p))
    return x, projections


def leaves(x, projections):
    return [x, *(t for p in projections for t in (p.lora_A, p.lora_B) if t is not None)]


def apart(x, projections, impl="auto"):
    """Return what the projections are one by one."""
    ys = []
    for p in projections:
        if p.lora_A is None:
            ys.append(torch.nn.functional.linear(x, p.weight, p.bias))
        else:
            options = {"scaling": p.scaling, "dropout_p": p.dropout_p, "training": True}
            tensors = p.weight, p.lora_A, p.lora_B, p.bias
            ys.append(fastlora.lora_linear(x, *tensors, **options, impl=impl))
    return ys


def gradients(ys, wanted):
    loss = sum(y.float().square().sum() * (i + 1) for i, y in enumerate(ys))
    return torch.autograd.grad(loss, wanted)


def close(found, expected, **tolerance):
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, **tolerance)


@each_impl
@each_group
def test_as_if_alone(impl, group):
    """The same seeds are drawn in the same order, so that dropout is the same, too."""
    x, projections = given(group)
    torch.manual_seed(5)
    expected = apart(x, projections, impl)
    torch.manual_seed(5)
    found = fastlora.lora_linears(x, projections, training=True, impl=impl)
    assert isinstance(found, list)
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    close(found, expected, **tolerance)
    wanted = leaves(x, projections)
    close(gradients(found, wanted), gradients(expected, wanted), **tolerance)


def test_outputs_that_nobody_uses():
    x, projections = given(GROUPS["q, k, v"])
    wanted = leaves(x, projections)
    for used in ((0,), (1, 2), (2,)):
        ys = fastlora.lora_linears(x, projections)
        alone = apart(x, projections)
        found, expected = (
            torch.autograd.grad(sum(y[i].square().sum() for i in used), wanted, allow_unused=True)
            for y in (ys, alone)
        )
        assert [g is None for g in found] == [g is None for g in expected]
        found, expected = ([g for g in gs if g is not None] for gs in (found, expected))
        close(found, expected, rtol=1e-4, atol=1e-4)


def test_trained_weights_and_biases():
    x, projections = given(GROUPS["q and v"])
    trained = [p.weight.requires_grad_() for p in projections]
    trained += [p.bias.requires_grad_() for p in projections if p.bias is not None]
    found = gradients(fastlora.lora_linears(x, projections), trained)
    close(found, gradients(apart(x, projections), trained), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(10,), (2, 3, 10), (0, 10), (2, 0, 10)])
def test_any_leading_dimensions(shape):
    _, projections = given()
    x = torch.randn(shape, requires_grad=True)
    found = fastlora.lora_linears(x, projections)
    expected = apart(x, [p._replace(dropout_p=0.0) for p in projections])
    assert [y.shape for y in found] == [(*shape[:-1], n) for n, *_ in GROUPS["some dropped"]]
    close(found, expected, rtol=1e-4, atol=1e-4)
    gradients(found, leaves(x, projections))


def test_outputs_share_no_memory():
    x, projections = given(GROUPS["q, k, v"])
    ys = fastlora.lora_linears(x, projections)
    found = [*ys, *gradients(ys, leaves(x, projections))]
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)


def test_second_derivatives():
    x, projections = given([(3, 2, 0.5), (2, 0, 0.0), (4, 1, 0.0)], torch.float64, K=4, M=3)
    seed = torch.tensor([3])
    wanted = leaves(x, projections)

    def function(x, *factors):
        factors = iter(factors)
        made = []
        for w, a, _, bias, c, p in projections:
            a, b = (None, None) if a is None else (next(factors), next(factors))
            made.append(Operands(w, a, b, bias, seed if p else None, c, p))
        return tuple(op.run(x, made, "blocks"))

    assert torch.autograd.gradcheck(function, wanted)
    assert torch.autograd.gradgradcheck(function, wanted)


@each_impl
def test_opcheck(impl):
    x, projections = given()
    nothing = torch.empty(0)
    seeds = [torch.tensor([7]) if p.dropout_p else nothing for p in projections]
    lists = [[nothing if t is None else t for t in (*p[:4], s)] for p, s in zip(projections, seeds)]
    lists = [sum(lists, [])]
    ps = [p.dropout_p for p in projections]
    args = (x, *lists, 0.5, ps, impl)
    opcheck(torch.ops.fastlora.lora_linears.default, args)
    ys, ss = torch.ops.fastlora.lora_linears(*args)
    given_ = [t.detach() for t in lists[0]]
    dys = [torch.randn_like(y).detach() for y in ys]
    dys[2] = nothing
    for need_x, need in itertools.product((True, False), repeat=2):
        needs = [need] * 5, [True, False, True, not need, need]
        opcheck(
            torch.ops.fastlora.lora_linears_backward.default,
            (dys, x.detach(), given_, ss, 0.5, ps, impl, need_x, *needs),
            test_utils=["test_schema", "test_faketensor"],
        )


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_compiled(p):
    """In one graph, for any number of rows; the projections' scalings may differ."""
    x, projections = given([(6, 2, p), (4, 0, 0.0), (4, 3, p)])
    compiles = 0

    def backend(graph, inputs):
        nonlocal compiles
        compiles += 1
        return compile_fx(graph, inputs)

    def function(x):
        return fastlora.lora_linears(x, projections, training=True)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for m in (7, 5, 9, 30):
        x = torch.randn(m, 10, requires_grad=True)
        torch.manual_seed(m)
        expected = function(x)
        torch.manual_seed(m)
        found = compiled(x)
        if not p:  # Inductor draws its own random numbers
            close(found, expected, rtol=1e-4, atol=1e-4)
            wanted = leaves(x, projections)
            close(gradients(found, wanted), gradients(expected, wanted), rtol=1e-4, atol=1e-3)
        else:
            gradients(found, leaves(x, projections))
    assert compiles <= 2


def test_transforms():
    x, projections = given(GROUPS["q and v"], torch.float64, grad=False)

    def function(x, lists=True):
        ys = fastlora.lora_linears(x, projections) if lists else apart(x, projections)
        return torch.cat(ys, -1)

    found, expected = (torch.func.jacrev(lambda x, f=f: function(x, f))(x) for f in (True, False))
    torch.testing.assert_close(found, expected)
    assert expected.abs().max() > 0.1
    found = torch.func.vmap(function)(x.expand(3, *x.shape))
    torch.testing.assert_close(found[1], function(x))


def test_modes_and_subclasses_see_the_operator():
    x, projections = given(GROUPS["q and v"])
    total = 0
    for (n, r, _), a in zip(GROUPS["q and v"], projections, strict=True):
        total += 2 * 7 * (n * 10 + (r if a.lora_A is not None else 0) * (n + 10))
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        ys = fastlora.lora_linears(x, projections)
    assert counter.get_total_flops() == total
    wanted = leaves(x, projections)
    expected = gradients(fastlora.lora_linears(x, projections), wanted)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS):  # only backward is observed
        close(gradients(fastlora.lora_linears(x, projections), wanted), expected)
    unobserved = fastlora.lora_linears(x, projections)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        close(gradients(unobserved, wanted), expected, rtol=1e-5, atol=1e-4)
    assert counter.get_total_flops() > total
    close(gradients(ys, wanted), expected, rtol=1e-5, atol=1e-4)


WRONG = [
    ([], ValueError, "projections must hold at least one, got none"),
    ([0, 1], TypeError, r"projections\[1\]: lora_A must be a Tensor, got NoneType"),
    ([0, 2], ValueError, r"projections\[1\]: weight must be \[N, 10\] to match x"),
    ([3], TypeError, r"projections\[0\]: weight must be a Tensor, got str"),
    ([0, 0, 4], ValueError, r"projections\[2\]: dropout_p must be between 0 and 1, got 2"),
]


@pytest.mark.parametrize(("which", "kind", "said"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_named(which, kind, said):
    x, (right, *_) = given()
    wrong = [
        right,
        right._replace(lora_A=None),
        Projection(torch.ones(3, 9)),
        Projection("weight"),
        right._replace(dropout_p=2.0),
    ]
    with pytest.raises(kind, match=said):
        fastlora.lora_linears(x, [wrong[i] for i in which])
