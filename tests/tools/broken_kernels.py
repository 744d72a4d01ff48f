# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the kernels: a line each, and what must notice it."""

from __future__ import annotations

from broken_copies import Mutant

TESTS, PREPARED = "kernels/test_kernels.py::test_", "kernels/test_prepared.py::test_"
BY_TRITON = f"{PREPARED}what_a_prepared_launch_does_not_know_goes_by_triton"
FOLDER = "kernels/fastlora_kernels"

MUTANTS = [
    Mutant(
        "offsets of 32 bits",
        f"{FOLDER}/tiles.py",
        "    return (offs % size).to(tl.int64)",
        "    return offs % size",
        f"{TESTS}offsets_past_two_billion_elements",
    ),
    Mutant(
        "columns of x taken as neighbours",
        f"{FOLDER}/shrink.py",
        "rows[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk",
        "rows[:, None] * stride_xm + offs_k.to(tl.int64)[None, :]",
        f"{TESTS}strides",
    ),
    Mutant(
        "tiles of rows in the second dimension of the grid",
        f"{FOLDER}/outputs.py",
        "*(outputs_kernel, (tiles,), config)",
        "*(outputs_kernel, (tiles_n, cdiv(M, config.block_m)), config)",
        f"{TESTS}grids_end_where_no_limit_is",
    ),
    Mutant(
        "kernels run on the current device",
        f"{FOLDER}/launch.py",
        "            if first.is_cuda and first.device.index != torch.cuda.current_device():",
        "            if False:",
        f"{TESTS}kernels_run_on_the_device_of_their_tensors",
    ),
    Mutant(
        "a prepared launch goes to whatever device is current",
        f"{FOLDER}/launch.py",
        " and device_of() == index:",
        ":",
        BY_TRITON,
    ),
    Mutant(
        "a prepared launch tells no hook",
        f"{FOLDER}/launch.py",
        "if _no_hooks() and not self.kernel",
        "if not self.kernel",
        BY_TRITON,
    ),
    Mutant(
        "a plan serves other scalings",
        f"{FOLDER}/launch.py",
        "                if type(value) in _PLAIN:\n                    key.append(value)",
        "                if type(value) in _PLAIN:\n                    key.append(type(value))",
        f"{PREPARED}a_plan_serves_what_it_was_made_for",
    ),
    Mutant(
        "a plan serves tensors that lie elsewhere to 16 bytes",
        f"{FOLDER}/launch.py",
        "value.data_ptr() & 15",
        "value.data_ptr() & 0",
        f"{PREPARED}a_plan_serves_what_it_was_made_for",
    ),
    Mutant(
        "kernels are compiled while a graph is captured",
        f"{FOLDER}/launch.py",
        "            if threading.get_ident() != capturing:",
        "            if True:",
        f"{TESTS}nothing_is_compiled_while_a_graph_is_captured",
    ),
    Mutant(
        "adapters of two dtypes in one launch",
        f"{FOLDER}/steps.py",
        "found.setdefault(None if a is None else a.dtype, [])",
        "found.setdefault(None if a is None else 1, [])",
        f"{TESTS}a_launch_has_pointers_of_one_type",
    ),
    Mutant(
        "a term of a float32 factor is zero",
        f"{FOLDER}/tiles.py",
        "low = tl.where(tl.abs(last) > 0.0, last, first * SHARE)",
        "low = last",
        "operator/test_unusual_operands.py::test_infinities_stay_under_float32_adapters",
    ),
    Mutant(
        "a term of a float32 factor is of another sign",
        f"{FOLDER}/tiles.py",
        "high = wide.to(tl.uint32, bitcast=True) & 0xFFFF0000",
        "high = (wide.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000",
        "operator/test_unusual_operands.py::test_infinities_stay_under_float32_adapters",
    ),
    Mutant(
        "a float32 sum is one chain from its start",
        f"{FOLDER}/tiles.py",
        "acc = tl.fma(part, tl.full(acc.shape, 1.0, tl.float32), acc)",
        "acc += part",
        "kernels/test_ptx.py::test_float32_sums_start_from_zero",
    ),
    Mutant(
        "a copy may overtake a wgmma",
        f"{FOLDER}/configs.py",
        "    if on_the_way and major == 9 and m < 64 <= n:",
        "    if on_the_way and major == 9 and m < 32 <= n:",
        "kernels/test_ptx.py::test_no_copy_overtakes_a_wgmma",
    ),
    Mutant(
        "every number of rows is compiled for",
        f"{FOLDER}/ds_db.py",
        '@triton.jit(do_not_specialize=["steps"])',
        "@triton.jit",
        "kernels/test_specialized.py",
    ),
    Mutant(
        "every number of parts is compiled for",
        f"{FOLDER}/sums.py",
        "tuple(2 * n + 3 for n in parts)",
        "tuple(n for n in parts)",
        "kernels/test_specialized.py",
    ),
]
