# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: by default, as measured, as the user asks, of several together."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc

import pytest
import torch
from measuring import CPU, GROUP, PROBLEM, SMALL, SOME_CONFIG, chosen, operands, timings

import fastlora
from fastlora.operator import measured, plans
from fastlora.operator.operands import Operands

pytestmark = pytest.mark.usefixtures("empty_cache")


GPU = torch.device("cuda")


def module(function):
    """The module of a function, or of the one whose arguments are bound."""
    return getattr(function, "func", function).__module__


# Defaults


def test_what_auto_takes_where_nothing_was_measured(monkeypatch):
    """Library products on a GPU's tensor cores; torch where they do not help or cannot run."""
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
    assert [key[:2] for key in plans._functions] == [("forward", "triton")]
    assert plans.named("blocks", x) == "blocks"
    monkeypatch.setattr(plans, "triton_unusable", lambda device: "broken")
    with pytest.raises(RuntimeError, match=r"FASTLORA_IMPL='triton' cannot run on .*: broken"):
        fastlora.lora_linear(x, *rest)
    monkeypatch.setattr(plans, "FORCED", "fast")
    with pytest.raises(ValueError, match=r"FASTLORA_IMPL must be one of auto, .*, got 'fast'"):
        fastlora.lora_linear(x, *rest)


def test_a_plain_cpu_needs_no_triton():
    code = """if True:
        import sys, torch, fastlora
        fastlora.lora_linear(torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1))
        print("triton" in sys.modules)
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=environment, text=True) == "False\n"


def test_the_environment_is_read_when_python_starts():
    code = "from fastlora import plans; print(plans.FORCED, plans.TUNE)"
    environment = {**os.environ, "FASTLORA_IMPL": "reference", "FASTLORA_TUNE": "1"}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=environment, text=True) == "reference True\n"


# Measurements


def test_the_fastest_measured_runs_in_each_direction():
    slow = {"blocks": 1e-3, "library": 2e-3, "triton": 3e-3}
    measured.add({PROBLEM: timings(backward=slow)}, CPU)
    assert (chosen("forward"), chosen("backward")) == ("triton", "blocks")
    assert chosen(impl="library") == "library"


def test_a_draw_leaves_the_default():
    measured.add({PROBLEM: timings({"blocks": 1.0e-3, "triton": 0.99e-3})}, CPU)
    assert chosen() == "blocks"


def test_measurements_hold_for_their_bucket():
    """M and R are rounded up to powers of two; everything else is exact."""
    measured.add({PROBLEM: timings(), PROBLEM._replace(M=2): timings()}, CPU)
    x, *projection = operands(2)
    projection = [Operands(*projection, None, None, 1.0, 0.0)]
    assert (
        module(plans.function("forward", "auto", x[:0], projection)) == "fastlora.operator.blocks"
    )
    assert module(plans.function("forward", "auto", x, projection)) == "fastlora_kernels.linears"
    for same in ({"M": 33}, {"M": 64, "R": 3}):
        assert chosen(problem=PROBLEM._replace(**same)) == "triton"
    others = ({"M": 32}, {"M": 65}, {"R": 17}, {"N": 47}, {"K": 33}, {"dropout": True})
    for other in (*others, {"adapter": torch.bfloat16}):
        assert chosen(problem=PROBLEM._replace(**other)) == "blocks"


def test_a_compiled_graph_chooses_for_the_rows_that_come(monkeypatch):
    """One graph, and yet another implementation for another number of rows."""
    measured.add({PROBLEM: timings()}, CPU)
    x, w, a, b = operands(128)
    layer = torch.compile(fastlora.lora_linear, backend="eager", dynamic=True, fullgraph=True)
    torch._dynamo.reset()
    for m in (128, 64):
        layer(x[:m], w, a, b)
    taken = {key[2]: module(function) for key, function in plans._functions.items()}
    assert taken == {7: "fastlora.operator.blocks", 6: "fastlora_kernels.linears"}


def test_the_choice_is_one_look_up(monkeypatch):
    """Nothing is computed again and no memory is kept by further calls."""
    x, *projection = operands()
    projection = [Operands(*projection, None, None, 1.0, 0.0)]
    plans.function("forward", "auto", x, projection)
    monkeypatch.setattr(plans, "choose", None)
    tracemalloc.start()
    for m in range(33, 65):
        plans.function("forward", "auto", x[:m], projection)
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(10):
        for m in range(33, 65):
            plans.function("forward", "auto", x[:m], projection)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 1024


def test_measured_configs_reach_the_kernels(monkeypatch):
    """Where they are valid; an invalid one is left out and the kernel takes its default."""
    from fastlora_kernels import launch, linear

    good = {"block_m": 32, "block_n": 32, "block_k": 32, "block_r": 16}
    good |= {"group_m": 1, "num_warps": 2, "num_stages": 2}
    for wrong in ({"block_k": 17}, {"num_warps": 3}):
        product = {**SOME_CONFIG, **good, **wrong}
        configs = {"shrink": {**SOME_CONFIG, **good}, "product": product, "unknown": product}
        measured.add({PROBLEM: timings(configs=configs)}, CPU)
        configs = plans.choose("forward", "auto", PROBLEM, CPU).configs
        assert configs.keys() == {"shrink", "product"}
        assert configs["shrink"] == linear.Config(**good) != configs["product"]
    seen = {}
    for name in ("shrink", "product"):
        right = getattr(linear, name)
        monkeypatch.setattr(
            linear,
            name,
            lambda *a, config, name=name, right=right, **k: (
                seen.update({name: config}) or right(*a, config=config, **k)
            ),
        )
    x, *rest = operands()
    with torch.no_grad():
        assert fastlora.lora_linear(x, *rest).shape == (64, 48)
        default = launch.config_for("product", x, rest[0], 16, torch.float32, False)
        assert seen == {"shrink": configs["shrink"], "product": default}
        misaligned = torch.empty(64 * 32 + 1, dtype=torch.bfloat16)[1:].view(64, 32).copy_(x)
        fastlora.lora_linear(misaligned, *rest)
        one_by_one = launch.config_for("product", misaligned, rest[0], 16, torch.float32, False)
        assert seen == {"shrink": None, "product": one_by_one}
        seen.clear()
        wide = torch.empty(16 * 32 + 1)[1:].view(16, 32).copy_(rest[1])
        fastlora.lora_linear(x, rest[0], wide, rest[2])
    assert seen == {"shrink": None, "product": default}


def test_a_plan_made_before_measurements_is_forgotten_with_them(monkeypatch):
    x = torch.ones(16, 64)
    own = plans._function

    def slowly(*args):
        found = own(*args)
        plans.forget()  # as another thread does that has measured
        return found

    monkeypatch.setattr(plans, "_function", slowly)
    fastlora.lora_linear(x, torch.ones(8, 64), torch.ones(2, 64), torch.ones(8, 2))
    assert not plans._functions


# Several projections of one x


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
        Operands(*(t.contiguous() for t in first), *rest),
        Operands(*second, *rest),
        Operands(torch.randn(32, 16).bfloat16(), None, None, *rest),
    ]
    assert module(plans.function("forward", "auto", x, of)) == "fastlora_kernels.linears"
    frozen = [p._replace(a=None, b=None) for p in of]
    assert module(plans.function("forward", "auto", x, frozen)) == "fastlora.operator.blocks"
