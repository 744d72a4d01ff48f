# SPDX-License-Identifier: Apache-2.0
"""Projections of one x as problems of the acceptance rule, what the kernels make of them, mutants.

Every projection is a problem of its own; dx is the sum of theirs. A list of one is the plain layer.
"""

import contextlib
import functools
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import fastlora_kernels
import torch
from acceptance import KINDS, Case, accept, integers, oracle, plain
from fastlora_kernels.dropout import kept_scale
from fastlora_kernels.lists import Segments
from recorder import Call, recording

from fastlora.operator import scaled, steps
from fastlora.operator.dropout import keep_mask
from fastlora.operator.operands import Operands
from fastlora.operator.plans import Pair

PACKAGE = Path(fastlora_kernels.__file__).parent
Found = tuple[list[dict], torch.Tensor]


@dataclass(frozen=True)
class Joint:
    """One input and its projections: outputs, rank (0: no adapter) and dropout of each."""

    M: int
    K: int
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    kind: str = "fp32"
    mode: str = "both"
    dropout_p: tuple[float, ...] = ()  # none where it is short
    biases: tuple[bool, ...] = (True, False, True, True)
    seed: int = 0
    scaling: float | None = None  # None: another one for each
    ends: tuple[int, ...] = ()  # of segments
    experts: bool = False  # whose weights and biases are stacked, too
    scaled: bool = False  # columns, where there is an adapter

    def cases(self) -> list[Case]:
        """Return the projections one by one; where there is no adapter, its B is zero."""
        dropout_p = (*self.dropout_p, 0.0, 0.0, 0.0, 0.0)
        return [
            Case(
                *(self.M, n, self.K, r or 1, self.kind, self.mode if r else "base"),
                dropout_p=dropout_p[i],
                scaling=0.7 - 0.1 * i if self.scaling is None else self.scaling,
                seed=10 * self.seed + i,
                bias=self.biases[i],
                ends=self.ends,
                experts=self.experts,
                scaled=self.scaled and r > 0,
            )
            for i, (n, r) in enumerate(zip(self.sizes, self.ranks, strict=True))
        ]

    def tensors(self, device: str = "cpu") -> list[dict]:
        """Return the tensors of each projection; x is the same one in all."""
        drawn = [case.tensors(device) for case in self.cases()]
        return [{**t, "x": drawn[0]["x"]} for t in drawn]

    def blank(self) -> list[dict]:
        """Return tensors of the same sizes without memory, for launches that are only recorded."""
        base, adapter = (torch.empty((), dtype=d, device="meta") for d in KINDS[self.kind])
        x, found = base.new_empty(self.M, self.K), []
        for case in self.cases():
            t = {"x": x, "dy": x.new_empty(case.M, case.N)}
            shapes = {"w": (case.N, case.K), "a": (case.R, case.K), "b": (case.N, case.R)}
            for name, shape in {**shapes, "bias": (case.N,)}.items():
                like = adapter if name in "ab" else x
                t[name] = like.new_empty(*case.stack(name), *shape)
            t["bias"] = t["bias"] if case.bias else None
            t["seed"] = x.new_empty(1, dtype=torch.int64) if case.dropout_p else None
            t["scale"] = adapter.new_empty(case.N) if case.scaled else None
            found.append(t)
        return found

    def projections(self, ts: list[dict]) -> list[Operands]:
        """Return what the five steps take."""
        return [
            Operands(
                *(t["w"], *((t["a"], t["b"]) if r else (None, None)), t["bias"]),
                *(t["seed"] if r else None, case.scaling, case.dropout_p),
                t.get("scale"),
            )
            for case, t, r in zip(self.cases(), ts, self.ranks, strict=True)
        ]

    def segments(self, device: str) -> Segments | None:
        """Return what the five steps take beside projections of which something is stacked."""
        if not self.ends:
            return None
        numbers = []
        for case, r in zip(self.cases(), self.ranks, strict=True):
            each = [(c, kept_scale(p), 65536 * p - 32768) for _, c, p in case.segments()]
            found = torch.tensor(each, dtype=torch.float32).t().contiguous().to(device)
            numbers.append(found if r or self.experts else None)
        return torch.tensor(self.ends, dtype=torch.int32, device=device), numbers


def run(kernels: ModuleType, joint: Joint, ts: list[dict], configs: dict | None = None) -> Found:
    """Return by projection what the five steps make: y, s and gradients; and dx."""
    x, dys, needs = ts[0]["x"], [t["dy"] for t in ts], [(True, True)] * len(ts)
    projections = joint.projections(ts)
    if any(one.scale is not None for one in projections):
        return _run_scaled(kernels.steps, x, projections, dys)
    of = configs, joint.segments(x.device)
    ys, ss = steps.forward(kernels.steps, x, projections, *of)
    dx, das, dbs = steps.backward(kernels.steps, dys, x, projections, ss, True, needs, *of)
    results = [{"y": y} for y in ys]
    for result, s, da, db in zip(results, ss, das, dbs, strict=True):
        if s is not None:
            result |= {"s": s, "lora_A": da, "lora_B": db}
    return results, dx


def _run_scaled(impl: ModuleType, x, projections: list[Operands], dys) -> Found:
    def find(x, few):
        of = functools.partial(steps.forward, impl), functools.partial(steps.backward, impl)
        return Pair(*of, (impl, impl))

    of, needs = (x, projections), [(True, True)] * len(dys)
    ys, kept = scaled.forward(find, *of)
    asked = [one.scale is not None for one in projections]
    dx, das, dbs, dscales = scaled.backward(find, dys, *of, kept, True, needs, asked)
    results = [{"y": y} for y in ys]
    for result, *each in zip(results, kept[: len(ys)], das, dbs, dscales, strict=True):
        found = zip(("s", "lora_A", "lora_B", "scale"), each, strict=True)
        result |= {name: t for name, t in found if t is not None}
    return results, dx


def recorded(chip, joint: Joint, configs=None, ts: list[dict] | None = None) -> list[Call]:
    """Return what the five steps would launch on ``chip``."""
    with recording(chip) as calls:
        run(fastlora_kernels, joint, joint.blank() if ts is None else ts, configs)
    return calls


def expected(joint: Joint, ts: list[dict], how: Callable) -> Found:
    """Return the same from ``how``: `oracle`, or `plain`, whose gradients autograd adds."""
    found = [how(case, t) for case, t in zip(joint.cases(), ts, strict=True)]
    for case, t, of_one in zip(joint.cases(), ts, found, strict=True):
        wide = torch.float64 if how is oracle else t["a"].dtype
        parts, a = [], t["a"].to(wide)
        for g, (rows, _, p) in enumerate(case.segments()):
            x_hat = t["x"][rows].to(wide)
            if t["seed"] is not None:
                keep = keep_mask(t["seed"], range(rows.start, rows.stop), case.K, p)
                x_hat = x_hat * keep * kept_scale(p)
            parts.append(x_hat @ case.of(g, "a", a).t())
        of_one["s"] = torch.cat(parts)
    dx = found[0]["x"]
    for of_one in found[1:]:
        dx = dx + of_one["x"]
    return found, dx


def verify(
    kernels: ModuleType, joint: Joint, device: str = "cpu", configs=None, ts: list | None = None
) -> None:
    """Apply the acceptance rule to everything that the kernels make."""
    ts = joint.tensors(device) if ts is None else ts
    results, dx = run(kernels, joint, ts, configs)
    # PyTorch's own bfloat16 product on a CPU with AMX reads past rows that lie otherwise.
    ts = [{n: _whole(t) for n, t in of.items()} for of in ts]
    (plains, plain_dx), (exact, exact_dx) = expected(joint, ts, plain), expected(joint, ts, oracle)
    for i, result in enumerate(results):
        for name, value in result.items():
            accept(f"{joint}: {name} of {i}", value, plains[i][name], exact[i][name])
            assert value.is_contiguous()
    accept(f"{joint}: dx", dx, plain_dx, exact_dx)
    assert dx.is_contiguous()


def _whole(t: torch.Tensor | None) -> torch.Tensor | None:
    there = t is not None and t.dtype == torch.bfloat16
    return t.clone(memory_format=torch.contiguous_format) if there else t


def verify_exactly(
    joint: Joint, lie: Callable = lambda name, t: t, configs=None, device: str = "cpu"
) -> None:
    """Check small integers for equality; ``lie`` may lay tensors out differently."""
    joint, generator = replace(joint, scaling=2.0), torch.Generator().manual_seed(3)
    ts = [integers(t, generator) for t in joint.tensors()]
    ts = [{**t, "x": ts[0]["x"]} for t in ts]
    exact, exact_dx = expected(joint, ts, oracle)
    ts = [{n: v if v is None else lie(n, v).to(device) for n, v in t.items()} for t in ts]
    results, dx = run(fastlora_kernels, joint, [{**t, "x": ts[0]["x"]} for t in ts], configs)
    for i, result in enumerate(results):
        for name, value in result.items():
            assert torch.equal(exact[i][name].to(value.dtype).double(), exact[i][name]), name
            assert torch.equal(value.cpu().double(), exact[i][name]), f"{name} of {i}"
    assert torch.equal(dx.cpu().double(), exact_dx)


def same(found: Found, other: Found) -> None:
    """Check that two runs gave the same bits."""
    assert torch.equal(found[1], other[1]), "dx"
    for one, two in zip(found[0], other[0], strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


@contextlib.contextmanager
def poisoned() -> Iterator[list[torch.Tensor]]:
    """Fill what is allocated inside with NaN: what is never written may be right by chance."""
    made: list[torch.Tensor] = []

    def filled(t, *shape, make=torch.Tensor.new_empty, **options):
        found = make(t, *shape, **options)
        made.append(found.fill_(torch.nan) if found.is_floating_point() else found)
        return found

    with patch.object(torch.Tensor, "new_empty", filled):
        yield made


def load(folder: Path, name: str, file: str, right: str, wrong: str) -> ModuleType:
    """Import a copy of the kernels, under another name, in which ``right`` reads ``wrong``."""
    shutil.copytree(PACKAGE, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder / name).glob("*.py"):
        text = path.read_text().replace("fastlora_kernels", name)
        if path.name == file:
            assert text.count(right) == 1, f"{file}: {right!r} occurs {text.count(right)} times"
            text = text.replace(right, wrong)
        path.write_text(text)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
