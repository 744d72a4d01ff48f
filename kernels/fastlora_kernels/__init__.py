# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for a LoRA linear layer; usable without the package ``fastlora``."""

from fastlora_kernels import steps
from fastlora_kernels.configs import Chip, Config
from fastlora_kernels.gated import gated, gated_backward
from fastlora_kernels.launch import INTERPRETED

__all__ = ["INTERPRETED", "Chip", "Config", "gated", "gated_backward", "steps"]
