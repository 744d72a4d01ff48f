# SPDX-License-Identifier: Apache-2.0
"""The file of measurements: kept, read by others, damaged, of other versions, out of reach."""

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
from measuring import CPU, PROBLEM, SMALL, SOME_CONFIG, chosen, operands, timings

import fastlora
from fastlora.operator import measured

pytestmark = pytest.mark.usefixtures("empty_cache")


BAD = {
    "not JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "empty": b"",
    "a list": b"[]",
    "another format": b'{"format": 2}',
    "deep": b"[" * 100_000,
    "no problems": "without problems",
    "a time that is none": ("seconds", {"blocks": -1.0}),
    "a time that is NaN": ("seconds", {"blocks": float("nan")}),
    "an implementation that is none": ("seconds", {"numpy": 1.0}),
    "times in a list": ("seconds", [1.0]),
    "a time with the host that is none": ("with_host", {"blocks": 0.0}),
    "a config of other fields": ("configs", {"shrink": {"block_m": 16}}),
    "a config of text": ("configs", {"shrink": "fast"}),
    "a config that is huge": (
        "configs",
        {"shrink": {**SOME_CONFIG, "block_m": 1 << 20}},
    ),
    "a config whose flag is a number": ("configs", {"shrink": {**SOME_CONFIG, "tma": 1}}),
}


def test_what_was_measured_is_found_by_the_next_process(empty_cache, monkeypatch):
    configs = {"shrink": SOME_CONFIG}
    path = measured.add({PROBLEM: timings(configs=configs)}, CPU)
    assert path is not None and path.parent == empty_cache
    monkeypatch.setattr(measured, "_loaded", {})
    assert measured.find(PROBLEM, CPU) == timings(configs=configs) and measured.count(CPU) == 1


def test_nothing_is_written_before_anything_is_measured(empty_cache):
    fastlora.lora_linear(*operands())
    assert not empty_cache.exists()


@pytest.mark.parametrize("what", BAD)
def test_a_corrupt_file_is_set_aside_with_one_warning(what, monkeypatch):
    path = measured.add({PROBLEM: timings()}, CPU)
    content = json.loads(path.read_text())
    bad = BAD[what]
    if isinstance(bad, bytes):
        path.write_bytes(bad)
    else:
        if isinstance(bad, tuple):
            content["problems"][0]["forward"][bad[0]] = bad[1]
        else:
            del content["problems"]
        path.write_text(json.dumps(content))
    damaged = path.read_bytes()
    monkeypatch.setattr(measured, "_loaded", {})
    with pytest.warns(UserWarning, match=r"holds no measurements .* set aside as .*\.corrupt"):
        assert measured.find(PROBLEM, CPU) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured.find(PROBLEM, CPU) is None
        assert measured.add({PROBLEM: timings()}, CPU) == path
    assert path.with_suffix(".corrupt").read_bytes() == damaged


def test_a_file_that_is_too_large_is_not_read(monkeypatch):
    path = measured.add({PROBLEM: timings()}, CPU)
    with open(path, "wb") as file:
        file.truncate(measured.MAX_BYTES + 1)
    monkeypatch.setattr(measured, "_loaded", {})
    with pytest.warns(UserWarning, match="larger than 16 MiB"):
        assert measured.find(PROBLEM, CPU) is None


@pytest.mark.parametrize("what", ["pipe", "device"])
def test_what_is_no_file_is_not_waited_for(what, monkeypatch):
    path = measured.add({PROBLEM: timings()}, CPU)
    path.unlink()
    if what == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("the system has no pipes with names")
        os.mkfifo(path)
    elif Path("/dev/zero").exists():
        path.symlink_to("/dev/zero")
    else:
        pytest.skip("the system has no /dev/zero")
    monkeypatch.setattr(measured, "_loaded", {})
    with pytest.warns(UserWarning, match="cannot be read: not a file"):
        assert measured.find(PROBLEM, CPU) is None
    assert measured.add({PROBLEM: timings()}, CPU) == path and path.is_file()


def test_terminal_codes_of_a_file_are_not_printed(monkeypatch):
    path = measured.add({PROBLEM: timings()}, CPU)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "versions": "\x1b[2J"}))
    monkeypatch.setattr(measured, "_loaded", {})
    with pytest.warns(UserWarning, match="was measured with") as said:
        measured.find(PROBLEM, CPU)
    assert str(said[0].message).isprintable()


def test_a_thread_waits_for_what_another_reads(monkeypatch):
    """Nobody plans with half of what was measured, and what is added meanwhile stays."""
    other = PROBLEM._replace(K=2 * PROBLEM.K)
    measured.add({PROBLEM: timings()}, CPU)
    own, reading = measured._read, threading.Event()

    def slowly(*args):
        reading.set()
        time.sleep(0.2)
        return own(*args)

    monkeypatch.setattr(measured, "_loaded", {})
    monkeypatch.setattr(measured, "_read", slowly)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(measured.find, PROBLEM, CPU)
        reading.wait()
        assert measured.find(PROBLEM, CPU) is not None
        measured.add({other: timings()}, CPU)
        assert first.result() is not None
    assert measured.find(other, CPU) is not None and measured.find(PROBLEM, CPU) is not None


@pytest.mark.parametrize("part", ["driver", "triton", "torch", "fastlora"])
def test_other_versions_are_not_used_and_are_replaced(part, monkeypatch):
    measured.add({PROBLEM: timings()}, CPU)
    now = {**measured.versions("cpu"), part: "999"}
    monkeypatch.setattr(measured, "versions", lambda device_type: now)
    monkeypatch.setattr(measured, "_loaded", {})
    with pytest.warns(UserWarning, match=f"{part}.*999.*not used; python -m fastlora tune"):
        assert measured.find(PROBLEM, CPU) is None
    with pytest.warns(UserWarning, match="not used"):
        path = measured.add({PROBLEM._replace(M=128): timings()}, CPU)
    content = json.loads(path.read_text())
    assert content["versions"] == now and [p["M"] for p in content["problems"]] == [128]


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    """The measurements hold for the process; the warning says where and what to do."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"cannot be kept in .*this process only; FASTLORA_CACHE"):
        assert measured.add({PROBLEM: timings()}, CPU) is None
    assert chosen() == "triton"


def test_a_file_that_cannot_be_read():
    measured.path_of(CPU).mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert measured.find(PROBLEM, CPU) is None


def test_a_user_without_a_home(monkeypatch):
    def expanded(path):
        raise RuntimeError("Could not determine home directory.")

    for name in ("FASTLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", expanded)
    with pytest.warns(UserWarning, match=r"Could not determine home.*; FASTLORA_CACHE names"):
        fastlora.lora_linear(*operands())
    with pytest.warns(UserWarning, match="cannot be kept in a file"):
        assert measured.add({PROBLEM: timings()}, CPU) is None
    assert chosen() == "triton"


def test_the_folder_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measured.path_of(CPU).parent == tmp_path / "fastlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert measured.path_of(CPU).parent == tmp_path / ".cache" / "fastlora"


def test_processes_that_measure_at_once_keep_each_others_results():
    code = """if True:
        import sys, torch
        from fastlora.operator import measured
        from fastlora.operator.plans import Problem
        from fastlora.operator.measured import Timing
        print("ready", flush=True)
        sys.stdin.readline()
        for i in range(100):
            times = {op: Timing({"blocks": 1e-3}) for op in measured.OPS}
            problem = Problem(1 << i % 20, 8 + i // 20, int(sys.argv[1]))
            measured.add({problem: times}, torch.device("cpu"))
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    jobs = [subprocess.Popen([sys.executable, "-c", code, str(k)], **pipes) for k in (8, 16)]
    for job in jobs:
        assert job.stdout.readline() == "ready\n"
    for job in jobs:
        job.stdin.write("go\n")
        job.stdin.flush()
    assert [job.communicate() and job.returncode for job in jobs] == [0, 0]
    assert len(json.loads(measured.path_of(CPU).read_text())["problems"]) == 200


def test_a_file_without_other_projections_is_still_read():
    measured.add({SMALL: timings()}, CPU)
    path = measured.path_of(CPU)
    content = json.loads(path.read_text())
    for row in content["problems"]:
        del row["others"]
    path.write_text(json.dumps(content))
    measured._loaded.clear()
    assert measured.find(SMALL, CPU) is not None
    content["problems"][0]["others"] = [[8, -1]]
    path.write_text(json.dumps(content))
    measured._loaded.clear()
    with pytest.warns(UserWarning, match="-1 is not an integer from 0 to"):
        assert measured.find(SMALL, CPU) is None
