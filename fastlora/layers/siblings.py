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
from fastlora.operator.operands import Projection

_MISSES = 3  # of a group, before a warning says so
_PLAIN = (Tensor, nn.Parameter)


class Operands(NamedTuple):
    """What a layer computes with as it stands: compared by identity, not by value."""

    weight: Tensor
    transposed: bool
    bias: Tensor | None
    adapters: Sequence[Adapter]


class Group:
    """The names of siblings in call order, and (weakly) the module whose children they are.

    Every sibling holds its group as ``_siblings``. A copy of one of them alone, or of a group
    whose parent is gone, belongs to nobody.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self.parent: weakref.ref | None = None
        self.misses = 0

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

    def sibling_operands(self, x: Tensor) -> Operands | None:
        if type(self.weight) not in _PLAIN or type(self.bias) not in (*_PLAIN, type(None)):
            return None  # a quantised weight, say
        return Operands(self.weight, False, self.bias, ())

    def forward(self, input: Tensor) -> Tensor:
        y = handed(self, input)
        return super().forward(input) if y is None else y


class _Held(NamedTuple):
    """The outputs of a group that its siblings have not fetched yet, and what they hold for."""

    group: Group
    x: Tensor
    circumstances: tuple
    seats: dict[int, tuple[nn.Module, Operands, tuple[tuple, ...], Tensor]]


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
    held: _Held | None = getattr(_slot, "held", None)
    if held is not None and held.group is group and held.x is x and id(member) in held.seats:
        return _fetch(held, member, x)
    members = group.members()
    if members is None or members[0] is not member:
        return None
    _drop()  # also what this group has computed for x before: this is another forward
    if module_hooks() or any(map(may_differ, members)):
        return None
    return _compute(group, members, x)


def _fetch(held: _Held, member: nn.Module, x: Tensor) -> Tensor | None:
    _, operands, versions, y = held.seats.pop(id(member))
    if not held.seats:
        _slot.held = None
    now = member.sibling_operands(x)
    if held.circumstances == _circumstances(x) and now is not None and _same(operands, now):
        with contextlib.suppress(RuntimeError):
            if versions == _versions(now) and not _is_freed(y):
                return y
    _miss(held.group, [member])
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


def _compute(group: Group, members: list[nn.Module], x: Tensor) -> Tensor | None:
    operands = [member.sibling_operands(x) for member in members]
    if any(each is None for each in operands):
        return None
    projections = list(map(projection_of, operands))
    if any(each is None for each in projections):
        return None
    try:
        versions = list(map(_versions, operands))
    except RuntimeError:  # parameters made in inference mode have none
        return None
    try:
        ready = functional.checked(x, projections)
    except (TypeError, ValueError):  # alone each says what is wrong with it, or takes it
        return None
    first, *ys = functional.run_checked(*ready, training=True)
    rest = zip(members[1:], operands[1:], versions[1:], ys, strict=True)
    seats = {id(seat[0]): seat for seat in rest}
    _slot.held = _Held(group, x, _circumstances(x), seats)
    return first


def _drop() -> None:
    """Forget what nobody has fetched, and say so when it keeps happening to a group."""
    held: _Held | None = getattr(_slot, "held", None)
    _slot.held = None
    if held is not None:
        _miss(held.group, [seat[0] for seat in held.seats.values()])


def _miss(group: Group, unused: list[nn.Module]) -> None:
    """Count what was computed for nothing; say so when it keeps happening to a group."""
    group.misses += 1
    if group.misses == _MISSES:
        members = group.members() or []
        left = [n for n, m in zip(group.names, members, strict=False) if m in unused]
        warnings.warn(
            f"{', '.join(left or group.names[1:])}: computed beside {group.names[0]!r} and not "
            f"called with its input, {_MISSES} times; that is lost time: name the siblings that "
            "always are, fuse_siblings=[('q_proj', 'k_proj'), ...]",
            stacklevel=2,
        )


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
    return x._version, x.requires_grad, torch.is_grad_enabled(), dtype, hooks, _stream(x), *modes


def _stream(x: Tensor) -> torch.cuda.Stream | None:
    """Return the stream that an output is written on: another would have to wait for it."""
    return torch.cuda.current_stream(x.device) if x.is_cuda else None


def projection_of(operands: Operands) -> Projection | None:
    """Return the projection that a layer is, None if several of its adapters draw dropout."""
    weight, transposed, bias, adapters = operands
    if transposed:
        weight = weight.t()
    if not adapters:
        return Projection(weight, None, None, bias)
    if len(adapters) > 1:
        if any(p for *_, p in adapters):
            return None
        adapters = [stacked(weight.dtype, adapters)]
    ((a, b, scaling, p),) = adapters
    return Projection(weight, a, b, bias, scaling, p)


def _versions(operands: Operands) -> tuple[tuple, ...]:
    """Return how often each tensor has been written to, whether it trains and where it lies."""
    weight, _, bias, adapters = operands
    factors = [t for a, b, scaling, _ in adapters for t in (a, b, scaling)]
    return tuple(
        (t._version, t.requires_grad, t.data_ptr())
        for t in (weight, bias, *factors)
        if isinstance(t, Tensor)
    )


def _same(then: Operands, now: Operands) -> bool:
    if then.weight is not now.weight or then.bias is not now.bias:
        return False
    return len(then.adapters) == len(now.adapters) and all(
        a is a_now and b is b_now and (scaling is scaling_now or scaling == scaling_now) and p == q
        for (a, b, scaling, p), (a_now, b_now, scaling_now, q) in zip(
            then.adapters, now.adapters, strict=True
        )
    )


def may_differ(member: nn.Module) -> bool:
    """Return whether ``member``, when it is called, might compute with another tensor."""
    return bool(
        member._forward_pre_hooks
        or member._backward_hooks
        or member._backward_pre_hooks
        or "forward" in member.__dict__
    )
