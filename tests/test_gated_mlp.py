# SPDX-License-Identifier: Apache-2.0
"""A gated MLP as one operator, the modules that are one, and those that only look like it."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from acceptance import KINDS, accept
from peft import LoraConfig, get_peft_model
from tiny_models import bits, decoder, llama, same, t5, tokens
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora import LoRAConfig, gated_mlp, gated_modules, inject, ops, patch_peft, unpatch_peft
from fastlora.dropout import keep_mask
from fastlora.flops import FORMULAS
from fastlora.projection import Operands
from fastlora.siblings import FrozenLinear

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
    found = all_of(gated_mlp.run, x, dy, projections, act)
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
        return gated_mlp.run(x, projections, act)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_only_what_is_asked_for():
    """Every combination of trained factors: the same gradients, and none beside."""
    x, dy, projections = operands()
    full = all_of(gated_mlp.run, x, dy, projections, "silu")[1:]
    names = trained(x, projections)
    for asked in itertools.product((False, True), repeat=len(names)):
        if not any(asked):
            continue
        for t, flag in zip(names, asked, strict=True):
            t.requires_grad_(flag)
        y = gated_mlp.run(x, projections, "silu")
        wanted = [t for t, flag in zip(names, asked, strict=True) if flag]
        grads = iter(torch.autograd.grad(y, wanted, dy))
        for expected, flag in zip(full, asked, strict=True):
            if flag:
                torch.testing.assert_close(next(grads), expected, rtol=1e-5, atol=1e-5)
    for t in names:
        t.requires_grad_(False)
    assert not gated_mlp.run(x, projections, "silu").requires_grad


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
        gated_mlp.run(x, projections, "silu")
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
    monkeypatch.setattr(gated_mlp, "_kernels", lambda *tensors: fastlora_kernels)
    for act in PLAIN:
        x, dy, projections = operands()
        found = all_of(gated_mlp.run, x, dy, projections, act)
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
        self.factor = 1.0

    def forward(self, x):
        return self.out(self.wide(x) * self.act(self.open(x))) * self.factor


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


class Unsubclassed(MLP):
    def __init_subclass__(cls):
        raise TypeError("no subclasses, please")


def watched():
    mlp = MLP()
    mlp.act.register_forward_hook(lambda module, args, y: y * 2)
    return mlp


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

    own = gated_mlp.run
    monkeypatch.setattr(gated_mlp, "run", counted)
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
    plain, fused, report = pair(make)
    assert report.gated_mlps == [] and type(fused[0]) is type(make())
    for model in (plain.eval(), fused.eval()):
        own = model[0].forward
        model[0].forward = lambda x, own=own: own(x)[0] if isinstance(own(x), tuple) else own(x)
    close(results(fused), results(plain))
    assert runs == []


def test_looking_changes_nothing(monkeypatch):
    """Neither the module, nor its modes, nor random numbers; a probe's error is no error."""
    model = nn.Sequential(MLP(), Sized(), Dropping())
    model[0].act.train()
    before, state = bits(model), torch.get_rng_state()
    kept = [dict(vars(m)) for m in model.modules()]
    for module in model:
        gated_modules.form_of(module, ("wide", "open"), lambda m: type(m) is nn.Linear)
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
    "an attribute": lambda m: setattr(m[0], "factor", 3.0),
    "a hook on the activation": lambda m: m[0].act.register_forward_hook(lambda m, args, y: y * 2),
    "another layer": swap_layer,
    "a forward": own_forward,
    "a layer's forward": layer_s_own_forward,
    "hook before": lambda m: m[0].out.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "hook after": lambda m: m[0].open.register_forward_hook(lambda m, args, y: y * 2),
    "hook backward": lambda m: m[0].wide.register_full_backward_hook(lambda m, dx, dy: None),
    "merged": lambda m: m[0].wide.merge(),
    "disabled": lambda m: setattr(m[0].out, "disable_adapters", True),
    "one more child": lambda m: m[0].add_module("more", nn.Identity()),
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
    from fastlora import plans

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
    assert isinstance(copied[0], MLP) and copied[0]._gated_form.state[1][0][0] is copied[0].act


# Under PEFT


def wrapped(targets):
    torch.manual_seed(1)
    asked = LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
    return get_peft_model(nn.Sequential(MLP()), asked)


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
    assert llama().dummy_inputs and ops.unobserved(X)
