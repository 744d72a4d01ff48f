# SPDX-License-Identifier: Apache-2.0
"""The five steps against the oracle, of one projection and of several, interpreted here."""

import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import fastlora_kernels
import pytest
import torch
import torch.nn.functional as F
import triton
from acceptance import KINDS, RANKS, integers, oracle, strided
from aot import CHIPS
from covering import covering
from fastlora_kernels import configs, ds_db, launch, steps
from fastlora_kernels.configs import Chip
from hypothesis import example, given, settings
from hypothesis import strategies as st
from joints import Joint, expected, poisoned, recorded, run, same, verify, verify_exactly
from recorder import recording

from fastlora.operator import library
from fastlora.operator.dropout import keep_mask

BODIES = {"triton": fastlora_kernels, "library": SimpleNamespace(steps=library)}
NAMES = ("x", "w", "a", "b", "dy")
# M, K, outputs and ranks; None is that of the turn.
SHAPES = (
    (70, 40, (50,), (None,)),
    (33, 130, (50, 20, 33), (5, None, 3)),
    (40, 36, (40,), (None,)),
    (34, 128, (96, 32), (None, None)),
    (20, 145, (65, 40, 24, 8), (2, None, 0, 17)),
)
MODES, DROPOUTS = ("both", "base", "low_rank"), ((), (0.3, 0.1, 0.5, 0.2), (0.0, 0.4))


def cases() -> list[tuple[Joint, int]]:
    """Return problems of every rank, and in how many ways their tensors lie in turn."""
    found, left = [], deque(RANKS)
    for row in covering(list(KINDS), SHAPES, MODES, DROPOUTS, range(5)):
        kind, (m, k, sizes, ranks), mode, p, lie = row
        r = left.pop() if kind == "bf16" else left.popleft()  # fast at high ranks
        left = left or deque(RANKS[:8])
        ranks = tuple(r if rank is None else rank for rank in ranks)
        found.append((Joint(m, k, sizes, ranks, kind, mode, p, seed=len(found)), lie))
    assert {*RANKS} <= {r for joint, _ in found for r in joint.ranks}
    # Projections without an adapter, and all that can be kept together.
    for i, ranks in enumerate([(0,), (0, 0), (0, 7), (16,) * 4, (64, 64), (128, 1)]):
        kind, p = ("bf16-fp32", (0.2, 0.0, 0.3)) if sum(ranks) % 2 else ("bf16", ())
        sizes = (24, 40, 8, 17)[: len(ranks)]
        found.append((Joint(36, 48, sizes, ranks, kind, dropout_p=p), i % 5))
    # One projection in every dtype and mode.
    for kind, mode, p in itertools.product(KINDS, MODES, (0.0, 0.3)):
        found.append((Joint(33, 70, (50,), (5,), kind, mode, (p,), biases=(p > 0,)), 0))
    # Rows that are cut, into one segment, several in a tile, and some without any.
    cuts = (0, 70), (0, 0, 37, 37, 40, 70, 70), tuple(range(0, 71, 10))
    shapes = ((50,), (5,)), ((40, 20, 33), (17, 0, 3)), ((24, 33), (40, 64))
    some = {"dropout_p": (0.0,) * 5, "biases": (True,) * 5, "ends": (0, 4, 20)}
    found.append((Joint(20, 24, (8,) * 5, (3, 0, 0, 0, 0), "bf16", **some), 0))  # two launches
    for kind, (sizes, ranks), p, ends in covering(list(KINDS), shapes, DROPOUTS, cuts):
        joint = Joint(70, 40, sizes, ranks, kind, "low_rank", p, seed=len(found), ends=ends)
        found.append((joint, len(found) % 5))
    return found


def lying(ts: list[dict], turn: int) -> list[dict]:
    """Return the tensors in NaN and each in another way, a projection's not as those of others."""
    found = [dict(t) for t in ts]
    for (i, t), (j, name) in itertools.product(enumerate(found), enumerate((*NAMES, "bias"))):
        if t[name] is not None and t[name].dim() > 1:  # a bias is where it is stacked
            t[name] = [t[name], *(other for _, other in strided(t[name]))][(turn + i + j) % 5]
    return [{**t, "x": found[0]["x"]} for t in found]


@pytest.mark.parametrize(("joint", "lie"), cases(), ids=str)
def test_acceptance_rule(joint, lie):
    """Also of ranks too high to be kept together; dtypes, modes, masks and strides in pairs."""
    verify(fastlora_kernels, joint, ts=lying(joint.tensors(), lie))


def of_scales() -> list[tuple[str, Joint, int]]:
    """Return problems of which columns are multiplied, but for those without an adapter."""
    shapes, found = (*SHAPES, (20, 30, (24,), (160,)))[1:], []
    for body, kind, (m, k, sizes, ranks), p in covering(
        list(BODIES), list(KINDS), shapes, DROPOUTS
    ):
        ranks = tuple(7 if rank is None else rank for rank in ranks)
        joint = Joint(m, k, sizes, ranks, kind, MODES[len(found) % 3], p, seed=len(found))
        found.append((body, replace(joint, scaled=True), len(found) % 5))
    return found


@pytest.mark.parametrize(("body", "joint", "lie"), of_scales(), ids=str)
def test_acceptance_rule_of_scales(body, joint, lie):
    with poisoned():
        verify(BODIES[body], joint, ts=lying(joint.tensors(), lie))


def experts() -> list[tuple[str, Joint, int]]:
    """Return problems whose weights are stacked, what runs them, and in how many ways they lie."""
    cuts = (0, 0, 17, 17, 20, 40, 40), tuple(range(8)), (0, 33)
    # Of some PyTorch groups the wide products. Ranks of 0: frozen experts.
    shapes = ((48,), (16,)), ((40, 20, 33), (17, 0, 3)), ((24, 16), (0, 0))
    biases, found = ((True,) * 3, (False, True, True), (False,) * 3), []
    options = list(KINDS), shapes, list(BODIES), DROPOUTS, cuts, biases
    for kind, (sizes, ranks), body, p, ends, bias in covering(*options):
        mode, of = MODES[len(found) % 3], (ends[-1], 40, sizes, ranks, kind)
        joint = Joint(*of, mode, p, bias, seed=len(found), ends=ends, experts=True)
        found.append((body, joint, (0, 1, 0, 2, 3, 4)[len(found) % 6]))
    return found


@pytest.mark.parametrize(("body", "joint", "lie"), experts(), ids=str)
def test_acceptance_rule_of_experts(body, joint, lie):
    with poisoned():
        verify(BODIES[body], joint, ts=lying(joint.tensors(), lie) if lie else None)


@pytest.mark.parametrize(
    ("body", "experts", "r"), [("triton", 64, 4), ("library", 64, 4), ("triton", 300, 0)]
)
def test_many_experts_with_a_few_rows(body, experts, r):
    ends = (0, *itertools.accumulate(g * g % 3 for g in range(experts)))
    joint = Joint(ends[-1], 24, (32,), (r,), "bf16", ends=ends, experts=True)
    verify(BODIES[body], joint)


@pytest.mark.parametrize(
    ("kind", "K", "r", "count", "expanded"),
    zip(
        *(("bf16", "fp32", "bf16", "bf16", "fp16"), (40, 40, 40, 36, 40), (8, 8, 0, 8, 8)),
        *((3, 4, 1, 0, 0), (2, 2, 0, 0, 0)),
        strict=True,
    ),
)
def test_pytorch_groups_the_wide_products_that_it_can(kind, K, r, count, expanded, monkeypatch):
    """Not of a gradient that is expanded, as y.sum() passes down; not what a bias alone joins."""
    biases, cut = (True, False), {"ends": (0, 5, 20), "experts": True}
    joint = Joint(20, K, (48, 20), (r, 0), kind, biases=biases, **cut)
    found, generator = getattr(F, "grouped_mm", None), torch.Generator().manual_seed(3)
    function = Mock(wraps=found)
    monkeypatch.setattr(F, "grouped_mm", function if found else None, raising=False)
    one, other = (integers(t, generator) for t in joint.tensors())
    for most, dy in ((count, one["dy"]), (expanded, one["dy"][:, :1].expand(20, 48))):
        verify(BODIES["library"], joint, ts=[one | {"dy": dy}, other | {"x": one["x"]}])
        assert function.call_count == most * bool(found)
        function.reset_mock()


def test_lists_of_any_length_and_adapters_of_two_dtypes():
    """Up to four of one dtype go together; those of another, and a fifth, apart."""
    kinds = ("bf16", "bf16-fp32", "bf16", "bf16", "bf16", "bf16-fp32", "bf16")
    of_one = [
        Joint(20, 24, (16 + i,), (0 if i == 3 else 3 + i,), kind, seed=i)
        for i, kind in enumerate(kinds)
    ]
    ts = [joint.tensors()[0] for joint in of_one]
    pairs = [(joint, {**t, "x": ts[0]["x"]}) for joint, t in zip(of_one, ts, strict=True)]
    each = [j.projections([t])[0] for j, t in pairs]
    many = SimpleNamespace(projections=lambda _: each, segments=lambda _: None)
    results, dx = run(fastlora_kernels, many, [t for _, t in pairs])
    alone = [run(fastlora_kernels, j, [t]) for j, t in pairs]
    parts = torch.stack([part for _, part in alone])
    torch.testing.assert_close(dx, parts.sum(0), rtol=0.05, atol=0.1)
    torch.testing.assert_close(results, [single for (single,), _ in alone])


def blank(kind: str, r: int):
    """Return a projection of x [32, 64] without memory."""
    joint = Joint(32, 64, (64,), (r,), kind, dropout_p=(0.5,))
    return joint.projections(joint.blank())[0]


@pytest.mark.parametrize("chip", [90, 80], ids="sm_{}".format)
def test_a_launch_has_pointers_of_one_type(chip):
    """A kernel chooses among them; the interpreter would not mind."""
    of = [blank("bf16", 16), blank("bf16", 0), blank("bf16-fp32", 16), blank("bf16", 16)]
    x = of[0].w.new_empty(32, 64)
    with recording(CHIPS[chip]) as calls:
        ss, scaled = steps.shrink(x, of)
        dys = steps.outputs(x, of, ss, scaled)
        steps.input_grad(dys, of, ss)
        steps.da(x, of, ss, [s is not None for s in ss])
    assert [t is None for t in ss] == [False, True, False, False]
    for call in calls:
        for value in call.args.values():
            if isinstance(value, tuple):
                tensors = [t for t in value if isinstance(t, torch.Tensor)]
                assert len({t.dtype for t in tensors}) <= 1, call.kernel.__name__


@given(
    m=st.integers(1, 70),
    k=st.integers(1, 70),
    each=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 40)), min_size=1, max_size=3),
    kind=st.sampled_from(list(KINDS)),
    p=st.tuples(*[st.sampled_from([0.0, 0.5])] * 3),  # 1 / (1 - p) is an integer
    turned=st.sets(st.sampled_from(NAMES)),
    cuts=st.lists(st.integers(0, 70), max_size=5),
    experts=st.sampled_from([None, False, True]),
)
@example(m=1, k=1, each=[(1, 1)], kind="bf16", p=(0.5,), turned=set(), cuts=[], experts=False)
@example(33, 17, [(40, 5), (9, 20)], "bf16", (0.5, 0.0), {"dy"}, [], None)
@example(35, 8, [(8, 2)], "fp16", (0.5,), set(), [*range(1, 35)], False)
@example(65, 64, [(1, 2), (5, 17)], "fp16-fp32", (0.5, 0.0), set(), [], False)
@example(35, 17, [(9, 2), (20, 0)], "bf16", (0.5,), {"w"}, [3, 3, 20], True)
@settings(max_examples=15, derandomize=True, deadline=None)
def test_small_integers_are_exact(m, k, each, kind, p, turned, cuts, experts):
    """Of experts, of factors that are cut, or of those with scales."""
    scaled = experts is None
    ends = (0, *sorted(min(m, cut) for cut in cuts), m) if cuts and not scaled else ()
    of = m, k, *zip(*each, strict=True), kind
    joint = Joint(*of, dropout_p=p, ends=ends, experts=bool(experts), scaled=scaled)
    verify_exactly(joint, lambda name, t: t.mT.contiguous().mT if name in turned else t)


@pytest.mark.parametrize(
    ("joint", "programs"),
    [
        (Joint(300, 33, (40,), (4,), "bf16", dropout_p=(0.1,)), 2),
        # As on a chip with many processors; above rank 32 ds has programs of its own.
        (Joint(80, 20, (150,), (16,), "fp16-fp32", dropout_p=(0.2,)), 100),
        (Joint(40, 20, (300,), (40,), "bf16", dropout_p=(0.2,)), 100),
        (Joint(80, 80, (20, 12), (16, 40), "bf16", dropout_p=(0.2,)), 16),
        (Joint(90, 80, (20, 12), (16, 40), "fp32", ends=(0, 3, 3, 80, 90)), 16),
        (Joint(300, 33, (40,), (4,), "bf16", dropout_p=(0.1,), ends=(0, 290, 300)), 2),
        (Joint(300, 33, (40,), (4,), "bf16", scaled=True), 2),
        (Joint(40, 20, (300,), (40,), "bf16", dropout_p=(0.2,), scaled=True), 100),
        (Joint(80, 20, (150,), (200,), "bf16-fp32", scaled=True), 100),
    ],
    ids=str,
)
def test_many_splits_and_two_runs(joint, programs, monkeypatch):
    monkeypatch.setattr(ds_db, "PROGRAMS", programs)
    verify(fastlora_kernels, joint)
    ts = joint.tensors()
    same(run(fastlora_kernels, joint, ts), run(fastlora_kernels, joint, ts))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("p", [1.0, 0.999999, 0.000001])
def test_dropout_at_the_ends(p, scaled):
    verify(fastlora_kernels, Joint(40, 70, (60,), (8,), dropout_p=(p,), scaled=scaled))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "change", [{"M": 0}, {"sizes": (40, 0, 24)}, {"sizes": (0,), "ranks": (2,)}, {"K": 1}], ids=str
)
def test_empty_dimensions(change, scaled):
    of = {"M": 70, "K": 50, "sizes": (40, 20, 24), "ranks": (2, 3, 0), "dropout_p": (0.3,)} | change
    ts = (joint := Joint(**of, scaled=scaled)).tensors()
    if joint.K == 1:  # of which nothing is left
        joint, ts = replace(joint, K=0), [t | {n: t[n][:, :0] for n in "xwa"} for t in ts]
    verify(fastlora_kernels, joint, ts=[{**t, "x": ts[0]["x"]} for t in ts])


@pytest.mark.parametrize(
    ("name", "k", "strides", "sizes"),
    [
        ("x", 6, (2**30, 1), (5, 5)),
        ("x", 6, (1, 2**29 + 8), (5,)),
        ("x", 40, (1, 2**26), (5,)),
        ("dy", 6, (1, 2**30), (5,)),
        ("dy", 6, (2**30, 1), (5, 5)),
        ("w", 6, (2**29, 1), (5, 5)),
        ("w", 6, (2**30, 6, 1), (5,)),
        ("w", 6, (2**30, 1, 5), (5, 5)),
    ],
)
def test_offsets_past_two_billion_elements(name, k, strides, sizes):
    """Rows or columns so far apart that index times stride, or a step of a loop, needs int64.

    The memory is reserved and, but for a few pages, never touched.
    """

    def far(other: str, t: torch.Tensor) -> torch.Tensor:
        if other != name:
            return t
        size = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, strides, strict=True))
        assert size > 2**31
        return torch.empty(size).as_strided(t.shape, strides).copy_(t)

    ends = (0, 1, 3, 4) if len(strides) == 3 else ()  # and experts
    verify_exactly(Joint(4, k, sizes, (2, 2)[: len(sizes)], ends=ends, experts=True), far)


def test_expanded_gradient_and_input():
    joint = Joint(64, 70, (40,), (4,), scaling=2.0)
    t = integers(*joint.tensors(), torch.Generator().manual_seed(3))  # equal errors would add up
    t["dy"] = t["dy"][:, :1].expand(64, 40)  # stride 0, as y.sum().backward() passes down
    for x in (t["x"], t["x"][:1].expand(64, 70)):
        verify(fastlora_kernels, joint, ts=[t | {"x": x}])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("sizes", "ranks"), [((24,), (4,)), ((24, 10), (4, 3))])
def test_a_bad_row_stays_one_row(sizes, ranks, scaled):
    joint = Joint(40, 20, sizes, ranks, scaled=scaled)
    ts = joint.tensors()
    clean, clean_dx = run(fastlora_kernels, joint, ts)
    for bad in (torch.nan, torch.inf):
        x, dy = ts[0]["x"].clone(), ts[-1]["dy"].clone()
        x[7, 3] = dy[9, 5] = bad
        of = [{**t, "x": x} for t in ts[:-1]] + [{**ts[-1], "x": x, "dy": dy}]
        results, dx = run(fastlora_kernels, joint, of)
        pairs = [(now[n], was[n], 7) for now, was in zip(results, clean, strict=True) for n in "ys"]
        for now, was, row in (*pairs, (dx, clean_dx, 9)):
            assert (now != was).any(1).nonzero().flatten().tolist() == [row]
            assert not now[row].isfinite().any()


@pytest.mark.parametrize("step", ["shrink", "outputs", "input_grad"])
def test_a_program_writes_no_row_of_the_next_segment(step):
    """Which would come later here, where programs run one after the other."""
    joint = Joint(50, 20, (24,), (4,), ends=(0, 7, 50))
    ts = joint.tensors()
    of, x, dys = joint.projections(ts), ts[0]["x"], [t["dy"] for t in ts]
    ss, _ = steps.shrink(x, of, segments=joint.segments("cpu"))

    def first(call):
        call.kernel[(1,)](*call.values, num_warps=4, num_stages=1)

    given = {"shrink": (x, of), "outputs": (x, of, ss), "input_grad": (dys, of, ss)}[step]
    with recording(Chip.of(x.device), first), poisoned() as made:
        getattr(steps, step)(*given, segments=joint.segments("cpu"))
    columns = slice(0, 16) if step == "input_grad" else slice(None)
    assert not made[0][:7, columns].isnan().any() and made[0][7:].isnan().all()


def test_a_bad_adapter_stays_in_its_segment():
    joint = Joint(50, 20, (24, 10), (4, 3), dropout_p=(0.2,), ends=(0, 7, 33, 50))
    ts = joint.tensors()
    clean, clean_dx = run(fastlora_kernels, joint, ts)
    ts[0]["a"][1], ts[1]["b"][1] = torch.nan, torch.inf
    results, dx = run(fastlora_kernels, joint, ts)
    for now, was in zip([*results, {"dx": dx}], [*clean, {"dx": clean_dx}], strict=True):
        for name, value in now.items():
            rows = [1] if name.startswith("lora") else range(7, 33)
            others = [i for i in range(len(value)) if i not in rows]
            assert torch.equal(value[others], was[name][others])
            assert name[0] in "sl" or not value[rows].isfinite().all(1).any()


# Of an expert what is bad, and what is then bad of its results.
BAD = {"w": "y dx", "bias": "y", "a": "y s dx lora_B", "b": "y dx lora_A", "x": "y s lora_A lora_B"}
BAD |= {"dy": "dx lora_A lora_B"}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("body", BODIES)
def test_what_is_bad_of_an_expert_stays_with_it(body, name):
    joint = Joint(50, 24, (24, 16), (4, 3), ends=(0, 7, 33, 33, 50), experts=True)
    ts = joint.tensors()
    clean, clean_dx = run(BODIES[body], joint, ts)
    ts[0][name][slice(7, 33) if name in ("x", "dy") else 1] = torch.nan
    results, dx = run(BODIES[body], joint, ts)
    for i, now in enumerate([{**results[0], "dx": dx}, results[1]]):
        bad, was = set(), {**clean[i], "dx": clean_dx}
        for of, value in now.items():
            rows = [1] if of.startswith("lora") else range(7, 33)
            others = [i for i in range(len(value)) if i not in rows]
            assert torch.equal(value[others], was[of][others])
            if not value[rows].isfinite().all():
                bad.add(of)
        assert bad == {*(BAD[name].split() if i == 0 or name == "x" else ())}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dropped_is_still_not_a_number(kind, scaled):
    """As in eager PyTorch, where dropout multiplies by zero."""
    joint = Joint(30, 20, (12,), (3,), kind, dropout_p=(0.5,), scaled=scaled)
    (t,) = joint.tensors()
    row, column = (~keep_mask(t["seed"], range(30), 20, 0.5)).nonzero()[5]
    t["x"][row, column] = torch.nan
    (found,), _ = run(fastlora_kernels, joint, [t])
    bad = found["lora_A"].isnan()
    assert bad[:, column].all() and bad.sum() == 3
    assert not scaled or found["scale"].isnan().all()


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

    for kind, scaled in itertools.product(("fp32", "bf16-fp32"), (False, True)):
        joint = Joint(35, k, sizes, ranks, kind, dropout_p=(0.2,), scaled=scaled)
        ts = joint.tensors()
        found = run(fastlora_kernels, joint, ts)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", guarded)
            now = run(fastlora_kernels, joint, ts)
        same(now, found)
    assert len(guards) >= 28
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
    for *need_a, b0, b1 in itertools.product((False, True), repeat=4):
        dss, dbs = steps.ds_db(dys, of, ss, need_a, [b0, b1])
        das = steps.da(x, of, dss, need_a)
        wanted = [ds if need else None for ds, need in zip(all_ds, need_a, strict=True)]
        wanted += [r["lora_A"] if need else None for r, need in zip(results, need_a, strict=True)]
        wanted += [r["lora_B"] if need else None for r, need in zip(results, (b0, b1), strict=True)]
        for found, right in zip((*dss, *das, *dbs), wanted, strict=True):
            assert found is right is None or torch.equal(found, right)
    # Where a projection was not used, it has no part in dx, and no gradients.
    dss, dbs = steps.ds_db([dys[0], None], of, ss, [True] * 2, [True] * 2)
    assert dss[1] is dbs[1] is None
    alone = steps.input_grad(dys[:1], of[:1], all_ds[:1])
    assert torch.equal(steps.input_grad([dys[0], None], of, dss), alone)
    assert not torch.equal(alone, dx) and steps.input_grad([None] * 2, of, [None] * 2) is None


@pytest.mark.parametrize("r", [16, 128])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_ds_and_db_come_from_one_launch(r, needs):
    of = [blank("bf16", r)]
    dy, s = of[0].w.new_empty(32, 64), of[0].w.new_empty(32, r)
    with recording(CHIPS[90]) as calls:
        found = steps.ds_db([dy], of, [s], *([need] for need in needs))
    assert tuple(f is not None for (f,) in found) == needs
    assert [c.args["dy_ptr"] is dy for c in calls if "dy_ptr" in c.args] == [True]


@pytest.mark.skipif(
    triton.__version__.startswith("3.4."), reason="Triton 3.4 multiplies no float64"
)
def test_float64():
    """The interpreter multiplies it: the kernels' formulas themselves, to the last digits."""
    joint = Joint(35, 46, (40, 33), (2, 33), dropout_p=(0.5,), scaling=0.5)
    ts = [
        {n: v.double() if v is not None and n != "seed" else v for n, v in t.items()}
        for t in joint.tensors()
    ]
    (results, dx), (exact, exact_dx) = run(fastlora_kernels, joint, ts), expected(joint, ts, oracle)
    torch.testing.assert_close(dx, exact_dx)
    for result, of_one in zip(results, exact, strict=True):
        torch.testing.assert_close(result, {name: of_one[name] for name in result})


def test_grids_end_where_no_limit_is():
    """Only the first dimension of a grid may have more than 65,535 programs."""
    calls = recorded(CHIPS[80], Joint(1 << 24, 64, (64,), (16,), "bf16"))
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
            tried = configs.candidates(kernel, kind, r, p, chip, count, aligned)
            tma = aligned and kernel in ("outputs", "input_grad") and chip.capability[0] >= 9
            assert (tma and even) or not config.tma
            assert tma or not any(c.tma for c in tried)


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
