# SPDX-License-Identifier: Apache-2.0
"""Times hold what they say, on a GPU that is simulated: a queue, and a host that fills it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastlora.operator import timing

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HOST, KERNEL, CYCLES = 25e-6, 100e-6, 2e9  # seconds to issue a kernel and to run it; cycles/second


class Gpu:
    """Runs what is issued in order, each when it has been issued and the one before has ended."""

    def __init__(self) -> None:
        self.now = self.free = 0.0  # the host's time; when the queue is empty
        self.ran: list[str] = []

    def issue(self, name: str, seconds: float) -> None:
        self.free = max(self.free, self.now) + seconds
        self.ran.append(name)

    def synchronize(self, device) -> None:
        self.now = max(self.now, self.free)

    def event(self) -> SimpleNamespace:
        at = max(self.free, self.now)
        return SimpleNamespace(at=at, elapsed_time=lambda other: (other.at - at) * 1000)

    def step(self, name="it", host=HOST):
        """A step of two phases, a kernel each."""

        def run():
            for _ in ("forward", "backward"):
                self.now += host
                self.issue(name, KERNEL)
                yield

        return run


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.issue("spin", cycles / CYCLES))
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(timing, "_event", gpu.event)
    monkeypatch.setattr(timing, "perf_counter", lambda: gpu.now)
    return gpu


@pytest.mark.parametrize("host", [HOST, 40 * HOST], ids=["short", "longer than its kernels"])
def test_a_phase_is_the_time_of_its_kernels(gpu, host):
    """However long Python takes: the queue is full before the first event."""
    rounds = timing.interleaved({"it": gpu.step(host=host)}, CUDA, 0.0)["it"]
    assert rounds == [pytest.approx((KERNEL, KERNEL))] * 5


def test_with_the_host_a_phase_holds_what_it_waits_for(gpu):
    slow = gpu.step(host=3 * KERNEL)
    rounds = timing.interleaved({"it": slow}, CUDA, 0.0, with_host=True)["it"]
    assert [phases[0] for phases in rounds] == [pytest.approx(4 * KERNEL)] * 5
    assert "spin" not in gpu.ran


def test_a_step_that_waits_for_the_gpu_is_timed_all_the_same(gpu):
    def step():
        gpu.issue("it", KERNEL)
        gpu.synchronize(CUDA)
        yield

    assert timing.interleaved({"it": step}, CUDA, 0.0)["it"] == [pytest.approx((KERNEL,))] * 5
    assert gpu.now < 5 * 2 * timing.MOST_SPIN


def test_ways_take_turns(gpu):
    timing.interleaved({name: gpu.step(name) for name in "ab"}, CUDA, 0.0, least=2)
    turns = "".join(name for name in gpu.ran if name != "spin")
    assert turns == "aabb" + "bbaa" + "aabb"  # before anything is timed, and two rounds


@pytest.mark.parametrize("after", [0, 1, 4], ids="after {} runs".format)
def test_a_way_that_fails_fails_alone(after):
    left, said = [after], []

    def fails():
        if not left[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        left[0] -= 1
        yield

    def works():
        yield

    steps = {"fails": fails, "works": works}
    with pytest.raises(torch.OutOfMemoryError):
        timing.interleaved(steps, CPU, 0.0)
    left[0] = after
    options = {"failed": lambda name, error: said.append((name, str(error)))}
    rounds = timing.interleaved(steps, CPU, 0.0, **options)
    assert rounds.keys() == {"works"} and len(rounds["works"]) == 5
    assert said == [("fails", "CUDA out of memory.")]
    left[0] = after
    assert timing.interleaved({"fails": fails}, CPU, 0.0, **options) == {}


def test_the_host_counts_for_few_tokens_on_a_gpu():
    cases = [(512, CUDA), (513, CUDA), (1, CPU)]
    assert [timing.host_counts(*case) for case in cases] == [True, False, False]
