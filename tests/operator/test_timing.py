# SPDX-License-Identifier: Apache-2.0
"""Times hold what they say, on a GPU that is simulated: a queue, and a host that fills it."""

from __future__ import annotations

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

    def host(self, seconds: float) -> None:
        self.now += seconds

    def sleep(self, cycles: int) -> None:
        self.issue("spin", cycles / CYCLES)

    def synchronize(self, device) -> None:
        self.now = max(self.now, self.free)

    def event(self, enable_timing):
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = max(self.gpu.free, self.gpu.now)

    def query(self) -> bool:
        return self.gpu.now >= self.at

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1000


@pytest.fixture
def gpu(monkeypatch):
    simulated = Gpu()
    monkeypatch.setattr(torch.cuda, "_sleep", simulated.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", simulated.synchronize)
    monkeypatch.setattr(torch.cuda, "Event", simulated.event)
    timing._cycles_per_second.cache_clear()
    yield simulated
    timing._cycles_per_second.cache_clear()


def step_of(gpu, name="it", host=HOST, kernel=KERNEL):
    def step():
        for _ in ("forward", "backward"):
            gpu.host(host)
            gpu.issue(name, kernel)
            yield

    return step


@pytest.mark.parametrize("host", [HOST, 40 * HOST], ids=["short", "longer than its kernels"])
def test_a_phase_is_the_time_of_its_kernels(gpu, host):
    """However long Python takes: the queue is full before the first event."""
    rounds = timing.interleaved({"it": step_of(gpu, host=host)}, CUDA, 0.0)["it"]
    assert len(rounds) == 5
    for phases in rounds:
        assert phases == pytest.approx((KERNEL, KERNEL))


def test_with_the_host_a_phase_holds_what_it_waits_for(gpu):
    slow = step_of(gpu, host=3 * KERNEL)
    rounds = timing.interleaved({"it": slow}, CUDA, 0.0, with_host=True)["it"]
    for phases in rounds:
        assert phases[0] == pytest.approx(4 * KERNEL)
    assert "spin" not in gpu.ran


def test_a_step_that_waits_for_the_gpu_is_timed_all_the_same(gpu):
    def step():
        gpu.issue("it", KERNEL)
        gpu.synchronize(CUDA)
        yield

    rounds = timing.interleaved({"it": step}, CUDA, 0.0)["it"]
    assert all(phases == pytest.approx((KERNEL,)) for phases in rounds)


def test_ways_take_turns_on_a_gpu_too(gpu):
    timing.interleaved({n: step_of(gpu, n) for n in "ab"}, CUDA, 0.0, least=2)
    turns = [name for name in gpu.ran if name != "spin"]
    assert turns[-8:] == ["b", "b", "a", "a", "a", "a", "b", "b"]


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
    assert timing.host_counts(512, CUDA)
    assert not timing.host_counts(513, CUDA) and not timing.host_counts(1, CPU)
