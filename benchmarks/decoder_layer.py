# SPDX-License-Identifier: Apache-2.0
"""The seven linear layers of a decoder layer and its gated MLP, without attention itself.

x goes to q, k and v, q to o, o to the MLP; k and v get gradients of their own, so that all that
is timed is what LoRA is about.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import hand_fused
import torch
import torch.nn.functional as F
from measure import Step, Turns, by_phase, kept_bytes, peak_bytes, sharing
from torch import Tensor, nn

import fastlora

R, SCALING = 16, 2.0
NAMES = ("q", "k", "v", "o", "gate", "up", "down")
GROUPS = (("q", "k", "v"), ("gate", "up"))
# hidden, of all key heads, of the MLP, whether q, k and v have a bias
SIZES = {
    "Llama-3-8B": (4096, 1024, 14336, False),
    "Llama-3-70B": (8192, 1024, 28672, False),
    "Qwen2.5-7B": (3584, 512, 18944, True),
    "Llama-3.2-1B": (2048, 512, 8192, False),
    "SmolLM2-135M": (576, 192, 1536, False),
}
TOKENS = {"cpu": 512, "cuda": 8192}
ON_CPU = ("Llama-3.2-1B", "SmolLM2-135M")


@dataclass(frozen=True)
class Problem:
    """A decoder layer of a model, and how it is trained."""

    name: str
    p: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    tokens: int | None = None

    def __str__(self) -> str:
        return f"{self.name}, {self.rows} tokens, dropout {self.p:g}"

    @property
    def rows(self) -> int:
        return self.tokens or TOKENS[self.device]


class Layer(nn.Module):
    """The frozen layer: random weights that keep the size of what passes through."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        hidden, kv, wide, bias = SIZES[problem.name]
        sizes = dict.fromkeys(("q", "o"), (hidden, hidden)) | dict.fromkeys("kv", (hidden, kv))
        sizes |= {"gate": (hidden, wide), "up": (hidden, wide), "down": (wide, hidden)}
        torch.manual_seed(0)
        with torch.device(problem.device):
            for name in NAMES:
                n_in, n_out = sizes[name]
                of = {"bias": bias and name in "qkv", "dtype": problem.dtype}
                setattr(self, name, nn.Linear(n_in, n_out, **of))
        self.mlp = MLP(self.gate, self.up, self.down)
        del self.gate, self.up, self.down
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.mlp(self.o(q)), k, v


class MLP(nn.Module):
    """As decoders of transformers have it."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def peft(problem: Problem, layer: nn.Module) -> nn.Module:
    """Return ``layer`` under PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=R,
        lora_alpha=SCALING * R,
        lora_dropout=problem.p,
        target_modules=list(NAMES),
        init_lora_weights=False,
    )
    torch.manual_seed(1)
    return get_peft_model(layer, config, autocast_adapter_dtype=False).train()


def ours(problem: Problem, layer: nn.Module) -> nn.Module:
    """Return ``layer`` under PEFT and our forward under it, each layer by itself."""
    return _patched(problem, layer, False)


def siblings(problem: Problem, layer: nn.Module) -> nn.Module:
    """Return ``layer`` with q, k and v as one operator, and its MLP as another."""
    return _patched(problem, layer, GROUPS)


def _patched(problem: Problem, layer: nn.Module, how: object) -> nn.Module:
    layer = peft(problem, layer)
    fastlora.patch_peft(layer, fuse_siblings=how)
    return layer


def peft_compiled(problem: Problem, layer: nn.Module) -> nn.Module:
    """Return ``layer`` under PEFT and ``torch.compile``."""
    layer = peft(problem, layer)
    layer.compile(dynamic=False)
    return layer


class HandFused(nn.Module):
    """The layer by `hand_fused`, with the weights and adapters of `peft`."""

    def __init__(self, problem: Problem, layer: nn.Module) -> None:
        super().__init__()
        self.layer = peft(problem, layer)
        modules = self.layer.base_model.model.named_modules()
        self.of = {name.rpartition(".")[2]: m for name, m in modules if hasattr(m, "base_layer")}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of = {name: _tensors(layer) for name, layer in self.of.items()}
        q, k, v = hand_fused.projections(x, [of[name] for name in "qkv"], SCALING)
        (o,) = hand_fused.projections(q, [of["o"]], SCALING)
        return hand_fused.mlp(o, [of[n] for n in ("gate", "up", "down")], SCALING), k, v


def _tensors(layer: nn.Module) -> hand_fused.Projection:
    base, a, b = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    return base.weight, base.bias, a.weight, b.weight


WAYS: dict[str, Callable[[Problem, nn.Module], nn.Module]] = {
    "frozen": lambda problem, layer: layer,
    "fastlora, siblings": siblings,
    "fastlora": ours,
    "hand-fused (Unsloth)": HandFused,
    "PEFT": peft,
    "PEFT compiled": peft_compiled,
}


def problems(device: str) -> Iterator[Problem]:
    """Yield what ``make bench`` measures on ``device``."""
    for name in ON_CPU if device == "cpu" else SIZES:
        for p in (0.0, 0.05):
            yield Problem(name, p, device=device)


def measure(problem: Problem, ways: list[str], seconds: float) -> list[dict]:
    """Return a row for each way that ``problem`` is for, with the error of one that failed."""
    device = torch.device(problem.device)
    layer = Layer(problem)
    generator = torch.Generator(problem.device).manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(problem.dtype)

    hidden, kv, *_ = SIZES[problem.name]
    x = random(problem.rows, hidden).requires_grad_()
    dys = [random(problem.rows, n) for n in (hidden, kv, kv)]
    turns = Turns(device)
    for way in ways:
        if way.startswith("hand-fused") and problem.p:
            continue  # it has no dropout
        turns.join(way, lambda way=way: Step(WAYS[way](problem, sharing(layer)), x, dys))
    for way, phases in by_phase(turns.rounds(seconds)).items():
        turns.rows[way] |= phases
    for way in turns.rows:
        turns.note(way, lambda step: {"launches": launches(step)})
        turns.note(way, lambda step: {"kept_bytes": kept_bytes(step.layer, x)})
        turns.note(way, lambda step: {"peak_bytes": peak_bytes(step, device)})
    return list(turns.rows.values())


def launches(step: Callable[[], Iterator[None]]) -> int:
    """Return how many kernels a step launches on a GPU; on a CPU, how many library calls it makes.

    A call is an operator of PyTorch that calls no other, views and allocations left out.
    """
    cuda = torch.cuda.is_available()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA] if cuda else [kinds.CPU]) as found:
        list(step())
    events = found.events()
    if cuda:
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in events)
    free = ("view", "t", "transpose", "as_strided", "empty", "detach", "slice", "reshape")
    free += ("empty_strided", "expand", "narrow", "select", "unsqueeze", "alias", "resolve_conj")
    leaves = [e.name for e in events if e.name.startswith("aten::") and not e.cpu_children]
    return sum(name.removeprefix("aten::") not in free for name in leaves)
