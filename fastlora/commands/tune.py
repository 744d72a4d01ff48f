# SPDX-License-Identifier: Apache-2.0
"""``python -m fastlora tune``: measures a model's layers or shapes, says what was fastest."""

import contextlib
import importlib.util
import itertools
import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterable

from fastlora.commands import shared
from fastlora.commands.models import adapted, empty_model
from fastlora.commands.shared import DTYPES, UserError, number
from fastlora.operator import measured, plans, tuning
from fastlora.operator.operands import Problem

DROPOUT = {"both": (False, True), "on": (True,), "off": (False,)}


def add_options(add: Callable) -> None:
    add("--model", help="Hugging Face folder or id, or a folder with one .gguf")
    add("--shapes", nargs="+", default=[], metavar="NxK", help="outputs x inputs: 14336x4096")
    add("--target-modules", **shared.TARGETS, help="of --model")
    add("--tokens", nargs="+", type=number(int, 1), default=[512, 8192], help="in a batch")
    add("--r", nargs="+", type=number(int, 1), default=[16], help="ranks")
    add("--dropout", default="both", choices=DROPOUT, help="training draws it")
    add("--dtype", default="bf16", choices=DTYPES, help="of the frozen weights")
    add("--adapter-dtype", default="fp32", choices=DTYPES, help="fp32 as in PEFT")
    add("--seconds", type=shared.ABOVE_0, default=1.0, help="for a problem, beside its kernels")
    add("--device", **shared.DEVICE)


def run(s: Namespace) -> None:
    """Measure, print what was chosen of what, and keep it for every later process."""
    from tqdm import tqdm

    from fastlora.explain import explain

    if bool(s.model) == bool(s.shapes):
        raise UserError("give either --model or --shapes")
    if s.adapter_dtype not in (s.dtype, "fp32"):
        raise UserError(f"--adapter-dtype must be {s.dtype} or fp32, got {s.adapter_dtype}")
    if plans.FORCED != "auto":
        raise UserError(f"FASTLORA_IMPL={plans.FORCED} leaves nothing to choose: unset it to tune")
    where = shared.torch_device(s.device)
    dtypes = DTYPES[s.dtype], DTYPES[s.adapter_dtype]
    posed = list(_of_model(s.model, s.target_modules) if s.model else map(_of_shape, s.shapes))
    if len(plans.usable_implementations(dtypes[0], where)) == 1:
        why = plans.triton_unusable(where) or "there is no other"
        print(f"nothing to choose on {where}: only 'blocks' runs there. {why}")
        return
    problems = {}  # in this order, each once
    for m, one, rank, drop in itertools.product(s.tokens, posed, s.r, DROPOUT[s.dropout]):
        others = tuple((n, r * rank) for n, r in one.others)
        problem = Problem(m, one.N, one.K, one.R * rank, *dtypes, drop, others)
        problems[problem.bucketed()] = None
    print(f"measuring on {measured.device_name(where)}")
    file, done = None, []
    with tqdm(total=len(problems), unit="problem") as progress:
        for problem, found, kept in tuning.tune(list(problems), where, progress.write, s.seconds):
            progress.update()
            done, file = done + [problem] * (found is not None), kept or file
    if not done:
        raise UserError(f"nothing could be measured on {where}")
    print(explain(done, device=where))
    if importlib.util.find_spec("bitsandbytes"):
        n, k = max(((p.N, p.K) for p in done), key=math.prod)
        found = tuning.tune_four_bits(n, k, dtypes[0], where, print, s.seconds)
        said = ", ".join(f"{way} {1e6 * time:.1f} us" for way, time in sorted(found.items()))
        if found:
            print(f"4 bits made dense, {n} x {k}: {said}")
    print(f"kept in {file}" if file else "not kept: it held for this process only")


def _of_shape(shape: str) -> Problem:
    if (match := re.fullmatch(r"([1-9]\d*)[xX×]([1-9]\d*)", shape)) is None:
        raise UserError(f"--shapes takes NxK, such as 14336x4096, got {shape!r}")
    return Problem(1, int(match[1]), int(match[2]), 1)


def _of_model(name: str, targets: list[str]) -> Iterable[Problem]:
    """Return what the model's layers pose at rank 1, alone and with those of the same input.

    No weight is loaded, and nothing computed. Siblings are found where the model brings an input
    along.
    """
    import fastlora

    model = adapted(empty_model(name), targets, r=1)
    fastlora.patch_peft(model)
    posed = fastlora.explain(model, tokens=1).plans
    with contextlib.suppress(ValueError):
        fastlora.patch_peft(model, fuse_siblings=True)
        posed |= fastlora.explain(model, tokens=1).plans
    return (problem for _, problem in posed)
