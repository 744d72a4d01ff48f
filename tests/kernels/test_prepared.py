# SPDX-License-Identifier: Apache-2.0
"""Launches on a driver that is a stub: what it gets; prepared, the same as from Triton itself."""

import re
from types import SimpleNamespace

import pytest
import stub_driver
from fastlora_kernels import launch
from uninterpreted import lines_of


@pytest.fixture(scope="module")
def found():
    if reason := stub_driver.unusable():
        pytest.skip(reason)
    return lines_of("launches.py")


def test_the_driver_gets_what_was_asked_for(found):
    """Program, parameters, grid, block, shared memory, stream; from a prepared launch the same."""
    kinds = [one for one in found if "what" in one]
    assert len(kinds) == 24 and not [one for one in kinds if "refused" in one or any(one["wrong"])]
    assert all(one["by_triton"] == (not one["again"]) * len(one["kernels"]) for one in kinds)
    assert {name for one in kinds for name in one["kernels"]} == {
        *("shrink_kernel", "ds_db_kernel", "sum_kernel", "da_kernel", "gated_kernel"),
        *("outputs_kernel", "persistent_outputs_kernel"),
        *("input_grad_kernel", "persistent_input_grad_kernel", "dropped_kernel"),
    }


@pytest.fixture(scope="module")
def by(found):
    return {one["while"]: one for one in found if "while" in one}


def test_what_a_prepared_launch_does_not_know_goes_by_triton(by):
    """Hooks that somebody has set, and another current device than the program was loaded for."""
    made = {name: one["by_triton"] for name, one in by.items() if one.get("by_triton")}
    assert made == {"cold, elsewhere": 7, "elsewhere": 7, "hook": 7, "hook of a kernel": 2}
    assert {name for name, one in by.items() if one["told"]} == {"hook", "hook of a kernel"}


def test_launches_go_to_the_device_of_their_tensors_and_its_stream(by):
    """Whatever device is current, and stays it; the stub refuses programs of other devices."""
    for name, one in by.items():
        assert one["current"] == (2 if "elsewhere" in name else 1)
        assert name in ("cold, captured", "forgotten") or not any(one["wrong"]), name


def test_a_captured_graph_gets_what_is_compiled(by):
    cold = by["cold, captured"]
    assert re.match("shrink_kernel is not compiled .* once before", cold["refused"])
    assert cold["launched"] == 0 and "refused" not in by["captured"]


def test_a_prepared_launch_holds_its_program(by):
    """Triton 3.9 unloads those that its caches drop, and a driver then knows them no more."""
    assert by["forgotten"]["wrong"] == [["alike"], *[[]] * 6]  # Triton has loaded it once more


def test_only_launchers_that_are_known_are_called(monkeypatch):
    """Those of Triton 3.4 to 3.6, and of 3.7; a launcher that takes something else is Triton's."""

    def compiled(source: str) -> SimpleNamespace:
        body = f"class Launcher:\n    def __call__(self, {source}): pass"
        names: dict = {}
        exec(body, names)
        return SimpleNamespace(run=names["Launcher"]())

    monkeypatch.setattr(launch, "KNOWN_TRITON", True)
    first, then = (", ".join(part) for part in (launch.HEAD[1:], launch.TAIL))
    assert launch._is_known(compiled(f"{first}, *args"))
    assert launch._is_known(compiled(f"{first}, {then}, *args"))
    for other in (first, f"{first}, {then}", f"{then}, {first}, *args", "*args"):
        assert not launch._is_known(compiled(other))
    assert not launch._is_known(None)
    monkeypatch.setattr(launch, "KNOWN_TRITON", False)
    assert not launch._is_known(compiled(f"{first}, *args"))
