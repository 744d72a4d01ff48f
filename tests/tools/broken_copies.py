# SPDX-License-Identifier: Apache-2.0
"""The broken copies of the code that `mutants.py` tries: what one is, and where they are."""

import importlib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
    """One change of one file; ``tests`` are node ids below tests/, of which one has to fail."""

    what: str
    file: str  # below the root
    right: str
    wrong: str
    tests: str


def mutants() -> list[Mutant]:
    """Return all, from a file for each folder."""
    files = sorted(Path(__file__).parent.glob("broken_*.py"))
    modules = [importlib.import_module(file.stem) for file in files if file != Path(__file__)]
    return [mutant for module in modules for mutant in module.MUTANTS]
