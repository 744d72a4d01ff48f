# SPDX-License-Identifier: Apache-2.0
"""The wide products of sm_90 and later, interpreted: descriptors, persistence, low-rank steps."""

import itertools
from dataclasses import replace

import fastlora_kernels
import pytest
import torch
from aot import CHIPS
from covering import covering
from fastlora_kernels import configs, input_grad, launch, outputs, steps
from fastlora_kernels.configs import Chip, Config
from joints import Joint, poisoned, recorded, run, verify, verify_exactly
from recorder import recording

# Ragged in every dimension that may be; rows of 16 bytes; one projection without an adapter.
QKV = Joint(40, 40, (40, 24, 40), (8, 0, 16), "bf16", scaling=0.5)
ONE = Joint(50, 72, (40,), (8,), "bf16", scaling=0.5)
# As a model has them.
LAYER = Joint(8192, 4096, (4096, 1024, 1024), (16,) * 3, "bf16", scaling=2.0)
SHIPPED = {c for (kernel, _), cs in configs.DEFAULTS.items() for c in cs if c.tma}
BOTH = ["outputs", "input_grad"]
LOW_RANKS = ("fold", "first")
each_low_rank = pytest.mark.parametrize("low_rank", LOW_RANKS)
each_joint = pytest.mark.parametrize("joint", [ONE, QKV], ids=["one", "several"])


def tiled(low_rank: str = "fold", **rest) -> dict[str, Config]:
    """Configs for both wide products; of several projections the sum folds or has a rest."""
    y, dx = (Config(32, 32, 32, tma=True, low_rank=how, **rest) for how in (low_rank, "fold"))
    return {"outputs": y, "input_grad": dx}


def both(low_rank: str, **rest) -> dict[str, Config]:
    """Configs for both wide products of a single projection."""
    return dict.fromkeys(BOTH, tiled(low_rank, **rest)["outputs"])


def suiting(joint: Joint, low_rank: str, **rest) -> dict[str, Config]:
    return (tiled if len(joint.sizes) > 1 else both)(low_rank, **rest)


def turned(t: torch.Tensor) -> torch.Tensor:
    return t.mT.contiguous().mT


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


def names(launched: list[tuple[str, int]]) -> list[str]:
    return [name for name, _ in launched]


def problems() -> list[tuple[Joint, dict[str, Config], list[str]]]:
    """Return problems, configs, and which products the persistent programs then make."""
    kinds = [("bf16", ()), ("fp16", (0.3, 0.0, 0.3)), ("bf16-fp32", ()), ("fp16-fp32", (0.3,))]
    modes, found = ("base", "low_rank", "both"), []
    for (kind, p), mode, low_rank, joint in covering(kinds, modes, LOW_RANKS, (ONE, QKV)):
        # The interpreter's chip has no other such config for what cannot be folded; terms that are
        # made before could overflow float16.
        takes = ["outputs"] * (low_rank == "first" or kind == "bf16")
        dx = kind.startswith("bf16") if joint is QKV else low_rank == "first" or kind == "bf16"
        biases = mode != "base", False, True
        problem = replace(joint, kind=kind, mode=mode, dropout_p=p, biases=biases)
        found.append((problem, suiting(joint, low_rank), takes + ["input_grad"] * dx))
    # Ranks of one tile and of several, and numbers of projections.
    several = [((24, 64), (16, 16)), ((16, 8, 80, 32), (40, 8, 8, 24)), ((32, 32), (0, 0))]
    several += [((24,), (24,)), ((24,), (64,)), ((40,), (0,)), ((40, 24, 40), (3, 5, 33))]
    for (sizes, ranks), low_rank in itertools.product(several, LOW_RANKS):
        joint = replace(QKV, M=33, sizes=sizes, ranks=ranks)
        takes = BOTH if low_rank == "first" or 3 not in ranks else ["input_grad"]
        found.append((joint, suiting(joint, low_rank, block_r=32), takes))
    # What the copy engine cannot read goes another way.
    others = {"ranks": (8, 0, 12)}, {"kind": "fp16", "dropout_p": (0.3,)}, {"K": 39}
    others += {"sizes": (40, 20, 40)}, {"sizes": (33,), "ranks": (8,), "K": 41}
    for i, change in enumerate(others):  # of the first, rows of b are not 16 bytes apart
        found.append((replace(QKV, **change), tiled(), BOTH[1:] * (i == 0)))
    # Rows stored one by one have more addresses in a wide tile than a thread has registers.
    wide = dict.fromkeys(BOTH, Config(128, 256, 64, num_warps=8, tma=True, low_rank="fold"))
    found.append((Joint(40, 40, (33,), (8,), "bf16"), wide, []))
    return found


def amid_nan(ts: list[dict]) -> list[dict]:
    """Return the tensors where in memory NaN lies past their rows and columns."""
    found = [dict(t) for t in ts]
    for t, name in itertools.product(found, ("x", "w", "a", "b", "dy")):
        *stack, rows, columns = t[name].shape
        around = t[name].new_full((*stack, rows + 40, columns + 40), torch.nan)
        around[..., :rows, :columns] = t[name]
        t[name] = around[..., :rows, :columns]
    return [{**t, "x": found[0]["x"]} for t in found]


@pytest.mark.parametrize(("joint", "chosen", "takes"), problems(), ids=str)
def test_acceptance_rule(joint, chosen, takes, launched):
    verify(fastlora_kernels, joint, configs=chosen, ts=amid_nan(joint.tensors()))
    assert names(launched) == takes


def cut() -> list[tuple]:
    """Return problems whose rows are cut, how w lies, dx's config, and what the programs make."""
    kinds = [("bf16", ()), ("fp16", (0.3, 0.0, 0.3)), ("bf16-fp32", (0.3,)), ("fp16", ())]
    kinds += [("bf16", (0.3, 0.1)), ("fp16-fp32", ())]
    # Without rows, within a tile, of several tiles, and a row each.
    cuts, found = [(0, 0, 17, 17, 20, 90, 90), tuple(range(9)), (0, 40)], []
    options = kinds, cuts, (ONE, QKV), LOW_RANKS, (True, False), (True, False)
    for (kind, p), ends, joint, low_rank, experts, by_rows in covering(*options):
        several, of = joint is QKV, {"ends": ends, "experts": experts, "M": ends[-1]}
        problem = replace(joint, **of, kind=kind, dropout_p=p, scaling=None, biases=(True,) * 3)
        # A fold takes a stack for a stack.
        folds = experts and not p and "fp32" not in kind
        goes = (folds or kind.startswith("bf16")) if several else low_rank == "first"
        goes |= not several and folds and by_rows
        chosen = suiting(joint, low_rank) | {"outputs": tiled("first")["outputs"]}
        found.append((problem, by_rows, chosen, ["outputs"] + ["input_grad"] * goes))
    frozen = replace(QKV, M=90, ranks=(0,) * 3, ends=cuts[0], experts=True)
    return [*found, (frozen, True, tiled("first"), BOTH)]


@pytest.mark.parametrize(("joint", "by_rows", "chosen", "takes"), cut(), ids=str)
def test_segments(joint, by_rows, chosen, takes, launched, monkeypatch):
    """By several programs: what one of them writes too far, none that comes later repairs."""
    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: Chip((0, 0), 1 << 30, 3)))
    ts = joint.tensors()
    ts = amid_nan(ts) if by_rows else [{**t, "w": turned(t["w"])} for t in ts]
    with poisoned():
        verify(fastlora_kernels, joint, configs=chosen, ts=ts)
    assert names(launched) == takes


@pytest.mark.parametrize("by_rows", [True, False])
@each_joint
def test_nan_stays_with_its_expert(joint, by_rows, launched):
    """Tiles that end with an expert's weight have nothing of its neighbours."""
    joint = replace(joint, M=50, ends=(0, 10, 25, 25, 50), experts=True)
    ts, chosen = joint.tensors(), suiting(joint, "first")
    ts = ts if by_rows else [{**t, "w": turned(t["w"])} for t in ts]
    right, right_dx = run(fastlora_kernels, joint, ts, chosen)
    for expert, rows in (0, slice(0, 10)), (1, slice(10, 25)), (2, slice(25, 25)):
        bad = [dict(t) for t in ts]
        for t, name in itertools.product(bad, ("w", "a", "b", "bias")):
            if t[name] is not None:
                t[name] = t[name].clone()
                t[name][expert] = torch.nan
        results, dx = run(fastlora_kernels, joint, bad, chosen)
        found = [(r["y"], other["y"]) for r, other in zip(results, right, strict=True)]
        for value, other in (*found, (dx, right_dx)):
            own = torch.zeros(50, dtype=torch.bool)
            own[rows] = True
            assert value[own].isnan().all() and torch.equal(value[~own], other[~own])
    assert names(launched) == 4 * BOTH


def test_segments_take_no_persistent_program_unasked():
    """Nobody has measured one; a fold of s cannot scale by segment."""
    for count, experts in itertools.product((1, 3), (True, False)):
        of = {"sizes": LAYER.sizes[:count], "ranks": LAYER.ranks[:count]}
        joint = replace(LAYER, **of, ends=(0, 100, 8192), experts=experts)
        for chosen in (None, {"outputs": tiled("fold")["outputs"]}):
            assert not [c for c in recorded(CHIPS[90], joint, chosen) if c.config.tma]


@each_low_rank
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_small_integers_are_exact(low_rank, p):
    verify_exactly(replace(ONE, dropout_p=(p,)), configs=both(low_rank))


@pytest.mark.parametrize("config", sorted(SHIPPED, key=str), ids=str)
def test_the_tiles_that_ship(config):
    joint = Joint(config.block_m + 9, config.block_k + 8, (config.block_n + 24,), (16,), "bf16")
    verify(fastlora_kernels, joint, configs=dict.fromkeys(BOTH, config))


@pytest.mark.parametrize(("kind", "name"), [("16", "bf16"), ("mixed", "bf16-fp32")])
def test_tiles_of_several_are_written_in_two_halves(kind, name):
    chosen = {n: configs.default_config(n, kind, 16, False, CHIPS[90], 2) for n in BOTH}
    assert all(config.tma and config.block_n == 256 for config in chosen.values())
    joint = Joint(24, 264, (264, 16), (16, 16), name, scaling=0.5)
    verify(fastlora_kernels, joint, configs=chosen)


@each_low_rank
@each_joint
def test_more_tiles_than_programs(joint, low_rank, launched, monkeypatch):
    """A program goes on to its next tile, of another projection; groups of rows end well."""
    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: Chip((0, 0), 1 << 30, 3)))
    chosen = suiting(joint, low_rank, group_m=2)
    verify(fastlora_kernels, replace(joint, M=100), configs=chosen)
    assert launched == [("outputs", 3), ("input_grad", 3)]


@each_low_rank
@pytest.mark.parametrize("ranks", [(8, 0, 16), (8,), (1,)])
def test_an_infinity_stays_where_it_is(low_rank, ranks):
    """As in eager mode: not NaN, although it meets the zeros past the rank and past K."""
    joint = replace(QKV, ranks=ranks, sizes=QKV.sizes[: len(ranks)])
    ts = [{n: v if v is None else v.abs() for n, v in t.items()} for t in joint.tensors()]
    ts = [{**t, "x": ts[0]["x"]} for t in ts]
    ts[0]["x"][3, 5] = ts[-1]["dy"][4, 6] = float("inf")
    results, dx = run(fastlora_kernels, joint, ts, tiled(low_rank))
    others = torch.arange(QKV.M)
    for value, row in (*((result["y"], 3) for result in results), (dx, 4)):
        assert (value[row] == float("inf")).all() and value[others != row].isfinite().all()


@pytest.mark.parametrize(
    ("way", "takes"),
    [
        *[("x", ["input_grad"]), ("w", []), ("b", ["input_grad"]), ("dy", ["outputs"])],
        *[("misaligned", ["input_grad"]), ("expanded", ["outputs"]), ("every w", ["input_grad"])],
    ],
)
@each_joint
def test_what_lies_another_way(way, takes, joint, launched):
    """What nothing can read goes round: the interpreter's chip has no "first" that could take it.

    Terms of several projections may be made before.
    """
    ts = joint.tensors()
    last, x = ts[-1], ts[-1]["x"]
    for t in ts if way == "every w" else ts[-1:]:
        t |= {name: turned(t[name]) for name in ("x", "w", "b", "dy") if name == way.split()[-1]}
    if way == "misaligned":
        last["x"] = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    if way == "expanded":
        last["dy"] = last["dy"][:1].expand(joint.M, -1)
    verify(fastlora_kernels, joint, configs=tiled(), ts=[{**t, "x": last["x"]} for t in ts])
    assert names(launched) == ([] if way == "every w" and joint is ONE else takes)


@each_low_rank
@each_joint
def test_w_by_columns_has_descriptors_of_its_own(joint, low_rank, launched):
    ts = [{**t, "w": turned(t["w"]), "b": turned(t["b"])} for t in joint.tensors()]
    chosen = suiting(joint, "first") | {"outputs": tiled(low_rank)["outputs"]}
    verify(fastlora_kernels, joint, configs=chosen, ts=ts)
    assert names(launched) == BOTH


@each_low_rank
def test_float16_is_not_scaled_before_it_has_to_be(low_rank):
    """A scaled s overflows where s does not, and b makes the product small again."""
    joint = Joint(32, 32, (16,), (8,), "fp16", biases=(False,), scaling=1e3)
    (t,) = joint.tensors()
    t = {n: v if v is None else v.abs() for n, v in t.items()}
    t |= {"a": t["a"] * 4e3, "b": t["b"] * 1e3 / 4e3}
    x, w, a, b = (t[name].double() for name in "xwab")
    (found,), _ = run(fastlora_kernels, joint, [t], both(low_rank))
    assert found["y"].isfinite().all()
    right = x @ (w + 1e3 * (b @ a)).t()
    torch.testing.assert_close(found["y"].double(), right, rtol=1e-2, atol=1.0)


@pytest.mark.parametrize(("p", "seed"), [(0.0, None), (1e-5, torch.tensor([1]))])
@pytest.mark.parametrize("chosen", [both("first"), both("fold")], ids=str)
def test_float16_does_not_overflow_before_the_sum(p, seed, chosen):
    """The low-rank terms alone are past its largest number; with the main product they are not."""
    dy, w = torch.full((16, 8), -50.0).half(), torch.full((8, 32), 50.0).half()
    ds, a = torch.full((16, 2), 200.0), torch.full((2, 32), 175.0)  # 70,000 and -20,000
    dx = steps.input_grad([dy], [(w, a, w.new_zeros(8, 2), None, seed, 1.0, p)], [ds], chosen)
    assert dx.isfinite().all() and dx.float().mean() > 49_000


@pytest.mark.parametrize(
    ("chip", "change", "of_one", "of_several"),
    [
        (80, {}, [None, None], [None, None]),
        (90, {}, ["fold", "fold"], ["fold", "fold"]),
        # The low-rank terms of several dx come in a launch of their own.
        (90, {"kind": "bf16-fp32"}, ["first", "first"], ["first", None, "rest"]),
        (90, {"ranks": (4,) * 3}, ["first", "first"], ["first", None, "rest"]),
        (90, {"dropout_p": (0.1,) * 3}, ["fold", "first"], ["fold", None, "rest"]),
    ],
    ids=str,
)
def test_defaults_of_each_chip(chip, change, of_one, of_several):
    """How the wide products of a layer are made: portable, or when the low-rank one joins."""
    for count, expected in ((1, of_one), (3, of_several)):
        joint = replace(LAYER, **change)
        joint = replace(joint, sizes=joint.sizes[:count], ranks=joint.ranks[:count])
        shrink, *calls = recorded(CHIPS[chip], joint)
        wide = [c for c in calls if {"y_ptrs", "y_descs", "dx_ptr"} & c.args.keys()]
        assert [c.args.get("LOW_RANK") for c in wide] == expected
        # What is folded in, shrink has scaled.
        folds = expected[0] == "fold"
        assert (shrink.args["scaled_ptrs"] is not None) == folds
        assert wide[0].args["scales"] == ((1.0,) if folds else (2.0,))


def test_defaults_where_projections_differ():
    """k frozen, whose scaling is nobody's; then scalings that differ."""
    assert recorded(CHIPS[90], replace(LAYER, scaling=1.0))[0].args["scaled_ptrs"] is None
    frozen = replace(LAYER, ranks=(16, 0, 16))
    for joint, scaling, low_rank in ((frozen, 1.0, "fold"), (LAYER, 3.0, "first")):
        ts = joint.blank()
        of = joint.projections(ts)
        of[1] = of[1]._replace(scaling=scaling)
        with recording(CHIPS[90]) as calls:
            steps.outputs(ts[0]["x"], of, *steps.shrink(ts[0]["x"], of))
        assert calls[1].args["LOW_RANK"] == low_rank


@pytest.mark.parametrize(
    ("change", "kernel", "kind"),
    [
        ({"low_rank": "last"}, "outputs", "16"),
        ({"tma": False}, "outputs", "16"),
        ({}, "shrink", "16"),
        ({}, "outputs", "32"),
        ({"block_m": 256, "block_n": 256, "num_warps": 8}, "outputs", "16"),
        ({"block_m": 512, "num_warps": 8}, "outputs", "16"),
        ({"num_warps": 2}, "outputs", "16"),
    ],
)
def test_configs_that_cannot_run_are_refused(change, kernel, kind):
    """For ranks, masks and dtypes that a config cannot take see `problems`."""
    config, rest = tiled()["outputs"], (16, False, CHIPS[90])
    assert configs.is_valid(config, "outputs", "16", *rest)
    assert not configs.is_valid(replace(config, **change), kernel, kind, *rest)
    first = replace(config, low_rank="first")  # several have a rest instead
    assert configs.is_valid(first, "input_grad", "16", *rest)
    assert not configs.is_valid(first, "input_grad", "16", *rest, 3)


def test_tritons_that_need_more_shared_memory_get_narrow_tiles(monkeypatch):
    """Triton 3.4 compiles the wide product of sm_100 to 442,416 bytes, 3.5 to 311,344."""
    y = "outputs", "16", 16, False, CHIPS[100]
    for fits, widest in ((True, 256), (False, 128)):
        monkeypatch.setattr(configs, "WIDE_TMA_ON_SM_100", fits)
        default = configs.default_config(*y)
        assert default.tma and default.block_n == widest
        assert max(c.block_n for c in configs.candidates(*y) if c.tma) == widest
    assert configs.default_config(*y, 4).block_n == 128
