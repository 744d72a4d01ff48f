# SPDX-License-Identifier: Apache-2.0
"""Which layers and sizes are measured, and what they are called.

The linears of real models; on a CPU the smaller ones.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from baselines import Problem

# (model, layer): (N, K, bias)
LAYERS = {
    ("SmolLM2-135M", "q, o"): (576, 576, False),
    ("SmolLM2-135M", "k, v"): (192, 576, False),
    ("SmolLM2-135M", "gate, up"): (1536, 576, False),
    ("SmolLM2-135M", "down"): (576, 1536, False),
    ("BERT-base", "q, k, v, o"): (768, 768, True),
    ("BERT-base", "intermediate"): (3072, 768, True),
    ("BERT-base", "output"): (768, 3072, True),
    ("Llama-3-8B", "q, o"): (4096, 4096, False),
    ("Llama-3-8B", "k, v"): (1024, 4096, False),
    ("Llama-3-8B", "gate, up"): (14336, 4096, False),
    ("Llama-3-8B", "down"): (4096, 14336, False),
    ("Llama-3-70B", "q, o"): (8192, 8192, False),
    ("Llama-3-70B", "k, v"): (1024, 8192, False),
    ("Llama-3-70B", "gate, up"): (28672, 8192, False),
    ("Llama-3-70B", "down"): (8192, 28672, False),
    ("square", "2048"): (2048, 2048, False),
}
DROPOUTS = (0.0, 0.05)
CPU_TOKENS = {"SmolLM2-135M": 512, "BERT-base": 512, "square": 2048}


def problems(device: str) -> Iterator[Problem]:
    """Yield what ``make bench`` measures on ``device``, the most telling first."""
    cpu = device == "cpu"
    goal = ("square", "2048") if cpu else ("Llama-3-8B", "q, o")
    tokens = 2048 if cpu else 8192
    for p in DROPOUTS:
        yield _problem(goal, tokens, device, p=p)
        yield _problem(goal, tokens, device, p=p, adapter=torch.float32)
    if cpu:
        yield _problem(goal, tokens, device, dtype=torch.float32, adapter=torch.float32)
    for layer in LAYERS:
        model = layer[0]
        if layer != goal and (not cpu or model in CPU_TOKENS):
            for p in DROPOUTS:
                yield _problem(layer, CPU_TOKENS[model] if cpu else tokens, device, p=p)
    for m in (1, 16, 64, 128) if cpu else (16, 64, 256, 512, 1024, 2048, 4096, 16384):
        yield _problem(goal, m, device)
    for weights in ("nf4", "int8"):
        for m in (512, tokens):
            for p in DROPOUTS:
                yield _problem(goal, m, device, p=p, adapter=torch.float32, weights=weights)
    for r in (8, 64, 128):
        yield _problem(goal, tokens, device, R=r)


def _problem(layer: tuple[str, str], m: int, device: str, **changes) -> Problem:
    n, k, bias = LAYERS[layer]
    return replace(Problem(", ".join(layer), m, n, k, bias=bias, device=device), **changes)


def title(problem: dict) -> str:
    """Return one line that says what was measured."""
    adapter = short(problem["adapter"])
    mixed = f", {adapter} adapters" if problem["adapter"] != problem["dtype"] else ""
    kept = problem.get("weights", "dense")
    weights = f", {kept} weights" if kept != "dense" else ""
    return (
        f"{problem['name']}: {problem['M']} x {problem['N']} x {problem['K']}, r = {problem['R']}, "
        f"{short(problem['dtype'])}{mixed}{weights}, dropout {problem['p']:g}"
    )


def block(problem: dict) -> str:
    """Return the same of the experts of a mixture."""
    of = "{experts} of {K} x {N}, {top} for each of {M} tokens"
    return of.format(**problem)


def short(dtype: str) -> str:
    """Return what a dtype is called in tables and titles."""
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}[dtype]
