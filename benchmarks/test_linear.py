# SPDX-License-Identifier: Apache-2.0
"""pytest-benchmark for one linear layer: every way, forward and backward apart.

``pytest benchmarks -k "q, o"``. Rows of one group are the same problem and direction; compare
them within a run only, or take ``make bench``, which lets the ways take turns.
"""

import pytest
import torch
from baselines import WAYS, Problem, cannot
from problems import problems

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBLEMS = list(problems(DEVICE))
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=Problem.__str__)
each_way = pytest.mark.parametrize("way", [way for way in WAYS if way != "PEFT compiled"])


def timed(benchmark, call, setup=None):
    def finished(*args):
        call(*args)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(finished, setup=setup, warmup_rounds=1, rounds=5)


def layer_of(way, problem, benchmark, direction):
    why = cannot(way, problem)
    if why is not None:
        pytest.skip(f"{way}: {why}")
    benchmark.group = f"{problem}, {direction}"
    return WAYS[way](problem), *problem.inputs()


@each_way
@each_problem
def test_forward(benchmark, problem, way):
    layer, x, _ = layer_of(way, problem, benchmark, "forward")
    timed(benchmark, lambda: layer(x))


@each_way
@each_problem
def test_backward(benchmark, problem, way):
    layer, x, dy = layer_of(way, problem, benchmark, "backward")
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    timed(benchmark, lambda y: torch.autograd.grad(y, trained, dy), lambda: ((layer(x),), {}))
