"""Triton kernels for a LoRA linear layer; usable without the package ``fastlora``."""

from fastlora_kernels.columns import da, ds_db
from fastlora_kernels.configs import Chip, Config
from fastlora_kernels.launch import INTERPRETED
from fastlora_kernels.linear import backward, backward_all, forward, forward_all
from fastlora_kernels.product import product
from fastlora_kernels.shrink import shrink

__all__ = [
    "INTERPRETED",
    "Chip",
    "Config",
    "backward",
    "backward_all",
    "da",
    "ds_db",
    "forward",
    "forward_all",
    "product",
    "shrink",
]
