# SPDX-License-Identifier: Apache-2.0
"""fastlora: a LoRA linear layer that costs what the frozen layer costs."""

from fastlora.config import LoRAConfig
from fastlora.explain import Explanation, explain
from fastlora.functional import lora_linear, lora_linears
from fastlora.inject import InjectReport, inject
from fastlora.layers.lora import LoRALinear
from fastlora.layers.replace import lora_state_dict, replace_linears
from fastlora.model import delete_adapter, disable_adapters, merge, set_adapter, unmerge
from fastlora.operator.operands import Projection
from fastlora.peft.files import load_adapter, save_adapter
from fastlora.peft.patch import PatchReport, patch_peft, unpatch_peft

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
    "lora_state_dict",
    "merge",
    "patch_peft",
    "replace_linears",
    "save_adapter",
    "set_adapter",
    "unmerge",
    "unpatch_peft",
]
