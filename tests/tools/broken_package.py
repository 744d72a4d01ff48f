# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the package's front: a line each, and what must notice it."""

from broken_copies import Mutant

OPERATOR, UNUSUAL = "operator/test_operator.py::test_", "operator/test_unusual_operands.py::test_"
FUNCTIONAL = "test_functional.py::test_"
FAULTS, TUNING = "test_faults.py::test_", "operator/test_tuning.py::test_"
TUNE_AT_ONCE = f"{TUNING}processes_that_measure_at_once_keep_each_others_results"
AUTOCAST = f"{UNUSUAL}autocast_casts_what_pytorch_s_casts {UNUSUAL}autocast_leaves_float64_alone"
LOCKED = "while time.monotonic() < until:"
SHAPED = "return _unsafe_view(y, (*shape[:-1], y.shape[1]))"
CAST = "_CAST = (torch.float32, torch.bfloat16, torch.float16)"
SCALED = "with_scaling(*one[1:3], one.scaling)"
APART = 'path.with_name(f".{path.name}.{own}.tmp") for path in writes'

# By file and the tests that must notice: what, right, wrong.
COPIES = {
    ("functional", f"{OPERATOR}leading_dimensions"): [
        ("y keeps the rows of x only", SHAPED, SHAPED.replace("*shape[:-1]", "-1")),
    ],
    ("functional", f"{OPERATOR}float32_adapters_keep_their_precision_under_autocast"): [
        ("autocast rounds float32 adapters", "of in given and given[of].dtype ==", "None =="),
    ],
    ("functional", "operator/test_scaled.py::test_as_the_formula"): [
        ("scale leaves lora_B out", "b = (b * columns.unsqueeze(1)).to(b.dtype)", "pass"),
    ],
    ("functional", f"{FUNCTIONAL}wrong_arguments"): [
        ("what was right once is right in any size", "(t.dtype, t.size(), t.d", "(t.dtype, t.d"),
        ("a scaling that is not finite is taken", "-LARGEST <= scaling <= LARGEST", "True"),
        ("scalings beyond float32 are taken", "= torch.finfo(torch.float32).max", "= math.inf"),
    ],
    ("operator/plans", f"{FUNCTIONAL}where_triton_cannot_run_that_is_said"): [
        ("a named implementation falls back", "raise RuntimeError", "return str"),
    ],
    ("functional", f"{OPERATOR}a_scaling_tensor_never_recompiles"): [
        (
            "a scaling becomes part of the compiled graph",
            SCALED,
            "(one[1], one[2] * one.scaling if one.scaling != 1 else one[2])",
        ),
    ],
    ("functional", f"{UNUSUAL}outputs_are_no_views"): [
        ("outputs are views", SHAPED, "return y.reshape(*shape[:-1], y.shape[1])"),
    ],
    ("functional", AUTOCAST): [
        (
            "autocast casts anything",
            CAST,
            "_CAST = tuple(v for v in vars(torch).values() if isinstance(v, torch.dtype))",
        ),
    ],
    ("explain", "test_explain.py::test_explains_siblings_together"): [
        ("few tokens are explained together", " or plans.is_few(x.numel(), w.device)", ""),
    ],
    ("files", TUNE_AT_ONCE): [
        ("processes that tune at once lose each other's results", LOCKED, "while False:"),
    ],
    ("files", f"{FAULTS}two_processes_save_while_a_third_reads"): [
        ("processes that save at once mix their files", LOCKED, "while False:"),
    ],
    ("files", f"{FAULTS}a_file_replaced_while_another_process_replaces_it"): [
        ("processes write to one temporary file", APART, APART.replace(".{own}", "")),
    ],
    ("files", "test_faults.py"): [
        ("a file has its name before it is whole", APART, "path for path in writes"),
    ],
}
MUTANTS = [
    Mutant(what, f"fastlora/{file}.py", right, wrong, tests)
    for (file, tests), copies in COPIES.items()
    for what, right, wrong in copies
]
