# SPDX-License-Identifier: Apache-2.0
"""Forward and backward from the programs that a GPU would get, run instruction by instruction."""

import itertools

import pytest
from uninterpreted import lines_of

KERNELS = {f"{name}_kernel" for name in ("shrink", "outputs", "ds_db", "input_grad", "da", "sum")}
PERSISTENT = {"persistent_outputs_kernel", "persistent_input_grad_kernel"}


def rows(*command: str) -> list[dict]:
    found = lines_of(*command)
    if "skipped" in found[0]:
        pytest.skip(found[0]["skipped"])
    return found


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    return rows("executed.py", "drawn")


def test_the_rule_holds_and_nothing_is_reported(cases):
    assert not [f"{row['case']}: {row['error']}" for row in cases if row["error"]]


def test_every_kernel_ran_with_every_dtype_on_both_targets(cases):
    ran = {(row["capability"], row["kind"], name) for row in cases for name in row["ran"]}
    kinds = "bf16", "bf16-fp32", "fp16", "fp32"
    expected = set(itertools.product((80, 90), kinds, KERNELS))
    expected |= set(itertools.product((90,), kinds[:3], PERSISTENT))
    expected |= set(itertools.product((80, 90), kinds[1:3], {"dropped_kernel"}))
    expected |= set(
        itertools.product((80, 90), ("bf16", "fp32"), {"gated_kernel", "four_bits_kernel"})
    )
    assert not expected - ran


def test_segments_ran_by_tma(cases):
    asked = [row for row in cases if "low_rank=''" not in row["case"] and "Case(" in row["case"]]
    ran = {(row["kind"], name) for row in asked for name in row["ran"]}
    assert set(itertools.product(("bf16", "bf16-fp32", "fp16"), PERSISTENT)) <= ran


def test_no_register_is_set_that_a_wgmma_may_still_read(cases):
    """Its left side may be in registers, which Triton 3.7.1 sets again a step too early."""
    assert not [row["case"] for row in cases if row["overwriting"]]


def test_what_is_broken_is_noticed():
    found = {row["what"]: row["found"] for row in rows("ptx_mistakes.py")}
    right = [found.pop(what) for what in list(found) if what.startswith("nothing")]
    assert right == ["", ""]
    assert found.pop("a ring that is too short") == "overtaken"
    assert len(found) > 18 and all(found.values()), found
