# SPDX-License-Identifier: Apache-2.0
"""Runs tests in several processes that share a GPU, and says at once what fails: see run_gpu.py.

Every process collects all tests and is then told which to run, one by one: the first that none has
begun yet. One that ends, or says nothing for too long, costs the test that it was told last.
"""

import contextlib
import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest

START = 300.0  # seconds in which a process has to import everything
LINES = 15  # of a failure
PR_SET_PDEATHSIG = 1


class Told:
    """A plugin of pytest that runs what it is told to by the other end of a connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.connection.send(("report", report.nodeid, "failed", _last_lines(report)))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session) -> bool:
        items = {item.nodeid: item for item in session.items}
        large = {name for name, item in items.items() if item.get_closest_marker("large")}
        self.connection.send(("collected", list(items), large))
        while name := self.connection.recv():
            items[name].ihook.pytest_runtest_protocol(item=items[name], nextitem=None)
            if fault := _fault_of_gpu():
                self.connection.send(("report", name, "failed", fault))
                os._exit(1)
            self.connection.send(("done", bool(session.shouldfail or session.shouldstop)))
        return True

    def pytest_runtest_logreport(self, report) -> None:
        text = _last_lines(report) if report.failed else ""
        if report.skipped:
            text = report.longrepr[2].removeprefix("Skipped: ")
        if report.when == "call" or not report.passed:
            self.connection.send(("report", report.nodeid, report.outcome, text))


def _last_lines(report) -> str:
    said = dict(report.sections).get("Captured stderr call", "")
    return "\n".join(said.splitlines()[-LINES:] + report.longreprtext.splitlines()[-LINES:])


def _fault_of_gpu() -> str:
    """Give the GPU's memory back to the other processes; return what has broken it for this one."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError as error:
        return str(error)
    return ""


class Process:
    """A process of pytest's, and what it was told."""

    def __init__(self, arguments: Sequence[str], folder: Path, environment: Mapping) -> None:
        self.connection, theirs = Pipe()
        self.output = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the process
        fd, none = theirs.fileno(), subprocess.DEVNULL
        command = [sys.executable, __file__, str(fd), *arguments]
        said = {"stdin": none, "stdout": self.output, "stderr": subprocess.STDOUT}
        # A session of its own: what it starts ends with it.
        options = {"cwd": folder, "env": environment, "pass_fds": [fd], "start_new_session": True}
        self.popen = subprocess.Popen(command, **said, **options)
        theirs.close()
        self.collected = self.ready = False  # to be told a test
        self.test: str | None = None
        self.heard = time.monotonic()

    def tell(self, test: str | None) -> None:
        self.test, self.ready, self.heard = test, False, time.monotonic()
        with contextlib.suppress(OSError):  # it has ended: `Tests.listen` will notice
            self.connection.send(test)

    def end(self, where: bool = False) -> str:
        """End it and all that it has started; return its last words, ``where`` it was if asked."""
        if where:
            self.popen.send_signal(signal.SIGABRT)  # faulthandler answers
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it
            self.popen.wait(10)
        self.connection.close()
        self.output.seek(0)
        said = self.output.read().decode(errors="replace")
        self.output.close()
        _, fatal, where_it_was = said.rpartition("Fatal Python error")
        lines = (fatal + where_it_was).splitlines()
        return "\n".join(lines[:LINES] if fatal else lines[-LINES:])


class Tests:
    """What is known of the tests, and the processes that run them."""

    def __init__(self, start, minutes: float, silence: float) -> None:
        self.start, self.silence, self.began = start, silence, time.monotonic()
        self.until, self.stopped = self.began + 60 * minutes, False
        self.processes: list[Process] = []
        self.waiting: list[str] | None = None  # None: not collected yet
        self.large: set[str] = set()
        self.outcomes: dict[str, str] = {}
        self.reasons: Counter[str] = Counter()

    def over(self) -> bool:
        return self.stopped or time.monotonic() > self.until

    def listen(self) -> None:
        """Take what the processes say, and tell those that are ready what comes next."""
        there = wait([process.connection for process in self.processes], timeout=1)
        for process in list(self.processes):
            limit = self.silence if process.test else START
            if process.connection in there:
                try:
                    what, *rest = process.connection.recv()
                except (EOFError, OSError):
                    code = process.popen.wait()
                    self.lose(process, process.end(), f"the process has ended: exit code {code}")
                    continue
                process.heard = time.monotonic()
                getattr(self, what)(process, *rest)
            elif not process.ready and time.monotonic() - process.heard > limit:
                words = process.end(where=True)
                self.lose(process, words, f"ended: nothing was heard for {limit:.0f} s")
        for process in self.processes:
            if process.ready and (self.over() or not self.waiting):
                process.tell(None)
            elif process.ready and (test := self.next()):
                process.tell(test)

    def next(self) -> str | None:
        """Return a test that fits beside those that run: large ones run one at a time."""
        full = any(process.test in self.large for process in self.processes)
        test = next((test for test in self.waiting if not (full and test in self.large)), None)
        if test is not None:
            self.waiting.remove(test)
        return test

    def collected(self, process: Process, tests: list[str], large: set[str]) -> None:
        process.collected = process.ready = True
        if self.waiting is None:
            self.waiting, self.large = tests, large
            print(f"{len(tests)} tests by {len(self.processes)} processes", flush=True)

    def report(self, process: Process, test: str, outcome: str, text: str) -> None:
        """Print a failure at once and whole: it may be the last that is heard of the run."""
        if outcome == "failed":
            if self.outcomes.get(test) != "failed":
                lines = (f"    {line}"[:400] for line in text.splitlines())
                print(f"FAILED {test}", *lines, sep="\n", flush=True)
            self.outcomes[test] = "failed"
        elif self.outcomes.setdefault(test, outcome) == "skipped":
            self.reasons[text] += 1

    def done(self, process: Process, stop: bool) -> None:
        process.test, process.ready, self.stopped = None, True, self.stopped or stop

    def lose(self, process: Process, words: str, why: str) -> None:
        """Go on without a process that has ended, or with another one in its place."""
        self.processes.remove(process)
        if process.test is not None:
            self.report(process, process.test, "failed", f"{words}\n{why}")
        if not process.collected:  # nor would another one
            self.report(process, "the start of a process", "failed", f"{words}\n{why}")
        elif self.waiting and not self.over():
            self.processes.append(self.start())

    def summary(self) -> int:
        """Print what became of all tests; return 0, 1 where some failed, 5 where none ran."""
        for reason, count in self.reasons.items():
            print(f"skipped {count}: {reason}")
        not_run = defaultdict(list)  # by function: what its tests' names begin with
        for function, _, rest in (test.partition("[") for test in self.waiting or ()):
            not_run[function].append(re.split(r"[-(\]]", rest)[0])
        for function, tests in not_run.items():
            print(f"not run: {len(tests)} of {function}: {', '.join(dict.fromkeys(tests))}")
        failed = [test for test, outcome in self.outcomes.items() if outcome == "failed"]
        print(*(f"failed: {test}\n" for test in failed), sep="", end="")
        counts = Counter(self.outcomes.values()) + Counter({"not run": len(self.waiting or ())})
        said = ", ".join(f"{count} {what}" for what, count in counts.items()) or "nothing ran"
        print(f"{said} in {time.monotonic() - self.began:.0f} s", flush=True)
        return 1 if failed else 0 if counts["passed"] else 5


def run(start: Callable[[], Process], workers: int, minutes: float, silence: float) -> int:
    """Run the tests by as many processes as ``workers``; return an exit code.

    After ``minutes`` no test is begun. A process that says nothing for ``silence`` seconds is
    ended, and its test has failed. 0: none failed; 1: some did; 5: none ran.
    """
    tests = Tests(start, minutes, silence)
    try:
        tests.processes += [tests.start() for _ in range(workers)]
        while tests.processes:
            tests.listen()
    except KeyboardInterrupt:
        running = [process.test for process in tests.processes if process.test is not None]
        print("interrupted in", ", ".join(running) or "no test", flush=True)
    finally:
        for process in tests.processes:
            process.end()
    return tests.summary()


def told(fd: int, arguments: Sequence[str]) -> int:
    """Be one of the processes."""
    os.set_inheritable(fd, False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # a test that hangs does not outlive who would end it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(EOFError):  # nobody is left to tell
        return pytest.main(["-q", *arguments], plugins=[Told(Connection(fd))])
    return 1


if __name__ == "__main__":
    sys.exit(told(int(sys.argv[1]), sys.argv[2:]))
