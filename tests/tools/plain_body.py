# SPDX-License-Identifier: Apache-2.0
"""The ``plain`` implementation as the pair of functions that the others are."""

from __future__ import annotations

from types import ModuleType

import torch

from fastlora.operator import eager
from fastlora.operator.operands import Operands


class Plain:
    """What `acceptance.run` takes; ``module`` is the implementation or a copy of it."""

    def __init__(self, module: ModuleType = eager) -> None:
        self.module = module

    def forward(self, x, *rest):
        with torch.no_grad():
            return self._output(x, *rest), None

    def backward(self, dy, x, w, a, b, _, seed, scaling, p, needs):
        leaves = [t.detach().requires_grad_(need) for t, need in zip((x, a, b), needs, strict=True)]
        y = self._output(leaves[0], w, *leaves[1:], None, seed, scaling, p)
        wanted = [t for t in leaves if t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, dy) if wanted else ())
        return tuple(next(found) if need else None for need in needs)

    def _output(self, x, *rest):
        (y,) = self.module.outputs(x, [Operands(*rest)], observed=False)
        return y
