# SPDX-License-Identifier: Apache-2.0
"""The acceptance rule is itself tested: it refuses kernels that are wrong, and no right one.

A wrong kernel is a copy of the package with one line changed.
"""

from __future__ import annotations

from dataclasses import replace

import fastlora_kernels
import pytest
from joints import Joint, load, verify
from test_persistent import QKV, both, tiled

# The first projection is the largest: what is taken for another is then still read inside of a
# tensor.
SHRINK = [
    Joint(70, 80, (130, 20), (5, 3), "bf16", "low_rank", (0.3, 0.1), (True, False)),
    Joint(40, 144, (24, 20), (130, 5), "bf16", "low_rank", (0.3, 0.1)),
]
WIDE = [
    *SHRINK[:1],
    Joint(70, 260, (300, 130), (5, 3), "fp32", "base", (), (True, False)),
    Joint(70, 20, (300,), (40,), "bf16", "low_rank"),
    Joint(200, 300, (300,), (5,), "fp16", "low_rank"),
]
NARROW = [*SHRINK, Joint(600, 160, (40,), (5,), "bf16", "both", (0.3,))]
HIGH = [Joint(70, 20, (300,), (40,), "bf16", "low_rank")]
MIXED = [Joint(70, 90, (50,), (5,), "bf16-fp32", "low_rank")]
HALVES = {name: replace(config, block_n=256) for name, config in tiled().items()}
FOLD = [
    (replace(QKV, biases=(True, False, True)), tiled()),
    (replace(QKV, K=64, sizes=(136, 128), ranks=(40, 8), mode="low_rank"), HALVES),
    (replace(QKV, K=136, sizes=(16, 8), ranks=(8, 8), mode="low_rank", dropout_p=(0.5,)), HALVES),
]
FIRST = [(Joint(50, 152, (104,), (5,), "bf16", "low_rank", (0.3,)), both("first"))]
FIRST += [(replace(QKV, ranks=(3, 5, 33), scaling=None, mode="low_rank"), tiled("first"))]

# name: (problems of which one must refuse it, file, line as it is, line as it would be wrong)
MUTANTS = {
    "seed of the first for all": (
        SHRINK,
        "shrink.py",
        "keep_tile(seed_ptrs[i]",
        "keep_tile(seed_ptrs[0]",
    ),
    "seed of the first, at high ranks": (
        SHRINK,
        "shrink.py",
        "pointer_of(of, seed_ptrs)",
        "pointer_of(0, seed_ptrs)",
    ),
    "mask of the first tile of x": (
        SHRINK,
        "shrink.py",
        "offs_m, k, K, keep",
        "offs_m, 0, K, keep",
    ),
    "1 / (1 - p) of the first": (
        SHRINK,
        "shrink.py",
        "tl.cast(scales[i], ACC)",
        "tl.cast(scales[0], ACC)",
    ),
    "1 / (1 - p) forgotten": (SHRINK, "shrink.py", "tl.cast(scales[i], ACC)", "1.0"),
    "dropout of x forgotten": (
        SHRINK,
        "shrink.py",
        "x_hat = (x.to(ACC) * keep.to(ACC)).to(x.dtype)",
        "pass",
    ),
    "sum started again": (SHRINK, "shrink.py", "dot(x_hat, a, sums[i])", "dot(x_hat, a, sums[0])"),
    "s summed in bfloat16": (
        [Joint(70, 600, (20,), (5,), "bf16-fp32", "low_rank")],
        "shrink.py",
        "(dot(x_hat, a, sums[i]),)",
        "(dot(x_hat, a, sums[i]).to(tl.bfloat16).to(tl.float32),)",
    ),
    "step of a not taken": (SHRINK, "shrink.py", "a_tiles[i] + steps_a[i]", "a_tiles[i]"),
    "K mask of x one short": (
        [Joint(70, 81, (20,), (5,), mode="low_rank")],
        "shrink.py",
        "mask_k = offs_k < K - k",
        "mask_k = offs_k < K - k - 1",
    ),
    "rank mask of s one short": (
        SHRINK,
        "shrink.py",
        "mask_m[:, None] & (offs_r < ranks[i])",
        "mask_m[:, None] & (offs_r < ranks[i] - 1)",
    ),
    "rank tile of another": (SHRINK, "locate.py", "return i, tile - first", "return i, tile"),
    "tile one too late": (SHRINK, "locate.py", "(tile >= end)", "(tile > end)"),
    "mask from one word for two": (
        SHRINK,
        "dropout.py",
        "(low >> 16).to(tl.int16)",
        "low.to(tl.int16)",
    ),
    "w of the first": (
        WIDE,
        "outputs.py",
        "    w_ptr = pointer_of(i, w_ptrs)",
        "    w_ptr = pointer_of(0, w_ptrs)",
    ),
    "scaling of the first": (WIDE, "outputs.py", "number_of(i, scales, ACC)", "scales[0]"),
    "scaling forgotten": (
        WIDE,
        "outputs.py",
        "        acc *= tl.cast(number_of(i, scales, ACC), ACC)\n",
        "",
    ),
    "base path dropped": (WIDE, "tiles.py", "acc = dot(x, w, acc)", "pass"),
    "K mask not advanced": (WIDE, "tiles.py", "mask_k = offs_k < K - k", "mask_k = offs_k < K"),
    "step of x not taken": (WIDE, "tiles.py", "x_ptrs += step_x", "pass"),
    "16-bit sum of the base path": (
        [Joint(70, 300, (50,), (5,), "bf16", "base")],
        "tiles.py",
        "acc = dot(x, w, acc)",
        "acc = dot(x, w, acc).to(tl.bfloat16).to(tl.float32)",
    ),
    "rank tiles beyond the first lost": (
        HIGH,
        "tiles.py",
        "tl.range(0, R, BLOCK_R",
        "tl.range(0, 1, BLOCK_R",
    ),
    "8 bits of float32 adapters": (
        MIXED,
        "tiles.py",
        "part = tl.dot(left, middle, part)",
        "part *= 1.0",
    ),
    "bias dropped": (WIDE, "outputs.py", "acc += tl.load(bias_tile", "tl.load(bias_tile"),
    "bias where there is none": (
        WIDE,
        "outputs.py",
        "mask_bias = offs_n < number_of(i, bias_sizes, tl.int32)",
        "mask_bias = mask_n",
    ),
    "last column of a projection lost": (
        WIDE,
        "outputs.py",
        "mask_n = offs_n < N\n",
        "mask_n = offs_n < N - 1\n",
    ),
    "last projection missing in dx": (
        WIDE,
        "input_grad.py",
        "    for i in tl.range(0, COUNT, num_stages=1):\n        dy_ptr",
        "    for i in tl.range(0, COUNT - 1, num_stages=1):\n        dy_ptr",
    ),
    "low-rank term of dx for the last alone": (WIDE, "input_grad.py", "part += acc", "pass"),
    "dx masked by the first seed": (
        WIDE,
        "input_grad.py",
        "pointer_of(i, seed_ptrs)",
        "pointer_of(0, seed_ptrs)",
    ),
    "dx masked at the wrong column": (
        [Joint(40, 300, (20,), (5,), mode="low_rank", dropout_p=(0.3,))],
        "input_grad.py",
        "first_k = pid_k * BLOCK_N\n                seed",
        "first_k = 0\n                seed",
    ),
    "dx not scaled": (
        WIDE,
        "input_grad.py",
        "part *= tl.cast(number_of(i, scales, ACC), ACC)",
        "pass",
    ),
    "16-bit sums between projections": (
        WIDE,
        "input_grad.py",
        "        acc = add_product(",
        "        acc = acc.to(tl.bfloat16).to(tl.float32)\n        acc = add_product(",
    ),
    "da of x as it is": (
        NARROW,
        "da.py",
        "x_hat = (x.to(ACC) * tl.trans(keep).to(ACC)).to(x.dtype)",
        "pass",
    ),
    "da by the next rows' mask": (
        NARROW,
        "da.py",
        "seed_ptrs[i], offs_m,",
        "seed_ptrs[i], offs_m + 1,",
    ),
    "da of the first ds": (
        NARROW,
        "da.py",
        "tl.load(ds_ptrs[i] + offs",
        "tl.load(ds_ptrs[0] + offs",
    ),
    "da not scaled": (NARROW, "sums.py", "tl.cast(number_of(i, scales, ACC), ACC)", "1.0"),
    "da of the first split": (
        NARROW,
        "da.py",
        "first_row = split * steps * BLOCK_M",
        "first_row = 0",
    ),
    "ds of the wrong sign": (
        NARROW,
        "ds_db.py",
        "dot(tl.trans(dy), b, ds)",
        "dot(tl.trans(dy), -b, ds)",
    ),
    "ds of the wrong sign at a high rank": (HIGH, "ds_db.py", "dot(dy, b, ds)", "dot(dy, -b, ds)"),
    "later column tiles of ds lost": (
        HIGH,
        "ds_db.py",
        "min((chunk + 1) * steps * BLOCK_N, N)",
        "min(chunk * steps * BLOCK_N + BLOCK_N, N)",
    ),
    "ds of one row tile for all": (
        HIGH,
        "ds_db.py",
        "offs_m = first_row + tile % steps * BLOCK_M",
        "offs_m = first_row",
    ),
    "rows of later splits lost": (
        NARROW,
        "ds_db.py",
        "min(first_row + steps * BLOCK_M, M)",
        "min(steps * BLOCK_M, M)",
    ),
    "partial sum lost": (NARROW, "sums.py", "in range(parts):", "in range(parts - 1):"),
    "db in bfloat16 before the sum": (
        [Joint(600, 20, (40,), (5,), "bf16-fp32", "both")],
        "ds_db.py",
        "tl.store(db_ptrs, db, mask",
        "tl.store(db_ptrs, db.to(tl.bfloat16).to(tl.float32), mask",
    ),
    "by TMA: w of the first": (
        FOLD,
        "outputs.py",
        "w_desc = pointer_of(i_tile, w_descs)",
        "w_desc = w_descs[0]",
    ),
    "by TMA: y of the first": (
        FOLD,
        "outputs.py",
        "store_tile(pointer_of(i_tile, y_descs)",
        "store_tile(y_descs[0]",
    ),
    "by TMA: s of the first": (
        FOLD,
        "outputs.py",
        "s_desc = pointer_of(i_tile, s_descs)",
        "s_desc = s_descs[0]",
    ),
    "by TMA: b of the first": (
        FOLD,
        "outputs.py",
        "b_desc = pointer_of(i_tile, b_descs)",
        "b_desc = b_descs[0]",
    ),
    "no fold": (FOLD, "outputs.py", "all_steps += tl.cdiv(R_tile, BLOCK_K)", "pass"),
    "one step of the fold": (FOLD, "outputs.py", "+= tl.cdiv(R_tile, BLOCK_K)", "+= 1"),
    "fold one step early": (FOLD, "outputs.py", "if step >= steps:", "if step >= steps - 1:"),
    "fold from the wrong columns": (
        FOLD,
        "outputs.py",
        "b_desc, (step - steps) * BLOCK_K",
        "b_desc, step * BLOCK_K",
    ),
    "by TMA: bias where there is none": (
        FOLD,
        "outputs.py",
        "mask = offs_n < number_of(i_tile, bias_sizes, tl.int32)",
        "mask = offs_n < N_tile",
    ),
    "by TMA: 16-bit sum": (
        [(Joint(50, 296, (104,), (8,), "bf16", "base"), both("fold"))],
        "outputs.py",
        "acc = tl.dot(x, w, acc)",
        "acc = tl.dot(x, w, acc).to(tl.bfloat16).to(tl.float32)",
    ),
    "later tiles lost": (FOLD, "outputs.py", "tiles_m * tiles_n, tl.num", "1, tl.num"),
    "halves swapped": (
        FOLD,
        "tiles.py",
        "first_m, first_n, left, dtype)",
        "first_m, first_n, right, dtype)",
    ),
    "s scaled twice": (
        FOLD,
        "shrink.py",
        "s *= tl.cast(factor, ACC)",
        "s *= tl.cast(factor * factor, ACC)",
    ),
    "first, not scaled": (
        FIRST,
        "outputs.py",
        "            acc *= tl.cast(number_of(i_tile, scales, tl.float32), tl.float32)\n",
        "",
    ),
    "first, of the first row tile": (
        FIRST,
        "outputs.py",
        "rows = wrapped(first_m + tl.arange(0, BLOCK_M), M)",
        "rows = wrapped(tl.arange(0, BLOCK_M), M)",
    ),
    "first of dx, of the first column tile": (
        FIRST,
        "input_grad.py",
        "columns = wrapped(first_k + tl.arange(0, BLOCK_N), K)",
        "columns = wrapped(tl.arange(0, BLOCK_N), K)",
    ),
    "first of dx, not masked": (FIRST, "input_grad.py", "acc *= keep.to(tl.float32)", "pass"),
    "first of dx, not scaled": (
        FIRST,
        "input_grad.py",
        "acc *= tl.cast(scale, tl.float32)",
        "pass",
    ),
    "last dy missing": (
        FOLD,
        "input_grad.py",
        "for step in range(end):",
        "for step in range(ends[0]):",
    ),
    "dy of the second again": (
        FOLD,
        "input_grad.py",
        "w_from, n = dys[i], ws[i]",
        "w_from, n = dys[1], ws[i]",
    ),
    "step not from the start": (
        FOLD,
        "input_grad.py",
        "(step - ends[i - 1]) * BLOCK_K",
        "step * BLOCK_K",
    ),
    "one step late": (FOLD, "input_grad.py", "if step >= ends[i - 1]:", "if step > ends[i - 1]:"),
    "rest of the left half for both": (
        FOLD,
        "tiles.py",
        "rest_desc.load([first_m, first_n])",
        "rest_desc.load([first_m, 0])",
    ),
    "no rest in the left half": (
        FOLD,
        "tiles.py",
        "_store(y_desc, rest_desc, first_m, first_n, left, dtype)",
        "_store(y_desc, None, first_m, first_n, left, dtype)",
    ),
    "low-rank terms not masked": (FOLD, "input_grad.py", "folds = not dropout and ", "folds = "),
    "tile of another row": (
        FOLD,
        "input_grad.py",
        "dy_from.load([first_m, n])",
        "dy_from.load([0, n])",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_refused(name, tmp_path):
    problems, *changed = MUTANTS[name]
    mutant = load(tmp_path, f"mutant_{list(MUTANTS).index(name)}", *changed)
    with pytest.raises(AssertionError):
        for problem in problems:
            joint, config = problem if isinstance(problem, tuple) else (problem, None)
            verify(mutant, joint, configs=config)


def test_the_right_kernels_are_accepted():
    for joint in [*SHRINK, *WIDE, *NARROW, *HIGH, *MIXED]:
        verify(fastlora_kernels, joint)
    for joint, config in FOLD + FIRST:
        verify(fastlora_kernels, joint, configs=config)
