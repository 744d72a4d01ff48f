# SPDX-License-Identifier: Apache-2.0
"""Records of what was done to tensors: done to others of the same layout, and to nothing else."""

import functools
import weakref
from dataclasses import replace
from types import SimpleNamespace

import fastlora_kernels
import pytest
import torch
from covering import covering
from fastlora_kernels import outputs, replay
from fastlora_kernels.launch import empty, noted
from joints import Joint, run, same
from test_persistent import suiting

from fastlora import Projection, lora_linears
from fastlora.operator import library, steps
from fastlora.operator.weights import Quantised


@pytest.fixture(autouse=True)
def records(monkeypatch):
    """Under the interpreter too, where nothing is recorded otherwise."""
    monkeypatch.setattr(replay, "RECORDS", True)


def test_a_record_serves_what_it_was_made_for(monkeypatch):
    """Same sizes, strides, dtypes, numbers, and the same distance from 16 bytes: nothing else."""
    called = []

    @replay.replayed
    def doubled(x, pair, number):
        called.append(number)
        return noted(torch.add, x, x), [pair[0], pair[1]]

    x, flat = torch.randn(4, 8), torch.randn(33)
    for given in (x, x.clone()):
        y, (first, second) = doubled(given, (x, None), 1.0)
        assert torch.equal(y, given + given) and torch.equal(first, x) and second is None
    assert len(called) == 1
    others = [
        *((x.t(), (x, None), 1.0), (x[:3], (x, None), 1.0), (x.half(), (x, None), 1.0)),
        *((x, (x, x), 1.0), (x, (x, flat), 1.0), (x, (None, x), 1.0), (x, (x, None), 2.0)),
        (flat[1:].view(4, 8), (x, None), 1.0),
        (x, (x, None), None),
    ]
    for i, other in enumerate(others, 2):
        assert all(torch.equal(doubled(*other)[0], other[0] * 2) for _ in range(2))
        assert len(called) == i
    monkeypatch.setattr(replay, "MOST_RECORDS", len(called))
    for number in (3.0, 1.0):
        doubled(x, (x, None), number)  # the first finds no room, and the second no record
    assert len(called) == len(others) + 3


KINDS = [("fp32", ()), ("bf16", (0.3, 0.0, 0.3)), ("bf16-fp32", ())]
SHAPES = [((24,), (3,)), ((24, 16, 16), (8, 0, 16))]


def test_a_replay_gives_the_same_bits(monkeypatch):
    """Of other values, by portable and persistent programs, and of each step or a direction."""
    cuts = [], [(0, 7, 40), (0, 20, 40)]
    for (kind, p), (sizes, ranks), low_rank, ends, experts in covering(
        KINDS, SHAPES, [None, "fold", "first"], cuts, [False, True]
    ):
        first, last = ends or [()] * 2
        joint = Joint(40, 32, sizes, ranks, kind, dropout_p=p, scaling=0.5, ends=first)
        joint = replace(joint, experts=experts)
        configs = suiting(joint, low_rank) if low_rank and kind != "fp32" else None
        other = replace(joint, seed=1, ends=last)
        monkeypatch.setattr(replay, "RECORDS", False)
        right = run(fastlora_kernels, other, other.tensors(), configs)
        monkeypatch.setattr(replay, "RECORDS", True)
        for of in (joint, other):
            found = run(fastlora_kernels, of, of.tensors(), configs)
        with monkeypatch.context() as patched:
            patched.setattr(outputs, "_config", None)  # what works a launch out is not asked again
            same(run(fastlora_kernels, other, other.tensors(), configs), right)
        same(found, right)


@pytest.mark.parametrize("p", [(), (0.3, 0.1)])
@pytest.mark.parametrize("kernels", [fastlora_kernels, SimpleNamespace(steps=library)])
def test_so_does_one_of_scales(kernels, p, monkeypatch):
    joint = Joint(40, 32, (24, 16, 16), (3, 0, 16), "bf16-fp32", dropout_p=p, scaled=True)
    other = replace(joint, seed=1)
    monkeypatch.setattr(replay, "RECORDS", False)
    right = run(kernels, other, other.tensors())
    monkeypatch.setattr(replay, "RECORDS", True)
    for of in (joint, other):
        found = run(kernels, of, of.tensors())
    same(found, right)


@pytest.mark.parametrize("scaled", [False, True])
def test_weights_that_are_no_tensors(scaled, monkeypatch):
    """Quantised ones, and one more adapter of the same output, which the library multiplies by."""
    generator = torch.Generator().manual_seed(0)
    x, w, a, b, scale = (
        torch.randn(shape, generator=generator, requires_grad=True)
        for shape in ((9, 32), (24, 32), (4, 32), (24, 4), (24,))
    )
    quantised = Quantised(w.detach(), w.shape, w.dtype, torch.clone)
    projections = [Projection(quantised, a, b, scale=scale if scaled else None)]
    if not scaled:
        projections.append(Projection(slice(None), a, b, None, 0.5))
    found = []
    for records in (False, True, True):
        monkeypatch.setattr(replay, "RECORDS", records)
        (y,) = lora_linears(x, projections, impl="library")
        inputs = x, a, b, *[scale][:scaled]
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for again in found[1:]:
        torch.testing.assert_close(again, found[0], rtol=0, atol=0)


def test_one_tensor_may_be_two_the_next_time(monkeypatch):
    """Six projections that share weights, and then do not: two launches add dx up."""
    kernels, joint = (
        fastlora_kernels.steps,
        Joint(8, 32, (16, 16), (4, 4), biases=(True, True), scaling=0.5),
    )
    directions = [functools.partial(f, kernels) for f in (steps.forward, steps.backward)]
    forward, backward = map(replay.replayed, directions)
    drawn = [replace(joint, seed=seed).tensors() for seed in range(3)]
    x, dys = drawn[0][0]["x"], [t["dy"] for ts in drawn for t in ts]
    apart = [one for ts in drawn for one in joint.projections(ts)]
    for projections in ([apart[0]] * 6, apart):
        ys, ss = forward(x, projections)
        dx, das, dbs = backward(dys, x, projections, ss, True, [(True, True)] * 6)
    monkeypatch.setattr(replay, "RECORDS", False)
    right = forward(x, apart)[0], *backward(dys, x, apart, ss, True, [(True, True)] * 6)
    for found, of in zip((ys, [dx], das, dbs), (right[0], [right[1]], *right[2:]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, of, strict=True))


def test_what_is_not_needed_any_more_is_freed_on_the_way():
    parts, alive = [], []

    @replay.replayed
    def summed(x):
        part, result = empty(x, 4, *x.shape, dtype=torch.float64), empty(x, *x.shape)
        noted(lambda part, out: parts.append(weakref.ref(part)) or out.zero_(), part, result)
        del part
        noted(lambda out: alive.append(parts[-1]() is not None) or out.add_(1), result)
        return result

    assert all(torch.equal(summed(torch.randn(3)), torch.ones(3)) for _ in range(3))
    assert alive == [True, False, False]


def test_what_fails_is_not_recorded():
    @replay.replayed
    def inverse(x, number):
        made = empty(x, 2)
        if not number:
            raise ZeroDivisionError
        return made.fill_(1) if number < 0 else noted(torch.full_like, made, 1 / number)

    x = torch.randn(2)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            inverse(x, 0)
        assert torch.equal(inverse(x, 4.0), torch.full((2,), 0.25))
