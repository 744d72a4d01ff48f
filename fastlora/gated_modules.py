# SPDX-License-Identifier: Apache-2.0
"""Modules that are gated MLPs: recognised by what they compute, and run as one operator."""

from __future__ import annotations

import copy
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastlora import functional, gated_mlp, ops, plans
from fastlora.classes import rebased
from fastlora.gated_mlp import ACTIVATIONS
from fastlora.siblings import FrozenLinear, is_plain, may_differ, module_hooks, projection_of

# in, out of gate, up and down in a probe
_SIZES = ((5, 6), (5, 6), (6, 5))
# Of x in a probe: so large a one reaches any limit that there may be.
_SCALES = (1.0, 1e6)
_SIMPLE = (int, float, str, bool, type(None))
_CONTAINERS = (list, dict, set)
_MISSING = object()
_OWN = {*vars(nn.Module()), "_sibling_groups", "_gated_form"}


# A module's own attributes, and each of its other children with theirs.
State = tuple[dict[str, Any], list[tuple[nn.Module, dict[str, Any]]]]


class Form(NamedTuple):
    """``down(act(gate(x)) · up(x))``: the children's names, the activation, and what was checked.

    ``forward`` is the class's own; ``state`` is what else its outcome may depend on, see `_state`:
    a module where they have changed since is no longer known to be of this form.
    """

    gate: str
    up: str
    down: str
    activation: str
    forward: Callable
    state: State

    @property
    def names(self) -> tuple[str, ...]:
        return self[:3]


def form_of(module: nn.Module, pair: Sequence[str], is_linear: Callable) -> Form | None:
    """Return the form of ``module`` whose children named ``pair`` take its input, or None.

    There has to be one more child that ``is_linear``. What the module computes is then looked at:
    with small float64 layers in the place of those three, each of which it has to call once, it
    has to give the form's numbers and gradients, on random numbers of ordinary and of huge size, in
    evaluation and in training mode, and nothing of its own may change meanwhile.
    """
    kind = _kind(module)
    if len(pair) != 2 or "forward" in vars(module) or module._parameters or module._buffers:
        return None
    downs = [n for n, child in module._modules.items() if is_linear(child) and n not in pair]
    if len(downs) != 1:
        return None
    names = (*pair, downs[0])
    others = list(_others(module, names))
    if any(isinstance(m, nn.modules.dropout._DropoutNd) or _is_observed(m) for m in others):
        return None
    if any(other._parameters or other._buffers for other in others):
        return None
    try:
        _fused_class(kind)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            found = _recognised(module, kind, names)
    except Exception:  # whatever it is, it is not the form
        return None
    if found is None:
        return None
    (gate, up), activation = found
    return Form(gate, up, downs[0], activation, kind.forward, _state(module, names))


class _StandIn(nn.Linear):
    """A small float64 layer that counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def _recognised(
    module: nn.Module, kind: type, names: Sequence[str]
) -> tuple[tuple[str, str], str] | None:
    """Return (gate, up) and the activation that ``module`` computes with, or None."""
    layers = [_StandIn(*sizes, device="cpu", dtype=torch.float64) for sizes in _SIZES]
    by_name = dict(zip(names, layers, strict=True))
    ways = list(itertools.product((names[:2], (names[1], names[0])), ACTIVATIONS))
    for scale, training in itertools.product(_SCALES, (False, True)):
        draw = functools.partial(torch.randn, 3, 5, device="cpu", dtype=torch.float64)
        x, dy = (draw() * scale).requires_grad_(), draw()
        before = [layer.calls for layer in layers]
        found = _with_grads(_run_probe(module, kind, by_name, x, training), x, dy, layers)
        if [layer.calls - count for layer, count in zip(layers, before, strict=True)] != [1] * 3:
            return None
        left = []
        for (gate, up), activation in ways:
            h = ACTIVATIONS[activation][0](by_name[gate](x)) * by_name[up](x)
            expected = _with_grads(layers[2](h), x, dy, layers)
            if all(map(_equal, found, expected)):
                left.append(((gate, up), activation))
        ways = left
    return ways[0] if len(ways) == 1 else None


def _run_probe(
    module: nn.Module, kind: type, layers: dict[str, nn.Module], x: Tensor, training: bool
) -> Tensor:
    """Return what a copy of ``module`` with these layers makes of x.

    Raises RuntimeError where anything of the copy has changed then.
    """
    probe = copy.copy(module)
    own = {k: copy.deepcopy(v) if isinstance(v, _CONTAINERS) else v for k, v in _attributes(module)}
    probe.__dict__ = {**vars(module), **own}
    probe.__dict__.pop("_gated_form", None)
    probe.__class__ = kind
    children = {
        name: layers[name] if name in layers else copy.deepcopy(child)
        for name, child in module._modules.items()
    }
    keeps_order = isinstance(module._modules, OrderedDict)
    probe._modules = OrderedDict(children) if keeps_order else children
    probe.train(training)
    kept = {k: copy.deepcopy(v) if isinstance(v, _CONTAINERS) else v for k, v in own.items()}
    y = kind.forward(probe, x)
    after = dict(_attributes(probe))
    if after.keys() != kept.keys() or not all(
        v == kept[k] if isinstance(v, _CONTAINERS) else v is kept[k] for k, v in after.items()
    ):
        raise RuntimeError("the module keeps something of its forward")
    return y


def _with_grads(y: Tensor, x: Tensor, dy: Tensor, layers: list[nn.Module]) -> list[Tensor]:
    parameters = [p for layer in layers for p in layer.parameters()]
    return [y, *torch.autograd.grad(y, [x, *parameters], dy)]


def _equal(found: Tensor, expected: Tensor) -> bool:
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    )


def _kind(module: nn.Module) -> type:
    """Return a module's class without what `fuse` makes of it."""
    kind = type(module)
    return getattr(kind, "_gated_of", kind)


def _others(module: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """Yield the children that are not among ``names``, and everything in them."""
    for name, child in module._modules.items():
        if name not in names and child is not None:
            yield from child.modules()


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what a module holds beside what every module does."""
    return ((key, value) for key, value in vars(module).items() if key not in _OWN)


def _state(module: nn.Module, names: Sequence[str]) -> State:
    """Return the attributes of a module, and its other children with theirs."""
    of_others = [(other, dict(_attributes(other))) for other in _others(module, names)]
    return dict(_attributes(module)), of_others


def _has_changed(module: nn.Module, form: Form) -> bool:
    """Return whether anything is not as it was checked; what was added to it does not count."""
    own, of_others = form.state
    now = list(_others(module, form.names))
    return (
        len(now) != len(of_others)
        or any(a is not b for a, (b, _) in zip(now, of_others, strict=True))
        or _differ(own, module)
        or any(_differ(attributes, other) for other, attributes in of_others)
    )


def _differ(then: dict[str, Any], module: nn.Module) -> bool:
    now = vars(module)
    for key, a in then.items():
        b = now.get(key, _MISSING)
        if a is not b and not (type(a) is type(b) and type(a) in _SIMPLE and a == b):
            return True
    return False


def _is_observed(module: nn.Module) -> bool:
    """Return whether someone would see that ``module`` is not called."""
    return bool(module._forward_hooks) or may_differ(module)


def fuse(module: nn.Module, form: Form) -> None:
    """Have ``module`` run as one operator where it can, by a class of its own."""
    for name in form.names:
        child = module._modules[name]
        if type(child) is nn.Linear:
            child.__class__ = FrozenLinear
    if not hasattr(type(module), "_gated_of"):
        module.__class__ = _fused_class(type(module))
    module._gated_form = form


def unfused(module: nn.Module) -> type:
    """Return the class that ``module`` would have if `fuse` had never changed it."""
    kind = type(module)
    fused = next((k for k in kind.__mro__ if "_gated_of" in vars(k)), None)
    return kind if fused is None else rebased(kind, fused, fused._gated_of)


@functools.cache
def _fused_class(kind: type) -> type:
    def forward(self, *args, **kwargs):
        y = _output(self, *args) if len(args) == 1 and not kwargs else None
        return kind.forward(self, *args, **kwargs) if y is None else y

    def reduce_ex(self, protocol):  # pickle does not find a class that is made here by its name
        state = self.__getstate__() if hasattr(self, "__getstate__") else vars(self)
        return _new, (kind,), state

    own = {"forward": forward, "__reduce_ex__": reduce_ex, "_gated_of": kind}
    return type(f"Fused{kind.__name__}", (kind,), own)


def _new(kind: type) -> nn.Module:
    fused = _fused_class(kind)
    return fused.__new__(fused)


def _output(module: nn.Module, x: Tensor) -> Tensor | None:
    """Return what ``module`` makes of x by one operator, None where it has to run as it is."""
    form: Form | None = module.__dict__.get("_gated_form")  # torch 2.8 does not compile vars()
    if form is None or torch.compiler.is_compiling() or not is_plain(x) or module_hooks():
        return None
    kind = type(module)._gated_of
    if kind.forward is not form.forward or _has_changed(module, form):
        return None
    members = [module._modules.get(name) for name in form.names]
    if not all(hasattr(type(member), "sibling_operands") for member in members):
        return None
    if any(map(_is_observed, members)) or any(map(_is_observed, _others(module, form.names))):
        return None
    operands = [member.sibling_operands(x) for member in members]
    if any(each is None for each in operands):
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
    impl = "auto" if plans.FORCED == "auto" else plans.named("auto", x)
    tensors = [t for p in (*checked, *last) for t in p[:4]]
    if impl == "reference" or forward_ad._current_level >= 0:
        return None
    if not ops.unobserved(wide, *tensors):  # before a seed is drawn
        return None
    wide, ready = functional.drawn(wide, [*checked, *last], training=True)
    y = gated_mlp.run(wide, ready, form.activation, impl)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[1])
