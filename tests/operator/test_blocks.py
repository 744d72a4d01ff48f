# SPDX-License-Identifier: Apache-2.0
"""What runs without kernels of ours, or beside them, is right: `blocks`, `eager` and `library`."""

from __future__ import annotations

import itertools

import pytest
import torch
from acceptance import (
    KINDS,
    RANKS,
    Case,
    oracle,
    plain,
    run,
    small_cases,
    strided,
    verify,
    verify_exactly,
)
from bodies import Body, Eager, bodies

from fastlora.operator import blocks

BODIES = {"blocks": Body(blocks), "eager": Eager()}
each_body = pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)


@pytest.fixture
def large(monkeypatch):
    """Small inputs go the way of large ones: a few rows a block, float32 factors in terms."""
    monkeypatch.setattr(blocks, "FEW", 0)
    monkeypatch.setattr(blocks, "SHORT", 0)
    monkeypatch.setitem(blocks.ROWS, "cpu", 16)


@pytest.mark.parametrize("case", small_cases(), ids=str)
def test_acceptance_rule(case, request):
    for body in BODIES.values():
        verify(body, case)
    request.getfixturevalue("large")
    verify(BODIES["blocks"], case)


@each_body
def test_every_rank(body):
    for i, r in enumerate(RANKS):
        verify(body, Case(66, 70, 74, r, kind=list(KINDS)[i % len(KINDS)]))


@each_body
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_small_integers_are_exact(body, kind, p):
    for shape in ((37, 29, 70, 5), (1, 8, 16, 1), (64, 16, 32, 16)):
        verify_exactly(body, Case(*shape, kind=kind, dropout_p=p))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_more_rows_than_one_block(kind, p):
    verify(BODIES["blocks"], Case(2 * blocks.ROWS["cpu"] + 7, 50, 70, 6, kind=kind, dropout_p=p))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_library_products_beside_the_kernels(kind, p):
    for mode in ("base", "low_rank", "both"):
        verify(bodies()["library"], Case(33, 50, 70, 5, kind=kind, mode=mode, dropout_p=p))


@pytest.mark.parametrize("name", ["blocks", "library"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_only_the_gradients_asked_for(name, p):
    body, case = bodies()[name], Case(9, 10, 11, 3, kind="bf16-fp32", dropout_p=p)
    t = case.tensors()
    factors, rest = (t["w"], t["a"], t["b"]), (t["seed"], 0.5, p)
    _, s = body.forward(t["x"], *factors, None, *rest)
    full = body.backward(t["dy"], t["x"], *factors, s, *rest, (True,) * 3)
    for needs in itertools.product((False, True), repeat=3):
        found = body.backward(t["dy"], t["x"], *factors, s, *rest, needs)
        assert [g is not None for g in found] == list(needs)
        assert all(g is None or torch.equal(g, right) for g, right in zip(found, full, strict=True))


@each_body
@pytest.mark.parametrize("rows, columns", [(0, 7), (5, 0)], ids=["no rows", "no inputs"])
def test_empty_dimensions(body, rows, columns):
    case = Case(5, 6, 7, 2)
    t = case.tensors()
    t |= {"x": t["x"][:rows, :columns], "dy": t["dy"][:rows]}
    t |= {name: t[name][:, :columns] for name in "wa"}
    found, expected = run(body, case, t), plain(case, t)
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


@each_body
@pytest.mark.parametrize("kind", ["bf16", "bf16-fp32"])
@pytest.mark.parametrize("name", ["x", "w", "a", "b", "dy"])
def test_strides(body, name, kind, request):
    case = Case(40, 24, 56, 6, kind=kind, dropout_p=0.3)
    t = case.tensors()
    for _, laid in strided(t[name]):
        if name in "ab" and isinstance(body, Eager):
            continue  # "auto" does not take it for them
        verify(body, case, {**t, name: laid})


@each_body
def test_a_bad_row_stays_one_row(body):
    case = Case(12, 10, 16, 3)
    t = case.tensors()
    right = run(body, case, t)
    for bad in (torch.nan, torch.inf):
        worse = {**t, "x": t["x"].clone()}
        worse["x"][5, 3] = bad
        y = run(body, case, worse)["y"]
        others = [i for i in range(12) if i != 5]
        torch.testing.assert_close(y[others], right["y"][others])
        assert not y[5].isfinite().any()


@each_body
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dropped_is_still_not_a_number(body, kind):
    """As in PyTorch, where dropout multiplies by zero."""
    case = Case(8, 10, 16, 3, kind=kind, mode="low_rank", dropout_p=0.9)
    t = case.tensors()
    t["x"][2] = torch.nan
    found, expected = run(body, case, t), oracle(case, t)
    for name, result in found.items():
        assert torch.equal(result.isnan(), expected[name].isnan()), name
