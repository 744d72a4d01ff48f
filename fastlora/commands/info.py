# SPDX-License-Identifier: Apache-2.0
"""``python -m fastlora info``: what is installed, what runs here, and one real check of it."""

import itertools
import platform

import torch

from fastlora.functional import lora_linear
from fastlora.operator import plans
from fastlora.operator.measured import device_name, version_of

PACKAGES = ("fastlora-kernels", "torch", "triton", "safetensors", "peft", "transformers", "trl")
# Relative to float64, by the base's dtype: far above rounding, far below any wrong result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
EXACT = "reference", torch.float64


def run() -> int:
    """Print the report and return 0, or 1 when an implementation that should run is wrong."""
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in PACKAGES:
        print(f"{name:18}{version_of(name)}")
    devices, right = [torch.device("cuda", i) for i in range(torch.cuda.device_count())], True
    for device in [torch.device("cpu"), *devices]:
        size = f"{torch.get_num_threads()} threads"
        if device.type == "cuda":
            p = torch.cuda.get_device_properties(device)
            size = f"sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        print(f"{device!s:18}{device_name(device)}, {size}")
        chosen, why = plans.default(torch.bfloat16, device)
        if plans.FORCED != "auto":
            chosen, why = plans.FORCED, "as FASTLORA_IMPL says"
        print(f"impl='auto' takes {chosen} for bfloat16 on {device} ({why})")
        for impl, dtype in itertools.product(("blocks", "library", "triton", "auto"), TOLERANCE):
            good, said = _check(impl, device, dtype)
            print(f"{impl} on {device}, {str(dtype).removeprefix('torch.')}: {said}")
            right &= good
    print("OK" if right else "FAILED: some of the checks above are wrong")
    return 0 if right else 1


def _check(impl: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether a layer's forward and backward, with dropout, are right, and say so."""
    try:
        plans.named(impl, torch.empty(0, dtype=dtype, device=device))
    except (RuntimeError, ValueError) as error:  # FASTLORA_IMPL may be meant for another device
        return isinstance(error, RuntimeError), f"not usable. {error}"
    try:
        pairs = zip(*(_results(*of, device, dtype) for of in ((impl, dtype), EXACT)), strict=True)
        errors = [((found - exact).norm() / exact.norm()).item() for found, exact in pairs]
    except Exception as failure:  # a report of what fails is this command's purpose
        return False, f"FAILED with {type(failure).__name__}: {failure}"
    good = all(error <= TOLERANCE[dtype] for error in errors)
    said = f"{'right' if good else 'WRONG'}, largest relative error {max(errors):.1e}"
    return good, f"forward and backward {said} (at most {TOLERANCE[dtype]:.0e})"


def _results(impl: str, dtype: torch.dtype, device: torch.device, held: torch.dtype) -> list:
    """Return y, dx, dA and dB in ``dtype``, of inputs that ``held`` holds."""
    torch.manual_seed(0)
    shapes = {"x": (100, 80), "lora_A": (8, 80), "lora_B": (96, 8), "weight": (96, 80)}
    shapes |= {"bias": (96,), "dy": (100, 96)}
    tensors = {n: torch.randn(s).to(device, held).to(dtype) for n, s in shapes.items()}
    dy, trained = tensors.pop("dy"), [tensors[name].requires_grad_() for name in list(shapes)[:3]]
    y = lora_linear(**tensors, scaling=0.5, dropout_p=0.1, training=True, impl=impl)
    return [y, *torch.autograd.grad(y, trained, dy)]
