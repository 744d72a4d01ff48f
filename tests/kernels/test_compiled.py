# SPDX-License-Identifier: Apache-2.0
"""Every kernel as each chip would run it, compiled without a GPU: its resources are in bounds."""

from __future__ import annotations

import itertools

import aot
import figures
import pytest
import triton
from compiled_cases import CAPABILITIES, MORE_CAPABILITIES, SIZES, calls, faults
from uninterpreted import lines_of

ELEMENTWISE = ("sum_kernel", "gated_kernel")
STEPS = ("shrink_kernel", "outputs_kernel", "ds_db_kernel", "input_grad_kernel", "da_kernel")
PERSISTENT = ("persistent_outputs_kernel", "persistent_input_grad_kernel")
each_kernel = pytest.mark.parametrize(
    ("kernel", "capability"),
    [
        *itertools.product((*STEPS, "sum_kernel"), CAPABILITIES),
        *((kernel, 90) for kernel in ELEMENTWISE[1:]),
        *itertools.product(PERSISTENT, (90, 100)),
    ],
)


@pytest.fixture(scope="module")
def found():
    """What another process compiles: the interpreter must be off there."""
    which = "sample" if figures.known() else "defaults"  # where nothing else is known of the rest
    return lines_of("compiled_cases.py", "0", "1", which)


@pytest.fixture(scope="module")
def reports(found):
    """A report for each program that was compiled."""
    return found[1:]


@each_kernel
def test_resources(reports, kernel, capability):
    mine = [r for r in reports if (r["kernel"], r["capability"]) == (kernel, capability)]
    assert mine, "nothing was compiled"
    # Tiles are chosen so that this one Triton spills nothing; others may.
    chosen_for = figures.read(capability)["triton"] == triton.__version__
    found = {r["name"]: faults(r, spills=chosen_for) for r in mine}
    assert not any(found.values()), {name: these for name, these in found.items() if these}


FINE = {"stack": 0, "instructions": {"HMMA": 1}, "registers": 255, "shared": 1024}
FINE |= {"capability": 90, "ptx_trap": False, "ptx_atomics": False, "ptx_f64": False}
FINE |= {"ptx_tf32": False}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stack": 8}, "spills, 8 bytes"),
        ({"instructions": {"STL": 1}}, "local memory"),
        ({"ptx_trap": True}, "a trap"),
        ({"ptx_atomics": True}, "atomic operations"),
        ({"registers": 256}, "256 registers"),
        ({"shared": 1 << 20}, "1048576 bytes of shared memory"),
        ({"ptx_f64": True}, "float64"),
        ({"ptx_tf32": True}, "TF32"),
    ],
)
def test_each_fault_is_named(change, said):
    assert faults(FINE) == []
    (found,) = faults(FINE | change)
    assert said in found


@each_kernel
def test_tensor_cores_and_pipelines(reports, kernel, capability):
    mma = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[capability]
    for r in reports:
        if (r["kernel"], r["capability"]) != (kernel, capability) or kernel in ELEMENTWISE:
            continue
        where = (
            f"{kernel} sm_{capability} {r['problem']} dropout={r['dropout']}: {r['instructions']}"
        )
        if r["problem"].startswith("fp32"):
            assert {"FFMA", "FFMA2"} & r["instructions"].keys(), where
        else:
            assert {mma, "HMMA"} & r["instructions"].keys(), where
            if "outputs" in kernel or "input_grad" in kernel:
                assert mma in r["instructions"], where
        if r["problem"].endswith(" even"):
            load = "UTMALDG" if kernel.startswith("persistent") else "LDGSTS"
            loads = r["instructions"].get(load, 0)
            assert loads >= r["pipelined_loads"], f"{where}: a pipeline is lost"


def test_an_amd_chip(found):
    mine = [r for r in found[1:] if r["capability"] == "gfx942"]
    assert {r["kernel"] for r in mine} == {*STEPS, *ELEMENTWISE}
    if any("no_linker" in r for r in mine):
        pytest.skip(mine[0]["no_linker"])
    for r in mine:
        assert r["spilled"] == r["scratch"] == 0, r
        assert r["registers"] <= 512 and r["shared"] <= aot.GFX942.shared_memory, r
        assert r["matrix"] > 0 or r["kernel"] in ELEMENTWISE, r


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_figure_is_worse_than_the_one_kept(reports, capability):
    kept = kept_for_this_triton(capability)["programs"]
    now = {r["name"]: r["figures"] for r in reports if r["capability"] == capability}
    worse = figures.compare({name: kept[name] for name in now if name in kept}, now)
    assert not worse, f"sm_{capability}:\n" + "\n".join(worse)


@pytest.mark.parametrize("capability", CAPABILITIES + MORE_CAPABILITIES)
def test_what_is_kept_is_of_these_kernels(found, capability):
    """Configs that are no default are compiled by `make figures` alone."""
    kept = kept_for_this_triton(capability)
    names = {name for chip, name in found[0]["all"] if chip == capability}
    differing = sorted(kept["programs"].keys() ^ names)
    assert not differing, f"run `make figures`: {len(differing)} programs differ: {differing[:4]}"
    assert kept["kernels"] == found[0]["kernels"], "a kernel has changed: run `make figures`"


def kept_for_this_triton(capability):
    kept = figures.read(capability)
    if kept["triton"] != triton.__version__:
        pytest.skip(f"figures of Triton {kept['triton']}; this is {triton.__version__}")
    return kept


def test_the_recorder_sees_every_kernel():
    recorded = [c for size in SIZES for c in calls(aot.CHIPS[90], "bf16", 16, size)]
    assert {c.kernel.__name__ for c in recorded} == {*STEPS, *ELEMENTWISE, *PERSISTENT}
