# SPDX-License-Identifier: Apache-2.0
"""What the model of the machine says of the problems that ``make bench`` measures.

python benchmarks/predict.py    # a Markdown table for an H100, which need not be here
"""

from dataclasses import replace

import torch
from baselines import Problem
from problems import problems

from fastlora.operator import plans

IMPLEMENTATIONS = ("blocks", "library", "triton")


def predicted(problem: Problem, way: str, machine, best: bool = False) -> dict | None:
    """Return seconds by phase; None for a way, or on a machine, that is not modelled.

    Of the configs that the launchers run with here, or of those that are predicted ``best``.
    """
    impl = way.removeprefix("fastlora ")
    if machine is None or impl not in ("frozen", *IMPLEMENTATIONS):
        return None
    from prediction import OPS, predict

    posed, found = _posed(problem), {}
    for op in OPS:
        configs = _best(op, posed, machine) if best else _own(op, impl, posed, problem.device)
        found[op] = predict(op, impl, posed, machine, configs).seconds
    return {**found, "both": sum(found.values())}


def _best(op: str, posed: plans.Problem, machine) -> dict:
    from prediction import best_configs

    return best_configs(op, posed, machine)


def _own(op: str, impl: str, posed: plans.Problem, device: str) -> dict:
    """Return what was measured on this machine, if anything was."""
    if impl in ("frozen", "blocks") or not torch.cuda.is_available():
        return {}
    return dict(plans.choose(op, impl, posed, torch.device(device)).configs)


def _posed(problem: Problem) -> plans.Problem:
    sizes = problem.M, problem.N, problem.K, problem.R
    return plans.Problem(*sizes, problem.dtype, problem.adapter, problem.p > 0)


def main() -> None:
    from machine import H100

    print("| problem, forward + backward | frozen, µs | blocks | library | triton | best | as |")
    print("|---|--:|--:|--:|--:|--:|---|")
    for problem in problems("cuda"):
        alone = predicted(problem, "frozen", H100)["both"]
        found = [predicted(problem, f"fastlora {impl}", H100) for impl in IMPLEMENTATIONS]
        found.append(predicted(problem, "fastlora triton", H100, best=True))
        ratios = " | ".join(f"{seconds['both'] / alone:.2f}" for seconds in found)
        wide = [_best(op, _posed(problem), H100)[name] for op, name in WIDE.items()]
        how = "; ".join(f"{c.low_rank} {c.block_m} x {c.block_n}" for c in wide)
        name = str(replace(problem, name=problem.name.replace("Llama-3-", "")))
        print(f"| {name} | {alone * 1e6:.0f} | {ratios} | {how} |")


WIDE = {"forward": "outputs", "backward": "input_grad"}


if __name__ == "__main__":
    main()
