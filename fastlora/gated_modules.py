"""Modules that are gated MLPs: recognised by what they compute, and run as one operator."""

from __future__ import annotations

import copy
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastlora import functional, gated_mlp, plans
from fastlora.classes import rebased
from fastlora.gated_mlp import ACTIVATIONS
from fastlora.siblings import FrozenLinear, is_plain, may_differ, module_hooks, projection_of


class Form(NamedTuple):
    """``down(act(gate(x)) · up(x))``: the children's names, the activation, and what was checked.

    ``forward`` is the class's own and ``others`` are the other children: a module where they have
    changed since is no longer known to be of this form.
    """

    gate: str
    up: str
    down: str
    activation: str
    forward: Callable
    others: tuple[nn.Module, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self[:3]


def form_of(module: nn.Module, pair: Sequence[str], is_linear: Callable) -> Form | None:
    """Return the form of ``module`` whose children named ``pair`` take its input, or None.

    There has to be one more child that ``is_linear``. What the module computes is then looked at:
    with small float64 layers in the place of those three it has to give what the form gives, on
    random numbers, in evaluation and in training mode.
    """
    if len(pair) != 2 or "forward" in vars(module) or module._parameters or module._buffers:
        return None
    downs = [n for n, child in module._modules.items() if is_linear(child) and n not in pair]
    if len(downs) != 1:
        return None
    names = (*pair, downs[0])
    others = _others(module, names)
    if any(True for other in others for _ in (*other.parameters(), *other.buffers())):
        return None
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        layers = [nn.Linear(*sizes, dtype=torch.float64) for sizes in _SIZES]
        x = torch.randn(3, _SIZES[0][0], dtype=torch.float64)
        try:
            found = [
                _computed(module, dict(zip(names, layers, strict=True)), x, training)
                for training in (False, True)
            ]
        except Exception:  # whatever it is, it is not the form
            return None
        down = layers[2]
        for (i, j), activation in itertools.product(((0, 1), (1, 0)), ACTIVATIONS):
            y = down(ACTIVATIONS[activation][0](layers[i](x)) * layers[j](x))
            if all(_equal(other, y) for other in found):
                of = type(module).forward, others
                return Form(names[i], names[j], names[2], activation, *of)
    return None


# in, out of gate, up and down
_SIZES = ((5, 6), (5, 6), (6, 5))


def _others(module: nn.Module, names: Sequence[str]) -> tuple[nn.Module, ...]:
    return tuple(child for name, child in module._modules.items() if name not in names)


def _computed(module: nn.Module, layers: dict[str, nn.Module], x: Tensor, training: bool) -> Tensor:
    """Return what a copy of ``module`` with these layers makes of x."""
    probe = copy.copy(module)
    probe.__dict__ = dict(vars(module))
    children = module._modules.items()
    copies = {name: layers.get(name) or copy.deepcopy(child) for name, child in children}
    probe._modules = OrderedDict(copies) if isinstance(module._modules, OrderedDict) else copies
    probe.train(training)
    return type(module).forward(probe, x)


def _equal(found: object, y: Tensor) -> bool:
    return (
        isinstance(found, Tensor)
        and found.dtype == y.dtype
        and found.shape == y.shape
        and torch.allclose(found, y, rtol=1e-9, atol=1e-12)
    )


def fuse(module: nn.Module, form: Form) -> None:
    """Have ``module`` run as one operator where it can, by a class of its own."""
    for name in form.names:
        child = module._modules[name]
        if type(child) is nn.Linear:
            child.__class__ = FrozenLinear
    module._gated_form = form
    module.__class__ = _fused_class(type(module))


def separate(module: nn.Module) -> None:
    """Give a module that `fuse` has changed its own class again."""
    if vars(module).pop("_gated_form", None) is not None:
        fused = next(k for k in type(module).__mro__ if "_gated_of" in vars(k))
        module.__class__ = rebased(type(module), fused, fused._gated_of)


@functools.cache
def _fused_class(kind: type) -> type:
    def forward(self, *args, **kwargs):
        y = _output(self, *args) if len(args) == 1 and not kwargs else None
        return kind.forward(self, *args, **kwargs) if y is None else y

    def reduce_ex(self, protocol):  # pickle does not find a class that is made here by its name
        return _new, (kind,), vars(self)

    own = {"forward": forward, "__reduce_ex__": reduce_ex, "_gated_of": kind}
    return type(f"Fused{kind.__name__}", (kind,), own)


def _new(kind: type) -> nn.Module:
    fused = _fused_class(kind)
    return fused.__new__(fused)


def _output(module: nn.Module, x: Tensor) -> Tensor | None:
    """Return what ``module`` makes of x by one operator, None where it has to run as it is."""
    if torch.compiler.is_compiling() or not is_plain(x) or plans.FORCED == "reference":
        return None
    form: Form = module._gated_form
    if type(module)._gated_of.forward is not form.forward:
        return None
    others = _others(module, form.names)
    if len(others) != len(form.others) or any(map(_differ, others, form.others)):
        return None
    members = [module._modules.get(name) for name in form.names]
    if any(
        not hasattr(type(m), "sibling_operands") or m._forward_hooks or may_differ(m)
        for m in members
    ):
        return None
    operands = [member.sibling_operands(x) for member in members]
    if module_hooks() or any(each is None for each in operands):
        return None
    projections = [projection_of(each) for each in operands]
    if any(each is None for each in projections):
        return None
    try:
        wide, checked = functional.checked(x, projections[:2])
        inner = wide.new_empty(1, checked[0].weight.shape[0])
        _, last = functional.checked(inner, projections[2:])
    except (TypeError, ValueError):  # alone each says what is wrong with it, or takes it
        return None
    if checked[0].weight.shape[0] != checked[1].weight.shape[0]:
        return None
    wide, ready = functional.drawn(wide, [*checked, *last], training=True)
    y = gated_mlp.run(wide, ready, form.activation)
    return y if y is None or x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[1])


def _differ(a: object, b: object) -> bool:
    return a is not b
