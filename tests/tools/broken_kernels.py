# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the kernels: a line each, and what must notice it."""

from __future__ import annotations

from broken_copies import Mutant

MUTANTS = [
    Mutant(
        "offsets of 32 bits",
        "kernels/fastlora_kernels/tiles.py",
        "    return (offs % size).to(tl.int64)",
        "    return offs % size",
        "kernels/test_kernels.py::test_offsets_past_two_billion_elements",
    ),
    Mutant(
        "columns of x taken as neighbours",
        "kernels/fastlora_kernels/shrink.py",
        "rows[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk",
        "rows[:, None] * stride_xm + offs_k.to(tl.int64)[None, :]",
        "kernels/test_kernels.py::test_strides",
    ),
    Mutant(
        "tiles of rows in the second dimension of the grid",
        "kernels/fastlora_kernels/product.py",
        "grid = (cdiv(M, config.block_m) * cdiv(N, config.block_n),)",
        "grid = cdiv(N, config.block_n), cdiv(M, config.block_m)",
        "kernels/test_kernels.py::test_grids_end_where_no_limit_is",
    ),
    Mutant(
        "kernels run on the current device",
        "kernels/fastlora_kernels/launch.py",
        "        if first.device.index != torch.cuda.current_device():",
        "        if False:",
        "kernels/test_kernels.py::test_kernels_run_on_the_device_of_their_tensors",
    ),
    Mutant(
        "kernels are compiled while a graph is captured",
        "kernels/fastlora_kernels/launch.py",
        "            if threading.get_ident() != capturing:",
        "            if True:",
        "kernels/test_kernels.py::test_nothing_is_compiled_while_a_graph_is_captured",
    ),
    Mutant(
        "a term of a float32 factor is zero",
        "kernels/fastlora_kernels/tiles.py",
        "low = tl.where(tl.abs(last) > 0.0, last, first * SHARE)",
        "low = last",
        "operator/test_unusual_operands.py::test_infinities_stay_under_float32_adapters",
    ),
    Mutant(
        "a term of a float32 factor is of another sign",
        "kernels/fastlora_kernels/tiles.py",
        "high = wide.to(tl.uint32, bitcast=True) & 0xFFFF0000",
        "high = (wide.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000",
        "operator/test_unusual_operands.py::test_infinities_stay_under_float32_adapters",
    ),
    Mutant(
        "a float32 sum is one chain from its start",
        "kernels/fastlora_kernels/tiles.py",
        "acc = tl.fma(part, tl.full(acc.shape, 1.0, tl.float32), acc)",
        "acc += part",
        "kernels/test_ptx.py::test_float32_sums_start_from_zero",
    ),
    Mutant(
        "a copy may overtake a wgmma",
        "kernels/fastlora_kernels/configs.py",
        "    if on_the_way and chip.capability[0] == 9 and m < 64 <= n:",
        "    if on_the_way and chip.capability[0] == 9 and m < 32 <= n:",
        "kernels/test_ptx.py::test_no_copy_overtakes_a_wgmma",
    ),
    Mutant(
        "every number of rows is compiled for",
        "kernels/fastlora_kernels/columns.py",
        '@triton.jit(do_not_specialize=["steps", "keep_from"])',
        "@triton.jit",
        "kernels/test_specialized.py",
    ),
    Mutant(
        "every number of parts is compiled for",
        "kernels/fastlora_kernels/columns.py",
        '@triton.jit(do_not_specialize=["first_parts", "second_parts"])',
        "@triton.jit",
        "kernels/test_specialized.py",
    ),
]
