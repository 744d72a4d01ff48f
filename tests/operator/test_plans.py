# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: by default, as measured, as the user asks, of several together."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from measuring import CPU, GROUP, PROBLEM, SMALL, SOME_CONFIG, chosen, operands, run_python, timings

import fastlora
from fastlora.operator import measured, plans
from fastlora.operator.operands import Operands

pytestmark = pytest.mark.usefixtures("empty_cache")
GPU = torch.device("cuda")


def names(pair):
    """The last parts of the modules that run forward and backward."""
    return [steps.module.__name__.rpartition(".")[2] for steps in pair]


def one(x, w, a, b):
    return x, [Operands(w, a, b, None, None, 1.0, 0.0)]


# Defaults and what the user asks for


def test_what_auto_takes_where_nothing_was_measured(monkeypatch):
    """Library products on a GPU's tensor cores; blocks where they do not help or cannot run."""
    monkeypatch.setattr(plans, "triton_unusable", lambda device: None)
    assert (
        plans.default(torch.bfloat16, GPU)[0] == plans.default(torch.float16, GPU)[0] == "library"
    )
    assert plans.default(torch.float32, GPU)[0] == plans.default(torch.bfloat16, CPU)[0] == "blocks"
    monkeypatch.setattr(plans, "triton_unusable", lambda device: "broken")
    assert plans.default(torch.bfloat16, GPU) == ("blocks", "broken")


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
    ("environment", "said"),
    [
        ({"FASTLORA_IMPL": "reference", "FASTLORA_TUNE": "1"}, "reference True True"),
        ({"FASTLORA_IMPL": "", "FASTLORA_TUNE": ""}, "auto False False"),
    ],
    ids=["set", "empty"],
)
def test_the_environment_is_read_when_python_starts(environment, said):
    code = """if True:
        from fastlora.operator import op, plans
        print(plans.FORCED, plans.TUNE, plans.on_first_use is not None)
    """
    assert run_python(code, **environment) == f"{said}\n"


def test_a_plain_cpu_needs_no_triton():
    code = """if True:
        import sys, torch, fastlora
        fastlora.lora_linear(torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1))
        print("triton" in sys.modules)
    """
    assert run_python(code, TRITON_INTERPRET="0") == "False\n"


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_the_interpreter_s_variable_is_read_as_triton_reads_it(value):
    code = """if True:
        import torch
        from fastlora.operator import plans
        import fastlora_kernels
        usable = plans.usable_implementations(torch.float32, torch.device("cpu"))
        print("triton" in usable, fastlora_kernels.INTERPRETED)
    """
    assert run_python(code, TRITON_INTERPRET=value) == "True True\n"


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
    for other in (*others, {"adapter": torch.bfloat16}):
        assert chosen(problem=PROBLEM._replace(**other)) == "blocks"


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
    """Nothing is computed again and no memory is kept by further calls."""
    x, projections = one(*operands())
    plans.find("auto", x, projections)
    monkeypatch.setattr(plans, "choose", None)
    tracemalloc.start()
    for m in range(33, 65):
        plans.find("auto", x[:m], projections)
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(10):
        for m in range(33, 65):
            plans.find("auto", x[:m], projections)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 1024


def test_measured_configs_reach_the_kernels(monkeypatch):
    """Where they are valid; of others, and where loads are narrow, the kernel takes its default."""
    from fastlora_kernels import Config, steps

    good = {**SOME_CONFIG, "block_m": 32, "block_n": 32, "block_k": 32, "num_warps": 2}
    for wrong in ({"block_k": 17}, {"num_warps": 3}, {"block_m": "32"}, {"other": 1}):
        configs = {"shrink": good, "outputs": {**good, **wrong}, "unknown": good}
        measured.add({PROBLEM: timings(configs=configs)}, CPU)
        assert plans.choose("forward", "auto", PROBLEM, CPU).configs == {"shrink": Config(**good)}
    seen = []
    for name in ("shrink", "outputs"):
        own = getattr(steps, name)
        monkeypatch.setattr(
            *(steps, name),
            lambda *a, configs=None, own=own, **k: (
                seen.append(configs) or own(*a, **({} if configs is None else {"configs": configs}))
            ),
        )
    x, *rest = operands()
    narrow = torch.empty(16 * 32 + 1)[1:].view(16, 32).copy_(rest[1])
    misaligned = torch.empty(64 * 32 + 1, dtype=torch.bfloat16)[1:].view(64, 32).copy_(x)
    with torch.no_grad():
        assert fastlora.lora_linear(x, *rest).shape == (64, 48)
        assert seen == [{"shrink": Config(**good)}] * 2
        for others in ((misaligned, *rest), (x, rest[0], narrow, rest[2])):
            seen.clear()
            fastlora.lora_linear(*others)
            assert seen == [None, None]


def test_a_plan_made_before_measurements_is_forgotten_with_them(monkeypatch):
    x = torch.ones(16, 64)
    own = plans._steps

    def slowly(*args):
        found = own(*args)
        plans.forget()  # as another thread does that has measured
        return found

    monkeypatch.setattr(plans, "_steps", slowly)
    fastlora.lora_linear(x, torch.ones(8, 64), torch.ones(2, 64), torch.ones(8, 2))
    assert not plans._found


def test_what_projections_together_take():
    """What was measured of them together, not of each."""
    measured.add({GROUP: timings()}, CPU)
    assert chosen(problem=GROUP) == "triton" and chosen(problem=SMALL) == "blocks"
    assert chosen(problem=GROUP._replace(others=((8, 3), (32, 3)))) == "blocks"
    x, *first = operands(16)
    x, first = x[:, :16], [first[0][:16, :16], first[1][:, :16], first[2][:16]]
    second = torch.randn(8, 16).bfloat16(), torch.randn(3, 16), torch.randn(8, 3)
    rest = (None, None, 1.0, 0.0)
    of = [
        Operands(*first, *rest),
        Operands(*second, *rest),
        Operands(torch.randn(32, 16).bfloat16(), None, None, *rest),
    ]
    assert names(plans.find("auto", x, of)) == ["steps"] * 2
    frozen = [p._replace(a=None, b=None) for p in of]
    assert names(plans.find("auto", x, frozen)) == ["blocks"] * 2
