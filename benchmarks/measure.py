# SPDX-License-Identifier: Apache-2.0
"""One problem, measured: time and memory of every way, or its error; and the machine's ceilings."""

import contextlib
import copy
import functools
import gc
import statistics
import traceback
from collections.abc import Callable, Iterator

import torch
from baselines import WAYS, Problem, cannot
from predict import predicted
from torch import Tensor, nn
from tqdm import tqdm

from fastlora.operator import plans
from fastlora.operator.tuning import host_counts, interleaved

PHASES = ("forward", "backward", "both")
LEAST = 3  # rounds, however short the time


def measure(problem: Problem, ways: list[str], seconds: float) -> list[dict]:
    """Return a row for each way that ``problem`` is for, with the error of one that failed.

    Where the frozen layer failed there are times and no ratios.
    """
    posed = OneWeight(**vars(problem))
    x, dy = posed.inputs()
    turns = Turns(torch.device(problem.device))
    for way in ways:
        if cannot(way, problem) is None:
            turns.join(way, lambda way=way: Step(WAYS[way](posed), x, dy))
    with_host = host_counts(problem.M, turns.device)
    seconds = seconds / 2 if with_host else seconds
    for way, phases in by_phase(turns.rounds(seconds)).items():
        for phase, found in phases.items():
            found["tflops"] = flops(problem, way, phase) / found["median_s"] / 1e12
            found["bytes_s"] = traffic(problem, way, phase) / found["median_s"]
        turns.rows[way] |= phases
    if with_host:
        for way, phases in by_phase(turns.rounds(seconds, with_host=True)).items():
            for phase, found in phases.items():
                turns.rows[way][phase]["with_host_s"] = found["median_s"]
                turns.rows[way][phase]["with_host_ratio"] = found["ratio"]
    for way in turns.rows:
        turns.note(way, memory)
        turns.note(way, lambda _, way=way: _predicted(problem, way))
    return list(turns.rows.values())


class OneWeight(Problem):
    """A problem whose frozen weight is made once: each layer is a module of its own around it."""

    @functools.cached_property
    def _linear(self) -> nn.Linear:
        return super().linear()

    def linear(self) -> nn.Linear:
        return sharing(self._linear)


def sharing(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` around the same parameters and buffers."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


class Step:
    """Forward and backward of ``layer``, which are its two phases."""

    def __init__(self, layer: nn.Module, x: Tensor, dy: Tensor | list[Tensor]) -> None:
        self.layer, self.x, self.dy = layer, x, dy
        self.trained = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def __call__(self) -> Iterator[None]:
        y = self.layer(self.x)
        yield
        torch.autograd.grad(y, self.trained, self.dy)
        yield


def step_of(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Iterator[None]]:
    """Return the `Step`; or forward alone without gradients, where x requires none."""

    @torch.no_grad()
    def decode() -> Iterator[None]:
        layer(x)
        yield

    return Step(layer, x, dy) if x.requires_grad else decode


class Turns:
    """The ways that take turns at one problem: the step and the row of each.

    A compiler that is missing or too little memory costs one way, not the run: a way that fails
    has no step any more, and in its row the error beside what was found before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: dict[str, Callable[[], Iterator[None]]] = {}
        self.rows: dict[str, dict] = {}

    def join(
        self, way: str, make: Callable[[], Callable[[], Iterator[None]]], run: bool = True
    ) -> None:
        """Give ``way`` a row and the step that ``make()`` returns, which is ``run`` once.

        `rounds` runs it as well before the first that is timed: enough for a step of seconds.
        """
        self.rows[way] = {"way": way}
        try:
            self.steps[way] = make()
            if run:
                list(self.steps[way]())
        except Exception as error:
            self._failed(way, error)

    def rounds(self, seconds: float, with_host: bool = False) -> dict[str, list[tuple]]:
        """Return what `interleaved` finds, and note in each row how many rounds there were."""
        # Looked up for each call: a step that failed is kept by nobody.
        steps = {way: lambda way=way: self.steps[way]() for way in self.steps}
        options = {"with_host": with_host, "failed": self._failed}
        found = interleaved(steps, self.device, seconds, LEAST, **options)
        for way, rounds in found.items():
            self.rows[way].setdefault("rounds", len(rounds))
        return found

    def time(self, seconds: float, with_host: bool = False) -> None:
        """Add to each row what `by_phase` finds, and the ratio to PEFT's time of both directions.

        That is None where PEFT's was not measured.
        """
        rounds = self.rounds(seconds, with_host)
        times = {way: [sum(phases) for phases in found] for way, found in rounds.items()}
        for way, phases in by_phase(rounds).items():
            by_peft = ratio(times[way], times["PEFT"]) if "PEFT" in times else None
            self.rows[way] |= {**phases, "ratio_to_peft": by_peft}

    def note(self, way: str, find: Callable[[Callable[[], Iterator[None]]], dict]) -> None:
        """Add to the row of ``way`` what ``find`` returns for its step, unless it failed before."""
        try:
            if way in self.steps:
                self.rows[way] |= find(self.steps[way])
        except Exception as error:
            self._failed(way, error)

    def _failed(self, way: str, error: Exception) -> None:
        self.steps.pop(way, None)
        self.rows[way]["error"] = failure(error)
        tqdm.write(f"left out {way}: {self.rows[way]['error']}")


def failure(error: Exception) -> str:
    """Return the first line of ``error``, and free what the functions that it ended still hold."""
    line = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    free_memory()
    return line


def free_memory() -> None:
    """Free what nobody holds but itself, and give the GPU's memory back."""
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # a GPU that a kernel has brought down
            torch.cuda.empty_cache()


def by_phase(rounds: dict[str, list[tuple]]) -> dict[str, dict[str, dict]]:
    """Return for each way and phase percentiles in seconds and the ratio to the frozen layer.

    The ratio is None where that was not measured. ``rounds`` are those of forward and backward, or
    of forward alone.
    """
    times = {
        way: {
            **dict(zip(PHASES, zip(*found, strict=True), strict=False)),
            "both": [sum(phases) for phases in found],
        }
        for way, found in rounds.items()
    }
    frozen = times.get("frozen", {})
    return {
        way: {phase: _percentiles(mine[phase], frozen.get(phase)) for phase in mine}
        for way, mine in times.items()
    }


def _percentiles(times: list[float], frozen: list[float] | None) -> dict:
    low, high = (statistics.quantiles(times, n=10)[i] for i in (1, 7))
    found = {"median_s": statistics.median(times), "p20_s": low, "p80_s": high}
    return {**found, "ratio": None if frozen is None else ratio(times, frozen)}


def ratio(times: list[float], baseline: list[float]) -> float:
    """Return the median over rounds of this way's time by the baseline's in the same round.

    They are those of one call of `interleaved`.
    """
    return statistics.median(t / b for t, b in zip(times, baseline, strict=True))


def _predicted(problem: Problem, way: str) -> dict:
    if problem.weights != "dense":  # the model knows of no weights that are made for a product
        return {"predicted_s": None}
    return {"predicted_s": predicted(problem, way, machine_of(torch.device(problem.device)))}


def machine_of(device: torch.device):
    """Return the model of ``device``, or None where there is none."""
    if device.type != "cuda" or plans.triton_unusable(device) is not None:
        return None
    from machine import Machine

    return Machine.of(device)


def flops(problem: Problem, way: str, phase: str) -> float:
    """Return the floating-point operations that the mathematics of a layer needs."""
    frozen = 2 * problem.M * problem.N * problem.K
    shrink, expand = (2 * problem.M * problem.R * side for side in (problem.K, problem.N))
    forward = frozen + (0 if way == "frozen" else shrink + expand)
    backward = frozen + (0 if way == "frozen" else 2 * (shrink + expand))
    return {"forward": forward, "backward": backward, "both": forward + backward}[phase]


def traffic(problem: Problem, way: str, phase: str) -> float:
    """Return the bytes that pass through memory if every wide tensor moves once and s not at all.

    Forward reads x and w and writes y; backward reads dy and w, writes dx, and reads x for da.
    """
    M, N, K = problem.M, problem.N, problem.K
    forward = problem.dtype.itemsize * (M * K + N * K + M * N)
    backward = forward + (0 if way == "frozen" else problem.dtype.itemsize * M * K)
    return {"forward": forward, "backward": backward, "both": forward + backward}[phase]


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float | str]:
    """Return the copy bandwidth (bytes/s, read and written) and the matrix rate (FLOP/s) here.

    Where they can't be measured, the error: what is read beside them still can.
    """
    try:
        return _ceilings(device, dtype)
    except Exception as error:
        return {"error": failure(error)}


def _ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    cpu = device.type == "cpu"
    t = torch.empty((1 << 27) if cpu else (1 << 30), dtype=torch.uint8, device=device).zero_()
    other = torch.empty_like(t)
    n = 2048 if cpu else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    copy = _best(lambda: other.copy_(t), device)
    product = _best(lambda: torch.mm(a, b, out=out), device)
    return {"copy_bytes_s": 2 * t.numel() / copy, "matrix_flops_s": 2 * n**3 / product}


def _best(call: Callable[[], Tensor], device: torch.device, seconds: float = 1.0) -> float:
    def step():
        call()
        yield

    return min(t for (t,) in interleaved({"it": step}, device, seconds)["it"])


def memory(step: Step) -> dict[str, int]:
    """Return what a step allocates at its peak, and what it keeps from forward to backward."""
    list(step())  # what is allocated once (workspaces, compiled code) is not the step's
    kept = kept_bytes(step.layer, step.x)
    return {"kept_bytes": kept, "peak_bytes": peak_bytes(step, step.x.device)}


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return what ``layer`` keeps for backward beside its own parameters."""

    def storages(t: Tensor) -> dict[int, int]:
        """Return the bytes of each storage, also of the tensors that a quantised one is made of."""
        inner = getattr(t, "__tensor_flatten__", None)
        parts = [getattr(t, name) for name in inner()[0]] if inner else [t]
        each = [part.untyped_storage() for part in parts]
        return {storage.data_ptr(): storage.nbytes() for storage in each}

    kept: dict[int, int] = {}
    own = {at for p in layer.parameters() for at in storages(p)}

    def pack(t: Tensor) -> Tensor:
        kept.update({at: size for at, size in storages(t).items() if at not in own})
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    del y
    return sum(kept.values())


def peak_bytes(run, device: torch.device) -> int:
    """Return how many bytes one ``run()`` holds at most beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        list(run())
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=activities) as found:
        list(run())
    live = peak = 0
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
