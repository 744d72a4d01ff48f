# SPDX-License-Identifier: Apache-2.0
"""``make bench``: the whole table for this machine, as JSON, Markdown and plots.

python benchmarks/run.py [--minutes 9.7] [--output benchmarks/results] [--only TEXT]

The files are written anew after every problem, the plots after every section: whatever ends a run
leaves what was measured until then.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's own messages

import decoder_layer
import dora_layer
import end_to_end
import experts_block
import mixed_layer
import mixed_model
import report
import torch
from baselines import WAYS
from measure import ceilings, failure, free_memory, measure
from problems import problems
from tqdm import tqdm

from fastlora.files import replace_file
from fastlora.operator import measured

ROOT = Path(__file__).parent.parent
COMPILED_PROBLEMS = 2  # torch.compile takes tens of seconds each on a CPU
TIMED = 0.7  # of a problem's time; the rest is for making its layers and measuring their memory
LEAST_SECONDS = 0.5  # of timing, however short the time


@dataclass(frozen=True)
class Section:
    """A part of a run: its name in the JSON file, and its share of the time by those of others.

    ``measure`` takes a problem, ways and seconds and returns rows; ``entries`` turns a problem and
    what was found, its rows or the error that left none, into what the JSON file holds of it.
    """

    name: str
    title: str
    share: float
    problems: list
    ways: list[str]
    measure: Callable[[object, list[str], float], list[dict]]
    entries: Callable[[object, dict], list[dict]]


def sections(device: str) -> list[Section]:
    """Return what there is to measure on ``device``."""
    return [
        Section(
            name="problems",
            title="layers",
            share=0.41,
            problems=list(problems(device)),
            ways=list(WAYS),
            measure=measure,
            entries=of_layers,
        ),
        Section(
            name="decoder_layers",
            title="decoder layers",
            share=0.155,
            problems=list(decoder_layer.problems(device)),
            ways=list(decoder_layer.WAYS),
            measure=decoder_layer.measure,
            entries=lambda p, found: [{**described(p), "tokens": p.rows, **found}],
        ),
        Section(
            name="end_to_end",
            title="training steps of whole models",
            share=0.235,
            problems=list(end_to_end.problems(device)),
            ways=list(end_to_end.WAYS),
            measure=end_to_end.Measure(),
            entries=of_models,
        ),
        Section(
            name="mixed_layers",
            title="adapters mixed in a layer",
            share=0.03,
            problems=list(mixed_layer.problems(device)),
            ways=list(mixed_layer.WAYS),
            measure=mixed_layer.measure,
            entries=of_layers,
        ),
        Section(
            name="mixed_models",
            title="training steps of mixed adapters",
            share=0.13,
            problems=list(mixed_model.problems(device)),
            ways=list(mixed_model.WAYS),
            measure=mixed_model.Measure(),
            entries=lambda p, found: [
                {**row, "adapters": p.adapters} for row in of_models(p, found)
            ],
        ),
        Section(
            name="experts",
            title="experts of mixtures",
            share=0.04,
            problems=list(experts_block.problems(device)),
            ways=list(experts_block.WAYS),
            measure=experts_block.measure,
            entries=of_layers,
        ),
        Section(
            name="dora_layers",
            title="layers with DoRA",
            share=0.03,
            problems=list(dora_layer.problems(device)),
            ways=list(dora_layer.WAYS),
            measure=dora_layer.measure,
            entries=of_layers,
        ),
    ]


def of_layers(problem: object, found: dict) -> list[dict]:
    """Return one entry that holds the rows of all ways."""
    return [{**described(problem), **found}]


def of_models(problem: end_to_end.Problem, found: dict) -> list[dict]:
    """Return a row for each way, or one for all of them where the model itself failed."""
    named = {"model": problem.model, "batch": problem.batch, "tokens": problem.tokens}
    return [{**named, **row} for row in found["rows"] or [{"error": found["error"]}]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=9.7, help="start nothing new after so long"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", default="", help="measure only what has this in its name")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    all_of_it = sections(device.type)
    chosen = [
        replace(section, problems=[p for p in section.problems if options.only in p.name])
        for section in all_of_it
    ]
    chosen = [section for section in chosen if section.problems]
    if not chosen:
        names = dict.fromkeys(p.name for section in all_of_it for p in section.problems)
        parser.error(f"--only {options.only!r} is in no name; there are: {'; '.join(names)}")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / measured.path_of(device).name
    started = time.perf_counter()
    run(chosen, device, started + 60 * options.minutes, path)
    print(f"measured in {(time.perf_counter() - started) / 60:.1f} min: {path}, .md and plots")


def run(chosen: list[Section], device: torch.device, until: float, path: Path) -> None:
    """Measure ``chosen``, start nothing after the time ``until``, and keep all of it at ``path``.

    A section gets its share of the time that is left, so that what one does not use is for others.
    """
    result = {"machine": machine(device), "ceilings": {}}
    result |= {section.name: [] for section in sections(device.type)} | {"left_out": []}
    layers = [p for section in chosen if section.name == "problems" for p in section.problems]
    for dtype in sorted({p.dtype for p in layers}, key=str):
        result["ceilings"][str(dtype)] = ceilings(device, dtype)
    for i, section in enumerate(chosen):
        now = time.perf_counter()
        share = section.share / sum(other.share for other in chosen[i:]) * max(0.0, until - now)
        about = f"{len(section.problems)} problems, about {share / 60:.1f} min"
        print(f"{section.title}: {about}", flush=True)
        free_memory()  # of the section before
        try:
            measure_section(section, now + share, result, path)
        finally:
            save(result, path)


def measure_section(section: Section, until: float, result: dict, path: Path) -> None:
    """Add the problems of ``section`` to ``result``, one after another until it is time to stop."""
    progress = tqdm(section.problems, desc=section.title, unit="problem")
    for i, problem in enumerate(progress):
        left = until - time.perf_counter()
        if left <= 0:
            names = [str(p) for p in section.problems[i:]]
            result["left_out"] += names
            tqdm.write(f"left out, as the time was over: {'; '.join(names)}")
            return
        progress.set_description(str(problem))
        seconds = max(LEAST_SECONDS, TIMED * left / (len(section.problems) - i))
        ways = [w for w in section.ways if w != "PEFT compiled" or i < COMPILED_PROBLEMS]
        try:
            found = {"rows": section.measure(problem, ways, seconds)}
        except Exception as error:
            found = {"rows": [], "error": failure(error)}
            tqdm.write(f"left out {problem}: {found['error']}")
        result[section.name] += section.entries(problem, found)
        save(result, path, pictures=False)


def save(result: dict, path: Path, pictures: bool = True) -> None:
    """Write ``result`` to ``path``, and the report beside it."""
    text = (json.dumps(result, indent=1) + "\n").encode()
    replace_file(path, lambda file: file.write(text))
    report.write(path, pictures)


def described(problem: object) -> dict:
    """Return a problem's fields as JSON holds them."""
    return {k: str(v) if isinstance(v, torch.dtype) else v for k, v in asdict(problem).items()}


def machine(device: torch.device) -> dict:
    """Return what a figure has to be read with."""
    import fastlora

    found = {
        "device": measured.device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": measured.version_of("peft"),
        "fastlora": fastlora.__version__,
        "commit": _commit(),
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    if device.type == "cuda":
        versions = {"driver": measured.driver(), "triton": measured.version_of("triton")}
        found |= {"cuda": torch.version.cuda, **versions}
        found["tuned problems"] = len(measured.known(device))  # what `fastlora tune` left for ours
    return found


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
