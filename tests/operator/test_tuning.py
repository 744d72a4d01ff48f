# SPDX-License-Identifier: Apache-2.0
"""What is measured on this machine, by the tuner or on first use, and the file that keeps it.

Times hold what they say, on a GPU that is simulated: a queue, and a host that fills it.
"""

import functools
import inspect
import json
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from measuring import CPU, GROUP, PROBLEM, SMALL, chosen, operands, timings

import fastlora
from fastlora.operator import library, measured, plans, tuning
from fastlora.operator.operands import Problem

pytestmark = pytest.mark.usefixtures("empty_cache")
CUDA, ALL, ROW = torch.device("cuda", 0), {"blocks", "library", "triton"}, timings()
HOST, KERNEL, CYCLES = 25e-6, 100e-6, 2e9  # seconds to issue a kernel and to run it; cycles/second


def tune_one(problem=SMALL, say=lambda text: None):
    ((_, found, _),) = tuning.tune([problem], CPU, say, seconds=0.0)
    measured._loaded.clear()  # another process would read the file
    return found


# Ways that take turns


class Gpu:
    """Runs what is issued in order, each when it has been issued and the one before has ended."""

    now = free = 0.0  # the host's time; when the queue is empty

    def issue(self, seconds: float) -> None:
        self.free = max(self.free, self.now) + seconds

    def synchronize(self, device) -> None:
        self.now = max(self.now, self.free)

    def event(self) -> SimpleNamespace:
        at = max(self.free, self.now)
        return SimpleNamespace(at=at, elapsed_time=lambda other: (other.at - at) * 1000)

    def rounds(self, host=HOST, waits=False, **options):
        """The rounds of a step of two phases, a kernel each."""

        def step():
            for _ in ("forward", "backward"):
                self.now += host
                self.issue(KERNEL)
                if waits:
                    self.synchronize(CUDA)
                yield

        return tuning.interleaved({"it": step}, CUDA, 0.0, **options)["it"]


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.issue(cycles / CYCLES))
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(tuning, "_event", gpu.event)
    monkeypatch.setattr(tuning, "perf_counter", lambda: gpu.now)
    return gpu


@pytest.mark.parametrize("host", [HOST, 40 * HOST], ids=["short", "longer than its kernels"])
def test_a_phase_is_the_time_of_its_kernels(gpu, host):
    """However long Python takes: the queue is full before the first event."""
    assert gpu.rounds(host) == [pytest.approx((KERNEL, KERNEL))] * 5


def test_a_step_that_waits_for_the_gpu_is_timed_all_the_same(gpu):
    assert gpu.rounds(waits=True) == [pytest.approx((KERNEL, KERNEL + HOST))] * 5


def test_with_the_host_a_phase_holds_what_it_waits_for(gpu):
    found = gpu.rounds(3 * KERNEL, with_host=True)
    assert found == [pytest.approx((4 * KERNEL, 3 * KERNEL))] * 5
    cases = [(512, CUDA), (513, CUDA), (1, CPU)]
    assert [tuning.host_counts(*case) for case in cases] == [True, False, False]


@pytest.mark.parametrize("after", [0, 1, 4], ids="after {} runs".format)
def test_ways_take_turns_and_one_that_fails_fails_alone(after, monkeypatch):
    left, said, ran = [after], [], []

    def fails():
        if not left[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        left[0] -= 1
        yield

    def works(name):
        ran.append(name)
        yield

    steps = {"fails": fails, "a": lambda: works("a"), "b": lambda: works("b")}
    with pytest.raises(torch.OutOfMemoryError):
        tuning.interleaved(steps, CPU, 0.0)
    left[0] = after
    ran.clear()
    options = {"failed": lambda name, error: said.append((name, str(error)))}
    rounds = tuning.interleaved(steps, CPU, 0.0, **options)
    assert {name: len(found) for name, found in rounds.items()} == {"a": 5, "b": 5}
    # Each twice, in an order of chance.
    assert {"".join(ran[i : i + 4]) for i in range(0, 24, 4)} == {"aabb", "bbaa"}
    assert said == [("fails", "CUDA out of memory.")]
    monkeypatch.setattr(tuning, "SHORT", 0.0)  # what takes long is run once in its turn
    ran.clear()
    tuning.interleaved({name: steps[name] for name in "ab"}, CPU, 0.0)
    assert len(ran) == 2 * 6
    left[0] = after
    assert tuning.interleaved({"fails": fails}, CPU, 0.0, **options) == {}


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
    assert measured.known(CPU) == {str(problem.bucketed()): found}


def test_a_config_that_fails_is_left_out_and_named_once(monkeypatch):
    """Too much shared memory, out of memory, a compiler's error: measured with the others."""
    from fastlora_kernels import steps

    (bad, *others), right, said = plans.candidates(SMALL, CPU)["shrink"], steps.shrink, []

    def shrink(*args, **options):
        if options.get("configs") == {"shrink": bad}:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return right(*args, **options)

    monkeypatch.setattr(plans, "candidates", lambda *_: {"shrink": [bad, *others]})
    monkeypatch.setattr(steps, "shrink", shrink)
    for _, found, _ in tuning.tune([SMALL, SMALL._replace(M=32)], CPU, said.append, seconds=0.0):
        assert found["configs"]["shrink"] in map(vars, others)
    why = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    assert said == [f"left out shrink, {bad}: {why}"]


def test_an_implementation_that_fails_is_left_out(monkeypatch):
    def fails(*args, **rest):
        raise RuntimeError("out of resource: shared memory\nand more")

    said = []
    monkeypatch.setattr(library, "outputs", fails)
    assert tune_one(GROUP, said.append)["forward"].keys() == {"blocks", "triton"}
    why = "RuntimeError: out of resource: shared memory"
    assert said == [f"left out {GROUP.bucketed()}, library: {why}"]


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
    monkeypatch.setattr(tuning, "_measure", lambda *_: ROW)
    tune_one(PROBLEM._replace(M=16))
    fastlora.lora_linear(x, *rest)
    (pair,) = plans._found.values()
    assert inspect.unwrap(pair.forward).args[0].__name__ == "fastlora_kernels.steps"


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
    "times in a list": {"a": timings([1.0])},
    "configs in a list": {"a": {**ROW, "configs": ["shrink"]}},
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a device": lambda path: os.symlink("/dev/zero", path),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_does_not_parse_is_ignored_with_one_warning(what):
    """Nor is a pipe waited for, or a device read to its end."""
    path, bad = measured.add({PROBLEM: ROW}, CPU), BAD[what]
    if callable(bad):
        path.unlink()
        bad(path)
    else:
        path.write_bytes(bad if isinstance(bad, bytes) else json.dumps(bad).encode())
    measured._loaded.clear()
    with pytest.warns(UserWarning, match="is not used, nor kept") as said:
        assert measured.find(PROBLEM, CPU) is None
        assert chosen() == "blocks"
        if what != "a folder":
            assert measured.add({PROBLEM: ROW}, CPU) == path
    assert len(said) == 1 and str(said[0].message).isprintable()
    measured._loaded.clear()
    assert what == "a folder" or measured.find(PROBLEM, CPU) == ROW


def test_measurements_of_other_versions_lie_in_another_file(monkeypatch):
    monkeypatch.setattr(measured, "device_name", lambda device: "NVIDIA (R) Chip")
    monkeypatch.setattr(measured, "driver", lambda: "570.1")
    versions = (
        f"fastlora {fastlora.__version__} torch {torch.__version__} triton {triton.__version__}"
    )
    for device, name in ((CPU, f"cpu {versions}"), (CUDA, f"cuda {versions} driver 570.1")):
        name = name.replace(" fastlora", " nvidia r chip fastlora").replace("+", " ")
        assert measured.path_of(device).name == name.replace(" ", "-") + ".json"


def test_what_another_thread_adds_meanwhile_stays(monkeypatch):
    def slowly(path):
        measured._loaded[measured.device_name(CPU)] = {str(PROBLEM): ROW}
        return {}

    monkeypatch.setattr(measured, "_read", slowly)
    assert measured.find(PROBLEM, CPU) == ROW


def test_the_folder_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FASTLORA_CACHE", "~/there")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for folder, name in {"there": "FASTLORA_CACHE", "fastlora": "XDG_CACHE_HOME"}.items():
        assert measured.path_of(CPU).parent == tmp_path / folder
        monkeypatch.delenv(name)
    assert measured.path_of(CPU).parent == tmp_path / ".cache" / "fastlora"

    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    add = functools.partial(measured.add, {PROBLEM: ROW}, CPU)
    for call in (lambda: fastlora.lora_linear(*operands()), add):
        with pytest.warns(UserWarning, match=r"Could not determine home.*; FASTLORA_CACHE names"):
            call()
    assert chosen() == "triton"  # the measurements hold for the process


def test_processes_that_measure_at_once_keep_each_others_results(empty_cache):
    fastlora.lora_linear(*operands())
    assert not empty_cache.exists()  # nothing is written before anything is measured

    def add_many(k):
        for n in range(40):
            measured.add({Problem(1, n + 1, k): ROW}, CPU)

    process = multiprocessing.get_context("fork").Process
    jobs = [process(target=add_many, args=(k,)) for k in (8, 16)]
    [job.start() for job in jobs]
    [job.join() for job in jobs]
    assert [job.exitcode for job in jobs] == [0, 0]
    assert len(json.loads(measured.path_of(CPU).read_text())) == 80
