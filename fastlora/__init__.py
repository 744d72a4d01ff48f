"""fastlora: a LoRA linear layer that costs what the frozen layer costs."""

from fastlora.functional import lora_linear
from fastlora.layer import LoRALinear

__version__ = "0.1.0"

__all__ = ["LoRALinear", "lora_linear"]
