# SPDX-License-Identifier: Apache-2.0
"""PEFT's own tests, with every LoRA linear fused: nobody can tell, but for the calls counted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import peft
import pytest

SOURCE = Path(sys.prefix) / "peft-source" / f"peft-{peft.__version__}.tar.gz"
TOOLS = Path(__file__).parents[1] / "tools"
FILES = ("test_custom_models.py", "testing_common.py", "testing_utils.py")
# Calls of plain LoRA on linear layers, with adapters that are neither merged nor disabled.
FUSED = {"0.21.2": 762}


def test_peft_s_own_tests(tmp_path):
    if not SOURCE.exists():
        pytest.skip(f"PEFT's source distribution is not in {SOURCE.parent}; `make test` fetches it")
    if peft.__version__ not in FUSED:
        pytest.skip(f"how many calls are fused is not known for PEFT {peft.__version__}")
    folder = tmp_path / "peft_tests"
    folder.mkdir()
    (folder / "__init__.py").touch()
    with tarfile.open(SOURCE) as archive:
        for name in FILES:
            member = archive.extractfile(f"peft-{peft.__version__}/tests/{name}")
            (folder / name).write_bytes(member.read())
    offline = {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1] / 'tools'}",
    }
    options = ["-q", "-W", "ignore", "-p", "peft_suite", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(folder / FILES[0])],
        cwd=tmp_path,
        env=os.environ | offline,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 1800
    calls = re.search(r"calls: (\d+) fused, (\d+) unpatched", run.stdout)
    assert [*map(int, calls.groups())] == [FUSED[peft.__version__], 0]
