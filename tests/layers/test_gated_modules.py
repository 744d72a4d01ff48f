# SPDX-License-Identifier: Apache-2.0
"""Modules that are gated MLPs run as one operator; those that only look like it run as they are."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
import re
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import decoder, t5
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

from fastlora import patch_peft, unpatch_peft
from fastlora.flops import FORMULAS
from fastlora.layers import gated
from fastlora.operator import plans

X = torch.linspace(-2, 2, 18).reshape(3, 6)
ALL = ("wide", "open", "out")


class MLP(nn.Module):
    """Gated by what ``act`` says; subclasses are what only looks like it."""

    def __init__(self, act=None):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.open = (nn.Linear(6, 8) for _ in range(2))
        self.out = nn.Linear(8, 6)
        self.act = act or nn.SiLU()

    def forward(self, x):
        return self.out(self.wide(x) * self.act(self.open(x)))


def computing(forward, **attributes):
    """An MLP that computes something else with its layers wide, open and out, and act."""
    return type("Computing", (MLP,), {"forward": forward, **attributes})


class Dropping(MLP):
    def __init__(self, p=0.1):
        super().__init__()
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        return self.out(self.dropout(self.wide(x) * self.act(self.open(x))))


class Fourth(MLP):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, 6)

    def forward(self, x):
        return self.other(self.wide(x) * self.act(self.open(x)))


class Clamped(MLP):
    def forward(self, x):
        return self.out(self.wide(x) * self.act(self.open(x).clamp(max=10.0)))


class OneToken(MLP):
    def forward(self, x):
        h = self.wide(x) * self.act(self.open(x))
        if x.dim() == 3 and x.shape[1] == 1:
            h = h * 2
        return self.out(h)


def keeping(m, x):
    m.last = m.act(m.open(x))
    return m.out(m.wide(x) * m.last)


def caught(m, x):
    try:
        return m.out(m.wide(x) * m.act(m.open(x)))
    except RuntimeError:
        return x


def within(m, x):
    with torch.autocast("cpu", enabled=False):
        return m.out(m.wide(x) * m.act(m.open(x)))


def beside(m, x):
    noted = m.note(x)  # noqa: F841
    return m.out(m.wide(x) * m.act(m.open(x)))


def augmented(m, x):
    h = m.act(m.open(x))
    h *= m.wide(x)
    return m.out(h)


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


LOOKALIKES = {
    "clamped": Clamped,
    "detached": computing(lambda m, x: m.out(m.wide(x) * m.act(m.open(x)).detach())),
    "keeps something": computing(keeping),
    "dropout": Dropping,
    "dropout of none yet": lambda: Dropping(0.0),
    "no subclasses": Unsubclassed,
    "a hook on the activation": watched,
    "relu": lambda: MLP(nn.ReLU()),
    "residual": computing(lambda m, x: x + m.out(m.wide(x) * m.act(m.open(x)))),
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
    "exceptions": computing(caught),
    "a context": computing(within),
    "a decorator": computing(torch.enable_grad()(MLP.forward)),
    "a method made otherwise": computing(functools.partialmethod(MLP.forward)),
    "a call beside": computing(beside, note=lambda m, x: None),
    "a layer twice": computing(lambda m, x: m.out(m.wide(x) * m.act(m.wide(x)))),
    "in place": computing(augmented),
    "a sum": computing(lambda m, x: m.out(m.wide(x) + m.act(m.open(x)))),
    "another x": computing(lambda m, x: m.out(m.wide(x) * m.act(m.open(x.relu())))),
    "quick gelu": lambda: MLP(Quick()),
    "another silu": lambda: MLP(Swish()),
    "a silu called otherwise": lambda: MLP(Loud()),
    "in place silu": lambda: MLP(nn.SiLU(inplace=True)),
    "a formula of gelu": lambda: MLP(ACT2FN["gelu_new"]),
}


def wrapped(make=MLP, targets=ALL, **changes):
    torch.manual_seed(1)
    asked = {"r": 3, "init_lora_weights": False, "target_modules": list(targets), **changes}
    return get_peft_model(nn.Sequential(make()), LoraConfig(**asked)).train()


def pair(make=MLP, targets=ALL, **changes):
    """A patched model of one MLP twice: its layers alone, and as one operator; the report."""
    plain, model = (wrapped(make, targets, **changes) for _ in range(2))
    patch_peft(plain)
    report = patch_peft(model, fuse_siblings={"input": X})
    return plain.base_model.model, model.base_model.model, report


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
    found, own = [], gated.run

    def counted(x, projections, activation, impl):
        y = own(x, projections, activation, impl)
        found.append(activation)
        return y

    monkeypatch.setattr(gated, "run", counted)
    return found




# Which modules are one


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("targets", [ALL, ["open"], ["out"]], ids=str)
def test_the_same_outputs_gradients_and_dropout(p, targets, runs):
    """Whichever of the two is activated, and whichever has an adapter."""
    plain, fused, report = pair(targets=targets, lora_dropout=p)
    assert report.gated_mlps == [("base_model.model.0", ("open", "wide", "out"))]
    assert report.siblings == [] and "gated MLP: open, wide, out" in str(report)
    if p and len(targets) > 1:  # seeds are drawn for gate first, which this module calls second
        assert len(results(fused)) == len(results(plain))
    else:
        close(results(fused), results(plain))
    assert runs == ["silu"]


@pytest.mark.parametrize("make", LOOKALIKES.values(), ids=LOOKALIKES)
def test_what_only_looks_like_one(make, runs):
    plain, model = wrapped(make), wrapped(make)
    assert patch_peft(model, fuse_siblings={"input": X}).gated_mlps == []
    names, why = gated.read(make())
    assert (names == ()) == (make is not Fourth)
    assert type(model.base_model.model[0]) is type(make())
    close(results(model.eval()), results(plain.eval()))
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
    "SiLU": (lambda: MLP(nn.SiLU()), "silu"),
    "GELU": (lambda: MLP(nn.GELU()), "gelu"),
    "tanh": (lambda: MLP(nn.GELU(approximate="tanh")), "gelu_tanh"),
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
    plain, model, _ = pair(make)
    close(results(model), results(plain))
    assert runs == [act]


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
        formula = gated._formula(kind.forward.__code__)
        found, why = gated._GATED.fullmatch(formula), formula
        if found is None:
            reasons[kind.__name__] = why if names in NAMES else ""
            continue
        taken.add(kind.__name__)
        module = nn.Module.__new__(kind)  # its own constructor asks for a config
        nn.Module.__init__(module)
        gate, up, down = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 4)
        d, act, g, _, _, u = found.groups()
        for name, layer in zip((g, u, d), (gate, up, down), strict=True):
            setattr(module, name, layer)
        if act.startswith("$self."):
            setattr(module, act.removeprefix("$self."), nn.SiLU())
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


def test_nothing_to_be_said():
    """Phi-3 has one for gate and up, GPT-OSS stacks those of its experts, T5 drops in between."""
    for model in (decoder("Phi3"), decoder("GptOss"), t5()):
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        report = patch_peft(model, fuse_siblings=True)
        assert report.gated_mlps == report.lookalikes == []


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
    hidden, own = MLP(), MLP()
    vars(hidden)["open"], own.forward = nn.Linear(6, 8), own.forward
    assert form_of(hidden)[1] == "something hides its layers"
    assert form_of(own)[1] == "it has a forward of its own"
    assert form_of(MLP(), ("open", "out"))[1] == "its forward calls open, wide, out"


# Where it has to run as it is


class Heir(MLP):
    """Has its forward from its parent, a dropout that it never calls, and what it never reads."""

    def __init__(self):
        super().__init__()
        self.dropout, self.config = nn.Dropout(0.5), types.SimpleNamespace(limit=None)


def hooked(module):
    module.register_forward_hook(lambda m, args, y: y * 2)


def doubled(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 2


def other_code(patch, mlp):
    def forward(self, x):
        return self.out(self.wide(x) * self.act(self.open(x)) * 2)

    patch.setattr(MLP.forward, "__code__", forward.__code__)


def other_attributes(patch, mlp):
    def got(self, name):
        found = nn.Module.__getattr__(self, name)
        return doubled(found) if name == "open" else found

    patch.setattr(MLP, "__getattr__", got)


def other_class(patch, mlp):
    kind = type(mlp.out)
    mlp.out.__class__ = type("Own", (kind,), {"forward": doubled(kind.forward)})


CALL = nn.Module.__call__
OPEN_TWICE = property(lambda self: doubled(self._modules["open"]))
# What a forward loads changes, and nothing of what was looked at.
CHANGES = {
    "another activation": lambda p, m: setattr(m, "act", nn.ReLU()),
    "the activation's own": lambda p, m: setattr(m.act, "inplace", "changed"),
    "a hook on the activation": lambda p, m: hooked(m.act),
    "another layer": lambda p, m: setattr(m, "out", nn.Linear(8, 6)),
    "a layer's forward": lambda p, m: setattr(m.open, "forward", doubled(m.open.forward)),
    "hook before": lambda p, m: m.out.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "hook after": lambda p, m: hooked(m.open),
    "hook backward": lambda p, m: m.wide.register_full_backward_hook(lambda m, dx, dy: None),
    "merged": lambda p, m: m.wide.merge(),
    "disabled": lambda p, m: m.out.enable_adapters(False),
    "the class's forward": lambda p, m: p.setattr(Heir, "forward", doubled(MLP.forward)),
    "its parent's forward": lambda p, m: p.setattr(MLP, "forward", doubled(MLP.forward)),
    "the forward's code": other_code,
    "an attribute before a layer": lambda p, m: vars(m).update(open=doubled(m.open)),
    "one of the class": lambda p, m: p.setattr(MLP, "open", nn.Linear(6, 8), raising=False),
    "a property": lambda p, m: p.setattr(MLP, "open", OPEN_TWICE, raising=False),
    "how attributes are found": other_attributes,
    "a layer's class": other_class,
    "the activation's class": lambda p, m: setattr(m.act, "__class__", Swish),
    "the activation's forward": lambda p, m: setattr(m.act, "forward", doubled(m.act.forward)),
    "SiLU's forward": lambda p, m: p.setattr(nn.SiLU, "forward", doubled(nn.SiLU.forward)),
    "SiLU's call": lambda p, m: p.setattr(nn.SiLU, "__call__", doubled(nn.SiLU.__call__)),
    "every module's call": lambda p, m: p.setattr(nn.Module, "__call__", doubled(CALL)),
    "torch's silu": lambda p, m: p.setattr(F, "silu", doubled(F.silu)),
    "a function for the activation": lambda p, m: (m._modules.pop("act"), setattr(m, "act", abs)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_forward_loads_is_looked_up_each_time(change, runs):
    """What the module does then is what the same module does that was never looked at."""
    plain, model = wrapped(Heir), wrapped(Heir)
    patch_peft(plain)  # it calls the same modules then, and nothing within them
    patch_peft(model, fuse_siblings={"input": X})
    close([model(X)], [plain(X)])
    assert runs == ["silu"]
    found = []
    for each in (model, plain):
        with pytest.MonkeyPatch.context() as patch:
            torch.manual_seed(3)
            change(patch, each.base_model.model[0])
            found.append(each(X))
    close(found[:1], found[1:])
    assert runs == ["silu"]


def test_what_a_forward_does_not_load_is_free(runs):
    """Other attributes and children, and hooks on those; hooks on the whole run."""
    plain, fused, _ = pair(Heir)
    for model in (plain, fused):
        mlp = model[0]
        mlp.config.limit, mlp.open_too = 0.1, 3.0
        hooked(mlp.dropout)
        mlp.add_module("more", nn.Identity())
        mlp.register_module("nothing", None)
        hooked(mlp)
        mlp.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 3,))
    close(results(fused), results(plain))
    plain, fused, _ = pair(Spelled)
    for how in ("tanh", "none"):  # an activation that changes is followed
        for model in (plain, fused):
            model[0].how = how
        close(results(fused), results(plain), 1e-6)
    for model in (plain, fused):  # a forward of the object's own may call that of its class
        model[0].forward = doubled(model[0].forward)
    close(results(fused), results(plain))
    assert runs == ["silu", "gelu_tanh", "gelu", "gelu"]


def test_observed_and_transformed(runs):
    plain, fused, _ = pair(lora_dropout=0.5, targets=["out"])
    compiled = torch.compile(fused.eval(), backend="aot_eager", fullgraph=True)
    close([compiled(X)], [plain.eval()(X)])
    jacobians = [torch.func.jacrev(model)(X) for model in (fused, plain)]
    close(jacobians[:1], jacobians[1:])
    found, tangents, flops = [], [], []
    for model in (fused.train(), plain.train()):
        torch.manual_seed(3)  # seeds are drawn once: plain layers draw the same masks then
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            found.append(model(X))
        flops.append(counter.get_total_flops())
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
            torch.manual_seed(3)
            tangents.append(torch.autograd.forward_ad.unpack_dual(model(dual)).tangent)
    close(found[:1], found[1:])
    close(tangents[:1], tangents[1:])
    assert runs == [] and tangents[1].abs().max() > 0.1 and flops[0] == flops[1] > 0


@pytest.mark.parametrize("name", ["foo", "triton", "eager", "reference"])
def test_what_is_forced(name, monkeypatch, runs):
    plain, fused, _ = pair()
    monkeypatch.setattr(plans, "FORCED", name)
    monkeypatch.setattr(plans, "triton_unusable", lambda device: "not today")
    said = []
    for model in (plain, fused):
        try:
            said.append(model(X))
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    if name in ("foo", "triton"):
        assert said[0] == said[1]
    else:
        close(said[:1], said[1:])
    assert runs == []


def test_what_a_layer_would_refuse_and_few_tokens(runs, few):
    plain, fused, _ = pair()
    for wrong in (torch.ones(3, 5), X.double(), X.long()):
        said = []
        for model in (plain, fused):
            with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
                model(wrong)
            said.append(str(error.value))
        assert said[0] == said[1]
    close(results(fused), results(plain))
    assert runs == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, runs):
    plain, fused, _ = pair(lora_dropout=0.4, targets=["open", "out"])
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
    assert runs == ["silu"] * (x.numel() > 0)


def test_autocast_sixteen_bits_and_several_adapters(runs):
    plain, fused, _ = pair()
    with torch.autocast("cpu", torch.bfloat16):
        close(results(fused), results(plain), 5e-2)
        assert fused(X).dtype == torch.bfloat16
    half = [copy.deepcopy(model).to(torch.bfloat16) for model in (fused, plain)]
    close(*(results(model, X.bfloat16()) for model in half), 0.1)
    assert runs == ["silu"] * 3
    models = wrapped(), wrapped()
    for model in models:
        torch.manual_seed(6)
        asked = LoraConfig(r=2, target_modules=["open"], init_lora_weights=False)
        model.add_adapter("other", asked)
        model.base_model.set_adapter(["default", "other"])
    patch_peft(models[0], fuse_siblings={"input": X})
    close(*map(results, models))
    assert runs == ["silu"] * 4


# Copies, and taken back


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
    torch.manual_seed(0)
    close([type(fused[0])()(X)], [MLP()(X)])  # another instance of the class
    assert runs == ["silu"]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_that_will_be_differentiated(p, times, tied, runs):
    """With and without create_graph they are the same: used twice, and with one A for two."""
    plain, fused, _ = pair(lora_dropout=p)
    found = []
    for each in (plain, fused):
        each.double().train()
        if tied:
            each[0].wide.lora_A = each[0].open.lora_A
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


@pytest.mark.parametrize("targets", [ALL, ["out"], ["open"]], ids=str)
def test_under_peft(targets, runs):
    """As PEFT's own; a second patch is harmless, and once is enough to take both back."""
    plain, model = wrapped(targets=targets), wrapped(targets=targets)
    kinds, keys = [type(m) for m in model.modules()], list(model.state_dict())
    for _ in range(2):
        patch_peft(model, fuse_siblings={"input": X})
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
    plain, model = (wrapped(targets=["open", "out"]) for _ in range(2))
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
