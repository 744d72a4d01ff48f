# SPDX-License-Identifier: Apache-2.0
"""Every implementation against the oracle; the Triton kernels run in the interpreter here."""

from __future__ import annotations

import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import fastlora_kernels
import pytest
import torch
import triton
from acceptance import (
    KINDS,
    RANKS,
    Case,
    oracle,
    run,
    small_cases,
    strided,
    verify,
    verify_exactly,
)
from fastlora_kernels import columns, configs, launch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_body import Plain

from fastlora.operator import blocks, library
from fastlora.operator.dropout import keep_mask

BODIES = {"triton": fastlora_kernels, "blocks": blocks, "eager": Plain()}
each_body = pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)


@each_body
@pytest.mark.parametrize("case", small_cases(), ids=str)
def test_acceptance_rule(body, case):
    verify(body, case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", [*BODIES, "library"])
def test_without_a_bias(name, kind, p, monkeypatch):
    body = BODIES.get(name, library)
    verify(body, Case(33, 50, 70, 5, kind=kind, dropout_p=p, bias=False))
    monkeypatch.setattr(blocks, "FEW", 0)
    verify(body, Case(33, 50, 70, 5, kind=kind, mode="low_rank", dropout_p=p, bias=False))


@each_body
@pytest.mark.parametrize("r", RANKS)
def test_every_rank(body, r):
    kind = list(KINDS)[r % len(KINDS)]
    verify(body, Case(40, 48, 56, r, kind=kind, dropout_p=0.2 * (r % 2)))


@each_body
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(37, 29, 43, 6), (1, 17, 19, 1), (1, 1, 1, 1), (65, 1, 64, 2)])
def test_small_integers_are_exact(body, shape, kind, p):
    verify_exactly(body, Case(*shape, kind=kind, dropout_p=p))


@each_body
def test_more_rows_than_one_split_or_block(body):
    verify(body, Case(600, 40, 33, 4, kind="bf16", dropout_p=0.1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_more_rows_than_one_block_of_the_torch_implementation(kind, p):
    verify(blocks, Case(2 * blocks.ROWS["cpu"] + 7, 50, 70, 6, kind=kind, dropout_p=p))


@pytest.mark.parametrize("case", small_cases(), ids=str)
def test_the_torch_implementation_of_large_inputs(case, monkeypatch):
    """Small ones go another way: blocks of a few rows, and float32 factors split into terms."""
    monkeypatch.setattr(blocks, "FEW", 0)
    monkeypatch.setattr(blocks, "SHORT", 0)
    monkeypatch.setitem(blocks.ROWS, "cpu", 16)
    verify(blocks, case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_library_products_beside_the_kernels(kind, p):
    for mode in ("base", "low_rank", "both"):
        verify(library, Case(33, 50, 70, 5, kind=kind, mode=mode, dropout_p=p))
    t = Case(9, 10, 11, 3, kind=kind, dropout_p=p).tensors()
    rest = (t["seed"], 0.5, p)
    _, s = library.forward(t["x"], t["w"], t["a"], t["b"], None, *rest)
    for needs in itertools.product((False, True), repeat=3):
        grads = library.backward(t["dy"], t["x"], t["w"], t["a"], t["b"], s, *rest, needs)
        assert tuple(grad is not None for grad in grads) == needs


@pytest.mark.parametrize("kind", ["bf16", "fp16-fp32"])
@pytest.mark.parametrize("r", [16, 40])
def test_many_splits_of_rows_and_columns(kind, r, monkeypatch):
    """As on a chip with many processors; above rank 32 ds has programs of its own."""
    monkeypatch.setattr(columns, "PROGRAMS", 100)
    for M, N in ((140, 150), (40, 300)):
        verify(fastlora_kernels, Case(M, N, 20, r, kind=kind, dropout_p=0.2))


def test_ds_and_db_come_from_one_launch():
    for r, needs in itertools.product((16, 128), ((True, True), (True, False), (False, True))):
        dy, b, s = (torch.empty(*d, device="meta") for d in ((999, 500), (500, r), (999, r)))
        with launch.recording(configs.Chip((9, 0), 227 << 10, 132)) as calls:
            found = columns.ds_db(dy, s, b, need_ds=needs[0], need_db=needs[1])
        assert tuple(f is not None for f in found) == needs
        assert [c.args["t_ptr"] is dy for c in calls if "t_ptr" in c.args] == [True]


@each_body
@pytest.mark.parametrize("p", [1.0, 0.999999, 0.000001])
def test_dropout_at_the_ends(body, p):
    verify(body, Case(150, 60, 140, 8, dropout_p=p))


@each_body
@pytest.mark.parametrize("empty", ["M", "N", "K"])
def test_empty_dimensions(body, empty):
    sizes = {"M": 5, "N": 6, "K": 7, "R": 2, empty: 0}
    case = Case(**sizes, dropout_p=0.3)
    t = Case(**{**sizes, empty: 1}, dropout_p=0.3).tensors()
    cut = {"M": ("x", "dy"), "N": ("w", "b", "bias"), "K": ("x", "w", "a")}[empty]
    for name in cut:
        t[name] = t[name].narrow(0 if empty != "K" else 1, 0, 0)
    if empty == "N":
        t["dy"] = t["dy"][:, :0]
    results, exact = run(body, case, t), oracle(case, t)
    for name, result in results.items():
        torch.testing.assert_close(result, exact[name].to(result.dtype), msg=name)


@each_body
@pytest.mark.parametrize("name", ["x", "w", "a", "b", "dy"])
@pytest.mark.parametrize("kind", ["fp32", "bf16-fp32"])
def test_strides(body, name, kind):
    case = Case(21, 18, 26, 3, kind=kind, dropout_p=0.25)
    t = case.tensors()
    expected = run(body, case, t)
    for how, other in strided(t[name]):
        assert torch.equal(other, t[name])
        results = run(body, case, {**t, name: other})
        for key, result in results.items():
            # PyTorch's own gradients lie as their inputs do.
            dense = key == "y" or not isinstance(body, Plain)
            assert result.is_contiguous() or not dense, f"{name} {how}: {key}"
            if body is fastlora_kernels:
                assert torch.equal(result, expected[key]), f"{name} {how}: {key}"
            else:  # a library may add in another order
                torch.testing.assert_close(result, expected[key], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(
    "name, k, strides",
    [("x", 6, (2**30, 1)), ("x", 6, (1, 2**29 + 8)), ("x", 40, (1, 2**26)), ("dy", 6, (1, 2**30))],
)
def test_offsets_past_two_billion_elements(name, k, strides):
    """Rows or columns so far apart that index times stride, or a step of a loop, needs int64.

    The memory is reserved and, but for a few pages, never touched.
    """
    case = Case(4, 5, k, 2)
    t = case.tensors()
    expected = run(fastlora_kernels, case, t)
    size = 1 + sum((n - 1) * stride for n, stride in zip(t[name].shape, strides, strict=True))
    far = torch.empty(size).as_strided(t[name].shape, strides)
    assert size > 2**31
    results = run(fastlora_kernels, case, {**t, name: far.copy_(t[name])})
    for key, result in results.items():  # NumPy may add in another order for other strides
        torch.testing.assert_close(result, expected[key], msg=key)


@given(
    sizes=st.tuples(*[st.integers(1, 70)] * 3),
    r=st.integers(1, 40),
    kind=st.sampled_from(list(KINDS)),
    p=st.sampled_from([0.0, 0.5]),  # 1 / (1 - p) is an integer
    transposed=st.sets(st.sampled_from(["x", "w", "a", "b", "dy"])),
)
@settings(max_examples=30, derandomize=True, deadline=None)
def test_any_problem_of_small_integers_is_exact(sizes, r, kind, p, transposed):
    case = Case(*sizes, r, kind=kind, dropout_p=p)

    class Transposed:
        """The kernels on tensors that lie the other way round in memory."""

        @staticmethod
        def forward(x, w, a, b, *rest):
            return fastlora_kernels.forward(*lie(x=x, w=w, a=a, b=b), *rest)

        @staticmethod
        def backward(dy, x, w, a, b, *rest):
            return fastlora_kernels.backward(*lie(dy=dy, x=x, w=w, a=a, b=b), *rest)

    def lie(**tensors):
        return [v.t().contiguous().t() if n in transposed else v for n, v in tensors.items()]

    verify_exactly(Transposed, case)


def test_grids_end_where_no_limit_is():
    """Only the first dimension of a grid may have more than 65,535 programs."""
    m, n, k, r = 1 << 24, 64, 64, 16
    shapes = {"x": (m, k), "w": (n, k), "a": (r, k), "b": (n, r), "dy": (m, n), "s": (m, r)}
    t = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with launch.recording(configs.Chip((8, 0), 166912, 108)) as calls:
        factors = t["x"], t["w"], t["a"], t["b"]
        fastlora_kernels.forward(*factors, None, None, 1.0, 0.0)
        fastlora_kernels.backward(t["dy"], *factors, t["s"], None, 1.0, 0.0, (True, True, True))
    assert len(calls) >= 5 and max(call.grid[0] for call in calls) > 1 << 16
    assert max(size for call in calls for size in call.grid[1:]) < 1 << 10


@each_body
def test_expanded_gradient_and_input(body):
    case = Case(64, 40, 70, 4)
    t = case.tensors()
    t["dy"] = t["dy"][:, :1].expand(64, 40)  # stride 0, as y.sum().backward() passes down
    verify(body, case, t)
    t["x"] = t["x"][:1].expand(64, 70)
    results, dense = run(body, case, t), run(body, case, {**t, "x": t["x"].contiguous()})
    for name in results:
        torch.testing.assert_close(results[name], dense[name])


@each_body
def test_a_bad_row_stays_one_row(body):
    case = Case(40, 24, 20, 4)
    t = case.tensors()
    clean = run(body, case, t)
    for bad in (torch.nan, torch.inf):
        x, dy = t["x"].clone(), t["dy"].clone()
        x[7, 3] = dy[9, 5] = bad
        results = run(body, case, {**t, "x": x, "dy": dy})
        for name, row in (("y", 7), ("x", 9)):
            others = torch.arange(40) != row
            assert not results[name][row].isfinite().any(), name
            assert torch.equal(results[name][others], clean[name][others]), name


@each_body
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dropped_is_still_not_a_number(body, kind):
    """As in eager PyTorch, where dropout multiplies by zero."""
    case = Case(30, 12, 20, 3, kind=kind, dropout_p=0.5)
    t = case.tensors()
    row, column = (~keep_mask(t["seed"], range(30), 20, 0.5)).nonzero()[5]
    t["x"][row, column] = torch.nan
    bad = run(body, case, t)["lora_A"].isnan()
    assert bad[:, column].all() and bad.sum() == 3


@pytest.mark.parametrize("kind", ["fp32", "bf16-fp32"])
def test_nothing_outside_the_outputs_is_written(kind, monkeypatch):
    """Every buffer a launcher allocates lies in sentinels and starts as NaN."""
    guards = []

    def guarded(make):
        def empty(*shape, **options):
            t = make(*shape, **options)
            if not t.is_floating_point():
                return t
            buffer = torch.full((t.numel() + 256,), 7.0, dtype=t.dtype)
            inner = buffer[128 : 128 + t.numel()].view(t.shape).fill_(torch.nan)
            guards.append(buffer)
            return inner

        return empty

    case = Case(35, 27, 45, 5, kind=kind, dropout_p=0.2)
    t = case.tensors()
    expected = run(fastlora_kernels, case, t)
    monkeypatch.setattr(torch, "empty", guarded(torch.empty))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda t, *s, **o: guarded(lambda *a, **k: new_empty(t, *a, **k))(*s, **o),
    )
    results = run(fastlora_kernels, case, t)
    monkeypatch.undo()
    assert len(guards) >= 6
    for buffer in guards:
        assert (buffer[:128] == 7).all() and (buffer[-128:] == 7).all()
        assert not buffer.isnan().any(), "an element was never written"
    for name in expected:
        assert torch.equal(results[name], expected[name])


@each_body
def test_only_the_gradients_asked_for(body):
    case = Case(18, 20, 22, 3, dropout_p=0.4)
    t = case.tensors()
    full = run(body, case, t)
    rest = (t["seed"], case.scaling, case.dropout_p)
    _, s = body.forward(t["x"], t["w"], t["a"], t["b"], t["bias"], *rest)
    for bits in range(8):
        needs = tuple(bool(bits >> i & 1) for i in range(3))
        grads = body.backward(t["dy"], t["x"], t["w"], t["a"], t["b"], s, *rest, needs)
        for name, grad, needed in zip(("x", "lora_A", "lora_B"), grads, needs, strict=True):
            assert (grad is not None) == needed
            assert grad is None or torch.equal(grad, full[name])


@pytest.mark.skipif(
    triton.__version__.startswith("3.4."), reason="Triton 3.4 multiplies no float64"
)
def test_gradients_through_the_kernels():
    """float64 runs in the interpreter: finite differences of the kernels themselves."""
    t = Case(5, 4, 6, 2).tensors()
    x, w, a, b = (t[n].double() for n in "xwab")
    seed = torch.tensor([99])

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, a, b):
            y, s = fastlora_kernels.forward(x, w, a, b, None, seed, 0.5, 0.5)
            ctx.save_for_backward(x, a, b, s)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, a, b, s = ctx.saved_tensors
            return fastlora_kernels.backward(dy, x, w, a, b, s, seed, 0.5, 0.5, (True,) * 3)

    assert torch.autograd.gradcheck(
        Layer.apply, [v.requires_grad_() for v in (x, a, b)], fast_mode=True
    )


def test_two_runs_are_identical():
    case = Case(300, 70, 50, 9, kind="bf16", dropout_p=0.1)
    t = case.tensors()
    first, second = run(fastlora_kernels, case, t), run(fastlora_kernels, case, t)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_every_chip_has_a_config():
    """A small or unknown chip runs, if slowly, instead of raising."""
    majors, sizes = (0, 7, 8, 9, 10, 12), (48, 99, 227)
    chips = [configs.Chip((c, 0), kib << 10, 40) for c in majors for kib in sizes]
    kernels = itertools.product(("product", "shrink", "columns"), ("16", "mixed", "32"))
    for kernel, kind in kernels:
        for chip, r, aligned, p in itertools.product(chips, RANKS, (False, True), (False, True)):
            config = configs.default_config(kernel, kind, r, p, chip, aligned)
            assert configs.is_valid(config, kernel, kind, r, p, chip)


@pytest.mark.parametrize("several", [False, True])
def test_kernels_run_on_the_device_of_their_tensors(several, monkeypatch):
    """Triton launches on the current device, whatever its arguments' is."""
    current, found = [0], []

    @contextlib.contextmanager
    def device(wanted):
        current.append(wanted.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kernel = {(1,): lambda *args, **options: found.append(current[-1])}
    for index in (1, 0):
        x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
        launch.launch(kernel, (1,), configs.Config(16, 16, 16), (x, x) if several else x)
    assert found == [1, 0] and current == [0]


def test_nothing_is_compiled_while_a_graph_is_captured():
    """Triton asks its hook before it compiles; ours refuses, and leaves the user's in place."""
    runtime = triton.knobs.runtime
    before = runtime.jit_cache_hook
    runtime.jit_cache_hook = users = lambda **asked: list(asked.values())
    try:
        with launch._compiled_before():
            kernel = SimpleNamespace(name="shrink_kernel")
            with pytest.raises(RuntimeError, match=r"shrink_kernel is not compiled .* once before"):
                runtime.jit_cache_hook(key="", repr="", fn=kernel, compile={})
            with ThreadPoolExecutor(1) as other:  # it compiles for itself: the user's hook answers
                assert other.submit(runtime.jit_cache_hook, fn=kernel).result() == [kernel]
        assert runtime.jit_cache_hook is users
    finally:
        runtime.jit_cache_hook = before
