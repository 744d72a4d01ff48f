# SPDX-License-Identifier: Apache-2.0
"""Finding siblings, by a traced forward or by name, and making groups of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.layers import gated_modules
from fastlora.layers.classes import rebased
from fastlora.layers.gated_modules import Form, form_of
from fastlora.layers.siblings import FrozenLinear, Group, Groups

# True: an input that the model brings along (transformers); or one; or names of children.
How = bool | Tensor | Mapping[str, Any] | Sequence[Sequence[str]]


# The path of a module and its children's names, as in a report.
Names = tuple[str, tuple[str, ...]]


class Found(NamedTuple):
    """Children of one module, in the order of their calls."""

    parent: nn.Module
    path: str
    names: tuple[str, ...]
    form: Form | None = None  # of the parent, where it is a gated MLP
    why_not: str = ""  # it is none, where it looks like one

    def layers(self) -> list[nn.Module]:
        names = self.names if self.form is None else (*self.names, self.form.down)
        return [self.parent._modules[name] for name in names]


def find(
    model: nn.Module,
    how: How,
    adapted: Collection[nn.Module],
    excluded: Collection[nn.Module] = (),
) -> list[Found]:
    """Return the groups of siblings of ``model`` that hold at least one of ``adapted``.

    Siblings are children of one module that are called with one and the same tensor, every time:
    ``adapted`` layers, and plain ``nn.Linear`` ones beside them that are not ``excluded``.
    ``how`` says how to find out:

    - True: one forward on the small input that models of transformers bring along;
    - an example input, a tensor or keyword arguments: one forward on that, without gradients, in
      evaluation mode;
    - sequences of children's names in the order of their calls, such as ``[("q", "k", "v")]``: no
      forward.

    Raises ValueError where there is no such input, where the forward fails or where names select
    nothing, and TypeError for anything else. The model stays as it is.
    """
    layers = {id(layer) for layer in adapted}
    left_out = {id(inner) for module in excluded for inner in module.modules()}
    children = _children(model, layers, left_out)
    if isinstance(how, (Tensor, Mapping)) or how is True:
        groups = _traced(model, _example(model, how), children)
    elif _are_names(how):
        groups = _named(model, how, children)
    else:
        raise TypeError(
            "fuse_siblings must be True, an example input (a tensor or a mapping of keyword "
            f"arguments) or sequences of names, such as [('q', 'k', 'v')], got {how!r:.100}"
        )
    groups = [
        Found(*found[:3], *form_of(found.parent, found.names, lambda m: id(m) in children))
        for found in groups
    ]
    return [found for found in groups if any(id(layer) in layers for layer in found.layers())]


def make(groups: Sequence[Found]) -> tuple[list[Names], list[Names]]:
    """Make groups of what `find` has found, and one operator of each gated MLP.

    Returns (path, names) of each group, and of each gated MLP.
    """
    by_parent = defaultdict(list)
    for found in groups:
        by_parent[found.parent].append(found.names)
    for parent, several in by_parent.items():
        for child in parent._modules.values():  # of groups made before
            if child is not None:
                vars(child).pop("_siblings", None)
        made = []
        for names in several:
            made.append(Group(names))
            for name in names:
                child = parent._modules[name]
                if type(child) is nn.Linear:
                    child.__class__ = FrozenLinear
                child._siblings = made[-1]
        parent._sibling_groups = Groups(parent, made)
    for found in groups:
        if found.form is not None:
            gated_modules.fuse(found.parent, found.form)
    mlps = [(found.path, found.form.names) for found in groups if found.form is not None]
    return [(found.path, found.names) for found in groups if found.form is None], mlps


def lookalikes(groups: Sequence[Found]) -> list[tuple[str, str]]:
    """Return the class of each module that looks like a gated MLP, and why it is none."""
    found = [(each.parent, each.why_not) for each in groups if each.why_not]
    return list(dict.fromkeys((gated_modules.unfused(m).__name__, why) for m, why in found))


def separate(model: nn.Module) -> None:
    """Take every group in ``model`` apart: each layer computes alone, as before `make`."""
    modules = list(model.modules())
    kinds = [rebased(gated_modules.unfused(module), FrozenLinear, nn.Linear) for module in modules]
    for module, kind in zip(modules, kinds, strict=True):
        for name in ("_siblings", "_sibling_groups", "_gated_form"):
            vars(module).pop(name, None)
        if type(module) is not kind:
            module.__class__ = kind


def listed(groups: Sequence[Names], mlps: Sequence[Names]) -> list[str]:
    """Return a line of a report for each different group and MLP, with how often it comes."""
    lines = Counter(f"siblings: {', '.join(names)}" for _, names in groups)
    lines.update(f"gated MLP: {', '.join(names)}" for _, names in mlps)
    return [f"{line} x{n}" if n > 1 else line for line, n in lines.items()]


def _children(
    model: nn.Module, adapted: set[int], left_out: set[int]
) -> dict[int, tuple[nn.Module, str, str]]:
    """Return what can be a sibling, by id: its first parent, the parent's path and its name."""
    found: dict[int, tuple[nn.Module, str, str]] = {}
    inside = set(left_out)  # PEFT keeps linear layers in its own
    for path, parent in model.named_modules():
        if id(parent) in adapted:
            inside.update(id(module) for module in parent.modules())
        if id(parent) in inside:
            continue
        for name, child in parent._modules.items():
            if id(child) in left_out:
                continue
            if id(child) in adapted or type(child) in (nn.Linear, FrozenLinear):
                found.setdefault(id(child), (parent, path, name))
    return found


def _example(model: nn.Module, how: How) -> Mapping[str, Any] | Tensor:
    if how is not True:
        return how
    example = getattr(model, "dummy_inputs", None)
    if not isinstance(example, Mapping) or not example:
        raise ValueError(
            f"fuse_siblings=True: {type(model).__name__} brings no input along to find siblings "
            "with; give one, such as fuse_siblings={'x': torch.zeros(1, 16)}, or the children's "
            "names: fuse_siblings=[('q', 'k', 'v')]"
        )
    return example


def _traced(
    model: nn.Module, example: Mapping[str, Any] | Tensor, children: dict[int, tuple]
) -> list[Found]:
    seen: dict[tuple, list[int]] = defaultdict(list)  # by parent and input: children as called
    alive = []  # an id is a tensor's own only while it lives

    def called(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor):
            alive.append(x)
            version = None if x.is_inference() else x._version
            together = seen[id(children[id(module)][0]), id(x), version]
            if id(module) not in together:
                together.append(id(module))

    modules = {id(m): m for m in model.modules() if id(m) in children}
    hooks = [m.register_forward_pre_hook(called, with_kwargs=True) for m in modules.values()]
    try:
        where = next((p.device for p in model.parameters()), torch.device("cpu"))
        with _evaluating(model, where):
            _call(model, example, where)
    except Exception as error:
        raise ValueError(
            f"fuse_siblings: {type(model).__name__} raised {type(error).__name__} on the example "
            f"input ({error!s:.200}); give another, or names: fuse_siblings=[('q', 'k', 'v')]"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    always: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for together in seen.values():
        for child in together:
            always[child].add(tuple(together))
    groups = dict.fromkeys(map(tuple, seen.values()))
    return [
        _found(group, children)
        for group in groups
        if len(group) > 1 and all(always[child] == {group} for child in group)
    ]


def _call(model: nn.Module, example: Mapping[str, Any] | Tensor, where: torch.device) -> None:
    if isinstance(example, Tensor):
        model(example.to(where))
    else:
        model(**{k: v.to(where) if isinstance(v, Tensor) else v for k, v in example.items()})


@contextmanager
def _evaluating(model: nn.Module, where: torch.device):
    """Run ``model`` in evaluation mode, without gradients and without using up random numbers."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        devices = [where] if where.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _are_names(how: Any) -> bool:
    return (
        isinstance(how, Sequence)
        and not isinstance(how, str)
        and len(how) > 0
        and all(isinstance(names, Sequence) and not isinstance(names, str) for names in how)
        and all(isinstance(name, str) for names in how for name in names)
    )


def _named(
    model: nn.Module, how: Sequence[Sequence[str]], children: dict[int, tuple]
) -> list[Found]:
    flat = [name for names in how for name in names]
    if len(set(flat)) < len(flat) or any(len(names) < 2 for names in how):
        raise ValueError(
            "fuse_siblings: a group is two names or more, each in one group only, got "
            f"{[tuple(names) for names in how]}"
        )
    groups = []
    for names in how:
        of_these = []
        for module in model.modules():
            group = tuple(id(module._modules.get(name)) for name in names)
            there = all(child in children and children[child][0] is module for child in group)
            if there and len(set(group)) == len(group):
                of_these.append(_found(group, children))
        if not of_these:
            raise ValueError(f"fuse_siblings: no module has linear layers named {tuple(names)}")
        groups += of_these
    return groups


def _found(group: tuple[int, ...], children: dict[int, tuple]) -> Found:
    parent, path, _ = children[group[0]]
    return Found(parent, path, tuple(children[child][2] for child in group))
