# SPDX-License-Identifier: Apache-2.0
"""The kernels for several projections of one input, and a gated MLP's, against the same oracle.

Every projection is a problem of the acceptance rule; dx is the sum of theirs. A wrong kernel is a
copy of the package with one line changed, and has to be refused.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import fastlora_kernels
import pytest
import torch
import torch.nn.functional as F
from acceptance import KINDS, Case, accept, mask_of, oracle, plain, strided
from fastlora_kernels import columns, configs, gated, gated_backward
from fastlora_kernels.launch import NO_CONFIGS
from fastlora_kernels.persistent import takes_scaled
from test_acceptance import load

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class Joint:
    """One input and its projections: outputs, rank (0: no adapter) and dropout of each."""

    M: int
    K: int
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    kind: str = "fp32"
    mode: str = "both"
    dropout_p: tuple[float, ...] = ()  # none where it is short
    biases: tuple[bool, ...] = (True, False, True, True)
    seed: int = 0
    scaling: float | None = None  # None: another one for each

    def cases(self) -> list[Case]:
        """Return the projections one by one; where there is no adapter, its B is zero."""
        dropout_p = (*self.dropout_p, 0.0, 0.0, 0.0, 0.0)
        return [
            Case(
                *(self.M, n, self.K, r or 1, self.kind, self.mode if r else "base"),
                dropout_p=dropout_p[i],
                scaling=0.7 - 0.1 * i if self.scaling is None else self.scaling,
                seed=10 * self.seed + i,
                bias=self.biases[i],
            )
            for i, (n, r) in enumerate(zip(self.sizes, self.ranks, strict=True))
        ]

    def tensors(self, device: str = "cpu") -> list[dict]:
        """Return the tensors of each projection; x is the same one in all."""
        drawn = [case.tensors(device) for case in self.cases()]
        return [{**t, "x": drawn[0]["x"]} for t in drawn]


def run(kernels, joint: Joint, ts: list[dict], configs=NO_CONFIGS):
    """Return what the kernels make of each projection, and dx.

    ``configs`` may hold one for each launcher, by its name. A product whose config takes no scale
    gets s scaled, by the one factor that the projections then share.
    """
    cases, there = joint.cases(), [i for i, r in enumerate(joint.ranks) if r]
    x, scalings = ts[0]["x"], [case.scaling for case in cases]
    results = [{} for _ in ts]

    def of(name: str, among=None) -> list:
        return [t[name] if among is None or i in among else None for i, t in enumerate(ts)]

    def adapted(values: list) -> list:
        return [values[i] for i in there]

    def spread(values: list) -> list:
        given = dict(zip(there, values, strict=True))
        return [given.get(i) for i in range(len(ts))]

    dropped = {"dropout_p": [case.dropout_p for case in cases]}
    shared = {"dropout_p": adapted(dropped["dropout_p"])}
    seeds, b = adapted(of("seed")), of("b", there)
    shrink, product = configs.get("shrink_all"), configs.get("product_all")
    factors = s = []
    if there and product is not None and takes_scaled(product):
        factors = [x.new_empty(joint.M, joint.ranks[i]) for i in there]
        made = {"scaled": factors, "factor": joint.scaling}
        s = kernels.shrink_all(x, adapted(of("a")), seeds, **shared, **made, config=shrink)
        scalings = [1.0] * len(cases)
    elif there:
        factors = s = kernels.shrink_all(x, adapted(of("a")), seeds, **shared, config=shrink)
    y = kernels.product_all(x, of("w"), spread(factors), b, of("bias"), scalings, config=product)
    scalings = [case.scaling for case in cases]
    ds = [
        kernels.ds_db(ts[i]["dy"], s_i, ts[i]["b"], scaling=scalings[i])
        for i, s_i in zip(there, s, strict=True)
    ]
    spread_ds = spread([d for d, _ in ds])
    dx = kernels.product_sum(
        of("dy"),
        of("w"),
        spread_ds,
        of("a", there),
        of("seed"),
        **dropped,
        config=configs.get("product_sum"),
    )
    da = (
        kernels.da_all(x, [d for d, _ in ds], seeds, **shared, config=configs.get("da_all"))
        if there
        else []
    )
    for i, y_i in enumerate(y):
        results[i]["y"] = y_i
    for i, s_i, da_i, (_, db) in zip(there, s, da, ds, strict=True):
        results[i] |= {"s": s_i, "lora_A": da_i, "lora_B": db}
    return results, dx


def run_layers(kernels, joint: Joint, ts: list[dict], configs=NO_CONFIGS):
    """Return the same by `linears`, as layers run it: with the configs that it chooses."""
    x, projections = ts[0]["x"], []
    for case, t, r in zip(joint.cases(), ts, joint.ranks, strict=True):
        a, b, seed = (t["a"], t["b"], t["seed"]) if r else (None, None, None)
        projections.append((t["w"], a, b, t["bias"], seed, case.scaling, case.dropout_p))
    ys, ss = kernels.linears.forward_all(x, projections)
    needs = [(True, True)] * len(ts)
    dys = [t["dy"] for t in ts]
    dx, das, dbs = kernels.linears.backward_all(dys, x, projections, ss, True, needs)
    results = [{"y": y} for y in ys]
    for result, s, da, db in zip(results, ss, das, dbs, strict=True):
        if s is not None:
            result |= {"s": s, "lora_A": da, "lora_B": db}
    return results, dx


def expected(joint: Joint, ts: list[dict], how) -> tuple[list[dict], torch.Tensor]:
    """Return the same from ``how``: `oracle`, or `plain`, whose gradients autograd adds."""
    found = [how(case, t) for case, t in zip(joint.cases(), ts, strict=True)]
    for case, t, of_one in zip(joint.cases(), ts, found, strict=True):
        wide = torch.float64 if how is oracle else t["a"].dtype
        x_hat = t["x"].to(wide)
        if t["seed"] is not None:
            x_hat = x_hat * mask_of(case, t) / (1 - case.dropout_p)
        of_one["s"] = x_hat @ t["a"].to(wide).t()
    dx = found[0]["x"]
    for of_one in found[1:]:
        dx = dx + of_one["x"]
    return found, dx


def verify(kernels, joint: Joint, device: str = "cpu", configs=NO_CONFIGS, how=run) -> None:
    ts = joint.tensors(device)
    results, dx = how(kernels, joint, ts, configs)
    (plains, plain_dx), (exact, exact_dx) = expected(joint, ts, plain), expected(joint, ts, oracle)
    for i, result in enumerate(results):
        for name, value in result.items():
            accept(f"{joint}: {name} of {i}", value, plains[i][name], exact[i][name])
            assert value.is_contiguous()
    accept(f"{joint}: dx", dx, plain_dx, exact_dx)
    assert dx.is_contiguous()


SHAPES = [
    (33, 270, (50, 20, 33), (5, 5, 5)),
    (64, 128, (96, 32), (16, 16)),
    (20, 261, (65, 40, 24, 8), (2, 33, 0, 17)),
    (30, 36, (40,), (33,)),
]
DROPOUTS = ((), (0.3, 0.1, 0.5, 0.2), (0.0, 0.4))


def joints() -> list[Joint]:
    """Return ragged sizes in every mix of dtypes, with modes and dropout taking turns."""
    modes = itertools.cycle(itertools.product(("both", "base", "low_rank"), DROPOUTS))
    problems = enumerate(itertools.product(KINDS, SHAPES))
    return [
        Joint(*shape, kind, mode, p, seed=i)
        for (i, (kind, shape)), (mode, p) in zip(problems, modes, strict=False)
    ]


@pytest.mark.parametrize("joint", joints(), ids=str)
def test_acceptance_rule(joint):
    verify(fastlora_kernels, joint)


@pytest.mark.parametrize(
    "ranks", [(1, 3, 16), (17, 33, 64), (128, 1), (16, 16, 16, 16), (64, 64), (0, 0), (0, 7)]
)
@pytest.mark.parametrize("kind", ["bf16", "bf16-fp32"])
def test_ranks(ranks, kind):
    """Also those too high to be kept together, and projections without an adapter."""
    p = (0.2, 0.0, 0.3) if sum(ranks) % 2 else ()
    verify(fastlora_kernels, Joint(36, 48, (24, 40, 8, 17)[: len(ranks)], ranks, kind, dropout_p=p))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16-fp32"])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_as_layers_run_them(kind, scaling):
    joint = Joint(133, 260, (50, 20, 33), (5, 0, 8), kind, scaling=scaling, dropout_p=(0.3,))
    verify(fastlora_kernels, joint, how=run_layers)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16-fp32"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_one_projection_is_the_plain_layer(kind, p):
    joint = Joint(40, 36, (30,), (5,), kind, dropout_p=(p,))
    (case,), ts = joint.cases(), joint.tensors()
    (t,), ((found,), dx) = ts, run(fastlora_kernels, joint, ts)
    rest = t["seed"], case.scaling, p
    y, s = fastlora_kernels.forward(t["x"], t["w"], t["a"], t["b"], t["bias"], *rest)
    needs = (True, True, True)
    grads = fastlora_kernels.backward(t["dy"], t["x"], t["w"], t["a"], t["b"], s, *rest, needs)
    for value, other in (
        (found["y"], y),
        (found["s"], s),
        (dx, grads[0]),
        (found["lora_A"], grads[1]),
    ):
        assert torch.equal(value, other)


@pytest.mark.parametrize("kind", ["fp32", "bf16-fp32"])
@pytest.mark.parametrize("p", [(), (0.5, 0.0, 0.5)])
@pytest.mark.parametrize("k", [43, 48])
def test_small_integers_are_exact(kind, p, k):
    joint = Joint(37, k, (29, 16, 5), (6, 1, 17), kind, dropout_p=p)
    verify_exactly(joint)


def verify_exactly(joint: Joint, lie=lambda name, t: t) -> None:
    """Check small integers for equality; ``lie`` may lay tensors out differently."""
    generator = torch.Generator().manual_seed(3)
    ts = joint.tensors()
    for t in ts:
        for name, value in t.items():
            if value is not None and name != "seed":
                most = 1 if name in "ab" else 2
                small = torch.randint(-most, most + 1, value.shape, generator=generator)
                sparse = torch.rand(value.shape, generator=generator) < 0.3
                t[name] = lie(name, (small * sparse).to(value.dtype))
        t["x"] = ts[0]["x"]
    cases = [replace(case, scaling=2.0) for case in joint.cases()]

    class Doubled(Joint):
        def cases(self):
            return cases

    joint = Doubled(*(getattr(joint, name) for name in joint.__dataclass_fields__))
    (results, dx), (exact, exact_dx) = run(fastlora_kernels, joint, ts), expected(joint, ts, oracle)
    for i, result in enumerate(results):
        for name, value in result.items():
            assert torch.equal(exact[i][name].to(value.dtype).double(), exact[i][name]), name
            assert torch.equal(value.double(), exact[i][name]), f"{name} of {i}"
    assert torch.equal(dx.double(), exact_dx)


@pytest.mark.parametrize("turned", ["x", "w", "ab", "dy", "xwabdy"])
def test_transposed(turned):
    joint = Joint(21, 26, (18, 7), (3, 20), "bf16", dropout_p=(0.5,))
    verify_exactly(joint, lambda name, t: t.t().contiguous().t() if name in turned else t)


def test_strides():
    """x and one projection's tensors lie in NaN, and not as those of the others do."""
    joint = Joint(21, 26, (18, 7, 12), (3, 4, 20), "bf16-fp32", dropout_p=(0.25, 0.0, 0.25))
    ts = joint.tensors()
    results, dx = run(fastlora_kernels, joint, ts)
    names = ("x", "w", "a", "b", "dy")
    for ways in zip(*(strided(ts[1][name]) for name in names), strict=True):
        others = {name: other for name, (_, other) in zip(names, ways, strict=True)}
        changed = [{**t, **others} if i == 1 else {**t, "x": others["x"]} for i, t in enumerate(ts)]
        results_now, dx_now = run(fastlora_kernels, joint, changed)
        assert torch.equal(dx_now, dx), ways[0][0]
        for before, now in zip(results, results_now, strict=True):
            assert all(torch.equal(now[key], before[key]) for key in before), ways[0][0]


@pytest.mark.parametrize("name, stride", [("x", 2**30), ("dy", 2**30), ("w", 2**29)])
def test_offsets_past_two_billion_elements(name, stride):
    """The memory is reserved and, but for a few pages, never touched."""
    joint = Joint(4, 6, (5, 5), (2, 2))
    ts = joint.tensors()
    results, dx = run(fastlora_kernels, joint, ts)
    shape = ts[1][name].shape
    far = torch.empty((shape[0] - 1) * stride + shape[1]).as_strided(shape, (stride, 1))
    assert (shape[0] - 1) * stride >= 2**31
    changed = [{**t, name: far.copy_(t[name])} if i == 1 else t for i, t in enumerate(ts)]
    changed[0]["x"] = changed[1]["x"]
    results_now, dx_now = run(fastlora_kernels, joint, changed)
    assert torch.equal(dx_now, dx)
    for before, now in zip(results, results_now, strict=True):
        assert all(torch.equal(now[key], before[key]) for key in before)


def test_many_splits_and_two_runs(monkeypatch):
    monkeypatch.setattr(columns, "PROGRAMS", 16)
    joint = Joint(140, 144, (20, 12), (16, 40), "bf16", dropout_p=(0.2,))
    verify(fastlora_kernels, joint)
    ts = joint.tensors()
    (first, dx), (second, dx_again) = (run(fastlora_kernels, joint, ts) for _ in range(2))
    assert torch.equal(dx, dx_again)
    for one, two in zip(first, second, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_nothing_outside_the_outputs_is_written(monkeypatch):
    """Every buffer a launcher allocates lies in sentinels and starts as NaN."""
    guards = []

    def guarded(make):
        def empty(*args, **options):
            t = make(*args, **options)
            if not t.is_floating_point():
                return t
            buffer = torch.full((t.numel() + 256,), 7.0, dtype=t.dtype)
            guards.append(buffer)
            return buffer[128 : 128 + t.numel()].view(t.shape).fill_(torch.nan)

        return empty

    for k, ranks in ((48, (5, 3)), (27, (0, 40))):
        joint = Joint(35, k, (27, 33), ranks, "bf16-fp32", dropout_p=(0.2,))
        ts = joint.tensors()
        (results, dx), (gate, up) = run(fastlora_kernels, joint, ts), torch.randn(2, 7, 9)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", guarded(torch.empty))
            patch.setattr(torch.Tensor, "new_empty", guarded(torch.Tensor.new_empty))
            results_now, dx_now = run(fastlora_kernels, joint, ts)
            gated(gate, up.t().contiguous().t(), "silu")
            gated_backward(up, gate, up, "gelu")
        assert len(guards) >= 16
        for buffer in guards:
            assert (buffer[:128] == 7).all() and (buffer[-128:] == 7).all()
            assert not buffer.isnan().any(), "an element was never written"
        assert torch.equal(dx_now, dx)
        for before, now in zip(results, results_now, strict=True):
            assert all(torch.equal(now[key], before[key]) for key in before)


def test_a_bad_row_stays_one_row():
    joint = Joint(40, 20, (24, 10), (4, 3))
    ts = joint.tensors()
    clean, clean_dx = run(fastlora_kernels, joint, ts)
    for bad in (torch.nan, torch.inf):
        x, dy = ts[0]["x"].clone(), ts[1]["dy"].clone()
        x[7, 3] = dy[9, 5] = bad
        changed = [{**t, "x": x, "dy": dy if i == 1 else t["dy"]} for i, t in enumerate(ts)]
        results, dx = run(fastlora_kernels, joint, changed)
        pairs = [(now[n], was[n], 7) for now, was in zip(results, clean, strict=True) for n in "ys"]
        for now, was, row in (*pairs, (dx, clean_dx, 9)):
            others = torch.arange(40) != row
            assert not now[row].isfinite().any()
            assert torch.equal(now[others], was[others])


@pytest.mark.parametrize("empty", ["M", "K", "N"])
def test_empty_dimensions(empty):
    sizes = (6, 0, 3) if empty == "N" else (6, 4, 3)
    whole = Joint(5, 7, (6, 4, 3), (2, 3, 0), dropout_p=(0.3,))
    cut = replace(whole, M=5 * (empty != "M"), K=7 * (empty != "K"), sizes=sizes)
    ts = whole.tensors()
    for t, n in zip(ts, sizes, strict=True):
        t |= {"x": t["x"][: cut.M, : cut.K], "dy": t["dy"][: cut.M, :n], "a": t["a"][:, : cut.K]}
        t |= {"w": t["w"][:n, : cut.K], "b": t["b"][:n]}
        t["bias"] = None if t["bias"] is None else t["bias"][:n]
    (results, dx), (exact, exact_dx) = run(fastlora_kernels, cut, ts), expected(cut, ts, oracle)
    torch.testing.assert_close(dx, exact_dx.to(dx.dtype))
    for result, of_one in zip(results, exact, strict=True):
        for name, value in result.items():
            torch.testing.assert_close(value, of_one[name].to(value.dtype), msg=name)


def test_a_wrong_list_is_named():
    x, w, s, b = torch.ones(3, 4), torch.ones(5, 4), torch.ones(3, 2), torch.ones(5, 2)
    with pytest.raises(ValueError, match="a has 5 items; one for each of 1 to 4 projections"):
        fastlora_kernels.shrink_all(x, [w] * 5, [None] * 5, dropout_p=[0.0] * 5)
    with pytest.raises(ValueError, match="scalings has 1 items; as many as w: 2"):
        fastlora_kernels.product_all(x, [w] * 2, [s] * 2, [b] * 2, [None] * 2, [1.0])
    with pytest.raises(ValueError, match="dy has 0 items"):
        fastlora_kernels.product_sum([], [], [], [], [], dropout_p=[])
    with pytest.raises(ValueError, match="dropout_p has 2 items; as many as ds: 1"):
        fastlora_kernels.da_all(x, [s], [None], dropout_p=[0.0] * 2)
    with pytest.raises(ValueError, match="activation is 'relu'; one of silu, gelu, gelu_tanh"):
        gated(x, x, "relu")


def test_every_chip_has_a_config():
    majors, sizes = (0, 7, 8, 9, 10, 12), (48, 99, 227)
    chips = [configs.Chip((c, 0), kib << 10, 40) for c in majors for kib in sizes]
    rest = configs.LIKE, ("16", "mixed", "32"), chips, (16, 48, 64, 128, 512), (False, True)
    for kernel, kind, chip, r, p in itertools.product(*rest):
        for aligned in (False, True):
            config = configs.default_config(kernel, kind, r, p, chip, aligned)
            assert configs.is_valid(config, kernel, kind, r, p, chip)
            uneven = configs.default_config(kernel, kind, r, p, chip, aligned, even=False)
            assert configs.is_valid(uneven, kernel, kind, r, p, chip)
            assert not uneven.tma
            tma = kernel in ("product_all", "product_sum") and aligned and chip.capability[0] >= 9
            assert tma or not config.tma


def gated_results(dh, gate, up, activation) -> dict[str, torch.Tensor]:
    dgate, dup, h = gated_backward(dh, gate, up, activation)
    torch.testing.assert_close(gated(gate, up, activation), h, rtol=0, atol=0, equal_nan=True)
    assert gated_backward(dh, gate, up, activation, need_h=False)[2] is None
    return {"h": h, "dgate": dgate, "dup": dup}


def gated_plain(dh, gate, up, activation) -> dict[str, torch.Tensor]:
    gate, up = (t.detach().clone().requires_grad_() for t in (gate, up))
    h = ACTIVATIONS[activation](gate) * up
    dgate, dup = torch.autograd.grad(h, (gate, up), dh)
    return {"h": h.detach(), "dgate": dgate, "dup": dup}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 1100), (33, 45)])
def test_gated(activation, dtype, shape, device="cpu"):
    ts = [(torch.randn(shape, device=device) * scale).to(dtype) for scale in (1.0, 3.0, 1.0)]
    found, plains = gated_results(*ts, activation), gated_plain(*ts, activation)
    exact = gated_plain(*(t.double() for t in ts), activation)
    for name, value in found.items():
        accept(f"{activation} {dtype} {name}", value, plains[name], exact[name])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_strides(activation):
    """gate and up may be halves of one tensor, or lie any other way, in NaN."""
    ts = list(torch.randn(3, 9, 14).unbind())
    expected = gated_results(*ts, activation)
    both = torch.cat(ts[1:], 1)
    ways = [[ts[0], *both.split(14, 1)]]
    ways += [[*ts[:i], other, *ts[i + 1 :]] for i in range(3) for _, other in strided(ts[i])]
    for way in ways:
        found = gated_results(*way, activation)
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert all(t.is_contiguous() for t in found.values())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_where_it_is_not_finite(activation):
    extreme = [0.0, -0.0, 1e-30, 11.0, -11.0, 1e4, -1e4, 1e20, -1e20]
    extreme = torch.tensor([*extreme, torch.inf, -torch.inf, torch.nan])
    ts = torch.meshgrid(torch.tensor([1.0, torch.inf, torch.nan]), extreme, extreme, indexing="ij")
    ts = [t.reshape(3, -1) for t in ts]
    found, plains = gated_results(*ts, activation), gated_plain(*ts, activation)
    if activation == "gelu":  # on a CPU PyTorch's float32 erf(inf) is not a number
        plains = gated_plain(*(t.double() for t in ts), activation)
        plains = {name: value.float() for name, value in plains.items()}
    for name, value in found.items():
        assert torch.equal(value.isnan(), plains[name].isnan()), name
        assert torch.equal(value.isposinf(), plains[name].isposinf()), name
        assert torch.equal(value.isneginf(), plains[name].isneginf()), name


def test_gated_rows_past_two_billion_elements():
    ts = list(torch.randn(3, 4, 6).unbind())
    expected = gated_results(*ts, "silu")
    for i in range(3):
        far = torch.empty(3 * 2**30 + 6).as_strided((4, 6), (2**30, 1)).copy_(ts[i])
        found = gated_results(*ts[:i], far, *ts[i + 1 :], "silu")
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_gated_of_nothing(activation, shape):
    ts = [torch.randn(shape) for _ in range(3)]
    assert all(t.shape == shape for t in gated_results(*ts, activation).values())


# name: (file, line as it is, line as it would be wrong)
MUTANTS = {
    "seed of the first for all": (
        "joint_shrink.py",
        "_dropped(x, seed_ptrs[i], offs_m",
        "_dropped(x, seed_ptrs[0], offs_m",
    ),
    "seed of the first for all, at high ranks": (
        "joint_shrink.py",
        "seed_ptr = pointer_of(i, seed_ptrs)",
        "seed_ptr = pointer_of(0, seed_ptrs)",
    ),
    "mask of the first tile of x": (
        "joint_shrink.py",
        "offs_m, k, K, keep_froms",
        "offs_m, 0, K, keep_froms",
    ),
    "1 / (1 - p) of the first": (
        "joint_shrink.py",
        "tl.cast(scales[i], ACC)",
        "tl.cast(scales[0], ACC)",
    ),
    "sum of a projection started again": (
        "joint_shrink.py",
        "dot(x_hat, a, sums[i])",
        "dot(x_hat, a, sums[0])",
    ),
    "step of a not taken": ("joint_shrink.py", "a_tiles[i] + steps_a[i]", "a_tiles[i]"),
    "K mask of x one short": (
        "joint_shrink.py",
        "            mask_k = offs_k < K - k\n            if EVEN_K",
        "            mask_k = offs_k < K - k - 1\n            if EVEN_K",
    ),
    "rank tile of another projection": ("joint.py", "return i, tile - first", "return i, tile"),
    "tile one too late": ("joint.py", "(tile >= end)", "(tile > end)"),
    "w of the first": ("joint_product.py", "pointer_of(i, w_ptrs)", "pointer_of(0, w_ptrs)"),
    "scaling of the first": (
        "joint_product.py",
        "number_of(i, scales, ACC),",
        "scales[0],",
    ),
    "bias dropped": ("joint_product.py", "acc += tl.load(bias_tile", "tl.load(bias_tile"),
    "bias where there is none": (
        "joint_product.py",
        "offs_n < number_of(i, bias_sizes, tl.int32)",
        "mask_n",
    ),
    "last column of a projection lost": (
        "joint_product.py",
        "mask_n = offs_n < N",
        "mask_n = offs_n < N - 1",
    ),
    "last projection missing in dx": (
        "joint_sum.py",
        "    for i in tl.range(0, COUNT, num_stages=1):\n        acc = add_product(",
        "    for i in tl.range(0, COUNT - 1, num_stages=1):\n        acc = add_product(",
    ),
    "low-rank term of dx missing": ("joint_sum.py", "acc += low_rank_tile(", "low_rank_tile("),
    "low-rank term of dx for the last alone": (
        "joint_sum.py",
        "acc += low_rank_tile(",
        "acc = low_rank_tile(",
    ),
    "dx masked by the first seed": (
        "joint_sum.py",
        "pointer_of(i, seed_ptrs)",
        "pointer_of(0, seed_ptrs)",
    ),
    "dx masked at the wrong column": (
        "joint_sum.py",
        "                    pid_k * BLOCK_N,",
        "                    0,",
    ),
    "dx not masked": (
        "joint_sum.py",
        "                    True,\n",
        "                    False,\n",
    ),
    "16-bit sums between projections": (
        "joint_sum.py",
        "        acc = add_product(\n            acc,",
        "        acc = add_product(\n            acc.to(tl.bfloat16).to(tl.float32),",
    ),
    "da of x as it is": (
        "joint_columns.py",
        "x = (x.to(ACC) * tl.trans(keep).to(ACC)).to(x.dtype)",
        "pass",
    ),
    "da by the next rows' mask": (
        "joint_columns.py",
        "keep_tile(seed_ptr, offs_m,",
        "keep_tile(seed_ptr, offs_m + 1,",
    ),
    "da of the first ds": (
        "joint_columns.py",
        "                    ds_ptrs[i],",
        "                    ds_ptrs[0],",
    ),
    "da not scaled": ("joint_columns.py", "        number_of(i, scales, ACC),\n", "        1.0,\n"),
    "da of the first split": (
        "joint_columns.py",
        "first_row = split * steps * BLOCK_M",
        "first_row = 0",
    ),
}
# The first is the largest: what is taken for another is then still read inside of a tensor.
REFUSING = [
    Joint(70, 80, (130, 20), (5, 3), "bf16", "low_rank", (0.3, 0.1), (True, False)),
    Joint(70, 260, (300, 130), (5, 3), "fp32", "base", (), (True, False)),
    Joint(40, 144, (24, 20), (130, 5), "bf16", "low_rank", (0.3, 0.1)),
]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_refused(name, tmp_path, monkeypatch):
    mutant = load(tmp_path, f"joint_mutant_{list(MUTANTS).index(name)}", *MUTANTS[name])
    with pytest.raises(AssertionError):
        for joint in REFUSING:
            verify(mutant, joint)


def test_the_right_kernels_are_accepted():
    for joint in REFUSING:
        verify(fastlora_kernels, joint)
