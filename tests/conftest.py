# SPDX-License-Identifier: Apache-2.0
"""Test session: the interpreter stands in for a GPU unless GPU tests are asked for (-m gpu)."""

import functools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import same_sums  # noqa: F401 - before torch
import torch

ROOT = Path(__file__).parent.parent
# Of few tests that take long, which one worker runs: where they came last, the other would idle.
LONG = ("test_compiled.py", "test_executed.py", "test_examples.py", "test_peft_suite.py")
# The folder `kernels` at the root must not shadow another package of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]


def pytest_addoption(parser):
    parser.addoption("--minutes", type=float, help="draw new properties for so long (make fuzz)")


def pytest_configure(config):
    config.addinivalue_line("markers", "large: needs gigabytes of a GPU: make gpu runs one at once")
    if config.option.markexpr != "gpu":  # Triton reads it when a kernel is decorated
        os.environ["TRITON_INTERPRET"] = "1"
        _mend_interpreter()


def _mend_interpreter() -> None:
    """It patches its language again in each call inside a kernel, which took half of the time.

    Triton 3.4's asks 16 elements of a descriptor's strides, where it means bytes.
    """
    import triton
    from triton.runtime import interpreter

    patch, tl = interpreter._patch_lang, triton.language

    def patched(fn):
        langs = [lang for lang in fn.__globals__.values() if lang is tl or lang is tl.core]
        done = all(lang.range.__module__ == interpreter.__name__ for lang in langs)
        return SimpleNamespace(restore=bool) if done else patch(fn)

    interpreter._patch_lang = patched
    if triton.__version__.startswith("3.4."):
        interpreter.TensorDescHandle.validate = lambda handle: None


# Python (3.11 and later) maps 16 KiB for the frames of deeper calls, and unmaps them when the first
# of those returns: where that is in an inner loop, half of the time goes there. For a frame of 128
# KiB it maps twice as much, which is room for all that a test calls.
LOCALS = " = ".join(f"v{i}" for i in range(1 << 14))
ROOMY: dict = {}
exec(f"def call(test, **given):\n    if 0: {LOCALS} = 0\n    test(**given)", ROOMY)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        item.obj = functools.wraps(item.obj)(functools.partial(ROOMY["call"], item.obj))
    here = config.option.markexpr == "gpu" and torch.cuda.is_available()
    for item in items:
        if not here and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU and runs with: make gpu"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What was measured on this machine before is no part of a test."""
    os.environ["FASTLORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """A cache of this test's own, on a machine where nothing was measured."""
    from fastlora.operator import measured, plans, tuning

    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "_loaded", {})
    tuning._tune_once.cache_clear()
    monkeypatch.setattr(tuning, "CONFIG_SECONDS", 0.0)
    plans.forget()
    yield tmp_path / "cache"
    plans.forget()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def few_are_none(monkeypatch):
    """Small tensors stand for large ones here, and take the way of those; `few` is for few."""
    from fastlora.operator import blocks, plans

    own = {limit: getattr(*limit) for limit in ((plans, "FEW"), (blocks, "LEAST_ELEMENTS"))}
    for limit in own:
        monkeypatch.setattr(*limit, 0)
    return own


@pytest.fixture
def few(monkeypatch, few_are_none):
    """Small tensors are few tokens, as they are for users."""
    for limit, value in few_are_none.items():
        monkeypatch.setattr(*limit, value)


@pytest.fixture
def inductor():
    """Inductor as a backend of `torch.compile` that counts what it compiles."""
    from torch._inductor.compile_fx import compile_fx

    def backend(graph, inputs):
        backend.compiles += 1
        return compile_fx(graph, inputs)

    backend.compiles = 0
    return backend


@pytest.fixture
def fused(monkeypatch):
    """Calls that the fused forward of PEFT's layers has made: a list of their inputs."""
    from fastlora.peft import linear as peft_layer

    calls, own = [], peft_layer.lora_sum

    def counted(x, *rest):
        calls.append(x)
        return own(x, *rest)

    monkeypatch.setattr(peft_layer, "lora_sum", counted)
    return calls


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def no_leftovers():
    """No thread holds what a group of siblings has computed."""
    from fastlora.layers import siblings

    vars(siblings._held).clear()


@pytest.fixture
def together(monkeypatch):
    """How many layers each operator of siblings computed."""
    from fastlora import functional
    from fastlora.layers import siblings

    sizes = []

    class Counting:
        checked = staticmethod(functional.checked)

        @staticmethod
        def run_checked(x, projections, **options):
            sizes.append(len(projections))
            return functional.run_checked(x, projections, **options)

    monkeypatch.setattr(siblings, "functional", Counting)
    return sizes
