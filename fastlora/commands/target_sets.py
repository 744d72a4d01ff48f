# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model a search for a rank adapts: first few, then more, then all."""

from __future__ import annotations

from torch import nn

from fastlora.commands.finetune_data import UserError
from fastlora.commands.finetune_model import empty_model, first_line
from fastlora.config import LoRAConfig
from fastlora.inject import plan

Targets = str | tuple[str, ...]

# Where a search starts: query and value as in arXiv:2106.09685, or the one layer that makes them.
STARTS = (
    ("q_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, GPT-J
    ("qkv_proj",),  # Phi-3, CodeGen
    ("query_key_value",),  # GPT-NeoX, Falcon, Bloom
    ("Wqkv",),  # MPT
    ("c_attn",),  # GPT-2
)
# What else attention projects with. GPT-2 calls a layer of its MLP c_proj, too.
OTHERS = ("k_proj", "o_proj", "out_proj", "dense", "attn.c_proj")


def target_sets(name: str, start: Targets | None) -> list[Targets]:
    """Return ``start`` and what is wider, by the names in the model's config: no weight is loaded.

    Wider are every attention projection and "all-linear"; one that does not hold all modules of
    the set before it, and more, is left out. ``start`` None is the first of `STARTS` that the
    model has. Raises UserError.
    """
    model = empty_model(name)
    linear = _modules(model, "all-linear")
    known = next((names for names in STARTS if all(_has(linear, n) for n in names)), None)
    if start is None and known is None:
        last = ", ".join(sorted({module.rpartition(".")[2] for module in linear}))
        raise UserError(f"--target-modules must say where to start: this model has {last}")
    sets = [start or known]
    wider: list[Targets] = ["all-linear"]
    if known is not None:
        wider.insert(0, known + tuple(n for n in OTHERS if _has(linear, n)))
    for targets in wider:
        if _modules(model, targets) > _modules(model, sets[-1]):
            sets.append(targets)
    return sets


def listed(targets: Targets) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)


def _has(names: set[str], part: str) -> bool:
    return any(f".{name}".endswith(f".{part}") for name in names)


def _modules(model: nn.Module, targets: Targets) -> set[str]:
    try:
        return set(plan(model, LoRAConfig(target_modules=targets), "default").layers)
    except (TypeError, ValueError) as error:
        raise UserError(f"--target-modules: {first_line(error)}") from error
