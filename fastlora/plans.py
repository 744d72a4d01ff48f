"""Which implementation runs: what is usable here, and what ``impl="auto"`` takes."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "triton", "library", "torch", "reference")
# What "auto" takes, from the environment when Python starts: one of the above.
FORCED = os.environ.get("FASTLORA_IMPL", "auto")


@functools.cache
def triton_missing() -> str | None:
    """Return why the Triton kernels cannot be imported here, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'triton>=3.4' (Linux)"
    try:
        import fastlora_kernels  # noqa: F401
    except Exception as error:  # a broken Triton may raise anything while it is imported
        return f"the Triton kernels cannot be imported: {type(error).__name__}: {error}"
    return None


@functools.cache
def _interpreted() -> bool:
    import fastlora_kernels

    return fastlora_kernels.INTERPRETED


def triton_unusable(device: torch.device) -> str | None:
    """Return why the Triton implementation cannot take tensors on ``device``, or None."""
    missing = triton_missing()
    if missing is not None:
        return missing
    if device.type == "cuda" and not _interpreted():
        return None
    if device.type == "cpu" and _interpreted():
        return None
    if device.type == "cpu":
        late = os.environ.get("TRITON_INTERPRET") == "1"
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 " + (
            "before Python starts (it is set now, but the kernels were imported without it)"
            if late
            else "in the environment before Python starts, or use impl='torch'"
        )
    return f"it runs on 'cuda' devices (and 'cpu' under TRITON_INTERPRET=1), not on '{device.type}'"


def resolve(impl: str, x: Tensor) -> str:
    """Turn ``impl`` into the implementation that will run for ``x``; only "auto" chooses.

    "auto" is what the environment variable FASTLORA_IMPL names. Otherwise it is "library" for
    bfloat16 and float16 on a GPU, where a Triton product would have to reach 89 to 98% of the
    library's to win, and "torch" everywhere else.
    Raises RuntimeError when a named implementation is not usable here.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "auto":
        if FORCED not in IMPLEMENTATIONS:
            raise ValueError(
                f"FASTLORA_IMPL must be one of {', '.join(IMPLEMENTATIONS)}, got {FORCED!r}"
            )
        impl = FORCED
    if impl == "auto":
        fast = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
        return "library" if fast and triton_unusable(x.device) is None else "torch"
    if impl in ("triton", "library"):
        if x.dtype == torch.float64:
            raise TypeError(
                f"x is float64, which impl={impl!r} does not take; use float32, bfloat16 or "
                "float16, or impl='torch'"
            )
        why = triton_unusable(x.device)
        if why is not None and x.device.type != "meta":
            raise RuntimeError(f"impl={impl!r} cannot run on x.device '{x.device}': {why}")
    return impl
