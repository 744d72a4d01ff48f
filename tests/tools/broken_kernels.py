# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the kernels: a line each, and what must notice it."""

from broken_copies import Mutant

# By file and the tests that must notice: what, right, wrong.
COPIES = {
    ("tiles", "kernels/test_kernels.py::test_offsets_past_two_billion_elements"): [
        ("offsets of 32 bits", "    return (offs % size).to(tl.int64)", "    return offs % size"),
    ],
    ("segments", "kernels/test_kernels.py::test_offsets_past_two_billion_elements"): [
        (
            "experts' offsets of 32 bits",
            "g.to(tl.int64) * number_of(i, strides, tl.int64)",
            "(g * number_of(i, strides, tl.int32)).to(tl.int32)",
        ),
    ],
    ("tiles", "kernels/test_persistent.py::test_nan_stays_with_its_expert"): [
        (
            "an expert's weight goes on into the next one",
            "[G, first, second], [stride_g,",
            "[G, first + 8, second], [stride_g,",
        ),
    ],
    (
        "configs",
        "kernels/test_executed.py::test_no_register_is_set_that_a_wgmma_may_still_read",
    ): [
        ("masked tiles of 64 rows on sm_90", "shrinks and dropout and major == 9", "False"),
    ],
    ("shrink", "kernels/test_kernels.py::test_acceptance_rule"): [
        (
            "columns of x taken as neighbours",
            "rows[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk",
            "rows[:, None] * stride_xm + offs_k.to(tl.int64)[None, :]",
        ),
    ],
    ("outputs", "operator/test_scaled.py::test_as_the_formula"): [
        ("the bias of what is there is scaled", "(z - bias) * scale", "z * scale"),
    ],
    ("outputs", "kernels/test_kernels.py::test_grids_end_where_no_limit_is"): [
        (
            "tiles of rows in the second dimension of the grid",
            "*(outputs_kernel, (tiles,), config)",
            "*(outputs_kernel, (tiles_n, cdiv(M, config.block_m)), config)",
        ),
    ],
    (
        "launch",
        "kernels/test_prepared.py::test_launches_go_to_the_device_of_their_tensors_and_its_stream",
    ): [
        (
            "kernels run on the current device",
            "            if first.is_cuda and first.device.index != torch.cuda.current_device():",
            "            if False:",
        ),
        ("prepared launches go to a stream of device 0", "of_device(device) if", "of_device(0) if"),
    ],
    ("launch", "kernels/test_prepared.py::test_the_driver_gets_what_was_asked_for"): [
        (
            "a prepared launch has nowhere to keep descriptors",
            "            run = functools.partial(_in_a_copy, run)\n        about =",
            "            pass\n        about =",
        ),
    ],
    (
        "launch",
        ("kernels/test_prepared.py::test_what_a_prepared_launch_does_not_know_goes_by_triton"),
    ): [
        ("a prepared launch goes to any device", " and device_of() == device else", " else"),
        ("a prepared launch tells no hook", "if _no_hooks() and", "if"),
        ("a prepared launch tells no hook of its kernel", "if kernel.pre_run_hooks:", "if False:"),
    ],
    ("replay", "kernels/test_replay.py"): [
        ("a record serves other scalings", "key.append(value)", "key.append(kind)"),
        ("a record serves all that is 16 bytes apart or less", "& 15", "& 0"),
        ("a tensor that was two is still two", "own.append(value.detach())", "own.append(value)"),
        (
            "segments stay those of the first time",
            "**dict(zip(options, named, strict=True))",
            "**options",
        ),
        ("all stays until the end", "    for name, i in last.items():", "    for name, i in ():"),
        ("what failed is recorded on", "            recording.done = None\n", "            pass\n"),
    ],
    ("steps", "kernels/test_replay.py::test_one_tensor_may_be_two_the_next_time"): [
        (
            "sums of more than four are not replayed",
            "noted(Tensor.add_, dx, part)",
            "dx.add_(part)",
        ),
    ],
    ("launch", ("kernels/test_kernels.py::test_nothing_is_compiled_while_a_graph_is_captured")): [
        (
            "kernels are compiled while a graph is captured",
            "            if threading.get_ident() != capturing:",
            "            if True:",
        ),
    ],
    ("steps", "kernels/test_kernels.py::test_a_launch_has_pointers_of_one_type"): [
        (
            "adapters of two dtypes in one launch",
            "                kind = a.dtype",
            "                kind = 1",
        ),
    ],
    ("tiles", ("operator/test_unusual_operands.py::test_infinities_stay_under_float32_adapters")): [
        (
            "a term of a float32 factor is zero",
            "low = tl.where(tl.abs(last) > 0.0, last, first * SHARE)",
            "low = last",
        ),
        (
            "a term of a float32 factor is of another sign",
            "high = wide.to(tl.uint32, bitcast=True) & 0xFFFF0000",
            "high = (wide.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000",
        ),
    ],
    ("tiles", "kernels/test_compiled.py::test_float32_sums_start_from_zero"): [
        (
            "a float32 sum is one chain from its start",
            "acc = tl.fma(part, tl.full(acc.shape, 1.0, tl.float32), acc)",
            "acc += part",
        ),
    ],
    ("configs", "kernels/test_compiled.py::test_no_copy_overtakes_a_wgmma"): [
        (
            "a copy may overtake a wgmma",
            "        on_the_way and major == 9 and m < 64 <= n,",
            "        on_the_way and major == 9 and m < 32 <= n,",
        ),
    ],
    ("configs", "kernels/test_defaults.py"): [
        (
            "every number of rows has tiles of its own",
            "rows, columns = 1 << (result[0] - 1).bit_length(), result[1]",
            "rows, columns = result",
        ),
        (
            "few rows take the tiles of many",
            "enough = min(max(tiles), FILLED * chip.processors)",
            "enough = 0",
        ),
    ],
    ("ds_db", "kernels/test_compiled.py::test_few_lengths_compile_what_all_need"): [
        (
            "every number of rows is compiled for",
            '@triton.jit(do_not_specialize=["steps", "G"])',
            "@triton.jit",
        ),
    ],
    ("sums", "kernels/test_compiled.py::test_few_lengths_compile_what_all_need"): [
        (
            "every number of parts is compiled for",
            "tuple(2 * len(of_one) + 3 for of_one in parts)",
            "tuple(len(of_one) for of_one in parts)",
        ),
    ],
}
MUTANTS = [
    Mutant(what, f"kernels/fastlora_kernels/{file}.py", right, wrong, tests)
    for (file, tests), copies in COPIES.items()
    for what, right, wrong in copies
]
