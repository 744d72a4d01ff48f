# SPDX-License-Identifier: Apache-2.0
"""ds = c · dy b and db = c · dyᵀ s from one pass over dy: by row tiles, and by column tiles.

Programs write partial sums in float32, and a second kernel adds them in a fixed order, so that
results do not vary from run to run.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels import lists
from fastlora_kernels.configs import ON_THE_WAY_RANK, Chip, Config, cdiv
from fastlora_kernels.launch import Launch, default_of, empty
from fastlora_kernels.segments import own_numbers, rows_of, stack_at
from fastlora_kernels.sums import add_up
from fastlora_kernels.tiles import dot, triton_dtype

# Programs wanted for each processor, by splitting the rows.
PROGRAMS = 2


class Columns(NamedTuple):
    """What dy also meets where a scale [N] multiplies columns, or None for what is not needed.

    dz = (scale - less) dy, and dscale = factor Σ dy (z - bias), of z [M, N] and its bias [N].
    """

    scale: Tensor | None = None
    z: Tensor | None = None
    bias: Tensor | None = None
    less: float | None = None
    factor: float = 1.0
    need_dz: bool = False


NO_COLUMNS = Columns()


@triton.jit(do_not_specialize=["steps", "G"])
def ds_db_kernel(
    dy_ptr, s_ptr, b_ptr, ds_ptr, db_ptr, offsets_ptr, number_ptrs,
    scale_ptr, z_ptr, bias_ptr, dz_ptr, dscale_ptr,
    M, N, R, steps, G,
    stride_dym, stride_dyn,
    strides_bg, stride_br, stride_bn,
    stride_on, stride_bias, less,
    NEED_DS: tl.constexpr, NEED_DB: tl.constexpr, ON_THE_WAY: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Programs that read the same elements are neighbours: rank tiles first, then tiles of a split.
    tiles_r = tl.cdiv(R, BLOCK_R)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // tiles_r
    split = tl.program_id(1)
    offs_r = tl.program_id(0) % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    ranks = offs_r.to(tl.int64)
    first_row = split * steps * BLOCK_M
    last = M
    if offsets_ptr is not None:
        first_row, last, g = rows_of(split, M, offsets_ptr, G, steps * BLOCK_M)
        if first_row >= last:
            return
        (b_ptr,) = stack_at((b_ptr,), g, strides_bg)
        (scale,) = own_numbers((), number_ptrs, g, ACC)

    if NEED_DB and (not NEED_DS or ON_THE_WAY or tile < tiles_n):
        # dyᵀ s of a column tile, over the rows of the split.
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        columns = offs_n.to(tl.int64)
        mask_nr = mask_n[:, None] & mask_r[None, :]
        if ON_THE_WAY:
            b_ptrs = b_ptr + columns[:, None] * stride_bn + ranks[None, :] * stride_br
            b = tl.load(b_ptrs, mask=mask_nr, other=0.0)
        if dz_ptr is not None:
            factor = tl.load(scale_ptr + columns, mask=mask_n, other=0.0).to(ACC)
            factor = (factor - tl.cast(less, ACC))[:, None]
        if dscale_ptr is not None:
            dscale = tl.zeros((BLOCK_N,), dtype=ACC)
            bias = tl.zeros((BLOCK_N, 1), dtype=ACC)
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + columns * stride_bias, mask=mask_n, other=0.0)
                bias = bias.to(ACC)[:, None]
        db = tl.zeros((BLOCK_N, BLOCK_R), dtype=ACC)
        for m in range(first_row, min(first_row + steps * BLOCK_M, last), BLOCK_M):
            offs_m = m + tl.arange(0, BLOCK_M)
            mask_m = offs_m < last
            rows = offs_m.to(tl.int64)
            # Loaded the other way round: through tl.trans it would lose its cp.async pipeline.
            dy_ptrs = dy_ptr + columns[:, None] * stride_dyn + rows[None, :] * stride_dym
            mask = mask_n[:, None] & mask_m[None, :]
            dy = tl.load(dy_ptrs, mask=mask, other=0.0)
            # Of the programs that read the same dy one makes dz and dscale.
            mask &= tl.program_id(0) % tiles_r == 0
            offs_z = columns[:, None] + rows[None, :] * N
            if dz_ptr is not None:
                tl.store(dz_ptr + offs_z, (dy.to(ACC) * factor).to(dy.dtype), mask=mask)
            if dscale_ptr is not None:
                z = tl.load(z_ptr + offs_z, mask=mask, other=0.0).to(ACC)
                dscale += tl.sum(tl.where(mask, dy.to(ACC) * (z - bias), 0.0), 1)
            mask_mr = mask_m[:, None] & mask_r[None, :]
            s = tl.load(s_ptr + rows[:, None] * R + ranks[None, :], mask=mask_mr, other=0.0)
            db = dot(dy, s, db)  # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_R]
            if ON_THE_WAY:
                ds = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
                ds = dot(tl.trans(dy), b, ds)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_R]
                if offsets_ptr is not None:
                    ds *= scale
                row = tile.to(tl.int64) * M + rows
                tl.store(ds_ptr + row[:, None] * R + ranks[None, :], ds, mask=mask_mr)
        db_ptrs = db_ptr + split.to(tl.int64) * N * R
        db_ptrs += columns[:, None] * stride_on + ranks[None, :]
        tl.store(db_ptrs, db, mask=mask_nr)
        if dscale_ptr is not None:
            mask_n &= tl.program_id(0) % tiles_r == 0
            tl.store(dscale_ptr + split.to(tl.int64) * N + columns, dscale, mask=mask_n)
    else:
        # dy b of a row tile, over as many column tiles as the others have row tiles.
        if NEED_DB:
            tile -= tiles_n
        chunk = tile // steps
        offs_m = first_row + tile % steps * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < last
        rows = offs_m.to(tl.int64)
        mask_mr = mask_m[:, None] & mask_r[None, :]
        ds = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
        for n in range(chunk * steps * BLOCK_N, min((chunk + 1) * steps * BLOCK_N, N), BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N
            columns = offs_n.to(tl.int64)
            dy_ptrs = dy_ptr + rows[:, None] * stride_dym + columns[None, :] * stride_dyn
            dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
            b_ptrs = b_ptr + columns[:, None] * stride_bn + ranks[None, :] * stride_br
            b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
            ds = dot(dy, b, ds)  # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_R]
        if offsets_ptr is not None:
            ds *= scale
        row = chunk.to(tl.int64) * M + rows
        tl.store(ds_ptr + row[:, None] * R + ranks[None, :], ds, mask=mask_mr)


def split(
    M: int, columns: int, config: Config, processors: int, tiles_r: int = 1, G: int = 0
) -> tuple:
    """Return into how many splits the rows go, and the row tiles of each.

    Each column tile has ``tiles_r`` programs in every split. A split is of one segment of ``G``.
    """
    tiles = tiles_r * cdiv(columns, config.block_n)
    blocks = max(1, cdiv(M, config.block_m))
    wanted = max(1, min(blocks, PROGRAMS * processors // max(1, tiles)))
    steps = cdiv(blocks, wanted)
    return max(1, lists.count_of(M, G, steps * config.block_m)), steps


def ds_db(
    dy, s, b, scalings, need_ds, need_db, config: Config | None = None, segments=None,
    columns: Sequence[Columns] | None = None,
):  # fmt: skip
    """Return ds and db of one to four projections: `steps.ds_db` says what they are.

    With ``columns`` dz and dscale as well, as `steps.ds_db_of_scaled` does.

    A launch reads a dy for all, one more adds the float32 partial sums of all up.
    """
    found, sums = [[None] * len(dy) for _ in range(4)], {}
    for i, needs in enumerate(zip(need_ds, need_db, strict=True)):
        of = columns[i] if columns else NO_COLUMNS
        if any(needs) or of.z is not None or of.need_dz:
            own = dy[i], s[i], b[i], *needs, config, lists.of_few(segments, [i]), of
            *made, dz, of_part = _partial_sums(*own)
            found[2][i] = dz
            scaling = 1.0 if segments else float(scalings[i])
            about = (b[i], 0, scaling), (b[i], of_part, scaling), (of.scale, 0, of.factor)
            for j, part, (like, rows, scale) in zip((0, 1, 3), made, about, strict=True):
                if part is not None and (j == 3 or needs[j]):
                    found[j][i] = empty(like, *(like.shape if rows else part.shape[1:]))
                    of_one = part, found[j][i], scale, segments and segments[1][i], rows
                    sums.setdefault(like.dtype, []).append(of_one)
    for of_dtype in sums.values():
        parts, outs, scales, numbers, rows = zip(*of_dtype, strict=True)
        add_up(parts, outs, scales, *((segments[0], numbers, rows) if segments else ()))
    return found if columns else found[:2]


def _partial_sums(
    dy: Tensor, s: Tensor, b: Tensor, need_ds: bool, need_db: bool,
    config: Config | None, segments: lists.Segments | None, of: Columns,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int]:  # fmt: skip
    """Return the partial sums of ds [parts, M, R], of db [parts, N, R], of dscale [parts, N]; dz.

    And, with segments, of how many rows one of db is, else 0. Those of ds are scaled then.
    """
    (M, N), R = dy.shape, b.shape[-1]
    need_db = need_db or of.z is not None or of.need_dz
    offsets, numbers, G = lists.numbers_of(segments)
    config = config or default_of("ds_db", (dy,), (dy,), R, b.dtype, False)()
    if of.scale is not None and dy.dtype == torch.float32:  # a z beside a wider dy spills
        config = replace(config, block_n=min(config.block_n, 32))
    block_r = config.rank_tile(R)
    tiles_r, tiles_n = cdiv(R, block_r), cdiv(N, config.block_n)
    on_the_way = need_ds and need_db and R <= ON_THE_WAY_RANK
    # Programs of their own for ds are as many again, each of as many tiles.
    kinds = 2 if need_ds and need_db and not on_the_way else 1
    splits, steps = split(M, N, config, Chip.of(dy.device).processors, kinds * tiles_r, G)
    chunks = tiles_n if on_the_way else cdiv(tiles_n, steps)
    tiles = (tiles_n if need_db else 0) + (steps * chunks if need_ds and not on_the_way else 0)
    launch = Launch(
        *(ds_db_kernel, (tiles * tiles_r, splits), config),
        *(M, N, R, steps, G, *dy.stride(), lists.strides((b,), 3)[0], *b.stride()[:-3:-1], R),
        *(None if of.bias is None else of.bias.stride(0), of.less),
        *(need_ds, need_db, on_the_way, triton_dtype(dy.dtype)),
        *(config.block_m, config.block_n, block_r),
    )
    acc = torch.promote_types(dy.dtype, torch.float32)
    shapes = (need_ds, (chunks, M, R)), (need_db, (splits, N, R)), (of.z is not None, (splits, N))
    made = [empty(dy, *shape, dtype=acc) if needed else None for needed, shape in shapes]
    ds, db, dscale = made
    dz = empty(dy, M, N) if of.need_dz else None
    launch(dy, s, b, ds, db, offsets, numbers, of.scale, of.z, of.bias, dz, dscale)
    return *made, dz, steps * config.block_m if G else 0
