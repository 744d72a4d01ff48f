# SPDX-License-Identifier: Apache-2.0
"""The wide products of sm_90 and later, interpreted: descriptors, persistence, low-rank steps."""

from __future__ import annotations

import itertools
from dataclasses import replace

import fastlora_kernels
import pytest
import torch
from fastlora_kernels import configs, input_grad, launch, outputs, steps
from fastlora_kernels.configs import Chip, Config
from joints import Joint, run, same, verify, verify_exactly
from recorder import recording
from test_kernels import AMPERE, HOPPER, empty

# Ragged in every dimension that may be; rows of 16 bytes; one projection without an adapter.
QKV = Joint(40, 40, (40, 24, 40), (8, 0, 16), "bf16", scaling=0.5)
ONE = Joint(50, 72, (40,), (8,), "bf16", scaling=0.5)
SHIPPED = {c for (kernel, _), cs in configs.DEFAULTS.items() for c in cs if c.tma}
each_low_rank = pytest.mark.parametrize("low_rank", ["fold", "first"])


def tiled(low_rank: str = "fold", **rest) -> dict[str, Config]:
    """Configs for both wide products; of several projections the sum folds or has a rest."""
    y, dx = (Config(32, 32, 32, tma=True, low_rank=how, **rest) for how in (low_rank, "fold"))
    return {"outputs": y, "input_grad": dx}


def both(low_rank: str, **rest) -> dict[str, Config]:
    """Configs for both wide products of a single projection."""
    return dict.fromkeys(("outputs", "input_grad"), tiled(low_rank, **rest)["outputs"])


@pytest.fixture
def launched(monkeypatch) -> list[tuple[str, int]]:
    """The persistent kernels that are launched, and the programs of each."""
    found: list = []

    class Counting(launch.Launch):
        def __call__(self, *tensors):
            name = self.kernel.__name__.removesuffix("_kernel")
            if name.startswith("persistent"):
                found.append((name.removeprefix("persistent_"), self.grid[0]))
            super().__call__(*tensors)

    for module in (outputs, input_grad):
        monkeypatch.setattr(module, "Launch", Counting)
    return found


@each_low_rank
@pytest.mark.parametrize(
    ("kind", "p"),
    [("bf16", ()), ("fp16", (0.3, 0.0, 0.3)), ("bf16-fp32", ()), ("fp16-fp32", (0.3,))],
)
def test_acceptance_rule(low_rank, kind, p, launched):
    for i, mode in enumerate(("base", "low_rank", "both")):
        one = replace(ONE, kind=kind, mode=mode, dropout_p=p, biases=(i > 0,))
        verify(fastlora_kernels, one, configs=both(low_rank))
        launched.clear()
        verify(
            fastlora_kernels,
            replace(QKV, kind=kind, mode=mode, dropout_p=p),
            configs=tiled(low_rank),
        )
    y = low_rank == "first" or kind == "bf16"  # the interpreter's chip has no other such config
    dx = kind.startswith("bf16")  # terms that are made before could overflow float16
    assert [name for name, _ in launched] == ["outputs"] * y + ["input_grad"] * dx


@each_low_rank
@pytest.mark.parametrize("r", [1, 8, 24, 40, 64])
def test_ranks_of_one_tile_and_of_several(low_rank, r):
    joint = Joint(33, 40, (24,), (r,), "bf16", scaling=0.5)
    verify(fastlora_kernels, joint, configs=both(low_rank, block_r=32))


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [((40,), (0,)), ((24, 64), (16, 16)), ((16, 8, 80, 32), (40, 8, 8, 24)), ((32, 32), (0, 0))],
)
@each_low_rank
def test_numbers_of_projections_and_ranks(sizes, ranks, low_rank, launched):
    verify(fastlora_kernels, replace(QKV, sizes=sizes, ranks=ranks), configs=tiled(low_rank))
    assert [name for name, _ in launched] == ["outputs", "input_grad"]


def test_any_rank_joins_first(launched):
    verify(fastlora_kernels, replace(QKV, ranks=(3, 5, 33)), configs=tiled("first"))
    assert [name for name, _ in launched] == ["outputs", "input_grad"]


@each_low_rank
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_small_integers_are_exact(low_rank, p):
    verify_exactly(replace(ONE, dropout_p=(p,)), configs=both(low_rank))


@pytest.mark.parametrize("config", sorted(SHIPPED, key=str), ids=str)
def test_the_tiles_that_ship(config):
    joint = Joint(config.block_m + 9, config.block_k + 8, (config.block_n + 24,), (16,), "bf16")
    verify(fastlora_kernels, joint, configs=dict.fromkeys(("outputs", "input_grad"), config))


def test_tiles_of_several_are_written_in_two_halves():
    for kind, name in (("16", "bf16"), ("mixed", "bf16-fp32")):
        y, dx = (
            configs.default_config(kernel, kind, 16, False, HOPPER, 2)
            for kernel in configs.DROPPING[1::2]
        )
        assert y.tma and dx.tma and y.block_n == dx.block_n == 256
        joint = Joint(y.block_m + 9, 280, (280, 16), (16, 16), name, scaling=0.5)
        verify(fastlora_kernels, joint, configs={"outputs": y, "input_grad": dx})


@each_low_rank
def test_more_tiles_than_programs(low_rank, launched, monkeypatch):
    """A program goes on to its next tile, of another projection; groups of rows end well."""
    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: Chip((0, 0), 1 << 30, 3)))
    verify(fastlora_kernels, replace(QKV, M=100), configs=tiled(low_rank, group_m=2))
    verify(fastlora_kernels, replace(ONE, M=100), configs=both(low_rank, group_m=2))
    assert launched == [("outputs", 3), ("input_grad", 3)] * 2


@each_low_rank
@pytest.mark.parametrize("joint", [ONE, QKV], ids=["one", "several"])
def test_no_stage_reads_what_is_not_there(joint, low_rank, launched):
    """Rows and columns past the end are NaN in memory, and must not matter."""
    ts = joint.tensors()
    padded = [dict(t) for t in ts]
    for i, t in enumerate(padded):
        for name in ("x", "w", "a", "b", "dy"):
            rows, columns = t[name].shape
            around = torch.full((rows + 40, columns + 40), float("nan"), dtype=t[name].dtype)
            around[:rows, :columns] = t[name]
            t[name] = around[:rows, :columns] if name != "x" or i == 0 else padded[0]["x"]
    chosen = both(low_rank) if joint is ONE else tiled(low_rank)
    same(*(run(fastlora_kernels, joint, t, chosen) for t in (padded, ts)))
    assert len(launched) == 4


@each_low_rank
@pytest.mark.parametrize("ranks", [(8, 0, 16), (8,), (1,)])
def test_an_infinity_stays_where_it_is(low_rank, ranks):
    """As in eager mode: not NaN, although it meets the zeros past the rank and past K."""
    joint = replace(QKV, ranks=ranks, sizes=QKV.sizes[: len(ranks)])
    ts = [{n: v if v is None else v.abs() for n, v in t.items()} for t in joint.tensors()]
    for t in ts:
        t["x"] = ts[0]["x"]
    ts[0]["x"][3, 5] = ts[-1]["dy"][4, 6] = float("inf")
    results, dx = run(fastlora_kernels, joint, ts, tiled(low_rank))
    others = torch.arange(QKV.M)
    for result in results:
        assert (result["y"][3] == float("inf")).all()
        assert result["y"][others != 3].isfinite().all()
    assert (dx[4] == float("inf")).all() and dx[others != 4].isfinite().all()


@pytest.mark.parametrize(
    ("change", "takes"),
    [
        ({"ranks": (8, 0, 12)}, ["input_grad"]),  # rows of b that are not 16 bytes apart
        ({"kind": "fp16", "dropout_p": (0.3,)}, []),
        ({"K": 39}, []),
        ({"sizes": (40, 20, 40)}, []),
        ({"sizes": (33,), "ranks": (8,), "K": 41}, []),
    ],
    ids=str,
)
def test_what_the_copy_engine_cannot_read_goes_another_way(change, takes, launched):
    joint = replace(QKV, **change)
    verify(fastlora_kernels, joint, configs=tiled())
    assert [name for name, _ in launched] == takes


@pytest.mark.parametrize("turned", ["x", "w", "b", "dy", "misaligned", "expanded", "every w"])
@pytest.mark.parametrize("joint", [ONE, QKV], ids=["one", "several"])
def test_what_lies_another_way(turned, joint, launched):
    """w by columns has its own descriptors, if all have it; what nothing can read goes round."""
    ts = joint.tensors()
    for name in "xwb":
        if turned == name or turned == f"every {name}":
            for t in ts if "every" in turned else ts[-1:]:
                t[name] = t[name].t().contiguous().t()
    if turned == "dy":
        ts[-1]["dy"] = ts[-1]["dy"].t().contiguous().t()
    if turned == "misaligned":
        flat = torch.empty(ts[0]["x"].numel() + 1, dtype=torch.bfloat16)
        flat[1:] = ts[0]["x"].flatten()
        ts[-1]["x"] = flat[1:].view_as(ts[0]["x"])
    if turned == "expanded":
        ts[-1]["dy"] = ts[-1]["dy"][:1].expand(joint.M, -1)
    for t in ts:
        t["x"] = ts[-1]["x"]
    verify(fastlora_kernels, joint, configs=tiled(), ts=ts)
    one, named = joint is ONE, [name for name, _ in launched]
    turned = "every w" if turned == "w" and one else turned
    # The interpreter's chip has no "first" that could take what cannot be folded.
    y = turned in ("dy", "expanded")
    # Those of several projections may be made before.
    dx = turned in ("x", "b", "misaligned") or (turned == "every w" and not one)
    assert named == ["outputs"] * y + ["input_grad"] * dx


def test_w_by_columns_has_descriptors_of_its_own(launched):
    for joint, low_rank in itertools.product((ONE, QKV), ("fold", "first")):
        ts = joint.tensors()
        for t in ts:
            t["w"], t["b"] = t["w"].t().contiguous().t(), t["b"].t().contiguous().t()
        chosen = both("first") if joint is ONE else tiled()
        chosen = {**chosen, "outputs": tiled(low_rank)["outputs"]}
        verify(fastlora_kernels, joint, configs=chosen, ts=ts)
        assert [name for name, _ in launched] == ["outputs", "input_grad"]
        launched.clear()


def test_rows_stored_one_by_one_take_smaller_tiles(launched):
    """A wide tile has more addresses then than a thread has registers."""
    wide = Config(128, 256, 64, num_warps=8, tma=True, low_rank="fold")
    verify(
        fastlora_kernels,
        Joint(40, 40, (33,), (8,), "bf16"),
        configs={"outputs": wide, "input_grad": wide},
    )
    assert launched == []  # y through the portable kernel; dx has odd rows to read
    with recording(HOPPER) as calls:
        w, b = empty(33, 64), empty(33, 8)
        outputs.outputs(empty(64, 64), (w,), (empty(64, 8),), (b,), (None,), (1.0,))
    assert calls[0].config.block_m * calls[0].config.block_n <= configs.MOST_UNEVEN


def test_float16_is_not_scaled_before_it_has_to_be():
    """A scaled s overflows where s does not, and b makes the product small again."""
    joint = Joint(32, 32, (16,), (8,), "fp16", biases=(False,), scaling=1e3)
    (t,) = joint.tensors()
    t = {n: v if v is None else v.abs() for n, v in t.items()}
    t |= {"a": t["a"] * 4e3, "b": t["b"] * 1e3 / 4e3}
    reference = t["x"].double() @ (
        t["w"].double().t() + 1e3 * (t["b"].double() @ t["a"].double()).t()
    )
    for low_rank in ("fold", "first"):
        (found,), _ = run(fastlora_kernels, joint, [t], both(low_rank))
        assert found["y"].isfinite().all()
        torch.testing.assert_close(found["y"].double(), reference, rtol=1e-2, atol=1.0)


def test_float16_does_not_overflow_before_the_sum():
    """The low-rank terms alone are past its largest number; with the main product they are not."""
    dy, w = torch.full((16, 8), -50.0).half(), torch.full((8, 32), 50.0).half()
    ds, a = torch.full((16, 2), 200.0), torch.full((2, 32), 175.0)  # 70,000 and -20,000
    for (p, seed), config in itertools.product(
        ((0.0, None), (1e-5, torch.tensor([1]))), tiled("first").values()
    ):
        dx = input_grad.input_grad((dy,), (w,), (ds,), (a,), (seed,), (p,), config)
        assert dx.isfinite().all() and dx.float().mean() > 49_000


def qkv_calls(chip, dtype=torch.bfloat16, p=0.0, scaling=2.0, r=16, others=None, count=3):
    """Return the launches of q, k and v, or of q, on a chip, forward and backward.

    ``others``: whether a projection has an adapter and its scaling, by its number.
    """
    x, sizes = empty(256, 512), (512, 128, 128)[:count]
    rest = (empty(1, dtype=torch.int64) if p else None), scaling, p
    of = [
        (empty(n, 512), empty(r, 512, dtype=dtype), empty(n, r, dtype=dtype), None, *rest)
        for n in sizes
    ]
    for i, (adapted, c) in (others or {}).items():
        w, a, b, bias, seed, _, p = of[i]
        of[i] = (w, *((a, b) if adapted else (None, None)), bias, seed, c, p)
    with recording(chip) as forward:
        ss, scaled = steps.shrink(x, of)
        ys = steps.outputs(x, of, ss, scaled)
    with recording(chip) as backward:
        needs = [True] * count
        dss, _ = steps.ds_db(ys, of, ss, needs, needs)
        steps.input_grad(ys, of, dss)
        steps.da(x, of, dss, needs)
    return forward, backward


def names(calls) -> list[str]:
    return [call.kernel.__name__.removesuffix("_kernel") for call in calls]


@pytest.mark.parametrize("count", [1, 3])
def test_defaults_of_each_chip(count):
    forward, backward = qkv_calls(HOPPER, count=count)
    assert names(forward) == ["shrink", "persistent_outputs"]
    narrow = ["ds_db"] * count + ["sum"]
    assert names(backward) == [*narrow, "persistent_input_grad", "da", "sum"]
    shrink, product = forward
    assert shrink.args["factor"] == 2.0
    for scaled, read in zip(shrink.args["scaled_ptrs"], product.args["s_ptrs"], strict=True):
        assert scaled is read
    assert (product.args["scales"], product.args["LOW_RANK"]) == ((1.0,), "fold")
    assert backward[count + 1].args["LOW_RANK"] == "fold"
    for how in ({"dtype": torch.float32}, {"r": 4}):
        shrink, product = qkv_calls(HOPPER, count=count, **how)[0]
        assert shrink.args["scaled_ptrs"] is None
        assert (product.args["scales"], product.args["LOW_RANK"]) == ((2.0,), "first")
    for how in ({"dtype": torch.float32}, {"p": 0.1}, {"r": 4}):
        calls = [c for c in qkv_calls(HOPPER, count=count, **how)[1] if "dx_ptr" in c.args]
        if count == 1:
            assert [c.args["LOW_RANK"] for c in calls] == ["first"]
            continue
        rest, product = calls
        # The low-rank terms come in a launch of their own, which makes no product of dy.
        assert rest.args["sizes"] == (0, 0, 0) and product.args["sizes"] == (512, 128, 128)
        assert rest.args["dx_ptr"] is product.args["rest_ptr"]
    assert qkv_calls(HOPPER, scaling=1.0)[0][0].args["scaled_ptrs"] is None
    forward, backward = qkv_calls(AMPERE, count=count)
    assert names(forward) == ["shrink", "outputs"] and "input_grad" in names(backward)


def test_defaults_where_projections_differ():
    """k frozen, whose scaling is nobody's; then scalings that differ."""
    for others, low_rank in (({1: (None, 1.0)}, "fold"), ({1: (True, 3.0)}, "first")):
        forward, _ = qkv_calls(HOPPER, others=others)
        assert names(forward) == ["shrink", "persistent_outputs"]
        assert forward[1].args["LOW_RANK"] == low_rank


def test_a_product_that_comes_first_takes_the_rank_in_narrow_tiles():
    """Whole, a high rank would need more shared memory than the pipeline leaves."""
    of = [(empty(512, 512), empty(128, 512), empty(512, 128), None, None, 2.0, 0.0)]
    config = dict.fromkeys(("outputs", "input_grad"), Config(128, 256, 64, num_warps=8, tma=True))
    with recording(HOPPER) as calls:
        (y,) = steps.outputs(empty(256, 512), of, [empty(256, 128)], None, config)
        steps.input_grad([y], of, [empty(256, 128)], config)
    assert [(c.args["LOW_RANK"], c.args["BLOCK_R"]) for c in calls] == [("first", 32)] * 2


def config(low_rank: str, *tiles: int, tma: bool = True, **rest) -> Config:
    return Config(*(tiles or (32, 32, 32)), tma=tma, low_rank=low_rank, **rest)


@pytest.mark.parametrize(
    ("chosen", "kernel", "kind", "r", "dropout", "count"),
    [
        (config("fold"), "outputs", "16", 12, False, 1),  # rows of s that are not 16 bytes apart
        (config("fold"), "input_grad", "16", 16, True, 1),
        (config("fold"), "outputs", "mixed", 16, False, 1),
        (config("fold"), "outputs", "fp16", 16, False, 3),
        (config("fold"), "input_grad", "fp16", 16, True, 3),
        (config("first"), "input_grad", "16", 16, False, 3),
        (config("last"), "outputs", "16", 16, False, 1),
        (config("fold"), "shrink", "16", 16, False, 1),
        (config("fold"), "da", "16", 16, False, 3),
        (config("fold"), "outputs", "32", 16, False, 1),
        (config("fold", 256, 256, 64, num_stages=4, num_warps=8), "outputs", "16", 16, False, 1),
        (config("fold", 512, 32, 32, num_warps=8), "outputs", "16", 16, False, 1),
        (config("fold", num_warps=2), "outputs", "16", 16, False, 1),
        (config("fold", tma=False), "outputs", "16", 16, False, 1),
    ],
)
def test_configs_that_cannot_run_are_refused(chosen, kernel, kind, r, dropout, count):
    assert not configs.is_valid(chosen, kernel, kind, r, dropout, HOPPER, count)


def test_only_chips_with_the_copy_engine_get_these_configs():
    for capability, shared in (((8, 0), 166912), ((0, 0), 65536), ((7, 5), 65536)):
        chip = Chip(capability, shared, 100)
        for kernel, kind in itertools.product(("outputs", "input_grad"), ("16", "mixed", "32")):
            assert not any(c.tma for c in configs.candidates(kernel, kind, 16, False, chip))
    default = configs.default_config
    assert default("outputs", "16", 16, False, HOPPER).low_rank == "fold"
    assert default("outputs", "fp16", 16, False, HOPPER).low_rank == "first"
    assert default("input_grad", "16", 16, True, HOPPER).low_rank == "first"
    assert default("input_grad", "mixed", 16, False, HOPPER).tma
    assert not default("outputs", "16", 16, False, HOPPER, even=False).tma
    assert not default("outputs", "32", 16, False, HOPPER).tma


def test_tritons_that_need_more_shared_memory_get_narrow_tiles(monkeypatch):
    """Triton 3.4 compiles the wide product of sm_100 to 442,416 bytes, 3.5 to 311,344."""
    blackwell = Chip((10, 0), 232448, 148)
    for fits, widest in ((True, 256), (False, 128)):
        monkeypatch.setattr(configs, "WIDE_TMA_ON_SM_100", fits)
        default = configs.default_config("outputs", "16", 16, False, blackwell)
        assert default.tma and default.block_n == widest
        tried = configs.candidates("outputs", "16", 16, False, blackwell)
        assert max(c.block_n for c in tried if c.tma) == widest
    assert configs.default_config("outputs", "16", 16, False, blackwell, 4).block_n == 128
