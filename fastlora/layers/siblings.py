# SPDX-License-Identifier: Apache-2.0
"""Siblings: layers that are called with the same tensor, such as q, k and v, run as one operator.

Nobody's source is rewritten. The first of a group to be called computes them all (`lora_linears`);
each other finds its output when it is called with the same tensor, under the same circumstances.
Otherwise, and wherever anything could tell a difference, a layer computes alone.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as module_hooks

from fastlora import functional
from fastlora.layers.active import Adapter, stacked
from fastlora.operator import plans
from fastlora.operator.operands import Projection

# What `sibling_operands` of a layer returns: weight [N, K], bias [N] and the active adapters.
Layer = tuple[Tensor, "Tensor | None", Sequence[Adapter]]

_MISSES = 3  # of a group, more than an eighth of its forwards, before it is given up
_PLAIN = (Tensor, nn.Parameter)


class Group:
    """The names of siblings in call order, and (weakly) the module whose children they are.

    Every sibling holds its group as ``_siblings``. A copy of one of them alone, or of a group
    whose parent is gone, belongs to nobody.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self.parent: weakref.ref | None = None
        self.misses, self.said = 0, False

    def __reduce__(self) -> tuple:
        return Group, (self.names,)

    def members(self) -> list[nn.Module] | None:
        """Return the siblings, or None where one of them has been replaced or taken away."""
        parent = None if self.parent is None else self.parent()
        if parent is None:
            return None
        found = [parent._modules.get(name) for name in self.names]
        same = all(m is not None and vars(m).get("_siblings") is self for m in found)
        return found if same and all(hasattr(type(m), "sibling_operands") for m in found) else None


class Groups:
    """A module's groups of children. Lies in the module, so that copies and pickles have it too."""

    def __init__(self, parent: nn.Module | None, groups: list[Group]) -> None:
        self.groups = groups
        for group in groups:
            group.parent = None if parent is None else weakref.ref(parent)

    def __reduce__(self) -> tuple:
        parent = self.groups[0].parent
        return Groups, (None if parent is None else parent(), self.groups)


class FrozenLinear(nn.Linear):
    """An ``nn.Linear`` that has siblings; nothing else about it differs."""

    _siblings: Group | None = None

    def sibling_operands(self, x: Tensor) -> Layer | None:
        if type(self.weight) not in _PLAIN or type(self.bias) not in (*_PLAIN, type(None)):
            return None  # a quantised weight, say
        return self.weight, self.bias, ()

    def forward(self, input: Tensor) -> Tensor:
        y = handed(self, input)
        return super().forward(input) if y is None else y


class _Held(NamedTuple):
    """The outputs of a group that its siblings have not fetched yet, and what they hold for.

    By the sibling's id: the sibling, what it computed with, that at the time, and the output.
    """

    group: Group
    x: Tensor
    circumstances: tuple
    seats: dict[int, tuple[nn.Module, Layer, list, Tensor]]


# One group's outputs for each thread: whatever an exception or a skipped sibling left behind goes
# when the next group begins.
_slot = threading.local()


def handed(member: nn.Module, x: Tensor) -> Tensor | None:
    """Return ``member``'s output for ``x`` if it can be had with its siblings', else None."""
    group = member._siblings
    if group is None or torch.compiler.is_compiling() or not is_plain(x):
        return None
    if torch._C._are_functorch_transforms_active():  # what it computes is of use in there alone
        return None
    if plans.is_few(x.numel(), x.device):  # nothing that would pay for the way
        return None
    held: _Held | None = getattr(_slot, "held", None)
    if held is not None and held.group is group and held.x is x and id(member) in held.seats:
        return _fetch(held, member, x)
    members = group.members()
    if members is None or members[0] is not member:
        return None
    _slot.held = None  # also what this group has computed for x before: this is another forward
    if held is not None:
        _miss(held, [seat[0] for seat in held.seats.values()])
    if member._siblings is not group or module_hooks() or any(map(may_differ, members)):
        return None
    return _compute(group, members, x)


def _compute(group: Group, members: list[nn.Module], x: Tensor) -> Tensor | None:
    layers = [member.sibling_operands(x) for member in members]
    projections = [layer and projection_of(layer) for layer in layers]
    if not all(projections):
        return None
    try:
        states = list(map(_state, layers))
        ready = functional.checked(x, projections)
    except (RuntimeError, TypeError, ValueError):
        # Parameters made in inference mode have no version; and what is wrong, or taken after all,
        # each layer says by itself.
        return None
    first, *ys = functional.run_checked(*ready, training=True)
    seats = zip(members[1:], layers[1:], states[1:], ys, strict=True)
    _slot.held = _Held(group, x, _circumstances(x), {id(seat[0]): seat for seat in seats})
    return first


def _fetch(held: _Held, member: nn.Module, x: Tensor) -> Tensor | None:
    _, _, state, y = held.seats.pop(id(member))
    if not held.seats:
        _slot.held = None
    now = member.sibling_operands(x)
    if now is not None and held.circumstances == _circumstances(x):
        with contextlib.suppress(RuntimeError):
            if state == _state(now) and not _is_freed(y):
                if not held.seats:
                    held.group.misses = max(0, held.group.misses - 1)
                return y
    _miss(held, [member])
    return None


def _is_freed(y: Tensor) -> bool:
    """Return whether a backward of another sibling has freed what y's needs."""
    node = y.grad_fn
    try:
        if node is not None and not hasattr(node, "_raw_saved_tensors"):  # reshaped
            hasattr(node.next_functions[0][0], "_raw_saved_tensors")
    except RuntimeError:
        return True
    return False


def _miss(held: _Held, unused: list[nn.Module]) -> None:
    """Count what was computed for nothing; when it keeps happening say so, and part the group.

    Not where its forward may be run again for backward, or is, and has to go as it went: without
    gradients, under hooks for saved tensors or within a backward, as checkpoints are.
    """
    group = held.group
    group.misses += 8
    members = group.members()
    if group.misses < 8 * _MISSES or members is None:
        return
    if not group.said:
        group.said = True
        left = [name for name, m in zip(group.names, members, strict=True) if m in unused]
        rest = tuple(name for name in group.names if name not in left)
        rest = f"; fuse_siblings={[rest]} leaves them out" if len(rest) > 1 else ""
        warnings.warn(
            f"{', '.join(left)}: computed beside {group.names[0]!r} and not called with its input, "
            f"{_MISSES} times; that is lost time: {', '.join(group.names)} run alone from now on, "
            f"with checkpoints once there are none{rest}",
            stacklevel=2,
        )
    if held.circumstances[:3] == (True, None, -1):
        for member in members:
            vars(member).pop("_siblings", None)


def is_plain(x: Any) -> bool:
    """Return whether x is a tensor that tells whether it has been written to."""
    return type(x) in _PLAIN and not x.is_inference()


def _circumstances(x: Tensor) -> tuple:
    """Return what else an output depends on, and whether x has been written to."""
    kind = x.device.type
    autocast = torch._C._is_any_autocast_enabled() and kind != "meta"
    dtype = torch.get_autocast_dtype(kind) if autocast and torch.is_autocast_enabled(kind) else None
    # Checkpointing without reentry is such a hook: outside and inside are two forwards.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    modes = torch.is_inference_mode_enabled(), torch._C._len_torch_dispatch_stack()
    how = torch.is_grad_enabled(), hooks, torch._C._current_graph_task_id()
    return *how, x._version, x.requires_grad, dtype, _stream(x), *modes


def _stream(x: Tensor) -> torch.cuda.Stream | None:
    """Return the stream that an output is written on: another would have to wait for it."""
    return torch.cuda.current_stream(x.device) if x.is_cuda else None


def projection_of(layer: Layer) -> Projection | None:
    """Return the projection that a layer is, None if several of its adapters draw dropout."""
    weight, bias, adapters = layer
    if not adapters:
        return Projection(weight, None, None, bias)
    (a, b, scaling, p), *others = stacked(weight.dtype, adapters)
    return None if others else Projection(weight, a, b, bias, scaling, p)


def _state(layer: Layer) -> list:
    """Return what tells a layer's output from another: numbers, and of each tensor which it is,
    how often it was written to, whether it trains and where it lies.
    """
    weight, bias, adapters = layer
    return [
        (id(t if t._base is None else t._base), t._version, t.requires_grad, t.data_ptr())
        if isinstance(t, Tensor)
        else t
        for t in (weight, bias, *(part for adapter in adapters for part in adapter))
    ]


def may_differ(member: nn.Module) -> bool:
    """Return whether ``member``, when it is called, might compute with another tensor."""
    return bool(
        member._forward_pre_hooks
        or member._backward_hooks
        or member._backward_pre_hooks
        or "forward" in member.__dict__
    )
