# SPDX-License-Identifier: Apache-2.0
"""Test session: the interpreter stands in for a GPU unless GPU tests are asked for (-m gpu)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import same_sums  # noqa: F401 - before torch
import torch

ROOT = Path(__file__).parent.parent
# The folder `kernels` at the root must not shadow another package of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]


def pytest_addoption(parser):
    parser.addoption("--minutes", type=float, help="draw new properties for so long (make fuzz)")


def pytest_configure(config):
    if config.option.markexpr != "gpu":  # Triton reads it when a kernel is decorated
        os.environ["TRITON_INTERPRET"] = "1"
        _mend_triton_3_4()


def _mend_triton_3_4() -> None:
    """Triton 3.4's interpreter asks 16 elements of a descriptor's strides, where it means bytes."""
    import triton

    if triton.__version__.startswith("3.4."):
        from triton.runtime import interpreter

        interpreter.TensorDescHandle.validate = lambda handle: None


def pytest_collection_modifyitems(config, items):
    here = config.option.markexpr == "gpu" and torch.cuda.is_available()
    for item in items:
        if not here and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU and runs with: make gpu"))

    # What was started first is asked for last: see `compiling`.
    items.sort(key=lambda item: "compiling" in item.fixturenames)


def pytest_collection_finish(session):
    session.config.compiling = []
    wanted = any("compiling" in item.fixturenames for item in session.items)
    if wanted and not session.config.option.collectonly:
        session.config.compiling = [Compiling(share, of=2) for share in range(2)]


def pytest_unconfigure(config):
    for process in getattr(config, "compiling", ()):
        process.stop()


class Compiling:
    """A process that compiles its share of the kernels ahead of time while other tests run.

    It needs the interpreter off, and it uses the processor time that single-threaded tests leave.
    """

    def __init__(self, share: int, of: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.output, self.errors = (Path(self.folder.name, name) for name in ("out", "err"))
        script = Path(__file__).parent / "compiled_cases.py"
        command = [sys.executable, str(script), str(share), str(of)]
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        with open(self.output, "w") as out, open(self.errors, "w") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)

    def result(self) -> str:
        assert self.process.wait() == 0, self.errors.read_text()
        return self.output.read_text()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        self.folder.cleanup()


@pytest.fixture(scope="session")
def compiling(request):
    """Return a function that waits for the compiled kernels and returns a JSON line for each."""
    return lambda: "".join(process.result() for process in request.config.compiling)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What was measured on this machine before is no part of a test."""
    os.environ["FASTLORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def fused(monkeypatch):
    """Calls that the fused forward of PEFT's layers has made: a list of their inputs."""
    from fastlora import peft_layer

    calls, own = [], peft_layer.lora_sum

    def counted(x, *rest):
        calls.append(x)
        return own(x, *rest)

    monkeypatch.setattr(peft_layer, "lora_sum", counted)
    return calls


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def together(monkeypatch):
    """How many layers each operator of siblings computed."""
    from fastlora import functional, siblings

    sizes = []

    class Counting:
        checked = staticmethod(functional.checked)

        @staticmethod
        def run_checked(x, projections, **options):
            sizes.append(len(projections))
            return functional.run_checked(x, projections, **options)

    monkeypatch.setattr(siblings, "functional", Counting)
    return sizes
