# SPDX-License-Identifier: Apache-2.0
"""Runs a script of this folder where Triton compiles: in a process without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def lines_of(script: str, *arguments: str, given: str | None = None) -> list[Any]:
    """Return what ``script`` prints, a JSON value a line, when it is ``given`` that to read."""
    packages = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": packages}
    command = [sys.executable, str(FOLDER / script), *arguments]
    done = subprocess.run(command, env=environment, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
