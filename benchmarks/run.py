# SPDX-License-Identifier: Apache-2.0
"""``make bench``: the whole table for this machine, as JSON, Markdown and plots.

python benchmarks/run.py [--minutes 8] [--output benchmarks/results] [--only TEXT]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's own messages

import decoder_layer
import end_to_end
import report
import torch
from baselines import WAYS, Problem
from measure import ceilings, measure
from problems import problems
from tqdm import tqdm

from fastlora import measured

ROOT = Path(__file__).parent.parent
# Of the minutes, for layers alone and then for whole decoder layers; the rest is for whole models.
LAYERS_SHARE, DECODERS_SHARE = 0.5, 0.7
COMPILED_PROBLEMS = 2  # torch.compile takes tens of seconds each on a CPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="about how long to measure")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", default="", help="measure problems whose name contains this")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    todo = [p for p in problems(device.type) if options.only in p.name]
    started = time.perf_counter()
    result = {"machine": machine(device), "ceilings": {}, "problems": []}
    for dtype in sorted({p.dtype for p in todo}, key=str):
        result["ceilings"][str(dtype)] = ceilings(device, dtype)
    progress = tqdm(todo, unit="problem")
    for i, problem in enumerate(progress):
        progress.set_description(f"{problem.name}, M={problem.M}")
        left = LAYERS_SHARE * options.minutes * 60 - (time.perf_counter() - started)
        ways = [w for w in WAYS if w != "PEFT compiled" or i < COMPILED_PROBLEMS]
        rows = measure(problem, ways, seconds=max(0.5, left / (len(todo) - i) * 0.7))
        if rows:
            result["problems"].append({**described(problem), "rows": rows})
    result["decoder_layers"] = []
    decoders = [p for p in decoder_layer.problems(device.type) if options.only in p.name]
    for i, problem in enumerate(tqdm(decoders, desc="decoder layers", unit="problem")):
        left = DECODERS_SHARE * options.minutes * 60 - (time.perf_counter() - started)
        ways = [w for w in decoder_layer.WAYS if w != "PEFT compiled" or i < COMPILED_PROBLEMS]
        rows = decoder_layer.measure(problem, ways, max(0.5, left / (len(decoders) - i) * 0.7))
        if rows:
            row = {**described(problem), "tokens": problem.rows, "rows": rows}
            result["decoder_layers"].append(row)
    models = [name for name in end_to_end.MODELS if options.only in name]
    models = models if device.type == "cuda" else models[:1]
    left = options.minutes * 60 - (time.perf_counter() - started)
    result["end_to_end"] = []
    for name in models:
        rows = end_to_end.measure(name, device, max(0.0, 0.5 * left / len(models)))
        batches = tqdm(rows, desc=name, total=len(end_to_end.BATCHES), unit="batch size")
        result["end_to_end"] += [row for rows in batches for row in rows]
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / measured.path_of(device).name
    path.write_text(json.dumps(result, indent=1) + "\n")
    report.write(path)
    print(f"measured in {(time.perf_counter() - started) / 60:.1f} min: {path}, .md and plots")


def described(problem: Problem) -> dict:
    """Return a problem's fields as JSON holds them."""
    return {k: str(v) if isinstance(v, torch.dtype) else v for k, v in asdict(problem).items()}


def machine(device: torch.device) -> dict:
    """Return what a figure has to be read with."""
    import peft

    import fastlora

    found = {
        "device": measured.device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "fastlora": fastlora.__version__,
        "commit": _commit(),
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    if device.type == "cuda":
        versions = {"driver": measured.driver(), "triton": measured.version_of("triton")}
        found |= {"cuda": torch.version.cuda, **versions}
        found["tuned problems"] = measured.count(device)  # what `fastlora tune` left for ours
    return found


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
