# SPDX-License-Identifier: Apache-2.0
"""What is measured on this machine, by the tuner or on first use, and the file that keeps it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from measuring import CPU, GROUP, PROBLEM, SMALL, chosen, operands, timings

import fastlora
from fastlora.operator import library, measured, plans, tuning

pytestmark = pytest.mark.usefixtures("empty_cache")
ALL = {"blocks", "library", "triton"}


def tune_one(problem=SMALL, say=lambda text: None):
    ((_, found, _),) = tuning.tune([problem], CPU, say, seconds=0.0)
    return found


def read_again():
    """Forget what this process knows: another one reads the file."""
    measured._loaded.clear()


# What is measured


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("problem", [SMALL._replace(M=12), GROUP], ids=["one", "group"])
def test_the_tuner_measures_every_implementation_and_keeps_it(problem, dropout):
    """And, of one projection, every config of each of the kernels' steps."""
    problem, state = problem._replace(dropout=dropout), torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which changes nothing
        found = tune_one(problem)
    assert torch.equal(torch.get_rng_state(), state)
    for op in ("forward", "backward"):
        assert found[op].keys() == ALL and all(0 < time < 60 for time in found[op].values())
    steps = {"shrink", "outputs", "ds_db", "da", "input_grad"}
    assert found["configs"].keys() == (set() if problem.others else steps)
    read_again()
    assert measured.find(problem, CPU) == found
    assert measured.known(CPU).keys() == {str(problem.bucketed())}


def test_a_config_that_fails_is_left_out_and_named_once(monkeypatch):
    """Too much shared memory, out of memory, a compiler's error: measured with the others."""
    from fastlora_kernels import steps

    right, said = steps.shrink, []

    def shrink(*args, configs=None, **rest):
        if configs and configs["shrink"].num_warps == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return right(*args, **({"configs": configs} if configs else {}), **rest)

    listed = plans.candidates(SMALL, CPU)["shrink"]
    monkeypatch.setattr(plans, "candidates", lambda *_: {"shrink": listed})
    monkeypatch.setattr(steps, "shrink", shrink)
    problems = [SMALL._replace(M=m, adapter=torch.bfloat16) for m in (16, 32)]
    for _, found, _ in tuning.tune(problems, CPU, said.append, seconds=0.0):
        assert found["configs"]["shrink"]["num_warps"] != 8
    (text,) = said
    assert text.startswith("left out shrink, Config(") and text.endswith("allocate 2 GiB.")


def test_an_implementation_that_fails_is_left_out(monkeypatch):
    def fails(*args, **rest):
        raise RuntimeError("out of resource: shared memory\nand more")

    said = []
    monkeypatch.setattr(library, "outputs", fails)
    assert tune_one(say=said.append)["forward"].keys() == {"blocks", "triton"}
    assert said == [f"left out {SMALL}, library: RuntimeError: out of resource: shared memory"]


def test_a_problem_that_does_not_fit_is_left_out(empty_cache):
    said = []
    assert tune_one(SMALL._replace(M=1 << 45), said.append) is None
    assert len(said) == 1 and "left out" in said[0] and not empty_cache.exists()


def test_few_tokens_are_timed_with_the_host(monkeypatch):
    asked = []

    def interleaved(steps, *_, with_host=False, **__):
        asked.append(with_host)
        return {impl: [(1.0, 1.0)] for impl in steps}

    monkeypatch.setattr(tuning, "interleaved", interleaved)
    monkeypatch.setattr(tuning, "host_counts", lambda tokens, device: tokens <= 16)
    for m in (16, 32):
        tune_one(GROUP._replace(M=m))
    assert asked == [True, False]


def test_what_is_measured_is_planned_with(monkeypatch):
    """Also by layers that have run before."""
    x, *rest = operands(16)
    fastlora.lora_linear(x, *rest)
    monkeypatch.setattr(tuning, "_measure", lambda *_: timings())
    tune_one(PROBLEM._replace(M=16))
    fastlora.lora_linear(x, *rest)
    (pair,) = plans._found.values()
    assert pair.forward[0].__name__ == "fastlora_kernels.steps"


# On first use


def test_tuning_on_first_use(monkeypatch, capsys):
    monkeypatch.setattr(plans, "on_first_use", tuning.tune_on_first_use)
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    x, w, a, b = operands()
    fastlora.explain((48, 32), 64, device="cpu")
    fastlora.lora_linear(x, w, a, b, impl="blocks")
    assert measured.find(PROBLEM, CPU) is None
    state, before, results = torch.get_rng_state(), [t.clone() for t in (x, w, a, b)], []
    for _ in range(2):
        a.grad = None
        y = fastlora.lora_linear(x, w, a.requires_grad_(), b)
        y.sum().backward()
        results.append((y.detach(), a.grad))
    assert all(map(torch.equal, *results)) and all(map(torch.equal, before, (x, w, a, b)))
    assert torch.equal(torch.get_rng_state(), state)
    said = f"fastlora: measuring {PROBLEM} on first use (FASTLORA_TUNE=1)\n"
    assert capsys.readouterr().err == said
    assert measured.find(PROBLEM, CPU) is not None


def test_a_problem_that_fails_is_tried_once(monkeypatch, capsys):
    tries = []
    monkeypatch.setattr(plans, "on_first_use", tuning.tune_on_first_use)
    monkeypatch.setattr(tuning, "_measure", lambda problem, *_: tries.append(problem))
    x, w, a, b = operands()
    for r in (16, 12, 9):
        fastlora.lora_linear(x, w, a[:r].requires_grad_(), b[:, :r]).sum().backward()
    assert tries == [PROBLEM] and len(capsys.readouterr().err.splitlines()) == 1


# The file


def test_nothing_is_written_before_anything_is_measured(empty_cache):
    fastlora.lora_linear(*operands())
    assert not empty_cache.exists()


ROW = timings()
BAD = {
    "not JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "empty": b"",
    "deep": b"[" * 100_000,
    "too large": b"{}" + b" " * (16 << 20),
    "a list": [ROW],
    "a problem that is a number": {"16 x 16 x 16": 7},
    "without a direction": {"a": {"forward": {}, "configs": {}}},
    "a time that is none": {"a": timings({"blocks": -1.0})},
    "a time that is NaN": {"a": timings({"blocks": float("nan")})},
    "a time of text": {"a": timings({"blocks": "1"})},
    "an implementation that is none": {"a": timings({"numpy": 1.0})},
    "times in a list": {"a": timings([1.0])},
    "configs in a list": {"a": {**ROW, "configs": ["shrink"]}},
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_does_not_parse_is_ignored_with_one_warning(what):
    path, bad = measured.add({PROBLEM: ROW}, CPU), BAD[what]
    path.write_bytes(bad if isinstance(bad, bytes) else json.dumps(bad).encode())
    read_again()
    with pytest.warns(UserWarning, match="is not used, nor kept") as said:
        assert measured.find(PROBLEM, CPU) is None
        assert chosen() == "blocks"
        assert measured.add({PROBLEM: ROW}, CPU) == path
    assert len(said) == 1 and str(said[0].message).isprintable()
    read_again()
    assert measured.find(PROBLEM, CPU) == ROW


@pytest.mark.parametrize("what", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(what):
    path = measured.add({PROBLEM: ROW}, CPU)
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe" and hasattr(os, "mkfifo"):
        os.mkfifo(path)
    elif what == "device" and Path("/dev/zero").exists():
        path.symlink_to("/dev/zero")
    else:
        pytest.skip(f"the system has no {what}")
    read_again()
    with pytest.warns(UserWarning, match="is not used.*not a file"):
        assert measured.find(PROBLEM, CPU) is None


@pytest.mark.parametrize("part", ["device", "driver", "triton", "torch", "fastlora"])
def test_measurements_of_other_versions_lie_in_another_file(part, monkeypatch):
    device = torch.device("cuda") if part == "driver" else CPU
    monkeypatch.setattr(measured, "device_name", lambda device: "a chip")
    first = measured.add({PROBLEM: ROW}, device)
    holder, name, other = {
        "device": (measured, "device_name", lambda device: "device 999"),
        "driver": (measured, "driver", lambda: "999"),
        "triton": (measured, "version_of", lambda name: "999"),
        "torch": (torch, "__version__", "999"),
        "fastlora": (fastlora, "__version__", "999"),
    }[part]
    monkeypatch.setattr(holder, name, other)
    read_again()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured.find(PROBLEM, device) is None
        second = measured.add({PROBLEM._replace(M=128): ROW}, device)
    assert f"{part}-999" in second.name
    assert len(json.loads(first.read_text())) == len(json.loads(second.read_text())) == 1


def test_a_thread_waits_for_what_another_reads(monkeypatch):
    """Nobody plans with half of what was measured, and what is added meanwhile stays."""
    own, reading = measured._read, threading.Event()
    measured.add({PROBLEM: ROW}, CPU)

    def slowly(*args):
        reading.set()
        time.sleep(0.2)
        return own(*args)

    read_again()
    monkeypatch.setattr(measured, "_read", slowly)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(measured.find, PROBLEM, CPU)
        reading.wait()
        assert measured.find(PROBLEM, CPU) is not None
        measured.add({SMALL: ROW}, CPU)
        assert first.result() is not None
    assert measured.find(SMALL, CPU) is not None and measured.find(PROBLEM, CPU) is not None


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    """The measurements hold for the process; the warning says where and what to do."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"cannot be kept in .*this process.*; FASTLORA_CACHE"):
        assert measured.add({PROBLEM: ROW}, CPU) is None
    assert chosen() == "triton"


def test_a_user_without_a_home(monkeypatch):
    def expanded(path):
        raise RuntimeError("Could not determine home directory.")

    for name in ("FASTLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", expanded)
    with pytest.warns(UserWarning, match=r"Could not determine home.*; FASTLORA_CACHE names"):
        fastlora.lora_linear(*operands())
    with pytest.warns(UserWarning, match="cannot be kept in a file.*: Could not determine home"):
        assert measured.add({PROBLEM: ROW}, CPU) is None
    assert chosen() == "triton"


def test_the_folder_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FASTLORA_CACHE", "~/there")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for folder, name in {"there": "FASTLORA_CACHE", "fastlora": "XDG_CACHE_HOME"}.items():
        assert measured.path_of(CPU).parent == tmp_path / folder
        monkeypatch.delenv(name)
    assert measured.path_of(CPU).parent == tmp_path / ".cache" / "fastlora"


def test_processes_that_measure_at_once_keep_each_others_results():
    code = """if True:
        import sys, torch
        from fastlora.operator.measured import Problem, add
        print("ready", flush=True)
        sys.stdin.readline()
        for i in range(40):
            problem = Problem(1 << i % 20, 8 + i // 20, int(sys.argv[1]))
            row = {"forward": {"blocks": 1e-3}, "backward": {}, "configs": {}}
            add({problem: row}, torch.device("cpu"))
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    jobs = [subprocess.Popen([sys.executable, "-c", code, str(k)], **pipes) for k in (8, 16)]
    for job in jobs:
        assert job.stdout.readline() == "ready\n"
    for job in jobs:
        job.stdin.write("go\n")
        job.stdin.flush()
    assert [job.communicate() and job.returncode for job in jobs] == [0, 0]
    assert len(json.loads(measured.path_of(CPU).read_text())) == 80
