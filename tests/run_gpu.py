# SPDX-License-Identifier: Apache-2.0
"""Run the tests that need a CUDA GPU with this machine's own PyTorch and Triton (make gpu)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INSTALL = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--editable"]


def main() -> int:
    """Return pytest's exit code, or 2 where there is no GPU to test on."""
    try:
        import torch
    except ImportError:
        print("no CUDA GPU here that PyTorch can use: torch is not installed")
        return 2
    if not torch.cuda.is_available():
        print("no CUDA GPU here")
        return 2
    environment = dict(os.environ)
    pip = [sys.executable, "-m", "pip", *INSTALL, str(ROOT)]
    if subprocess.run(pip, capture_output=True).returncode:
        print("pip could not install the checkout; its folders are used as they are")
        environment["PYTHONPATH"] = str(linked_packages())
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py"]
    code = subprocess.call(command, cwd=ROOT, env=environment)
    verdict = "passed" if code == 0 else f"did not pass (pytest's exit code: {code})"
    print(f"GPU tests {verdict} on {torch.cuda.get_device_name()}, {versions(torch)}")
    return code


def linked_packages() -> Path:
    """Return a folder that holds links to both packages and nothing else."""
    folder = ROOT / "build" / "packages"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "fastlora").symlink_to(ROOT / "fastlora")
    (folder / "fastlora_kernels").symlink_to(ROOT / "kernels" / "fastlora_kernels")
    return folder


def versions(torch) -> str:
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "missing"
    python = ".".join(map(str, sys.version_info[:3]))
    return f"torch {torch.__version__}, triton {triton}, Python {python}"


if __name__ == "__main__":
    sys.exit(main())
