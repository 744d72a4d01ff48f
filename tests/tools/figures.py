# SPDX-License-Identifier: Apache-2.0
"""What every compiled program uses, kept in kernels/figures and compared; ``make figures``.

Nothing is measured: registers and stack (bytes) are those of a thread, shared memory (bytes) that
of a block, ``blocks`` how many of them a processor holds. ``ldgsts`` and ``tma`` are the loads from
global to shared memory that the program contains (by cp.async, by the tensor memory accelerator);
more than its main loop contains are what fills the pipeline. ``matrix`` names the main loop's
matrix instructions, ``loop_instructions / loop_matrix`` is what it issues for each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import triton
from compiled_cases import faults, fingerprint

FOLDER = Path(__file__).resolve().parents[2] / "kernels" / "figures"
TOLERANCE = 1.02  # of the instructions around a matrix instruction
# Less shared memory than this share: a stage of the pipeline or more is gone. Warps of their own
# that load contain the same loads whatever the number of stages.
PIPELINE = 0.7

Programs = dict[str, dict]


def read(capability: int) -> dict:
    """Return what is kept for a chip: Triton's version, the kernels' hash, figures by program."""
    return json.loads((FOLDER / f"sm_{capability}.json").read_text(encoding="utf-8"))


def compare(kept: Programs, now: Programs) -> list[str]:
    """Return what is worse now, a sentence for each program and figure."""
    worse = []
    for name in sorted(kept.keys() | now.keys()):
        if name not in now:
            worse.append(f"{name}: kept, but not compiled any more; run `make figures`")
        elif name not in kept:
            worse.append(f"{name}: compiled, but not kept; run `make figures`")
        else:
            worse += [f"{name}: {what}" for what in _worse(kept[name], now[name])]
    return worse


def _worse(kept: dict, now: dict) -> Iterable[str]:
    for figure, unit in (("registers", "registers"), ("stack", "bytes of stack")):
        if now[figure] > kept[figure]:
            yield f"{now[figure]} {unit}, {kept[figure]} before"
    if now["blocks"] < kept["blocks"]:
        yield f"{now['blocks']} blocks a processor, {kept['blocks']} before"
    loads = {"ldgsts": "LDGSTS", "tma": "TMA loads"}
    if any(kept[figure] for figure in loads) and now["shared"] < PIPELINE * kept["shared"]:
        yield f"{now['shared']} bytes of shared memory, {kept['shared']} before: a pipeline is lost"
    for figure, what in loads.items():
        for where, key in (("", figure), (" in the main loop", f"loop_{figure}")):
            if now.get(key, 0) < kept.get(key, 0):
                lost = f"{now.get(key, 0)} {what}{where}, {kept[key]} before"
                yield f"{lost}: a pipeline is lost"
    if now.get("matrix", "") != kept.get("matrix", ""):
        before = kept.get("matrix") or "none"
        yield f"matrix instructions {now.get('matrix') or 'none'} in the main loop, {before} before"
    elif kept.get("matrix") and per_matrix(now) > TOLERANCE * per_matrix(kept):
        yield (
            f"{per_matrix(now):.2f} instructions for each {kept['matrix']} of the main loop, "
            f"{per_matrix(kept):.2f} before"
        )


def per_matrix(program: dict) -> float:
    """Return how many instructions the main loop issues for each matrix instruction."""
    return program["loop_instructions"] / program["loop_matrix"]


def text(version: str, kernels: str, programs: Programs) -> str:
    """Return a chip's file: JSON, a line for each program."""
    lines = (f" {json.dumps(n)}: {json.dumps(programs[n])}" for n in sorted(programs))
    head = f'{{"triton": "{version}", "kernels": "{kernels}", "programs": {{'
    return f"{head}\n" + ",\n".join(lines) + "\n}}\n"


def table(programs: Programs) -> str:
    """Return the least and the most that the programs of a kernel and a config use, in Markdown."""
    groups = defaultdict(list)
    for name, program in programs.items():
        kernel, _, config, _ = name.split(" | ")
        groups[kernel, config, program.get("matrix", "")].append(program)
    rows = [
        "| kernel | config | programs | registers | stack | shared KB | blocks | loads | matrix | "
        "instructions a matrix |",
        "|---|---|" + "--:|" * 6 + "---|--:|",
    ]
    for (kernel, config, matrix), group in sorted(groups.items()):
        shared = _range([round(p["shared"] / 1024) for p in group])
        loads = _range([p.get("loop_ldgsts", 0) + p.get("loop_tma", 0) for p in group])
        cells = kernel.removesuffix("_kernel"), config, len(group)
        cells += *(_range([p[f] for p in group]) for f in ("registers", "stack")), shared
        cells += _range([p["blocks"] for p in group]), loads, matrix
        cells += (_range([per_matrix(p) for p in group], ".1f") if matrix else "",)
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def _range(values: list, form: str = "") -> str:
    least, most = f"{min(values):{form}}", f"{max(values):{form}}"
    return least if least == most else f"{least}–{most}"


def known() -> dict[int, Programs]:
    """Return by chip what is kept of the same kernels, compiled by the same Triton."""
    kept = {}
    for path in FOLDER.glob("sm_*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        if (found["triton"], found["kernels"]) == (triton.__version__, fingerprint()):
            kept[int(path.stem.removeprefix("sm_"))] = found["programs"]
    return kept


def compiled(kept: dict[int, Programs]) -> list[dict]:
    """Return the reports of compiled_cases.py, which uses every processor of this machine.

    The first one says what there is, the others are of a program each that is not in ``kept``.
    """
    of = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    script, environment = Path(__file__).with_name("compiled_cases.py"), {"TRITON_INTERPRET": "0"}
    names = json.dumps([(chip, name) for chip, programs in kept.items() for name in programs])

    def share(i: int) -> str:
        command = [sys.executable, str(script), str(i), str(of), "every"]
        options = {"env": os.environ | environment, "text": True, "check": True}
        return subprocess.run(command, input=names, stdout=subprocess.PIPE, **options).stdout

    with ThreadPoolExecutor(of) as pool:
        return [json.loads(line) for out in pool.map(share, range(of)) for line in out.splitlines()]


def main() -> None:
    print("compiling what is new for every chip (all of it: a quarter of an hour)", flush=True)
    chips, wrong = defaultdict(dict), []
    kept = known()
    about, *reports = compiled(kept)
    for chip, name in about["all"]:
        if name in kept.get(chip, ()):
            chips[chip][name] = kept[chip][name]
    for report in reports:
        if report["capability"] == "gfx942":  # compiled to see that it compiles
            continue
        if found := faults(report):
            wrong.append(f"sm_{report['capability']} {report['name']}: {', '.join(found)}")
        chips[report["capability"]][report["name"]] = report["figures"]
    if wrong:
        sys.exit("\n".join(wrong))
    version = triton.__version__
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("sm_*.json"):
        old.unlink()
    parts = [ABOUT.format(version=version)]
    for capability, programs in sorted(chips.items()):
        file = FOLDER / f"sm_{capability}.json"
        file.write_text(text(version, about["kernels"], programs), encoding="utf-8")
        parts.append(f"## sm_{capability}\n\n{table(programs)}\n")
        print(f"sm_{capability}: {len(programs)} programs")
    (FOLDER / "README.md").write_text("\n".join(parts), encoding="utf-8")


ABOUT = """# What the compiled kernels use

Written by `make figures` (Triton {version}, no GPU): nothing here is measured. The JSON files hold
a line for each program, and the test suite fails where one gets worse; `figures.py` says
what each figure is. Here is the range over the programs of a kernel and a config.

- config: tile sizes, warps and stages; registers and stack (bytes) of a thread; shared memory of a
  block; blocks that a processor holds.
- loads: LDGSTS or TMA loads in the main loop. A producer's loop of its own is not counted.
- instructions a matrix: all instructions of a turn of the main loop for each of its matrix
  instructions. One is a warp's (HMMA), four warps' (HGMMA), a block's (UTCHMMA) or a thread's
  multiply-add (FFMA; FFMA2 makes two), so compare only within one kind.
"""


if __name__ == "__main__":
    main()
