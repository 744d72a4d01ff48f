# SPDX-License-Identifier: Apache-2.0
"""Runs a script of this folder where Triton compiles: in a process without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def lines_of(script: str, *arguments: str) -> list[Any]:
    """Return what ``script`` prints, a JSON value a line."""
    packages = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": packages},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
