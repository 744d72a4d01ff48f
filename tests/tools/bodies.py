# SPDX-License-Identifier: Apache-2.0
"""Implementations as the pairs of functions that `acceptance` takes: forward and backward."""

import torch

from fastlora.operator import blocks, eager, library, steps
from fastlora.operator.operands import Operands


class Body:
    """Five steps as forward and backward of a list of projections, and of one."""

    def __init__(self, module, configs=None):
        self.module, self.configs = module, configs

    def forward_all(self, x, projections):
        return steps.forward(self.module, x, projections, self.configs)

    def backward_all(self, dys, *rest):
        return steps.backward(self.module, dys, *rest, configs=self.configs)

    def forward(self, x, *rest):
        (y,), (s,) = self.forward_all(x, [Operands(*rest)])
        return y, s

    def backward(self, dy, x, w, a, b, s, seed, scaling, p, needs):
        one, (need_x, *factors) = [Operands(w, a, b, None, seed, scaling, p)], needs
        dx, (da,), (db,) = self.backward_all([dy], x, one, [s], need_x, [tuple(factors)])
        return dx, da, db


class Eager:
    """The ``eager`` implementation, or a copy of it, whose gradients are PyTorch's."""

    def __init__(self, module=eager):
        self.module = module

    @torch.no_grad()
    def forward(self, x, *rest):
        return self._output(x, *rest), None

    def backward(self, dy, x, w, a, b, _, seed, scaling, p, needs):
        leaves = [t.detach().requires_grad_(need) for t, need in zip((x, a, b), needs, strict=True)]
        y = self._output(leaves[0], w, *leaves[1:], None, seed, scaling, p)
        wanted = [t for t in leaves if t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, dy) if wanted else ())
        return tuple(next(found) if need else None for need in needs)

    def _output(self, x, *rest):
        return self.module.output(x, Operands(*rest), observed=False)


def bodies():
    """Return those of five steps, by name; the kernels' is there under the interpreter alone."""
    from fastlora_kernels import steps as kernels

    return {"blocks": Body(blocks), "library": Body(library), "triton": Body(kernels)}
