# SPDX-License-Identifier: Apache-2.0
"""Packaging: one distribution, two import packages (fastlora and fastlora_kernels)."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "fastlora/__init__.py").read_text())[1]

PARTS = ["operator", "layers", "peft", "commands"]

PEFT = ["peft>=0.19,<0.22"]  # as fastlora.peft.patch.TESTED
FINETUNE = [*PEFT, "transformers>=4.56", "trl>=1.14", "accelerate", "datasets", "matplotlib"]
FINETUNE += ["tqdm", "gguf", "bitsandbytes; platform_system == 'Linux'"]
DEMO = ["PyYAML"]
BENCH = ["pytest-benchmark", *PEFT, "matplotlib"]
# The model and texts of the examples are packages too, installed without what they depend on.
EXAMPLES = [*PEFT, "transformers>=4.56"]
STACKS = ["diffusers", "torchao", "hqq"]  # what patched models are tested with, beside TRL
TEST = ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis"]
TEST += [*FINETUNE, *DEMO, *STACKS]
TEST += ["setuptools>=70.1"]  # which builds wheels by itself, as a test does

setup(
    name="fastlora-kernels",
    version=VERSION,
    description="A LoRA linear layer that costs what the frozen layer costs, in Triton.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["fastlora", *(f"fastlora.{part}" for part in PARTS), "fastlora_kernels"],
    package_dir={"fastlora_kernels": "kernels/fastlora_kernels"},
    package_data={"fastlora": ["py.typed"], "fastlora_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.8",
        "triton>=3.4; platform_system == 'Linux'",
        "safetensors[torch]",
    ],
    extras_require={
        "peft": PEFT,
        "finetune": FINETUNE,
        "demo": [*FINETUNE, *DEMO],
        "examples": EXAMPLES,
        "bench": BENCH,
        "test": TEST,
        "fuzz": [*TEST, "atheris"],
        "dev": [*TEST, "ruff", "mypy", "pre-commit"],
    },
)
