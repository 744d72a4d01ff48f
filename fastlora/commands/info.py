# SPDX-License-Identifier: Apache-2.0
"""``python -m fastlora info``: what is installed, what runs here, and one real check of it."""

from __future__ import annotations

import platform

import torch

from fastlora.functional import lora_linear
from fastlora.operator import plans
from fastlora.operator.measured import version_of

PACKAGES = ("fastlora-kernels", "torch", "triton", "safetensors", "peft", "transformers", "trl")
# Relative to float64, by the base's dtype: far above rounding, far below any wrong result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def main() -> int:
    """Print the report and return 0, or 1 when an implementation that should run is wrong."""
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in PACKAGES:
        print(f"{name:18}{version_of(name)}")
    devices = [torch.device("cpu")]
    for i in range(torch.cuda.device_count()):
        devices.append(torch.device("cuda", i))
        p = torch.cuda.get_device_properties(i)
        size = f"{p.total_memory / 2**30:.0f} GiB"
        print(f"{devices[-1]!s:18}{p.name}, sm_{p.major}{p.minor}, {size}")
    print(f"{'cpu':18}{torch.get_num_threads()} threads")
    failures = sum(_check_device(device) for device in devices)
    print("OK" if not failures else f"FAILED: {failures} checks above are wrong")
    return 1 if failures else 0


def _check_device(device: torch.device) -> int:
    """Print a line for each implementation on ``device`` and return how many are wrong."""
    failures = 0
    for impl in ("blocks", "library", "triton"):
        if impl != "blocks" and (why := plans.triton_unusable(device)) is not None:
            print(f"{impl} on {device}: not usable. {why}")
        else:
            failures += sum(not _check(impl, device, dtype) for dtype in TOLERANCE)
    chosen, why = plans.default(torch.bfloat16, device)
    if plans.FORCED != "auto":
        chosen, why = plans.FORCED, f"FASTLORA_IMPL={plans.FORCED}"
        try:
            plans.named("auto", torch.empty(0, dtype=torch.bfloat16, device=device))
        except ValueError as error:  # an unknown name
            print(f"impl='auto' FAILED on {device}: {error}")
            return failures + 1
        except RuntimeError as error:  # it may be meant for another device
            print(f"impl='auto' is not usable on {device}. {error}")
            return failures
    print(f"impl='auto' takes {chosen} for bfloat16 on {device} ({why})")
    return failures


def _check(impl: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Run one layer forward and backward, with dropout, against float64; print its error."""
    what = f"{impl} on {device}, {str(dtype).removeprefix('torch.')}:"
    try:
        found = _results(impl, device, dtype, dtype)
        exact = _results("reference", device, dtype, torch.float64)
    except Exception as failure:  # a report of what fails is this command's purpose
        print(f"{what} FAILED with {type(failure).__name__}: {failure}")
        return False
    pairs = zip(found, exact, strict=True)
    error = max(((f.double() - e).norm() / e.norm()).item() for f, e in pairs)
    good, most = error <= TOLERANCE[dtype], f"(at most {TOLERANCE[dtype]:.0e})"
    said = f"{'right' if good else 'WRONG'}, largest relative error {error:.1e} {most}"
    print(f"{what} forward and backward {said}")
    return good


def _results(impl: str, device: torch.device, held: torch.dtype, dtype: torch.dtype) -> list:
    """Return y, dx, dA and dB in ``dtype``, of inputs that ``held`` holds."""
    torch.manual_seed(0)
    shapes = {"x": (100, 80), "lora_A": (8, 80), "lora_B": (96, 8)}
    shapes |= {"weight": (96, 80), "bias": (96,)}
    tensors = {n: torch.randn(s).to(device, held).to(dtype) for n, s in shapes.items()}
    dy = torch.randn(100, 96).to(device, held).to(dtype)
    trained = [tensors[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
    y = lora_linear(**tensors, scaling=0.5, dropout_p=0.1, training=True, impl=impl)
    return [y, *torch.autograd.grad(y, trained, dy)]
