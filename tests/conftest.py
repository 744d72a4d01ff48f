"""Test session: the interpreter stands in for a GPU unless GPU tests are asked for (-m gpu)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# The folder `kernels` at the root must not shadow another package of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]


def pytest_configure(config):
    if config.option.markexpr != "gpu":  # Triton reads it when a kernel is decorated
        os.environ["TRITON_INTERPRET"] = "1"
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def pytest_collection_modifyitems(config, items):
    here = config.option.markexpr == "gpu" and torch.cuda.is_available()
    for item in items:
        if not here and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU and runs with: make gpu"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What was measured on this machine before is no part of a test."""
    os.environ["FASTLORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
