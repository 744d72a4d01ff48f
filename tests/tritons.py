# SPDX-License-Identifier: Apache-2.0
"""The oldest and the newest Triton that is supported: import, compile, interpret.

python tests/tritons.py [VERSION ...]    # make tritons; no GPU

A CPU build of the torch that goes with each need not exist, so each Triton is put beside the torch
that is here. Kernels are compiled for sm_80, sm_90 and sm_100 with their default configs: an error
is one, a spill is only counted, for tile shapes are chosen for the Triton of constraints.txt. The
acceptance rule is then applied in that Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
VERSIONS = ("3.4.0", "3.9.0")
SUITE = ("test_kernels.py", "test_persistent.py", "test_joint_kernels.py")
SUITE += ("test_joint_persistent.py",)


def installed(version: str) -> Path:
    """Return a folder with that Triton alone."""
    folder = Path(sys.prefix, "tritons", version)
    if not (folder / "triton").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--target", folder, f"triton=={version}"], check=True)
    return folder


def compiled(environment: dict) -> str:
    """Return what came of compiling the kernels, or raise where one does not compile."""
    command = [sys.executable, str(HERE / "compiled_cases.py"), "0", "1"]
    run = subprocess.run(
        command,
        env={**environment, "TRITON_INTERPRET": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    _, *reports = map(json.loads, run.stdout.splitlines())
    reports = [r for r in reports if r["capability"] != "gfx942"]
    spills = [r for r in reports if r["stack"]]
    most = max((r["stack"] for r in spills), default=0)
    return f"{len(reports)} programs, {len(spills)} of them spill, {most} bytes at most"


def main(*versions: str) -> None:
    failed = []
    for version in versions or VERSIONS:
        paths = [str(installed(version)), str(HERE.parent / "kernels"), str(HERE.parent)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        found = "import triton; print(triton.__version__)"
        shown = subprocess.run(
            [sys.executable, "-c", found], env=environment, capture_output=True, text=True
        ).stdout.strip()
        if shown != version:
            sys.exit(f"Triton {version} was asked for, {shown or 'none'} is imported")
        try:
            print(f"Triton {version}: {compiled(environment)}", flush=True)
        except subprocess.CalledProcessError:
            failed.append(f"{version}: compiling")
        tests = [f"tests/{name}" for name in SUITE]
        command = [sys.executable, "-m", "pytest", "-q", *tests, "-k", "acceptance or exact"]
        if subprocess.run(command, cwd=HERE.parent, env=environment).returncode:
            failed.append(f"{version}: the acceptance rule")
    print("failed: " + ", ".join(failed) if failed else "all right")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(*sys.argv[1:])
