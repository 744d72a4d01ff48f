# SPDX-License-Identifier: Apache-2.0
"""``python -m fastlora tune``: measures a model's layers or shapes, says what that gains."""

from __future__ import annotations

import contextlib
import itertools
import re

import torch

from fastlora.commands.finetune_data import UserError
from fastlora.commands.finetune_model import empty_model, first_line, require, torch_device
from fastlora.layers import sibling_search
from fastlora.operator import measured, plans
from fastlora.operator.measured import OPS
from fastlora.operator.plans import Problem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SHAPE = re.compile(r"([1-9]\d*)[xX×]([1-9]\d*)")


def run(
    model: str | None,
    shapes: list[str] | None,
    target_modules: str | tuple[str, ...],
    tokens: list[int],
    r: list[int],
    dropout: str,
    dtype: str,
    adapter_dtype: str,
    seconds: float,
    device: str | None,
) -> None:
    """Measure, print what was chosen and what that gains, and keep it for every later process.

    Raises UserError for what the user can put right.
    """
    require("tqdm")
    from tqdm import tqdm

    from fastlora.operator import tuning

    for name, values in (("tokens", tokens), ("r", r), ("seconds", [seconds])):
        if min(values) <= 0:
            raise UserError(f"--{name} must be positive, got {min(values)}")
    if plans.FORCED != "auto":
        raise UserError(f"FASTLORA_IMPL={plans.FORCED} leaves nothing to choose: unset it to tune")
    where = plans.indexed(torch_device(device))
    base, adapter = DTYPES[dtype], DTYPES[adapter_dtype]
    if adapter not in (base, torch.float32):
        raise UserError(f"--adapter-dtype must be {dtype} or fp32, got {adapter_dtype}")
    weights = _of_model(model, target_modules) if model else _of_list(shapes or [])
    if len(plans.usable_implementations(base, where)) == 1:
        why = plans.triton_unusable(where) or "there is no other"
        print(f"nothing to choose on {where}: only 'blocks' runs there. {why}")
        return
    drops = {"both": (False, True), "on": (True,), "off": (False,)}[dropout]
    problems = []
    for m, group, rank, drop in itertools.product(tokens, weights, r, drops):
        sizes, (_, k, _) = [(n, rank * adapted) for n, _, adapted in group], group[0]
        problems.append(Problem.together(m, k, sizes, base, adapter, drop).bucketed())
    problems = list(dict.fromkeys(problems))
    print(f"measuring on {measured.device_name(where)}")
    rows, file = [], None
    with tqdm(total=len(problems), unit="problem") as progress:
        for problem, found, kept in tuning.tune(problems, where, progress.write, seconds):
            progress.update()
            file = kept or file
            if found is not None:
                rows += [_row(problem, op, where) for op in OPS]
                progress.write("\n".join(line for line, _, _ in rows[-2:]))
    if not rows:
        raise UserError(f"nothing could be measured on {where}")
    _, ours, defaults = zip(*rows, strict=True)
    print(
        f"{len(rows) // 2} problems, forward and backward: {sum(ours) * 1e3:.2f} ms as chosen, "
        f"{sum(defaults) * 1e3:.2f} ms by default ({sum(defaults) / sum(ours):.2f}x)"
    )
    print(f"kept in {file}" if file else "not kept: it held for this process only")


def _row(problem: Problem, op: str, device: torch.device) -> tuple[str, float, float]:
    """Return a line about what was chosen, its seconds and those of the default."""
    plan = plans.choose(op, "auto", problem, device)
    default, _ = plans.default(problem.dtype, device)
    times = plan.with_host or plan.seconds
    seconds = times[plan.impl]
    before = times.get(default, seconds)
    gain = "as by default"
    if plan.impl != default:
        gain = f"{before / seconds:.2f}x the speed of {default}, the default"
    alone = f" ({plan.seconds[plan.impl] * 1e3:.3g} without the host)" if plan.with_host else ""
    line = f"{problem}, {op}: {plan.impl}, {seconds * 1e3:.3g} ms{alone}, {gain}"
    return line, seconds, before


# N, K and whether it has an adapter, of a layer or of several that read the same x.
Weights = tuple[tuple[int, int, bool], ...]


def _of_list(shapes: list[str]) -> list[Weights]:
    found = [_SHAPE.fullmatch(shape) for shape in shapes]
    for shape, match in zip(shapes, found, strict=True):
        if match is None:
            raise UserError(f"--shapes takes NxK, such as 14336x4096, got {shape!r}")
    return [((int(match[1]), int(match[2]), True),) for match in found if match]


def _of_model(name: str, target_modules: str | tuple[str, ...]) -> list[Weights]:
    """Return the different weights that LoRA would be put on, and siblings together.

    No weight is loaded, and nothing computed. Siblings are found where the model brings an input
    along.
    """
    from fastlora import LoRAConfig, inject
    from fastlora.layers.lora import LoRALinear

    model, config = empty_model(name), LoRAConfig(target_modules=target_modules)
    try:
        inject(model, config)
    except (TypeError, ValueError) as error:
        raise UserError(f"--target-modules: {first_line(error)}") from error
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    found = [((layer.out_features, layer.in_features, True),) for layer in layers]
    with contextlib.suppress(ValueError):
        for group in sibling_search.find(model, True, layers):
            members = [group.parent._modules[name] for name in group.names]
            rows = tuple((m.out_features, m.in_features, m in layers) for m in members)
            if any(adapted for *_, adapted in rows):
                found.append(rows)
    return list(dict.fromkeys(found))
