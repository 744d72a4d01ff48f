# SPDX-License-Identifier: Apache-2.0
"""Siblings: layers that are called with the same tensor, such as q, k and v, run as one operator.

The first of a group to be called computes them all; each other finds its output when it is called
with the same tensor under the same circumstances. Wherever anything could tell, each runs alone.
"""

import itertools
import threading
import warnings
import weakref
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import functional
from fastlora.layers import gated
from fastlora.layers.active import Layer, projections_of
from fastlora.layers.classes import rebased
from fastlora.layers.gated import may_differ, may_share
from fastlora.layers.report import PatchReport
from fastlora.layers.sample_inputs import samples_for
from fastlora.operator import op
from fastlora.operator.weights import Quantised, is_linear

# True: an input by what the model says of itself (transformers); or one; or names of children.
How = bool | Tensor | Mapping[str, Any] | Sequence[Sequence[str]]
# Each layer that can be a sibling, with its first parent, the parent's path and its own name.
Places = dict[nn.Module, tuple[nn.Module, str, str]]
# Children of one module in the order of their calls; if it is a gated MLP, its parts, or why not.
Found = namedtuple("Found", "parent path names mlp why_not")
_MISSES = 3  # of a group, more than an eighth of its forwards, before it is given up


class Group:
    """Siblings by name in call order, and (weakly) their parent; a copy of one alone has none."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.misses, self.said = names, 0, False
        self.parent: Callable[[], nn.Module | None] = type(None)

    def __reduce__(self) -> tuple:
        return Group, (self.names,)

    def members(self) -> list[nn.Module] | None:
        """Return the siblings, or None where one of them has been replaced or taken away."""
        found = [getattr(self.parent(), "_modules", {}).get(name) for name in self.names]
        return found if all(getattr(m, "_siblings", None) is self for m in found) else None


class Groups:
    """A module's groups of children. Lies in the module, so that copies and pickles have it too."""

    def __init__(self, parent: nn.Module | None, groups: list[Group]) -> None:
        self.groups = groups
        for group in groups:
            group.parent = type(None) if parent is None else weakref.ref(parent)

    def __reduce__(self) -> tuple:
        return Groups, (self.groups[0].parent(), self.groups)


class FrozenLinear(nn.Linear):
    """An ``nn.Linear`` that has siblings; nothing else about it differs."""

    _stands_for, _siblings = nn.Linear, None

    def sibling_operands(self, x: Tensor) -> Layer | None:
        kinds = {type(self.weight), type(self.bias)}  # not those of a quantised weight, say
        return (self.weight, self.bias, ()) if kinds <= {*op.PLAIN, type(None)} else None

    def forward(self, input: Tensor) -> Tensor:
        y = handed(self, input)
        return super().forward(input) if y is None else y


class _Held(threading.local):
    """What a thread's latest group has computed for x, until it is fetched or the next begins."""

    group = x = circumstances = seats = None  # by sibling: its name, operands, their state, output


_held = _Held()


def handed(member: nn.Module, x: Tensor) -> Tensor | None:
    """Return ``member``'s output for ``x`` if it can be had with its siblings', else None."""
    group: Group | None = member._siblings
    if group is None or not may_share(x):
        return None
    if _held.x is x and _held.group is group and id(member) in _held.seats:
        return _fetched(member)
    members = group.members()
    if members is None or members[0] is not member:
        return None
    if _held.seats:  # also what this group has computed for x before: this is another forward
        _miss([name for name, *_ in _held.seats.values()])
        vars(_held).clear()
    if member._siblings is not group or any(map(may_differ, members)):
        return None
    layers = [each.sibling_operands(x) for each in members]
    try:
        ready = functional.checked(x, projections_of(layers))
        states = list(map(_state, layers))
    except (RuntimeError, TypeError, ValueError):  # what is wrong each layer says by itself
        return None
    ys = functional.run_checked(*ready, training=True)
    _held.group, _held.x, _held.circumstances = group, x, _circumstances(x)
    seats = zip(map(id, members), zip(group.names, layers, states, ys, strict=True), strict=True)
    _held.seats = dict(itertools.islice(seats, 1, None))
    return ys[0]


def _fetched(member: nn.Module) -> Tensor | None:
    name, _, state, y = _held.seats.pop(id(member))
    layer, node = member.sibling_operands(_held.x), y.grad_fn
    try:
        if node is not None and not hasattr(node, "_raw_saved_tensors"):  # reshaped
            hasattr(node.next_functions[0][0], "_raw_saved_tensors")
        same = layer and state == _state(layer) and _held.circumstances == _circumstances(_held.x)
    except RuntimeError:  # a backward of another sibling has freed what y's needs
        same = False
    if not same:
        _miss([name])
    elif not _held.seats:
        _held.group.misses = max(0, _held.group.misses - 1)
    if not _held.seats:
        vars(_held).clear()
    return y if same else None


def _miss(left: list[str]) -> None:
    """Count what was computed for nothing; when it keeps happening say so, and part the group."""
    group, members = _held.group, _held.group.members()
    group.misses += 8
    if group.misses < 8 * _MISSES or members is None:
        return
    if not group.said:
        group.said = True
        rest = tuple(name for name in group.names if name not in left)
        advice = f"; fuse_siblings={[rest]} leaves them out" if len(rest) > 1 else ""
        what = f"computed beside {group.names[0]!r} and not called with its input, {_MISSES} times"
        these, all_of = (", ".join(names) for names in (left, group.names))
        then = f"{all_of} run alone from now on, with checkpoints once there are none{advice}"
        warnings.warn(f"{these}: {what}; that is lost time: {then}", stacklevel=2)
    if _held.circumstances[:3] == (True, None, -1):  # no checkpoint may have to repeat this
        for member in members:
            vars(member).pop("_siblings", None)


def _state(layer: Layer) -> list:
    """Return what a layer computes with: numbers; which tensors, and how often written to."""

    def seen(t: Any) -> Any:
        t = t.source if type(t) is Quantised else getattr(t, "weight", t)
        if not isinstance(t, Tensor):
            return t
        return id(t if t._base is None else t._base), t._version, t.requires_grad, t.data_ptr()

    weight, bias, adapters = layer
    return list(map(seen, (weight, bias, *itertools.chain(*adapters))))


def _circumstances(x: Tensor) -> tuple:
    """Return what else an output depends on, and whether x has been written to."""
    kind = x.device.type
    autocast = torch._C._is_any_autocast_enabled() and kind != "meta"
    dtype = torch.get_autocast_dtype(kind) if autocast and torch.is_autocast_enabled(kind) else None
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None  # another had to wait
    # Checkpointing without reentry is such a hook: outside and inside are two forwards.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    modes = torch.is_inference_mode_enabled(), torch._C._len_torch_dispatch_stack()
    how = torch.is_grad_enabled(), hooks, torch._C._current_graph_task_id()
    return *how, x._version, x.requires_grad, dtype, stream, *modes


def find(model: nn.Module, how: How, adapted: Collection[nn.Module]) -> list[Found]:
    """Return the groups of siblings of ``model`` that hold at least one of ``adapted``.

    They are children of one module, also plain ``nn.Linear`` ones, that are called with the same
    tensor each time. ``how`` is `patch_peft`'s ``fuse_siblings``, with its errors.
    """
    if how is False:
        return []
    adapted = set(adapted)
    inside = {m for layer in adapted for m in layer.modules() if m is not layer}  # PEFT's own
    places: Places = {}
    for path, parent in model.named_modules():
        for name, child in parent._modules.items():
            linear = type(child) in (nn.Linear, FrozenLinear) and child not in inside
            if linear or child in adapted:
                places.setdefault(child, (parent, path, name))
    if how is True:
        speaks = next((m for m in model.modules() if hasattr(type(m), "dummy_inputs")), model)
        groups = _traced(speaks, samples_for(speaks), places)  # without PEFT's wrapper
    elif isinstance(how, (Tensor, Mapping)):
        groups = _traced(model, [how], places)
    else:
        groups = _named(model, how, places)
    found = []
    for layers in groups:
        parent, path, _ = places[layers[0]]
        names, mlp, why_not = tuple(places[layer][2] for layer in layers), (), ""
        others = [m for m in parent._modules.values() if m in places and m not in layers]
        if len(layers) == 2 and len(others) == 1:
            mlp, why_not = _gated(parent, {*layers}, *others)
        if any(parent._modules[name] in adapted for name in (*names, *mlp)):
            found.append(Found(parent, path, names, mlp, why_not))
    return found


def _gated(parent: nn.Module, pair: set, last: nn.Module) -> tuple[tuple[str, ...], str]:
    """Return the layers of the gated MLP that two siblings and one more make, or () and why not."""
    mlp, why_not = gated.read(parent)
    if not mlp:
        return (), why_not
    if "forward" in vars(parent):
        return (), "it has a forward of its own"
    own = [m if getattr(parent, n, 0) is (m := parent._modules.get(n)) else None for n in mlp]
    if ({*own[:2]}, own[2]) != (pair, last):
        return (), f"its forward calls {', '.join(mlp)}"
    try:
        gated.fused(_kind(parent))
    except Exception as error:  # whatever the class says to it
        return (), f"its class takes no subclass: {error!s:.60}"
    return mlp, ""


def _kind(parent: nn.Module) -> type:
    return getattr(type(parent), "_stands_for", type(parent))


def make(groups: Sequence[Found], report: PatchReport) -> None:
    """Make groups of what `find` has found, and one operator of each gated MLP; report them."""
    by_parent = defaultdict(list)
    for parent in {found.parent for found in groups}:
        for child in filter(None, parent._modules.values()):  # of groups made before
            vars(child).pop("_siblings", None)
    for parent, path, names, mlp, why_not in groups:
        group = Group(names)
        by_parent[parent].append(group)
        for name in (*names, *mlp):
            layer = parent._modules[name]
            if type(layer) is nn.Linear:
                layer.__class__ = FrozenLinear
            if name in names:
                layer._siblings = group
        kind = _kind(parent)
        if mlp and kind is type(parent):
            parent.__class__ = gated.fused(kind)
        (report.gated_mlps if mlp else report.siblings).append((path, mlp or names))
        if why_not and (kind.__name__, why_not) not in report.lookalikes:
            report.lookalikes.append((kind.__name__, why_not))
    for parent, several in by_parent.items():
        parent._sibling_groups = Groups(parent, several)


def separate(model: nn.Module) -> None:
    """Give what stands for a module of another class that class again; no layer has siblings."""
    ours = [(m, k) for m in model.modules() for k in type(m).__mro__ if "_stands_for" in vars(k)]
    kinds = [rebased(type(module), kind, kind._stands_for) for module, kind in ours]
    for (module, _), kind in zip(ours, kinds, strict=True):
        module.__class__ = kind
    for module in model.modules():
        for name in ("_siblings", "_sibling_groups", "_expert_dropout"):
            vars(module).pop(name, None)


def _named(model: nn.Module, how: Any, places: Places) -> list[tuple]:
    def listed(values: Any) -> bool:
        return isinstance(values, Sequence) and not isinstance(values, str)

    flat = [*itertools.chain(*how)] if listed(how) and all(map(listed, how)) else []
    flat = flat if all(isinstance(name, str) for name in flat) else []
    if not flat or len({*flat}) < len(flat) or any(len(names) < 2 for names in how):
        raise (ValueError if flat else TypeError)(
            "fuse_siblings must be True, an example input (a tensor or a mapping of keyword "
            "arguments) or groups of two names or more, each in one group only, such as "
            f"[('q', 'k', 'v')], got {how!r:.100}"
        )
    layers = {(parent, name): layer for layer, (parent, _, name) in places.items()}
    groups = []
    for names in how:
        all_of = [tuple(layers.get((m, name)) for name in names) for m in model.modules()]
        whole = [group for group in all_of if None not in group]
        if not whole:
            raise ValueError(f"fuse_siblings: no module has linear layers named {tuple(names)}")
        groups += whole
    return groups


def _traced(model: nn.Module, examples: Sequence[Any], places: Places) -> list[tuple]:
    """Return what was called together in a forward on the first of ``examples`` that works."""
    seen: dict[tuple, dict] = defaultdict(dict)  # by parent and input as it is then
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    error, what = None, "says of no input that siblings could be found with"

    def called(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor):
            version = None if x.is_inference() else x._version
            seen[places[module][0], x, version][module] = True

    with ExitStack() as after:
        for layer in places:
            after.callback(layer.register_forward_pre_hook(called, with_kwargs=True).remove)
        for module in model.modules():
            after.callback(setattr, module, "training", module.training)
            # In evaluation bitsandbytes packs its weight for inference, for good.
            module.training = is_linear(module)
        after.enter_context(torch.random.fork_rng([where] if where.type == "cuda" else []))
        after.enter_context(torch.no_grad())
        for example in examples:
            given = example if isinstance(example, Mapping) else {"": example}
            given = {k: v.to(where) if isinstance(v, Tensor) else v for k, v in given.items()}
            seen.clear()
            try:
                model(**given) if isinstance(example, Mapping) else model(*given.values())
                break
            except Exception as failed:
                error = failed
                what = f"raised {type(error).__name__} on the example input ({error!s:.200})"
        else:
            alike = defaultdict(list)
            for layer, (parent, _, name) in places.items():
                alike[parent, layer.in_features].append(name)
            names = [tuple(several[:3]) for several in alike.values() if len(several) > 1][:1]
            advice = f", or the children's names, such as fuse_siblings={names}" if names else ""
            advice = f"give another, a tensor or a mapping of arguments{advice}"
            raise ValueError(f"fuse_siblings: {type(model).__name__} {what}; {advice}") from error
    groups = dict.fromkeys(map(tuple, seen.values()))
    times = Counter(itertools.chain(*groups))
    return [g for g in groups if len(g) > 1 and all(times[layer] == 1 for layer in g)]
