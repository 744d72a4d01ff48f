# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: defaults, what was measured, the file it is kept in, the tuner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from fastlora_kernels import machine
from fastlora_kernels.configs import Config
from fastlora_kernels.prediction import predict
from tiny_models import llama, tokens

import fastlora
from fastlora import measured, plans, tuner
from fastlora.__main__ import main
from fastlora.measured import Timing
from fastlora.plans import Problem
from fastlora.projection import Operands

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PROBLEM = Problem(64, 48, 32, 16, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of this test's own, on a machine where nothing was measured."""
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "_loaded", {})
    monkeypatch.setattr(tuner, "_said", set())
    monkeypatch.setattr(tuner, "_tried", set())
    monkeypatch.setattr(tuner, "CONFIG_SECONDS", 0.0)
    plans.forget()
    yield tmp_path / "cache"
    plans.forget()


SOME_CONFIG = asdict(Config(16, 16))


def timings(forward=None, backward=None, configs=None):
    default = {"torch": 3e-3, "library": 2e-3, "triton": 1e-3}
    return {
        "forward": Timing(forward or default, configs or {}),
        "backward": Timing(backward or default),
    }


def chosen(op="forward", problem=PROBLEM, impl="auto"):
    return plans.choose(op, impl, problem, CPU).impl


def module(function):
    """The module of a function, or of the one whose arguments are bound."""
    return getattr(function, "func", function).__module__


def operands(m=64, dtype=torch.bfloat16, adapter=torch.float32):
    x, w = torch.randn(m, 32).to(dtype), torch.randn(48, 32).to(dtype)
    return x, w, torch.randn(16, 32).to(adapter), torch.randn(48, 16).to(adapter)


# Defaults


def test_what_auto_takes_where_nothing_was_measured(monkeypatch):
    """Library products on a GPU's tensor cores; torch where they do not help or cannot run."""
    monkeypatch.setattr(plans, "triton_unusable", lambda device: None)
    assert (
        plans.default(torch.bfloat16, GPU)[0] == plans.default(torch.float16, GPU)[0] == "library"
    )
    assert plans.default(torch.float32, GPU)[0] == plans.default(torch.bfloat16, CPU)[0] == "torch"
    monkeypatch.setattr(plans, "triton_unusable", lambda device: "broken")
    assert plans.default(torch.bfloat16, GPU) == ("torch", "broken")


def test_a_prediction_ranks_what_was_not_measured(monkeypatch):
    """On a GPU that the model knows; a measurement, and what the user asks for, come first."""
    monkeypatch.setattr(machine.Machine, "of", staticmethod(lambda device: machine.H100))
    monkeypatch.setattr(plans, "default", lambda *_: ("library", "default, not measured"))
    few = PROBLEM._replace(M=16, N=4096, K=4096, adapter=torch.bfloat16)
    for problem, clear in ((few, True), (few._replace(M=8192), False)):
        plan = plans.choose("forward", "auto", problem, CPU)
        least = min(plan.predicted, key=plan.predicted.get)
        assert plan.predicted.keys() == {"torch", "library", "triton"}
        assert (plan.predicted[least] < plans.MARGIN * plan.predicted["library"]) == clear
        assert (plan.impl, plan.why) == (
            (least, "predicted, not measured") if clear else ("library", "default, not measured")
        )
        assert plans.choose("forward", "torch", problem, CPU).impl == "torch"
        other = plans.choose("forward", "auto", problem._replace(M=problem.M - 1), CPU)
        assert other == plan  # one plan for a bucket, whoever comes first
    assert "predicted, not measured; predicted: torch 0.0" in str(fastlora.explain(few, device=CPU))
    measured.add({PROBLEM: timings()}, CPU)
    assert chosen() == "triton"
    monkeypatch.setattr(plans, "default", lambda *_: ("torch", "default, not measured"))
    whole = few._replace(M=8192, N=1024, dtype=torch.float32, adapter=torch.float32)
    assert chosen(problem=whole) == "torch"
    # Drawing a mask with PyTorch's own operations moves more than the layer does.
    assert chosen(problem=whole._replace(dropout=True)) == "library"


def test_the_environment_forces_a_choice(monkeypatch):
    x, *rest = operands()
    monkeypatch.setattr(plans, "FORCED", "triton")
    fastlora.lora_linear(x, *rest)
    assert [key[:2] for key in plans._functions] == [("forward", "triton")]
    assert plans.named("torch", x) == "torch"
    monkeypatch.setattr(plans, "triton_unusable", lambda device: "broken")
    with pytest.raises(RuntimeError, match=r"FASTLORA_IMPL='triton' cannot run on .*: broken"):
        fastlora.lora_linear(x, *rest)
    monkeypatch.setattr(plans, "FORCED", "fast")
    with pytest.raises(ValueError, match=r"FASTLORA_IMPL must be one of auto, .*, got 'fast'"):
        fastlora.lora_linear(x, *rest)


def test_a_plain_cpu_needs_no_triton():
    code = """if True:
        import sys, torch, fastlora
        fastlora.lora_linear(torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1))
        print("triton" in sys.modules)
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=environment, text=True) == "False\n"


def test_the_environment_is_read_when_python_starts():
    code = "from fastlora import plans; print(plans.FORCED, plans.TUNE)"
    environment = {**os.environ, "FASTLORA_IMPL": "reference", "FASTLORA_TUNE": "1"}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=environment, text=True) == "reference True\n"


# Measurements


def test_the_fastest_measured_runs_in_each_direction():
    slow = {"torch": 1e-3, "library": 2e-3, "triton": 3e-3}
    measured.add({PROBLEM: timings(backward=slow)}, CPU)
    assert (chosen("forward"), chosen("backward")) == ("triton", "torch")
    assert chosen(impl="library") == "library"


def test_a_draw_leaves_the_default():
    measured.add({PROBLEM: timings({"torch": 1.0e-3, "triton": 0.99e-3})}, CPU)
    assert chosen() == "torch"


def test_measurements_hold_for_their_bucket():
    """M and R are rounded up to powers of two; everything else is exact."""
    measured.add({PROBLEM: timings(), PROBLEM._replace(M=2): timings()}, CPU)
    x, *projection = operands(2)
    projection = [Operands(*projection, None, None, 1.0, 0.0)]
    assert module(plans.function("forward", "auto", x[:0], projection)) == "fastlora.torch_impl"
    assert module(plans.function("forward", "auto", x, projection)) == "fastlora_kernels.linears"
    for same in ({"M": 33}, {"M": 64, "R": 3}):
        assert chosen(problem=PROBLEM._replace(**same)) == "triton"
    others = ({"M": 32}, {"M": 65}, {"R": 17}, {"N": 47}, {"K": 33}, {"dropout": True})
    for other in (*others, {"adapter": torch.bfloat16}):
        assert chosen(problem=PROBLEM._replace(**other)) == "torch"


def test_a_compiled_graph_chooses_for_the_rows_that_come(monkeypatch):
    """One graph, and yet another implementation for another number of rows."""
    measured.add({PROBLEM: timings()}, CPU)
    x, w, a, b = operands(128)
    layer = torch.compile(fastlora.lora_linear, backend="eager", dynamic=True, fullgraph=True)
    torch._dynamo.reset()
    for m in (128, 64):
        layer(x[:m], w, a, b)
    taken = {key[2]: module(function) for key, function in plans._functions.items()}
    assert taken == {7: "fastlora.torch_impl", 6: "fastlora_kernels.linears"}


def test_the_choice_is_one_look_up(monkeypatch):
    """Nothing is computed again and no memory is kept by further calls."""
    x, *projection = operands()
    projection = [Operands(*projection, None, None, 1.0, 0.0)]
    plans.function("forward", "auto", x, projection)
    monkeypatch.setattr(plans, "choose", None)
    tracemalloc.start()
    for m in range(33, 65):
        plans.function("forward", "auto", x[:m], projection)
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(10):
        for m in range(33, 65):
            plans.function("forward", "auto", x[:m], projection)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 1024


def test_measured_configs_reach_the_kernels(monkeypatch):
    """Where they are valid; an invalid one is left out and the kernel takes its default."""
    from fastlora_kernels import launch, linear

    good = {"block_m": 32, "block_n": 32, "block_k": 32, "block_r": 16}
    good |= {"group_m": 1, "num_warps": 2, "num_stages": 2}
    for wrong in ({"block_k": 17}, {"num_warps": 3}):
        product = {**SOME_CONFIG, **good, **wrong}
        configs = {"shrink": {**SOME_CONFIG, **good}, "product": product, "unknown": product}
        measured.add({PROBLEM: timings(configs=configs)}, CPU)
        configs = plans.choose("forward", "auto", PROBLEM, CPU).configs
        assert configs.keys() == {"shrink", "product"}
        assert configs["shrink"] == linear.Config(**good) != configs["product"]
    seen = {}
    for name in ("shrink", "product"):
        right = getattr(linear, name)
        monkeypatch.setattr(
            linear,
            name,
            lambda *a, config, name=name, right=right, **k: (
                seen.update({name: config}) or right(*a, config=config, **k)
            ),
        )
    x, *rest = operands()
    with torch.no_grad():
        assert fastlora.lora_linear(x, *rest).shape == (64, 48)
        default = launch.config_for("product", x, rest[0], 16, torch.float32, False)
        assert seen == {"shrink": configs["shrink"], "product": default}
        misaligned = torch.empty(64 * 32 + 1, dtype=torch.bfloat16)[1:].view(64, 32).copy_(x)
        fastlora.lora_linear(misaligned, *rest)
        one_by_one = launch.config_for("product", misaligned, rest[0], 16, torch.float32, False)
        assert seen == {"shrink": None, "product": one_by_one}
        seen.clear()
        wide = torch.empty(16 * 32 + 1)[1:].view(16, 32).copy_(rest[1])
        fastlora.lora_linear(x, rest[0], wide, rest[2])
    assert seen == {"shrink": None, "product": default}


# The file


def test_what_was_measured_is_found_by_the_next_process(cache, monkeypatch):
    configs = {"shrink": SOME_CONFIG}
    path = measured.add({PROBLEM: timings(configs=configs)}, CPU)
    assert path is not None and path.parent == cache
    monkeypatch.setattr(measured, "_loaded", {})
    assert measured.find(PROBLEM, CPU) == timings(configs=configs) and measured.count(CPU) == 1


def test_nothing_is_written_before_anything_is_measured(cache):
    fastlora.lora_linear(*operands())
    assert not cache.exists()


BAD = {
    "not JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "empty": b"",
    "a list": b"[]",
    "another format": b'{"format": 2}',
    "deep": b"[" * 100_000,
    "no problems": "without problems",
    "a time that is none": ("seconds", {"torch": -1.0}),
    "a time that is NaN": ("seconds", {"torch": float("nan")}),
    "an implementation that is none": ("seconds", {"numpy": 1.0}),
    "times in a list": ("seconds", [1.0]),
    "a config of other fields": ("configs", {"shrink": {"block_m": 16}}),
    "a config of text": ("configs", {"shrink": "fast"}),
    "a config that is huge": (
        "configs",
        {"shrink": {**SOME_CONFIG, "block_m": 1 << 20}},
    ),
    "a config whose flag is a number": ("configs", {"shrink": {**SOME_CONFIG, "tma": 1}}),
}


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


def test_a_plan_made_before_measurements_is_forgotten_with_them(monkeypatch):
    x = torch.ones(16, 64)
    own = plans._function

    def slowly(*args):
        found = own(*args)
        plans.forget()  # as another thread does that has measured
        return found

    monkeypatch.setattr(plans, "_function", slowly)
    fastlora.lora_linear(x, torch.ones(8, 64), torch.ones(2, 64), torch.ones(8, 2))
    assert not plans._functions


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


def test_a_file_that_cannot_be_read(cache):
    measured.path_of(CPU).mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert measured.find(PROBLEM, CPU) is None


def test_a_user_without_a_home(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("FASTLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
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
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert measured.path_of(CPU).parent == tmp_path / ".cache" / "fastlora"


def test_processes_that_measure_at_once_keep_each_others_results(cache):
    code = """if True:
        import sys, torch
        from fastlora import measured
        from fastlora.plans import Problem
        from fastlora.measured import Timing
        print("ready", flush=True)
        sys.stdin.readline()
        for i in range(100):
            times = {op: Timing({"torch": 1e-3}) for op in measured.OPS}
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


# The tuner


SMALL = PROBLEM._replace(M=16, N=16, K=16)


def tune_one(say=lambda text: None, problem=SMALL):
    ((_, found, _),) = tuner.tune([problem], CPU, say, seconds=0.0)
    return found


def test_the_tuner_measures_every_implementation_and_keeps_it(cache):
    state = torch.get_rng_state()
    found = tune_one(problem=SMALL._replace(M=12, dropout=True))
    assert torch.equal(torch.get_rng_state(), state)
    for op, names in (("forward", {"shrink", "product"}), ("backward", {"ds_db", "da", "dx"})):
        assert found[op].seconds.keys() == {"torch", "library", "triton"}
        assert all(0 < seconds < 60 for seconds in found[op].seconds.values())
        assert found[op].configs.keys() == names
    assert measured.find(SMALL._replace(M=16, dropout=True), CPU) == found
    assert json.loads(measured.path_of(CPU).read_text())["problems"][0]["M"] == 16


def test_a_config_that_fails_is_left_out_and_named_once(monkeypatch):
    """Too much shared memory, out of memory, a compiler's error: measured with the others."""
    import fastlora_kernels

    right, said = fastlora_kernels.shrink, []

    def shrink(*args, config=None, **rest):
        if config is not None and config.num_warps == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return right(*args, config=config, **rest)

    monkeypatch.setattr(fastlora_kernels, "shrink", shrink)
    problem = SMALL._replace(adapter=torch.bfloat16)
    for _ in range(2):
        found = tune_one(said.append, problem)
    assert found["forward"].configs["shrink"]["num_warps"] != 8
    assert len(said) == 1
    assert said[0].startswith("left out shrink with Config(") and "not enough memory" in said[0]


def test_an_implementation_that_fails_is_left_out(monkeypatch):
    from fastlora import library_impl

    def fails(*args, **rest):
        raise RuntimeError("out of resource: shared memory\nand more")

    said = []
    monkeypatch.setattr(library_impl, "forward_all", fails)
    found = tune_one(said.append)
    assert found["forward"].seconds.keys() == {"torch", "triton"}
    assert said == [f"left out library, {SMALL}: out of resource: shared memory"]


def test_a_problem_that_does_not_fit_is_left_out(monkeypatch, cache):
    said = []
    assert tune_one(said.append, SMALL._replace(M=1 << 45)) is None
    assert len(said) == 1 and "left out" in said[0] and not cache.exists()


def test_autocast_does_not_change_what_is_measured():
    said = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tune_one(said.append)["forward"].seconds.keys() == {"torch", "library", "triton"}
    assert not said


def test_a_problem_that_fails_is_tried_once(monkeypatch, capsys):
    tries = []
    monkeypatch.setattr(plans, "TUNE", True)
    monkeypatch.setattr(tuner, "_measure", lambda problem, *_: tries.append(problem))
    x, w, a, b = operands()
    for r in (16, 12, 9):
        fastlora.lora_linear(x, w, a[:r].requires_grad_(), b[:, :r]).sum().backward()
    assert tries == [PROBLEM] and len(capsys.readouterr().err.splitlines()) == 1


def test_tuning_on_first_use(monkeypatch, capsys):
    monkeypatch.setattr(plans, "TUNE", True)
    monkeypatch.setattr(tuner, "SECONDS", 0.0)
    x, w, a, b = operands()
    fastlora.explain((48, 32), 64, device="cpu")
    assert measured.find(PROBLEM, CPU) is None
    state, before, results = torch.get_rng_state(), [t.clone() for t in (x, w, a, b)], []
    for _ in range(2):
        a.grad = None
        y = fastlora.lora_linear(x, w, a.requires_grad_(), b)
        y.sum().backward()
        results.append((y.detach(), a.grad))
    assert all(map(torch.equal, *results)) and all(map(torch.equal, before, (x, w, a, b)))
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        capsys.readouterr().err == f"fastlora: measuring {PROBLEM} on first use (FASTLORA_TUNE=1)\n"
    )
    assert measured.find(PROBLEM, CPU) is not None
    fastlora.lora_linear(x, w, a, b, impl="torch")


# explain


def test_explains_shapes():
    measured.add({PROBLEM: timings()}, CPU)
    text = str(fastlora.explain((48, 32), tokens=(64, 65), device="cpu"))
    assert text == (
        "M x N x K: tokens, outputs, inputs\n"
        "64 x 48 x 32, r = 16, bfloat16, float32 adapters, on cpu\n"
        "  forward   triton    measured on this machine: triton 1 ms, library 2 ms, torch 3 ms\n"
        "  backward  triton    measured on this machine: triton 1 ms, library 2 ms, torch 3 ms\n"
        "65 x 48 x 32, r = 16, bfloat16, float32 adapters, on cpu\n"
        "  forward   torch     made for CPUs\n"
        "  backward  torch     made for CPUs"
    )
    several = fastlora.explain([(48, 32), [8, 8], PROBLEM], tokens=64, dropout=True, device="cpu")
    assert list(several.plans) == [
        (CPU, PROBLEM._replace(dropout=True)),
        (CPU, Problem(64, 8, 8, 16, torch.bfloat16, torch.float32, True)),
        (CPU, PROBLEM),
    ]


def test_explains_a_layer_and_a_model():
    layer = fastlora.LoRALinear(32, 48, r=4, lora_dropout=0.1)
    ((where, problem),) = fastlora.explain(layer, torch.randn(2, 5, 32)).plans
    assert where == CPU and problem == Problem(10, 48, 32, 4, torch.float32, torch.float32, True)
    ((_, problem),) = fastlora.explain(layer.eval(), 7).plans
    assert problem == Problem(7, 48, 32, 4, torch.float32, torch.float32)
    layer.add_adapter("other", r=2)
    layer.set_adapter(["default", "other"])
    ((_, problem),) = fastlora.explain(layer, 7).plans
    assert problem.R == 6 and not problem.dropout
    layer.train().set_adapter(["other", "default"])  # the first one's dropout is 0
    ((_, problem),) = fastlora.explain(layer, 7).plans
    assert problem.R == 2 and not problem.dropout
    layer.merge()
    with pytest.raises(ValueError, match="holds no LoRALinear with an active adapter"):
        fastlora.explain(layer, 7)
    model = llama()
    fastlora.inject(model, fastlora.LoRAConfig(r=4, target_modules="all-linear"))
    shapes = {(p.N, p.K) for _, p in fastlora.explain(model, 7).plans}
    assert shapes == {(16, 16), (8, 16), (24, 16), (16, 24)}


def test_explains_siblings_together(monkeypatch):
    model = llama()
    config = fastlora.LoRAConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"])
    fastlora.inject(model, config, fuse_siblings=True)
    explained = fastlora.explain(model, 7)
    assert [(p.N, p.R, p.others) for _, p in explained.plans] == [
        (16, 4, ((8, 4), (8, 0))),
        (16, 4, ()),
    ]
    assert "7 x 16 x 16, r = 4, float32, and of the same x: 8 (r = 4), 8 (frozen), on cpu" in str(
        explained
    )
    choose, posed = plans.choose, []  # k, which is frozen, lies between q and v
    monkeypatch.setattr(
        plans, "choose", lambda op, impl, *of: posed.append(of[0]) or choose(op, impl, *of)
    )
    model(input_ids=tokens())
    assert {p._replace(M=7) for p in posed} == {p for _, p in explained.plans}
    monkeypatch.undo()
    model.model.layers[0].self_attn.v_proj.merge()  # those of that block run alone
    assert len(fastlora.explain(model, 7).plans) == 2


# Several projections of one x

GROUP = SMALL._replace(others=((8, 3), (32, 0)))


def test_the_tuner_measures_projections_together(cache):
    for dropout in (False, True):
        found = tune_one(problem=GROUP._replace(dropout=dropout))
        for op in ("forward", "backward"):
            assert found[op].seconds.keys() == {"torch", "library", "triton"}
            assert found[op].configs == {}
    measured._loaded.clear()  # as another process reads it
    known = measured._known(CPU)
    assert {p.others for p in known} == {((8, 16), (32, 0))} and len(known) == 2
    assert measured.find(GROUP, CPU) is not None and measured.find(SMALL, CPU) is None


def test_what_projections_together_take():
    """What was measured of them together, not of each."""
    measured.add({GROUP: timings()}, CPU)
    assert chosen(problem=GROUP) == "triton" and chosen(problem=SMALL) == "torch"
    assert chosen(problem=GROUP._replace(others=((8, 3), (32, 3)))) == "torch"
    x, *first = operands(16)
    x, first = x[:, :16], [first[0][:16, :16], first[1][:, :16], first[2][:16]]
    second = torch.randn(8, 16).bfloat16(), torch.randn(3, 16), torch.randn(8, 3)
    rest = (None, None, 1.0, 0.0)
    of = [
        Operands(*(t.contiguous() for t in first), *rest),
        Operands(*second, *rest),
        Operands(torch.randn(32, 16).bfloat16(), None, None, *rest),
    ]
    assert module(plans.function("forward", "auto", x, of)) == "fastlora_kernels.linears"
    frozen = [p._replace(a=None, b=None) for p in of]
    assert module(plans.function("forward", "auto", x, frozen)) == "fastlora.torch_impl"


def test_a_file_without_other_projections_is_still_read(cache):
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


def test_predictions_of_several_are_added(monkeypatch):
    monkeypatch.setattr(machine.Machine, "of", lambda device: machine.H100)
    both = plans.choose("forward", "auto", GROUP._replace(others=((16, 16), (32, 0))), CPU)
    for impl, seconds in both.predicted.items():
        one = predict("forward", impl, SMALL, machine.H100)  # the frozen one costs all the same
        assert seconds == 2 * one.seconds


@pytest.mark.parametrize("forced", ["torch", "triton", "reference"])
def test_explains_what_is_forced(monkeypatch, forced):
    monkeypatch.setattr(plans, "FORCED", forced)
    assert f"{forced:9} FASTLORA_IMPL={forced}" in str(fastlora.explain((48, 32), 64, device="cpu"))


def test_explain_says_what_it_cannot_take():
    with pytest.raises(ValueError, match=r"Linear holds no LoRALinear.*inject\(model, config\)"):
        fastlora.explain(torch.nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"a shape is \(N, K\), two positive integers, got \(1, 2, 3\)"
    ):
        fastlora.explain((1, 2, 3))
    with pytest.raises(ValueError, match=r"got \(0, 3\)"):
        fastlora.explain([(4, 4), (0, 3)])
    with pytest.raises(TypeError, match=r"what must be .* got str"):
        fastlora.explain("llama")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device is 'cuda', but PyTorch can use no GPU here"):
            fastlora.explain((4, 4), device="cuda")
    with pytest.raises(ValueError, match="tokens must be positive integers, got 0"):
        fastlora.explain((4, 4), tokens=0)


# The command


def run_tune(*options):
    return main(["tune", *options, "--seconds", "0.001", "--tokens", "16", "--r", "4"])


def test_the_command_measures_shapes(capsys):
    assert run_tune("--shapes", "48x32", "--dropout", "off") == 0
    printed = capsys.readouterr().out
    problem = PROBLEM._replace(M=16)
    assert f"{problem}, forward: torch, " in printed and ", as by default" in printed
    assert "1 problems, forward and backward: " in printed and "(1.00x)" in printed
    assert f"kept in {measured.path_of(CPU)}" in printed
    assert measured.find(problem, CPU) is not None


def test_the_command_says_what_is_gained(capsys, monkeypatch):
    monkeypatch.setattr(tuner, "_measure", lambda *_: timings())
    assert run_tune("--shapes", "48x32", "--dropout", "both") == 0
    printed = capsys.readouterr().out
    assert ": triton, 1 ms, 3.00x the speed of torch, the default" in printed
    assert (
        "2 problems, forward and backward: 4.00 ms as chosen, 12.00 ms by default (3.00x)"
        in printed
    )


def test_the_command_reads_a_model(capsys, monkeypatch, tmp_path):
    llama().config.save_pretrained(tmp_path)
    monkeypatch.setattr(tuner, "_measure", lambda *_: timings())
    pattern = r"model\.layers\.\d+\.self_attn\.[qk]_proj"  # names as in finetune's model
    assert run_tune("--model", str(tmp_path), "--target-modules", pattern) == 0
    known = measured._known(CPU)
    alone = [p for p in known if not p.others]
    assert {(p.N, p.K) for p in alone} == {(16, 16), (8, 16)} and len(alone) == 4
    # q and k with v, which is frozen, of one x.
    together = [p for p in known if p.others]
    assert {(p.N, p.R, p.others) for p in together} == {(16, 16, ((8, 16), (8, 0)))}
    assert len(together) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--shapes", "48"], "--shapes takes NxK, such as 14336x4096, got '48'"),
        (["--shapes", "8x8", "--r", "0"], "--r must be positive, got 0"),
        (["--shapes", "8x8", "--adapter-dtype", "fp16"], "--adapter-dtype must be bf16 or fp32"),
        (["--shapes", "8x8", "--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--model", "no/such/folder"], "--model no/such/folder cannot be read"),
        (["--model", "FOLDER"], "--model FOLDER cannot be read"),
        (["--model", "GGUF"], "--model GGUF cannot be read"),
    ],
)
def test_the_command_names_what_is_wrong(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    folders = {"FOLDER": str(tmp_path), "GGUF": str(tmp_path / "gguf")}
    assert main(["tune", *(folders.get(option, option) for option in options)]) == 2
    for name, folder in folders.items():
        message = message.replace(name, folder)
    assert f"error: {message}" in capsys.readouterr().err


def test_the_command_where_there_is_nothing_to_choose(capsys, monkeypatch):
    monkeypatch.setattr(plans, "triton_unusable", lambda device: "no GPU.")
    assert run_tune("--shapes", "48") == 2
    assert "--shapes takes NxK" in capsys.readouterr().err
    assert run_tune("--shapes", "48x32") == 0
    assert capsys.readouterr().out == "nothing to choose on cpu: only 'torch' runs there. no GPU.\n"


def test_a_forced_choice_leaves_nothing_to_tune(capsys, monkeypatch):
    monkeypatch.setattr(plans, "FORCED", "reference")
    assert run_tune("--shapes", "48x32") == 2
    assert "FASTLORA_IMPL=reference leaves nothing to choose" in capsys.readouterr().err


def test_the_command_does_not_say_kept_when_it_is_not(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tuner, "_measure", lambda *_: timings())
    with pytest.warns(UserWarning, match="cannot be kept in"):
        assert run_tune("--shapes", "48x32") == 0
    assert "not kept: it held for this process only" in capsys.readouterr().out


def test_nothing_could_be_measured(capsys, monkeypatch):
    monkeypatch.setattr(tuner, "_measure", lambda *_: None)
    assert run_tune("--shapes", "48x32") == 2
    assert "nothing could be measured on cpu" in capsys.readouterr().err
