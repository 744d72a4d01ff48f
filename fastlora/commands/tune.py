# SPDX-License-Identifier: Apache-2.0
"""``python -m fastlora tune``: measures a model's layers or shapes, says what that gains."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastlora.commands.models import Targets, adapted, empty_model
from fastlora.commands.shared import DTYPES, UserError, check, option, require, torch_device
from fastlora.operator import measured, plans
from fastlora.operator.operands import OPS, Problem

_SHAPE = re.compile(r"([1-9]\d*)[xX×]([1-9]\d*)")

# N, K and whether it has an adapter, of a layer or of several that read the same x.
Weights = tuple[tuple[int, int, bool], ...]


@dataclass(frozen=True)
class TuneSettings:
    """What is measured."""

    model: str | None = option(None, "Hugging Face folder or id, or a folder with one .gguf")
    shapes: Sequence[str] = option((), "outputs x inputs: 14336x4096", metavar="NxK")
    target_modules: str | tuple[str, ...] = option(("all-linear",), "of --model", metavar="NAME")
    tokens: Sequence[int] = option((512, 8192), "tokens in a batch")
    r: Sequence[int] = option((16,), "ranks")
    dropout: str = option("both", "training draws it", choices=("both", "on", "off"))
    dtype: str = option("bf16", "of the frozen weights", choices=DTYPES)
    adapter_dtype: str = option("fp32", "fp32 as in PEFT", choices=DTYPES)
    seconds: float = option(1.0, "for each problem, beside its kernels")
    device: str | None = option(None, "default: cuda if there is one, else cpu")

    def __post_init__(self) -> None:
        if bool(self.model) == bool(self.shapes):
            raise UserError("give either --model or --shapes")
        for name, values in (("tokens", self.tokens), ("r", self.r), ("seconds", [self.seconds])):
            if min(values) <= 0:
                raise UserError(f"--{name} must be positive, got {min(values)}")
        right = self.adapter_dtype in (self.dtype, "fp32")
        check(self, "adapter_dtype", right, f"{self.dtype} or fp32")


def run(s: TuneSettings) -> None:
    """Measure, print what was chosen and what that gains, and keep it for every later process."""
    require("tqdm")
    from tqdm import tqdm

    from fastlora.operator import tuning

    if plans.FORCED != "auto":
        raise UserError(f"FASTLORA_IMPL={plans.FORCED} leaves nothing to choose: unset it to tune")
    where = torch_device(s.device)
    base, adapter = DTYPES[s.dtype], DTYPES[s.adapter_dtype]
    weights = _of_model(s.model, s.target_modules) if s.model else [_of(x) for x in s.shapes]
    if len(plans.usable_implementations(base, where)) == 1:
        why = plans.triton_unusable(where) or "there is no other"
        print(f"nothing to choose on {where}: only 'blocks' runs there. {why}")
        return
    drops = {"both": (False, True), "on": (True,), "off": (False,)}[s.dropout]
    problems = {}  # in this order, each once
    for m, group, rank, drop in itertools.product(s.tokens, weights, s.r, drops):
        sizes, k = [(n, rank * has_adapter) for n, _, has_adapter in group], group[0][1]
        problems[Problem.together(m, k, sizes, base, adapter, drop).bucketed()] = None
    print(f"measuring on {measured.device_name(where)}")
    rows, file = [], None
    with tqdm(total=len(problems), unit="problem") as progress:
        for problem, found, kept in tuning.tune(list(problems), where, progress.write, s.seconds):
            progress.update()
            file = kept or file
            if found is not None:
                rows += [_row(problem, op, where) for op in OPS]
                progress.write("\n".join(line for line, _, _ in rows[-2:]))
    if not rows:
        raise UserError(f"nothing could be measured on {where}")
    _, ours, defaults = zip(*rows, strict=True)
    chosen, default = sum(ours) * 1e3, sum(defaults) * 1e3
    what = f"{len(rows) // 2} problems, forward and backward"
    print(
        f"{what}: {chosen:.2f} ms as chosen, {default:.2f} ms by default ({default / chosen:.2f}x)"
    )
    print(f"kept in {file}" if file else "not kept: it held for this process only")


def _row(problem: Problem, op: str, device: torch.device) -> tuple[str, float, float]:
    """Return a line about what was chosen, its seconds and those of the default."""
    plan = plans.choose(op, "auto", problem, device)
    default, _ = plans.default(problem.dtype, device)
    seconds = plan.seconds[plan.impl]
    before = plan.seconds.get(default, seconds)
    gain = "as by default"
    if plan.impl != default:
        gain = f"{before / seconds:.2f}x the speed of {default}, the default"
    return f"{problem}, {op}: {plan.impl}, {seconds * 1e3:.3g} ms, {gain}", seconds, before


def _of(shape: str) -> Weights:
    if (match := _SHAPE.fullmatch(shape)) is None:
        raise UserError(f"--shapes takes NxK, such as 14336x4096, got {shape!r}")
    return ((int(match[1]), int(match[2]), True),)


def _of_model(name: str, targets: Targets) -> list[Weights]:
    """Return the different weights that LoRA would be put on, and siblings together.

    No weight is loaded, and nothing computed. Siblings are found where the model brings an input
    along.
    """
    import fastlora

    model = adapted(empty_model(name), targets)
    report = fastlora.patch_peft(model)
    with contextlib.suppress(ValueError):
        report = fastlora.patch_peft(model, fuse_siblings=True)
    reading = [*report.siblings, *((path, names[:2]) for path, names in report.gated_mlps)]
    groups = [[f"{path}.{name}" for name in names] for path, names in reading]
    found = {}  # in this order, each once
    for group in [[name] for name in report.fused] + groups:
        layers = [(name in report.fused, model.get_submodule(name)) for name in group]
        found[tuple((m.out_features, m.in_features, adapted) for adapted, m in layers)] = None
    return list(found)
