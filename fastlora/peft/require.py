# SPDX-License-Identifier: Apache-2.0
"""What is asked of PEFT and of a model before anything of it is changed."""

from __future__ import annotations

import re

from torch import nn

from fastlora.layers.classes import unwrapped

# The releases whose layers were tested: from the first to before the last.
TESTED = ((0, 19), (0, 22))


def check_release() -> None:
    try:
        import peft
    except ImportError as error:
        raise ImportError("PEFT is needed: pip install 'fastlora-kernels[peft]'") from error
    first, end = TESTED
    release = tuple(int(part) for part in re.findall(r"\d+", peft.__version__)[:2])
    if not first <= release < end:
        raise RuntimeError(
            f"PEFT {peft.__version__} was not tested with this fastlora, whose fused layers stand "
            f"in for those of {_text(first)} up to before {_text(end)}"
        )


def _text(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


def check_not_compiled(model: nn.Module) -> nn.Module:
    plain = unwrapped(model)
    for part in (model, *plain.modules()):
        if "_orig_mod" in part._modules or part._compiled_call_impl is not None:
            raise ValueError(
                f"{type(part).__name__} is compiled: patch the model first, then compile it"
            )
    return plain
