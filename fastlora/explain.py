# SPDX-License-Identifier: Apache-2.0
"""`explain`: which plan runs for a layer, a model or some shapes, why, and what was measured."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlora.functional import drawn
from fastlora.layers.active import Layer, projections_of
from fastlora.layers.lora import LoRALinear, default_adapter_dtype
from fastlora.layers.siblings import FrozenLinear
from fastlora.operator import plans
from fastlora.operator.operands import OPS, Problem


@dataclass(frozen=True)
class Explanation:
    """What runs: ``plans`` maps each device and problem on it to {"forward", "backward"}."""

    plans: dict[tuple[torch.device, Problem], dict[str, plans.Plan]]

    def __str__(self) -> str:
        lines = ["M x N x K: tokens, outputs, inputs"]
        for (device, problem), chosen in self.plans.items():
            lines.append(f"{problem}, on {device}")
            for op, plan in chosen.items():
                fastest_first = sorted(plan.seconds.items(), key=lambda item: item[1])
                times = ", ".join(f"{impl} {time * 1e3:.3g} ms" for impl, time in fastest_first)
                lines.append(f"  {op:9} {plan.impl:9} {plan.why}{': ' * bool(times)}{times}")
        return "\n".join(lines)


def explain(
    what: nn.Module | Sequence[int] | Problem | Iterable[Sequence[int] | Problem],
    tokens: int | Iterable[int] | Tensor = (16, 512, 8192),
    *,
    r: int = 16,
    dropout: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Explanation:
    """Say which implementation ``impl="auto"`` takes, why, and what was measured; print the result.

    In eager mode: what is compiled takes "blocks" where "eager" is listed. Times for up to 512
    tokens on a GPU hold the host's.

    ``what`` is a LoRALinear, a layer of PEFT's that `patch_peft` has fused, or a model with some,
    taken as they are: active adapters, dtypes, device, training or not; equal ones once, siblings
    that run as one operator together, merged and disabled ones not at all. Or it is one or several
    shapes: (N, K), weights of ``dtype`` on ``device`` under rank ``r`` and ``adapter_dtype``
    (float32 under a 16-bit base, as in PEFT), or a whole `Problem`. ``tokens`` is M, several of
    them, or an input x [..., K].
    Raises TypeError or ValueError where ``what`` holds no LoRA layer and no shape.
    """
    if isinstance(tokens, Tensor):
        tokens = tokens.shape[:-1].numel()
    sizes = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"tokens must be positive integers, got {tokens!r}")
    if isinstance(what, nn.Module):
        found = _of_module(what, sizes)
    elif isinstance(what, str) or not isinstance(what, Iterable):
        kind = type(what).__name__
        raise TypeError(f"what must be a module, a shape (N, K) or several shapes, got {kind}")
    else:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if where.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is {str(where)!r}, but PyTorch can use no GPU here")
        where = torch.empty(0, device=where).device  # with its number
        rest = r, dtype, adapter_dtype or default_adapter_dtype(dtype), dropout
        shapes = [what] if isinstance(what, Problem) else list(what)
        if all(isinstance(size, int) for size in shapes):
            shapes = [tuple(shapes)]
        found = []
        for shape in shapes:
            if isinstance(shape, Problem):
                found.append((where, shape))
            elif len(shape) == 2 and all(isinstance(size, int) and size > 0 for size in shape):
                found += [(where, Problem(m, *shape, *rest)) for m in sizes]
            else:
                raise ValueError(f"a shape is (N, K), two positive integers, got {shape!r}")
    chosen = {}
    for where, problem in dict.fromkeys(found):
        if plans.is_few(problem.M * problem.K, where):
            both = dict.fromkeys(OPS, plans.Plan("eager", "few tokens"))
        else:
            both = {op: plans.choose(op, "auto", problem, where) for op in OPS}
        chosen[where, problem] = both
    return Explanation(chosen)


def _of_module(model: nn.Module, tokens: Iterable[int]) -> list[tuple[torch.device, Problem]]:
    """Return the problems that the LoRA layers of ``model`` pose for ``tokens``."""
    found = []
    for module in model.modules():
        group = vars(module).get("_siblings")
        members = (None if group is None else group.members()) or [module]
        if members[0] is not module:  # it comes with the first of its siblings
            continue
        layers = [layer for layer in map(_running, members) if layer is not None]
        for size in tokens if layers else ():
            w, _, adapters = layers[0]
            K = adapters[0][0].shape[1] if adapters else w.shape[1]  # an opaque weight has no shape
            x = torch.empty(size, K, dtype=w.dtype, device="meta")
            # Each runs alone where one of them is off, and for few tokens.
            alone = len(layers) < len(members) or plans.is_few(x.numel(), w.device)
            rows = [[layer] for layer in layers] if alone else [layers]
            posed = [Problem.of(*drawn(x, projections_of(row), training=True)) for row in rows]
            found += [(w.device, problem) for problem in posed if problem is not None]
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no LoRALinear that is not merged, and no layer of "
            "PEFT's that patch_peft(model) has fused and that runs one; what was merged runs as a "
            "plain layer, and experts are not listed; replace_linears(model, names) puts layers in"
        )
    return found


def _running(module: nn.Module) -> Layer | None:
    """Return what a layer's operator takes, None where it is off or no layer of ours."""
    found = None
    if isinstance(module, (FrozenLinear, LoRALinear)):
        found = module.sibling_operands(module.weight)
    elif (peft := sys.modules.get("fastlora.peft.linear")) and isinstance(module, peft.Fused):
        found = not (module.merged or module.disable_adapters) and peft.operands(module)
    return found if isinstance(found, tuple) else None
