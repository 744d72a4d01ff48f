# SPDX-License-Identifier: Apache-2.0
"""An adapter's hyper-parameters: what is allowed, what they mean, how its factors start."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor, nn

INIT_METHODS = (True, False, "gaussian", "orthogonal")


def check_adapter_name(name: str) -> None:
    """Raise TypeError or ValueError unless ``name`` can be part of a state-dict key."""
    if not isinstance(name, str):
        raise TypeError(f"adapter name must be a str, got {type(name).__name__}")
    if not name or "." in name or hasattr(nn.ParameterDict(), name):
        raise ValueError(
            f"adapter name must be non-empty, without '.', and no method of a dict, got {name!r}"
        )


def check_hyperparameters(
    r: int, lora_alpha: float, lora_dropout: float, init_lora_weights: bool | str
) -> None:
    """Raise TypeError or ValueError naming the value that no adapter can have."""
    if not isinstance(r, int) or isinstance(r, bool):
        raise TypeError(f"r must be an int, got {type(r).__name__}")
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    for name, value in (("lora_alpha", lora_alpha), ("lora_dropout", lora_dropout)):
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not abs(lora_alpha) <= torch.finfo(torch.float32).max:
        raise ValueError(f"lora_alpha must be finite, got {lora_alpha!s:.40}")
    if not 0.0 <= lora_dropout <= 1.0:
        raise ValueError(f"lora_dropout must be between 0 and 1, got {lora_dropout}")
    if type(init_lora_weights) not in (bool, str) or init_lora_weights not in INIT_METHODS:
        raise ValueError(
            "init_lora_weights must be True, False, 'gaussian' or 'orthogonal', "
            f"got {init_lora_weights!r}"
        )
    if init_lora_weights == "orthogonal" and r % 2:
        raise ValueError(f"init_lora_weights='orthogonal' needs an even r, got {r}")


def scaling_of(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """Return ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rsLoRA (arXiv:2312.03732)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def default_adapter_dtype(base: torch.dtype) -> torch.dtype:
    """Return float32 for a 16-bit base, as PEFT does, and the base's own dtype otherwise."""
    return torch.float32 if base in (torch.bfloat16, torch.float16) else base


def check_adapter_dtype(adapter: torch.dtype, base: torch.dtype) -> None:
    """Raise TypeError unless adapters may have this dtype: the base's, or float32 under 16 bits."""
    if adapter not in (base, default_adapter_dtype(base)):
        raise TypeError(
            f"adapter_dtype must be the base's {base} or, under a 16-bit base, torch.float32; "
            f"got {adapter}"
        )


def initial_factors(
    method: bool | str,
    r: int,
    in_features: int,
    out_features: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return A [r, in_features] and B [out_features, r] as ``method`` starts them.

    Drawn in float32 and then cast, so that the start does not depend on ``dtype``.
    """
    a = torch.empty(r, in_features, device=device, dtype=torch.float32)
    b = torch.zeros(out_features, r, device=device, dtype=torch.float32)
    if method == "orthogonal":
        # Even and odd rows of one orthogonal matrix: B A is zero, both factors are not
        # (https://datta0.github.io/posts/rethink-lora-init/).
        q, _ = torch.linalg.qr(torch.randn(r, r, device=device))
        a = (q[0::2].t() @ torch.randn(r // 2, in_features, device=device)) / 10
        b = (torch.randn(out_features, r // 2, device=device) @ q[1::2]) / 10
    elif method == "gaussian":
        nn.init.normal_(a, std=1 / r)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if method is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    return a.to(dtype), b.to(dtype)
