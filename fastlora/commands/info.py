# SPDX-License-Identifier: Apache-2.0
"""``python -m fastlora info``: what is installed, what runs here, and one real check of it."""

from __future__ import annotations

import platform

import torch

from fastlora.functional import lora_linear
from fastlora.operator import plans, reference
from fastlora.operator.dropout import keep_mask, new_seed
from fastlora.operator.measured import version_of

PACKAGES = ("fastlora-kernels", "torch", "triton", "safetensors", "peft", "transformers")
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
        print(f"{devices[-1]!s:18}{_describe(i)}")
    print(f"{'cpu':18}{torch.get_num_threads()} threads")
    failures = sum(_check_device(device) for device in devices)
    print("OK" if not failures else f"FAILED: {failures} checks above are wrong")
    return 1 if failures else 0


def _describe(index: int) -> str:
    p = torch.cuda.get_device_properties(index)
    return f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"


def _check_device(device: torch.device) -> int:
    """Print a line for each implementation on ``device`` and return how many are wrong."""
    failures = 0
    for impl in ("blocks", "library", "triton"):
        why = None if impl == "blocks" else plans.triton_unusable(device)
        if why is not None:
            print(f"{impl} on {device}: not usable. {why}")
            continue
        for dtype in TOLERANCE:
            failures += not _check(impl, device, dtype)
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
        error = _error(impl, device, dtype)
    except Exception as failure:  # a report of what fails is this command's purpose
        print(f"{what} FAILED with {type(failure).__name__}: {failure}")
        return False
    good = error <= TOLERANCE[dtype]
    print(
        f"{what} forward and backward {'right' if good else 'WRONG'}, largest relative error "
        f"{error:.1e} (at most {TOLERANCE[dtype]:.0e})"
    )
    return good


def _error(impl: str, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest relative error (Frobenius) of y, dx, dA and dB against float64."""
    generator = torch.Generator().manual_seed(0)
    m, n, k, r, p = 100, 96, 80, 8, 0.1
    shapes = {"x": (m, k), "weight": (n, k), "lora_A": (r, k), "lora_B": (n, r), "bias": (n,)}
    tensors = {
        name: torch.randn(shape, generator=generator).to(device, dtype)
        for name, shape in shapes.items()
    }
    dy = torch.randn(m, n, generator=generator).to(device, dtype)
    trained = [tensors[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
    torch.manual_seed(0)
    y = lora_linear(**tensors, scaling=0.5, dropout_p=p, training=True, impl=impl)
    results = {
        "y": y,
        **dict(zip(("x", "lora_A", "lora_B"), torch.autograd.grad(y, trained, dy), strict=True)),
    }

    torch.manual_seed(0)
    mask = keep_mask(new_seed(device), range(m), k, p)
    exact = {name: t.detach().double() for name, t in tensors.items()}
    options = {"scaling": 0.5, "dropout_p": p, "mask": mask}
    expected = reference.lora_linear_grads(
        dy.double(), *(exact[n] for n in ("x", "weight", "lora_A", "lora_B")), **options
    )
    expected["y"] = reference.lora_linear(**exact, **options)
    return max(
        ((results[n].double() - expected[n]).norm() / expected[n].norm()).item() for n in results
    )
