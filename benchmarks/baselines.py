# SPDX-License-Identifier: Apache-2.0
"""One LoRA linear layer as others compute it, and as we do: what the benchmarks compare.

Each class takes a `Problem` and is called with x. `cannot` says why a way cannot run a
problem, which then has no row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora
from fastlora.operator import plans
from fastlora.operator.weights import quantised


@dataclass(frozen=True)
class Problem:
    """One layer and its input. ``adapter`` is the dtype of lora_A and lora_B.

    ``weights`` are "dense", "nf4" (bitsandbytes, nested scales) or "int8" (torchao).
    """

    name: str
    M: int
    N: int
    K: int
    R: int = 16
    p: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.bfloat16
    bias: bool = False
    device: str = "cpu"
    scaling: float = 2.0
    weights: str = "dense"

    def __str__(self) -> str:
        dtypes = "/".join(str(d).removeprefix("torch.") for d in (self.dtype, self.adapter))
        sizes = f"{self.M}x{self.N}x{self.K} r={self.R}"
        kept = "" if self.weights == "dense" else f" {self.weights}"
        return f"{self.name}: {sizes} {dtypes}{kept} dropout={self.p:g}"

    def linear(self) -> nn.Linear:
        linear = nn.Linear(self.K, self.N, self.bias, device="meta", dtype=self.dtype)
        linear.weight = nn.Parameter(self._random(0, self.N, self.K) / self.K**0.5)
        if self.bias:
            linear.bias = nn.Parameter(torch.zeros_like(linear.bias, device=self.device))
        return QUANTISED[self.weights](linear.requires_grad_(False))

    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        a = self._random(1, self.R, self.K) / self.K**0.5
        b = self._random(2, self.N, self.R)
        return tuple(nn.Parameter(t.to(self.adapter)) for t in (a, b))

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return x, which requires grad, and dy."""
        return self._random(3, self.M, self.K).requires_grad_(), self._random(4, self.M, self.N)

    def _random(self, seed: int, *shape: int) -> Tensor:
        """Return the same normal numbers every time, drawn on the device: weights are large."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)


def nf4(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight, has_bias = linear.weight, linear.bias is not None
    sizes = linear.in_features, linear.out_features, has_bias
    made = Linear4bit(*sizes, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
    packed = Params4bit(weight.data, requires_grad=False, quant_type="nf4", module=made)
    made.weight, made.bias = packed.to(weight.device), linear.bias
    return made


def _int8(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(linear)
    quantize_(model, Int8WeightOnlyConfig())
    return model[0]


QUANTISED = {"dense": lambda linear: linear, "nf4": nf4, "int8": _int8}


class Frozen(nn.Module):
    """The frozen layer alone: what every ratio is to."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.linear = problem.linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Peft(nn.Module):
    """PEFT's own layer, as ``get_peft_model`` makes it."""

    compiled = dora = False

    def __init__(self, problem: Problem, linear: nn.Linear | None = None) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=problem.R,
            lora_alpha=problem.scaling * problem.R,
            lora_dropout=problem.p,
            target_modules=["0"],
            use_dora=self.dora,
        )
        model = nn.Sequential(problem.linear() if linear is None else linear)
        model.is_loaded_in_4bit = problem.weights == "nf4"
        wide = problem.adapter == torch.float32
        model = get_peft_model(model, config, autocast_adapter_dtype=wide)
        self.layer = model.base_model.model[0].train()
        a, b = problem.factors()
        self.layer.lora_A["default"].weight, self.layer.lora_B["default"].weight = a, b
        if self.compiled:
            self.layer.compile(dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class PeftCompiled(Peft):
    """PEFT's layer under ``torch.compile``."""

    compiled = True


class LoraLib(Frozen):
    """The formula of loralib and torchtune: adapters in the base's dtype."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.a, self.b = problem.factors()
        self.p, self.scaling = problem.p, problem.scaling

    def forward(self, x: Tensor) -> Tensor:
        low_rank = F.dropout(x, self.p) @ self.a.t() @ self.b.t()
        return self.linear(x) + low_rank * self.scaling


class Addmm(Frozen):
    """Library products into one output, by hand, as Unsloth and Axolotl do it: no dropout.

    A quantised weight is made dense for each product.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.a, self.b = problem.factors()
        self.scaling, self.quantised = problem.scaling, problem.weights != "dense"

    def forward(self, x: Tensor) -> Tensor:
        w = self.linear.weight
        w = quantised(w, x.dtype, self.linear) if self.quantised else w
        return _Addmm.apply(x, w, self.linear.bias, self.a, self.b, self.scaling)


class _Addmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, a, b, scaling):
        ctx.save_for_backward(x, a, b)
        ctx.scaling, ctx.w = scaling, w
        y = F.linear(x, w, bias)
        return y.addmm_(x @ a.t().to(x.dtype), b.t().to(x.dtype), alpha=scaling)

    @staticmethod
    def backward(ctx, dy):
        x, a, b = ctx.saved_tensors
        a, b, c = a.to(x.dtype), b.to(x.dtype), ctx.scaling
        dyb = dy @ b
        da = (dyb.t() @ x) * c
        db = (dy.t() @ (x @ a.t())) * c
        dx = (dy @ ctx.w).addmm_(dyb, a, alpha=c)
        return dx, None, None, da, db, None


class LoRAFusion(Frozen):
    """LoRAFusion's schedule (Zhu et al., EuroSys 2026): split at s, dropped x and mask stored.

    On a GPU with its fused kernels and atomics, on a CPU with library products in their place. The
    narrow factor is scaled, not the product: s comes scaled from the product that makes it.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.a, self.b = problem.factors()
        self.p, self.scaling = problem.p, problem.scaling

    def forward(self, x: Tensor) -> Tensor:
        weights = self.linear.weight, self.linear.bias, self.a, self.b
        return _LoRAFusion.apply(x, *weights, self.scaling, self.p)


class _LoRAFusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, a, b, scaling, p):
        x_hat, mask = torch.native_dropout(x, p, True) if p else (x, None)
        s = x.new_empty(x.shape[0], a.shape[0]).addmm_(x_hat, a.t(), beta=0, alpha=scaling)
        ctx.save_for_backward(x_hat, mask, w, a, b, s)
        ctx.scaling, ctx.keep = scaling, 1 / (1 - p)
        if on_gpu(x):
            from fastlora_kernels import steps

            return steps.outputs(x, [(w, a, b, bias, None, 1.0, 0.0)], [s])[0]
        return F.linear(x, w, bias).addmm_(s, b.t())

    @staticmethod
    def backward(ctx, dy):
        x_hat, mask, w, a, b, s = ctx.saved_tensors
        if on_gpu(dy):
            import lorafusion

            ds, db = lorafusion.ds_db(dy, s, b, ctx.scaling)
            dx = lorafusion.dx(dy, w, ds, a, mask, ctx.keep)
            return dx, None, None, ds.t() @ x_hat, db, None, None
        ds = (dy @ b).mul_(ctx.scaling)
        db = dy.t() @ s
        da = ds.t() @ x_hat
        if mask is None:
            dx = (dy @ w).addmm_(ds, a)
        else:
            dx = (ds @ a).mul_(mask).mul_(ctx.keep).addmm_(dy, w)
        return dx, None, None, da, db, None, None


def on_gpu(t: Tensor) -> bool:
    """Return whether Triton's kernels can take ``t``."""
    return t.is_cuda


class Ours(nn.Module):
    """`fastlora.lora_linear` by one implementation."""

    impl = "blocks"

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.linear = problem.linear()
        self.a, self.b = problem.factors()
        self.options = {"scaling": problem.scaling, "dropout_p": problem.p, "training": True}

    def forward(self, x: Tensor) -> Tensor:
        weights = self.linear.weight, self.a, self.b, self.linear.bias
        return fastlora.lora_linear(x, *weights, **self.options, impl=self.impl)


class OursLibrary(Ours):
    impl = "library"


class OursTriton(Ours):
    impl = "triton"


class OursEager(Ours):
    impl = "eager"


WAYS = {
    "frozen": Frozen,
    "fastlora blocks": Ours,
    "fastlora eager": OursEager,
    "fastlora library": OursLibrary,
    "fastlora triton": OursTriton,
    "PEFT": Peft,
    "PEFT compiled": PeftCompiled,
    "loralib": LoraLib,
    "addmm (Unsloth, Axolotl)": Addmm,
    "LoRAFusion schedule": LoRAFusion,
}


def cannot(way: str, problem: Problem) -> str | None:
    """Return why ``way`` has no row for ``problem``, or None."""
    if way.startswith("addmm") and problem.p:
        return "has no dropout"
    if way in ("loralib", "LoRAFusion schedule") and problem.adapter != problem.dtype:
        return "has adapters in the base's dtype only"
    reads_dense = "fastlora triton", "fastlora eager", "loralib", "LoRAFusion schedule"
    if problem.weights != "dense" and way.startswith((*reads_dense, "PEFT compiled")):
        return "is for dense weights"
    few = plans.is_few(problem.M * problem.K, torch.device(problem.device))
    if way == "fastlora eager" and not few:
        return "is for few tokens on a CPU"
    if way in ("fastlora library", "fastlora triton") and problem.device == "cpu":
        return "needs a GPU"
    needs_triton = ("fastlora library", "fastlora triton", "LoRAFusion schedule")
    if way in needs_triton and problem.device != "cpu":
        return plans.triton_unusable(torch.device(problem.device))
    return None
