# SPDX-License-Identifier: Apache-2.0
"""What is put around modules and their classes at run time, and what is inside."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that DistributedDataParallel or torch.compile holds."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    while isinstance(model, DistributedDataParallel) or "_orig_mod" in model._modules:
        model = model._orig_mod if "_orig_mod" in model._modules else model.module
    return model


def rebased(kind: type, old: type, new: type) -> type:
    """Return ``kind`` with ``new`` in the place of ``old``, one of its bases or itself.

    That is ``new`` itself, or where FSDP2 or a parametrization has since put a class of its own
    before ``old``, the class that they would have put before ``new``.
    Raises ValueError for a class with methods that name it, as ``super()`` does.
    """
    if kind is old:
        return new
    if not issubclass(kind, old):
        return kind
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    for value in own.values():
        if "__class__" in getattr(getattr(value, "__code__", None), "co_freevars", ()):
            raise ValueError(f"{kind.__name__} is not to be undone: its methods call super()")
    name = kind.__name__.replace(old.__name__, new.__name__)
    return type(kind)(name, tuple(rebased(base, old, new) for base in kind.__bases__), own)
