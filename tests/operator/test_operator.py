# SPDX-License-Identifier: Apache-2.0
"""`lora_linear` and its operators: errors, dropout, autograd, compile, autocast, checkpointing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from acceptance import KINDS, Case, accept, oracle, plain
from measuring import run_python
from torch._inductor.compile_fx import compile_fx
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora.flops import FORMULAS
from fastlora.operator import op, reference
from fastlora.operator.dropout import keep_mask, new_seed
from fastlora.operator.operands import Operands

OP = torch.ops.fastlora.lora_linears.default
BACKWARD = torch.ops.fastlora.lora_linears_backward.default
each_impl = pytest.mark.parametrize("impl", ["blocks", "triton"])
each_way = pytest.mark.parametrize("impl", ["blocks", "triton", "eager"])


def arguments(dtype=torch.float32, adapter=None, m=6, n=10, k=8, r=3, grad=True):
    shapes = {"x": (m, k), "weight": (n, k), "lora_A": (r, k), "lora_B": (n, r), "bias": (n,)}
    t = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    for name in ("lora_A", "lora_B"):
        t[name] = t[name].to(adapter or dtype)
    for name in ("x", "lora_A", "lora_B"):
        t[name].requires_grad_(grad)
    return t


def listed(*tensors):
    """What the operator takes in a list; an empty tensor for None."""
    return [torch.empty(0) if t is None else t for t in tensors]


def formula(x, weight, lora_A, lora_B, bias, scaling=1.0):
    return reference.output(x, weight, lora_A, lora_B, bias, None, scaling)


def grads(y, t, names=("x", "lora_A", "lora_B")):
    return torch.autograd.grad(y.square().sum(), [t[n] for n in names])


def test_a_tensor_that_outlived_its_transform():
    """Its type is Tensor and no transform is active any more."""
    leaked = []
    t = arguments(grad=False)
    torch.func.grad(lambda x: leaked.append(x) or x.sum())(t["x"])
    (x,) = leaked
    a = t["lora_A"].requires_grad_()
    y = fastlora.lora_linear(x, t["weight"], a, t["lora_B"])
    expected = fastlora.lora_linear(t["x"], t["weight"], a, t["lora_B"])
    assert torch.equal(*(torch.autograd.grad(out.sum(), a)[0] for out in (y, expected)))


@each_way
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_matches_the_oracle_through_autograd(impl, kind, p):
    case = Case(48, 40, 56, 6, kind=kind, dropout_p=p)
    t = case.tensors()
    x, a, b = (t[n].requires_grad_() for n in "xab")
    torch.manual_seed(5)
    y = fastlora.lora_linear(
        x, t["w"], a, b, t["bias"], scaling=case.scaling, dropout_p=p, training=True, impl=impl
    )
    results = dict(
        zip(("x", "lora_A", "lora_B"), torch.autograd.grad(y, (x, a, b), t["dy"]), strict=True),
        y=y.detach(),
    )
    torch.manual_seed(5)
    t["seed"] = new_seed(x.device) if p else None
    t = {n: v.detach() if v is not None else None for n, v in t.items()}
    expected, exact = plain(case, t), oracle(case, t)
    for name, result in results.items():
        accept(name, result, expected[name], exact[name])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference_is_the_formula(p):
    """In float64, by name too, with the gradients of every tensor in closed form."""
    t = {n: v.detach().double().requires_grad_() for n, v in arguments().items()}
    x, w, a, b, bias = t.values()
    torch.manual_seed(1)
    y = fastlora.lora_linear(**t, scaling=0.7, dropout_p=p, training=True, impl="reference")
    torch.manual_seed(1)
    keep = keep_mask(new_seed(x.device), range(6), 8, p) / (1 - p)
    x_hat = x * keep
    torch.testing.assert_close(y, x @ w.T + bias + 0.7 * x_hat @ a.T @ b.T)
    dy = torch.randn_like(y)
    ds = 0.7 * dy @ b
    closed = dy @ w + ds @ a * keep, dy.T @ x, ds.T @ x_hat, 0.7 * dy.T @ (x_hat @ a.T), dy.sum(0)
    for grad, right in zip(torch.autograd.grad(y, list(t.values()), dy), closed, strict=True):
        torch.testing.assert_close(grad, right)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradcheck_and_double_backward(p):
    t = arguments(torch.float64, m=3, n=4, k=5, r=2)
    seed = torch.tensor([7]) if p else None
    inputs = [t[n].requires_grad_() for n in ("x", "weight", "lora_A", "lora_B", "bias")]

    def layer(x, weight, lora_A, lora_B, bias):
        return OP(x, listed(weight, lora_A, lora_B, bias, seed), 0.5, [p], "blocks")[0][0]

    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)
    first = torch.autograd.grad(layer(*inputs).square().sum(), inputs, create_graph=True)
    assert all(g.requires_grad for g in first)  # gradgradcheck leaves out what does not


@each_impl
@pytest.mark.parametrize("kind", ["fp32", "bf16-fp32"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_opcheck(impl, kind, p):
    t = arguments(*KINDS[kind])
    seed = torch.tensor([11]) if p else None
    # The test of eager against traced gradients compares bits, which bfloat16 does not give.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if kind == "fp32":
        tests.append("test_aot_dispatch_dynamic")
    lists = listed(*(t[n] for n in ("weight", "lora_A", "lora_B", "bias")), seed)
    args = (t["x"], lists, 0.5, [p], impl)
    opcheck(OP, args, test_utils=tests)
    (y,), (s,) = OP(*args)
    x, weight, a, b = (t[n].detach() for n in ("x", "weight", "lora_A", "lora_B"))
    lists = (listed(weight, a, b, None, seed), [s.detach()], 0.5, [p])
    for need_x, need_a, need_b in itertools.product((True, False), repeat=3):
        needs = need_x, [need_a], [need_b]
        backward_args = [torch.randn_like(y).detach()], x, *lists, impl, *needs
        opcheck(BACKWARD, backward_args, test_utils=["test_schema", "test_faketensor"])


@each_way
def test_every_combination_of_gradients(impl):
    names = ("x", "weight", "lora_A", "lora_B", "bias")
    t = arguments(grad=False)
    full = {n: v.clone().requires_grad_() for n, v in t.items()}
    y = fastlora.lora_linear(**full, impl=impl)
    expected = dict(zip(names, grads(y, full, names), strict=True))
    for wanted in itertools.product((False, True), repeat=5):
        leaves = {n: t[n].clone().requires_grad_(w) for n, w in zip(names, wanted, strict=True)}
        y = fastlora.lora_linear(**leaves, impl=impl)
        assert y.requires_grad == any(wanted)
        if not any(wanted):
            continue
        y.square().sum().backward()
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, expected[name], msg=f"{name} of {wanted}")
            else:
                assert leaf.grad is None


@each_way
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)])
def test_leading_dimensions(impl, lead):
    t = arguments()
    x = torch.randn(*lead, 8, requires_grad=True)
    y = fastlora.lora_linear(**{**t, "x": x}, scaling=0.5, impl=impl)
    expected = formula(**{**t, "x": x}, scaling=0.5)
    assert y.shape == (*lead, 10)
    torch.testing.assert_close(y, expected)
    g = grads(y, {**t, "x": x})
    assert g[0].shape == x.shape and all(torch.isfinite(v).all() for v in g)


@each_way
def test_inputs_are_never_modified(impl):
    t = arguments(torch.bfloat16)
    before = {n: (v._version, v.detach().clone()) for n, v in t.items()}
    y = fastlora.lora_linear(**t, scaling=0.5, dropout_p=0.3, training=True, impl=impl)
    dy = torch.ones_like(y)
    torch.autograd.grad(y, [t["x"], t["lora_A"], t["lora_B"]], dy)
    assert (dy == 1).all() and dy._version == 0
    for name, (version, value) in before.items():
        assert t[name]._version == version and torch.equal(t[name], value), name


@each_way
def test_backward_twice_gives_the_same(impl):
    t = arguments()
    y = fastlora.lora_linear(**t, dropout_p=0.5, training=True, impl=impl)
    leaves = [t["x"], t["lora_A"], t["lora_B"]]
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.sum(), leaves)
    assert all(map(torch.equal, first, second))


@each_impl
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_what_is_kept_for_backward(impl, kind, p):
    """x itself, the parameters, s and the seed: no mask, no dropped or wider copy of x."""
    t = arguments(*KINDS[kind], m=512, n=16, k=256, r=4)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fastlora.lora_linear(**t, dropout_p=p, training=True, impl=impl)
    inputs = {v.data_ptr() for v in t.values()}
    extra = sum(v.numel() * v.itemsize for v in kept if v.data_ptr() not in inputs)
    s_bytes = 512 * 4 * t["lora_A"].itemsize
    assert extra == s_bytes + (8 if p else 0)


def test_forward_needs_no_temporary_as_wide_as_the_output():
    m, n = 4096, 2048
    t = arguments(torch.bfloat16, torch.float32, m=m, n=n, k=64, r=8, grad=False)
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as prof:
        fastlora.lora_linear(**t, dropout_p=0.1, training=True, impl="blocks")
    live = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert peak < 1.5 * m * n * 2  # the output and blocks of it in float32


@each_way
def test_dropout_is_that_of_torch_in_distribution(impl):
    """Mean and keep rate of the mask, independence of two calls, and reproducibility by seed."""
    x = torch.ones(128, 64)
    a, b = torch.eye(64), torch.eye(64)
    weight = torch.zeros(64, 64)

    def draw(seed, p=0.3, training=True):
        torch.manual_seed(seed)
        return fastlora.lora_linear(x, weight, a, b, dropout_p=p, training=training, impl=impl)

    y = draw(0)
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.7))
    assert abs(kept.float().mean() - 0.7) < 5 * (0.21 / kept.numel()) ** 0.5
    assert abs((kept & (draw(1) != 0)).float().mean() - 0.49) < 0.03
    assert torch.equal(y, draw(0))
    assert torch.equal(draw(0, training=False), x)
    assert torch.equal(draw(0, p=0.0), x)
    assert torch.equal(draw(0, p=1.0), torch.zeros_like(x))
    columns, rows = kept.float().mean(0), kept.float().mean(1)
    assert columns.std() < 0.06 and rows.std() < 0.08  # no column or row is favoured


def test_successive_seeds_differ():
    seeds = {int(new_seed(torch.device("cpu"))) for _ in range(100)}
    assert len(seeds) == 100


@each_way
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_draws_the_same_mask_again(impl, reentrant):
    t = arguments(m=40, k=64)

    def layer(x):
        return fastlora.lora_linear(**{**t, "x": x}, dropout_p=0.5, training=True, impl=impl)

    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(9)
        y = call(t["x"])
        t["x"].grad = t["lora_A"].grad = None
        y.square().sum().backward()
        results.append((y, t["x"].grad.clone(), t["lora_A"].grad.clone()))
    assert all(map(torch.equal, *results))


@each_way
def test_compiles_without_a_break_and_for_any_number_of_rows(impl):
    t = arguments()
    compiles = 0

    def backend(graph, inputs):
        nonlocal compiles
        compiles += 1
        return graph.forward

    def layer(x, scaling):
        return fastlora.lora_linear(**{**t, "x": x}, scaling=scaling, impl=impl)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for m, scaling in [(6, 2.0), (7, 3.0), (8, 1.0), (9, 0.5), (33, 0.1), (2, 5.0)]:
        x = torch.randn(m, 8, requires_grad=True)
        torch.testing.assert_close(compiled(x, scaling), layer(x, scaling))
    # One with everything static, one or two to learn that rows and scaling vary.
    assert compiles <= 3


def test_a_scaling_tensor_never_recompiles():
    t = arguments()
    compiles = 0

    def backend(graph, inputs):
        nonlocal compiles
        compiles += 1
        return compile_fx(graph, inputs)

    def layer(scaling):
        return fastlora.lora_linear(**t, scaling=scaling)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for scaling in (2.0, 1.0, 0.3, 0.0, -5.0):
        y = compiled(torch.tensor(scaling))
        torch.testing.assert_close(y, layer(scaling))
        for mine, theirs in zip(grads(y, t), grads(layer(scaling), t), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    assert compiles == 1


@each_way
def test_inductor_forward_and_backward(impl):
    t = arguments(m=16, k=32)

    def layer(x):
        y = fastlora.lora_linear(**{**t, "x": x}, scaling=0.3, dropout_p=0.0, impl=impl)
        return torch.nn.functional.gelu(y)

    compiled = torch.compile(layer, fullgraph=True)
    expected, result = layer(t["x"]), compiled(t["x"])
    torch.testing.assert_close(result, expected)
    for mine, theirs in zip(grads(result, t), grads(expected, t), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_compiled_dropout_uses_one_mask_in_both_directions():
    weight, b = torch.zeros(512, 512), torch.eye(512)

    def layer(x, a):
        return fastlora.lora_linear(x, weight, a, b, dropout_p=0.5, training=True, impl="blocks")

    x, a = torch.ones(8, 512, requires_grad=True), torch.eye(512)
    y = torch.compile(layer, fullgraph=True)(x, a)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # both are mask / (1 - p)
    assert 0.4 < (y == 0).float().mean() < 0.6


@each_way
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_autocast(impl, adapter):
    t = arguments()
    for name in ("lora_A", "lora_B"):
        t[name] = t[name].detach().to(adapter).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = fastlora.lora_linear(**t, impl=impl)
    assert y.dtype == torch.bfloat16
    exact = formula(**{n: v.double() for n, v in t.items()})
    assert (y.double() - exact).norm() < 0.01 * exact.norm()
    g = grads(y, t)
    assert [v.dtype for v in g] == [torch.float32, adapter, adapter]


@each_impl
@pytest.mark.parametrize("mode", ["base", "low_rank", "both"])
def test_float32_adapters_keep_their_precision_under_autocast(impl, mode):
    """The rule on what autocast hands over: x and weight in bf16, adapters in float32."""
    case = Case(64, 48, 80, 8, kind="bf16-fp32", mode=mode)
    t = case.tensors()
    wide = {n: t[n].float() for n in ("w", "bias")}
    x, a, b = (t[n].float().requires_grad_() for n in "xab")
    with torch.autocast("cpu", torch.bfloat16):
        y = fastlora.lora_linear(x, wide["w"], a, b, wide["bias"], scaling=case.scaling, impl=impl)
        da, db = torch.autograd.grad(y, (a, b), t["dy"])
    expected, exact = plain(case, t), oracle(case, t)
    for name, result in {"y": y.detach(), "lora_A": da, "lora_B": db}.items():
        accept(name, result, expected[name], exact[name])


@each_impl
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["fp32", "bf16-fp32"])
def test_fake_and_real_gradients_lie_alike(impl, kind, p):
    t = arguments(*KINDS[kind], grad=False)
    x, *args = (t[n].t().contiguous().t() for n in ("x", "weight", "lora_A", "lora_B"))
    seed = torch.tensor([1]) if p else None
    (y,), (s,) = OP(x, listed(*args, None, seed), 0.5, [p], impl)
    dy = torch.randn_like(y).t().contiguous().t()
    lists = (listed(*args, None, seed), [s], 0.5, [p])
    backward_args = ([dy], x, *lists, impl, True, [True], [True])
    opcheck(BACKWARD, backward_args, test_utils=["test_faketensor"])


def test_float64_runs_on_torch_and_not_on_triton():
    t = arguments(torch.float64)
    torch.testing.assert_close(fastlora.lora_linear(**t, impl="blocks"), formula(**t))
    with pytest.raises(TypeError, match="x is float64, which impl='triton' does not take"):
        fastlora.lora_linear(**t, impl="triton")


WRONG = {
    "x scalar": ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension"),
    "x too wide": ({"x": torch.ones(2, 9)}, ValueError, r"weight must be \[N, 9\].*got \(10, 8\)"),
    "weight 1-D": ({"weight": torch.ones(8)}, ValueError, r"weight must be 2-D, got shape \(8,\)"),
    "A width": ({"lora_A": torch.ones(3, 7)}, ValueError, r"lora_A must be \[R, 8\]"),
    "A rank 0": ({"lora_A": torch.ones(0, 8)}, ValueError, "lora_A must have rank at least 1"),
    "B rank": ({"lora_B": torch.ones(10, 4)}, ValueError, r"lora_B must be \[10, 3\]"),
    "B rows": ({"lora_B": torch.ones(9, 3)}, ValueError, r"lora_B must be \[10, 3\]"),
    "bias": ({"bias": torch.ones(9)}, ValueError, r"bias must be \[10\]"),
    "x int": ({"x": torch.ones(2, 8).long()}, TypeError, "x must be float32.*int64"),
    "weight bf16": ({"weight": torch.ones(10, 8).bfloat16()}, TypeError, "weight must have the"),
    "bias bf16": ({"bias": torch.ones(10).bfloat16()}, TypeError, "bias must have the dtype of x"),
    "A half": ({"lora_A": torch.ones(3, 8).half()}, TypeError, "lora_A must have the dtype of x"),
    "device": ({"weight": torch.ones(10, 8, device="meta")}, ValueError, "weight is on meta"),
    "bias device": ({"bias": torch.ones(10, device="meta")}, ValueError, "bias is on meta"),
    "scaling": ({"scaling": "1"}, TypeError, "scaling must be a number or a 0-d tensor, got str"),
    "scaling bool": ({"scaling": True}, TypeError, "scaling must be a number.*got bool"),
    "scaling nan": (
        {"scaling": math.nan},
        ValueError,
        "scaling must be finite in float32, got nan",
    ),
    "dropout str": ({"dropout_p": "a"}, TypeError, "dropout_p must be a number, got str"),
    "scaling 1-D": ({"scaling": torch.ones(2)}, ValueError, r"0-d tensor on cpu, got shape \(2,\)"),
    "dropout": ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1, got 1.5"),
    "dropout nan": ({"dropout_p": float("nan")}, ValueError, "dropout_p must be between"),
    "impl": ({"impl": "cuda"}, ValueError, "impl must be one of auto, triton.*got 'cuda'"),
    "x a list": ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
    "bias a list": ({"bias": [1.0]}, TypeError, "bias must be a Tensor or None, got list"),
    "B wider than A": (
        arguments(torch.bfloat16) | {"lora_B": torch.ones(10, 3)},
        TypeError,
        "lora_B must have the dtype of lora_A",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    change, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        fastlora.lora_linear(**{**arguments(), **change})


@pytest.mark.parametrize(
    ("before", "said"),
    [("", "TRITON_INTERPRET=1"), ("sys.modules['triton'] = None", "Triton is not installed; pip")],
    ids=["not interpreted", "not installed"],
)
def test_where_triton_cannot_run_that_is_said(before, said):
    if torch.cuda.is_available() and not before:
        pytest.skip("a GPU is here: the kernels run without the interpreter")
    code = f"""
import sys
{before}
import torch, fastlora
o = torch.ones(2, 2)
try:
    fastlora.lora_linear(o, o, o, o, impl="triton")
except RuntimeError as error:
    print(error)
"""
    out = run_python(code, TRITON_INTERPRET="0")
    assert "impl='triton' cannot run on x.device 'cpu'" in out and said in out


def test_import_needs_neither_triton_nor_the_extras():
    code = """
import sys
for name in ("triton", "peft", "transformers", "matplotlib", "tqdm"):
    sys.modules[name] = None  # importing it raises ImportError
import torch, fastlora
layer = fastlora.LoRALinear(4, 3)
print(layer(torch.ones(2, 4)).shape)
"""
    assert "torch.Size([2, 3])" in run_python(code, TRITON_INTERPRET="0")


def test_flops_are_counted():
    t = arguments(torch.float32, m=10, n=6, k=8, r=2)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        y = fastlora.lora_linear(**t, impl="blocks")
    assert counter.get_total_flops() == 2 * 10 * (6 * 8 + 2 * (6 + 8))
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        torch.autograd.grad(y.sum(), (t["x"], t["lora_A"], t["lora_B"]))
    assert counter.get_total_flops() == 2 * 10 * (6 * 8 + 2 * (2 * 6 + 2 * 8))


@each_impl
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_short_way_gives_what_the_operator_gives(impl, p):
    """Without the dispatcher, in eager mode: the same bits, and the same gradients."""
    t = arguments(torch.bfloat16, torch.float32)
    seed = torch.tensor([7]) if p else None
    x, *tensors = (t[name] for name in ("x", "weight", "lora_A", "lora_B"))
    (through,), _ = OP(x, listed(*tensors, None, seed), 0.5, [p], impl)
    projections = [Operands(*tensors, None, seed, 0.5, p)]
    (direct,) = op.run(x, projections, impl)
    assert torch.equal(direct, through)
    leaves = [x, *tensors[1:]]
    mine = torch.autograd.grad(direct.sum(), leaves)
    assert all(map(torch.equal, mine, torch.autograd.grad(through.sum(), leaves)))
    with torch.no_grad():
        assert torch.equal(op.run(x, projections, impl)[0], direct)


# Transforms


def _formula(x, w, a, b):
    return x @ w.t() + 0.5 * x @ a.t() @ b.t()


def _transformed(function, x, w, a, b):
    """What `torch.func` makes of y, of its gradient for a, and of its tangents."""
    tangents = tuple(map(torch.sin, (x, w, a, b)))
    per_sample = torch.func.vmap(
        torch.func.grad(lambda a, row: function(row[None], w, a, b).square().sum()), (None, 0)
    )
    yield torch.func.jvp(function, (x, w, a, b), tangents)[1]
    yield torch.func.jacrev(function, argnums=2)(x, w, a, b)
    yield torch.func.jacfwd(function, argnums=0)(x, w, a, b)
    yield per_sample(a, x)
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(*pair) for pair in zip((x, w, a, b), tangents, strict=True)]
        yield forward_ad.unpack_dual(function(*dual)).tangent


@pytest.mark.parametrize("requires_grad", [True, False])
def test_function_transforms_and_forward_mode(requires_grad):
    """Not the operator's kernels, but what plain torch gives; never zeros without a word."""
    sizes = ((3, 5), (4, 5), (2, 5), (4, 2))
    given = [torch.randn(*s, dtype=torch.float64, requires_grad=requires_grad) for s in sizes]

    def operator(x, w, a, b):
        return fastlora.lora_linear(x, w, a, b, scaling=0.5)

    wanted = list(_transformed(_formula, *given))
    for found, expected in zip(_transformed(operator, *given), wanted, strict=True):
        torch.testing.assert_close(found, expected)
        assert expected.abs().max() > 0.1
