# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the package, each of which the tests named beside it must notice.

python tests/tools/mutants.py [TEXT]    # all, or those whose description has TEXT; make mutants

`broken_copies.py` collects them. What the acceptance rule notices of the kernels runs inside the
suite: test_acceptance.py, test_joint_kernels.py and test_joint_persistent.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import same_sums  # noqa: F401 - before what is loaded below
from broken_copies import ROOT, Mutant, mutants

SECONDS = 120  # a test of a mutant that takes longer hangs, which is noticed too


# What the tests import beside the package: loaded once, and there in every forked process.
PRELOADED = ("torch", "pytest", "hypothesis", "safetensors.torch", "peft", "transformers", "triton")


@dataclass(frozen=True)
class Trial:
    """A process that runs a mutant's tests, in a folder of its own."""

    mutant: Mutant
    folder: tempfile.TemporaryDirectory
    until: float

    @property
    def output(self) -> Path:
        return Path(self.folder.name, "output")


def begun(mutant: Mutant, seconds: float = SECONDS) -> tuple[int, Trial]:
    """Start a mutant's tests; return the process's id with it."""
    folder = tempfile.TemporaryDirectory()
    trial = Trial(mutant, folder, time.monotonic() + seconds)
    for package in (ROOT / "fastlora", ROOT / "kernels" / "fastlora_kernels"):
        copy = Path(folder.name, package.name)
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = Path(folder.name, mutant.file.removeprefix("kernels/"))
    text = path.read_text(encoding="utf-8")
    if mutant.right and text.count(mutant.right) != 1:
        sys.exit(f"{mutant.file} has {mutant.right!r} {text.count(mutant.right)} times, not once")
    if mutant.right:
        path.write_text(text.replace(mutant.right, mutant.wrong), encoding="utf-8")
    process = os.fork()
    if process == 0:
        os.setsid()
        with open(trial.output, "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        code = 99
        try:
            code = _tests_of(mutant, folder.name)
        finally:
            os._exit(code)
    return process, trial


def _tests_of(mutant: Mutant, folder: str) -> int:
    import pytest

    sys.path.insert(0, folder)
    # And in the processes that tests start, which must not find the checkout first.
    os.environ |= {"PYTHONPATH": folder, "PYTHONSAFEPATH": "1"}
    os.chdir(ROOT)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    return int(pytest.main([*options, *(f"tests/{test}" for test in mutant.tests.split())]))


def ended(process: int, trial: Trial) -> str | None:
    """Return why a mutant was not noticed; None where a test failed, crashed or hung."""
    finished, status = os.waitpid(process, os.WNOHANG)
    if not finished and time.monotonic() < trial.until:
        return "running"
    with contextlib.suppress(ProcessLookupError):  # what the tests have started, too
        os.killpg(process, signal.SIGKILL)
    if not finished:
        os.waitpid(process, 0)
        return None
    code, said = os.waitstatus_to_exitcode(status), trial.output.read_text()[-400:]
    # 1: tests failed; 2 and above: pytest itself was stopped, or found no such test.
    return None if code in (1, -signal.SIGSEGV, -signal.SIGABRT) else f"exit code {code}: {said}"


def main(text: str = "") -> None:
    waiting = [m for m in mutants() if text in m.what][::-1]
    started, alive, count, running = time.perf_counter(), 0, len(waiting), {}
    if not waiting:
        sys.exit(f"no mutant's description contains {text!r}")
    os.environ["TRITON_INTERPRET"] = "1"
    for name in PRELOADED:
        __import__(name)
    try:
        # The same tests on the code as it is, so that what fails below fails for the change.
        tests = " ".join(dict.fromkeys(test for m in waiting for test in m.tests.split()))
        process, trial = begun(Mutant("nothing", "fastlora/files.py", "", "", tests), 10 * SECONDS)
        running[process] = trial
        while (why := ended(process, trial)) == "running":
            time.sleep(0.1)
        del running[process]
        if why is None or not why.startswith("exit code 0"):
            sys.exit(f"the tests fail without a change: {trial.output.read_text()[-2000:]}")
        trial.folder.cleanup()
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                process, trial = begun(waiting.pop())
                running[process] = trial
            time.sleep(0.02)
            for process, trial in list(running.items()):
                why = ended(process, trial)
                if why == "running":
                    continue
                del running[process]
                trial.folder.cleanup()
                if why is not None:
                    alive += 1
                    where = f"{trial.mutant.what} ({trial.mutant.file})"
                    print(f"NOT NOTICED: {where}: {why}", flush=True)
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
    seconds = time.perf_counter() - started
    print(f"{count - alive} of {count} mutants noticed, {seconds:.0f} s")
    sys.exit(alive > 0 or not count)


if __name__ == "__main__":
    main(*sys.argv[1:])
