# SPDX-License-Identifier: Apache-2.0
"""Forward and backward as a GPU would run them: the compiled PTX, run on a CPU (`make executed`).

Prints a JSON line a case: what ran, the seconds, and what is wrong, by the acceptance rule or by
what `ptx` watches. In a process of its own: the interpreter must be off.
"""

import same_sums  # noqa: F401 - before PyTorch

# isort: split
import functools
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import aot
import fastlora_kernels
import packed_weights
import torch
import torch.nn.functional as F
from acceptance import KINDS, accept, strided
from covering import covering
from fastlora_kernels import gated, gated_backward
from fastlora_kernels.configs import Config
from fastlora_kernels.four_bits import four_bits
from joints import Joint, verify
from ptx import running

from fastlora.operator import library

# Rows, outputs, inputs: more steps than a pipeline has stages, at every default tile.
SIZES = {"even": (200, 272, 288), "uneven": (197, 269, 288), "ragged": (197, 269, 283)}
SIZES |= {"strided": SIZES["even"], "deep": (72, 144, 720), "cut": (150, 144, 152)}
CUTS = {"cut": (0, 37, 37, 70, 150)}  # a segment has no rows, others end within a tile
# The same of experts, whose weights lie as [G, N, K] or as [G, K, N].
SIZES |= dict.fromkeys(("experts", "experts by columns"), SIZES["cut"])
CUTS |= dict.fromkeys(("experts", "experts by columns"), CUTS["cut"])
SIBLINGS = 48, 80  # outputs of the second and third projection
OPTIONS = {
    "capability": (90, 80),
    "kind": ("bf16", "bf16-fp32", "fp32", "fp16"),
    "size": ("even", "ragged", "strided", "uneven"),
    "rank": (16, 1, 33, 8, 64),
    "dropout": (0.0, 0.1),
    "count": (1, 3),
}
MODES, PROCESSORS = ("both", "low_rank", "base"), (1, 2, 132)
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}
ACTIVATIONS["gelu_tanh"] = functools.partial(F.gelu, approximate="tanh")


@dataclass(frozen=True)
class Case:
    """A problem and how it is run; with few processors a program makes many tiles."""

    capability: int
    kind: str
    size: str
    rank: int
    dropout: float
    count: int
    mode: str = "both"
    processors: int = 1
    impl: str = "triton"
    low_rank: str = ""  # of dx, where persistent programs are asked for
    scaled: bool = False

    def joint(self) -> Joint:
        M, N, K = SIZES[self.size]
        M = M // 2 if self.kind == "fp32" else M  # pipelines of two stages, and slow
        sizes = (N, *SIBLINGS)[: self.count]
        p = (self.dropout,) * self.count
        ends = tuple(min(M, end) for end in CUTS.get(self.size, ()))
        ranks = (self.rank,) * self.count
        experts = self.size.startswith("experts")
        of = M, K, sizes, ranks, self.kind, self.mode, p
        return Joint(*of, ends=ends, experts=experts, scaled=self.scaled)

    def kernels(self) -> SimpleNamespace:
        return fastlora_kernels if self.impl == "triton" else SimpleNamespace(steps=library)

    def tensors(self, device: str = "cpu") -> list[dict]:
        ts = self.joint().tensors(device)
        draw = random.Random(repr(self))
        for of in ts if self.size == "strided" else ():
            of |= {n: _laid(t, draw) for n, t in of.items() if t is not None and t.dim() > 1}
        for of in ts if self.size == "experts by columns" else ():
            of["w"] = of["w"].mT.contiguous().mT
        return [{**of, "x": ts[0]["x"]} for of in ts]

    def chip(self):
        chip = aot.CHIPS[self.capability]
        return replace(chip, processors=min(self.processors, chip.processors))

    def configs(self) -> dict[str, Config] | None:
        """Return what is asked for: persistent programs, which with segments are no default."""
        tiles = Config(64, 64, 32, tma=True)
        asked = {"outputs": tiles, "input_grad": replace(tiles, low_rank=self.low_rank)}
        return asked if self.low_rank else None

    def run(self, configs: dict | None = None, **options) -> running.Executor:
        """Run forward and backward, check both, and return what ran them."""
        configs = configs or self.configs()
        with running.executing(self.chip(), **options) as executor:
            verify(self.kernels(), self.joint(), configs=configs, ts=self.tensors())
        return executor


@dataclass(frozen=True)
class Gated:
    """A gated product and its gradients."""

    capability: int
    kind: str
    activation: str

    def run(self) -> running.Executor:
        generator, of = torch.Generator().manual_seed(0), ACTIVATIONS[self.activation]
        drawn = [torch.randn(33, 45, generator=generator) * scale for scale in (1.0, 3.0, 1.0)]
        ts = [t.to(KINDS[self.kind][0]) for t in drawn]
        with running.executing(aot.CHIPS[self.capability]) as executor:
            found = gated(*ts[1:], self.activation), *gated_backward(*ts, self.activation)

        def expected(dh, gate, up):
            gate, up = (t.detach().requires_grad_() for t in (gate, up))
            h = of(gate) * up
            dgate, dup = torch.autograd.grad(h, (gate, up), dh)
            return h.detach(), dgate, dup, h.detach()

        plain, exact = expected(*ts), expected(*(t.double() for t in ts))
        for values in zip(found, plain, exact, strict=True):
            accept(str(self), *values)
        return executor


@dataclass(frozen=True)
class FourBits:
    """A weight of 4 bits made dense, bit for bit."""

    capability: int
    kind: str
    nested: bool

    def run(self) -> running.Executor:
        given, right = packed_weights.drawn((31, 78), self.nested, KINDS[self.kind][0])
        with running.executing(aot.CHIPS[self.capability]) as executor:
            found = four_bits(*given)
        assert torch.equal(found, right)
        return executor


def _laid(t: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """Return ``t`` as it is or laid out in another way."""
    return draw.choice([t, *(other for _, other in strided(t))])


def drawn() -> list:
    """Return cases in which every two options meet, and of what these leave out one each."""
    cases = [Case(*row) for row in covering(*OPTIONS.values(), MODES)]
    cases = [replace(case, processors=PROCESSORS[i % 3]) for i, case in enumerate(cases)]
    others = (90, "bf16-fp32"), (80, "bf16")
    cases += [Case(*of, "even", 16, 0.1, 3, impl="library") for of in others]
    cases += [Case(90, "bf16", "deep", 8, 0.0, 1, processors=132)]
    of = OPTIONS["capability"], OPTIONS["kind"], ["cut"], (16, 33), *list(OPTIONS.values())[4:]
    cases += [Case(*row, mode="low_rank", processors=9) for row in covering(*of)]
    # Rank 0: frozen experts, as the vendor's implementation runs what PyTorch does not group.
    of = (90, 80), ("bf16", "bf16-fp32", "fp32"), (*CUTS,)[1:], (16, 0)
    cases += [Case(*row, 0.0, 1, mode="base", processors=9) for row in covering(*of)]
    # Segments by TMA: each way for the low-rank terms of dx to join, and frozen experts.
    asked = ("bf16", "experts", 16, 0.0, 1, "first"), ("bf16", "experts", 8, 0.0, 3, "fold")
    asked += ("bf16", "experts by columns", 8, 0.1, 3, "fold"), ("fp16", "cut", 16, 0.1, 1, "first")
    asked += ("bf16-fp32", "experts", 33, 0.1, 1, "first"), ("fp16", "experts", 0, 0.0, 1, "first")
    for i, (*of, low_rank) in enumerate(asked):
        mode, processors = "both" if of[2] else "base", (2, 9)[i % 2]
        cases.append(Case(90, *of, mode, processors, low_rank=low_rank))
    cases += [Case(90, kind, "even", 16, 0.0, 1) for kind in ("fp16", "fp16-fp32")]
    of = *list(OPTIONS.values())[:2], ("even", "ragged"), (16, 1, 33), (0.0, 0.1), (1, 3)
    for i, row in enumerate(covering(*of)):
        impl = ("triton", "library")[i % 2]
        cases.append(Case(*row, processors=PROCESSORS[i % 3], impl=impl, scaled=True))
    cases += [Gated(*of) for of in covering((80, 90), ("bf16", "fp32"), tuple(ACTIVATIONS))]
    return cases + [FourBits(*of) for of in covering((80, 90), ("bf16", "fp32"), (False, True))]


def every() -> list:
    """Return all that the options allow, in turn with other modes and numbers of processors."""
    turns = itertools.cycle(itertools.product(MODES, PROCESSORS))
    cases = [Case(*row, *next(turns)) for row in itertools.product(*OPTIONS.values())]
    return cases + drawn()


def reports(cases: list) -> Iterator[dict]:
    for case in cases:
        begun, error, executor = time.process_time(), None, None
        try:
            executor = case.run()
        except running.UntriedError:
            raise
        except Exception as e:
            error = "\n".join([f"{type(e).__name__}: {e}", *getattr(e, "__notes__", ())])
        seconds = round(time.process_time() - begun, 2)
        about = {"case": repr(case), "capability": case.capability, "kind": case.kind}
        about |= {"seconds": seconds, "error": error}
        about["ran"] = executor.ran if executor else []
        yield about | {"overwriting": sorted(executor.overwriting) if executor else []}


def printed(rows: Iterator[dict]) -> None:
    """Print rows, or why there are none."""
    try:
        for row in rows:
            print(json.dumps(row), flush=True)
    except running.UntriedError as error:
        print(json.dumps({"skipped": str(error)}))


if __name__ == "__main__":
    which, *most = [*sys.argv[1:], "every"]
    if which == "--broken":
        import ptx_mistakes  # which takes its cases from here

        ptx_mistakes.main(int(most[0]) if most[0].isdigit() else 3)
    else:
        printed(reports({"drawn": drawn, "every": every}[which]()))
