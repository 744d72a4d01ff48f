# SPDX-License-Identifier: Apache-2.0
"""The acceptance rule is itself tested: it refuses what is wrong by one line, and nothing right.

Wrong kernels are refused in test_wrong_kernels.py.
"""

from pathlib import Path
from types import ModuleType

import pytest
from acceptance import Case, verify
from bodies import Body, Eager

from fastlora.operator import blocks, eager

# Problems on which every wrong copy must be caught by at least one.
CASES = [
    Case(70, 50, 150, 5, kind="bf16", mode="base"),
    Case(70, 50, 90, 5, kind="bf16", mode="low_rank", dropout_p=0.3),
    Case(1100, 64, 150, 5, kind="bf16-fp32", mode="both", dropout_p=0.3),
    Case(1100, 64, 150, 5, kind="bf16-fp32", mode="low_rank"),
    Case(1100, 64, 150, 5, kind="fp32", mode="low_rank", dropout_p=0.3),
    Case(100, 64, 150, 5, kind="bf16-fp32", mode="low_rank"),
    Case(100, 64, 150, 5, kind="bf16", bias=False),
]
MASKED = "addcmul_(part, ones, value=kept_scale(p))"

# What, and the line as it is => as it would be wrong.
BLOCKS = {
    "1 / (1 - p) forgotten in s": "s if seed is None else s.mul_(kept_scale(p)) => s",
    "1 / (1 - p) forgotten in dx": ", value=kept_scale(p)) => )",
    "1 / (1 - p) forgotten in da": "da.mul_(kept_scale(p)) => pass",
    "dx not masked": f"{MASKED} => add_(part, alpha=kept_scale(p))",
    "float32 factors rounded to 16 bits": ".bfloat16), rest => .bfloat16), rest.zero_()",
    "scaling forgotten": "None else 1, alpha=alpha) => None else 1)",
    "scaling forgotten where there is a bias": "right, alpha=alpha, out=out) => right, out=out)",
    "many rows not scaled": "b.t(), alpha=scaling)) => b.t()))",
    "bias of many rows dropped": "F.linear(x, w, bias).addmm_ => F.linear(x, w).addmm_",
    "ds and db not scaled": "left, right, beta=0, alpha=alpha) => left, right, beta=0)",
    "base product forgotten": "ys.append(y.addmm_(x, w.t())) => ys.append(y)",
    "low-rank part of dx forgotten": "product(part, _each(ds, a), a, part) => pass",
    "db of the last block alone": "db = _added(db, scaled_product( => db = (scaled_product(",
    "da of the last block alone": "da = _added(da, _each( => da = (_each(",
    "few elements not scaled": "@ right).mul_(alpha) => @ right)",
    "s from 16 bits": "_each(x_hat, a) @ a.mT => (x_hat.bfloat16() @ a.bfloat16().mT).to(a.dtype)",
    "bias dropped": "shape[0]), ss[i], b.t(), bias => shape[0]), ss[i], b.t(), None",
    "bias of few elements dropped": "+= plus[rows] if plus is out else plus => += 0",
}
EAGER = {
    "scaling forgotten": "s, b.t(), alpha=scaling) => s, b.t())",
    "scaling of float32 factors forgotten": "s * scaling => s",
    "bias dropped": "F.linear(x, w, bias), s => F.linear(x, w), s",
    "bias of float32 factors dropped": "added + bias => added",
    "1 / (1 - p) forgotten": "(x_hat, scaling * kept) => (x_hat, scaling)",
    "nothing dropped": "x * next(kept_ones(seed, x.shape, p, x.dtype, M)) => x",
    "base product of the dropped x": ".to(x.dtype), x, w.t()) => .to(x.dtype), x_hat, w.t())",
    "base product forgotten": "torch.addmm(added.to(x.dtype), x, w.t()) => added.to(x.dtype)",
    "s from 16 bits": "(x_hat.to(a.dtype), a) => (x_hat, a.to(x.dtype)).to(a.dtype)",
}


def changed(module: ModuleType, change: str) -> ModuleType:
    """Return a copy of ``module`` with one line ``right => wrong``."""
    text, (right, wrong) = Path(module.__file__).read_text(), change.split(" => ")
    assert text.count(right) == 1, f"{right!r} occurs {text.count(right)} times"
    mutant = ModuleType("mutant")
    exec(text.replace(right, wrong), mutant.__dict__)
    return mutant


def check_blocks(module: ModuleType) -> None:
    for case in CASES:
        verify(Body(module), case)
    # As if they were large.
    limits = {name: getattr(module, name) for name in ("FEW", "SHORT", "LEAST_ELEMENTS", "MANY")}
    try:
        vars(module).update(dict.fromkeys(limits, 0))
        for case in CASES:
            verify(Body(module), case)
    finally:
        vars(module).update(limits)


def check_eager(module: ModuleType) -> None:
    for case in CASES:
        verify(Eager(module), case)


@pytest.mark.parametrize("name", BLOCKS)
def test_wrong_blocks_are_refused(name):
    mutant = changed(blocks, BLOCKS[name])
    with pytest.raises(AssertionError):
        check_blocks(mutant)


@pytest.mark.parametrize("name", EAGER)
def test_a_wrong_formula_is_refused(name):
    mutant = changed(eager, EAGER[name])
    with pytest.raises(AssertionError):
        check_eager(mutant)


def test_the_right_ones_are_accepted():
    check_blocks(blocks)
    check_eager(eager)


def test_zero_gradients_are_refused():
    """A tolerance of a few percent passes an all-zero dA when B is small; the rule does not."""

    class Zero(Body):
        def backward(self, *args):
            dx, da, db = super().backward(*args)
            return dx, da * 0, db

    with pytest.raises(AssertionError, match="lora_A"):
        verify(Zero(blocks), CASES[1])
