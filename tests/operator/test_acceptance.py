# SPDX-License-Identifier: Apache-2.0
"""The acceptance rule is itself tested: it refuses kernels that are wrong, and no right one.

A wrong kernel is a copy of the package with one line changed.
"""

from __future__ import annotations

import functools
import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fastlora_kernels
import pytest
from acceptance import Case, verify
from plain_body import Plain

from fastlora.operator import blocks, eager

PACKAGE = Path(fastlora_kernels.__file__).parent

# Problems on which every mutant must be caught by at least one.
CASES = [
    Case(70, 50, 150, 5, kind="bf16", mode="base"),
    Case(70, 50, 90, 5, kind="bf16", mode="low_rank", dropout_p=0.3),
    Case(70, 50, 90, 40, kind="fp32", mode="both"),
    Case(70, 50, 90, 5, kind="bf16-fp32", mode="low_rank"),
    Case(200, 300, 300, 5, kind="fp16", mode="low_rank"),
    Case(70, 300, 20, 40, kind="bf16", mode="low_rank"),
    Case(600, 20, 160, 5, kind="bf16", mode="both", dropout_p=0.3),  # the longest comes last
]

# name: (file, line as it is, line as it would be wrong)
MUTANTS = {
    "scaling forgotten": ("tiles.py", "acc *= tl.cast(scale, ACC)", "acc *= 1.0"),
    "scaling applied twice": ("tiles.py", "acc *= tl.cast(scale, ACC)", "acc *= scale * scale"),
    "low-rank path subtracted": ("tiles.py", "acc *= tl.cast(scale, ACC)", "acc *= -scale"),
    "low-rank path dropped": ("tiles.py", "acc *= tl.cast(scale, ACC)", "acc *= 0.0"),
    "base path dropped": ("product.py", "acc = dot(x, w, acc)", "pass"),
    "bias dropped": ("product.py", "acc += bias.to(ACC)[None, :]", "pass"),
    "K mask one short": ("product.py", "mask_k = offs_k < K - k", "mask_k = offs_k < K - k - 1"),
    "K mask not advanced": ("product.py", "mask_k = offs_k < K - k", "mask_k = offs_k < K"),
    "step of x not taken": ("product.py", "x_ptrs += step_x", "pass"),
    "16-bit sum of the base path": (
        "product.py",
        "acc = dot(x, w, acc)",
        "acc = dot(x, w, acc).to(tl.bfloat16).to(tl.float32)",
    ),
    "rank tiles beyond the first lost": (
        "tiles.py",
        "tl.range(0, R, BLOCK_R",
        "tl.range(0, 1, BLOCK_R",
    ),
    "mask of dx at the wrong column": (
        "tiles.py",
        "keep_tile(seed_ptr, offs_m, first_n, N, keep_from, BLOCK_N)",
        "keep_tile(seed_ptr, offs_m, 0, N, keep_from, BLOCK_N)",
    ),
    "dx not masked": (
        "tiles.py",
        "acc *= keep_tile(seed_ptr, offs_m, first_n, N, keep_from, BLOCK_N).to(ACC)",
        "pass",
    ),
    "8 bits of float32 adapters": (
        "tiles.py",
        "part = tl.dot(left, middle, part)",
        "part = part * 1.0",
    ),
    "s summed in bfloat16": (
        "shrink.py",
        "acc = dot(x, a, acc)",
        "acc = dot(x, a, acc).to(tl.bfloat16).to(tl.float32)",
    ),
    "1 / (1 - p) forgotten": ("shrink.py", "acc *= tl.cast(scale, ACC)", "acc *= 1.0"),
    "dropout of x forgotten": ("shrink.py", "x = (x.to(ACC) * keep.to(ACC)).to(x.dtype)", "pass"),
    "mask of x at the wrong column": (
        "shrink.py",
        "offs_m, k, K, keep_from",
        "offs_m, 0, K, keep_from",
    ),
    "rank mask of s one short": ("shrink.py", "(offs_r < R)[None, :]", "(offs_r < R - 1)[None, :]"),
    "dropout drawn again with another mask": (
        "columns.py",
        "offs_m, tile * BLOCK_C, C, keep_from",
        "offs_m + 1, tile * BLOCK_C, C, keep_from",
    ),
    "ds of the wrong sign": (
        "columns.py",
        "inner = dot(tl.trans(t), b, inner)",
        "inner = dot(tl.trans(t), -b, inner)",
    ),
    "ds of the wrong sign at a high rank": (
        "columns.py",
        "inner = dot(t, b, inner)",
        "inner = dot(t, -b, inner)",
    ),
    "column tiles of ds beyond a program's first lost": (
        "columns.py",
        "min((chunk + 1) * steps * BLOCK_C, C)",
        "min(chunk * steps * BLOCK_C + BLOCK_C, C)",
    ),
    "ds of one row tile for all": (
        "columns.py",
        "offs_m = first_row + tile % steps * BLOCK_M",
        "offs_m = first_row",
    ),
    "rows of later splits lost": (
        "columns.py",
        "min(first_row + steps * BLOCK_M, M)",
        "min(steps * BLOCK_M, M)",
    ),
    "partial sum lost": (
        "columns.py",
        "for part in range(parts):",
        "for part in range(parts - 1):",
    ),
    "sum not scaled": ("columns.py", "(acc * tl.cast(scale, ACC))", "acc"),
    "da and db in bfloat16 before the sum": (
        "columns.py",
        "tl.store(outer_ptrs, outer, mask=mask_cr)",
        "tl.store(outer_ptrs, outer.to(tl.bfloat16).to(tl.float32), mask=mask_cr)",
    ),
    "mask from one word for two elements": (
        "dropout.py",
        "(low >> 16).to(tl.int16)",
        "low.to(tl.int16)",
    ),
}


# The same for the products of sm_90 and later, with the low-rank step at which it has to show.
PERSISTENT_MUTANTS = {
    "steps of the fold lost": ("fold", "persistent.py", "+= tl.cdiv(R, BLOCK_K)", "+= 0"),
    "fold from the wrong columns": (
        "fold",
        "persistent.py",
        "b_desc, (step - steps) * BLOCK_K",
        "b_desc, step * BLOCK_K",
    ),
    "s of the first row tile": (
        "after",
        "persistent.py",
        "rows = wrapped(offs_m, M)",
        "rows = wrapped(tl.arange(0, BLOCK_M), M)",
    ),
    "b of the first column tile": (
        "after",
        "persistent.py",
        "columns = wrapped(offs_n, N)",
        "columns = wrapped(tl.arange(0, BLOCK_N), N)",
    ),
    "one tile of s for all, loaded apart": (
        "after by warps of its own",
        "persistent.py",
        "s_desc.load([first_m, 0])",
        "s_desc.load([0, 0])",
    ),
    "16-bit sum of the base path": (
        "fold",
        "persistent.py",
        "acc = tl.dot(x, w, acc)",
        "acc = tl.dot(x, w, acc).to(tl.bfloat16).to(tl.float32)",
    ),
    "bias dropped": ("fold", "persistent.py", "acc += tl.load(bias_ptr", "tl.load(bias_ptr"),
    "later tiles lost": ("fold", "persistent.py", "tiles_m * tiles_n,", "1,"),
    "right half of a tile lost": (
        "fold",
        "persistent.py",
        "y_desc.store([first_m, first_n + acc.shape[1] // 2], right",
        "y_desc.store([first_m, first_n], right",
    ),
    "s made again but not scaled": (
        "recompute",
        "persistent.py",
        "(s_acc * tl.cast(scale, tl.float32))",
        "s_acc",
    ),
    "s kept scaled": (
        "recompute",
        "persistent.py",
        "tl.store(s_ptrs, s_acc.to(dtype)",
        "tl.store(s_ptrs, (s_acc * scale).to(dtype)",
    ),
    "s of every second row tile not kept": (
        "recompute",
        "persistent.py",
        "if pid_n == 0:",
        "if pid_n + pid_m % 2 == 0:",
    ),
    "s not scaled": ("fold", "shrink.py", "acc *= tl.cast(factor, ACC)", "acc *= 1.0"),
    "s scaled twice": (
        "after",
        "linear.py",
        "product(x, w, scaled, b, bias, config=config)",
        "product(x, w, scaled, b, bias, scaling=scaling, config=config)",
    ),
}
PERSISTENT_CASES = [
    Case(50, 104, 152, 16, kind="bf16", mode="base"),
    Case(50, 296, 40, 16, kind="bf16", mode="low_rank"),
]

# The same for the torch implementation: name: (line as it is, line as it would be wrong)
TORCH_MUTANTS = {
    "mask of every block that of the first": (
        "            ones = mask.draw(here.stop)\n",
        "            mask.step = 0\n            ones = mask.draw(here.stop)\n",
    ),
    "1 / (1 - p) forgotten in dx": (", value=kept_scale(p))", ")"),
    "1 / (1 - p) forgotten in da": ("        da.mul_(kept_scale(p))\n", "        pass\n"),
    "dx not masked": ("addcmul_(part, ones, value=kept_scale(p))", "add_(part * kept_scale(p))"),
    "float32 factors rounded to 16 bits": (
        "return first.to(torch.bfloat16), rest",
        "return first.to(torch.bfloat16), rest.zero_()",
    ),
    "scaling forgotten": ("beta=0, alpha=alpha", "beta=0"),
    "scaling forgotten where there is a bias": (
        "torch.addmm(bias, left, right, alpha=alpha, out=out)",
        "torch.addmm(bias, left, right, out=out)",
    ),
    "base product forgotten": ("ys.append(y.addmm_(x, w.t()))", "ys.append(y)"),
    "low-rank part of dx forgotten": ("        _add_product(dx, ds, a)\n", "        pass\n"),
    "db not scaled": (
        "_scaled_product(_turned(s, dy), dy, scaling)",
        "_scaled_product(_turned(s, dy), dy, 1.0)",
    ),
    "db of the last block alone": ("db.addmm_(s[rows].t(), dy_rows)", "db = s[rows].t() @ dy_rows"),
    "da of the last block alone": ("da += (_turned", "da = (_turned"),
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
TORCH_CASES = [
    *CASES[:2],
    Case(1100, 64, 150, 5, kind="bf16-fp32", mode="both", dropout_p=0.3),
    Case(1100, 64, 150, 5, kind="bf16-fp32", mode="low_rank"),
    Case(1100, 64, 150, 5, kind="fp32", mode="low_rank", dropout_p=0.3),
    Case(100, 64, 150, 5, kind="bf16-fp32", mode="low_rank"),
    Case(100, 64, 150, 5, kind="bf16", bias=False),
]

# The same for the plain one.
PLAIN_MUTANTS = {
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


def load(folder: Path, name: str, file: str, right: str, wrong: str):
    """Import a copy of the kernels, under another name, in which ``right`` reads ``wrong``."""
    shutil.copytree(PACKAGE, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder / name).glob("*.py"):
        text = path.read_text().replace("fastlora_kernels", name)
        if path.name == file:
            assert text.count(right) == 1, f"{file}: {right!r} occurs {text.count(right)} times"
            text = text.replace(right, wrong)
        path.write_text(text)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_refused(name, tmp_path):
    file, right, wrong = MUTANTS[name]
    mutant = load(tmp_path, f"mutant_{list(MUTANTS).index(name)}", file, right, wrong)
    refused = 0
    for case in CASES:
        try:
            verify(mutant, case)
        except AssertionError:
            refused += 1
            break
    assert refused, f"the rule passes a kernel with this fault: {name}"


def persistent(kernels, low_rank: str) -> SimpleNamespace:
    """``kernels`` with small tiles of the persistent products, stored in two halves."""
    rest = {"specialized": "warps" in low_rank, "tma": True, "low_rank": low_rank.split()[0]}
    config = kernels.Config(16, 256, 16, **rest)
    configs = {"product": config, "dx": config}
    return SimpleNamespace(
        forward=functools.partial(kernels.forward, configs=configs),
        backward=functools.partial(kernels.backward, configs=configs),
    )


@pytest.mark.parametrize("name", PERSISTENT_MUTANTS)
def test_a_wrong_persistent_kernel_is_refused(name, tmp_path):
    low_rank, file, right, wrong = PERSISTENT_MUTANTS[name]
    number = list(PERSISTENT_MUTANTS).index(name)
    mutant = load(tmp_path, f"persistent_mutant_{number}", file, right, wrong)
    with pytest.raises(AssertionError):
        for case in PERSISTENT_CASES:
            verify(persistent(mutant, low_rank), case)


def test_the_right_persistent_kernel_is_accepted():
    for low_rank in {how for how, *_ in PERSISTENT_MUTANTS.values()}:
        for case in PERSISTENT_CASES:
            verify(persistent(fastlora_kernels, low_rank), case)


def changed(module: ModuleType, right: str, wrong: str) -> ModuleType:
    """Return a copy of ``module`` in which ``right`` reads ``wrong``."""
    text = Path(module.__file__).read_text()
    assert text.count(right) == 1, f"{right!r} occurs {text.count(right)} times"
    mutant = ModuleType("mutant")
    exec(text.replace(right, wrong), mutant.__dict__)
    return mutant


@pytest.mark.parametrize("name", TORCH_MUTANTS)
def test_a_wrong_torch_implementation_is_refused(name):
    mutant = changed(blocks, *TORCH_MUTANTS[name])
    with pytest.raises(AssertionError):
        for case in TORCH_CASES:
            verify(mutant, case)
        # As if they were large.
        mutant.FEW = mutant.SHORT = mutant.FEW_COLUMNS = mutant.LEAST_ELEMENTS = 0
        for case in TORCH_CASES:
            verify(mutant, case)


@pytest.mark.parametrize("name", PLAIN_MUTANTS)
def test_a_wrong_plain_implementation_is_refused(name):
    mutant = Plain(changed(eager, *PLAIN_MUTANTS[name]))
    with pytest.raises(AssertionError):
        for case in TORCH_CASES:
            verify(mutant, case)


@pytest.mark.parametrize("body", [blocks, Plain()], ids=["blocks", "eager"])
def test_the_right_implementation_is_accepted(body):
    for case in TORCH_CASES:
        verify(body, case)


def test_the_right_kernel_is_accepted():
    for case in CASES:
        verify(fastlora_kernels, case)


def test_zero_gradients_are_refused():
    """A tolerance of a few percent passes an all-zero dA when B is small; the rule does not."""

    class Zero:
        forward = staticmethod(fastlora_kernels.forward)

        @staticmethod
        def backward(*args):
            dx, da, db = fastlora_kernels.backward(*args)
            return dx, da * 0, db

    with pytest.raises(AssertionError, match="lora_A"):
        verify(Zero, CASES[1])
