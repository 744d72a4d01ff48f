# SPDX-License-Identifier: Apache-2.0
"""The acceptance rule is itself tested: it refuses kernels that are wrong, and no right one.

A wrong kernel is a copy of the package with one line changed.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import fastlora_kernels
import pytest
from acceptance import Case, verify
from bodies import Body, Eager
from joints import load

from fastlora.operator import blocks, eager

# Problems on which every wrong kernel must be caught by at least one.
CASES = [
    Case(70, 50, 150, 5, kind="bf16", mode="base"),
    Case(70, 50, 90, 5, kind="bf16", mode="low_rank", dropout_p=0.3),
    Case(70, 50, 90, 40, kind="fp32", mode="both"),
    Case(70, 50, 90, 5, kind="bf16-fp32", mode="low_rank"),
    Case(200, 300, 300, 5, kind="fp16", mode="low_rank"),
    Case(70, 300, 20, 40, kind="bf16", mode="low_rank"),
    Case(600, 20, 160, 5, kind="bf16", mode="both", dropout_p=0.3),  # the longest comes last
]
SCALED = "acc *= tl.cast(number_of(i, scales, ACC), ACC)"
ROUNDED = ".to(tl.bfloat16).to(tl.float32)"

# By file: what, the line as it is, the line as it would be wrong.
COPIES = {
    "outputs.py": {
        "scaling forgotten": (SCALED, "acc *= 1.0"),
        "scaling applied twice": (SCALED, f"{SCALED}\n        {SCALED}"),
        "low-rank path subtracted": (SCALED, SCALED.replace("tl.cast", "-tl.cast")),
        "low-rank path dropped": (SCALED, "acc *= 0.0"),
        "bias dropped": ("acc += tl.load(bias_tile", "tl.load(bias_tile"),
    },
    "tiles.py": {
        "base path dropped": ("acc = dot(x, w, acc)", "pass"),
        "K mask one short": ("mask_k = offs_k < K - k", "mask_k = offs_k < K - k - 1"),
        "K mask not advanced": ("mask_k = offs_k < K - k", "mask_k = offs_k < K"),
        "step of x not taken": ("x_ptrs += step_x", "pass"),
        "16-bit sum of the base path": ("acc = dot(x, w, acc)", f"acc = dot(x, w, acc){ROUNDED}"),
        "rank tiles beyond the first lost": ("tl.range(0, R, BLOCK_R", "tl.range(0, 1, BLOCK_R"),
        "8 bits of float32 adapters": ("part = tl.dot(left, middle, part)", "part = part * 1.0"),
    },
    "input_grad.py": {
        "mask of dx at the wrong column": (
            "keep_tile(seed_ptr, offs_m, first_k, K, keep_from, BLOCK_N).to",
            "keep_tile(seed_ptr, offs_m, 0, K, keep_from, BLOCK_N).to",
        ),
        "dx not masked": (
            "part *= keep_tile(seed_ptr, offs_m, first_k, K, keep_from, BLOCK_N).to(ACC)",
            "pass",
        ),
        "1 / (1 - p) forgotten in dx": ("part *= tl.cast(number_of(i, scales, ACC), ACC)", "pass"),
    },
    "shrink.py": {
        "s summed in bfloat16": ("dot(x_hat, a, sums[i])", f"dot(x_hat, a, sums[i]){ROUNDED}"),
        "1 / (1 - p) forgotten": ("* tl.cast(scales[i], ACC)", "* 1.0"),
        "dropout of x forgotten": ("x_hat = (x.to(ACC) * keep.to(ACC)).to(x.dtype)", "x_hat = x"),
        "mask of x at the wrong column": ("offs_m, k, K, keep_froms", "offs_m, 0, K, keep_froms"),
        "rank mask of s one short": ("(offs_r < ranks[i])", "(offs_r < ranks[i] - 1)"),
    },
    "da.py": {
        "dropout drawn again with another mask": (", first_k, K, ", " + 1, first_k, K, "),
    },
    "ds_db.py": {
        "ds of the wrong sign": ("dot(tl.trans(dy), b, ds)", "dot(tl.trans(dy), -b, ds)"),
        "ds of the wrong sign at a high rank": ("dot(dy, b, ds)", "dot(dy, -b, ds)"),
        "column tiles of ds beyond a program's first lost": (
            "min((chunk + 1) * steps * BLOCK_N, N)",
            "min(chunk * steps * BLOCK_N + BLOCK_N, N)",
        ),
        "ds of one row tile for all": ("= first_row + tile % steps * BLOCK_M +", "= first_row +"),
        "rows of later splits lost": ("(first_row + steps * BLOCK_M, M)", "(steps * BLOCK_M, M)"),
        "db in bfloat16 before the sum": (
            "tl.store(db_ptrs, db,",
            f"tl.store(db_ptrs, db{ROUNDED},",
        ),
    },
    "sums.py": {
        "partial sum lost": ("tl.int32) // 2 - 1", "tl.int32) // 2 - 2"),
        "sum not scaled": (SCALED, "pass"),
    },
    "dropout.py": {
        "mask from one word for two elements": ("(low >> 16).to(tl.int16)", "low.to(tl.int16)"),
    },
}
KERNELS = {name: (file, *of[name]) for file, of in COPIES.items() for name in of}

# The same for the products of sm_90 and later, with the low-rank step at which it has to show.
PERSISTENT_COPIES = {
    ("fold", "outputs.py"): {
        "steps of the fold lost": ("+= tl.cdiv(R_tile, BLOCK_K)", "+= 0"),
        "fold from the wrong columns": (", (step - steps) * BLOCK_K", ", step * BLOCK_K"),
        "16-bit sum of the base path": (
            "acc = tl.dot(x, w, acc)",
            f"acc = tl.dot(x, w, acc){ROUNDED}",
        ),
        "bias dropped": ("acc += bias.to(tl.float32)[None, :]", "pass"),
        "later tiles lost": ("tiles_m * tiles_n, tl.num", "1, tl.num"),
    },
    ("first", "outputs.py"): {
        "s of the first row tile": (" = wrapped(first_m + tl.arange", " = wrapped(tl.arange"),
        "b of the first column tile": (
            "columns = wrapped(offs_n, N_tile)",
            "columns = wrapped(tl.arange(0, BLOCK_N), N_tile)",
        ),
    },
    ("fold", "tiles.py"): {
        "right half of a tile lost": ("first_n + HALF, right", "first_n, right"),
    },
    ("fold", "input_grad.py"): {
        "dx of the first row tile": ("dy_from.load([first_m, n])", "dy_from.load([0, n])"),
    },
    ("fold", "shrink.py"): {
        "s not scaled": ("s *= tl.cast(factor, ACC)", "pass"),
    },
}
PERSISTENT = {name: (*where, *of[name]) for where, of in PERSISTENT_COPIES.items() for name in of}
PERSISTENT_CASES = [
    Case(50, 104, 152, 16, kind="bf16", mode="base"),
    Case(50, 296, 40, 16, kind="bf16", mode="low_rank"),
]

# The same for the blocks: name: (line as it is, line as it would be wrong)
BLOCKS = {
    "mask of every block that of the first": (
        "ones = mask.draw(here.stop)",
        "mask.step = 0\n            ones = mask.draw(here.stop)",
    ),
    "1 / (1 - p) forgotten in dx": (", value=kept_scale(p))", ")"),
    "1 / (1 - p) forgotten in da": ("else total.mul_(kept_scale(p))", "else total"),
    "dx not masked": ("addcmul_(part, ones, value=kept_scale(p))", "add_(part * kept_scale(p))"),
    "float32 factors rounded to 16 bits": (".bfloat16), rest", ".bfloat16), rest.zero_()"),
    "scaling forgotten": (", right, beta=0, alpha=alpha)\n    for", ", right, beta=0)\n    for"),
    "ds and db not scaled": ("beta=0, alpha=alpha)\n\n\ndef _turned", "beta=0)\n\n\ndef _turned"),
    "scaling forgotten where there is a bias": ("right, alpha=alpha, out=out)", "right, out=out)"),
    "base product forgotten": ("ys.append(y.addmm_(x, w.t()))", "ys.append(y)"),
    "low-rank part of dx forgotten": ("_add_product(dx, ds, a)", "pass"),
    "db not scaled": ("(_turned(s, dy), dy, scaling)", "(_turned(s, dy), dy, 1.0)"),
    "db of the last block alone": (".addmm_(s[rows].t(), dy_rows)", " = s[rows].t() @ dy_rows"),
    "da of the last block alone": ("if total is None else total.add_(part)", ""),
    "db of few rows not scaled": ("_scaled_product(dy.t(), s, scaling)", "dy.t() @ s"),
    "few elements not scaled": ("(left, rows) @ right).mul_(alpha)", "(left, rows) @ right)"),
    "s of few rows from 16 bits": ("x.to(a.dtype) @ a.t()", "(x @ a.t().to(x.dtype)).to(a.dtype)"),
    "bias dropped": ("w.shape[0]), bias)", "w.shape[0]))"),
    "bias of few elements dropped": ("part if bias is None else part.add_(bias)", "part"),
}
BLOCKS_CASES = [
    *CASES[:2],
    Case(1100, 64, 150, 5, kind="bf16-fp32", mode="both", dropout_p=0.3),
    Case(1100, 64, 150, 5, kind="bf16-fp32", mode="low_rank"),
    Case(1100, 64, 150, 5, kind="fp32", mode="low_rank", dropout_p=0.3),
    Case(100, 64, 150, 5, kind="bf16-fp32", mode="low_rank"),
    Case(100, 64, 150, 5, kind="bf16", bias=False),
]

# The same for PyTorch's own operations.
EAGER = {
    "scaling forgotten": ("b.t(), alpha=scaling", "b.t()"),
    "scaling of float32 factors forgotten": ("s * scaling", "s"),
    "bias dropped": ("F.linear(x, w, bias), s", "F.linear(x, w), s"),
    "bias of float32 factors dropped": ("low_rank + bias", "low_rank"),
    "1 / (1 - p) forgotten": ("(x_hat, scaling * kept)", "(x_hat, scaling)"),
    "nothing dropped": ("x * _ones(x, seed, p, observed)", "x"),
    "base product of the dropped x": (".to(x.dtype), x, w.t())", ".to(x.dtype), x_hat, w.t())"),
    "base product forgotten": (
        "torch.addmm(low_rank.to(x.dtype), x, w.t())",
        "low_rank.to(x.dtype)",
    ),
    "s from 16 bits": ("linear(x_hat.to(a.dtype), a)", "linear(x_hat, a.to(x.dtype)).to(a.dtype)"),
}


def refused(body, cases) -> None:
    """The rule refuses ``body`` for one of ``cases`` at least."""
    with pytest.raises(AssertionError):
        for case in cases:
            verify(body, case)


@pytest.mark.parametrize("name", KERNELS)
def test_a_wrong_kernel_is_refused(name, tmp_path):
    mutant = load(tmp_path, f"mutant_{list(KERNELS).index(name)}", *KERNELS[name])
    refused(Body(mutant.steps), CASES)


def persistent(kernels: ModuleType, low_rank: str) -> Body:
    """``kernels`` with small tiles of the persistent products, stored in two halves."""
    config = kernels.Config(16, 256, 16, tma=True, low_rank=low_rank)
    return Body(kernels.steps, {"outputs": config, "input_grad": config})


@pytest.mark.parametrize("name", PERSISTENT)
def test_a_wrong_persistent_kernel_is_refused(name, tmp_path):
    low_rank, *change = PERSISTENT[name]
    mutant = load(tmp_path, f"persistent_mutant_{list(PERSISTENT).index(name)}", *change)
    refused(persistent(mutant, low_rank), PERSISTENT_CASES)


def changed(module: ModuleType, right: str, wrong: str) -> ModuleType:
    """Return a copy of ``module`` in which ``right`` reads ``wrong``."""
    text = Path(module.__file__).read_text()
    assert text.count(right) == 1, f"{right!r} occurs {text.count(right)} times"
    mutant = ModuleType("mutant")
    exec(text.replace(right, wrong), mutant.__dict__)
    return mutant


@pytest.mark.parametrize("name", BLOCKS)
def test_wrong_blocks_are_refused(name):
    mutant = changed(blocks, *BLOCKS[name])
    with pytest.raises(AssertionError):
        for case in BLOCKS_CASES:
            verify(Body(mutant), case)
        # As if they were large.
        mutant.FEW = mutant.SHORT = mutant.FEW_COLUMNS = mutant.LEAST_ELEMENTS = 0
        for case in BLOCKS_CASES:
            verify(Body(mutant), case)


@pytest.mark.parametrize("name", EAGER)
def test_a_wrong_formula_is_refused(name):
    refused(Eager(changed(eager, *EAGER[name])), BLOCKS_CASES)


@pytest.mark.parametrize("name", ["blocks", "eager", "triton", "fold", "first"])
def test_the_right_one_is_accepted(name):
    body, cases = {
        "blocks": (Body(blocks), BLOCKS_CASES),
        "eager": (Eager(), BLOCKS_CASES),
        "triton": (Body(fastlora_kernels.steps), CASES),
    }.get(name, (None, PERSISTENT_CASES))
    for case in cases:
        verify(body or persistent(fastlora_kernels, name), case)


def test_zero_gradients_are_refused():
    """A tolerance of a few percent passes an all-zero dA when B is small; the rule does not."""

    class Zero(Body):
        def backward(self, *args):
            dx, da, db = super().backward(*args)
            return dx, da * 0, db

    with pytest.raises(AssertionError, match="lora_A"):
        verify(Zero(fastlora_kernels.steps), CASES[1])
