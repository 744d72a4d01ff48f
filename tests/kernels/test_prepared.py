# SPDX-License-Identifier: Apache-2.0
"""Prepared launches, with a driver that does nothing: the same as Triton's own, or Triton's own."""

from types import SimpleNamespace

import pytest
from fastlora_kernels import launch
from uninterpreted import lines_of


@pytest.fixture(scope="module")
def found():
    return lines_of("host_time.py", "check")


def test_a_prepared_launch_passes_what_triton_would(found):
    """Program, grid, stream, arguments, warps, stages, shared memory and packed metadata."""
    pairs = [one for one in found if "same" in one]
    wrong = [one for one in pairs if not all(one["same"].values())]
    assert len(pairs) >= 50 and not wrong
    assert {one["name"] for one in pairs} >= {
        *("shrink_kernel", "persistent_outputs_kernel", "ds_db_kernel", "sum_kernel"),
        *("input_grad_kernel", "persistent_input_grad_kernel", "da_kernel"),
    }


def test_what_a_prepared_launch_does_not_know_goes_by_triton(found):
    """Hooks that somebody has set, and another current device than the program was loaded for."""
    by = {one["changed"]: one["by_triton"] for one in found if "changed" in one}
    assert by == {"nothing": 0, "a hook": 2, "a hook of the kernel": 2, "another device": 2}


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
