# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for a LoRA linear layer; usable without the package ``fastlora``."""

from fastlora_kernels.columns import da, ds_db
from fastlora_kernels.configs import Chip, Config
from fastlora_kernels.gated import gated, gated_backward
from fastlora_kernels.joint_columns import da_all
from fastlora_kernels.joint_product import product_all
from fastlora_kernels.joint_shrink import shrink_all
from fastlora_kernels.joint_sum import product_sum
from fastlora_kernels.launch import INTERPRETED
from fastlora_kernels.linear import backward, forward
from fastlora_kernels.linears import backward_all, forward_all
from fastlora_kernels.product import product
from fastlora_kernels.shrink import shrink

__all__ = [
    "INTERPRETED",
    "Chip",
    "Config",
    "backward",
    "backward_all",
    "da",
    "da_all",
    "ds_db",
    "forward",
    "forward_all",
    "gated",
    "gated_backward",
    "product",
    "product_all",
    "product_sum",
    "shrink",
    "shrink_all",
]
