# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the package's front: a line each, and what must notice it."""

from __future__ import annotations

from broken_copies import Mutant

MUTANTS = [
    Mutant(
        "y keeps the rows of x only",
        "fastlora/functional.py",
        "(y, (*shape[:-1], y.shape[1]))",
        "(y, (-1, y.shape[1]))",
        "operator/test_operator.py::test_leading_dimensions",
    ),
    Mutant(
        "autocast rounds float32 adapters",
        "fastlora/functional.py",
        "if lora_A is not None and lora_A.dtype != torch.float32:",
        "if lora_A is not None:",
        "operator/test_operator.py::test_float32_adapters_keep_their_precision_under_autocast",
    ),
    Mutant(
        "a rank of b other than a's is taken",
        "fastlora/functional.py",
        "            and lora_B.shape == (w[0], a[0])",
        "            and lora_B.shape[0] == w[0]",
        "operator/test_operator.py::test_wrong_arguments",
    ),
    Mutant(
        "a scaling that is not finite is taken",
        "fastlora/functional.py",
        "        and -LARGEST <= scaling <= LARGEST",
        "        and True",
        "operator/test_operator.py::test_wrong_arguments",
    ),
    Mutant(
        "processes that tune at once lose each other's results",
        "fastlora/files.py",
        "            while not _taken(handle, kind | fcntl.LOCK_NB) and time.monotonic() < until:",
        "            while False:",
        "operator/test_measured.py::test_processes_that_measure_at_once_keep_each_others_results",
    ),
    Mutant(
        "processes that save at once mix their files",
        "fastlora/files.py",
        "            while not _taken(handle, kind | fcntl.LOCK_NB) and time.monotonic() < until:",
        "            while False:",
        "test_faults.py::test_two_processes_save_while_a_third_reads",
    ),
    Mutant(
        "processes write to one temporary file",
        "fastlora/files.py",
        'f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"',
        'f".{path.name}.tmp"',
        "test_faults.py::test_a_file_replaced_while_another_process_replaces_it",
    ),
    Mutant(
        "a file has its name before it is whole",
        "fastlora/files.py",
        "        os.replace(temporary, path)\n    except BaseException:",
        "    except BaseException:",
        "test_faults.py",
    ),
    Mutant(
        "a scaling becomes part of the compiled graph",
        "fastlora/functional.py",
        "lora_A, lora_B = with_scaling(lora_A, lora_B, scaling)",
        "lora_B = lora_B * scaling if scaling != 1 else lora_B",
        "operator/test_operator.py::test_a_scaling_tensor_never_recompiles",
    ),
    Mutant(
        "outputs are views",
        "fastlora/functional.py",
        "return _unsafe_view(y, (*shape[:-1], y.shape[1]))",
        "return y.reshape(*shape[:-1], y.shape[1])",
        "operator/test_unusual_operands.py::test_outputs_are_no_views",
    ),
    Mutant(
        "autocast casts anything",
        "fastlora/functional.py",
        "_CAST = (torch.float32, torch.bfloat16, torch.float16)",
        "_CAST = tuple(v for v in vars(torch).values() if isinstance(v, torch.dtype))",
        "operator/test_unusual_operands.py::test_autocast_casts_what_pytorch_s_casts "
        "operator/test_unusual_operands.py::test_autocast_leaves_float64_alone",
    ),
    Mutant(
        "scalings beyond float32 are taken",
        "fastlora/functional.py",
        "LARGEST = torch.finfo(torch.float32).max",
        "LARGEST = math.inf",
        "operator/test_unusual_operands.py::test_scalings_that_no_kernel_takes",
    ),
]
