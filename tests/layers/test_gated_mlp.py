# SPDX-License-Identifier: Apache-2.0
"""A gated MLP as one operator, the modules that are one, and those that only look like it."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import pickle
import re
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from acceptance import KINDS, accept
from peft import LoraConfig, get_peft_model
from tiny_models import bits, decoder, llama, same, t5, tokens
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

import fastlora
from fastlora import LoRAConfig, inject, patch_peft, unpatch_peft
from fastlora.flops import FORMULAS
from fastlora.layers import gated
from fastlora.layers.siblings import FrozenLinear
from fastlora.operator import op
from fastlora.operator.dropout import keep_mask
from fastlora.operator.operands import Operands

X = torch.linspace(-2, 2, 18).reshape(3, 6)
PLAIN = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}

# The operator


def operands(ranks=(3, 2, 4), dtype=torch.float32, adapter=None, p=0.0, M=120, K=64, size=96, N=48):
    """Return x, dy and the projections gate, up and down; a rank of 0 is no adapter."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0, to=dtype):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(to)

    made = []
    for i, (r, (n, k)) in enumerate(zip(ranks, ((size, K), (size, K), (N, size)), strict=True)):
        a = b = None
        if r:
            a = draw(r, k, scale=k**-0.5, to=adapter or dtype)
            b = draw(n, r, scale=r**-0.5, to=adapter or dtype)
        bias = draw(n) if i != 1 else None
        seed = torch.tensor([7 + i]) if p and r else None
        made.append(Operands(draw(n, k, scale=k**-0.5), a, b, bias, seed, 0.8, p))
    return draw(M, K), draw(M, N), made


def formula(x, projections, act):
    """The plain torch formula, in the dtypes that are given."""

    def linear(x, projection):
        w, a, b, bias, seed, scaling, p = projection
        y = F.linear(x, w, bias)
        if a is None:
            return y
        x_hat = x.to(a.dtype)
        if seed is not None:
            x_hat = x_hat * keep_mask(seed, range(x.shape[0]), x.shape[1], p) / (1 - p)
        return (y + F.linear(F.linear(x_hat, a), b) * scaling).to(x.dtype)

    gate, up, down = projections
    return linear(PLAIN[act](linear(x, gate)) * linear(x, up), down)


def trained(x, projections):
    return [x, *(t for p in projections for t in (p.a, p.b) if t is not None)]


def all_of(function, x, dy, projections, act):
    """Return y and every gradient."""
    x = x.clone().requires_grad_()
    for i, p in enumerate(projections):
        if p.a is not None:
            a, b = (t.clone().requires_grad_() for t in (p.a, p.b))
            projections = [*projections[:i], p._replace(a=a, b=b), *projections[i + 1 :]]
    y = function(x, projections, act)
    return [y.detach(), *torch.autograd.grad(y, trained(x, projections), dy)]


@pytest.mark.parametrize("act", PLAIN)
@pytest.mark.parametrize("ranks", [(3, 2, 4), (3, 0, 0), (0, 0, 4), (16, 16, 16)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_acceptance_rule(act, ranks, kind, p):
    sizes = {"M": 200, "K": 140, "size": 190, "N": 150}
    x, dy, projections = operands(ranks, *KINDS[kind], p=p, **sizes)
    wide = [
        Operands(
            *(
                t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
                for t in projection
            )
        )
        for projection in projections
    ]
    found = all_of(gated.run, x, dy, projections, act)
    plain = all_of(formula, x, dy, projections, act)
    exact = all_of(formula, x.double(), dy.double(), wide, act)
    for i, (mine, theirs, right) in enumerate(zip(found, plain, exact, strict=True)):
        accept(f"{act} {i}", mine, theirs, right)


@pytest.mark.parametrize("act", PLAIN)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_first_and_second_derivatives(act, p):
    sizes = {"M": 2, "K": 3, "size": 4, "N": 2}
    x, _, projections = operands((1, 2, 1), torch.float64, p=p, **sizes)
    weight, bias = projections[2].w, projections[0].bias
    inputs = [t.requires_grad_() for t in (*trained(x, projections), weight, bias)]

    def function(*given):
        return gated.run(x, projections, act)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def twice(x, projections, act):
    return gated.run(gated.run(x, projections, act), projections, act)


def tied(x, projections, act):
    """gate and up have one A."""
    gate, up, down = projections
    return gated.run(x, [gate, up._replace(a=gate.a), down], act)


def of_itself(x, projections, act):
    """x, and the weight of down, are made from parameters of the same operator."""
    gate, up, down = projections
    x, w = x * gate.a.sum(), down.w + up.a.sum()
    return gated.run(x, [gate, up, down._replace(w=w)], act)


@pytest.mark.parametrize("act", PLAIN)
@pytest.mark.parametrize("function", [twice, tied, of_itself])
def test_derivatives_where_inputs_depend_on_each_other(function, act):
    x, _, projections = operands((2, 2, 1), torch.float64, p=0.5, M=2, K=3, size=4, N=3)
    inputs = [t.requires_grad_() for t in (*trained(x, projections), projections[2].w)]

    def value(*given):
        return function(x, projections, act)

    dy = torch.randn(2, 3, dtype=torch.float64)
    plain, differentiable = (
        torch.autograd.grad(value(), inputs, dy, create_graph=flag, materialize_grads=True)
        for flag in (False, True)
    )
    close(differentiable, plain, 1e-12)
    assert gradcheck(value, inputs)
    assert gradgradcheck(value, inputs)


def test_hooks_see_each_gradient_once():
    """Also where gradients are differentiated."""
    x, dy, projections = operands()
    seen = []
    for t in trained(x, projections):
        t.requires_grad_().register_hook(seen.append)
    y = gated.run(x, projections, "silu")
    grads = torch.autograd.grad(y, trained(x, projections), dy, create_graph=True)
    assert sorted(map(id, seen)) == sorted(map(id, grads))


def test_only_what_is_asked_for():
    """Every combination of trained factors: the same gradients, and none beside."""
    x, dy, projections = operands()
    full = all_of(gated.run, x, dy, projections, "silu")[1:]
    names = trained(x, projections)
    for asked in itertools.product((False, True), repeat=len(names)):
        if not any(asked):
            continue
        for t, flag in zip(names, asked, strict=True):
            t.requires_grad_(flag)
        y = gated.run(x, projections, "silu")
        wanted = [t for t, flag in zip(names, asked, strict=True) if flag]
        grads = iter(torch.autograd.grad(y, wanted, dy))
        for expected, flag in zip(full, asked, strict=True):
            if flag:
                torch.testing.assert_close(next(grads), expected, rtol=1e-5, atol=1e-5)
    for t in names:
        t.requires_grad_(False)
    assert not gated.run(x, projections, "silu").requires_grad


def test_what_is_kept_for_backward():
    """x, gate(x), up(x) and the small s: nothing else of their width."""
    x, _, projections = operands()
    for t in trained(x, projections):
        t.requires_grad_()
    held = {t.data_ptr() for p in projections for t in p if isinstance(t, torch.Tensor)}
    kept = {}

    def pack(t):
        if t.data_ptr() not in held:
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gated.run(x, projections, "silu")
    assert sum(kept.values()) == 120 * (64 + 2 * 96 + 3 + 2 + 4)


def test_the_kernels_of_the_product(monkeypatch):
    """The same results where the elementwise part is a Triton kernel."""
    import fastlora_kernels

    calls = []
    for name in ("gated", "gated_backward"):
        own = getattr(fastlora_kernels, name)

        def counted(*args, own=own, **kwargs):
            calls.append(own.__name__)
            return own(*args, **kwargs)

        monkeypatch.setattr(fastlora_kernels, name, counted)
    monkeypatch.setattr(gated, "_kernels", lambda *tensors: fastlora_kernels)
    for act in PLAIN:
        x, dy, projections = operands()
        found = all_of(gated.run, x, dy, projections, act)
        expected = all_of(formula, x, dy, projections, act)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert set(calls) == {"gated", "gated_backward"}


# Modules of that form


class MLP(nn.Module):
    """Gated by what ``act`` says; subclasses are what only looks like it."""

    def __init__(self, act=None, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.open = (nn.Linear(6, 8, bias=bias) for _ in range(2))
        self.out = nn.Linear(8, 6, bias=bias)
        self.act = act or nn.SiLU()

    def forward(self, x):
        return self.out(self.wide(x) * self.act(self.open(x)))


class Dropping(MLP):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.out(self.dropout(self.wide(x) * self.act(self.open(x))))


class Residual(MLP):
    def forward(self, x):
        return x + super().forward(x)


class Training(MLP):
    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


class Scaled(MLP):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.scale


class Normed(MLP):
    def __init__(self):
        super().__init__(nn.Sequential(nn.LayerNorm(8), nn.SiLU()))


class Sized(MLP):
    def forward(self, x):
        return super().forward(x).reshape(*x.shape[:-1], 6)


class Both(MLP):
    def forward(self, x):
        return super().forward(x), None


class Fourth(MLP):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, 6)

    def forward(self, x):
        return self.other(self.wide(x) * self.act(self.open(x)))


class Clamped(MLP):
    def forward(self, x):
        return self.out(self.wide(x) * self.act(self.open(x).clamp(max=10.0)))


class Detached(MLP):
    def forward(self, x):
        return self.out(self.wide(x) * self.act(self.open(x)).detach())


class ByWeight(MLP):
    def forward(self, x):
        return F.linear(self.wide(x) * self.act(self.open(x)), self.out.weight, self.out.bias)


class Keeping(MLP):
    def forward(self, x):
        self.last = self.act(self.open(x))
        return self.out(self.wide(x) * self.last)


class Noting(MLP):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        return super().forward(x)


class Undropped(Dropping):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.0)


class OneToken(MLP):
    def forward(self, x):
        h = self.wide(x) * self.act(self.open(x))
        if x.dim() == 3 and x.shape[1] == 1:
            h = h * 2
        return self.out(h)


class Catching(MLP):
    def forward(self, x):
        try:
            return self.out(self.wide(x) * self.act(self.open(x)))
        except RuntimeError:
            return x


class Within(MLP):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.out(self.wide(x) * self.act(self.open(x)))


class Wrapped(MLP):
    @torch.enable_grad()
    def forward(self, x):
        return self.out(self.wide(x) * self.act(self.open(x)))


class Static(MLP):
    forward = functools.partialmethod(MLP.forward)


class Beside(MLP):
    def forward(self, x):
        noted = self.note(x)  # noqa: F841
        return self.out(self.wide(x) * self.act(self.open(x)))

    def note(self, x):
        self.noted = x


class Augmented(MLP):
    def forward(self, x):
        h = self.act(self.open(x))
        h *= self.wide(x)
        return self.out(h)


class Quick(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Swish(nn.SiLU):
    def forward(self, x):
        return F.silu(x) * 1.5


class Loud(nn.SiLU):
    def __call__(self, x):
        return super().__call__(x) * 1.5


class Unsubclassed(MLP):
    def __init_subclass__(cls):
        raise TypeError("no subclasses, please")


def watched():
    mlp = MLP()
    mlp.act.register_forward_hook(lambda module, args, y: y * 2)
    return mlp


def computing(forward, **attributes):
    """An MLP that computes something else with its layers wide, open and out, and act."""
    return type("Computing", (MLP,), {"forward": forward, **attributes})


LOOKALIKES = {
    "clamped": Clamped,
    "detached": Detached,
    "a weight alone": ByWeight,
    "keeps something": Keeping,
    "notes something": Noting,
    "dropout of none yet": Undropped,
    "no subclasses": Unsubclassed,
    "a hook on the activation": watched,
    "relu": lambda: MLP(nn.ReLU()),
    "no activation": lambda: MLP(nn.Identity()),
    "both activated": lambda: MLP(nn.Softplus()),
    "dropout": Dropping,
    "residual": Residual,
    "in training": Training,
    "a parameter": Scaled,
    "a norm": Normed,
    "its own sizes": Sized,
    "a tuple": Both,
    "a fourth layer": Fourth,
    "a factor": computing(lambda m, x: m.out(m.wide(x) * m.act(m.open(x))) * m.factor, factor=1),
    "a config": computing(
        lambda m, x: m.out(m.wide(x) * m.act(m.open(x) if m.limit is None else x)), limit=None
    ),
    "a shape": OneToken,
    "a mode": computing(
        lambda m, x: m.out(m.wide(x) * (m.act if torch.is_grad_enabled() else F.relu)(m.open(x)))
    ),
    "slices": computing(lambda m, x: sum(m.out(m.wide(x) * m.act(h)) for h in [m.open(x)])),
    "one index": computing(lambda m, x: m.out([m.wide(x) * m.act(m.open(x))][0])),
    "exceptions": Catching,
    "a context": Within,
    "a decorator": Wrapped,
    "a method made otherwise": Static,
    "a call beside": Beside,
    "a layer twice": computing(lambda m, x: m.out(m.wide(x) * m.act(m.wide(x)))),
    "in place": Augmented,
    "a sum": computing(lambda m, x: m.out(m.wide(x) + m.act(m.open(x)))),
    "a third factor": computing(lambda m, x: m.out(m.wide(x) * m.act(m.open(x)) * x.sum())),
    "another x": computing(lambda m, x: m.out(m.wide(x) * m.act(m.open(x.relu())))),
    "quick gelu": lambda: MLP(Quick()),
    "another silu": lambda: MLP(Swish()),
    "a silu called otherwise": lambda: MLP(Loud()),
    "in place silu": lambda: MLP(nn.SiLU(inplace=True)),
    "a formula of gelu": lambda: MLP(ACT2FN["gelu_new"]),
    "python's gelu": lambda: MLP(ACT2FN["gelu_python"]),
    "activations in a row": lambda: MLP(nn.Sequential(nn.SiLU())),
}
ACTS = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


def config(**changes):
    asked = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False, **changes}
    return LoRAConfig(**asked)


def pair(make=MLP, **changes):
    """A model of one MLP with adapters that do something, as it is and with siblings fused."""
    models = []
    for how in (False, X):
        model = nn.Sequential(make())
        torch.manual_seed(1)
        report = inject(model, config(**changes), fuse_siblings=how)
        models.append(model)
    return (*models, report)


def results(model, x=X, seed=2):
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = model(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)
    return [y, *(grad for grad in grads if grad is not None)]


def close(found, expected, tolerance=1e-4):
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.fixture
def runs(monkeypatch):
    """The activation of each MLP that ran as one operator."""
    found = []

    def counted(x, projections, activation, impl):
        y = own(x, projections, activation, impl)
        found.append(activation)
        return y

    own = gated.run
    monkeypatch.setattr(gated, "run", counted)
    return found


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("targets", [["wide", "open", "out"], ["open"], ["out"]], ids=str)
def test_the_same_outputs_gradients_and_dropout(act, p, targets, runs):
    """Whichever of the two is activated, and whichever has an adapter."""
    plain, fused, report = pair(lambda: MLP(ACTS[act]()), lora_dropout=p, target_modules=targets)
    assert report.gated_mlps == [("0", ("open", "wide", "out"))] and report.siblings == []
    assert "gated MLP: open, wide, out" in str(report)
    if p and len(targets) > 1:  # seeds are drawn for gate first, which this module calls second
        assert len(results(fused)) == len(results(plain))
    else:
        close(results(fused), results(plain))
    assert runs == [act]


@pytest.mark.parametrize("make", LOOKALIKES.values(), ids=LOOKALIKES)
def test_what_only_looks_like_one(make, runs):
    plain, model, report = patched(make)
    assert report.gated_mlps == []
    form, why = gated.form_of(make(), ("wide", "open"), lambda m: type(m) is nn.Linear)
    assert form is None and bool(why) == (make is not Fourth)
    for each in (plain.eval(), model.eval()):
        mlp = each.base_model.model[0]
        assert type(mlp) is type(make())
        own = mlp.forward
        mlp.forward = lambda x, own=own: own(x)[0] if isinstance(own(x), tuple) else own(x)
    close(results(model), results(plain))
    assert runs == []


def spelled(m, x):
    h = m.wide(x)
    x = torch.nn.functional.gelu(m.open(x), approximate=m.how)
    return m.out(x * h)


def named(m, x, *args, **kwargs):
    opened, wide = m.open(x), m.wide(x)
    return m.out(F.silu(opened) * wide)


Spelled = computing(spelled, how="tanh")
ACTIVATIONS = {
    "silu of transformers": (lambda: MLP(ACT2FN["silu"]), "silu"),
    "gelu of transformers": (lambda: MLP(ACT2FN["gelu"]), "gelu"),
    "gelu_tanh of transformers": (lambda: MLP(ACT2FN["gelu_pytorch_tanh"]), "gelu_tanh"),
    "a function": (lambda: MLP(F.silu), "silu"),
    "a builtin": (lambda: MLP(F.gelu), "gelu"),
    "a partial": (lambda: MLP(functools.partial(F.gelu, approximate="tanh")), "gelu_tanh"),
    "torch's": (computing(named), "silu"),
    "with an attribute": (Spelled, "gelu_tanh"),
    "with a constant": (
        computing(lambda m, x: m.out(F.gelu(m.open(x), approximate="tanh") * m.wide(x))),
        "gelu_tanh",
    ),
}


@pytest.mark.parametrize(("make", "act"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations(make, act, runs):
    plain, model, _ = patched(make)
    close(results(model), results(plain))
    assert runs == [act]


def test_looking_changes_nothing():
    """Neither the module, nor its modes, nor random numbers."""
    model = nn.Sequential(MLP(), Sized(), Dropping())
    model[0].act.train()
    before, state = bits(model), torch.get_rng_state()
    kept = [dict(vars(m)) for m in model.modules()]
    for module in model:
        gated.form_of(module, ("wide", "open"), lambda m: type(m) is nn.Linear)
    assert same(before, bits(model)) and torch.equal(state, torch.get_rng_state())
    assert kept == [vars(m) for m in model.modules()]


@pytest.mark.parametrize(
    ("name", "act"),
    [("Llama", "silu"), ("Qwen2", "silu"), ("Mistral", "silu"), ("Gemma", "gelu_tanh")],
)
def test_models_of_transformers(name, act, runs):
    model = decoder(name, **({"head_dim": 4} if name == "Gemma" else {}))
    plain = copy.deepcopy(model)
    for each, how in ((model, True), (plain, False)):
        torch.manual_seed(1)
        report = inject(each, config(target_modules=["up_proj", "down_proj"]), fuse_siblings=how)
        assert len(report.gated_mlps) == 2 * (how is True)
    losses = [each(input_ids=tokens(), labels=tokens()).loss for each in (model, plain)]
    torch.testing.assert_close(*losses)
    grads = [
        torch.autograd.grad(loss, [p for p in each.parameters() if p.requires_grad])
        for loss, each in zip(losses, (model, plain), strict=True)
    ]
    close(*grads)
    assert runs == [act] * 2


# What transformers calls the layers of gated MLPs, and its classes with such layers that compute
# something else: with 5.23 all of these, beside 145 that are gated MLPs.
NAMES = {"gate_proj", "up_proj", "down_proj"}, {"w1", "w2", "w3"}, {"wi_0", "wi_1", "wo"}
OTHERWISE = {
    "dropout": ["Gte", "T5Gemma", "T5Gemma2", "LongT5DenseGatedActDense", "SeedOss"],
    "branches": [
        *(f"{name}DenseGatedActDense" for name in ("T5", "MT5", "UMT5", "Udop", "Pop2Piano")),
        *("Pix2StructTextDenseGatedActDense", "Pix2StructVisionMlp", "Kosmos2_5VisionMlp"),
        "Gemma3nText",
    ],
    "UNARY_NEGATIVE": ["DeepseekV4", "Glm5NextText", "Glm5NextVision", "Step3p7"],
    "used once": ["Beam"],
    "ffn_sub_norm": ["BitNet"],
    "gate_multiplier": ["FalconH1"],
    "global_scale": ["Inkling"],
    "of x alone": ["DiffusionGemmaSelfConditioning"],
}


def classes_of_transformers():
    """Yield every class that calls three linear layers, found by its text, and their names."""
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for kind in re.finditer(r"^class (\w+)\(.*?(?=^\S|\Z)", path.read_text(), re.M | re.S):
            names = set(re.findall(r"self\.(\w+) = nn\.Linear\(", kind[0]))
            if len(names) == 3 and all(f"self.{name}(" in kind[0] for name in names):
                folder = f"transformers.models.{path.parent.name}"
                yield getattr(importlib.import_module(f"{folder}.{path.stem}"), kind[1]), names


def test_every_class_of_transformers():
    taken, reasons = set(), {}
    for kind, names in classes_of_transformers():
        form, why = gated._form(gated._code(kind))
        if form is None:
            reasons[kind.__name__] = why if names in NAMES else ""
            continue
        taken.add(kind.__name__)
        module = nn.Module.__new__(kind)  # its own constructor asks for a config
        nn.Module.__init__(module)
        gate, up, down = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 4)
        for name, layer in zip(form.names, (gate, up, down), strict=True):
            setattr(module, name, layer)
        if form.act.startswith("$self."):
            setattr(module, form.act.removeprefix("$self."), nn.SiLU())
        x = torch.randn(3, 4)
        assert torch.equal(module(x), down(F.silu(gate(x)) * up(x))), kind
    known = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Olmo2", "Helium")
    assert {f"{name}MLP" for name in known} <= taken and len(taken) > 100
    expected = {
        name if name in reasons else f"{name}MLP": why
        for why, several in OTHERWISE.items()
        for name in several
    }
    assert {name for name, why in reasons.items() if why} <= expected.keys()
    assert not expected.keys() & taken
    for name in expected.keys() & reasons:
        assert expected[name] in reasons[name]


def test_two_linear_layers_or_none_are_no_gated_mlp():
    """Phi-3 has one for gate and up, GPT-OSS stacks those of its experts: nothing is to be said."""
    for name in ("Phi3", "GptOss"):
        model = get_peft_model(decoder(name), LoraConfig(target_modules="all-linear"))
        report = patch_peft(model, fuse_siblings=True)
        assert report.gated_mlps == report.lookalikes == []


def test_a_model_with_dropout_in_its_mlps():
    model = t5()
    assert inject(model, config(), fuse_siblings=True).gated_mlps == []


# Where it has to run as it is


def swap_activation(model):
    model[0].act = nn.ReLU()


def swap_layer(model):
    model[0].out = nn.Linear(8, 6)


def own_forward(model):
    own = model[0].forward
    model[0].forward = lambda x: own(x) * 2


def layer_s_own_forward(model):
    own = model[0].open.forward
    model[0].open.forward = lambda x: own(x) * 2


CHANGES = {
    "another activation": swap_activation,
    "the activation's own": lambda m: setattr(m[0].act, "inplace", "changed"),
    "a hook on the activation": lambda m: m[0].act.register_forward_hook(lambda m, args, y: y * 2),
    "another layer": swap_layer,
    "a forward": own_forward,
    "a layer's forward": layer_s_own_forward,
    "hook before": lambda m: m[0].out.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "hook after": lambda m: m[0].open.register_forward_hook(lambda m, args, y: y * 2),
    "hook backward": lambda m: m[0].wide.register_full_backward_hook(lambda m, dx, dy: None),
    "merged": lambda m: m[0].wide.merge(),
    "disabled": lambda m: setattr(m[0].out, "disable_adapters", True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_has_changed_runs_as_it_is(change, runs):
    plain, fused, _ = pair()
    for model in (plain, fused):
        torch.manual_seed(5)
        change(model)
    with torch.no_grad():
        close([fused(X)], [plain(X)])
    assert runs == (["silu"] if change is own_forward else [])


class Heir(MLP):
    """Has its forward from its parent, a dropout that it never calls, and what it never reads."""

    def __init__(self):
        super().__init__()
        self.dropout, self.config = nn.Dropout(0.5), types.SimpleNamespace(limit=None)


def doubled(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 2


def other_code(patch, *mlps):
    def forward(self, x):
        return self.out(self.wide(x) * self.act(self.open(x)) * 2)

    patch.setattr(MLP.forward, "__code__", forward.__code__)


def other_layers(patch, *mlps):
    for mlp in mlps:
        kind = type(mlp.out)
        mlp.out.__class__ = type("Own", (kind,), {"forward": doubled(kind.forward)})


def other_attributes(patch, *mlps):
    def got(self, name):
        found = nn.Module.__getattr__(self, name)
        return doubled(found) if name == "open" else found

    patch.setattr(MLP, "__getattr__", got)


CALL = nn.Module.__call__
open_twice = property(lambda self: doubled(self._modules["open"]))
# What a forward loads changes, and nothing of what was looked at.
SINCE = {
    "the class's forward": lambda p, *_: p.setattr(Heir, "forward", doubled(MLP.forward)),
    "its parent's forward": lambda p, *_: p.setattr(MLP, "forward", doubled(MLP.forward)),
    "the forward's code": other_code,
    "an attribute before a layer": lambda p, *mlps: [
        vars(m).update(open=doubled(m.open)) for m in mlps
    ],
    "one of the class": lambda p, *_: p.setattr(MLP, "open", nn.Linear(6, 8), raising=False),
    "a property": lambda p, *_: p.setattr(MLP, "open", open_twice, raising=False),
    "how attributes are found": other_attributes,
    "a layer's class": other_layers,
    "the activation's class": lambda p, *mlps: [setattr(m.act, "__class__", Swish) for m in mlps],
    "the activation's forward": lambda p, *mlps: [
        setattr(m.act, "forward", doubled(m.act.forward)) for m in mlps
    ],
    "SiLU's forward": lambda p, *_: p.setattr(nn.SiLU, "forward", doubled(nn.SiLU.forward)),
    "SiLU's call": lambda p, *_: p.setattr(nn.SiLU, "__call__", doubled(nn.SiLU.__call__)),
    "every module's call": lambda p, *_: p.setattr(nn.Module, "__call__", doubled(CALL)),
    "torch's silu": lambda p, *_: p.setattr(F, "silu", doubled(F.silu)),
    "a function for the activation": lambda p, *mlps: [
        setattr(m, "act", F.relu) for m in mlps if m._modules.pop("act")
    ],
}


@pytest.mark.parametrize("change", SINCE.values(), ids=SINCE)
def test_what_a_forward_loads_is_looked_up_each_time(change, monkeypatch, runs):
    plain, model, _ = patched(Heir)
    patch_peft(plain)  # it calls the same modules then, and nothing within them
    before = model(X)
    close([before], [plain(X)])
    assert runs == ["silu"]
    torch.manual_seed(3)
    change(monkeypatch, *(each.base_model.model[0] for each in (plain, model)))
    after = model(X)
    close([after], [plain(X)])
    assert runs == ["silu"] and not torch.allclose(before, after, rtol=0.1)


def test_an_activation_that_changes_is_followed(runs):
    plain, model, _ = patched(Spelled)
    for how in ("tanh", "none"):
        for each in (plain, model):
            each.base_model.model[0].how = how
        close(results(model), results(plain), 1e-6)
    assert runs == ["gelu_tanh", "gelu"]


def test_what_a_forward_does_not_load_is_free(runs):
    """Other attributes and children, and hooks on those."""
    plain, model, _ = patched(Heir)
    for each in (plain, model):
        mlp = each.base_model.model[0]
        mlp.config.limit, mlp.open_too = 0.1, 3.0
        mlp.dropout.register_forward_hook(lambda m, args, y: y * 2)
        mlp.add_module("more", nn.Identity())
    close(results(model.train()), results(plain.train()))
    assert runs == ["silu"]


def test_the_report_says_why_not():
    """Once for each class, where two layers share x and one more is there."""
    made = [Clamped(), Clamped(), OneToken(), MLP(nn.ReLU()), MLP(), nn.Linear(6, 6)]
    model = get_peft_model(nn.Sequential(*made), LoraConfig(target_modules=["open"]))
    report = patch_peft(model, fuse_siblings={"input": X})
    assert report.lookalikes == [
        ("Clamped", "its forward is out((act(open(x).clamp(max=10.0)) * wide(x)))"),
        ("OneToken", "its forward branches"),
        ("MLP", "its activation is ReLU"),
    ]
    assert "  not as one operator: OneToken (its forward branches)" in str(report).splitlines()
    assert [name for name, _ in report.gated_mlps] == ["base_model.model.4"]


def test_reasons_that_are_the_module_s_own():
    hidden, own = MLP(), MLP()
    vars(hidden)["open"], own.forward = nn.Linear(6, 8), own.forward
    whys = [
        gated.form_of(mlp, pair, lambda m: type(m) is nn.Linear)[1]
        for mlp, pair in (
            (hidden, ("wide", "open")),
            (own, ("wide", "open")),
            (MLP(), ("open", "out")),
            (Fourth(), ("wide", "open")),
        )
    ]
    of_others = "its forward calls open, wide, out"
    assert whys == ["something hides its layers", "it has a forward of its own", of_others, ""]


def test_patched_twice(runs):
    """Again is harmless, and once is enough to take it back."""
    plain, model = wrapped(["open", "out"]), wrapped(["open", "out"])
    kinds = [type(m) for m in model.modules()]
    for _ in range(2):
        patch_peft(model, fuse_siblings={"input": X})
    close(results(model), results(plain))
    unpatch_peft(model)
    assert [type(m) for m in model.modules()] == kinds and runs == ["silu"]
    close(results(model), results(plain))


def test_another_instance_of_the_class(runs):
    _, fused, _ = pair()
    torch.manual_seed(0)
    again = type(fused[0])()
    close([again(X)], [MLP()(X)])
    assert runs == []


def test_a_child_that_is_none(runs):
    def make():
        mlp = MLP()
        mlp.register_module("nothing", None)
        return mlp

    plain, fused, _ = pair(make)
    close(results(fused), results(plain))
    assert runs == ["silu"]


def test_forward_mode_derivatives(runs):
    plain, fused, _ = pair()
    found = []
    for model in (fused, plain):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
            found.append(torch.autograd.forward_ad.unpack_dual(model(dual)).tangent)
    close(found[:1], found[1:])
    assert runs == [] and found[1].abs().max() > 0.1


@pytest.mark.parametrize("name", ["foo", "triton"])
def test_what_is_forced_is_checked(name, monkeypatch):
    from fastlora.operator import plans

    plain, fused, _ = pair()
    monkeypatch.setattr(plans, "FORCED", name)
    monkeypatch.setattr(plans, "triton_unusable", lambda device: "not today")
    said = []
    for model in (plain, fused):
        with pytest.raises((ValueError, RuntimeError)) as error:
            model(X)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_seeds_are_drawn_once_where_something_looks_on():
    """Plain layers draw the same masks then."""
    plain, fused, _ = pair(lora_dropout=0.5, target_modules=["out"])
    found = []
    for model in (plain, fused):
        torch.manual_seed(3)
        with FlopCounterMode(display=False, custom_mapping=FORMULAS):
            found.append(model(X))
    close(found[:1], found[1:])


def test_hooks_on_the_whole_run(runs):
    plain, fused, _ = pair()
    for model in (plain, fused):
        model[0].register_forward_hook(lambda m, args, y: y * 2)
        model[0].register_full_backward_hook(lambda m, dx, dy: (dx[0] * 3,))
    close(results(fused), results(plain))
    assert runs == ["silu"]


def test_a_class_whose_forward_is_replaced(runs, monkeypatch):
    """As libraries that patch transformers do."""
    plain, fused, _ = pair()
    monkeypatch.setattr(MLP, "forward", lambda self, x: self.out(self.wide(x)))
    with torch.no_grad():
        close([fused(X)], [plain(X)])
    assert runs == []


def test_compiled_observed_and_transformed(runs):
    plain, fused, _ = pair()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    close([compiled(X)], [plain(X)])
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        fused(X)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as expected:
        plain(X)
    assert counter.get_total_flops() == expected.get_total_flops() > 0
    jacobians = [torch.func.jacrev(model)(X) for model in (fused, plain)]
    close(jacobians[:1], jacobians[1:])
    assert runs == []


def test_what_a_layer_would_refuse(runs):
    plain, fused, _ = pair()
    for wrong in (torch.ones(3, 5), X.double(), X.long()):
        said = []
        for model in (plain, fused):
            with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
                model(wrong)
            said.append(str(error.value))
        assert said[0] == said[1]
    assert runs == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, runs):
    plain, fused, _ = pair(lora_dropout=0.4, target_modules=["open", "out"])
    found = []
    for model, again in ((plain, False), (fused, True)):
        torch.manual_seed(2)
        x = X.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    close(*found)
    # Without reentry forward ends where backward has what it needs: before the output.
    assert runs == ["silu"] * (2 if reentrant else 1)


@pytest.mark.parametrize("shape", [(6,), (2, 3, 6), (0, 6), (2, 0, 6)])
def test_any_leading_dimensions(shape, runs):
    plain, fused, _ = pair()
    x = torch.randn(shape)
    close(results(fused, x), results(plain, x))
    assert runs == ["silu"]


def test_autocast_and_sixteen_bits(runs):
    plain, fused, _ = pair()
    with torch.autocast("cpu", torch.bfloat16):
        close(results(fused), results(plain), 5e-2)
        assert fused(X).dtype == torch.bfloat16
    half = [model.to(torch.bfloat16) for model in (fused, plain)]
    close(*(results(model, X.bfloat16()) for model in half), 0.1)
    assert runs == ["silu"] * 3


def test_several_adapters(runs):
    plain, fused, _ = pair()
    for model in (plain, fused):
        torch.manual_seed(6)
        inject(model, config(r=2, target_modules=["open"]), "other")
        fastlora.set_adapter(model, ["default", "other"])
    close(results(fused), results(plain))
    assert runs == ["silu"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(how, runs):
    plain, fused, _ = pair()
    copied = how(fused)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    close(results(copied), results(plain))
    assert runs == ["silu"] and type(copied[0]) is type(fused[0])
    assert isinstance(copied[0], MLP)
    copied[0].act = nn.ReLU()
    copied(X)
    assert runs == ["silu"]


# Under PEFT


def wrapped(targets, make=MLP, **changes):
    torch.manual_seed(1)
    asked = LoraConfig(r=3, target_modules=targets, init_lora_weights=False, **changes)
    return get_peft_model(nn.Sequential(make()), asked)


def patched(make=MLP, **changes):
    """A model of one MLP whose three layers have adapters, as it is and patched; the report."""
    plain, model = (wrapped(["wide", "open", "out"], make, **changes) for _ in range(2))
    return plain, model, patch_peft(model, fuse_siblings={"input": X})


def tie(mlp):
    """Have gate and up share A, and the output train beside what made x."""
    mlp.wide.lora_A = mlp.open.lora_A


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("change", [tie, lambda mlp: None], ids=["tied", "own"])
def test_gradients_that_will_be_differentiated(p, times, change, runs):
    """With and without create_graph they are the same: used twice, and with one A for two."""
    plain, model, _ = patched(lora_dropout=p)
    found = []
    for each in (plain, model):
        each.double().train()
        change(each.base_model.model[0])
        wanted = [q for q in each.parameters() if q.requires_grad]
        for create_graph in (False, True):
            torch.manual_seed(2)
            y = X.double()
            for _ in range(times):
                y = each(y)
            grads = torch.autograd.grad(y.square().sum(), wanted, create_graph=create_graph)
            found.append(list(grads))
        found.append(list(torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)))
    first, again, second, mine, mine_again, mine_second = found
    close([*mine_again], mine, 1e-10)
    if not p:  # the modules draw their seeds in another order
        close([*first, *again, *second], [*mine, *mine_again, *mine_second], 1e-10)
    assert runs == ["silu"] * 2 * times


@pytest.mark.parametrize("targets", [["wide", "open", "out"], ["out"], ["open"]], ids=str)
def test_under_peft(targets, runs):
    plain, model = wrapped(targets), wrapped(targets)
    kinds, keys = [type(m) for m in model.modules()], list(model.state_dict())
    report = patch_peft(model, fuse_siblings={"input": X})
    assert report.gated_mlps == [("base_model.model.0", ("open", "wide", "out"))]
    assert "gated MLP: open, wide, out" in str(report)
    close(results(model), results(plain))
    with model.disable_adapter(), plain.disable_adapter():
        close([model(X)], [plain(X)])
    assert runs == ["silu"] and list(model.state_dict()) == keys
    unpatch_peft(model)
    assert [type(m) for m in model.modules()] == kinds
    assert not any("gated" in key for m in model.modules() for key in vars(m))
    close(results(model), results(plain))
    assert runs == ["silu"]


def test_sharded_and_taken_back(one_process, runs):
    plain, model = wrapped(["open", "out"]), wrapped(["open", "out"])
    patch_peft(model, fuse_siblings={"input": X})
    mlp = model.base_model.model[0]
    fully_shard(mlp)
    fully_shard(model)
    assert type(mlp).__name__ == "FSDPFusedMLP"
    with torch.no_grad():
        close([model(X)], [plain(X)])
        assert runs == ["silu"]
        unpatch_peft(model)
        assert type(mlp).__name__ == "FSDPMLP" and type(mlp).__bases__[1] is MLP
        close([model(X)], [plain(X)])
    assert runs == ["silu"] and type(mlp.wide) is nn.Linear


def test_frozen_layers_are_those_of_the_model():
    _, fused, _ = pair(target_modules=["out"])
    assert type(fused[0].wide) is type(fused[0].open) is FrozenLinear
    assert llama().dummy_inputs and op.unobserved(X)
