# SPDX-License-Identifier: Apache-2.0
"""What a GPU answers first: is a Triton product as fast as the library's, what does the host cost?

python benchmarks/first_minute.py [--tokens 8192 128] [--seconds 0.5] [--output FILE.json]

One layer of 4096 x 4096, r = 16, bfloat16: the frozen layer, every implementation, and "triton"
with each config that the tuner would try; the products without a low-rank part; what descriptors
and launches take. The JSON file is written anew after every part. On a CPU, the ways of a CPU.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from baselines import Problem
from measure import ceilings, failure
from run import ROOT, machine

import fastlora
from fastlora.files import replace_file
from fastlora.operator import measured, plans, steps
from fastlora.operator.operands import Operands
from fastlora.operator.tuning import Step, interleaved

SIZE = 4096  # N and K
CALLS, ROUNDS = 50, 20  # of what the host's time is taken of


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 128])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each way of each size")
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = f"first-minute-{measured.path_of(device).stem}.json"
    path = options.output or ROOT / "benchmarks" / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(device), "ceilings": ceilings(device, torch.bfloat16)}
    with torch.no_grad(), steps.exact(device):
        for part, rows in measure(options.tokens, options.seconds, device):
            result[part] = rows
            text = json.dumps(result, indent=1) + "\n"
            replace_file(path, lambda file, text=text: file.write(text.encode()))
            print(table(part, rows), flush=True)
    print(path)


def measure(
    tokens: list[int], seconds: float, device: torch.device
) -> Iterator[tuple[str, list[dict]]]:
    """Yield the name and the rows of each part."""
    for m in tokens:
        problem = Problem("first minute", m, SIZE, SIZE, device=device.type)
        x, dy = (t.detach() for t in problem.inputs())
        w, (a, b) = problem.linear().weight, problem.factors()
        yield f"layers, {m} tokens", timed(layers(x, dy, w, a, b), device, seconds)
        if plans.triton_unusable(device) is None:
            yield f"products alone, {m} tokens", timed(products(x, w), device, seconds)
    if plans.triton_unusable(device) is None:
        yield "one tile", timed(one_tile(device), device, seconds)
    yield "host", host(device)


def layers(x, dy, w, a, b) -> dict[str, Step]:
    """Return the ways of one layer: forward, then backward."""

    def frozen() -> Iterator[None]:
        F.linear(x, w)
        yield
        dy @ w
        yield

    ways = {"frozen": frozen}
    of = x, [Operands(w, a, b, None, None, 2.0, 0.0)]
    s = [x @ a.t()]

    def way(module, configs: dict | None = None) -> Step:
        def step() -> Iterator[None]:
            steps.forward(module, *of, configs)
            yield
            steps.backward(module, [dy], *of, s, True, [(True, True)], configs)
            yield

        return step

    for impl in plans.usable_implementations(x.dtype, x.device):
        ways[impl] = way(importlib.import_module(plans.MODULES[impl]))
    if "triton" in ways:
        from fastlora_kernels import steps as kernels

        for config in tried("outputs", x):
            # Each direction by itself: what dx cannot run with takes its default there.
            names = [name for name in ("outputs", "input_grad") if config in tried(name, x)]
            ways[named(config)] = way(kernels, dict.fromkeys(names, config))
    return ways


def products(x, w) -> dict[str, Step]:
    """Return the frozen product by the library, and by the main loops of Triton alone."""
    from fastlora_kernels.steps import outputs

    of = x, [Operands(w, None, None, None, None, 1.0, 0.0)], [None]
    ways = {"frozen": once(lambda: F.linear(x, w))}
    for config in tried("outputs", x):
        ways[named(config)] = once(lambda c=config: outputs(*of, configs={"outputs": c}))
    return ways


def one_tile(device: torch.device) -> dict[str, Step]:
    """Return products of one program each: what descriptors and the pipeline's ends take."""
    x, w = (torch.randn(128, 64, device=device).bfloat16() for _ in range(2))
    return products(x, w)


def host(device: torch.device) -> list[dict]:
    """Return rows of the host's seconds: a launch, a layer's forward, and with its backward."""
    problem = Problem("host", 16, 64, 64, device=device.type)
    x, dy = (t.detach() for t in problem.inputs())
    w, (a, b) = problem.linear().weight, problem.factors()

    def layer(impl: str) -> Callable[[], object]:
        def call() -> None:
            y = fastlora.lora_linear(x, w, a, b, scaling=2.0, impl=impl)
            torch.autograd.grad(y, [a, b], dy)

        return torch.enable_grad()(call)

    calls = {"torch.mm": lambda: torch.mm(x, w.t()), "empty": lambda: torch.empty_like(x)}
    if plans.triton_unusable(device) is None:
        from fastlora_kernels.steps import shrink

        # float32 adapters have no scaled copy of s: it is this launch and nothing else.
        of = [Operands(w, a.detach().float(), b.detach().float(), None, None, 2.0, 0.0)]
        calls["shrink, one launch"] = lambda: shrink(x, of)
    for impl in plans.usable_implementations(x.dtype, device):
        calls[f"{impl}, forward"] = lambda impl=impl: fastlora.lora_linear(
            x, w, a, b, scaling=2.0, impl=impl
        )
        calls[f"{impl}, forward and backward"] = layer(impl)
    return [{"way": name, "host_s": host_seconds(call, device)} for name, call in calls.items()]


def host_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds that the host takes for ``call``, the GPU's time left out."""
    times = []
    for _ in range(ROUNDS + 1):  # the first compiles
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS)
    return statistics.median(times[1:])


def timed(ways: dict[str, Step], device: torch.device, seconds: float) -> list[dict]:
    """Return a row for each way: median seconds of each phase, and the frozen layer's by them."""
    errors: dict[str, str] = {}
    rounds = interleaved(
        ways,
        device,
        seconds * len(ways),
        failed=lambda way, error: errors.update({way: failure(error)}),
    )
    medians = {
        way: [statistics.median(times) for times in zip(*found, strict=True)]
        for way, found in rounds.items()
    }
    frozen = medians.get("frozen")
    rows = []
    for way in ways:
        if way in errors:
            rows.append({"way": way, "error": errors[way]})
        else:
            of_frozen = [f / t for f, t in zip(frozen, medians[way], strict=True)] if frozen else []
            rows.append({"way": way, "seconds": medians[way], "rate_by_frozen": of_frozen})
    return rows


def tried(kernel: str, x: torch.Tensor) -> list:
    """Return the configs of ``kernel`` that the tuner would try, without dropout."""
    from fastlora_kernels.configs import Chip, candidates

    return candidates(kernel, "16", 16, False, Chip.of(x.device))


def named(config) -> str:
    """Return what a config is, in a few words."""
    form = config.low_rank if config.tma else "portable"
    tiles = f"{config.block_m} x {config.block_n} x {config.block_k}"
    return f"{form}, {tiles}, {config.num_warps} warps, {config.num_stages} stages"


def once(call: Callable[[], object]) -> Step:
    def step() -> Iterator[None]:
        call()
        yield

    return step


def table(part: str, rows: list[dict]) -> str:
    """Return lines for a person: microseconds, and the frozen layer's time by them."""
    lines = [f"{part} (µs of each phase; then the frozen layer's time by it)"]
    for row in rows:
        times = row.get("seconds") or [row["host_s"]] if "error" not in row else []
        cells = "".join(f"{t * 1e6:10.1f} µs" for t in times)
        cells += "".join(f"{rate:8.2f}" for rate in row.get("rate_by_frozen", ()))
        lines.append(f"  {row['way']:48}{cells or '  ' + row['error']}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
