# SPDX-License-Identifier: Apache-2.0
"""Every kernel as each chip would run it, compiled without a GPU: resources, order, how many."""

from collections.abc import Iterable

import aot
import figures
import pytest
import triton
from compiled_cases import CAPABILITIES, ELEMENTWISE, MORE_CAPABILITIES, calls, faults, forbidden
from uninterpreted import lines_of

STEPS = {"shrink_kernel", "outputs_kernel", "ds_db_kernel", "input_grad_kernel", "da_kernel"}
PERSISTENT = {"persistent_outputs_kernel", "persistent_input_grad_kernel"}
# Figures of a program that has no fault.
FINE = {"registers": 255, "stack": 0, "shared": 1024, "blocks": 1, "ldgsts": 3, "tma": 0}
FINE |= {"matrix": "HGMMA", "loop_ldgsts": 1, "loop_tma": 0}


@pytest.fixture(scope="module")
def found():
    """What another process compiles, the interpreter off, after all that `make figures` would."""
    which = "sample" if figures.known() else "defaults"  # where nothing else is known of the rest
    return lines_of("compiled_cases.py", "0", "1", which)


@pytest.fixture(scope="module")
def order():
    """Programs whose order matters: of float32 products, and of ds and db with every config."""
    return lines_of("compiled_cases.py", "0", "1", "order")


def kernel_of(report: dict) -> str:
    return report["name"].partition(" | ")[0]


def products(kernels: Iterable[str]) -> set[str]:
    return {kernel for kernel in kernels if not kernel.startswith(ELEMENTWISE)}


def kept_for_this_triton(capability: int) -> dict:
    kept = figures.read(capability)
    if kept["triton"] != triton.__version__:
        pytest.skip(f"figures of Triton {kept['triton']}; this is {triton.__version__}")
    return kept


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_resources(found, order, capability):
    mine = [r for r in found[1:] + order if r["capability"] == capability]
    assert products(map(kernel_of, mine)) == STEPS | (PERSISTENT if capability >= 90 else set())
    # Tiles are chosen so that this one Triton spills nothing; others may.
    spills = figures.read(capability)["triton"] == triton.__version__
    wrong = {
        r["name"]: faults(capability, r["name"], r["figures"], r["forbidden"], spills) for r in mine
    }
    assert not any(wrong.values()), {name: these for name, these in wrong.items() if these}


@pytest.mark.parametrize("capability", CAPABILITIES + MORE_CAPABILITIES)
def test_what_is_kept_is_in_bounds_and_of_these_kernels(found, capability):
    """Configs that are no default are compiled by `make figures` alone."""
    kept = kept_for_this_triton(capability)
    wrong = {name: faults(capability, name, of) for name, of in kept["programs"].items()}
    assert not any(wrong.values()), {name: these for name, these in wrong.items() if these}
    names = {name for chip, name in found[0]["all"] if chip == capability}
    differing = sorted(kept["programs"].keys() ^ names)
    assert not differing, f"run `make figures`: {len(differing)} programs differ: {differing[:4]}"
    assert kept["kernels"] == found[0]["kernels"], "a kernel has changed: run `make figures`"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_figures_are_those_kept(found, order, capability):
    kept = kept_for_this_triton(capability)["programs"]
    mine = [r for r in found[1:] + order if r["capability"] == capability and r["name"] in kept]
    assert mine
    differing = [
        f"{r['name']}: {figure} {r['figures'].get(figure)}, {kept[r['name']].get(figure)} before"
        for r in mine
        for figure in sorted(r["figures"].keys() | kept[r["name"]].keys())
        if r["figures"].get(figure) != kept[r["name"]].get(figure)
    ]
    assert not differing, f"sm_{capability}:\n" + "\n".join(differing)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stack": 8}, "spills, 8 bytes"),
        ({"registers": 256}, "256 registers"),
        ({"shared": 1 << 20}, "1048576 bytes of shared memory"),
        ({"blocks": 0}, "no block"),
        ({"matrix": "HMMA"}, "matrix instructions 'HMMA'"),
        ({"loop_ldgsts": 3}, "nothing is loaded ahead"),
    ],
)
def test_each_fault_is_named(change, said):
    program = 90, "outputs_kernel | bf16 r=16 even | m=128 | EVEN_K"
    assert faults(*program, FINE) == [] and faults(*program, FINE, ["a trap"]) == ["a trap"]
    (found,) = faults(*program, FINE | change)
    assert said in found


@pytest.mark.parametrize(
    ("ptx", "said"),
    [
        ("cvt.f64.f32 %fd1, %f1;", "float64 instructions"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {};", "TF32"),
        ("trap;", "a trap"),
        ("atom.global.gpu.acq_rel.add.f32 %r1, [%rd1], %r2;", "atomic"),
        ("red.relaxed.gpu.global.add.f32 [%rd1], %r2;", "atomic"),
        ("fma.rn.f32 %r1, %r2, %r3, %r1; atom.shared.add.u32 %r1, [%r2], 1;", ""),
    ],
)
def test_what_no_ptx_may_have(ptx, said):
    assert [said in what for what in forbidden(ptx)] == [True] * bool(said)


def test_an_amd_chip(found):
    mine = [r for r in found[1:] if r["capability"] == "gfx942"]
    assert products(map(kernel_of, mine)) == STEPS
    for r in mine:
        if "no_linker" in r:
            pytest.skip(r["no_linker"])
        registers, *spills, shared, matrix = r["figures"].values()
        assert spills == [0, 0, 0] and registers <= 512, r
        assert shared <= aot.CHIPS["gfx942"].shared_memory, r
        assert matrix > 0 or kernel_of(r).startswith(ELEMENTWISE), r


@pytest.mark.parametrize("capability", [90, 100])
def test_segments_are_loaded_by_tma(capability):
    """All operands of the main loop, as without segments, and the low-rank factors as there."""
    of = figures.read(capability)["programs"]
    mine = {name: of[name] for name in of if "persistent" in name and " segments" in name}
    assert {kernel_of({"name": name}) for name in mine} == PERSISTENT
    assert any(" stacked" not in name for name in mine)
    wrong = [n for n, p in mine.items() if (p["loop_tma"], p["loop_ldgsts"]) != (2, 0)]
    assert not wrong


def test_the_recorder_sees_every_kernel():
    recorded = [c for size in ("even", "ragged") for c in calls(aot.CHIPS[90], size, "bf16", 16)]
    kernels = {c.kernel.__name__ for c in recorded}
    assert products(kernels) == STEPS | PERSISTENT
    assert {kernel.partition("_")[0] for kernel in kernels} >= {"sum", "gated", "four"}


def test_float32_sums_start_from_zero(order):
    """One chain of FMAs is rounded at the size of what it starts from: the rule would be missed."""
    starts = {r["name"]: r["starts"] for r in order if " | fp32 " in r["name"]}
    assert {name.partition(" | ")[0] for name, found in starts.items() if found} >= STEPS
    wrong = {name: found for name, found in starts.items() if {*found} - {"zero"}}
    assert not wrong


def test_no_copy_overtakes_a_wgmma(order):
    """While one may still read a tile, a ring is as long as the pipeline is deep."""
    rings = [r for r in order if r["rings"]]
    assert any(r["unfinished"] for r in rings)
    assert not [r["name"] for r in rings if r["unfinished"] and min(r["rings"]) < r["stages"]]


def test_few_lengths_compile_what_all_need():
    """Two for each power of two, 16 divides one; of 150 others none needs another program."""
    found = lines_of("compiled_cases.py", "0", "1", "lengths")
    assert len(found) == 9
    assert not {row["name"]: row["more"] for row in found if row["more"]}
    assert max(row["few"] for row in found) <= 32
