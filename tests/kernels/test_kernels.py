# SPDX-License-Identifier: Apache-2.0
"""The five steps against the oracle, of one projection and of several, interpreted here."""

from __future__ import annotations

import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import fastlora_kernels
import pytest
import torch
import triton
from acceptance import KINDS, RANKS, oracle, strided
from fastlora_kernels import configs, ds_db, launch, steps
from fastlora_kernels.configs import Chip, Config
from hypothesis import given, settings
from hypothesis import strategies as st
from joints import Joint, expected, joints, run, same, verify, verify_exactly
from recorder import recording

from fastlora.operator.dropout import keep_mask

AMPERE, HOPPER = Chip((8, 0), 166912, 108), Chip((9, 0), 232448, 132)


@pytest.mark.parametrize("joint", joints(), ids=str)
def test_acceptance_rule(joint):
    verify(fastlora_kernels, joint)


@pytest.mark.parametrize("kind", KINDS)
def test_modes_of_one_projection(kind):
    """Each alone: what one path loses hides behind the other."""
    for mode, p in itertools.product(("base", "low_rank", "both"), (0.0, 0.3)):
        joint = Joint(33, 70, (50,), (5,), kind, mode, (p,), biases=(p > 0,))
        verify(fastlora_kernels, joint)


@pytest.mark.parametrize("r", RANKS)
def test_every_rank(r):
    kind = list(KINDS)[r % len(KINDS)]
    verify(fastlora_kernels, Joint(40, 56, (48,), (r,), kind, dropout_p=(0.2 * (r % 2),)))


@pytest.mark.parametrize(
    "ranks", [(1, 3, 16), (17, 33, 64), (128, 1), (16, 16, 16, 16), (64, 64), (0, 0), (0,), (0, 7)]
)
@pytest.mark.parametrize("kind", ["bf16", "bf16-fp32"])
def test_ranks_of_several(ranks, kind):
    """Also those too high to be kept together, and projections without an adapter."""
    p = (0.2, 0.0, 0.3) if sum(ranks) % 2 else ()
    verify(fastlora_kernels, Joint(36, 48, (24, 40, 8, 17)[: len(ranks)], ranks, kind, dropout_p=p))


def test_lists_of_any_length_and_adapters_of_two_dtypes():
    """Up to four of one dtype go together; those of another, and a fifth, apart."""
    kinds = ("bf16", "bf16-fp32", "bf16", "bf16", "bf16", "bf16-fp32", "bf16")
    of_one = [
        Joint(20, 24, (16 + i,), (0 if i == 3 else 3 + i,), kind, seed=i)
        for i, kind in enumerate(kinds)
    ]
    ts = [joint.tensors()[0] for joint in of_one]
    for t in ts:
        t["x"] = ts[0]["x"]
    many = SimpleNamespace(
        projections=lambda ts: [j.projections([t])[0] for j, t in zip(of_one, ts, strict=True)]
    )
    results, dx = run(fastlora_kernels, many, ts)
    alone = [run(fastlora_kernels, j, [t]) for j, t in zip(of_one, ts, strict=True)]
    for result, ((single,), _) in zip(results, alone, strict=True):
        assert result.keys() == single.keys()
        for name in result:
            torch.testing.assert_close(result[name], single[name])
    torch.testing.assert_close(dx, sum(part for _, part in alone), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("chip", [HOPPER, AMPERE], ids=["sm_90", "sm_80"])
def test_a_launch_has_pointers_of_one_type(chip):
    """A kernel chooses among them; the interpreter would not mind."""
    dtypes = torch.bfloat16, None, torch.float32, torch.bfloat16
    of = [(empty(64, 64), *adapter(d), None, None, 0.5, 0.0) for d in dtypes]
    with recording(chip) as calls:
        ss, scaled = steps.shrink(empty(32, 64), of)
        dys = steps.outputs(empty(32, 64), of, ss, scaled)
        steps.input_grad(dys, of, ss)
        steps.da(empty(32, 64), of, ss, [s is not None for s in ss])
    assert [t is None for t in ss] == [False, True, False, False]
    for call in calls:
        for value in call.args.values():
            if isinstance(value, tuple):
                tensors = [t for t in value if isinstance(t, torch.Tensor)]
                assert len({t.dtype for t in tensors}) <= 1, call.kernel.__name__


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def adapter(dtype):
    return (
        (None, None) if dtype is None else (empty(16, 64, dtype=dtype), empty(64, 16, dtype=dtype))
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "k", "sizes", "ranks"),
    [(37, 43, (29,), (6,)), (1, 19, (17,), (1,)), (1, 1, (1,), (1,)), (65, 64, (1, 5), (2, 17))],
)
def test_small_integers_are_exact(m, k, sizes, ranks, kind):
    for p in ((), (0.5, 0.0)):
        verify_exactly(Joint(m, k, sizes, ranks, kind, dropout_p=p))


@given(
    m=st.integers(1, 70),
    k=st.integers(1, 70),
    each=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 40)), min_size=1, max_size=3),
    kind=st.sampled_from(list(KINDS)),
    p=st.tuples(*[st.sampled_from([0.0, 0.5])] * 3),  # 1 / (1 - p) is an integer
    turned=st.sets(st.sampled_from(["x", "w", "a", "b", "dy"])),
)
@settings(max_examples=30, derandomize=True, deadline=None)
def test_any_problem_of_small_integers_is_exact(m, k, each, kind, p, turned):
    joint = Joint(m, k, *zip(*each, strict=True), kind, dropout_p=p)
    verify_exactly(joint, lambda name, t: t.t().contiguous().t() if name in turned else t)


@pytest.mark.parametrize(
    ("joint", "programs"),
    [
        (Joint(600, 33, (40,), (4,), "bf16", dropout_p=(0.1,)), 2),
        # As on a chip with many processors; above rank 32 ds has programs of its own.
        (Joint(140, 20, (150,), (16,), "bf16", dropout_p=(0.2,)), 100),
        (Joint(140, 20, (150,), (40,), "fp16-fp32", dropout_p=(0.2,)), 100),
        (Joint(40, 20, (300,), (40,), "bf16", dropout_p=(0.2,)), 100),
        (Joint(140, 144, (20, 12), (16, 40), "bf16", dropout_p=(0.2,)), 16),
    ],
    ids=str,
)
def test_many_splits_and_two_runs(joint, programs, monkeypatch):
    monkeypatch.setattr(ds_db, "PROGRAMS", programs)
    verify(fastlora_kernels, joint)
    ts = joint.tensors()
    same(run(fastlora_kernels, joint, ts), run(fastlora_kernels, joint, ts))


@pytest.mark.parametrize("p", [1.0, 0.999999, 0.000001])
def test_dropout_at_the_ends(p):
    verify(fastlora_kernels, Joint(150, 140, (60,), (8,), dropout_p=(p,)))


@pytest.mark.parametrize("name", ["M", "K", "N"])
@pytest.mark.parametrize("sizes", [(6,), (6, 4, 3)])
def test_empty_dimensions(name, sizes):
    now = (*sizes[:-1], 0) if name == "N" else sizes
    whole = Joint(5, 7, sizes, (2, 3, 0)[: len(sizes)], dropout_p=(0.3,))
    cut = replace(whole, M=5 * (name != "M"), K=7 * (name != "K"), sizes=now)
    ts = whole.tensors()
    for t, n in zip(ts, now, strict=True):
        t |= {"x": t["x"][: cut.M, : cut.K], "dy": t["dy"][: cut.M, :n], "a": t["a"][:, : cut.K]}
        t |= {"w": t["w"][:n, : cut.K], "b": t["b"][:n]}
        t["bias"] = None if t["bias"] is None else t["bias"][:n]
    (results, dx), (exact, exact_dx) = run(fastlora_kernels, cut, ts), expected(cut, ts, oracle)
    torch.testing.assert_close(dx, exact_dx.to(dx.dtype))
    for result, of_one in zip(results, exact, strict=True):
        for key, value in result.items():
            torch.testing.assert_close(value, of_one[key].to(value.dtype), msg=key)


@pytest.mark.parametrize("kind", ["fp32", "bf16-fp32"])
@pytest.mark.parametrize(
    ("sizes", "ranks", "which"), [((18,), (3,), 0), ((18, 7, 12), (3, 4, 20), 1)]
)
def test_strides(sizes, ranks, which, kind):
    """x and one projection's tensors lie in NaN, and not as those of others do."""
    joint = Joint(21, 26, sizes, ranks, kind, dropout_p=(0.25, 0.0, 0.25))
    ts = joint.tensors()
    found = run(fastlora_kernels, joint, ts)
    names = ("x", "w", "a", "b", "dy")
    for ways in zip(*(strided(ts[which][name]) for name in names), strict=True):
        others = {name: other for name, (_, other) in zip(names, ways, strict=True)}
        same(run(fastlora_kernels, joint, _with(ts, which, others)), found)
    for name in names:
        for _, other in strided(ts[which][name]):
            same(run(fastlora_kernels, joint, _with(ts, which, {name: other})), found)


def _with(ts: list[dict], which: int, others: dict) -> list[dict]:
    """Return the tensors with others in the place of some of one projection's."""
    x = others.get("x", ts[0]["x"])
    return [{**t, **(others if i == which else {}), "x": x} for i, t in enumerate(ts)]


@pytest.mark.parametrize(
    ("name", "k", "strides", "sizes"),
    [
        ("x", 6, (2**30, 1), (5, 5)),
        ("x", 6, (1, 2**29 + 8), (5,)),
        ("x", 40, (1, 2**26), (5,)),
        ("dy", 6, (1, 2**30), (5,)),
        ("dy", 6, (2**30, 1), (5, 5)),
        ("w", 6, (2**29, 1), (5, 5)),
    ],
)
def test_offsets_past_two_billion_elements(name, k, strides, sizes):
    """Rows or columns so far apart that index times stride, or a step of a loop, needs int64.

    The memory is reserved and, but for a few pages, never touched.
    """
    joint = Joint(4, k, sizes, (2, 2)[: len(sizes)])
    ts = joint.tensors()
    found, which = run(fastlora_kernels, joint, ts), len(sizes) - 1
    shape = ts[which][name].shape
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    assert size > 2**31
    far = torch.empty(size).as_strided(shape, strides).copy_(ts[which][name])
    results, dx = run(fastlora_kernels, joint, _with(ts, which, {name: far}))
    # NumPy may add in another order for other strides.
    torch.testing.assert_close(dx, found[1])
    for now, before in zip(results, found[0], strict=True):
        for key in before:
            torch.testing.assert_close(now[key], before[key], msg=key)


def test_expanded_gradient_and_input():
    joint = Joint(64, 70, (40,), (4,))
    (t,) = joint.tensors()
    t["dy"] = t["dy"][:, :1].expand(64, 40)  # stride 0, as y.sum().backward() passes down
    verify(fastlora_kernels, joint, ts=[t])
    t["x"] = t["x"][:1].expand(64, 70)
    (found,), dx = run(fastlora_kernels, joint, [t])
    (dense,), dense_dx = run(fastlora_kernels, joint, [{**t, "x": t["x"].contiguous()}])
    torch.testing.assert_close(dx, dense_dx)
    for name in found:
        torch.testing.assert_close(found[name], dense[name], msg=name)


@pytest.mark.parametrize(("sizes", "ranks"), [((24,), (4,)), ((24, 10), (4, 3))])
def test_a_bad_row_stays_one_row(sizes, ranks):
    joint = Joint(40, 20, sizes, ranks)
    ts = joint.tensors()
    clean, clean_dx = run(fastlora_kernels, joint, ts)
    for bad in (torch.nan, torch.inf):
        x, dy = ts[0]["x"].clone(), ts[-1]["dy"].clone()
        x[7, 3] = dy[9, 5] = bad
        results, dx = run(fastlora_kernels, joint, _with(ts, len(ts) - 1, {"x": x, "dy": dy}))
        pairs = [(now[n], was[n], 7) for now, was in zip(results, clean, strict=True) for n in "ys"]
        for now, was, row in (*pairs, (dx, clean_dx, 9)):
            others = torch.arange(40) != row
            assert not now[row].isfinite().any()
            assert torch.equal(now[others], was[others])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dropped_is_still_not_a_number(kind):
    """As in eager PyTorch, where dropout multiplies by zero."""
    joint = Joint(30, 20, (12,), (3,), kind, dropout_p=(0.5,))
    (t,) = joint.tensors()
    row, column = (~keep_mask(t["seed"], range(30), 20, 0.5)).nonzero()[5]
    t["x"][row, column] = torch.nan
    bad = run(fastlora_kernels, joint, [t])[0][0]["lora_A"].isnan()
    assert bad[:, column].all() and bad.sum() == 3


@pytest.mark.parametrize(
    ("k", "sizes", "ranks"), [(45, (27,), (5,)), (48, (27, 33), (5, 3)), (27, (27, 33), (0, 40))]
)
def test_nothing_outside_the_outputs_is_written(k, sizes, ranks, monkeypatch):
    """Every buffer a launcher allocates lies in sentinels and starts as NaN."""
    guards = []

    def guarded(t, *shape, make=torch.Tensor.new_empty, **options):
        inner = make(t, *shape, **options)
        if not inner.is_floating_point():
            return inner
        buffer = torch.full((inner.numel() + 256,), 7.0, dtype=inner.dtype)
        guards.append(buffer)
        return buffer[128 : 128 + inner.numel()].view(inner.shape).fill_(torch.nan)

    for kind in ("fp32", "bf16-fp32"):
        joint = Joint(35, k, sizes, ranks, kind, dropout_p=(0.2,))
        ts = joint.tensors()
        found = run(fastlora_kernels, joint, ts)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", guarded)
            now = run(fastlora_kernels, joint, ts)
        same(now, found)
    assert len(guards) >= 14
    for buffer in guards:
        assert (buffer[:128] == 7).all() and (buffer[-128:] == 7).all()
        assert not buffer.isnan().any(), "an element was never written"


def test_only_the_gradients_asked_for():
    joint = Joint(18, 22, (20, 24), (3, 40), dropout_p=(0.4,))
    ts = joint.tensors()
    results, dx = run(fastlora_kernels, joint, ts)
    x, dys, of = ts[0]["x"], [t["dy"] for t in ts], joint.projections(ts)
    ss = [result["s"] for result in results]
    all_ds, _ = steps.ds_db(dys, of, ss, [True] * 2, [False] * 2)
    for bits in range(16):
        need_a, need_b = [bool(bits & 1), bool(bits & 2)], [bool(bits & 4), bool(bits & 8)]
        dss, dbs = steps.ds_db(dys, of, ss, need_a, need_b)
        das = steps.da(x, of, dss, need_a)
        for result, ds, every, da, db, a, b in zip(
            results, dss, all_ds, das, dbs, need_a, need_b, strict=True
        ):
            assert ((ds is not None), (da is not None), (db is not None)) == (a, a, b)
            assert ds is None or torch.equal(ds, every)
            assert da is None or torch.equal(da, result["lora_A"])
            assert db is None or torch.equal(db, result["lora_B"])
    # Where a projection was not used, it has no part in dx, and no gradients.
    dss, dbs = steps.ds_db([dys[0], None], of, ss, [True] * 2, [True] * 2)
    assert dss[1] is dbs[1] is None
    alone = steps.input_grad(dys[:1], of[:1], all_ds[:1])
    assert torch.equal(steps.input_grad([dys[0], None], of, dss), alone)
    assert not torch.equal(alone, dx) and steps.input_grad([None] * 2, of, [None] * 2) is None


def test_ds_and_db_come_from_one_launch():
    for r, needs in itertools.product((16, 128), ((True, True), (True, False), (False, True))):
        dy, b, s = empty(999, 500), empty(500, r), empty(999, r)
        with recording(HOPPER) as calls:
            found = ds_db.ds_db((dy,), (s,), (b,), (1.0,), *((need,) for need in needs))
        assert tuple(f is not None for (f,) in found) == needs
        assert [c.args["dy_ptr"] is dy for c in calls if "dy_ptr" in c.args] == [True]


@pytest.mark.skipif(
    triton.__version__.startswith("3.4."), reason="Triton 3.4 multiplies no float64"
)
def test_gradients_through_the_kernels():
    """float64 runs in the interpreter: finite differences of the kernels themselves."""
    joint = Joint(5, 6, (4, 3), (2, 3))
    ts = joint.tensors()
    seed, x = torch.tensor([99]), ts[0]["x"].double()
    leaves = [v.double().requires_grad_() for v in (x, *(t[n] for t in ts for n in "ab"))]

    def operands(factors):
        each = zip(ts, factors[::2], factors[1::2], strict=True)
        return [(t["w"].double(), a, b, None, seed, 0.5, 0.5) for t, a, b in each]

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *factors):
            ss, _ = steps.shrink(x, operands(factors))
            ctx.save_for_backward(x, *factors, *ss)
            return tuple(steps.outputs(x, operands(factors), ss))

        @staticmethod
        def backward(ctx, *dys):
            x, *factors = ctx.saved_tensors[:5]
            of, ss, both = operands(factors), ctx.saved_tensors[5:], [True] * 2
            dss, dbs = steps.ds_db(dys, of, ss, both, both)
            das = steps.da(x, of, dss, both)
            return steps.input_grad(dys, of, dss), das[0], dbs[0], das[1], dbs[1]

    assert torch.autograd.gradcheck(Layer.apply, leaves, fast_mode=True)


def test_grids_end_where_no_limit_is():
    """Only the first dimension of a grid may have more than 65,535 programs."""
    of = [(empty(64, 64), *adapter(torch.bfloat16), None, None, 1.0, 0.0)]
    x = empty(1 << 24, 64)
    with recording(AMPERE) as calls:
        ss, scaled = steps.shrink(x, of)
        dys = steps.outputs(x, of, ss, scaled)
        dss, _ = steps.ds_db(dys, of, ss, [True], [True])
        steps.input_grad(dys, of, dss)
        steps.da(x, of, dss, [True])
    assert len(calls) == 7 and max(call.grid[0] for call in calls) > 1 << 16
    assert max(size for call in calls for size in call.grid[1:]) < 1 << 10


def test_every_chip_has_a_config():
    """A small or unknown chip runs, if slowly, instead of raising."""
    majors, sizes = (0, 7, 8, 9, 10, 12), (48, 99, 227)
    chips = [Chip((c, 0), kib << 10, 40) for c in majors for kib in sizes]
    kernels = [name for names in configs.LAUNCHERS.values() for name in names]
    rest = ("16", "mixed", "32"), chips, (1, 17, 64, 128, 512), (False, True), (1, 3)
    for kernel, kind, chip, r, p, count in itertools.product(kernels, *rest):
        for aligned, even in itertools.product((False, True), repeat=2):
            config = configs.default_config(kernel, kind, r, p, chip, count, aligned, even)
            assert configs.is_valid(config, kernel, kind, r, p, chip, count)
            tma = even and aligned and kernel in ("outputs", "input_grad")
            assert not config.tma or (tma and chip.capability[0] >= 9)


@pytest.mark.parametrize("several", [False, True])
def test_kernels_run_on_the_device_of_their_tensors(several, monkeypatch):
    """Triton launches on the current device, whatever its arguments' is."""
    current, found = [0], []

    @contextlib.contextmanager
    def device(wanted):
        current.append(wanted.index)
        yield
        current.pop()

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kernel = {(1,): lambda *args, **options: found.append(current[-1])}
    for index in (1, 0):
        x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
        launch.Launch(kernel, (1,), Config(16, 16, 16))((x, x) if several else x)
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
