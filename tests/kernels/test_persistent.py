# SPDX-License-Identifier: Apache-2.0
"""The products of sm_90 and later, interpreted: descriptors, persistence, every low-rank step."""

from __future__ import annotations

import functools
import importlib
import itertools
import weakref
from types import SimpleNamespace

import fastlora_kernels
import pytest
import torch
from acceptance import Case, run, verify, verify_exactly
from fastlora_kernels import configs, launch
from fastlora_kernels.configs import Chip, Config

# The package's own attributes of some of these names are the launchers.
columns, persistent = (
    importlib.import_module(f"fastlora_kernels.{name}") for name in ("columns", "persistent")
)
HOPPER = Chip((9, 0), 232448, 132)
LOW_RANK = ("first", "after", "fold", "recompute")
SHIPPED = [c for c in configs.DEFAULTS["product", "16"] + configs.EXPERIMENTAL if c.tma]


def tiled(low_rank: str, **rest) -> Config:
    return Config(32, 32, 32, tma=True, low_rank=low_rank, **rest)


def body(config: Config) -> SimpleNamespace:
    """The kernels with ``config`` for both wide products."""
    both = {"product": config, "dx": config}
    return SimpleNamespace(
        forward=functools.partial(fastlora_kernels.forward, configs=both),
        backward=functools.partial(fastlora_kernels.backward, configs=both),
    )


def launched(config: Config, M=256, N=512, K=512, R=16, dtype=torch.bfloat16, p=0.0):
    """Return the launches of a forward and of a backward on a Hopper chip, as if compiled."""
    x, w, dy = (torch.empty(*d, dtype=dtype, device="meta") for d in ((M, K), (N, K), (M, N)))
    a, b, s = (torch.empty(*d, dtype=dtype, device="meta") for d in ((R, K), (N, R), (M, R)))
    seed = torch.empty(1, dtype=torch.int64, device="meta") if p else None
    both, rest = {"product": config, "dx": config}, (seed, 2.0, p)
    with launch.recording(HOPPER) as forward:
        fastlora_kernels.forward(x, w, a, b, None, *rest, both)
    with launch.recording(HOPPER) as backward:
        fastlora_kernels.backward(dy, x, w, a, b, s, *rest, (True, True, True), both)
    return forward, backward


def counted(monkeypatch) -> list[tuple[int]]:
    """The grids of the persistent kernels that will be launched."""

    def counting(kernel, grid, *rest, **options):
        grids.append(grid)
        launch.launch(kernel, grid, *rest, **options)

    grids: list = []
    monkeypatch.setattr(persistent, "launch", counting)
    return grids


def names(calls) -> list[str]:
    return [call.kernel.__name__.removesuffix("_kernel") for call in calls]


@pytest.mark.parametrize(
    ("low_rank", "kind", "p"),
    [
        *((low_rank, "bf16", 0.0) for low_rank in (*LOW_RANK, "after by warps of its own")),
        *((low_rank, "fp16", 0.3) for low_rank in LOW_RANK),
        *(("first", kind, 0.3) for kind in ("bf16-fp32", "fp16-fp32")),
        ("fold", "bf16-fp32", 0.0),
    ],
)
def test_acceptance_rule(low_rank, kind, p):
    config = tiled(low_rank.split()[0], specialized="warps" in low_rank)
    r = 5 if kind == "fp16" else 8
    for i, mode in enumerate(("base", "low_rank", "both")):
        verify(body(config), Case(50, 40, 72, r, kind=kind, mode=mode, dropout_p=p, bias=i > 0))


@pytest.mark.parametrize("low_rank", LOW_RANK)
@pytest.mark.parametrize("r", [1, 8, 24, 40, 64])
def test_ranks_of_one_tile_and_of_several(low_rank, r):
    verify(body(tiled(low_rank, block_r=32)), Case(33, 24, 40, r, kind="bf16"))


@pytest.mark.parametrize("low_rank", LOW_RANK)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_small_integers_are_exact(low_rank, p):
    verify_exactly(body(tiled(low_rank)), Case(37, 32, 48, 6, kind="bf16", dropout_p=p))


@pytest.mark.parametrize("config", SHIPPED, ids=str)
def test_the_tiles_that_ship(config):
    M, N = config.block_m + 9, config.block_n + 24
    verify(body(config), Case(M, N, config.block_k + 8, 16, kind="bf16"))


@pytest.mark.parametrize("low_rank", LOW_RANK)
def test_more_tiles_than_programs(low_rank, monkeypatch):
    """A program goes on to its next tile; groups of rows that are not full end well."""
    grids = counted(monkeypatch)
    monkeypatch.setattr(persistent, "chip_of", lambda device: Chip((0, 0), 1 << 30, 3))
    verify(body(tiled(low_rank, group_m=2)), Case(100, 72, 40, 8, kind="bf16"))
    assert grids == [(3,), (3,)]


@pytest.mark.parametrize("low_rank", LOW_RANK)
def test_no_stage_reads_what_is_not_there(low_rank):
    """Rows, columns and ranks past the end are NaN in memory, and must not matter."""
    case = Case(35, 24, 40, 8, kind="bf16")
    t = case.tensors()
    for name in ("x", "w", "a", "b", "dy"):
        rows, columns = t[name].shape
        padded = torch.full((rows + 40, columns + 40), float("nan"), dtype=torch.bfloat16)
        padded[:rows, :columns] = t[name]
        t[name] = padded[:rows, :columns]
    plain = case.tensors()
    found, expected = (run(body(tiled(low_rank)), case, each) for each in (t, plain))
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("low_rank", LOW_RANK)
@pytest.mark.parametrize("r", [1, 8])
def test_an_infinity_stays_where_it_is(low_rank, r):
    """As in eager mode: not NaN, although it meets the zeros past the rank and past K."""
    t = {
        n: v if v is None else v.abs()
        for n, v in Case(33, 24, 40, r, kind="bf16").tensors().items()
    }
    t["x"][3, 5] = float("inf")
    y, s = body(tiled(low_rank)).forward(t["x"], t["w"], t["a"], t["b"], None, None, 2.0, 0.0)
    others = torch.arange(33) != 3
    assert (y[3] == float("inf")).all() and (s[3] == float("inf")).all()
    assert y[others].isfinite().all() and s[others].isfinite().all()


@pytest.mark.parametrize(
    "layout", ["odd rows", "x by columns", "w by columns", "misaligned", "expanded"]
)
def test_operands_the_copy_engine_cannot_read_go_another_way(layout, monkeypatch):
    case = Case(33, 24, 40, 8, kind="bf16")
    if layout == "odd rows":
        case = Case(33, 25, 41, 8, kind="bf16")
    t = case.tensors()
    if layout == "x by columns":
        t["x"] = t["x"].t().contiguous().t()
    if layout == "w by columns":
        t["w"] = t["w"].t().contiguous().t()
    if layout == "misaligned":
        flat = torch.empty(33 * 40 + 1, dtype=torch.bfloat16)
        flat[1:] = t["x"].flatten()
        t["x"] = flat[1:].view(33, 40)
    if layout == "expanded":
        t["dy"] = t["dy"][:1].expand(33, -1)
    by_tma = counted(monkeypatch)
    verify(body(tiled("fold")), case, t)
    assert len(by_tma) == {"odd rows": 0, "w by columns": 2}.get(layout, 1)


def test_rows_stored_one_by_one_take_smaller_tiles(monkeypatch):
    """A wide tile has more addresses then than a thread has registers."""
    grids = counted(monkeypatch)
    wide = Config(128, 256, 64, num_warps=8, tma=True, low_rank="fold")
    verify(body(wide), Case(40, 33, 40, 8, kind="bf16"))
    assert grids == []  # y through the portable kernel; dx has odd rows to read
    with launch.recording(HOPPER) as calls:
        fastlora_kernels.product(
            *(
                torch.empty(d, dtype=torch.bfloat16, device="meta")
                for d in ((64, 64), (33, 64), (64, 8), (33, 8))
            )
        )
    (call,) = calls
    assert call.config.block_m * call.config.block_n <= configs.MOST_UNEVEN


def test_float16_is_not_scaled_before_it_has_to_be():
    """A scaled s overflows where s does not, and b makes the product small again."""
    t = Case(32, 16, 32, 8, kind="fp16", bias=False).tensors()
    t = {n: v if v is None else v.abs() for n, v in t.items()}
    a, b, scaling = t["a"] * 4e3, t["b"] / 4e3, 1e3
    reference = t["x"].double() @ (t["w"].double().t() + scaling * (b.double() @ a.double()).t())
    for low_rank in LOW_RANK:
        rest = (None, scaling, 0.0)
        y, _ = body(tiled(low_rank)).forward(t["x"], t["w"], a, b, None, *rest)
        assert y.isfinite().all()
        torch.testing.assert_close(y.double(), reference, rtol=1e-2, atol=1.0)


def test_the_first_step_takes_the_rank_in_narrow_tiles():
    """Whole, a high rank would need more shared memory than the pipeline leaves."""
    for launches in launched(Config(128, 256, 64, tma=True), R=128, p=0.0):
        (call,) = (c for c in launches if c.kernel is persistent.persistent_kernel)
        assert (call.args["LOW_RANK"], call.args["BLOCK_R"]) == ("first", 32)


@pytest.mark.parametrize("low_rank", LOW_RANK)
def test_launches(low_rank):
    forward, backward = launched(tiled(low_rank))
    once = low_rank == "recompute"
    assert names(forward) == ["persistent"] if once else ["shrink", "persistent"]
    assert names(backward) == ["columns", "sum", "persistent", "columns", "sum"]
    assert forward[-1].args["LOW_RANK"] == low_rank
    assert backward[2].args["LOW_RANK"] == ("first" if once else low_rank)
    scaled = low_rank in ("after", "fold")
    assert (forward[0].args.get("scaled_ptr") is not None) == scaled
    assert forward[-1].args["scale"] == (1.0 if scaled else 2.0)
    assert not any(call.early for call in forward + backward)


def test_an_early_product_starts_beside_what_it_waits_for(monkeypatch):
    monkeypatch.setattr(persistent, "INTERPRETED", False)
    forward, backward = launched(tiled("after", early=True))
    assert [call.early for call in forward] == [False, True]
    assert [call.early for call in backward] == [False, True, True, False, False]
    for calls in (forward, backward[:3]):
        *before, product = calls
        assert product.args["EARLY"]
        assert all(call.args.get("TRIGGER") or call.args.get("EARLY") for call in before)
    # What is not known to wait where it must does not start early.
    for low_rank in ("first", "fold", "recompute"):
        calls = itertools.chain(*launched(tiled(low_rank, early=True)))
        assert not any(call.early or call.args.get("EARLY") for call in calls)
    _, backward = launched(tiled("after", early=True), p=0.1)
    assert backward[2].args["LOW_RANK"] == "first"
    assert not backward[2].early


def test_partial_sums_are_held_until_the_early_product_is_launched(monkeypatch):
    """The allocator may otherwise give their memory to the product's tensor descriptors."""
    sums, alive = [], []

    def note_the_sums(kernel, grid, config, *args, early=False):
        if kernel is columns.sum_kernel and early:
            sums.extend(weakref.ref(t) for t in args[:2])

    def look_for_them(*args, early=False):
        alive.extend(ref() is not None for ref in sums)

    monkeypatch.setattr(persistent, "INTERPRETED", False)
    monkeypatch.setattr(columns, "launch", note_the_sums)
    monkeypatch.setattr(persistent, "launch", look_for_them)
    launched(tiled("after", early=True))
    assert alive == [True, True]
    assert not any(ref() for ref in sums)


def test_s_of_a_recomputing_product_is_that_of_the_shrink():
    t = Case(70, 72, 64, 8, kind="bf16").tensors()
    operands = (t["x"], t["w"], t["a"], t["b"], t["bias"], None, 0.7, 0.0)
    found, expected = (body(tiled(which)).forward(*operands)[1] for which in ("recompute", "first"))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("config", "r", "dropout", "kernel"),
    [
        (tiled("fold"), 12, False, "product"),  # rows of s that are not 16 bytes apart
        (tiled("fold"), 16, True, "dx"),
        (tiled("after", block_r=16), 32, False, "product"),
        (tiled("recompute"), 16, False, "dx"),
        (tiled("after", specialized=True, early=True), 16, False, "product"),
        (tiled("last"), 16, False, "product"),
        (Config(256, 256, 64, num_stages=4, num_warps=8, tma=True), 16, False, "product"),
        (tiled("fold"), 16, False, "shrink"),
        (tiled("recompute"), 16, True, "product"),  # s is not of the x that the loop sees
        (Config(512, 32, 32, num_warps=8, tma=True), 16, False, "product"),
        (Config(32, 32, 32, num_warps=2, tma=True), 16, False, "product"),
        (Config(32, 32, 32, low_rank="fold"), 16, False, "product"),
        (Config(32, 32, 32, early=True), 16, False, "product"),
    ],
)
def test_configs_that_cannot_run_are_refused(config, r, dropout, kernel):
    assert not configs.is_valid(config, kernel, "16", r, dropout, HOPPER)


def test_only_chips_with_the_copy_engine_get_these_configs():
    for capability, shared in (((8, 0), 166912), ((0, 0), 65536), ((7, 5), 65536)):
        chip = Chip(capability, shared, 100)
        for kernel, kind in itertools.product(("product", "dx"), ("16", "mixed", "32")):
            assert not any(c.tma for c in configs.candidates(kernel, kind, 16, False, chip))
    for low_rank in ("fold", "after", "recompute"):  # float16 cannot be scaled before
        assert not configs.is_valid(tiled(low_rank), "product", "fp16", 16, False, HOPPER)
        allowed = low_rank != "recompute"
        assert configs.is_valid(tiled(low_rank), "dx", "fp16", 16, False, HOPPER) == allowed
    for r in (4, 16, 128):
        assert not configs.default_config("product", "16", r, False, HOPPER).early
    assert configs.default_config("product", "16", 16, False, HOPPER).low_rank == "fold"
    assert configs.default_config("dx", "16", 16, True, HOPPER).low_rank == "first"
    assert configs.default_config("dx", "mixed", 16, False, HOPPER).tma
    assert not configs.default_config("product", "16", 16, False, HOPPER, even=False).tma
    assert not configs.default_config("product", "32", 16, False, HOPPER).tma


def test_tritons_that_need_more_shared_memory_get_narrow_tiles(monkeypatch):
    """Triton 3.4 compiles the wide product of sm_100 to 442,416 bytes, 3.5 to 311,344."""
    blackwell = Chip((10, 0), 232448, 148)
    for fits, widest in ((True, 256), (False, 128)):
        monkeypatch.setattr(configs, "WIDE_TMA_ON_SM_100", fits)
        default = configs.default_config("product", "16", 16, False, blackwell)
        assert default.tma and default.block_n == widest
        tried = configs.candidates("product", "16", 16, False, blackwell)
        assert max(c.block_n for c in tried if c.tma) == widest
