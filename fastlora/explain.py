# SPDX-License-Identifier: Apache-2.0
"""`explain`: which plan runs for a layer, a model or some shapes, why, and what was measured."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlora.layers.active import Adapter
from fastlora.layers.lora import LoRALinear, default_adapter_dtype
from fastlora.layers.siblings import FrozenLinear
from fastlora.operator import plans
from fastlora.operator.measured import OPS
from fastlora.operator.plans import Plan, Problem

TOKENS = (16, 512, 8192)
Layer = tuple[Tensor, list[Adapter]]  # weight [N, K]


@dataclass(frozen=True)
class Explanation:
    """What runs: ``plans`` maps each device and problem on it to {"forward", "backward"}."""

    plans: dict[tuple[torch.device, Problem], dict[str, Plan]]

    def __str__(self) -> str:
        lines = ["M x N x K: tokens, outputs, inputs"]
        for (device, problem), chosen in self.plans.items():
            lines.append(f"{problem}, on {device}")
            for op, plan in chosen.items():
                lines.append(f"  {op:9} {plan.impl:9} {plan.why}{_times(plan)}")
        return "\n".join(lines)


def explain(
    what: nn.Module | Sequence[int] | Problem | Iterable[Sequence[int] | Problem],
    tokens: int | Iterable[int] | Tensor = TOKENS,
    *,
    r: int = 16,
    dropout: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Explanation:
    """Say which implementation ``impl="auto"`` takes, why, and what was measured; print the result.

    In eager mode: what is compiled takes "blocks" where "eager" is listed.

    ``what`` is a LoRALinear, a layer of PEFT's that `patch_peft` has fused, or a model that holds
    some, each taken as it is: active adapters, dtypes, device, training or not; equal ones are
    listed once, siblings that run as one operator together; merged and disabled ones are left out,
    as they run no LoRA. Or it is one or several shapes: (N, K), weights of ``dtype`` on ``device``
    under rank ``r`` and ``adapter_dtype`` (float32 under a 16-bit base, as in PEFT), or a whole
    `Problem`. ``tokens`` is M, several of them, or an input x [..., K].
    Raises TypeError or ValueError where ``what`` holds no LoRA layer and no shape.
    """
    if isinstance(tokens, Tensor):
        tokens = tokens.shape[:-1].numel()
    sizes = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    for size in sizes:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"tokens must be positive integers, got {size!r}")
    if isinstance(what, nn.Module):
        found = _of_module(what, sizes)
    elif isinstance(what, str) or not isinstance(what, Iterable):
        kind = type(what).__name__
        raise TypeError(f"what must be a module, a shape (N, K) or several shapes, got {kind}")
    else:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if where.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is {str(where)!r}, but PyTorch can use no GPU here")
        where = plans.indexed(where)
        adapter = adapter_dtype or default_adapter_dtype(dtype)
        found = []
        for shape in [what] if _is_shape(what) else what:
            if isinstance(shape, Problem):
                found.append((where, shape))
                continue
            if len(shape) != 2 or any(not isinstance(size, int) or size < 1 for size in shape):
                raise ValueError(f"a shape is (N, K), two positive integers, got {shape!r}")
            found += [(where, Problem(m, *shape, r, dtype, adapter, dropout)) for m in sizes]
    chosen = {
        (where, problem): {op: _chosen(op, problem, where) for op in OPS}
        for where, problem in found
    }
    return Explanation(chosen)


def _chosen(op: str, problem: Problem, device: torch.device) -> Plan:
    if plans.is_few(problem.M * problem.K, device):
        return Plan("eager", "few tokens", {}, {}, {})
    return plans.choose(op, "auto", problem, device)


def _of_module(model: nn.Module, tokens: Iterable[int]) -> list[tuple[torch.device, Problem]]:
    """Return the different problems that the LoRA layers of ``model`` pose for ``tokens``."""
    rows = [row for module in model.modules() for row in _together(module)]
    if not rows:
        raise ValueError(
            f"{type(model).__name__} holds no LoRALinear that is not merged, and no layer of "
            "PEFT's that patch_peft(model) has fused and that runs one; what was merged runs as a "
            "plain layer; fastlora.replace_linears(model, names) puts layers in"
        )
    posed = [(row[0][0].device, _problem(size, row)) for row in rows for size in tokens]
    return list(dict.fromkeys(posed))


def _together(module: nn.Module) -> list[list[Layer]]:
    """Return what runs when ``module`` is called: rows of layers that run as one operator.

    Siblings come with the first of them. Where one of them is off, each runs alone.
    """
    group = vars(module).get("_siblings")
    members = (None if group is None else group.members()) or [module]
    if members[0] is not module:
        return []
    row = [_running(member) for member in members]
    rows = [[layer] for layer in row if layer is not None] if None in row else [row]
    return [row for row in rows if any(adapters for _, adapters in row)]


def _running(module: nn.Module) -> Layer | None:
    """Return what a layer runs with, None where it is off or no layer of ours."""
    if isinstance(module, FrozenLinear):
        return module.weight, []
    if isinstance(module, LoRALinear):
        found = module.sibling_operands()
        return None if found is None else (found[0], found[2])
    if (peft_layer := sys.modules.get("fastlora.peft.linear")) and isinstance(
        module, peft_layer.FusedLinear
    ):
        found = peft_layer.operands(module)
        off = module.merged or module.disable_adapters or isinstance(found, str)
        return None if off else (found[0], found[2])
    return None


def _problem(tokens: int, row: list[Layer]) -> Problem:
    """Return the problem that a layer, or several of one input, pose as their forward runs."""
    keys = [_key(*layer) for layer in row]
    _, k, _, dtype, adapter, _ = next(key for key in keys if key[2])
    sizes = [(n, r) for n, _, r, *_ in keys]
    return Problem.together(tokens, k, sizes, dtype, adapter, any(key[-1] for key in keys))


def _key(weight: Tensor, adapters: list[Adapter]) -> tuple:
    """Return a layer's problem but for the tokens, as its forward poses it; R 0 if frozen."""
    if not adapters:
        return *weight.shape, 0, weight.dtype, weight.dtype, False
    (a, _, _, p), *_ = adapters
    stacked = not any(p for *_, p in adapters)
    r = sum(a.shape[0] for a, *_ in adapters) if stacked else a.shape[0]
    return *weight.shape, r, weight.dtype, a.dtype, p > 0


def _is_shape(what: object) -> bool:
    return isinstance(what, Problem) or (
        isinstance(what, Sequence) and all(isinstance(size, int) for size in what)
    )


def _times(plan: Plan) -> str:
    """Return what was measured, the fastest first, and the time with the host beside it."""
    each = [
        f"{impl} {seconds * 1e3:.3g} ms"
        + (f" (with the host {plan.with_host[impl] * 1e3:.3g})" if impl in plan.with_host else "")
        for impl, seconds in sorted(plan.seconds.items(), key=lambda item: item[1])
    ]
    return ": " + ", ".join(each) if each else ""
