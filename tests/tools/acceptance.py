# SPDX-License-Identifier: Apache-2.0
"""When a result is right: the acceptance rule, the cases it is applied to, and their oracle.

The oracle is float64 on the same, already rounded inputs. A result may be at most 1.5 times
(Frobenius norm) and twice (largest element) as far from it as the plain torch formula in the
inputs' dtypes is, plus a floor of one rounding. The rule is never loosened for a test.
"""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora.operator.eager import low_rank, reference

# The plain result that others are held against has to be as good as its dtype lets it be.
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
NAMES = ("y", "x", "lora_A", "lora_B")
KINDS = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16-fp32": (torch.float16, torch.float32),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}
RANKS = (1, 2, 3, 4, 7, 8, 15, 16, 17, 24, 32, 33, 48, 64, 65, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class Case:
    """One problem: sizes, dtypes, dropout, and which of the two paths is on."""

    M: int
    N: int
    K: int
    R: int
    kind: str = "fp32"
    mode: str = "both"  # "base" (B = 0), "low_rank" (W = 0) or "both"
    dropout_p: float = 0.0
    scaling: float = 0.7
    seed: int = 0
    bias: bool = True
    ends: tuple[int, ...] = ()  # of segments, each with an adapter, a scaling and a dropout
    experts: bool = False  # each segment has a weight and a bias of its own, too
    scaled: bool = False  # by column

    def segments(self) -> list[tuple[slice, float, float]]:
        """Return the rows of each segment, its scaling and its dropout's probability."""
        ends = self.ends or (0, self.M)
        return [
            (slice(start, end), self.scaling * (1 + g % 3) / 2, self.dropout_p * (g % 4 != 1))
            for g, (start, end) in enumerate(itertools.pairwise(ends))
        ]

    def stack(self, name: str) -> tuple[int, ...]:
        """Return how tensors of a name are stacked: [G] of them, or not."""
        stacked = self.ends and (self.experts or name in "ab")
        return (len(self.ends) - 1,) if stacked else ()

    def of(self, g: int, name: str, t: Tensor | None) -> Tensor | None:
        """Return segment ``g``'s part of a tensor of that name."""
        return t[g] if t is not None and self.stack(name) else t

    def tensors(self, device: str = "cpu") -> dict[str, Tensor | None]:
        """Draw x, w, a, b, bias, dy and the dropout seed; both paths of y are about as large."""
        base, adapter = KINDS[self.kind]
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape, scale, dtype):
            t = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
            return t.to(dtype).to(device)

        t = {
            "x": draw(self.M, self.K, scale=1.0, dtype=base),
            "w": draw(*self.stack("w"), self.N, self.K, scale=self.K**-0.5, dtype=base)
            * (self.mode != "low_rank"),
            "a": draw(*self.stack("a"), self.R, self.K, scale=self.K**-0.5, dtype=adapter),
            "b": draw(
                *self.stack("b"), self.N, self.R, scale=self.R**-0.5 / self.scaling, dtype=adapter
            )
            * (self.mode != "base"),
            "bias": draw(*self.stack("bias"), self.N, scale=1.0, dtype=base)
            * (self.mode != "low_rank"),
            "dy": draw(self.M, self.N, scale=1.0, dtype=base),
            "seed": torch.tensor([1234567 + self.seed], device=device) if self.dropout_p else None,
        }
        if self.scaled:
            t["scale"] = draw(self.N, scale=0.3, dtype=adapter) + 1.2
        return t if self.bias else {**t, "bias": None}


def integers(t: dict[str, Tensor | None], generator: torch.Generator) -> dict[str, Tensor | None]:
    """Return small integers in the place of tensors: the dtypes hold every sum and product.

    A path that is off, all zeros, stays so.
    """
    found = dict(t)
    for name, value in t.items():
        if value is not None and name != "seed":
            most = 1 if name in "ab" else 2
            small = torch.randint(-most, most + 1, value.shape, generator=generator)
            sparse = torch.rand(value.shape, generator=generator) < 0.3
            found[name] = (small * sparse * value.any().cpu()).to(value.dtype)
    return found


def run(body, case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Return y and the gradients of x, lora_A and lora_B from an implementation's two functions."""
    rest = (t["seed"], case.scaling, case.dropout_p)
    y, s = body.forward(t["x"], t["w"], t["a"], t["b"], t["bias"], *rest)
    grads = body.backward(t["dy"], t["x"], t["w"], t["a"], t["b"], s, *rest, (True, True, True))
    return dict(zip(NAMES, (y, *grads), strict=True))


def oracle(case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Return what `run` should, in float64."""
    wide = {n: v if v is None or n == "seed" else v.double() for n, v in t.items()}
    return plain(case, wide)


def plain(case: Case, t: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Return what the plain torch formula and autograd give in the inputs' dtypes."""
    names = *"xab", *["scale"][: case.scaled]
    x, a, b, *scale = inputs = [t[n].detach().clone().requires_grad_() for n in names]
    if case.ends:
        parts = []
        for g, (rows, scaling, p) in enumerate(case.segments()):
            y = torch.nn.functional.linear(x[rows], *(case.of(g, n, t[n]) for n in ("w", "bias")))
            seed = t["seed"] if p else None
            part = low_rank(x[rows], a[g], b[g], scaling, seed, p, rows.start)
            parts.append((y + part).to(y.dtype))
        y = torch.cat(parts)
    else:
        y = reference(x, t["w"], a, b, t["bias"], t["seed"], case.scaling, case.dropout_p, *scale)
    grads = torch.autograd.grad(y, inputs, t["dy"])
    return dict(zip((*NAMES, "scale"), (y.detach(), *grads)))  # noqa: B905, it may be short


def accept(name: str, result: Tensor, plain_result: Tensor, exact: Tensor) -> None:
    """Raise AssertionError unless ``result`` is as near to ``exact`` as the rule asks."""
    assert result.shape == exact.shape, f"{name}: shape {result.shape}, not {exact.shape}"
    assert result.dtype == plain_result.dtype, f"{name}: {result.dtype}, not {plain_result.dtype}"
    if not exact.numel():
        return
    error, allowed = result.double() - exact, plain_result.double() - exact
    norm = 1.5 * allowed.norm() + 0.1 * UNIT[result.dtype] * exact.norm()
    floor = ((exact.to(result.dtype) + 0.3) - 0.3).double() - exact
    largest = 2 * allowed.abs().max() + 2 * floor.abs().max()
    limits = {"Frobenius": (error.norm(), norm), "max": (error.abs().max(), largest)}
    for kind, (found, limit) in limits.items():
        assert found <= limit, f"{name}: {kind} error {found:.3g} > {limit:.3g}"


def verify(body, case: Case, t: dict[str, Tensor | None] | None = None) -> None:
    """Apply the rule to y and every gradient of ``case``."""
    t = case.tensors() if t is None else t
    results, plain_results, exact = run(body, case, t), plain(case, t), oracle(case, t)
    for name in NAMES:
        accept(f"{case}: {name}", results[name], plain_results[name], exact[name])


def verify_exactly(body, case: Case) -> None:
    """Check a case of small integers, whose every sum and product the dtypes hold, for equality."""
    case = replace(case, scaling=2.0)
    t = integers(case.tensors(), torch.Generator().manual_seed(case.seed))
    results, exact = run(body, case, t), oracle(case, t)
    for name in NAMES:
        expected = exact[name].to(results[name].dtype)
        assert torch.equal(expected.double(), exact[name]), f"{name} is not exact in its dtype"
        assert torch.equal(results[name], expected), f"{case}: {name} differs"


def small_cases(kinds=tuple(KINDS)) -> list[Case]:
    """Return the cases that every implementation must pass: ragged sizes, all modes, dropout."""
    shapes = [(97, 50, 170, 5), (64, 96, 128, 16), (96, 65, 150, 2), (130, 40, 36, 33)]
    cases = []
    for i, (kind, shape) in enumerate(itertools.product(kinds, shapes)):
        for mode in ("base", "low_rank", "both"):
            p = 0.3 if (i + len(mode)) % 2 else 0.0
            cases.append(Case(*shape, kind=kind, mode=mode, dropout_p=p, seed=i))
    return cases


def strided(t):
    """Yield tensors equal to ``t`` that lie differently in memory."""
    yield "transposed", t.mT.contiguous().mT
    *rows, columns = t.shape
    wide = torch.full((*rows, 2 * columns + 3), torch.nan, dtype=t.dtype)
    wide[..., 1::2][..., :columns] = t
    yield "every second column", wide[..., 1::2][..., :columns]
    rows = torch.full((3 * rows[0], *rows[1:], columns + 5), torch.nan, dtype=t.dtype)
    rows[::3, ..., 2:-3] = t
    yield "every third row", rows[::3, ..., 2:-3]
    flat = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)
    flat[1:] = t.flatten()
    yield "misaligned", flat[1:].view_as(t)
