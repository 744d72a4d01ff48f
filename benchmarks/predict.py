# SPDX-License-Identifier: Apache-2.0
"""What the model of the machine says of the problems that ``make bench`` measures.

python benchmarks/predict.py    # a Markdown table for an H100, which need not be here
"""

from __future__ import annotations

from dataclasses import replace

from baselines import Problem
from problems import problems

from fastlora.operator import plans

OPS = ("forward", "backward")
IMPLEMENTATIONS = ("blocks", "library", "triton")


def predicted(problem: Problem, way: str, machine) -> dict[str, float] | None:
    """Return seconds by phase; None for a way, or on a machine, that is not modelled."""
    from prediction import best_configs, frozen, predict

    posed, impl = _posed(problem), way.removeprefix("fastlora ")
    if machine is None or impl not in ("frozen", *IMPLEMENTATIONS):
        return None
    if impl == "frozen":
        found = {op: frozen(op, posed, machine).seconds for op in OPS}
    else:
        found = {}
        for op in OPS:
            configs = best_configs(op, posed, machine.chip, machine, {})
            found[op] = predict(op, impl, posed, machine, configs).seconds
    return {**found, "both": sum(found.values())}


def fastest(problem: Problem, machine) -> tuple[float, str]:
    """Return forward and backward by the best products of "triton", in seconds, and which.

    Those that start early are among them, which `best_configs` leaves to measurements.
    """
    from fastlora_kernels.configs import candidates, kind_of
    from prediction import best_configs, predict

    posed, total, how = _posed(problem), 0.0, []
    for op, name in zip(OPS, ("product", "dx"), strict=True):
        rest = kind_of(posed.dtype, posed.adapter), posed.R, posed.dropout, machine.chip
        configs = best_configs(op, posed, machine.chip, machine, {})
        seconds, config = min(
            (
                (predict(op, "triton", posed, machine, {**configs, name: c}).seconds, c)
                for c in candidates(name, *rest)
            ),
            key=lambda found: found[0],
        )
        total += seconds
        early = " early" * config.early
        how.append(f"{config.low_rank}{early} {config.block_m} x {config.block_n}")
    return total, "; ".join(how)


def _posed(problem: Problem) -> plans.Problem:
    sizes = problem.M, problem.N, problem.K, problem.R
    return plans.Problem(*sizes, problem.dtype, problem.adapter, problem.p > 0)


def main() -> None:
    from machine import H100

    print("| problem, forward + backward | frozen, µs | torch | library | triton | tuned | as |")
    print("|---|--:|--:|--:|--:|--:|---|")
    for problem in problems("cuda"):
        alone = predicted(problem, "frozen", H100)["both"]
        cells = [f"{alone * 1e6:.0f}"]
        for impl in IMPLEMENTATIONS:
            cells.append(f"{predicted(problem, f'fastlora {impl}', H100)['both'] / alone:.2f}")
        tuned, how = fastest(problem, H100)
        name = str(replace(problem, name=problem.name.replace("Llama-3-", "")))
        print(f"| {name} | " + " | ".join([*cells, f"{tuned / alone:.2f}", how]) + " |")


if __name__ == "__main__":
    main()
