# SPDX-License-Identifier: Apache-2.0
"""Outputs and gradients of a model for one input, and how far they are from others."""

import torch

X = torch.linspace(-1, 1, 2 * 24 * 64).reshape(2, 24, 64).sin()


def results(wrapped, x=X):
    """Return the output and the gradients of x and of all adapters."""
    x = x.detach().requires_grad_()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    y = wrapped(x)
    return [y, *torch.autograd.grad((y.float() ** 2).mean(), [x, *trained])]


def apart(found, right) -> list[float]:
    pairs = zip(found, right, strict=True)
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]
