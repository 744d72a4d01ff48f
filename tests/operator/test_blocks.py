# SPDX-License-Identifier: Apache-2.0
"""What runs without kernels of ours is right: `blocks` and `eager`."""

import pytest
import torch
import torch.nn.functional as F
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
from bodies import Body, Eager

from fastlora.operator import blocks

BODIES = {"blocks": Body(blocks), "eager": Eager()}
each_body = pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("case", small_cases(), ids=str)
def test_acceptance_rule(case, monkeypatch):
    for body in BODIES.values():
        verify(body, case)
    # As if they were large: a few rows a block, float32 factors in terms.
    for name in ("FEW", "SHORT"):
        monkeypatch.setattr(blocks, name, 0)
    monkeypatch.setitem(blocks.ROWS, "cpu", 16)
    verify(BODIES["blocks"], case)


@each_body
def test_every_rank(body):
    for i, r in enumerate(RANKS):
        verify(body, Case(66, 70, 74, r, kind=list(KINDS)[i % len(KINDS)]))


@each_body
@each_kind
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_small_integers_are_exact(body, kind, p):
    for shape in ((37, 29, 70, 5), (1, 8, 16, 1), (64, 16, 32, 16)):
        verify_exactly(body, Case(*shape, kind=kind, dropout_p=p))


@each_body
@pytest.mark.parametrize("rows, columns", [(0, 7), (5, 0)], ids=["no rows", "no inputs"])
def test_empty_dimensions(body, rows, columns):
    for p in (0.0, 0.5):
        case = Case(rows, 6, columns or 7, 2, dropout_p=p)
        t = case.tensors()
        t |= {name: t[name][:, :columns] for name in "xwa"}
        case = Case(rows, 6, columns, 2, dropout_p=p)
        found, expected = run(body, case, t), plain(case, t)
        for name in found:
            torch.testing.assert_close(found[name], expected[name])


@each_body
@pytest.mark.parametrize("kind", ["bf16", "bf16-fp32"])
@pytest.mark.parametrize("name", ["x", "w", "a", "b", "dy"])
def test_strides(body, name, kind):
    case = Case(40, 24, 56, 6, kind=kind, dropout_p=0.3)
    t = case.tensors()
    for _, laid in strided(t[name]):
        if name in "ab" and isinstance(body, Eager):
            continue  # "auto" does not take it for them
        if name == "x" and F.linear(laid, t["w"]).isnan().any():
            pytest.skip("PyTorch's own product reads past such rows on this processor")
        verify(body, case, {**t, name: laid})


@each_body
@each_kind
@pytest.mark.parametrize("p", [0.0, 0.9])
def test_what_is_not_finite_stays_where_it_is(body, kind, p):
    """One bad row stays one row; dropout multiplies by zero, as in PyTorch, and a NaN stays one."""
    case = Case(12, 10, 16, 3, kind=kind, mode="low_rank" if p else "both", dropout_p=p)
    t = case.tensors()
    for bad in (torch.nan,) if p else (torch.nan, torch.inf):
        t["x"][5, slice(None) if p else 3] = bad
        found, expected = run(body, case, t), oracle(case, t)
        for name, result in found.items():
            assert torch.equal(result.isfinite(), expected[name].isfinite()), name
