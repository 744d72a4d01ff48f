# SPDX-License-Identifier: Apache-2.0
"""Several projections of one x: each as if alone, x read and its gradient added up for all."""

import itertools

import aot
import pytest
import torch
from acceptance import KINDS, NAMES, Case, accept, oracle, plain
from bodies import bodies
from recorder import recording
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora.flops import FORMULAS
from fastlora.operator import blocks, library, steps
from fastlora.operator.operands import Operands, Projection

BODIES = bodies()
each_body = pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
each_impl = pytest.mark.parametrize("impl", BODIES)
MODES = ("base", "low_rank", "both")

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


def drawn(group, **options):
    """Return the case of each projection, its tensors (x is that of the first) and its operands."""
    found = []
    for i, (n, r, p) in enumerate(group):
        rest = {"dropout_p": p, "seed": i, "scaling": 0.7 + i / 10, "bias": i != 1, **options}
        case = Case(37, n, 70, r or 1, **rest)
        t = case.tensors()
        t["x"] = found[0][1]["x"] if found else t["x"]
        tensors = [t[name] if r or name == "bias" else None for name in ("a", "b", "bias", "seed")]
        found.append((case, t, Operands(t["w"], *tensors, case.scaling, p)))
        if not r:  # a plain linear layer: an adapter that does nothing
            t |= {"a": torch.zeros_like(t["a"]), "b": torch.zeros_like(t["b"]), "seed": None}
    return zip(*found, strict=True)


def verify_together(body, group, **options):
    """Apply the acceptance rule to the y, da and db of each projection and to their common dx."""
    given, ts, projections = drawn(group, **options)
    x, dys = ts[0]["x"], [t["dy"] for t in ts]
    ys, ss = body.forward_all(x, projections)
    dx, das, dbs = body.backward_all(dys, x, projections, ss, True, [(True, True)] * len(ts))
    expected, exact = (
        [how(*pair) for pair in zip(given, ts, strict=True)] for how in (plain, oracle)
    )
    accept(
        "x", dx, *(sum(of["x"] for of in found[1:]) + found[0]["x"] for found in (expected, exact))
    )
    for i, results in enumerate(zip(ys, das, dbs, strict=True)):
        for name, result in zip(("y", *NAMES[2:]), results, strict=True):
            if name == "y" or group[i][1]:
                accept(f"{i}: {name}", result, expected[i][name], exact[i][name])
            else:
                assert result is None


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_acceptance_rule(group, kind, monkeypatch):
    for mode in MODES:
        verify_together(BODIES["blocks"], group, kind=kind, mode=mode)
    # As if they were large.
    for name in ("FEW", "SHORT"):
        monkeypatch.setattr(blocks, name, 0)
    monkeypatch.setitem(blocks.ROWS, "cpu", 16)
    verify_together(BODIES["blocks"], group, kind=kind)


@pytest.mark.parametrize("name", ["library", "triton"])
@pytest.mark.parametrize("number", range(len(GROUPS)), ids=GROUPS)
def test_acceptance_rule_of_the_kernels(name, number):
    """Dtypes and modes take turns: tests of the kernels themselves have them all."""
    group, turn = list(GROUPS.values())[number], number + (name == "triton")
    verify_together(BODIES[name], group, kind=list(KINDS)[turn % len(KINDS)], mode=MODES[turn % 3])


@pytest.mark.parametrize("kind", KINDS)
def test_acceptance_rule_of_library_products(kind):
    for mode, p in itertools.product(MODES, (0.0, 0.3)):
        verify_together(BODIES["library"], [(50, 5, p)], kind=kind, mode=mode)


@each_body
@pytest.mark.parametrize("which", ["some dropped", "q, k, v", "one"])
def test_only_what_is_asked_for(body, which):
    """Combinations of gradients and of outputs that were used: the same, or None."""

    def nearly(found, wanted):  # products of other shapes may add in another order
        return (found - wanted).norm() <= 1e-6 * wanted.norm()

    _, ts, projections = drawn(GROUPS[which][:3])
    x, n = ts[0]["x"], len(ts)
    _, ss = body.forward_all(x, projections)
    for used in itertools.product((True, False), repeat=n if body is BODIES["blocks"] else 1):
        used = (*used, True, True)[:n]
        dys = [t["dy"] if flag else None for t, flag in zip(ts, used, strict=True)]
        full = body.backward_all(dys, x, projections, ss, True, [(True, True)] * n)
        for need_x, first, second in itertools.product((any(used), False), *[(True, False)] * 2):
            needs = [(first, second), (True, True), (second, first)][:n]
            dx, *factors = body.backward_all(dys, x, projections, ss, need_x, needs)
            assert (dx is not None) == need_x
            assert dx is None or nearly(dx, full[0])
            for i, j in itertools.product(range(n), range(2)):
                found, trains = factors[j][i], projections[i].a is not None
                asked = needs[i][j] and used[i] and trains
                assert (found is not None) == asked
                assert found is None or nearly(found, full[1 + j][i])


class Launches(TorchDispatchMode):
    """The kernels that PyTorch's own operations would launch, by name."""

    FREE = "view t slice empty new_empty detach as_strided empty_strided transpose promote_types"

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.names += [name] * (name not in self.FREE.split())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("sizes", [(512,), (512, 256, 256)], ids=["one", "three"])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_float32_adapters_take_one_launch_for_each_low_rank_product(base, sizes, p):
    """In `library`, with elements enough for products to split the factors into terms."""

    def launched(call):
        with recording(aot.CHIPS[90]) as recorded, Launches() as others:
            result = call()
        return [c.kernel.__name__ for c in recorded], others.names, result

    M, K, R, n = 1024, 384, 16, len(sizes)
    x, dys = torch.randn(M, K).to(base), [torch.randn(M, size).to(base) for size in sizes]
    rest = None, torch.ones(1, dtype=torch.int64) if p else None, 2.0, p
    weights = [torch.randn(size, K).to(base) for size in sizes]
    each = [Operands(w, torch.randn(R, K), torch.randn(len(w), R), *rest) for w in weights]
    ours, others, (_, ss) = launched(lambda: steps.forward(library, x, each))
    assert ours == ["shrink_kernel", "outputs_kernel"]
    assert others == ["addmm_"] * n
    backward = library, dys, x, each, ss, True, [(True, True)] * n
    ours, others, _ = launched(lambda: steps.backward(*backward))
    assert ours.count("input_grad_kernel") == 1
    assert len(ours) == n + 1 + 2 + 1  # ds and db of each and their sums, da of all and its sums
    assert others == ["addmm_"] * n


# The operator


def given(group=GROUPS["some dropped"], dtype=torch.float32, grad=True, K=10, M=7):
    """Return x and projections with trained adapters."""
    x = torch.randn(M, K, dtype=dtype, requires_grad=grad)
    projections = []
    for i, (n, r, p) in enumerate(group):
        w, a, b = torch.randn(n, K) * K**-0.5, torch.randn(r, K) * K**-0.5, torch.randn(n, r)
        a, b = (t.to(dtype).requires_grad_(grad) if r else None for t in (a, b))
        bias = torch.randn(n).to(dtype) if i % 2 else None
        projections.append(Projection(w.to(dtype), a, b, bias, 0.5 + i / 4, p))
    return x, projections


def leaves(x, projections):
    return [x, *(t for p in projections for t in (p.lora_A, p.lora_B) if t is not None)]


def apart(x, projections, impl="auto"):
    """Return what the projections are one by one."""
    ys = []
    for w, a, b, bias, scaling, p, _ in projections:
        if a is None:
            ys.append(torch.nn.functional.linear(x, w, bias))
        else:
            options = {"scaling": scaling, "dropout_p": p, "training": True, "impl": impl}
            ys.append(fastlora.lora_linear(x, w, a, b, bias, **options))
    return ys


def gradients(ys, wanted, **options):
    loss = sum(y.float().square().sum() * (i + 1) for i, y in enumerate(ys))
    return torch.autograd.grad(loss, wanted, **options)


def close(found, expected, rtol=1e-4, atol=1e-4):
    for mine, theirs in zip(found, expected, strict=True):
        if mine is not theirs is not None:
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


@each_impl
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_as_if_alone(impl, group):
    """The same seeds are drawn in the same order, so that dropout is the same, too."""
    x, projections = given(group)
    torch.manual_seed(5)
    expected = apart(x, projections, impl)
    torch.manual_seed(5)
    found = fastlora.lora_linears(x, projections, training=True, impl=impl)
    assert isinstance(found, list)
    close(found, expected)
    wanted = leaves(x, projections)
    own = gradients(found, wanted)
    close(own, gradients(expected, wanted))
    results = [*found, *own]
    assert len({t.untyped_storage().data_ptr() for t in results}) == len(results)


def test_outputs_that_nobody_uses():
    x, projections = given(GROUPS["q, k, v"])
    wanted = leaves(x, projections)
    for used in ((0,), (1, 2), (2,)):
        found, expected = (
            gradients([ys[i] for i in used], wanted, allow_unused=True)
            for ys in (fastlora.lora_linears(x, projections), apart(x, projections))
        )
        assert [g is None for g in found] == [g is None for g in expected]
        close(found, expected)


def test_trained_weights_and_biases():
    x, projections = given(GROUPS["q and v"])
    trained = [p.weight.requires_grad_() for p in projections]
    trained += [p.bias.requires_grad_() for p in projections if p.bias is not None]
    found = gradients(fastlora.lora_linears(x, projections), trained)
    close(found, gradients(apart(x, projections), trained))


@each_impl
def test_opcheck(impl):
    x, projections = given()
    nothing, seed = torch.empty(0), torch.tensor([7])
    operands = [t for p in projections for t in (*p[:4], None, seed if p.dropout_p else None)]
    operands = [nothing if t is None else t for t in operands]
    rest = 0.5, [p.dropout_p for p in projections], impl
    opcheck(torch.ops.fastlora.lora_linears.default, (x, operands, *rest, None))
    ys, ss = torch.ops.fastlora.lora_linears(x, operands, *rest, None)
    dys = [torch.randn_like(y).detach() for y in ys]
    dys[2], operands = nothing, [t.detach() for t in operands]
    for need_x, need in itertools.product((True, False), repeat=2):
        needs = [need] * 5, [True, False, True, not need, need], [False] * 5
        opcheck(
            torch.ops.fastlora.lora_linears_backward.default,
            (dys, x.detach(), operands, ss, *rest, need_x, *needs, None),
            test_utils=["test_schema", "test_faketensor"],
        )


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_compiled(p, inductor):
    """In one graph, for any number of rows; the projections' scalings may differ."""
    x, projections = given([(6, 2, p), (4, 0, 0.0), (4, 3, p)])

    def function(x):
        return fastlora.lora_linears(x, projections, training=True)

    compiled = torch.compile(function, fullgraph=True, backend=inductor)
    for m in (7, 5, 9, 30):
        x = torch.randn(m, 10, requires_grad=True)
        wanted, found, expected = leaves(x, projections), compiled(x), function(x)
        own = gradients(found, wanted)
        if not p:  # Inductor draws its own random numbers
            close(found, expected)
            close(own, gradients(expected, wanted), atol=1e-3)
    assert inductor.compiles <= 2


def test_modes_and_subclasses_see_the_operator():
    x, projections = given(GROUPS["q and v"])
    total = sum(2 * 7 * (n * 10 + r * (n + 10)) for n, r, _ in GROUPS["q and v"])
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        ys = fastlora.lora_linears(x, projections)
    assert counter.get_total_flops() == total
    wanted = leaves(x, projections)
    expected = gradients(fastlora.lora_linears(x, projections), wanted)
    unobserved = fastlora.lora_linears(x, projections)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:  # backward alone
        close(gradients(unobserved, wanted), expected)
    assert counter.get_total_flops() > total
    close(gradients(ys, wanted), expected)


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
    wrong = [right, right._replace(lora_A=None), Projection(torch.ones(3, 9)), Projection("weight")]
    wrong.append(right._replace(dropout_p=2.0))
    with pytest.raises(kind, match=said):
        fastlora.lora_linears(x, [wrong[i] for i in which])
