# SPDX-License-Identifier: Apache-2.0
"""y_i = x w_iᵀ + scale_i · s_i b_iᵀ + bias_i for the projections of one x: one wide product.

One accumulator, and y is written once. The column tiles of all projections are numbered one after
the other: programs that run at the same time share rows of x. The low-rank product comes "first"
and is scaled; in the persistent programs of sm_90 and later it may be a "fold" instead: the last
steps of the main loop, in its pipeline.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels import lists
from fastlora_kernels.configs import MOST_UNEVEN, Chip, Config, cdiv
from fastlora_kernels.launch import Launch, default_of, empty
from fastlora_kernels.locate import locate, number_of, pointer_of
from fastlora_kernels.segments import own_numbers, row_tiles, rows_of, stack_at
from fastlora_kernels.tiles import (
    add_low_rank,
    add_product,
    descriptor,
    load_tile,
    store_tile,
    tile_of,
    triton_dtype,
    wrapped,
)

# Where rows of y do not start at multiples of 16 bytes, and those of a z that is read, or written.
WITH_Z = Config(64, 64, 32, block_r=16, num_warps=4, num_stages=2)
WITH_NEW_Z = Config(64, 32, 32, block_r=16, num_warps=8, num_stages=2)


@triton.jit(do_not_specialize=["G"])
def outputs_kernel(
    x_ptr, w_ptrs, s_ptrs, b_ptrs, bias_ptrs, y_ptrs, offsets_ptr, number_ptrs,
    scale_ptrs, z_ptrs, new_z_ptrs,
    M, sizes, K, ranks, bias_sizes, tiles_n, G,
    stride_xm, stride_xk,
    strides_wg, strides_wn, strides_wk,
    strides_bg, strides_bn, strides_br,
    strides_of_bias, strides_bias,
    scales, kept,
    HAS_LOW_RANK: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = y_ptrs[0].dtype.element_ty
    tiles_m = row_tiles(M, offsets_ptr, G, BLOCK_M)
    pid_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    i, pid_n = locate(tile_n, sizes, BLOCK_N)
    N = number_of(i, sizes, tl.int32)
    first_m, end, g = rows_of(pid_m, M, offsets_ptr, G, BLOCK_M)
    if offsets_ptr is not None:
        if first_m >= end:
            return
        w_ptrs = stack_at(w_ptrs, g, strides_wg)
        if HAS_LOW_RANK:
            b_ptrs = stack_at(b_ptrs, g, strides_bg)
        if HAS_BIAS:
            bias_ptrs = stack_at(bias_ptrs, g, strides_of_bias)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = wrapped(offs_m, M)
    columns = wrapped(offs_n, N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if HAS_LOW_RANK and scale_ptrs is None:
        of_b = ranks, strides_bn, strides_br
        acc = add_low_rank(acc, i, s_ptrs, b_ptrs, rows, columns, *of_b, dtype, BLOCK_R)
        scales = own_numbers(scales, number_ptrs, g, ACC)
        acc *= tl.cast(number_of(i, scales, ACC), ACC)
    w_ptr = pointer_of(i, w_ptrs)
    of_w = number_of(i, strides_wn, tl.int64), number_of(i, strides_wk, tl.int64)
    of_x = stride_xm, stride_xk
    acc = add_product(acc, x_ptr, w_ptr, rows, columns, K, *of_x, *of_w, EVEN_K, BLOCK_K)
    if scale_ptrs is not None:
        of_z = scale_ptrs, z_ptrs, new_z_ptrs, kept, M, N, first_m, pid_n * BLOCK_N
        of_bias = bias_ptrs, strides_bias, bias_sizes
        acc = scaled(acc, i, *of_z, *of_bias, HAS_BIAS, dtype)
        if HAS_LOW_RANK:
            of_b = rows, columns, ranks, strides_bn, strides_br
            factor = tl.cast(number_of(i, scales, ACC), ACC)
            acc = add_low_rank(acc, i, s_ptrs, b_ptrs, *of_b, dtype, BLOCK_R, factor)

    mask_n = offs_n < N
    if HAS_BIAS:
        acc += bias_of(i, bias_ptrs, strides_bias, bias_sizes, offs_n, N).to(ACC)[None, :]
    y_tile = pointer_of(i, y_ptrs) + rows[:, None] * N + offs_n[None, :]
    tl.store(y_tile, acc.to(dtype), mask=(offs_m < end)[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["G"])
def persistent_outputs_kernel(
    x_ptr, w_ptrs, s_ptrs, b_ptrs, bias_ptrs, y_ptrs, offsets_ptr, number_ptrs,
    M, sizes, K, ranks, bias_sizes, tiles_n, G,
    stride_x, strides_wg, strides_w,
    strides_bg, strides_bn, strides_br,
    strides_of_bias, strides_bias,
    scales,
    LOW_RANK: tl.constexpr, W_BY_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = y_ptrs[0].dtype.element_ty
    x_desc = descriptor(x_ptr, M, K, stride_x, True, BLOCK_M, BLOCK_K)
    w_descs = ()
    s_descs = ()
    b_descs = ()
    y_descs = ()
    for i in tl.static_range(len(sizes)):
        N = sizes[i]
        of_w = w_ptrs[i], N, K, strides_w[i]
        w_desc = descriptor(*of_w, W_BY_ROWS, BLOCK_N, BLOCK_K, G, strides_wg[i])
        w_descs = w_descs + (w_desc,)
        y_desc = y_ptrs[i]
        if offsets_ptr is None:
            y_desc = descriptor(y_desc, M, N, N, True, BLOCK_M, BLOCK_N // HALVES)
        y_descs = y_descs + (y_desc,)
        if LOW_RANK == "fold":
            # A projection without an adapter has rank 0 here, and another one's s and b.
            R = max(ranks[i], 8)
            s_descs = s_descs + (descriptor(s_ptrs[i], M, R, R, True, BLOCK_M, BLOCK_K),)
            stride_b = number_of(i, strides_bn if W_BY_ROWS else strides_br, tl.int64)
            b_desc = descriptor(b_ptrs[i], N, R, stride_b, W_BY_ROWS, BLOCK_N, BLOCK_K)
            b_descs = b_descs + (b_desc,)

    tiles_m = row_tiles(M, offsets_ptr, G, BLOCK_M)
    steps = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=LOW_RANK == "fold"
    ):
        pid_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        i_tile, pid_n = locate(tile_n, sizes, BLOCK_N)
        N_tile = number_of(i_tile, sizes, tl.int32)
        first_m, end, g = rows_of(pid_m, M, offsets_ptr, G, BLOCK_M)
        first_n = pid_n * BLOCK_N
        offs_n = first_n + tl.arange(0, BLOCK_N)
        w_desc = pointer_of(i_tile, w_descs)
        all_steps = steps
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if offsets_ptr is not None:
            # An empty tile has no steps: a loop over tiles cannot return.
            all_steps = tl.where(first_m < end, steps, 0)
        if LOW_RANK is not None:
            R_tile = number_of(i_tile, ranks, tl.int32)
        if LOW_RANK == "fold":
            s_desc = pointer_of(i_tile, s_descs)
            b_desc = pointer_of(i_tile, b_descs)
            all_steps += tl.cdiv(R_tile, BLOCK_K)
        if LOW_RANK == "first":
            if offsets_ptr is not None:
                R_tile = tl.where(first_m < end, R_tile, 0)
            own_b = stack_at(b_ptrs, g, strides_bg)
            rows = wrapped(first_m + tl.arange(0, BLOCK_M), M)
            columns = wrapped(offs_n, N_tile)
            of_b = (R_tile,), strides_bn, strides_br
            acc = add_low_rank(acc, i_tile, s_ptrs, own_b, rows, columns, *of_b, dtype, BLOCK_R)
            own_scales = own_numbers(scales, number_ptrs, g, tl.float32)
            acc *= tl.cast(number_of(i_tile, own_scales, tl.float32), tl.float32)

        for step in range(all_steps):
            # The descriptor is chosen and the load is shared: a load in a branch has no pipeline.
            x_from, w_from, k = x_desc, w_desc, step * BLOCK_K
            if LOW_RANK == "fold":  # noqa: SIM102, known when compiled, unlike what follows
                if step >= steps:
                    x_from, w_from, k = s_desc, b_desc, (step - steps) * BLOCK_K
            x = x_from.load([first_m, k])
            w = load_tile(w_from, g, first_n, k, W_BY_ROWS).T
            acc = tl.dot(x, w, acc)  # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N]

        if HAS_BIAS:
            own_bias = stack_at(bias_ptrs, g, strides_of_bias)
            bias = bias_of(i_tile, own_bias, strides_bias, bias_sizes, offs_n, N_tile)
            acc += bias.to(tl.float32)[None, :]
        y, bounds = pointer_of(i_tile, y_descs), None if offsets_ptr is None else (end, N_tile)
        store_tile(y, None, first_m, first_n, acc, dtype, HALVES, bounds)


@triton.jit
def bias_of(i, bias_ptrs, strides_bias, bias_sizes, offs_n, N):
    """Return columns of the bias of projection ``i``; one that is not there has size 0."""
    tile = wrapped(offs_n, N) * number_of(i, strides_bias, tl.int64)
    mask = offs_n < number_of(i, bias_sizes, tl.int32)
    return tl.load(pointer_of(i, bias_ptrs) + tile, mask=mask, other=0.0)


@triton.jit
def scaled(
    acc, i, scale_ptrs, z_ptrs, new_z_ptrs, kept, M, N, first_m, first_n,
    bias_ptrs, strides_bias, bias_sizes,
    HAS_BIAS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Return a tile of the frozen product with what the scale of projection ``i`` makes of it.

    The product is the tile, which is kept, with its bias, where there are new z; or it is z, with
    its bias. Where ``kept`` is given z is the product of the elements that dropout keeps, which
    are to be multiplied by that, and what the scale changes in it is added to the tile.
    """
    offs_n = first_n + tl.arange(0, acc.shape[1])
    columns = wrapped(offs_n, N)
    scale = tl.load(pointer_of(i, scale_ptrs) + columns).to(acc.dtype)[None, :]
    bias = tl.zeros((1, acc.shape[1]), dtype=acc.dtype)
    if HAS_BIAS:
        bias = bias_of(i, bias_ptrs, strides_bias, bias_sizes, offs_n, N).to(acc.dtype)[None, :]
    if z_ptrs is None:
        if new_z_ptrs is not None:
            to = pointer_of(i, new_z_ptrs), None, first_m, first_n
            store_tile(*to, acc + bias, dtype, 1, (M, N))
        acc *= scale
    else:
        rows = wrapped(first_m + tl.arange(0, acc.shape[0]), M)
        z = tl.load(pointer_of(i, z_ptrs) + rows[:, None] * N + columns[None, :]).to(acc.dtype)
        if kept is None:
            acc += (z - bias) * scale
        else:
            acc += z * ((scale - 1.0) * tl.cast(number_of(i, kept, acc.dtype), acc.dtype))
    return acc


def readable(t: Tensor, by_rows: bool = True) -> bool:
    """Return whether the tensor memory accelerator can read 16-bit ``t``, or its transpose.

    Or each of a stack. Rows that overlap, as those of an expanded tensor do, are outside of what it
    is documented for.
    """
    *stack, rows, columns = t.stride() if by_rows else t.mT.stride()
    length, width = t.shape[-2:] if by_rows else t.mT.shape[-2:]
    lie = columns == 1 and rows % 8 == 0 and rows >= width
    lie = lie and all(one % 8 == 0 and one >= rows * length for one in stack)
    return lie and t.data_ptr() % 16 == 0 and t.numel() > 0


def read_strides(w: Sequence[Tensor], by_rows: bool) -> tuple:
    """Return the strides of each stack, None without, and of its matrices' rows, or columns."""
    stacks = [t.stride(0) if t.dim() > 2 else None for t in w]
    return tuple(stacks), tuple([t.stride(-2 if by_rows else -1) for t in w])


def runnable(config: Config | None, default, even: bool, suited: bool, folds: bool) -> Config:
    """Return the config of a wide product, or its default, or what runs where that one cannot.

    Rows of the result are ``even``: start at multiples of 16 bytes, and are no segments, with which
    the portable kernel is the default, and spills with the widest tiles. ``suited`` are operands
    that the tensor memory accelerator reads, which then ``folds`` factors in.
    """
    config = config or default(even=even)
    if config.tma and config.low_rank == "fold" and not folds:
        config = default(even=even, fold=False)
    narrow = config.block_m * config.block_n <= MOST_UNEVEN
    if not (suited if config.tma else even or narrow):
        config = default(even=False)
    return config


def _config(x, w, b, config: Config | None, scaled: bool, whole: bool = True) -> Config:
    """Return what `outputs` runs with; ``scaled``: s needs no scaling, so that a fold may read it.

    s comes from a launcher of ours: contiguous, at a multiple of 16 bytes.
    """
    adapters, by_rows = [t for t in b if t is not None], w[0].stride(-1) == 1
    dtype = adapters[0].dtype if adapters else x.dtype
    rank, result = max(1, *lists.lengths(b, -1)), (len(x), lists.lengths(w, -2))
    default = default_of("outputs", (x,), w, rank, dtype, False, len(w), result)
    even = all(n * x.element_size() % 16 == 0 for n in lists.lengths(w, -2))
    suited = even and readable(x) and all(readable(t, by_rows) for t in w)
    folds = whole and scaled and dtype == x.dtype
    folds = folds and all(t.shape[1] % 8 == 0 and readable(t, by_rows) for t in adapters)
    return runnable(config, default, even and whole, suited, folds)


def scaled_before(x, w, b, scalings: tuple[float, ...], config: Config | None) -> float | None:
    """Return what s has to come scaled by, because `outputs` folds it in; None if by nothing."""
    scaling, *others = scalings
    if scaling == 1.0 or set(others) - {scaling}:
        return None
    chosen = _config(x, w, b, config, True)
    return scaling if chosen.tma and chosen.low_rank == "fold" else None


def outputs(
    x, w, s, b, biases, scalings, config: Config | None = None, segments=None,
    columns: Sequence[Tensor] | None = None, z=None, new_z=None, kept=None,
):  # fmt: skip
    """Return y of one to four projections, in one launch: `steps.outputs` says what that is.

    s and b are of one dtype and each None without an adapter, and so are the biases. ``columns``
    are their scales, contiguous and of one dtype; z, new z and what dropout multiplies by are as
    `scaled` takes them.
    """
    (M, K), sizes, ranks = x.shape, lists.lengths(w, -2), lists.lengths(b, -1)
    scales = lists.alike([float(c) for c, r in zip(scalings, ranks, strict=True) if r] or [1.0])
    if len(scales) > 1:
        scales = tuple(map(float, scalings))
    has_bias = any(t is not None for t in biases)
    plain = columns is None
    config = _config(x, w, b, config, scales == (1.0,) and plain, segments is None and plain)
    if not plain and any(n * x.element_size() % 16 for n in sizes):
        config = WITH_Z if new_z is None else WITH_NEW_Z
    offsets, numbers, G = lists.numbers_of(segments)
    tiles_n = sum(cdiv(n, config.block_n) for n in sizes)
    tiles = lists.count_of(M, G, config.block_m) * tiles_n
    shared = M, sizes, K, ranks, lists.lengths(biases, -1), tiles_n, G
    of_b, of_bias = lists.strides(b, 3), lists.strides(biases, 2)
    blocks = config.block_m, config.block_n, config.block_k
    # Beside an accumulator that is in use only a narrow tile of s has room in terms of 16 bits.
    block_r = config.rank_tile(max(1, *ranks)) if plain else 16
    if config.tma:
        by_rows = w[0].stride(-1) == 1
        launch = Launch(
            *(persistent_outputs_kernel, (min(tiles, Chip.of(x.device).processors),), config),
            *(*shared, x.stride(0), *read_strides(w, by_rows), *of_b, *of_bias, scales),
            *(config.low_rank if any(ranks) else None, by_rows, has_bias),
            *(*blocks, min(block_r, 32), config.group_m),
            2 if config.block_n > 128 or segments else 1,
        )
    else:
        launch = Launch(
            *(outputs_kernel, (tiles,), config),
            *(*shared, *x.stride(), *lists.strides(w, 3), *of_b, *of_bias, scales, kept),
            *(any(ranks), has_bias, K % config.block_k == 0, triton_dtype(x.dtype)),
            *(*blocks, block_r, config.group_m),
        )
    y = tuple(empty(x, M, n) for n in sizes)
    of_rows = offsets, numbers, *(() if config.tma else (columns, z, new_z))
    launch(x, w, lists.filled(s), lists.filled(b), lists.filled(biases), y, *of_rows)
    return y
