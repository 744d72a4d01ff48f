"""Every kernel as each chip would run it, compiled without a GPU: its resources are in bounds."""

from __future__ import annotations

import json

import aot
import pytest
from compiled_cases import CAPABILITIES, calls

KERNELS = ("shrink_kernel", "product_kernel", "columns_kernel", "sum_kernel")


@pytest.fixture(scope="module")
def reports(compiling):
    """What the processes of conftest.py, started with the session, have found."""
    return [json.loads(line) for line in compiling().splitlines()]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_resources(reports, kernel, capability):
    mine = [r for r in reports if (r["kernel"], r["capability"]) == (kernel, capability)]
    assert mine, "nothing was compiled"
    for r in mine:
        where = f"{kernel} sm_{capability} {r['problem']} dropout={r['dropout']} {r['config']}"
        assert r["stack"] == 0, f"{where}: spills, {r['stack']} bytes of stack"
        assert not {"LDL", "STL"} & r["instructions"].keys(), f"{where}: local memory"
        assert not r["ptx_trap"], f"{where}: compiled to a trap"
        assert r["registers"] <= 255, where
        assert r["shared"] <= aot.CHIPS[capability].shared_memory, f"{where}: {r['shared']} bytes"
        assert not r["ptx_f64"], f"{where}: float64 instructions"
        assert not r["ptx_tf32"], f"{where}: TF32 where IEEE float32 was asked for"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", KERNELS[:3])
def test_tensor_cores_and_pipelines(reports, kernel, capability):
    mma = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}[capability]
    for r in reports:
        if (r["kernel"], r["capability"]) != (kernel, capability):
            continue
        where = (
            f"{kernel} sm_{capability} {r['problem']} dropout={r['dropout']}: {r['instructions']}"
        )
        if r["problem"].startswith("fp32"):
            assert {"FFMA", "FFMA2"} & r["instructions"].keys(), where
        else:
            assert {mma, "HMMA"} & r["instructions"].keys(), where
            if kernel == "product_kernel":
                assert mma in r["instructions"], where
        if "even" in r["problem"]:
            found = r["instructions"].get("LDGSTS", 0)
            assert found >= r["pipelined_loads"], f"{where}: a pipeline is lost"


def test_the_recorder_sees_every_kernel():
    recorded = calls(aot.CHIPS[90], "bf16", 16, "even")
    assert {c.kernel.__name__ for c in recorded} == set(KERNELS)
