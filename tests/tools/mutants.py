# SPDX-License-Identifier: Apache-2.0
"""Broken copies of the package, each of which the tests named beside it must notice.

python tests/tools/mutants.py [TEXT]    # all, or those whose description has TEXT; make mutants
python tests/tools/mutants.py --tested    # where the suite has just passed: not all of it once more

`broken_copies.py` collects them. What the acceptance rule notices of the kernels runs inside the
suite: test_acceptance.py and test_wrong_kernels.py.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import same_sums  # noqa: F401 - before what is loaded below
from broken_copies import ROOT, Mutant, mutants

SECONDS = 120  # a test of a mutant that takes longer hangs, which is noticed too
# What the tests import beside the package: loaded once, and there in every forked process.
PRELOADED = ("torch", "pytest", "hypothesis", "safetensors.torch", "peft", "transformers", "triton")


class Trial:
    """A process that runs a mutant's tests, in a folder of its own."""

    def __init__(self, mutant: Mutant, seconds: float) -> None:
        self.mutant, self.until = mutant, time.monotonic() + seconds
        self.folder = tempfile.TemporaryDirectory()
        self.output = Path(self.folder.name, "output")
        for package in (ROOT / "fastlora", ROOT / "kernels" / "fastlora_kernels"):
            copy = Path(self.folder.name, package.name)
            shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant.right:
            path = Path(self.folder.name, mutant.file.removeprefix("kernels/"))
            text = path.read_text(encoding="utf-8").replace(mutant.right, mutant.wrong)
            path.write_text(text, encoding="utf-8")
        self.process = multiprocessing.get_context("fork").Process(target=self.tests)
        self.process.start()

    def tests(self) -> None:
        import pytest

        os.setsid()
        with open(self.output, "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        sys.path.insert(0, self.folder.name)
        # And in the processes that tests start, which must not find the checkout first.
        os.environ |= {"PYTHONPATH": self.folder.name, "PYTHONSAFEPATH": "1"}
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        os.chdir(ROOT)
        # Without what takes most of the time of a short test: explained assertions, plugins.
        options = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider"]
        options += ["-p", "no:unraisableexception"]  # it collects the garbage of all that is loaded
        sys.exit(pytest.main([*options, *(f"tests/{t}" for t in self.mutant.tests.split())]))

    def ended(self) -> int | None:
        """Return the exit code, 1 of one that hangs; None while it runs."""
        hangs = self.process.is_alive()
        if hangs and time.monotonic() < self.until:
            return None
        self.kill()
        self.process.join()
        return 1 if hangs else self.process.exitcode

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # what the tests have started, too
            os.killpg(self.process.pid, signal.SIGKILL)


def codes(of: list[Mutant], seconds: float = SECONDS) -> Iterator[tuple[Mutant, int, str]]:
    """Yield each mutant with its tests' exit code and output, as they end."""
    waiting, running = of[::-1], []
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                running.append(Trial(waiting.pop(), seconds))
            time.sleep(0.02)
            for trial in list(running):
                if (code := trial.ended()) is not None:
                    running.remove(trial)
                    yield trial.mutant, code, trial.output.read_text()
                    trial.folder.cleanup()
    finally:
        for trial in running:
            trial.kill()


def main(text: str = "") -> None:
    tested = text == "--tested"
    chosen = [m for m in mutants() if tested or text in m.what]
    started, alive = time.perf_counter(), 0
    if not chosen:
        sys.exit(f"no mutant's description contains {text!r}")
    os.environ["TRITON_INTERPRET"] = "1"
    for name in PRELOADED:
        __import__(name)
    # The same tests on the code as it is, so that what fails below fails for the change; of a
    # suite that has passed, one for each folder, so that it is not for the place.
    tests = dict.fromkeys(test for m in chosen for test in m.tests.split())
    if tested:
        tests = {test.rpartition("/")[0]: test for test in [*tests][::-1]}.values()
    for _, code, said in codes([Mutant("nothing", "", "", "", " ".join(tests))], 10 * SECONDS):
        if code:
            sys.exit(f"the tests fail without a change: {said[-2000:]}")
    for mutant, code, said in codes(chosen):
        # 1: tests failed; 2 and above: pytest itself was stopped, or found no such test.
        if code not in (1, -signal.SIGSEGV, -signal.SIGABRT):
            alive += 1
            where = f"{mutant.what} ({mutant.file}): exit code {code}"
            print(f"NOT NOTICED: {where}: {said[-400:]}", flush=True)
    seconds = time.perf_counter() - started
    print(f"{len(chosen) - alive} of {len(chosen)} mutants noticed, {seconds:.0f} s")
    sys.exit(alive > 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
