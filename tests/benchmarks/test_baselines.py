# SPDX-License-Identifier: Apache-2.0
"""The ways that are compared: all compute one layer, of the same frozen weights."""

import copy
import dataclasses
from unittest.mock import Mock

import baselines
import decoder_layer
import dora_layer
import experts_block
import measure
import mixed_layer
import pytest
import torch
from baselines import WAYS, Problem, cannot
from fastlora_kernels.configs import Chip
from recorder import recording

EAGER = [way for way in WAYS if way != "PEFT compiled"]
DECODERS = [way for way in decoder_layer.WAYS if way != "PEFT compiled"]
PROBLEM = Problem("small", 300, 40, 64, R=4, dtype=torch.float32, adapter=torch.float32)


def outputs(problem, ways=EAGER):
    x, dy = problem.inputs()
    found = {}
    for way in ways:
        if cannot(way, problem) is None:
            layer = WAYS[way](problem)
            trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
            y = layer(x)
            found[way] = (y, *torch.autograd.grad(y, trained, dy))
    return found


@pytest.mark.usefixtures("few")
def test_all_ways_compute_the_same_layer():
    found = outputs(PROBLEM)
    assert found.keys() == set(EAGER) - {"fastlora library", "fastlora triton"}
    frozen = found.pop("frozen")
    assert len(frozen) == 2
    for way, mine in found.items():
        torch.testing.assert_close(mine, found["PEFT"], rtol=1e-4, atol=1e-4, msg=way)


@pytest.mark.parametrize(("weights", "module"), [("nf4", "bitsandbytes"), ("int8", "torchao")])
def test_the_ways_of_quantised_weights_compute_the_same_layer(weights, module):
    pytest.importorskip(module, reason=f"needs {module}")
    found = outputs(dataclasses.replace(PROBLEM, N=64, weights=weights))
    ours = found.pop("fastlora blocks")
    assert found.keys() == {"frozen", "PEFT", "addmm (Unsloth, Axolotl)"}
    for way in list(found)[1:]:
        torch.testing.assert_close(ours, found[way], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_lorafusion_as_on_a_gpu(p, monkeypatch):
    """Its kernels, in the interpreter, make what library products make in their place."""
    problem = dataclasses.replace(PROBLEM, p=p)
    torch.manual_seed(0)
    expected = outputs(problem, ["LoRAFusion schedule"])
    monkeypatch.setattr(baselines, "on_gpu", lambda t: True)
    torch.manual_seed(0)
    found = outputs(problem, ["LoRAFusion schedule"])
    torch.testing.assert_close(*found.values(), *expected.values(), rtol=1e-4, atol=1e-4)


def test_lorafusion_scales_the_narrow_factor(monkeypatch):
    """So that its product needs no step of its own for the low-rank part, whatever the scaling."""
    monkeypatch.setattr(baselines, "on_gpu", lambda t: True)
    problem = Problem("scaled", 256, 128, 128, scaling=2.0)
    with recording(Chip((9, 0), 232448, 132)) as calls:
        WAYS["LoRAFusion schedule"](problem)(problem.inputs()[0])
    assert [call.config.low_rank for call in calls] == ["fold"]


@pytest.mark.parametrize("name", ["plain", "biased"])
def test_all_ways_compute_the_same_decoder_layer(name, small_decoders):
    problem = decoder_layer.Problem(name, dtype=torch.float32, tokens=10)
    frozen, found = decoder_layer.Layer(problem), {}
    x = torch.randn(10, 32, requires_grad=True)
    dys = [torch.randn(10, n) for n in (32, 16, 16)]
    for way in DECODERS[1:]:
        layer = decoder_layer.WAYS[way](problem, copy.deepcopy(frozen))
        assert sum(p.requires_grad for p in layer.parameters()) == 14
        ys = layer(x)
        found[way] = [*ys, *torch.autograd.grad(ys, [x], dys)]
    assert len(found) == 4
    for way, mine in found.items():
        torch.testing.assert_close(mine, found["PEFT"], rtol=1e-4, atol=1e-4, msg=way)


@pytest.mark.parametrize("by_turns", [False, True])
def test_ours_mixes_adapters_as_pefts_layer_does(by_turns):
    some = {**vars(PROBLEM), "name": "mixed", "M": 192, "p": 0.0}
    problem = mixed_layer.Problem(**some, adapters=16, by_turns=by_turns)
    assert (
        len(set(problem.names)) == 16
        and (sorted(problem.names, key=int) == problem.names) != by_turns
    )
    x, dy = (t.detach().unflatten(0, (64, 3)) for t in problem.inputs())
    linear, found = problem.linear(), []
    for way in ("fastlora", "PEFT"):
        layer = mixed_layer.WAYS[way](problem, measure.sharing(linear))
        step = measure.Step(layer, x.requires_grad_(), dy)
        assert len(step.trained) == 1 + 2 * 16
        found.append([layer(x), *torch.autograd.grad(layer(x), step.trained, dy)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("m", [20, 1])
def test_ours_computes_dora_as_peft_does(m):
    problem = dora_layer.Problem(**{**vars(PROBLEM), "M": m})
    (x, dy), linear, found = problem.inputs(), problem.linear(), {}
    x = x.detach().requires_grad_(m > 1)
    for way, make in dora_layer.WAYS.items():
        layer = make(problem, measure.sharing(linear))
        step = measure.step_of(layer, x, dy)
        assert (type(step) is measure.Step) == (m > 1)
        list(step())
        found[way] = layer(x)
        assert layer.training or m == 1 or way == "frozen"
    torch.testing.assert_close(found["fastlora"], found["PEFT"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["fastlora"], found["frozen"], atol=0.1)


def test_ours_computes_experts_as_pefts_wrapper_does():
    some = {**vars(PROBLEM), "name": "experts", "M": 20, "experts": 3}
    problem = experts_block.Problem(**some)
    block, (x, dy) = problem.block(), problem.inputs()
    found = {}
    for way, make in experts_block.WAYS.items():
        step = measure.Step(make(problem, measure.sharing(block)), x, dy)
        assert len(step.trained) == (2 if way == "frozen" else 2 + 2 * 2)
        y = step.layer(x)
        found[way] = [y, *torch.autograd.grad(y, step.trained, dy)]
    torch.testing.assert_close(found["fastlora"], found["PEFT"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["fastlora"][0], found["frozen"][0], atol=0.1)


def assert_shared(frozen, ways):
    """All read the same frozen weights; what each one trains is its own."""
    lies = [{True: set(), False: set()} for _ in (frozen, *ways)]
    for found, module in zip(lies, (frozen, *ways), strict=True):
        for t in (*module.parameters(), *module.buffers()):
            found[t.requires_grad].add(t.data_ptr())
    assert not lies[0][True] and all(found[False] == lies[0][False] for found in lies)
    trained = [found[True] for found in lies[1:]]
    assert len(set().union(*trained)) == sum(map(len, trained)) > 0


def test_layers_share_their_frozen_weights(small_decoders, monkeypatch):
    steps = Mock(wraps=measure.Step)
    for module in (measure, decoder_layer):
        monkeypatch.setattr(module, "Step", steps)
    problem = dataclasses.replace(PROBLEM, bias=True)
    measure.measure(problem, EAGER, 0.0)
    decoder = decoder_layer.Problem("biased", dtype=torch.float32, tokens=10)
    decoder_layer.measure(decoder, DECODERS, 0.0)
    layers = [made.args[0] for made in steps.mock_calls]
    assert len(layers) == 11
    for ways, again in ((layers[:6], problem.linear()), (layers[6:], decoder_layer.Layer(decoder))):
        linears = [{m for m in way.modules() if type(m) is torch.nn.Linear} for way in ways]
        assert len(set().union(*linears)) == sum(map(len, linears))  # PEFT puts its own around it
        assert_shared(ways[0], ways[1:])
        assert all(map(torch.equal, ways[0].parameters(), again.parameters()))
