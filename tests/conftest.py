"""Test session: the interpreter stands in for a GPU, and only installed packages are imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The folder `kernels` at the root must not shadow another package of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]

import torch  # noqa: E402

GPU = torch.cuda.is_available()
if not GPU:  # read when a kernel is decorated, so before anything imports one
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402


def pytest_configure(config):
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def pytest_collection_modifyitems(items):
    for item in items:
        if not GPU and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU (make gpu)"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
