# SPDX-License-Identifier: Apache-2.0
"""The products of several projections on sm_90 and later, interpreted, against the same oracle."""

from __future__ import annotations

import importlib
from dataclasses import replace

import fastlora_kernels
import pytest
import torch
from fastlora_kernels import configs, launch, linears
from fastlora_kernels.configs import Chip, Config
from test_acceptance import load
from test_joint_kernels import Joint, run, verify
from test_persistent import HOPPER, names, tiled

from fastlora.operator import library

# The package's own attributes of some of these names are the launchers.
persistent_all, persistent_sum = (
    importlib.import_module(f"fastlora_kernels.persistent_{name}") for name in ("all", "sum")
)
# Ragged in every dimension that may be; rows of 16 bytes; one projection without an adapter.
QKV = Joint(40, 40, (40, 24, 40), (8, 0, 16), "bf16", scaling=0.5)


def both(low_rank: str = "fold", **rest) -> dict[str, Config]:
    return {
        "product_all": tiled(low_rank, **rest),
        "product_sum": tiled("fold", **rest),
    }


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The persistent kernels that the test launches, with their grids."""
    found: list = []

    def noting(kernel, grid, *rest, **options):
        found.append((kernel.__name__.removesuffix("_kernel"), *grid))
        launch.launch(kernel, grid, *rest, **options)

    for module in (persistent_all, persistent_sum):
        monkeypatch.setattr(module, "launch", noting)
    return found


@pytest.mark.parametrize(
    ("low_rank", "kind"),
    [("fold", "bf16"), *(("first", kind) for kind in ("bf16", "fp16", "bf16-fp32", "fp16-fp32"))],
)
@pytest.mark.parametrize(
    ("mode", "p"), [("base", ()), ("low_rank", ()), ("both", ()), ("low_rank", (0.3, 0.0, 0.5))]
)
def test_acceptance_rule(low_rank, kind, mode, p, launched):
    joint = replace(QKV, kind=kind, mode=mode, dropout_p=p)
    verify(fastlora_kernels, joint, configs=both(low_rank))
    # Low-rank terms that are made before could overflow float16.
    before = kind == "fp16-fp32" or (kind == "fp16" and p)
    takes = ["persistent_all"] if before else ["persistent_all", "persistent_sum"]
    assert [name for name, _ in launched] == takes


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [((40,), (8,)), ((24, 64), (16, 16)), ((16, 8, 80, 32), (40, 8, 8, 24)), ((32, 32), (0, 0))],
)
@pytest.mark.parametrize("low_rank", ["fold", "first"])
def test_numbers_of_projections_and_ranks(sizes, ranks, low_rank, launched):
    verify(fastlora_kernels, replace(QKV, sizes=sizes, ranks=ranks), configs=both(low_rank))
    assert [name for name, _ in launched] == ["persistent_all", "persistent_sum"]


def test_any_rank_joins_first(launched):
    verify(fastlora_kernels, replace(QKV, ranks=(3, 5, 33)), configs=both("first"))
    assert [name for name, _ in launched] == ["persistent_all", "persistent_sum"]


@pytest.mark.parametrize("low_rank", ["fold", "first"])
def test_more_tiles_than_programs(low_rank, launched, monkeypatch):
    """A program goes on to its next tile, of another projection; groups of rows end well."""
    for module in (persistent_all, persistent_sum):
        monkeypatch.setattr(module, "chip_of", lambda device: Chip((0, 0), 1 << 30, 3))
    verify(fastlora_kernels, replace(QKV, M=100), configs=both(low_rank, group_m=2))
    assert launched == [("persistent_all", 3), ("persistent_sum", 3)]


@pytest.mark.parametrize(("kind", "name"), [("16", "bf16"), ("mixed", "bf16-fp32")])
def test_the_tiles_of_the_defaults(kind, name):
    config = configs.default_config("product_all", kind, 16, False, HOPPER)
    assert config.tma and config.block_n == 256  # written in two halves
    joint = Joint(config.block_m + 9, 280, (280, 16), (16, 16), name, scaling=0.5)
    verify(fastlora_kernels, joint, configs={"product_all": config, "product_sum": config})


@pytest.mark.parametrize("low_rank", ["fold", "first"])
def test_no_stage_reads_what_is_not_there(low_rank, launched):
    """Rows and columns past the end are NaN in memory, and must not matter."""
    ts = QKV.tensors()
    padded = [dict(t) for t in ts]
    for i, t in enumerate(padded):
        for name in ("x", "w", "a", "b", "dy"):
            rows, columns = t[name].shape
            around = torch.full((rows + 40, columns + 40), float("nan"), dtype=t[name].dtype)
            around[:rows, :columns] = t[name]
            t[name] = around[:rows, :columns] if name != "x" or i == 0 else padded[0]["x"]
    (found, dx), (expected, expected_dx) = (
        run(fastlora_kernels, QKV, t, both(low_rank)) for t in (padded, ts)
    )
    assert len(launched) == 4
    assert torch.equal(dx, expected_dx)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("low_rank", ["fold", "first"])
def test_an_infinity_stays_where_it_is(low_rank):
    ts = [{n: v if v is None else v.abs() for n, v in t.items()} for t in QKV.tensors()]
    for t in ts:
        t["x"] = ts[0]["x"]
    ts[0]["x"][3, 5] = ts[2]["dy"][4, 6] = float("inf")
    results, dx = run(fastlora_kernels, QKV, ts, both(low_rank))
    others = torch.arange(QKV.M)
    for result in results:
        assert (result["y"][3] == float("inf")).all()
        assert result["y"][others != 3].isfinite().all()
    assert (dx[4] == float("inf")).all() and dx[others != 4].isfinite().all()


@pytest.mark.parametrize(
    ("change", "takes"),
    [
        # The interpreter's chip has no other TMA config that its default could be.
        ({"ranks": (8, 0, 12)}, ["persistent_sum"]),  # rows of s that are not 16 bytes apart
        ({"kind": "fp16", "dropout_p": (0.3,)}, ["persistent_all"]),
        ({"K": 39}, []),
        ({"sizes": (40, 20, 40)}, []),
    ],
    ids=str,
)
def test_what_the_copy_engine_cannot_read_goes_another_way(change, takes, launched):
    joint = replace(QKV, **change)
    verify(fastlora_kernels, joint, configs=both())
    assert [name for name, _ in launched] == takes


@pytest.mark.parametrize("turned", ["x", "w", "b", "dy"])
def test_what_lies_by_columns_goes_another_way(turned, launched):
    ts = QKV.tensors()
    expected, expected_dx = run(fastlora_kernels, QKV, ts, both())
    launched.clear()
    ts[2][turned] = ts[2][turned].t().contiguous().t()
    for t in ts:
        t["x"] = ts[2]["x"]
    found, dx = run(fastlora_kernels, QKV, ts, both())
    forward, backward = turned not in ("x", "w", "b"), turned not in ("w", "dy")
    takes = ["persistent_all"] * forward + ["persistent_sum"] * backward
    assert [name for name, _ in launched] == takes
    torch.testing.assert_close(dx, expected_dx)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one["y"], other["y"])


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def qkv_calls(chip, adapter=torch.bfloat16, p=0.0, scaling=2.0, r=16, others=None):
    """Return the launches of q, k and v on a chip, forward and backward.

    ``others``: whether a projection has an adapter and its scaling, by its number.
    """
    M, K, sizes = 256, 512, (512, 128, 128)
    rest = (empty(1, dtype=torch.int64) if p else None), scaling, p
    projections = [
        (empty(n, K), empty(r, K, dtype=adapter), empty(n, r, dtype=adapter), None, *rest)
        for n in sizes
    ]
    for i, (adapted, c) in (others or {}).items():
        w, a, b, bias, seed, _, p = projections[i]
        projections[i] = (w, *((a, b) if adapted else (None, None)), bias, seed, c, p)
    with launch.recording(chip) as forward:
        _, s = linears.forward_all(empty(M, K), projections)
    with launch.recording(chip) as backward:
        needs = [(True, True)] * len(sizes)
        linears.backward_all([empty(M, n) for n in sizes], empty(M, K), projections, s, True, needs)
    return forward, backward


def test_defaults_of_each_chip():
    forward, backward = qkv_calls(HOPPER)
    assert names(forward) == ["shrink_all", "persistent_all"]
    assert "persistent_sum" in names(backward)
    shrink, product = forward
    assert shrink.args["factor"] == 2.0
    for scaled, read in zip(shrink.args["scaled_ptrs"], product.args["s_ptrs"], strict=True):
        assert scaled is read
    assert (product.args["scales"], product.args["LOW_RANK"]) == ((1.0,), "fold")
    for calls in (qkv_calls(HOPPER, torch.float32), qkv_calls(HOPPER, r=4)):
        assert names(calls[0]) == ["shrink_all", "persistent_all"]
        assert calls[0][0].args["scaled_ptrs"] is None
        assert (calls[0][1].args["scales"], calls[0][1].args["LOW_RANK"]) == ((2.0,), "first")
    for how in ({"adapter": torch.float32}, {"p": 0.1}, {"r": 4}):
        calls = [c for c in qkv_calls(HOPPER, **how)[1] if "sum" in c.kernel.__name__]
        rest, product = (
            c
            for c in calls
            if c.kernel.__name__.endswith(("product_sum_kernel", "persistent_sum_kernel"))
        )
        # The low-rank terms come in a launch of their own, which makes no product of dy.
        assert rest.args["sizes"] == (0, 0, 0) and product.args["sizes"] == (512, 128, 128)
        assert rest.args["dx_ptr"] is product.args["rest_ptr"]
    assert qkv_calls(HOPPER, scaling=1.0)[0][0].args["scaled_ptrs"] is None
    # k frozen, whose scaling is nobody's; then scalings that differ.
    for others, low_rank in (({1: (None, 1.0)}, "fold"), ({1: (True, 3.0)}, "first")):
        forward, _ = qkv_calls(HOPPER, others=others)
        assert names(forward) == ["shrink_all", "persistent_all"]
        assert forward[1].args["LOW_RANK"] == low_rank
    assert "persistent_all" in names(qkv_calls(HOPPER, p=0.1)[0])
    forward, backward = qkv_calls(Chip((8, 0), 166912, 108))
    assert names(forward) == ["shrink_all", "product_all"] and "product_sum" in names(backward)


@pytest.mark.parametrize("ranks", [(8, 8), (8, 128)])
def test_forward_of_several_scales_s_on_the_way(ranks, monkeypatch, launched):
    """As the layers do it: s is kept as it is, and the product reads c · s."""
    joint = Joint(33, 40, (24, 16), ranks, "bf16", scaling=0.5)
    ts = joint.tensors()
    projections = [
        (t["w"], t["a"], t["b"], t["bias"], t["seed"], case.scaling, case.dropout_p)
        for t, case in zip(ts, joint.cases(), strict=True)
    ]
    expected = linears.forward_all(ts[0]["x"], projections)
    monkeypatch.setattr(linears, "config_of", lambda x, w, b: tiled("fold"))
    found = linears.forward_all(ts[0]["x"], projections)
    assert [name for name, _ in launched] == ["persistent_all"]
    for y, other in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(y, other)
    assert all(torch.equal(s, other) for s, other in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize(
    ("kernel", "config", "kind", "dropout"),
    [
        ("product_all", tiled("after"), "16", False),
        ("product_all", tiled("recompute"), "16", False),
        ("product_all", tiled("fold"), "mixed", False),
        ("product_all", tiled("fold"), "fp16", False),
        ("product_sum", tiled("first"), "16", False),
        ("da_all", tiled("fold"), "16", False),
    ],
)
def test_configs_that_cannot_run_are_refused(kernel, config, kind, dropout):
    assert not configs.is_valid(config, kernel, kind, 16, dropout, HOPPER)


# name: (file, line as it is, line as it would be wrong)
MUTANTS = {
    "w of the first": (
        "persistent_all.py",
        "w_desc = pointer_of(i_tile, w_descs)",
        "w_desc = w_descs[0]",
    ),
    "y of the first": (
        "persistent_all.py",
        "store_tile(pointer_of(i_tile, y_descs)",
        "store_tile(y_descs[0]",
    ),
    "s of the first": (
        "persistent_all.py",
        "s_desc = pointer_of(i_tile, s_descs)",
        "s_desc = s_descs[0]",
    ),
    "b of the first": (
        "persistent_all.py",
        "b_desc = pointer_of(i_tile, b_descs)",
        "b_desc = b_descs[0]",
    ),
    "no fold": ("persistent_all.py", "all_steps += tl.cdiv(R_tile, BLOCK_K)", "pass"),
    "one step of the fold": (
        "persistent_all.py",
        "all_steps += tl.cdiv(R_tile, BLOCK_K)",
        "all_steps += 1",
    ),
    "fold one step early": ("persistent_all.py", "if step >= steps:", "if step >= steps - 1:"),
    "bias where there is none": (
        "persistent_all.py",
        "mask = offs_n < number_of(i_tile, bias_sizes, tl.int32)",
        "mask = offs_n < N_tile",
    ),
    "bias of the first": (
        "persistent_all.py",
        "tl.load(pointer_of(i_tile, bias_ptrs) + columns",
        "tl.load(bias_ptrs[0] + columns",
    ),
    "halves swapped": (
        "persistent.py",
        "y_desc.store([first_m, first_n], left.to(dtype))",
        "y_desc.store([first_m, first_n], right.to(dtype))",
    ),
    "s scaled twice": (
        "joint_shrink.py",
        "                s *= tl.cast(factor, ACC)\n",
        "                s *= tl.cast(factor * factor, ACC)\n",
    ),
    "s of high ranks scaled twice": (
        "joint_shrink.py",
        "            acc *= tl.cast(factor, ACC)\n",
        "            acc *= tl.cast(factor * factor, ACC)\n",
    ),
    "last dy missing": (
        "persistent_sum.py",
        "for step in range(end):",
        "for step in range(ends[0]):",
    ),
    "dy of the second again": (
        "persistent_sum.py",
        "dy_from, w_from, n = dys[i], ws[i]",
        "dy_from, w_from, n = dys[1], ws[i]",
    ),
    "step not from the start": (
        "persistent_sum.py",
        "(step - ends[i - 1]) * BLOCK_K",
        "step * BLOCK_K",
    ),
    "one step late": ("persistent_sum.py", "if step >= ends[i - 1]:", "if step > ends[i - 1]:"),
    "rest of the left half for both": (
        "persistent_sum.py",
        "right += rest_desc.load([first_m, first_k + WIDTH])",
        "right += rest_desc.load([first_m, first_k])",
    ),
    "no rest in the left half": ("persistent_sum.py", "left += rest_desc", "rest_desc"),
    "low-rank terms not masked": (
        "joint_sum.py",
        "folds = not dropout and adapter",
        "folds = adapter",
    ),
    "tile of another row": (
        "persistent_sum.py",
        "dy = dy_from.load([first_m, n])",
        "dy = dy_from.load([0, n])",
    ),
}
WIDE = {
    name: replace(config, block_n=256) for name, config in both().items()
}  # written in two halves
REFUSING = [
    (replace(QKV, biases=(True, False, True)), both()),
    (replace(QKV, K=64, sizes=(136, 128), ranks=(40, 8), mode="low_rank"), WIDE),
    (replace(QKV, K=136, sizes=(16, 8), ranks=(8, 8), mode="low_rank", dropout_p=(0.5, 0.3)), WIDE),
]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_refused(name, tmp_path):
    mutant = load(tmp_path, f"tma_mutant_{list(MUTANTS).index(name)}", *MUTANTS[name])
    with pytest.raises(AssertionError):
        for joint, config in REFUSING:
            verify(mutant, joint, configs=config)


def test_the_right_kernels_are_accepted():
    for joint, config in REFUSING:
        verify(fastlora_kernels, joint, configs=config)


def test_float16_does_not_overflow_before_the_sum():
    """The low-rank terms alone are past its largest number; with the main product they are not."""
    dy, w = torch.full((16, 8), -50.0).half(), torch.full((8, 32), 50.0).half()
    ds, a = torch.full((16, 2), 200.0), torch.full((2, 32), 175.0)  # 70,000 and -20,000
    for p, seed in ((0.0, None), (1e-5, torch.tensor([1]))):
        operands = [dy] * 1, [w], [ds], [a], [seed]
        dx = fastlora_kernels.product_sum(*operands, dropout_p=[p], config=tiled("fold"))
        assert dx.isfinite().all() and dx.float().mean() > 49_000


@pytest.mark.parametrize("chip", [HOPPER, Chip((8, 0), 166912, 108)], ids=["sm_90", "sm_80"])
def test_adapters_of_two_dtypes_are_never_in_one_launch(chip):
    """A kernel chooses among pointers of one type; the interpreter would not mind."""
    kinds = torch.bfloat16, torch.float32, torch.bfloat16
    projections = [
        (empty(64, 64), empty(16, 64, dtype=d), empty(64, 16, dtype=d), None, None, 0.5, 0.0)
        for d in kinds
    ]
    projections.insert(1, (empty(64, 64), None, None, None, None, 1.0, 0.0))
    with launch.recording(chip) as calls:
        _, s = linears.forward_all(empty(32, 64), projections)
        dys, needs = [empty(32, 64)] * 4, [(True, True)] * 4
        linears.backward_all(dys, empty(32, 64), projections, s, True, needs)
        library._low_rank_grad(empty(32, 64), s, projections)
    assert [t is None for t in s] == [False, True, False, False]
    for call in calls:
        for value in call.args.values():
            if isinstance(value, tuple):
                tensors = [t for t in value if isinstance(t, torch.Tensor)]
                assert len({t.dtype for t in tensors}) <= 1, call.kernel.__name__
