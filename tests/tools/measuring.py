# SPDX-License-Identifier: Apache-2.0
"""Problems, what could have been measured of them, and what another process prints."""

import os
import subprocess
import sys

import torch

from fastlora.operator import plans
from fastlora.operator.operands import Problem

CPU = torch.device("cpu")
PROBLEM = Problem(64, 48, 32, 16, torch.bfloat16, torch.float32)
SMALL = PROBLEM._replace(M=16, N=16, K=16)
GROUP = SMALL._replace(others=((8, 3), (32, 0)))
TIMES = {"blocks": 3e-3, "library": 2e-3, "triton": 1e-3}


def timings(forward=TIMES, backward=TIMES, configs=()):
    return {"forward": forward, "backward": backward, "configs": dict(configs)}


def chosen(op="forward", problem=PROBLEM, impl="auto"):
    return plans.choose(op, impl, problem, CPU).impl


def operands(m=64, dtype=torch.bfloat16, adapter=torch.float32):
    x, w = torch.randn(m, 32).to(dtype), torch.randn(48, 32).to(dtype)
    return x, w, torch.randn(16, 32).to(adapter), torch.randn(48, 16).to(adapter)


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
