# SPDX-License-Identifier: Apache-2.0
"""What every compiled program uses, kept in kernels/figures; ``make figures`` writes it.

Nothing is measured: registers and stack (bytes) are those of a thread, shared memory (bytes) that
of a block, ``blocks`` how many of them a processor holds. ``ldgsts`` and ``tma`` are the loads from
global to shared memory that the program contains (by cp.async, by the tensor memory accelerator);
more than its main loop contains are what fills the pipeline. ``matrix`` names the main loop's
matrix instructions, ``loop_instructions / loop_matrix`` is what it issues for each.
"""

import json
import os
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import triton
from compiled_cases import CAPABILITIES, MORE_CAPABILITIES, faults, fingerprint
from uninterpreted import lines_of

FOLDER = Path(__file__).resolve().parents[2] / "kernels" / "figures"

Programs = dict[str, dict]


def read(capability: int) -> dict:
    """Return what is kept for a chip: Triton's version, the kernels' hash, figures by program."""
    return json.loads((FOLDER / f"sm_{capability}.json").read_text(encoding="utf-8"))


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
        cells = [kernel.removesuffix("_kernel"), config, len(group)]
        cells += [_range(p[figure] for p in group) for figure in ("registers", "stack")]
        cells += [_range(round(p["shared"] / 1024) for p in group)]
        cells += [_range(p["blocks"] for p in group)]
        cells += [_range(p.get("loop_ldgsts", 0) + p.get("loop_tma", 0) for p in group), matrix]
        each = [p["loop_instructions"] / p["loop_matrix"] for p in group if matrix]
        cells += [_range(each, ".1f") if matrix else ""]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def _range(values, form: str = "") -> str:
    ordered = sorted(values)
    least, most = f"{ordered[0]:{form}}", f"{ordered[-1]:{form}}"
    return least if least == most else f"{least}–{most}"


def known() -> dict[int, Programs]:
    """Return by chip what is kept of the same kernels, compiled by the same Triton."""
    now = {"triton": triton.__version__, "kernels": fingerprint()}
    files = {chip: read(chip) for chip in CAPABILITIES + MORE_CAPABILITIES}
    return {chip: of["programs"] for chip, of in files.items() if now.items() <= of.items()}


def compiled(kept: dict[int, Programs]) -> list[dict]:
    """Return the reports of compiled_cases.py, which uses every processor of this machine.

    The first one says what there is, the others are of a program each that is not in ``kept``.
    """
    of = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    names = json.dumps([(chip, name) for chip, programs in kept.items() for name in programs])

    def share(i: int) -> list[dict]:
        return lines_of("compiled_cases.py", str(i), str(of), "every", given=names)

    with ThreadPoolExecutor(of) as pool:
        return [report for reports in pool.map(share, range(of)) for report in reports]


def main() -> None:
    print("compiling what is new for every chip (all of it: a quarter of an hour)", flush=True)
    chips, wrong, kept = defaultdict(dict), [], known()
    about, *reports = compiled(kept)
    for chip, name in about["all"]:
        if name in kept.get(chip, ()):
            chips[chip][name] = kept[chip][name]
    for report in reports:
        chip, name, found = (report[key] for key in ("capability", "name", "figures"))
        wrong += [f"sm_{chip} {name}: {x}" for x in faults(chip, name, found, report["forbidden"])]
        chips[chip][name] = found
    if wrong:
        sys.exit("\n".join(wrong))
    page = FOLDER / "README.md"
    by_hand, tables = page.read_text(encoding="utf-8").partition("## sm_")[0], []
    for chip, programs in sorted(chips.items()):
        file = FOLDER / f"sm_{chip}.json"
        file.write_text(text(triton.__version__, about["kernels"], programs), encoding="utf-8")
        tables.append(f"## sm_{chip}\n\n{table(programs)}\n")
        print(f"sm_{chip}: {len(programs)} programs")
    page.write_text(by_hand + "\n".join(tables), encoding="utf-8")


if __name__ == "__main__":
    main()
