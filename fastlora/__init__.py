# SPDX-License-Identifier: Apache-2.0
"""fastlora: a LoRA linear layer that costs what the frozen layer costs."""

from fastlora.explain import Explanation, explain
from fastlora.functional import lora_linear, lora_linears
from fastlora.layers.lora import LoRALinear
from fastlora.layers.replace import lora_state_dict, replace_linears
from fastlora.layers.report import PatchReport
from fastlora.operator.operands import Projection
from fastlora.peft.by_sample import adapters_by_sample, losses_by_adapter
from fastlora.peft.files import load_adapter, save_adapter
from fastlora.peft.patch import patch_peft, unpatch_peft

__version__ = "0.2.0"

__all__ = [
    "Explanation",
    "LoRALinear",
    "PatchReport",
    "Projection",
    "adapters_by_sample",
    "explain",
    "load_adapter",
    "lora_linear",
    "lora_linears",
    "lora_state_dict",
    "losses_by_adapter",
    "patch_peft",
    "replace_linears",
    "save_adapter",
    "unpatch_peft",
]
