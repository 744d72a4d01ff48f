# SPDX-License-Identifier: Apache-2.0
"""Finding siblings, by a traced forward or by name, and making groups of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.layers import gated
from fastlora.layers.classes import rebased
from fastlora.layers.examples import examples_for
from fastlora.layers.report import Names
from fastlora.layers.siblings import FrozenLinear, Group, Groups

# True: an input by what the model says of itself (transformers); or one; or names of children.
How = bool | Tensor | Mapping[str, Any] | Sequence[Sequence[str]]


class Found(NamedTuple):
    """Children of one module, in the order of their calls."""

    parent: nn.Module
    path: str
    names: tuple[str, ...]
    form: gated.Form | None = None  # of the parent, where it is a gated MLP
    why_not: str = ""  # it is none, where it looks like one

    def layers(self) -> list[nn.Module]:
        names = self.names if self.form is None else (*self.names, self.form.down)
        return [self.parent._modules[name] for name in names]


# What can be a sibling, by id: its first parent, the parent's path and its own name.
Children = dict[int, tuple[nn.Module, str, str]]


def find(model: nn.Module, how: How, adapted: Collection[nn.Module]) -> list[Found]:
    """Return the groups of siblings of ``model`` that hold at least one of ``adapted``.

    Siblings are children of one module that are called with one and the same tensor, every time:
    ``adapted`` layers, and plain ``nn.Linear`` ones beside them. ``how`` says how to find out:

    - True: one forward on a small input that is made by what models of transformers say of theirs;
    - an example input, a tensor or keyword arguments: one forward on that, without gradients, in
      evaluation mode;
    - sequences of children's names in the order of their calls, such as ``[("q", "k", "v")]``: no
      forward.

    Raises ValueError where there is no such input, where the forward fails or where names select
    nothing, and TypeError for anything else. The model stays as it is.
    """
    ids = {id(layer) for layer in adapted}
    children = _children(model, ids)
    if how is True:
        # The model in PEFT's wrapper says what it takes.
        speaks = next((m for m in model.modules() if hasattr(type(m), "dummy_inputs")), model)
        groups = _traced(speaks, examples_for(speaks), children)
    elif isinstance(how, (Tensor, Mapping)):
        groups = _traced(model, [how], children)
    elif _are_names(how):
        groups = _named(model, how, children)
    else:
        raise TypeError(
            "fuse_siblings must be True, an example input (a tensor or a mapping of keyword "
            f"arguments) or sequences of names, such as [('q', 'k', 'v')], got {how!r:.100}"
        )
    found = []
    for group in groups:
        parent, path, _ = children[group[0]]
        names = tuple(children[child][2] for child in group)
        form = gated.form_of(parent, names, lambda module: id(module) in children)
        found.append(Found(parent, path, names, *form))
    return [each for each in found if not ids.isdisjoint(map(id, each.layers()))]


def make(groups: Sequence[Found]) -> tuple[list[Names], list[Names]]:
    """Make groups of what `find` has found, and one operator of each gated MLP.

    Returns (path, names) of each group, and of each gated MLP.
    """
    by_parent = defaultdict(list)
    for found in groups:
        by_parent[found.parent].append(found.names)
        for layer in found.layers():
            if type(layer) is nn.Linear:
                layer.__class__ = FrozenLinear
        if found.form is not None:
            gated.fuse(found.parent, found.form)
    for parent, several in by_parent.items():
        for child in filter(None, parent._modules.values()):  # of groups made before
            vars(child).pop("_siblings", None)
        parent._sibling_groups = Groups(parent, [Group(names) for names in several])
        for group in parent._sibling_groups.groups:
            for name in group.names:
                parent._modules[name]._siblings = group
    mlps = [(found.path, found.form.names) for found in groups if found.form is not None]
    return [(found.path, found.names) for found in groups if found.form is None], mlps


def lookalikes(groups: Sequence[Found]) -> list[tuple[str, str]]:
    """Return the class of each module that looks like a gated MLP, and why it is none."""
    found = [(each.parent, each.why_not) for each in groups if each.why_not]
    return list(dict.fromkeys((gated.unfused(module).__name__, why) for module, why in found))


def separate(model: nn.Module) -> None:
    """Take every group in ``model`` apart: each layer computes alone, as before `make`."""
    modules = list(model.modules())
    kinds = [rebased(gated.unfused(module), FrozenLinear, nn.Linear) for module in modules]
    for module, kind in zip(modules, kinds, strict=True):
        for name in ("_siblings", "_sibling_groups", "_gated_form"):
            vars(module).pop(name, None)
        if type(module) is not kind:
            module.__class__ = kind


def _children(model: nn.Module, adapted: set[int]) -> Children:
    found: Children = {}
    inside = set()  # of adapted layers: PEFT keeps linear ones in its own
    for path, parent in model.named_modules():
        if id(parent) in adapted:
            inside.update(map(id, parent.modules()))
        elif id(parent) not in inside:
            for name, child in parent._modules.items():
                if id(child) in adapted or type(child) in (nn.Linear, FrozenLinear):
                    found.setdefault(id(child), (parent, path, name))
    return found


def _traced(
    model: nn.Module, examples: Sequence[Mapping[str, Any] | Tensor], children: Children
) -> list[tuple[int, ...]]:
    """Return the ids of children that were called together, in the first forward that works."""
    seen: dict[tuple, list[int]] = {}  # by parent and input: children as called
    alive = []  # an id is a tensor's own only while it lives

    def called(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor):
            alive.append(x)
            version = None if x.is_inference() else x._version
            together = seen.setdefault((id(children[id(module)][0]), id(x), version), [])
            if id(module) not in together:
                together.append(id(module))

    hooks = [
        module.register_forward_pre_hook(called, with_kwargs=True)
        for module in model.modules()
        if id(module) in children
    ]
    errors = []
    try:
        for example in examples:
            seen.clear()
            try:
                with _evaluating(model) as where:
                    _call(model, example, where)
                break
            except Exception as error:
                errors.append(error)
        else:
            raise ValueError(_none_works(model, errors, children)) from (errors or [None])[-1]
    finally:
        for hook in hooks:
            hook.remove()
    always: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for together in seen.values():
        for child in together:
            always[child].add(tuple(together))
    groups = dict.fromkeys(map(tuple, seen.values()))
    return [g for g in groups if len(g) > 1 and all(always[child] == {g} for child in g)]


def _none_works(model: nn.Module, errors: list[Exception], children: Children) -> str:
    name, known = type(model).__name__, defaultdict(list)
    what = f"{name} says of no input that siblings could be found with"
    if errors:
        kind, said = type(errors[-1]).__name__, f"{errors[-1]!s:.200}"
        what = f"{name} raised {kind} on the example input ({said})"
    for parent, _, child in children.values():
        known[parent, parent._modules[child].in_features].append(child)
    names = next((tuple(names[:3]) for names in known.values() if len(names) > 1), None)
    by_name = f", or the children's names, such as fuse_siblings={[names]}" if names else ""
    return f"fuse_siblings: {what}; give another, a tensor or a mapping of arguments{by_name}"


def _call(model: nn.Module, example: Mapping[str, Any] | Tensor, where: torch.device) -> None:
    if isinstance(example, Tensor):
        model(example.to(where))
    else:
        model(**{k: v.to(where) if isinstance(v, Tensor) else v for k, v in example.items()})


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Run ``model`` in evaluation mode, without gradients and without using up random numbers."""
    modes = [(module, module.training) for module in model.modules()]
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        model.eval()
        devices = [where] if where.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield where
    finally:
        for module, training in modes:
            module.training = training


def _are_names(how: Any) -> bool:
    def is_sequence(value: Any) -> bool:
        return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0

    return (
        is_sequence(how)
        and all(map(is_sequence, how))
        and all(isinstance(name, str) for names in how for name in names)
    )


def _named(
    model: nn.Module, how: Sequence[Sequence[str]], children: Children
) -> list[tuple[int, ...]]:
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
                of_these.append(group)
        if not of_these:
            raise ValueError(f"fuse_siblings: no module has linear layers named {tuple(names)}")
        groups += of_these
    return groups
