# SPDX-License-Identifier: Apache-2.0
"""`lora_linear`'s operators: under autograd, compilers, autocast, checkpoints and transforms."""

import itertools

import pytest
import torch
from acceptance import KINDS, Case, accept, oracle, plain
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora.flops import FORMULAS
from fastlora.operator import op
from fastlora.operator.dropout import keep_mask, new_seed
from fastlora.operator.eager import reference
from fastlora.operator.operands import Operands

OP = torch.ops.fastlora.lora_linears.default
BACKWARD = torch.ops.fastlora.lora_linears_backward.default
each_impl = pytest.mark.parametrize("impl", ["blocks", "triton"])
each_way = pytest.mark.parametrize("impl", ["blocks", "triton", "eager"])
each_kind = pytest.mark.parametrize("kind", KINDS)


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
    return reference(x, weight, lora_A, lora_B, bias, None, scaling)


def grads(y, t, names=("x", "lora_A", "lora_B")):
    return torch.autograd.grad(y.square().sum(), [t[n] for n in names])


def alike(found, expected, **tolerance):
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_a_tensor_that_outlived_its_transform():
    """Its type is Tensor and no transform is active any more."""
    leaked, t = [], arguments(grad=False)
    torch.func.grad(lambda x: leaked.append(x) or x.sum())(t["x"])
    a = t["lora_A"].requires_grad_()
    ys = (fastlora.lora_linear(**{**t, "x": x}) for x in (leaked[0], t["x"]))
    assert torch.equal(*(torch.autograd.grad(y.sum(), a)[0] for y in ys))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference_is_the_formula(p):
    """In float64, by name too; its gradients are PyTorch's."""
    x, w, a, b, bias = t = [v.detach().double() for v in arguments().values()]
    torch.manual_seed(1)
    y = fastlora.lora_linear(*t, scaling=0.7, dropout_p=p, training=True, impl="reference")
    torch.manual_seed(1)
    x_hat = x * keep_mask(new_seed(x.device), range(6), 8, p) / (1 - p)
    torch.testing.assert_close(y, x @ w.T + bias + 0.7 * x_hat @ a.T @ b.T)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("way", ["operator", "direct"])
def test_gradcheck_and_double_backward(way, p):
    t = arguments(torch.float64, m=3, n=4, k=5, r=2)
    seed = torch.tensor([7]) if p else None
    inputs = [t[n].requires_grad_() for n in ("x", "weight", "lora_A", "lora_B", "bias")]

    def layer(x, *tensors):
        if way == "operator":
            return OP(x, listed(*tensors, None, seed), 0.5, [p], "blocks", None)[0][0]
        return op.run(x, [Operands(*tensors, seed, 0.5, p)], "blocks")[0]

    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)
    first = torch.autograd.grad(layer(*inputs).square().sum(), inputs, create_graph=True)
    assert all(g.requires_grad for g in first)  # gradgradcheck leaves out what does not


@each_way
@pytest.mark.parametrize("lead", [(), (5,), (2, 1, 3), (0,), (2, 0, 3)])
def test_leading_dimensions(impl, lead):
    t = arguments() | {"x": torch.randn(*lead, 8, requires_grad=True)}
    y = fastlora.lora_linear(**t, scaling=0.5, impl=impl)
    assert y.shape == (*lead, 10)
    torch.testing.assert_close(y, formula(**t, scaling=0.5))
    (both,) = fastlora.lora_linears(t["x"], [fastlora.Projection(*list(t.values())[1:], 0.5)])
    torch.testing.assert_close(both, y)
    g = grads(y, t)
    assert g[0].shape == t["x"].shape and all(torch.isfinite(v).all() for v in g)


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
    assert all(map(torch.equal, first, torch.autograd.grad(y.sum(), leaves)))


@each_impl
@each_kind
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_what_is_kept_for_backward(impl, kind, p):
    """x itself, the parameters, s and the seed: no mask, no dropped or wider copy of x."""
    t, kept = arguments(*KINDS[kind], m=512, n=16, k=256, r=4), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fastlora.lora_linear(**t, dropout_p=p, training=True, impl=impl)
    inputs = {v.data_ptr() for v in t.values()}
    extra = sum(v.numel() * v.itemsize for v in kept if v.data_ptr() not in inputs)
    assert extra == 512 * 4 * t["lora_A"].itemsize + (8 if p else 0)


def test_forward_needs_no_temporary_as_wide_as_the_output():
    m, n = 4096, 2048
    t = arguments(torch.bfloat16, torch.float32, m=m, n=n, k=64, r=8, grad=False)
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as prof:
        fastlora.lora_linear(**t, dropout_p=0.1, training=True, impl="blocks")
    events = prof.profiler.kineto_results.events()
    live = itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    assert max(live) < 1.5 * m * n * 2  # the output and blocks of it in float32


@each_way
def test_dropout_is_that_of_torch_in_distribution(impl):
    """Mean and keep rate of the mask, independence of two calls, and reproducibility by seed."""
    x, a, weight = torch.ones(128, 64), torch.eye(64), torch.zeros(64, 64)

    def draw(seed, p=0.3, training=True):
        torch.manual_seed(seed)
        return fastlora.lora_linear(x, weight, a, a, dropout_p=p, training=training, impl=impl)

    y = draw(0)
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.7))
    assert abs(kept.float().mean() - 0.7) < 5 * (0.21 / kept.numel()) ** 0.5
    assert abs((kept & (draw(1) != 0)).float().mean() - 0.49) < 0.03
    assert torch.equal(y, draw(0))
    assert torch.equal(draw(0, training=False), x) and torch.equal(draw(0, p=0.0), x)
    assert torch.equal(draw(0, p=1.0), torch.zeros_like(x))
    columns, rows = kept.float().mean(0), kept.float().mean(1)
    assert columns.std() < 0.06 and rows.std() < 0.08  # no column or row is favoured


def test_successive_seeds_differ():
    assert len({int(new_seed(torch.device("cpu"))) for _ in range(100)}) == 100


@each_way
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_draws_the_same_mask_again(impl, reentrant):
    t, results = arguments(m=40, k=64), []

    def layer(x):
        return fastlora.lora_linear(**{**t, "x": x}, dropout_p=0.5, training=True, impl=impl)

    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(9)
        y = call(t["x"])
        t["x"].grad = t["lora_A"].grad = None
        y.square().sum().backward()
        results.append((y, t["x"].grad, t["lora_A"].grad))
    assert all(map(torch.equal, *results))


# Compilers


@each_way
def test_compiles_without_a_break_and_for_any_number_of_rows(impl):
    t, graphs = arguments(), []

    def layer(x, scaling):
        return fastlora.lora_linear(**{**t, "x": x}, scaling=scaling, impl=impl)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for m, scaling in [(6, 2.0), (7, 3.0), (8, 1.0), (9, 0.5), (33, 0.1), (2, 5.0)]:
        x = torch.randn(m, 8, requires_grad=True)
        torch.testing.assert_close(compiled(x, scaling), layer(x, scaling))
    # One with everything static, one or two to learn that rows and scaling vary.
    assert len(graphs) <= 3


def test_a_scaling_tensor_never_recompiles(inductor):
    t = arguments()

    def layer(scaling):
        return fastlora.lora_linear(**t, scaling=scaling)

    compiled = torch.compile(layer, fullgraph=True, backend=inductor)
    for i, scaling in enumerate((2.0, 1.0, 0.3, 0.0, -5.0)):
        y, right = compiled(torch.tensor(scaling)), layer(scaling)
        one = torch.ones(1, 71 + i)  # in eager mode, of another size each time
        fastlora.lora_linear(one, one, one, one[:, :1])
        torch.testing.assert_close(y, right)
        alike(grads(y, t), grads(right, t), rtol=1e-5, atol=1e-4)
    assert inductor.compiles == 1


@each_way
def test_inductor_forward_and_backward(impl):
    t = arguments(m=16, k=32)

    def layer(x):
        y = fastlora.lora_linear(**{**t, "x": x}, scaling=0.3, impl=impl)
        return torch.nn.functional.gelu(y)

    expected, result = layer(t["x"]), torch.compile(layer, fullgraph=True)(t["x"])
    torch.testing.assert_close(result, expected)
    alike(grads(result, t), grads(expected, t))


def test_compiled_dropout_uses_one_mask_in_both_directions():
    weight, eye = torch.zeros(512, 512), torch.eye(512)

    def layer(x):
        return fastlora.lora_linear(x, weight, eye, eye, dropout_p=0.5, training=True)

    x = torch.ones(8, 512, requires_grad=True)
    y = torch.compile(layer, fullgraph=True)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # both are mask / (1 - p)
    assert 0.4 < (y == 0).float().mean() < 0.6


@each_impl
@pytest.mark.parametrize("mode", ["base", "low_rank", "both"])
def test_float32_adapters_keep_their_precision_under_autocast(impl, mode):
    """The rule on what autocast hands over: x and weight in bf16, adapters in float32."""
    case = Case(64, 48, 80, 8, kind="bf16-fp32", mode=mode)
    t = case.tensors()
    x, a, b = (t[n].float().requires_grad_() for n in "xab")
    w, bias = t["w"].float(), t["bias"].float()
    with torch.autocast("cpu", torch.bfloat16):
        y = fastlora.lora_linear(x, w, a, b, bias, scaling=case.scaling, impl=impl)
        da, db = torch.autograd.grad(y, (a, b), t["dy"])
    expected, exact = plain(case, t), oracle(case, t)
    for name, result in {"y": y.detach(), "lora_A": da, "lora_B": db}.items():
        accept(name, result, expected[name], exact[name])


@each_impl
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["fp32", "bf16-fp32"])
def test_fake_and_real_lie_alike(impl, kind, p):
    """Whatever the strides of what is given, and whichever gradients are asked for."""
    t = arguments(*KINDS[kind], grad=False)
    x, *args = (t[n].t().contiguous().t() for n in ("x", "weight", "lora_A", "lora_B"))
    operands = listed(*args, t["bias"], None, torch.tensor([1]) if p else None)
    opcheck(OP, (x, operands, 0.5, [p], impl, None), test_utils=["test_schema", "test_faketensor"])
    (y,), (s,) = OP(x, operands, 0.5, [p], impl, None)
    dy = torch.randn_like(y).t().contiguous().t()
    for need_x, need_a, need_b in itertools.product((True, False), repeat=3):
        given = [dy], x, operands, [s], 0.5, [p], impl, need_x, [need_a], [need_b], [False], None
        opcheck(BACKWARD, given, test_utils=["test_schema", "test_faketensor"])


def test_flops_are_counted():
    t = arguments(torch.float32, m=10, n=6, k=8, r=2)

    def counted(call):
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            return call(), counter.get_total_flops()

    y, flops = counted(lambda: fastlora.lora_linear(**t, impl="blocks"))
    assert flops == 2 * 10 * (6 * 8 + 2 * (6 + 8))
    assert counted(lambda: grads(y, t))[1] == 2 * 10 * (6 * 8 + 2 * (2 * 6 + 2 * 8))


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
