# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: by default, as measured, as the user asks, of several together."""

import inspect
from dataclasses import asdict

import pytest
import torch
from measuring import CPU, GROUP, PROBLEM, SMALL, chosen, operands, run_python, timings

import fastlora
from fastlora.operator import measured, plans, steps
from fastlora.operator.operands import Operands

pytestmark = pytest.mark.usefixtures("empty_cache")
GPU = torch.device("cuda")


def names(pair):
    """The last parts of the modules that run forward and backward."""
    each = [inspect.unwrap(run).args[0] for run in pair[:2]]
    return [module.__name__.rpartition(".")[2] for module in each]


def one(x, w, a=None, b=None):
    return x, [Operands(w, a, b, None, None, 1.0, 0.0)]


def test_what_cannot_run_here_is_not_taken():
    measured.add({PROBLEM: timings({"numpy": 1e-4, "blocks": 3e-3})}, CPU)
    assert chosen() == "blocks"


def test_a_plan_made_before_measurements_is_forgotten_with_them(monkeypatch):
    own = plans._pair
    # As another thread does that has measured meanwhile.
    monkeypatch.setattr(plans, "_pair", lambda *of: (own(*of), plans.forget())[0])
    fastlora.lora_linear(*operands())
    assert not plans._found


# Defaults and what the user asks for


def test_what_auto_takes_where_nothing_was_measured(monkeypatch):
    """Library products on a GPU's tensor cores; blocks where they do not help or cannot run."""
    for why, half in ((None, "library"), ("broken", "blocks")):
        monkeypatch.setattr(plans, "triton_unusable", lambda device, why=why: why)
        cases = [(torch.bfloat16, GPU), (torch.float16, GPU), (torch.float32, GPU)]
        taken = [plans.default(*case)[0] for case in (*cases, (torch.bfloat16, CPU))]
        assert taken == [half, half, "blocks", "blocks"]
    assert plans.default(torch.bfloat16, GPU)[1] == "broken"


def test_the_environment_forces_a_choice(monkeypatch):
    x, *rest = operands()
    monkeypatch.setattr(plans, "FORCED", "triton")
    fastlora.lora_linear(x, *rest)
    assert [key[0] for key in plans._found] == ["triton"]
    assert plans.named("blocks", x) == "blocks"
    monkeypatch.setattr(plans, "triton_unusable", lambda device: "broken")
    with pytest.raises(RuntimeError, match=r"FASTLORA_IMPL='triton' cannot run on .*: broken"):
        fastlora.lora_linear(x, *rest)
    monkeypatch.setattr(plans, "FORCED", "fast")
    with pytest.raises(ValueError, match=r"FASTLORA_IMPL must be one of auto, .*, got 'fast'"):
        fastlora.lora_linear(x, *rest)


@pytest.mark.parametrize(
    ("impl", "tune", "interpreter", "said"),
    [
        ("reference", "1", "0", "reference True True False False"),
        ("", "", "true", "auto False False True True"),
        ("blocks", "0", "ON", "blocks False False True True"),
    ],
)
def test_the_environment_is_read_when_python_starts(impl, tune, interpreter, said):
    """Triton's variable as Triton reads it; on a plain CPU nothing imports Triton."""
    code = """if True:
        import sys, torch, fastlora
        from fastlora.operator import op, plans
        fastlora.lora_linear(torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1))
        plans.find("auto", torch.ones(2, 4), [op.Operands(torch.ones(3, 4), *[None] * 4, 1.0, 0.0)])
        usable = plans.usable_implementations(torch.float32, torch.device("cpu"))
        first_use = plans.on_first_use is not None
        print(plans.FORCED, plans.TUNE, first_use, "triton" in usable, "triton" in sys.modules)
    """
    environment = {"FASTLORA_IMPL": impl, "FASTLORA_TUNE": tune, "TRITON_INTERPRET": interpreter}
    assert run_python(code, **environment) == f"{said}\n"


# Measurements


def test_the_fastest_measured_runs_in_each_direction():
    slow = {"blocks": 1e-3, "library": 2e-3, "triton": 3e-3}
    measured.add({PROBLEM: timings(backward=slow)}, CPU)
    assert (chosen("forward"), chosen("backward")) == ("triton", "blocks")
    assert names(plans.find("auto", *one(*operands()))) == ["steps", "blocks"]
    assert chosen(impl="library") == "library"


def test_a_draw_leaves_the_default():
    measured.add({PROBLEM: timings({"blocks": 1.0e-3, "triton": 0.99e-3})}, CPU)
    assert chosen() == "blocks"


def test_measurements_hold_for_their_bucket():
    """M and R are rounded up to powers of two; everything else is exact."""
    measured.add({PROBLEM: timings(), PROBLEM._replace(M=2): timings()}, CPU)
    x, projections = one(*operands(2))
    assert names(plans.find("auto", x[:0], projections)) == ["blocks"] * 2
    assert names(plans.find("auto", x, projections)) == ["steps"] * 2
    for same in ({"M": 33}, {"M": 64, "R": 3}):
        assert chosen(problem=PROBLEM._replace(**same)) == "triton"
    others = ({"M": 32}, {"M": 65}, {"R": 17}, {"N": 47}, {"K": 33}, {"dropout": True})
    for other in (*others, {"adapter": torch.bfloat16}, {"dtype": torch.float32}):
        assert chosen(problem=PROBLEM._replace(**other)) == "blocks"


def test_what_projections_together_take():
    """What was measured of them together, not of each."""
    measured.add({GROUP: timings()}, CPU)
    assert chosen(problem=GROUP) == "triton" and chosen(problem=SMALL) == "blocks"
    assert chosen(problem=GROUP._replace(others=((8, 3), (32, 3)))) == "blocks"
    x, *rest = operands(16)
    w, a, b = (t[:, :16] for t in rest)
    x, of = one(x[:, :16], w[:16], a, b[:16])
    of += one(x, w[:8], a[:3], b[:8, :3])[1] + one(x, w[:32])[1]
    assert names(plans.find("auto", x, of)) == ["steps"] * 2
    frozen = [p._replace(a=None, b=None) for p in of]
    assert names(plans.find("auto", x, frozen)) == ["blocks"] * 2


def test_a_compiled_graph_chooses_for_the_rows_that_come():
    """One graph, and yet another implementation for another number of rows."""
    measured.add({PROBLEM: timings()}, CPU)
    x, w, a, b = operands(128)
    layer = torch.compile(fastlora.lora_linear, backend="eager", dynamic=True, fullgraph=True)
    torch._dynamo.reset()
    for m in (128, 64):
        layer(x[:m], w, a, b)
    taken = {key[1]: names(pair)[0] for key, pair in plans._found.items()}
    assert taken == {7: "blocks", 6: "steps"}


def test_the_choice_is_one_look_up(monkeypatch):
    """Nothing is computed again and nothing more kept for other numbers of rows."""
    x, projections = one(*operands())
    first = plans.find("auto", x, projections)
    monkeypatch.setattr(plans, "_pair", None)
    assert all(plans.find("auto", x[:m], projections) is first for m in range(33, 65))
    assert len(plans._found) == 1


def test_measured_configs_reach_the_kernels(monkeypatch):
    """Where they are valid; of others, and where loads are narrow, the kernel takes its default."""
    good, other = plans.candidates(PROBLEM, CPU)["shrink"][:2]
    wrong = [7, {**asdict(other), "block_k": 17}, {**asdict(other), "block_m": [32]}, {"other": 1}]
    for fields in wrong:
        configs = {"shrink": asdict(good), "outputs": fields, "unknown": asdict(good)}
        measured.add({PROBLEM: timings(configs=configs)}, CPU)
        assert plans.choose("forward", "auto", PROBLEM, CPU).configs == {"shrink": good}
    own, seen = steps.forward, []
    monkeypatch.setattr(steps, "forward", lambda *args: seen.append(args[-1]) or own(*args))
    x, w, a, b = operands()
    narrow = torch.empty(16 * 32 + 1)[1:].view(16, 32).copy_(a)
    misaligned = torch.empty(64 * 32 + 1, dtype=torch.bfloat16)[1:].view(64, 32).copy_(x)
    with torch.no_grad():
        for given in ((x, w, a, b), (misaligned, w, a, b), (x, w, narrow, b)):
            assert fastlora.lora_linear(*given).shape == (64, 48)
    assert seen == [{"shrink": good}, None, None]
