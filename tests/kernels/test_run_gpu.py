# SPDX-License-Identifier: Apache-2.0
"""`make gpu` without a GPU: how it runs tests, and what its own tests would compile and cover."""

import itertools
import os
import subprocess
from pathlib import Path

import aot
import pytest
import run_gpu
import side_by_side
import torch
from fastlora_kernels import configs
from uninterpreted import lines_of

ROOT = Path(__file__).parents[2]
# Half a second to compile a program and as much for the C code that launches it (Triton 3.6):
# 785 × (0.5 s + 0.5 s) / 8 processes = 98 s. A third is compiled by two processes at once, and the
# tests themselves take about a minute and a half: 220 s of the 600 s, were the machine as fast.
MOST_PROGRAMS = 785

FAKE = """
import ctypes, os, time
import pytest

pytestmark = pytest.mark.gpu

def test_wrong():
    assert 1 == 2, "one is not two"

def test_hang():
    time.sleep(1000)

def test_exit():
    os._exit(7)

def test_crash():
    ctypes.string_at(0)

@pytest.mark.skip(reason="for a reason")
def test_skipped():
    pass

@pytest.mark.parametrize("kernel", ["a-1", "a-2", "b-1"])
def test_right(kernel):
    assert os.environ["PYTHONPATH"].split(os.pathsep)[1:] == ["before"]
"""


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """What `make gpu` returns and says on a machine with a GPU, of tests in place of ours."""
    (tmp_path / "test_fake.py").write_text(FAKE)
    monkeypatch.setattr(run_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(run_gpu, "TESTS", "test_fake.py")
    monkeypatch.setattr(run_gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setenv("PYTHONPATH", "before")
    return lambda *arguments: (run_gpu.main(arguments), capsys.readouterr().out)


def test_without_a_gpu(said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert said() == (2, "no CUDA GPU here\n")


def test_what_fails_is_said_at_once_and_costs_no_other_test(said):
    code, out = said("--workers", "2", "--silence", "3")
    lines = [line.strip() for line in out.splitlines()]
    failures = {}
    for i, line in enumerate(lines):
        if line.startswith("FAILED test_fake.py::test_"):
            failures[line.removeprefix("FAILED test_fake.py::test_")] = lines[i + 1 : i + 18]
    assert code == 1 and failures.keys() == {"wrong", "hang", "exit", "crash"}
    assert list(failures)[-1] == "hang"  # the others are not kept until it has ended
    assert "E   AssertionError: one is not two" in failures["wrong"][:4]
    assert "the process has ended: exit code 7" in failures["exit"]
    assert failures["crash"][0] == "Fatal Python error: Segmentation fault"
    assert any(line.endswith("in test_hang") for line in failures["hang"])
    assert "ended: nothing was heard for 3 s" in failures["hang"]
    assert "skipped 1: for a reason" in lines
    assert all(f"failed: test_fake.py::test_{name}" in lines for name in failures)
    assert all(count in lines[-2] for count in ("4 failed", "3 passed", "1 skipped"))
    assert lines[-1].startswith("GPU tests did not pass on a GPU, torch ")


def test_other_arguments_go_to_pytest(said):
    code, out = said("-k", "right and a-", "--workers", "1")
    assert code == 0 and "\n2 passed in " in out
    code, out = said("-k", "wrong or right", "-x", "--workers", "1")
    assert code == 1 and "not run: 3 of test_fake.py::test_right: a, b\n" in out
    assert "1 failed, 3 not run in " in out


def test_nothing_begins_when_the_minutes_are_over(said):
    code, out = said("--minutes", "0", "--workers", "1", "-k", "right")
    assert code == 5 and "not run: 3 of test_fake.py::test_right" in out


def test_what_cannot_start_is_said(said):
    code, out = said("--unheard-of", "--workers", "1")
    assert code == 1 and "error: unrecognized arguments: --unheard-of" in out


def test_an_interrupted_run_is_summed_up(said, monkeypatch):
    processes = []

    def listen(tests):
        processes.extend(tests.processes)
        raise KeyboardInterrupt

    monkeypatch.setattr(side_by_side.Tests, "listen", listen)
    code, out = said("--workers", "1")
    assert code == 5 and "interrupted in no test\nnothing ran in " in out
    assert processes[0].popen.poll() is not None


def test_large_ones_run_one_at_a_time():
    tests = side_by_side.Tests(None, 1, 1)
    tests.waiting, tests.large = ["large 1", "large 2", "small"], {"large 1", "large 2"}
    process = type("", (), {"test": None})()
    tests.processes = [process]
    process.test = tests.next()
    assert process.test == "large 1" and tests.next() == "small" and tests.next() is None
    process.test = None
    assert tests.next() == "large 2"


def test_make_passes_its_arguments_on():
    command = ["make", "--no-print-directory", "-n", "gpu", "PYTHON=python", "ARGS=-k ranks -x"]
    # Without what `make test` tells those below it.
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("MAKE", "MFLAGS"))}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, **options, check=True)
    assert done.stdout == "python tests/tools/run_gpu.py -k ranks -x\n"


@pytest.fixture(scope="module")
def recorded():
    """What each test of test_gpu.py would launch on an H100."""
    return lines_of("gpu_programs.py")


def test_programs_are_few(recorded):
    assert not [(one["test"], one["error"]) for one in recorded if "error" in one]
    assert not [one["test"] for one in recorded if "skipped" in one]
    programs = {program for one in recorded for program in one["programs"]}
    assert 200 < len(programs) <= MOST_PROGRAMS


def test_every_kernel_comes_first(recorded):
    functions = list(dict.fromkeys(one["test"].partition("[")[0] for one in recorded))
    contacts = [function for function in functions if function.startswith("test_first_contact")]
    assert contacts == functions[:4]
    first = [one for one in recorded if one["test"].startswith("test_first_contact")]
    kernels = [{kernel for one in of for kernel, _ in one["launched"]} for of in (first, recorded)]
    assert kernels[0] == kernels[1]


def test_every_config_runs(recorded):
    """Each that the tuner may try on an H100, for each kind, by its own kernel."""
    ran, anywhere = set(), set()
    for one in recorded:
        of = tuple(one["params"].get(name, "") for name in ("launcher", "kind", "count"))
        anywhere |= {config for _, config in one["launched"]}
        ran |= {(*of, c) for kernel, c in one["launched"] if kernel.endswith(f"{of[0]}_kernel")}
    launchers = [name for names in configs.LAUNCHERS.values() for name in names]
    problems = launchers, ("16", "fp16", "mixed", "32"), (1, 3), (8, 16, 32, 64, 128, 512)
    for launcher, kind, count, *problem in itertools.product(*problems, (False, True)):
        for config in configs.candidates(launcher, kind, *problem, aot.CHIPS[90], count):
            several = count if launcher != "ds_db" else 1  # it has a launch for each
            assert (launcher, kind, str(several), str(config)) in ran
    assert {str(config) for config in configs.DEFAULTS["outputs", "unaligned"]} <= anywhere
