# SPDX-License-Identifier: Apache-2.0
"""The acceptance rule is itself tested: it refuses kernels that are wrong, and no right one.

A wrong kernel is a copy of the package with one line changed.
"""

from dataclasses import replace

import fastlora_kernels
import pytest
from joints import Joint, load, poisoned, verify
from test_persistent import QKV, both, tiled

# The first projection is the largest: what is taken for another is then still read inside of a
# tensor.
SHRINK = Joint(70, 80, (130, 20), (5, 3), "bf16", "low_rank", (0.3, 0.1), (True, False))
STACKED = Joint(40, 144, (24, 20), (130, 5), "bf16", "low_rank", (0.3, 0.1))
MIXED = Joint(70, 90, (50,), (5,), "bf16-fp32", "low_rank")
HIGH = Joint(70, 20, (300,), (40,), "bf16", "low_rank")
WIDE = Joint(40, 100, (130, 70), (5, 3), "fp32", "base", (), (True, False))
LONG = Joint(600, 20, (40,), (5,), "bf16", "both", (0.3,))
HALVES = {name: replace(config, block_n=256) for name, config in tiled().items()}
FOLD = replace(QKV, biases=(True, False, True))
FOLD_HALVES = replace(QKV, K=64, sizes=(136, 128), ranks=(40, 8), mode="low_rank")
FOLD_REST = replace(
    QKV, K=136, sizes=(16, 8), ranks=(8, 8), mode="low_rank", dropout_p=(0.5,), biases=(True,) * 2
)
CUT = Joint(70, 40, (24, 20), (5, 3), "fp32", "low_rank", (0.3, 0.1), ends=(0, 5, 40, 40, 70))
EXPERTS = Joint(40, 20, (24, 20), (3, 0), ends=(0, 5, 30, 40), biases=(True, True), experts=True)
FIRST = Joint(50, 152, (104,), (5,), "bf16", "low_rank", (0.3,))
FIRST_OF_3 = replace(QKV, ranks=(3, 5, 33), scaling=None, mode="low_rank")
# By TMA, by several programs, so that what one writes too far is not repaired by its next tile.
CUT_BY_TMA = replace(FIRST, M=70, K=40, sizes=(40,), ends=(0, 5, 40, 40, 70), experts=True)
CUT_OF_2 = replace(CUT_BY_TMA, mode="both", sizes=(40, 24), ranks=(5, 3), biases=(True, True))
SCALES = Joint(70, 80, (130, 20), (5, 3), "bf16", "both", (), (True, False), scaled=True)
OF_DROPPED = replace(SCALES, K=150, dropout_p=(0.3, 0.1))
CONFIGS = {
    CUT_BY_TMA: both("first"),
    CUT_OF_2: tiled("first"),
    FOLD: tiled(),
    FOLD_HALVES: HALVES,
    FOLD_REST: HALVES,
}
CONFIGS |= {FIRST: both("first"), FIRST_OF_3: tiled("first")}

ROUNDED = ".to(tl.bfloat16).to(tl.float32)"
SCALED = "acc *= tl.cast(number_of(i, scales, ACC), ACC)"
MASKED = "keep_tile(seed_ptr, offs_m, first_k, K, keep_from, BLOCK_N).to"

# By problems of which one must refuse it and by file: what, a line => as it would be wrong.
COPIES = {
    ((SHRINK, STACKED), "shrink.py"): {
        "seed of the first for all": "keep_tile(seed_ptrs[i] => keep_tile(seed_ptrs[0]",
        "seed of the first, at high ranks": "pointer_of(of, seed_ptrs) => pointer_of(0, seed_ptrs)",
        "mask of the first tile of x": "offs_m, k, K, keep => offs_m, 0, K, keep",
        "1 / (1 - p) of the first": "tl.cast(scales[i], ACC) => tl.cast(scales[0], ACC)",
        "1 / (1 - p) forgotten": "tl.cast(scales[i], ACC) => 1.0",
        "dropout of x forgotten": "x_hat = (x.to(ACC) * keep.to(ACC)).to(x.dtype) => pass",
        "sum started again": "dot(x_hat, a, sums[i]) => dot(x_hat, a, sums[0])",
        "step of a not taken": "a_tiles[i] + steps_a[i] => a_tiles[i]",
        "rank mask of s one short": "(offs_r < ranks[i]) => (offs_r < ranks[i] - 1)",
    },
    ((replace(MIXED, M=40, K=400),), "shrink.py"): {
        "s summed in bfloat16": f"dot(x_hat, a, sums[i]), => dot(x_hat, a, sums[i]){ROUNDED},",
    },
    ((replace(MIXED, K=81, kind="fp32"),), "shrink.py"): {
        "K mask of x one short": "mask_k = offs_k < K - k => mask_k = offs_k < K - k - 1",
    },
    ((SHRINK, STACKED), "locate.py"): {
        "rank tile of another": "return i, tile - first => return i, tile",
        "tile one too late": "(tile >= end) => (tile > end)",
    },
    ((SHRINK,), "dropout.py"): {
        "mask from one word for two": "(low >> 16).to(tl.int16) => low.to(tl.int16)",
    },
    ((WIDE,), "outputs.py"): {
        "w of the first": "    w_ptr = pointer_of(i, w_ptrs) =>     w_ptr = pointer_of(0, w_ptrs)",
        "bias dropped": "acc += bias_of(i, => bias_of(i,",
        "bias where there is none": "< number_of(i, bias_sizes, tl.int32) => < N",
    },
    ((SHRINK,), "outputs.py"): {
        "scaling of the first": "acc *= tl.cast(number_of(i, => acc *= tl.cast(number_of(0,",
        "scaling forgotten": f"{SCALED} => pass",
        "scaling applied twice": f"{SCALED} => {SCALED}\n        {SCALED}",
        "low-rank path subtracted": f"{SCALED} => {SCALED.replace('tl.cast', '-tl.cast')}",
        "low-rank path dropped": f"{SCALED} => acc *= 0.0",
        "last column of a projection lost": "mask_n = offs_n < N\n => mask_n = offs_n < N - 1\n",
    },
    ((WIDE,), "tiles.py"): {
        "base path dropped": "acc = dot(x, w, acc) => pass",
        "K mask not advanced": "mask_k = offs_k < K - k => mask_k = offs_k < K",
        "K mask one short": "mask_k = offs_k < K - k => mask_k = offs_k < K - k - 1",
        "step of x not taken": "x_ptrs += step_x => pass",
    },
    ((Joint(40, 300, (50,), (5,), "bf16", "base"),), "tiles.py"): {
        "16-bit sum of the base path": f"acc = dot(x, w, acc) => acc = dot(x, w, acc){ROUNDED}",
    },
    ((HIGH,), "tiles.py"): {
        "rank tiles beyond the first lost": "tl.range(0, R, BLOCK_R => tl.range(0, 1, BLOCK_R",
    },
    ((MIXED,), "tiles.py"): {
        "8 bits of float32 adapters": "part = tl.dot(left, middle, part) => part *= 1.0",
    },
    ((WIDE,), "input_grad.py"): {
        "last projection missing in dx": (
            "    for i in tl.range(0, COUNT, num_stages=1):\n        dy_ptr => "
            "    for i in tl.range(0, COUNT - 1, num_stages=1):\n        dy_ptr"
        ),
        "16-bit sums between projections": (
            f"        acc = add_product( =>         acc = acc{ROUNDED}\n        acc = add_product("
        ),
    },
    ((SHRINK,), "input_grad.py"): {
        "low-rank term of dx for the last alone": "part += acc => pass",
        "dx masked by the first seed": "pointer_of(i, seed_ptrs) => pointer_of(0, seed_ptrs)",
        "dx not masked": f"part *= {MASKED}(ACC) => pass",
        "dx not scaled": "part *= tl.cast(number_of(i, scales, ACC), ACC) => pass",
    },
    ((Joint(40, 300, (20,), (5,), mode="low_rank", dropout_p=(0.3,)),), "input_grad.py"): {
        "dx masked at the wrong column": f"{MASKED} => {MASKED.replace('first_k', '0')}",
    },
    ((SHRINK,), "da.py"): {
        "da of x as it is": "x_hat = (x.to(ACC) * tl.trans(keep).to(ACC)).to(x.dtype) => pass",
        "da by the next rows' mask": "seed_ptrs[i], offs_m, => seed_ptrs[i], offs_m + 1,",
        "da of the first ds": "tl.load(ds_ptrs[i] + offs => tl.load(ds_ptrs[0] + offs",
    },
    ((LONG,), "da.py"): {
        "da of the first split": "first_row = split * steps * BLOCK_M => first_row = 0",
    },
    ((LONG,), "sums.py"): {
        "da not scaled": "tl.cast(number_of(i, scales, ACC), ACC) => 1.0",
        "partial sum lost": "(first, first + parts): => (first, first + parts - 1):",
    },
    ((SHRINK,), "ds_db.py"): {
        "ds of the wrong sign": "dot(tl.trans(dy), b, ds) => dot(tl.trans(dy), -b, ds)",
        "rows of later splits lost": "(first_row + steps * BLOCK_M, last) => (steps * 16, last)",
    },
    ((HIGH,), "ds_db.py"): {
        "ds of the wrong sign at a high rank": "dot(dy, b, ds) => dot(dy, -b, ds)",
        "later column tiles of ds lost": (
            "min((chunk + 1) * steps * BLOCK_N, N) => min(chunk * steps * BLOCK_N + BLOCK_N, N)"
        ),
        "ds of one row tile for all": "= first_row + tile % steps * BLOCK_M + => = first_row +",
    },
    ((Joint(300, 20, (40,), (5,), "bf16-fp32", "both"),), "ds_db.py"): {
        "db in bfloat16 before the sum": (
            f"tl.store(db_ptrs, db, mask => tl.store(db_ptrs, db{ROUNDED}, mask"
        ),
    },
    # Columns that are multiplied.
    ((SCALES,), "outputs.py"): {
        "scale of the first": "pointer_of(i, scale_ptrs) => pointer_of(0, scale_ptrs)",
        "scale forgotten": "acc *= scale\n => pass\n",
        "z of the first": "to = pointer_of(i, new_z_ptrs) => to = pointer_of(0, new_z_ptrs)",
        "z without its bias": "acc + bias, dtype => acc, dtype",
        "scaling of the first under a scale": (
            "factor = tl.cast(number_of(i, => factor = tl.cast(number_of(0,"
        ),
    },
    ((OF_DROPPED,), "outputs.py"): {
        "frozen product scaled twice": "(scale - 1.0) => scale",
        "1 / (1 - p) of the first z": "number_of(i, kept, => number_of(0, kept,",
        "dropped product of the first": "(pointer_of(i, z_ptrs) => (pointer_of(0, z_ptrs)",
    },
    ((SCALES,), "tiles.py"): {
        "scaling forgotten under a scale": "s = s.to(acc.dtype) * factor => s = s.to(acc.dtype)",
    },
    ((SCALES,), "ds_db.py"): {
        "dz not scaled": "(dy.to(ACC) * factor) => (dy.to(ACC))",
        "dscale of the bias as well": "(z - bias), 0.0) => z, 0.0)",
        "dscale of y": "dy.to(ACC) * (z => (z",
        "dscale by the first rows alone": "dscale += tl.sum => dscale = tl.sum",
    },
    ((OF_DROPPED,), "ds_db.py"): {
        "dz of all that the scale multiplies": "factor - tl.cast(less, ACC) => factor",
    },
    ((OF_DROPPED,), "dropped.py"): {
        "dx not multiplied": "* tl.cast(factor, ACC) => * 1.0",
        "dx of what is dropped alone": "acc += tl.load(added_ptr => tl.load(added_ptr",
        "mask of the first columns": "offs_m, first_k, K => offs_m, 0, K",
    },
    ((OF_DROPPED,), "steps.py"): {
        "product of x as it is": "outputs(dropped(x, seed, p), => outputs(x,",
        "dscale not multiplied": "float(drops), factor => float(drops), 1.0",
    },
    # Rows that are cut.
    ((CUT,), "segments.py"): {
        "the last row of a segment lost": "offsets_ptr + g + 1) => offsets_ptr + g + 1) - 1",
        "the segment before": "// BLOCK + middle > tile => // BLOCK + middle >= tile",
        "factors of the first segment": "offset = g.to(tl.int64) * => offset = 0 *",
    },
    ((CUT,), "outputs.py"): {
        "scaling of the first segment": "number_ptrs, g, ACC => number_ptrs, 0, ACC",
    },
    ((EXPERTS,), "outputs.py"): {
        "w of the first expert": "w_ptrs = stack_at(w_ptrs, g, strides_wg) => pass",
        "bias of the first expert": "bias_ptrs = stack_at(bias_ptrs, g, strides_of_bias) => pass",
        "bias of another expert": (
            "        bias_ptrs = stack_at(bias_ptrs, g, strides_of => "
            "        bias_ptrs = stack_at(bias_ptrs, g, strides"
        ),
    },
    ((EXPERTS,), "input_grad.py"): {
        "w of the first expert in dx": "w_ptrs = stack_at(w_ptrs, g, strides_wg) => pass",
        "w of the expert before in dx": (
            "stack_at(w_ptrs, g, strides_wg) => stack_at(w_ptrs, tl.maximum(g - 1, 0), strides_wg)"
        ),
    },
    ((CUT,), "shrink.py"): {
        "1 / (1 - p) of the first segment": "scales, number_ptrs, G + g => scales, number_ptrs, G",
        "dropout of the first segment": "number_ptrs, 2 * G + g => number_ptrs, 2 * G",
        "mask by a tile's own rows": "offs_m, k, K, => offs_m - first_m, k, K,",
    },
    ((CUT,), "ds_db.py"): {
        "db of the next segment's rows": (
            "            mask_m = offs_m < last =>             mask_m = offs_m < M"
        ),
    },
    ((CUT,), "da.py"): {
        "da of the next segment's rows": "mask_m = offs_m < last => mask_m = offs_m < M",
    },
    ((CUT,), "sums.py"): {
        "partial sums of another segment": "first = start // rows + g => first = start // rows",
        "gradients of the first segment alone": "out_ptr += g * size => pass",
        "db scaled as da": "+ ROW * tl.num_programs(1) => + tl.num_programs(1)",
        "scale of the first segment": "tl.load(number_ptr + g) => tl.load(number_ptr)",
    },
    # The persistent programs of sm_90 and later.
    ((FOLD, FOLD_HALVES), "outputs.py"): {
        "by TMA: w of the first": "w_desc = pointer_of(i_tile, w_descs) => w_desc = w_descs[0]",
        "by TMA: y of the first": "pointer_of(i_tile, y_descs) => y_descs[0]",
        "by TMA: s of the first": "s_desc = pointer_of(i_tile, s_descs) => s_desc = s_descs[0]",
        "by TMA: b of the first": "b_desc = pointer_of(i_tile, b_descs) => b_desc = b_descs[0]",
        "no fold": "all_steps += tl.cdiv(R_tile, BLOCK_K) => pass",
        "one step of the fold": "+= tl.cdiv(R_tile, BLOCK_K) => += 1",
        "fold one step early": "if step >= steps: => if step >= steps - 1:",
        "fold from the wrong columns": "b_desc, (step - steps) * BLOCK_K => b_desc, step * BLOCK_K",
        "by TMA: bias where there is none": "< number_of(i, bias_sizes, tl.int32) => < N",
        "by TMA: bias dropped": "acc += bias.to(tl.float32)[None, :] => pass",
        "later tiles lost": "tiles_m * tiles_n, tl.num => 1, tl.num",
    },
    ((Joint(50, 296, (104,), (8,), "bf16", "base"),), "outputs.py"): {
        "by TMA: 16-bit sum": f"acc = tl.dot(x, w, acc) => acc = tl.dot(x, w, acc){ROUNDED}",
    },
    ((FOLD_HALVES,), "tiles.py"): {
        "halves swapped": "first_m, first_n, left, => first_m, first_n, right,",
        "right half of a tile lost": "first_n + HALF, right => first_n, right",
    },
    ((FOLD_REST,), "tiles.py"): {
        "rest of the left half for both": (
            "rest_desc.load([first_m, first_n]) => rest_desc.load([first_m, 0])"
        ),
        "no rest in the left half": (
            "y, rest_desc, first_m, first_n, left => y, None, first_m, first_n, left"
        ),
    },
    ((FOLD,), "shrink.py"): {
        "s not scaled": "s *= tl.cast(factor, ACC) => pass",
        "s scaled twice": "s *= tl.cast(factor, ACC) => s *= tl.cast(factor * factor, ACC)",
    },
    ((FIRST, FIRST_OF_3), "outputs.py"): {
        "first, not scaled": "(number_of(i_tile, own_scales, tl.float32), => (1.0,",
        "first, of the first row tile": (
            "    rows = wrapped(first_m + tl.arange(0, BLOCK_M => "
            "    rows = wrapped(tl.arange(0, BLOCK_M"
        ),
        "first, of the first column tile": (
            "columns = wrapped(offs_n, N_tile) => columns = wrapped(tl.arange(0, BLOCK_N), N_tile)"
        ),
    },
    ((FIRST,), "input_grad.py"): {
        "first of dx, of the first column tile": (
            "columns = wrapped(first_k + tl.arange => columns = wrapped(tl.arange"
        ),
        "first of dx, not masked": "acc *= keep.to(tl.float32) => pass",
        "first of dx, not scaled": "own_numbers((scale,), number_ptrs, G + g, tl.float32)[0] => 1",
    },
    ((FOLD, FOLD_HALVES, FOLD_REST), "input_grad.py"): {
        "last dy missing": "for step in range(steps): => for step in range(ends[0]):",
        "dy of the second again": "w_from, n = dys[i], ws[i] => w_from, n = dys[1], ws[i]",
        "step not from the start": "(step - ends[i - 1]) * BLOCK_K => step * BLOCK_K",
        "one step late": "if step >= ends[i - 1]: => if step > ends[i - 1]:",
        "low-rank terms not masked": "folds = not dropout and  => folds = ",
        "tile of another row": "dy_from.load([first_m, n]) => dy_from.load([0, n])",
    },
    # And those with segments.
    ((CUT_BY_TMA, CUT_OF_2), "tiles.py"): {
        "by TMA: w of the first expert": "[g, first, second] => [0, first, second]",
        "by TMA: experts one row apart": "[stride_g, stride, 1] => [stride, stride, 1]",
    },
    ((CUT_BY_TMA, CUT_OF_2), "outputs.py"): {
        "by TMA: rows of the next expert of y": "else (end, N_tile) => else (M, N_tile)",
        "by TMA: b of the first expert": (
            "own_b = stack_at(b_ptrs, g, strides_bg) => own_b = b_ptrs"
        ),
        "by TMA: bias of the first expert": (
            "own_bias = stack_at(bias_ptrs, g, strides_of_bias) => own_bias = bias_ptrs"
        ),
        "by TMA: scaling of the first expert": "number_ptrs, g, tl.f => number_ptrs, 0, tl.f",
        "by TMA: no tiles but those of whole rows": (
            "    tiles_m = row_tiles(M, offsets_ptr, G, BLOCK_M)\n    steps => "
            "    tiles_m = tl.cdiv(M, BLOCK_M)\n    steps"
        ),
    },
    ((CUT_BY_TMA, CUT_OF_2), "input_grad.py"): {
        "by TMA: rows of the next expert of dx": "else (last_m, K) => else (M, K)",
        "by TMA: a of the first expert": "stack_at((a_ptr,), g, => stack_at((a_ptr,), g * 0,",
        "by TMA: 1 / (1 - p) of the first expert": "number_ptrs, G + g, tl => number_ptrs, G, tl",
        "by TMA: dropout of the first expert": "2 * G + g, tl.int32)[0] => 2 * G, tl.int32)[0]",
        "by TMA: rest of rows that are not cut": "p, portable, segments) => p, portable)",
    },
}
MUTANTS = {
    what: (problems, file, *change.split(" => "))
    for (problems, file), copies in COPIES.items()
    for what, change in copies.items()
}


def config_of(joint: Joint) -> dict | None:
    return CONFIGS.get(joint) or (both("fold") if joint.K == 296 else None)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_refused(name, tmp_path, monkeypatch):
    problems, *changed = MUTANTS[name]
    mutant = load(tmp_path, f"mutant_{list(MUTANTS).index(name)}", *changed)
    if CUT_BY_TMA in problems:
        chip = mutant.configs.Chip((0, 0), 1 << 30, processors=2)
        monkeypatch.setattr(mutant.configs.Chip, "of", staticmethod(lambda device: chip))
    with poisoned(), pytest.raises(AssertionError):
        for joint in problems:
            verify(mutant, joint, configs=config_of(joint))


@pytest.mark.parametrize("joint", {j: 0 for problems, _ in COPIES for j in problems}, ids=str)
def test_the_right_kernels_are_accepted(joint):
    verify(fastlora_kernels, joint, configs=config_of(joint))
