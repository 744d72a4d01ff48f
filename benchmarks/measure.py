# SPDX-License-Identifier: Apache-2.0
"""One problem, measured: the time and memory of every way; and the machine's ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator

import torch
from baselines import WAYS, Problem, cannot
from predict import predicted
from torch import Tensor, nn
from tqdm import tqdm

from fastlora import plans
from fastlora.timing import interleaved, ratio

PHASES = ("forward", "backward", "both")


def measure(problem: Problem, ways: list[str], seconds: float) -> list[dict]:
    """Return a row for each way that can run ``problem``; the frozen layer is always one.

    A way that fails has none; without the frozen layer there are no rows.
    """
    device = torch.device(problem.device)
    layers, operands = {}, []

    def first_step(way: str) -> Iterator[None]:
        operands[:] = operands or problem.inputs()
        layers[way] = WAYS[way](problem)
        yield from _step(layers[way], *operands)()

    for way in ways:
        if cannot(way, problem) is None and not runs(way, lambda way=way: first_step(way)):
            layers.pop(way, None)
    if "frozen" not in layers:
        return []
    x, dy = operands
    memory = {way: _memory(layer, x, dy) for way, layer in layers.items()}
    steps = {way: _step(layer, x, dy) for way, layer in layers.items()}
    rounds = {
        way: [(f, b, f + b) for f, b in found]
        for way, found in interleaved(steps, device, seconds).items()
    }
    machine, rows = machine_of(device), []
    for way, found in rounds.items():
        row = {"way": way, "rounds": len(found), **memory[way]}
        row["predicted_s"] = predicted(problem, way, machine)
        for i, phase in enumerate(PHASES):
            times = [times[i] for times in found]
            low, high = (statistics.quantiles(times, n=10)[j] for j in (1, 7))
            row[phase] = {
                "median_s": statistics.median(times),
                "p20_s": low,
                "p80_s": high,
                "ratio": ratio(times, [times[i] for times in rounds["frozen"]]),
                "tflops": flops(problem, way, phase) / statistics.median(times) / 1e12,
                "bytes_s": traffic(problem, way, phase) / statistics.median(times),
            }
        rows.append(row)
    return rows


def runs(way: str, step: Callable[[], Iterable[None]]) -> bool:
    """Run ``step`` once; return whether that worked, and say so where it did not.

    A compiler that is missing or too little memory takes the row of one way, not the whole run.
    """
    try:
        list(step())
    except Exception as error:
        tqdm.write(
            f"left out {way}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False
    return True


def machine_of(device: torch.device):
    """Return the model of ``device``, or None where there is none."""
    if device.type != "cuda" or plans.triton_missing() is not None:
        return None
    from fastlora_kernels.machine import Machine

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


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return the copy bandwidth (bytes/s, read and written) and the matrix rate (FLOP/s) here."""
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


def _step(layer: nn.Module, x: Tensor, dy: Tensor):
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step():
        y = layer(x)
        yield
        torch.autograd.grad(y, trained, dy)
        yield

    return step


def _memory(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, int]:
    """Return what a step allocates at its peak, and what it keeps from forward to backward."""
    run = _step(layer, x, dy)
    list(run())  # what is allocated once (workspaces, compiled code) is not the step's
    return {"kept_bytes": kept_bytes(layer, x), "peak_bytes": peak_bytes(run, x.device)}


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return what ``layer`` keeps for backward beside its own parameters."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
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
