# SPDX-License-Identifier: Apache-2.0
"""Says what the tests of test_gpu.py would launch on an H100, without one: a JSON line for a test.

Run by test_run_gpu.py in a process of its own: the interpreter must be off. The tests themselves
run, on tensors without memory and with every launch recorded in place of being made; what they
compare is left out.
"""

import contextlib
import inspect
import io
import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import aot
import pytest
import torch
from compiled_cases import key
from fastlora_kernels import configs
from recorder import Call, recording
from torch.overrides import TorchFunctionMode

from fastlora.operator import plans, tuning

CHIP = aot.CHIPS[90]
TESTS = Path(__file__).parents[1] / "kernels/test_gpu.py"
# What makes tensors, by a generator or not.
FACTORIES = ("empty", "full", "ones", "zeros", "eye", "arange", "randn", "rand", "randint")


def program(call: Call) -> str:
    """Return what tells a program from others where sizes differ as well, as Triton does."""
    divisible, pending = [], [v for n, v in call.args.items() if not aot.is_constexpr(n)]
    while pending:
        value = pending.pop()
        if isinstance(value, tuple):
            pending += value
        elif isinstance(value, torch.Tensor):
            divisible.append(value.storage_offset() * value.element_size() % 16 == 0)
        elif isinstance(value, int):
            divisible.append(value % 16 == 0)
    return str((key(call), divisible))


class Weightless(TorchFunctionMode):
    """Tensors of a GPU have no memory in here, and are equal to all others."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        if name in ("equal", "__bool__"):
            return True
        if name in ("cpu", "cuda"):
            return args[0]
        if name == "item":
            return 1.0
        if name == "tensor":
            return func(*args, **{**kwargs, "device": "cpu"}).to("meta")
        if name in FACTORIES:
            kwargs = {**kwargs, "device": "meta"}
            kwargs.pop("generator", None)
        if func is not torch.device:
            args = [_elsewhere(value) for value in args]
        return func(*args, **{name: _elsewhere(value) for name, value in kwargs.items()})


def _elsewhere(value):
    """Return the device without memory for one that is a GPU, and all else as it is."""
    on_gpu = isinstance(value, torch.device | str) and str(value).startswith("cuda")
    return torch.device("meta") if on_gpu else value


def replace_what_needs_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Have the tests launch, and what is in their way do nothing."""
    import joints
    import long_run
    import test_gated_kernels
    import test_gpu

    def launched(kernels, joint, device="cuda", configs=None, ts=None):
        joints.run(kernels, joint, joint.tensors("cuda") if ts is None else ts, configs)

    def measured_once(steps, *_, **__):
        return {name: [tuple(1.0 for _ in step())] for name, step in steps.items()}

    def trained_a_step(fused, steps, device, losses=long_run.losses):
        losses(fused, 1, device)
        return [2.0, 1.0], 0

    nothing, own = contextlib.nullcontext, torch.Generator
    says = {"memory_allocated": 0, "current_device": 0, "get_device_name": "H100"}
    cuda = {name: MagicMock(return_value=value) for name, value in says.items()}
    replaced = {
        (test_gpu, "verify"): launched,
        (test_gpu, "same"): MagicMock(),
        (joints, "verify_exactly"): lambda joint, device: launched(
            test_gpu.fastlora_kernels, joint
        ),
        (test_gated_kernels, "accept"): MagicMock(),
        (long_run, "losses"): trained_a_step,
        (plans, "triton_unusable"): lambda device: None,
        (plans, "default"): lambda dtype, device: ("library", ""),
        (tuning, "interleaved"): measured_once,
        (configs.Chip, "of"): lambda device: CHIP,
        (pytest, "raises"): lambda *_, **__: nothing(),
        (torch, "compile"): lambda module, **_: module,
        (torch, "Generator"): lambda *_: own(),
        (torch, "cuda"): MagicMock(**cuda, device=lambda *_: nothing()),
        (torch.testing, "assert_close"): MagicMock(),
    }
    for (module, name), value in replaced.items():
        patch.setattr(module, name, value)


class Recorder:
    """Instead of running the tests that were collected, says what each would launch."""

    def __init__(self) -> None:
        self.found: list[dict] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        with pytest.MonkeyPatch.context() as patch:
            replace_what_needs_a_gpu(patch)
            items = [item for item in session.items if not item.get_closest_marker("skipif")]
            self.found = [recorded(item) for item in items]
        return True


def recorded(item: pytest.Item) -> dict:
    params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    found = {"test": item.name, "params": {name: str(value) for name, value in params.items()}}
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as folder,
        recording(CHIP) as calls,
        Weightless(),
    ):
        given = {**params, "monkeypatch": patch, "tmp_path": Path(folder)}
        try:
            item.obj(**{name: given[name] for name in inspect.signature(item.obj).parameters})
        except pytest.skip.Exception as error:
            found["skipped"] = str(error)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
    found["programs"] = sorted({program(call) for call in calls})
    found["launched"] = sorted({(call.kernel.__name__, str(call.config)) for call in calls})
    return found


def main() -> int:
    recorder, said = Recorder(), io.StringIO()
    with contextlib.redirect_stdout(said):
        arguments = ["-m", "gpu", "-p", "no:cacheprovider", "-q", "-s", str(TESTS)]
        code = pytest.main(arguments, plugins=[recorder])
    print("\n".join(map(json.dumps, recorder.found)) if code == 0 else said.getvalue())
    return code


if __name__ == "__main__":
    sys.exit(main())
