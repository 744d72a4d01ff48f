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

# name: (file, line as it is, line as it would be wrong)
KERNELS = {
    "scaling forgotten": ("outputs.py", SCALED, "acc *= 1.0"),
    "scaling applied twice": ("outputs.py", SCALED, f"{SCALED}\n        {SCALED}"),
    "low-rank path subtracted": ("outputs.py", SCALED, SCALED.replace("tl.cast", "-tl.cast")),
    "low-rank path dropped": ("outputs.py", SCALED, "acc *= 0.0"),
    "bias dropped": ("outputs.py", "acc += tl.load(bias_tile", "tl.load(bias_tile"),
    "base path dropped": ("tiles.py", "acc = dot(x, w, acc)", "pass"),
    "K mask one short": ("tiles.py", "mask_k = offs_k < K - k", "mask_k = offs_k < K - k - 1"),
    "K mask not advanced": ("tiles.py", "mask_k = offs_k < K - k", "mask_k = offs_k < K"),
    "step of x not taken": ("tiles.py", "x_ptrs += step_x", "pass"),
    "16-bit sum of the base path": (
        *("tiles.py", "acc = dot(x, w, acc)", f"acc = dot(x, w, acc){ROUNDED}"),
    ),
    "rank tiles beyond the first lost": (
        *("tiles.py", "tl.range(0, R, BLOCK_R", "tl.range(0, 1, BLOCK_R"),
    ),
    "8 bits of float32 adapters": (
        *("tiles.py", "part = tl.dot(left, middle, part)", "part = part * 1.0"),
    ),
    "mask of dx at the wrong column": (
        *("input_grad.py", "keep_tile(seed_ptr, offs_m, first_k, K, keep_from, BLOCK_N).to"),
        "keep_tile(seed_ptr, offs_m, 0, K, keep_from, BLOCK_N).to",
    ),
    "dx not masked": (
        "input_grad.py",
        "part *= keep_tile(seed_ptr, offs_m, first_k, K, keep_from, BLOCK_N).to(ACC)",
        "pass",
    ),
    "1 / (1 - p) forgotten in dx": ("input_grad.py", f"part{SCALED[3:]}", "pass"),
    "s summed in bfloat16": (
        "shrink.py",
        "dot(x_hat, a, sums[i])",
        f"dot(x_hat, a, sums[i]){ROUNDED}",
    ),
    "1 / (1 - p) forgotten": ("shrink.py", "* tl.cast(scales[i], ACC)", "* 1.0"),
    "dropout of x forgotten": (
        *("shrink.py", "x_hat = (x.to(ACC) * keep.to(ACC)).to(x.dtype)", "x_hat = x"),
    ),
    "mask of x at the wrong column": (
        "shrink.py",
        "offs_m, k, K, keep_froms",
        "offs_m, 0, K, keep_froms",
    ),
    "rank mask of s one short": ("shrink.py", "(offs_r < ranks[i])", "(offs_r < ranks[i] - 1)"),
    "dropout drawn again with another mask": (
        *("da.py", "offs_m, first_k, K, keep_froms[i]", "offs_m + 1, first_k, K, keep_froms[i]"),
    ),
    "ds of the wrong sign": ("ds_db.py", "dot(tl.trans(dy), b, ds)", "dot(tl.trans(dy), -b, ds)"),
    "ds of the wrong sign at a high rank": ("ds_db.py", "dot(dy, b, ds)", "dot(dy, -b, ds)"),
    "column tiles of ds beyond a program's first lost": (
        *("ds_db.py", "min((chunk + 1) * steps * BLOCK_N, N)"),
        "min(chunk * steps * BLOCK_N + BLOCK_N, N)",
    ),
    "ds of one row tile for all": (
        *("ds_db.py", "offs_m = first_row + tile % steps * BLOCK_M +", "offs_m = first_row +"),
    ),
    "rows of later splits lost": (
        *("ds_db.py", "min(first_row + steps * BLOCK_M, M)", "min(steps * BLOCK_M, M)"),
    ),
    "partial sum lost": (
        "sums.py",
        "parts, tl.int32), tl.int32)):",
        "parts, tl.int32), tl.int32) - 1):",
    ),
    "sum not scaled": ("sums.py", SCALED, "pass"),
    "db in bfloat16 before the sum": (
        *("ds_db.py", "columns[:, None] * R + ranks[None, :]), db,"),
        f"columns[:, None] * R + ranks[None, :]), db{ROUNDED},",
    ),
    "mask from one word for two elements": (
        *("dropout.py", "(low >> 16).to(tl.int16)", "low.to(tl.int16)"),
    ),
}

# The same for the products of sm_90 and later, with the low-rank step at which it has to show.
PERSISTENT = {
    "steps of the fold lost": ("fold", "outputs.py", "+= tl.cdiv(R_tile, BLOCK_K)", "+= 0"),
    "fold from the wrong columns": (
        *("fold", "outputs.py", "b_desc, (step - steps) * BLOCK_K", "b_desc, step * BLOCK_K"),
    ),
    "s of the first row tile": (
        *("first", "outputs.py", "rows = wrapped(first_m + tl.arange", "rows = wrapped(tl.arange"),
    ),
    "b of the first column tile": (
        *("first", "outputs.py", "columns = wrapped(offs_n, N_tile)"),
        "columns = wrapped(tl.arange(0, BLOCK_N), N_tile)",
    ),
    "16-bit sum of the base path": (
        *("fold", "outputs.py", "acc = tl.dot(x, w, acc)", f"acc = tl.dot(x, w, acc){ROUNDED}"),
    ),
    "bias dropped": ("fold", "outputs.py", "acc += bias.to(tl.float32)[None, :]", "pass"),
    "later tiles lost": ("fold", "outputs.py", "tiles_m * tiles_n, tl.num", "1, tl.num"),
    "right half of a tile lost": (
        *("fold", "tiles.py", "y_desc.store([first_m, first_n + acc.shape[1] // 2], right"),
        "y_desc.store([first_m, first_n], right",
    ),
    "dx of the first row tile": (
        "fold",
        "input_grad.py",
        "dy_from.load([first_m, n])",
        "dy_from.load([0, n])",
    ),
    "s not scaled": ("fold", "shrink.py", "s *= tl.cast(factor, ACC)", "pass"),
}
PERSISTENT_CASES = [
    Case(50, 104, 152, 16, kind="bf16", mode="base"),
    Case(50, 296, 40, 16, kind="bf16", mode="low_rank"),
]

# The same for the blocks: name: (line as it is, line as it would be wrong)
BLOCKS = {
    "mask of every block that of the first": (
        "            ones = mask.draw(here.stop)\n",
        "            mask.step = 0\n            ones = mask.draw(here.stop)\n",
    ),
    "1 / (1 - p) forgotten in dx": (", value=kept_scale(p))", ")"),
    "1 / (1 - p) forgotten in da": ("else total.mul_(kept_scale(p))", "else total"),
    "dx not masked": ("addcmul_(part, ones, value=kept_scale(p))", "add_(part * kept_scale(p))"),
    "float32 factors rounded to 16 bits": (
        "return first.to(torch.bfloat16), rest",
        "return first.to(torch.bfloat16), rest.zero_()",
    ),
    "scaling forgotten": (
        "return out.addmm_(left, right, beta=0, alpha=alpha)\n    for",
        "return out.addmm_(left, right, beta=0)\n    for",
    ),
    "ds and db not scaled": (
        "return out.addmm_(left, right, beta=0, alpha=alpha)\n\n\ndef _turned",
        "return out.addmm_(left, right, beta=0)\n\n\ndef _turned",
    ),
    "scaling forgotten where there is a bias": (
        "torch.addmm(bias, left, right, alpha=alpha, out=out)",
        "torch.addmm(bias, left, right, out=out)",
    ),
    "base product forgotten": ("ys.append(y.addmm_(x, w.t()))", "ys.append(y)"),
    "low-rank part of dx forgotten": (
        "            _add_product(dx, ds, a)\n",
        "            pass\n",
    ),
    "db not scaled": (
        "_scaled_product(_turned(s, dy), dy, scaling)",
        "_scaled_product(_turned(s, dy), dy, 1.0)",
    ),
    "db of the last block alone": ("db.addmm_(s[rows].t(), dy_rows)", "db = s[rows].t() @ dy_rows"),
    "da of the last block alone": ("if total is None else total.add_(part)", ""),
    "db of few rows not scaled": ("_scaled_product(dy.t(), s, scaling)", "dy.t() @ s"),
    "few elements not scaled": (
        "(_part(left, rows) @ right).mul_(alpha)",
        "(_part(left, rows) @ right)",
    ),
    "s of few rows from 16 bits": (
        "return x.to(a.dtype) @ a.t()",
        "return (x @ a.t().to(x.dtype)).to(a.dtype)",
    ),
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
    "s from 16 bits": (
        "F.linear(x_hat.to(a.dtype), a)",
        "F.linear(x_hat, a.to(x.dtype)).to(a.dtype)",
    ),
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
