# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the command line: a line each, and what must notice it."""

from __future__ import annotations

from broken_copies import Mutant

MUTANTS = [
    Mutant(
        "losses that are not finite are trained on",
        "fastlora/commands/finetune.py",
        "        if not math.isfinite(loss):",
        "        if False:",
        "commands/test_finetune.py::test_a_run_that_diverges_says_so",
    ),
    Mutant(
        "Ctrl-C ends a run without a word",
        "fastlora/commands/finetune.py",
        "    except KeyboardInterrupt:",
        "    except ZeroDivisionError:",
        "commands/test_finetune.py::test_ctrl_c_leaves_a_run_that_goes_on",
    ),
    Mutant(
        "info takes any name for an implementation",
        "fastlora/commands/info.py",
        "            return failures + 1",
        "            return failures",
        "operator/test_unusual_operands.py::test_info_refuses_what_layers_refuse",
    ),
]
