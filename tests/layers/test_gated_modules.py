# SPDX-License-Identifier: Apache-2.0
"""Modules that are gated MLPs run as one operator; those that only look like it run as they are."""

import functools
import importlib
import re
from operator import attrgetter
from pathlib import Path

import pytest
import sibling_models
import torch
import torch.nn.functional as F
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft_models import add
from sibling_models import COPIES, X, added, close, results, said_by, wrapped
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

from fastlora import patch_peft, unpatch_peft
from fastlora.flops import FORMULAS
from fastlora.layers import gated
from fastlora.operator import plans

ALL = ("wide", "open", "out")


class MLP(nn.Module):
    """Gated by what ``act`` says; subclasses are what only looks like it."""

    limit, factor, how, note = None, 1, "tanh", abs

    def __init__(self, act=None):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.open = (nn.Linear(6, 8) for _ in range(2))
        self.out = nn.Linear(8, 6)
        self.act = act or nn.SiLU()
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        return self.out(self.wide(x) * self.act(self.open(x)))


def computing(*lines):
    """An MLP whose forward of m and x has these lines, or one expression."""
    body = lines if len(lines) > 1 else [f"return {lines[0]}"]
    made = {}
    exec("\n ".join(["def forward(m, x, *args, **kwargs):", *body]), globals(), made)
    return type("Computing", (MLP,), made)


def having(forward):
    return type("Having", (MLP,), {"forward": forward})


class Swish(nn.SiLU):
    def forward(self, x):
        return F.silu(x) * 1.5


class Loud(nn.SiLU):
    def __call__(self, x):
        return super().__call__(x) * 1.5


def hooked(module):
    module.register_forward_hook(lambda m, args, y: y * 2)
    return module


H = "m.wide(x) * m.act(m.open(x))"
LOOKALIKES = {
    "clamped": computing("m.out(m.wide(x) * m.act(m.open(x).clamp(max=10.0)))"),
    "detached": computing("m.out(m.wide(x) * m.act(m.open(x)).detach())"),
    "keeps something": computing("m.last = m.act(m.open(x))", "return m.out(m.wide(x) * m.last)"),
    "dropout of none yet": computing(f"m.out(m.dropout({H}))"),
    "residual": computing(f"x + m.out({H})"),
    "a factor": computing(f"m.out({H}) * m.factor"),
    "a config": computing("m.out(m.wide(x) * m.act(m.open(x) if m.limit is None else x))"),
    "a shape": computing(f"h = {H}", "if x.dim() == 3: h = h * 2", "return m.out(h)"),
    "no branch": computing("m.out(m.wide(x) * (m.act, F.relu)[x.dim() == 3](m.open(x)))"),
    "a function within": computing(f"(lambda h: m.out(h if m.limit is None else x))({H})"),
    "slices": computing("sum(m.out(m.wide(x) * m.act(h)) for h in [m.open(x)])"),
    "one index": computing(f"m.out([{H}][0])"),
    "exceptions": computing(f"try: return m.out({H})", "except RuntimeError: return x"),
    "a context": computing("with torch.autocast('cpu', enabled=False):", f" return m.out({H})"),
    "a call beside": computing("n = m.note(x)", f"return m.out({H})"),
    "in place": computing("h = m.act(m.open(x))", "h *= m.wide(x)", "return m.out(h)"),
    "a sum": computing("m.out(m.wide(x) + m.act(m.open(x)))"),
    "another x": computing("m.out(m.wide(x) * m.act(m.open(x.relu())))"),
    "a decorator": having(torch.enable_grad()(MLP.forward)),
    "a method made otherwise": having(functools.partialmethod(MLP.forward)),
    "a hook on the activation": lambda: MLP(hooked(nn.SiLU())),
    "relu": lambda: MLP(nn.ReLU()),
    "another silu": lambda: MLP(Swish()),
    "a silu called otherwise": lambda: MLP(Loud()),
    "in place silu": lambda: MLP(nn.SiLU(inplace=True)),
    "a formula of gelu": lambda: MLP(ACT2FN["gelu_new"]),
}


def pair(make=MLP, targets=ALL, **changes):
    return sibling_models.pair(make, targets, X, **changes)


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


@pytest.mark.parametrize("make", LOOKALIKES.values(), ids=LOOKALIKES)
def test_what_only_looks_like_one(make, runs):
    plain, model = wrapped(make, ALL), wrapped(make, ALL)
    assert patch_peft(model, fuse_siblings=X).gated_mlps == []
    assert gated.read(make())[0] == () and not hasattr(model.base_model.model, "_stands_for")
    close(results(model), results(plain))
    assert runs == []


GELU = "x = torch.nn.functional.gelu(m.open(x), approximate=m.how)"
Spelled = computing("h = m.wide(x)", GELU, "return m.out(x * h)")
ACTIVATIONS = [
    (lambda: MLP(nn.SiLU()), "silu"),
    (lambda: MLP(nn.GELU()), "gelu"),
    (lambda: MLP(nn.GELU(approximate="tanh")), "gelu_tanh"),
    (lambda: MLP(ACT2FN["silu"]), "silu"),
    (lambda: MLP(ACT2FN["gelu"]), "gelu"),
    (lambda: MLP(ACT2FN["gelu_pytorch_tanh"]), "gelu_tanh"),
    (lambda: MLP(F.silu), "silu"),
    (lambda: MLP(functools.partial(F.gelu, approximate="tanh")), "gelu_tanh"),
    (computing("o, w = m.open(x), m.wide(x)", "return m.out(F.silu(o) * w)"), "silu"),
    (Spelled, "gelu_tanh"),
    (computing("m.out(F.gelu(m.open(x), approximate='tanh') * m.wide(x))"), "gelu_tanh"),
]


@pytest.mark.parametrize(("make", "act"), ACTIVATIONS)
def test_activations(make, act, runs):
    plain, model = pair(make)
    close(results(model), results(plain))
    assert runs == [act]


# What transformers calls the layers of gated MLPs. With 5.23 145 such classes are some, 23 not.
NAMES = {"gate_proj", "up_proj", "down_proj"}, {"w1", "w2", "w3"}, {"wi_0", "wi_1", "wo"}


def classes_of_transformers():
    """Yield every class that calls three linear layers, found by its text, and their names."""
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for kind in re.finditer(r"^class (\w+)\(.*?(?=^\S|\Z)", path.read_text(), re.M | re.S):
            names = set(re.findall(r"self\.(\w+) = nn\.Linear\(", kind[0]))
            if len(names) == 3 and all(f"self.{name}(" in kind[0] for name in names):
                folder = f"transformers.models.{path.parent.name}"
                yield getattr(importlib.import_module(f"{folder}.{path.stem}"), kind[1]), names


def test_every_class_of_transformers():
    taken, left = set(), set()
    for kind, names in classes_of_transformers():
        module = nn.Module.__new__(kind)  # its own constructor asks for a config
        nn.Module.__init__(module)
        module.act_fn = module.act = module.activation_fn = module.hidden_act = nn.SiLU()
        found, _ = gated.read(module)
        if not found:
            left |= {kind.__name__} if names in NAMES else set()
            continue
        taken.add(kind.__name__)
        gate, up, down = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 4)
        for name, layer in zip(found, (gate, up, down), strict=True):
            setattr(module, name, layer)
        x = torch.randn(3, 4)
        assert torch.equal(module(x), down(F.silu(gate(x)) * up(x))), kind
    known = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Olmo2", "Helium")
    assert {f"{name}MLP" for name in known} <= taken and len(taken) > 100
    assert {f"{name}MLP" for name in ("T5Gemma", "SeedOss", "BitNet", "FalconH1")} <= left
    assert len(left) < 30


def test_the_report_says_why_not():
    """Once for each class, where two layers share x and one more is there."""
    clamped, branching = LOOKALIKES["clamped"], LOOKALIKES["a shape"]
    made = [clamped(), clamped(), branching(), MLP(nn.ReLU()), MLP(), nn.Linear(6, 6)]
    model = get_peft_model(nn.Sequential(*made), LoraConfig(target_modules=["open"]))
    report = patch_peft(model, fuse_siblings=X)
    why = "its forward is more than calls and products of x, each used once (COMPARE_OP)"
    assert report.lookalikes == [
        ("Computing", "its forward is out((act(open(x).clamp(max=10.0)) * wide(x)))"),
        ("Computing", why),
        ("MLP", "its activation is ReLU()"),
    ]
    assert f"  not as one operator: Computing ({why})" in str(report).splitlines()
    assert report.gated_mlps == [("base_model.model.4", ("open", "wide", "out"))]
    assert len(report.siblings) == 4 and "gated MLP: open, wide, out" in str(report)


class Renamed(MLP):
    open, wide, out = map(property, map(attrgetter, ("w1", "w2", "w3")))

    def __init__(self):
        super().__init__()
        own = self._modules
        own.update(w1=own.pop("open"), w2=own.pop("wide"), w3=own.pop("out"))


class Last(MLP):
    def __init_subclass__(cls):
        raise TypeError("Last is final")


class Hiding(MLP):
    wide = property(attrgetter("open"))


CALLS = "its forward calls open, wide, out"
# Which two are siblings, and why they and the third are more than these.
NO_MORE = [
    (Renamed, X, CALLS),
    (MLP, [("open", "out")], CALLS),
    (Hiding, [("open", "wide")], CALLS),
    (lambda: add_hook_to_module(MLP(), ModelHook()), X, "it has a forward of its own"),
    (Last, X, "its class takes no subclass: Last is final"),
]


@pytest.mark.parametrize(("make", "how", "why"), NO_MORE)
def test_what_has_the_formula_of_one_and_is_none(make, how, why, runs):
    targets = (*ALL, "w1", "w2", "w3")
    plain, model = wrapped(make, targets), wrapped(make, targets)
    report = patch_peft(model, fuse_siblings=how)
    assert report.gated_mlps == [] and len(report.siblings) == 1
    assert report.lookalikes == [(type(model.base_model.model).__name__, why)]
    close(results(model), results(plain))
    assert runs == []


class Heir(MLP):
    """Has its forward from its parent, a dropout that it never calls, and what it never reads."""


def doubled(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 2


def other_code(patch, mlp):
    def forward(self, x):
        return self.out(self.wide(x) * self.act(self.open(x)) * 2)

    patch.setattr(MLP.forward, "__code__", forward.__code__)


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
    "hook backward": lambda p, m: m.wide.register_full_backward_hook(lambda m, dx, dy: None),
    "disabled": lambda p, m: m.out.enable_adapters(False),
    "the class's forward": lambda p, m: p.setattr(Heir, "forward", doubled(MLP.forward)),
    "the forward's code": other_code,
    "an attribute before a layer": lambda p, m: vars(m).update(open=doubled(m.open)),
    "a property": lambda p, m: p.setattr(MLP, "open", OPEN_TWICE, raising=False),
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
    plain, model = pair(Heir)
    close([model(X)], [plain(X)])
    found = []
    for each in (model, plain):
        with pytest.MonkeyPatch.context() as patch:
            torch.manual_seed(3)
            change(patch, each)
            found.append(each(X))
    close(found[:1], found[1:])
    assert runs == ["silu"]


def test_what_a_forward_does_not_load_is_free(runs):
    """Other attributes and children, and hooks on those; hooks on the whole run."""
    models = pair(Heir)
    for mlp in models:
        mlp.limit, mlp.open_too = 0.1, 3.0
        mlp.add_module("more", nn.Identity())
        mlp.register_module("nothing", None)
        hooked(hooked(mlp).dropout)
        mlp.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 3,))
    close(*map(results, models))
    models = pair(Spelled)
    for how in ("tanh", "none"):  # an activation that changes is followed
        for mlp in models:
            mlp.how = how
        close(*map(results, models), 1e-5)
    for mlp in models:  # a forward of the object's own may call that of its class
        mlp.forward = doubled(mlp.forward)
    close(*map(results, models))
    assert runs == ["silu", "gelu_tanh", "gelu", "gelu"]


def test_observed_and_transformed(runs):
    plain, fused = pair(lora_dropout=0.5, targets=["out"])
    compiled = torch.compile(fused.eval(), backend="aot_eager", fullgraph=True)
    close([compiled(X)], [plain.eval()(X)])
    close(*([torch.func.jacrev(model)(X)] for model in (fused, plain)))
    found = []
    for model in (fused.train(), plain.train()):
        torch.manual_seed(3)  # seeds are drawn once: plain layers draw the same masks then
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            y = model(X)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
            torch.manual_seed(3)
            tangent = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
        found.append([y, tangent, torch.tensor(counter.get_total_flops())])
    close(*found)
    assert runs == [] and tangent.abs().max() > 0.1


@pytest.mark.parametrize("name", ["foo", "triton", "eager", "reference"])
def test_what_is_forced_and_what_a_layer_would_refuse(name, monkeypatch, runs):
    plain, fused = pair()
    for wrong in (torch.ones(3, 5), X.double(), X.long()):
        assert said_by(fused, wrong) == said_by(plain, wrong)
    monkeypatch.setattr(plans, "FORCED", name)
    monkeypatch.setattr(plans, "triton_unusable", lambda device: "not today")
    if name in ("foo", "triton"):
        assert said_by(fused, X) == said_by(plain, X)
    else:
        close([fused(X)], [plain(X)])
    monkeypatch.setattr(plans, "FORCED", "auto")
    monkeypatch.setattr(plans, "FEW", X.numel())
    close(results(fused), results(plain))
    assert runs == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, runs):
    plain, fused = pair(lora_dropout=0.4, targets=["open", "out"])
    again = functools.partial(checkpoint, fused, use_reentrant=reentrant)
    found = []
    for model, call in ((plain, plain), (fused, again)):
        torch.manual_seed(2)
        x = X.clone().requires_grad_()
        y = call(x)
        found.append([y, *added(model, y.square().sum()), x.grad])
    close(*found)
    # Without reentry forward ends where backward has what it needs: before the output.
    assert runs == ["silu"] * (2 if reentrant else 1)


def test_shapes_autocast_sixteen_bits_and_several_adapters(runs):
    plain, fused = pair()
    for shape in ((6,), (2, 3, 6), (0, 6), (2, 0, 6)):  # without elements there are few
        x = torch.randn(shape)
        close(results(fused, x=x), results(plain, x=x))
    assert runs == ["silu"] * 2
    with torch.autocast("cpu", torch.bfloat16):
        close(results(fused), results(plain), 5e-2)
        assert fused(X).dtype == torch.bfloat16
    half = (results(model.to(torch.bfloat16), x=X.bfloat16()) for model in (fused, plain))
    torch.testing.assert_close(*half, rtol=0.1, atol=0.1)
    models = wrapped(MLP, ALL), wrapped(MLP, ALL)
    for model in models:
        add(model, r=2, target_modules=["open"])
        model.base_model.set_adapter(["default", "other"])
    patch_peft(models[0], fuse_siblings=X)
    close(*map(results, models))
    assert runs == ["silu"] * 6


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_copies(how, runs):
    plain, fused = pair()
    copied = how(fused)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    close(results(copied), results(plain))
    assert runs == ["silu"] and type(copied) is type(fused) and isinstance(copied, MLP)
    copied.act = nn.ReLU()
    copied(X)
    torch.manual_seed(0)
    close([type(fused)()(X)], [MLP()(X)])  # another instance of the class
    assert runs == ["silu"]


@pytest.mark.parametrize("targets", [ALL, ["out"], ["open"]], ids=str)
def test_under_peft(targets, runs):
    """As PEFT's own; a second patch is harmless, and once is enough to take both back."""
    plain, model = wrapped(MLP, targets), wrapped(MLP, targets)
    kinds, keys = [type(m) for m in model.modules()], list(model.state_dict())
    for _ in range(2):
        patch_peft(model, fuse_siblings=X)
    close(results(model), results(plain))
    with model.disable_adapter(), plain.disable_adapter():
        close([model(X)], [plain(X)])
    assert runs == ["silu"] and list(model.state_dict()) == keys
    unpatch_peft(model)
    assert [type(m) for m in model.modules()] == kinds
    close(results(model), results(plain))
    assert runs == ["silu"]


def test_sharded_and_taken_back(one_process, runs):
    """Also one of PEFT's layers alone."""
    make = lambda: nn.Sequential(MLP(), nn.Linear(6, 6))  # noqa: E731
    plain, model = (wrapped(make, ["open", "out", "1"]) for _ in range(2))
    patch_peft(model, fuse_siblings=X)
    inner = model.base_model.model
    for each in (*inner, model):
        fully_shard(each)
    assert [type(m).__name__ for m in inner] == ["FSDPFusedMLP", "FSDPFusedLinear"]
    with torch.no_grad():
        close([model(X)], [plain(X)])
        assert runs == ["silu"]
        unpatch_peft(model)
        assert [type(m).__name__ for m in inner] == ["FSDPMLP", "FSDPLinear"]
        assert [type(m).__bases__[1] for m in inner] == [MLP, lora.Linear]
        close([model(X)], [plain(X)])
    assert runs == ["silu"] and type(inner[0].wide) is nn.Linear
