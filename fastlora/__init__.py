# SPDX-License-Identifier: Apache-2.0
"""fastlora: a LoRA linear layer that costs what the frozen layer costs."""

from fastlora.adapters import load_adapter, save_adapter
from fastlora.config import LoRAConfig
from fastlora.explain import Explanation, explain
from fastlora.functional import lora_linear, lora_linears
from fastlora.inject import InjectReport, inject
from fastlora.layer import LoRALinear
from fastlora.model import delete_adapter, disable_adapters, merge, set_adapter, unmerge
from fastlora.peft import PatchReport, patch_peft, unpatch_peft
from fastlora.projection import Projection

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "InjectReport",
    "LoRAConfig",
    "LoRALinear",
    "PatchReport",
    "Projection",
    "delete_adapter",
    "disable_adapters",
    "explain",
    "inject",
    "load_adapter",
    "lora_linear",
    "lora_linears",
    "merge",
    "patch_peft",
    "save_adapter",
    "set_adapter",
    "unmerge",
    "unpatch_peft",
]
