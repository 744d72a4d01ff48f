# SPDX-License-Identifier: Apache-2.0
"""Run the tests that need a CUDA GPU with this machine's own PyTorch and Triton (make gpu)."""

import argparse
import importlib.util
import os
import platform
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/kernels/test_gpu.py"
PYTEST = ["-m", "gpu", "--tb=short", "-p", "no:cacheprovider"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 where no test failed, 1 where some did, 5 where none ran, 2 without a GPU."""
    options, rest = parsed(arguments)
    try:
        import torch
    except ImportError:
        print("no CUDA GPU here that PyTorch can use: torch is not installed")
        return 2
    if not torch.cuda.is_available():
        print("no CUDA GPU here")
        return 2
    import side_by_side

    environment = {n: value for n, value in os.environ.items() if n != "TRITON_INTERPRET"}
    if options.sanitizer:
        environment["COMPUTE_SANITIZER"] = "1"
    paths = str(linked_packages()), os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    versions = f"torch {torch.__version__}, triton {triton}, Python {platform.python_version()}"
    where = f"{torch.cuda.get_device_name()}, {versions}"
    print(f"GPU tests on {where}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit: sum up what there is
    code = side_by_side.run(
        lambda: side_by_side.Process([*PYTEST, TESTS, *rest], ROOT, environment),
        options.workers,
        options.minutes,
        600 if options.sanitizer else options.silence,
    )
    print(f"GPU tests {'did not pass' if code else 'passed'} on {where}", flush=True)
    return code


def parsed(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return our own options, and what is left for pytest."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="All other arguments go to pytest.", allow_abbrev=False
    )
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    add = parser.add_argument
    add("--minutes", type=float, default=10, help="begin no test after so long (10)")
    add("--workers", type=int, default=workers, help=f"processes side by side ({workers} here)")
    add("--silence", type=float, default=120, help="seconds in a test before it is ended (120)")
    add("--sanitizer", action="store_true", help="run small cases under compute-sanitizer too")
    return parser.parse_known_args(arguments)


def linked_packages() -> Path:
    """Return a folder that holds links to both packages and nothing else: nothing is installed."""
    folder = ROOT / "build" / "packages"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for package in (ROOT / "fastlora", ROOT / "kernels" / "fastlora_kernels"):
        (folder / package.name).symlink_to(package)
    return folder


if __name__ == "__main__":
    sys.exit(main())
