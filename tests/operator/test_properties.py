# SPDX-License-Identifier: Apache-2.0
"""Whatever is asked of the public functions, the acceptance rule holds: hypothesis looks for more.

In the suite the same examples each time; with ``--minutes``, as `make fuzz` does, new ones.
"""

import dataclasses
import time
from dataclasses import dataclass, field

import pytest
import torch
from acceptance import KINDS, Case, accept
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

import fastlora
from fastlora.operator.dropout import new_seed
from fastlora.operator.eager import reference

quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}
in_the_suite = settings(derandomize=True, **quiet)
at_random = settings(max_examples=25, database=None, **quiet)

LAYOUTS = ("as it is", "by columns", "in a larger one", "every second", "misaligned", "negated")
NAMES = ("weight", "lora_A", "lora_B", "bias", "scale")


@dataclass(frozen=True)
class One:
    """A projection: its sizes, what it has, how its tensors lie and which of them train."""

    n: int
    r: int
    bias: bool
    scaling: float
    p: float
    scale: bool = False
    layouts: tuple[str, str, str] = ("as it is",) * 3
    trains: frozenset[str] = frozenset(("lora_A", "lora_B"))


@dataclass(frozen=True)
class Asked:
    """One call and its backward."""

    leading: tuple[int, ...]
    k: int
    kind: str
    impl: str
    autocast: bool
    wide: frozenset[str]  # what is float32 under autocast, of the values that its dtype holds
    mode: str
    x_layout: str
    dy_layout: str
    x_trains: bool
    seed: int
    ones: list[One] = field(default_factory=list)


projections = st.builds(
    One,
    n=st.integers(64, 140),
    r=st.one_of(st.just(0), st.integers(1, 40)),
    bias=st.booleans(),
    scaling=st.sampled_from([2.0**-9, 0.25, 0.7, 1.0, 2.0]),
    p=st.sampled_from([0.0, 0.0, 0.1, 0.5]),
    scale=st.sampled_from([False, False, True]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    trains=st.frozensets(st.sampled_from(NAMES)),
)
questions = st.builds(
    Asked,
    # Sums of many terms: errors of few roundings differ more than the rule allows by chance.
    leading=st.sampled_from([(200,), (2, 130), (270,), (3, 1, 70), (256,)]),
    k=st.integers(140, 260),
    kind=st.sampled_from(list(KINDS)),
    impl=st.sampled_from(["auto", "blocks", "triton", "library"]),
    autocast=st.booleans(),
    wide=st.frozensets(st.sampled_from(["x", "base", "adapters"])),
    mode=st.sampled_from(["base", "low_rank", "both"]),
    x_layout=st.sampled_from([*LAYOUTS, "expanded"]),
    dy_layout=st.sampled_from([*LAYOUTS, "expanded"]),
    x_trains=st.booleans(),
    seed=st.integers(0, 2**20),
    ones=st.lists(projections, min_size=1, max_size=4),
)


def lie(t: Tensor, layout: str) -> Tensor:
    """Return ``t`` [rows, columns], of the same values but for "expanded", laid out otherwise."""
    rows, columns = t.shape
    # Not NaN: eager bfloat16 with AMX adds 0 × what lies behind an odd row, see oneDNN's
    # https://github.com/uxlfoundation/oneDNN/issues/5717
    around = torch.finfo(t.dtype).max
    if layout == "by columns":
        return t.t().contiguous().t()
    if layout == "in a larger one":
        whole = torch.full((rows + 3, columns + 5), around, dtype=t.dtype)
        return whole[1 : rows + 1, 2 : columns + 2].copy_(t)
    if layout == "every second":
        return torch.full((rows, 2 * columns), around, dtype=t.dtype)[:, ::2].copy_(t)
    if layout == "misaligned":
        flat = torch.empty(t.numel() + 1, dtype=t.dtype)
        return flat[1:].view(rows, columns).copy_(t)
    if layout == "negated":  # put off: as PyTorch leaves it behind a conjugation
        return torch._neg_view(-t)
    return t[:1].expand(rows, columns) if layout == "expanded" else t.contiguous()


def drawn(asked: Asked) -> tuple[Tensor, list[Tensor], list[fastlora.Projection]]:
    """Return x, each dy and the projections, rounded to what the operator computes with."""
    rows = torch.Size(asked.leading).numel()
    found = []
    for i, one in enumerate(asked.ones):
        mode = asked.mode if one.r else "base"
        case = Case(rows, one.n, asked.k, one.r or 1, asked.kind, mode, scaling=one.scaling)
        found.append((one, Case(**{**vars(case), "seed": asked.seed + i}).tensors()))
    x = lie(found[0][1]["x"], asked.x_layout)
    dys = [lie(t["dy"], asked.dy_layout) for _, t in found]
    made = []
    for one, t in found:
        w, a, b = (lie(t[name], how) for name, how in zip("wab", one.layouts, strict=True))
        bias = t["bias"] if one.bias else None
        scale = t["b"].abs().amax(1).clamp(max=4.0) + 0.5 if one.scale else None
        a, b = (a, b) if one.r else (None, None)
        made.append(fastlora.Projection(w, a, b, bias, one.scaling, one.p, scale))
    return x, dys, made


def answer(asked: Asked, x: Tensor, dys, made, dtype) -> dict:
    """Return y and gradients of everything by the plain formula, in ``dtype`` or as all lies."""
    torch.manual_seed(asked.seed)
    seeds = [new_seed(x.device) if one.p and one.r else None for one in asked.ones]

    def leaf(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()

    x, ys = leaf(x), []
    leaves = {"x": x}
    for i, (*tensors, scaling, p, scale) in enumerate(made):
        w, a, b, bias, scale = given = [leaf(t) for t in (*tensors, scale)]
        leaves |= {(i, n): t for n, t in zip(NAMES, given, strict=True) if t is not None}
        b = b if a is None or scale is None else b * scale.unsqueeze(1)
        ys.append(reference(x, w, a, b, bias, seeds[i], scaling, p, scale))
    grads = torch.autograd.grad(ys, leaves.values(), [dy.to(ys[0].dtype) for dy in dys])
    return {i: y.detach() for i, y in enumerate(ys)} | dict(zip(leaves, grads, strict=True))


def result(asked: Asked, x: Tensor, dys, made) -> dict:
    """Return y of each and the gradients that are asked for, after a check of what was given."""
    cast = asked.autocast and x.dtype != torch.float32

    def leaf(t: Tensor, group: str, trains: bool) -> Tensor:
        widened = cast and group in asked.wide
        return (t.float() if widened else t).detach().requires_grad_(trains)

    leaves: dict = {"x": leaf(x, "x", asked.x_trains)}
    given = []
    for i, (one, (*tensors, scaling, p, scale)) in enumerate(zip(asked.ones, made, strict=True)):
        tensors.append(scale)
        for j, (name, t) in enumerate(zip(NAMES, tensors, strict=True)):
            if t is not None:
                group = "base" if name in ("weight", "bias") else "adapters"
                leaves[i, name] = tensors[j] = leaf(t, group, name in one.trains)
        given.append(fastlora.Projection(*tensors[:4], scaling, p, tensors[4]))
    before = {key: (t._version, t.clone()) for key, t in leaves.items()}
    x = leaves["x"].view(*asked.leading, -1) if asked.x_layout != "expanded" else leaves["x"]
    torch.manual_seed(asked.seed)
    options = {"training": True, "impl": asked.impl}
    with torch.autocast("cpu", dys[0].dtype if cast else torch.bfloat16, enabled=cast):
        if len(given) == 1 and given[0].lora_A is not None and given[0].scale is None:
            *tensors, scaling, p, _ = given[0]
            ys = [fastlora.lora_linear(x, *tensors, scaling=scaling, dropout_p=p, **options)]
        else:
            ys = fastlora.lora_linears(x, given, **options)
    assert [y.shape for y in ys] == [(*x.shape[:-1], one.n) for one in asked.ones]
    found: dict = {i: y.detach().reshape(dys[i].shape) for i, y in enumerate(ys)}
    pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if y.requires_grad]
    if pairs:
        dys = [dy.view_as(y) if dy.is_contiguous() else dy.reshape(y.shape) for y, dy in pairs]
        wanted = {key: t for key, t in leaves.items() if t.requires_grad}
        options = {"grad_outputs": dys, "allow_unused": True}
        grads = torch.autograd.grad([y for y, _ in pairs], wanted.values(), **options)
        found |= dict(zip(wanted, grads, strict=True))
    for key, (version, values) in before.items():
        assert leaves[key]._version == version, f"{key} was written to"
        assert torch.equal(leaves[key], values), f"{key} was changed"
    return found


def examples(request, check, strategy, count: int = 30) -> None:
    """Check the suite's ``count`` examples, or new ones for as many minutes as were asked for."""
    minutes = request.config.getoption("--minutes")
    if minutes is None:
        return settings(in_the_suite, max_examples=count)(given(strategy)(check))()
    until, drawn = time.monotonic() + 60 * minutes / 3, 0
    while time.monotonic() < until:
        at_random(given(strategy)(check))()
        drawn += at_random.max_examples
    print(f"{drawn:,} examples at random")


def test_acceptance_rule(request):
    examples(request, right, questions)


def right(asked: Asked) -> None:
    given = drawn(asked)
    expected, exact = (answer(asked, *given, dtype) for dtype in (None, torch.float64))
    for key, t in result(asked, *given).items():
        note(f"y or gradient of {key}")
        accept(f"y or gradient of {key}", t.to(expected[key].dtype), expected[key], exact[key])


infinite = st.tuples(
    questions.filter(lambda asked: any(one.r for one in asked.ones)),
    st.sampled_from([kind for kind, (base, adapter) in KINDS.items() if base != adapter]),
    st.lists(st.tuples(*[st.integers(0, 60)] * 2, st.booleans(), st.booleans()), min_size=1),
)


def test_infinities_are_where_the_formula_has_them(request):
    examples(request, infinite_alike, infinite, count=15)


def infinite_alike(drawn_case: tuple) -> None:
    """Under float32 adapters, whose factors go to 16-bit products as several terms.

    Without a scale: the formula adds what it changes, an infinity less an infinity.
    """
    asked, kind, places = drawn_case
    ones = [
        dataclasses.replace(one, trains=one.trains | {"lora_A", "lora_B"}, scale=False)
        for one in asked.ones
    ]
    asked = dataclasses.replace(asked, kind=kind, autocast=False, x_trains=True, ones=ones)
    x, dys, made = drawn(asked)
    x, dys = x.clone(), [dy.clone() for dy in dys]
    for row, column, of_x, negative in places:
        (x if of_x else dys[0])[row, column] = -torch.inf if negative else torch.inf
    expected = answer(asked, x, dys, made, None)
    for key, t in result(asked, x, dys, made).items():
        for is_so in (torch.isposinf, torch.isneginf, torch.isnan):
            assert torch.equal(is_so(t), is_so(expected[key])), f"{is_so.__name__}, {key}"


calls = st.fixed_dictionaries(
    {
        "x": st.sampled_from([(3, 6), (6,), (2, 3, 6), (0, 6), (3, 5), ()]),
        "w": st.sampled_from([(4, 6), (4, 5), (6, 4), (4,), (4, 6, 1)]),
        "a": st.sampled_from([(2, 6), (2, 5), (0, 6), (6,), (3, 6)]),
        "b": st.sampled_from([(4, 2), (4, 3), (5, 2), (4,)]),
        "bias": st.sampled_from([None, (4,), (6,), (4, 1)]),
        "dtypes": st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.int32])] * 3),
        "scaling": st.sampled_from([1.0, 2, "1", None, float("nan"), True]),
        "p": st.sampled_from([0.0, 0.5, 1.0, -0.1, 1.5, "0"]),
    }
)


def test_what_is_not_right_is_refused_and_what_is_refused_is_not_right(request):
    examples(request, refused_or_right, calls)


def refused_or_right(asked: dict) -> None:
    """Never another exception than the documented two, and none where eager PyTorch computes."""
    base, a_dtype, b_dtype = asked["dtypes"]

    def ones(shape, dtype):
        return None if shape is None else torch.ones(shape, dtype=dtype)

    x, w, bias = (ones(asked[name], base) for name in ("x", "w", "bias"))
    a, b = ones(asked["a"], a_dtype), ones(asked["b"], b_dtype)
    fits = (
        len(asked["w"]) == len(asked["a"]) == 2
        and asked["x"][-1:] == asked["w"][1:] == asked["a"][1:]
        and asked["b"] == (asked["w"][0], asked["a"][0])
        and asked["bias"] in (None, asked["w"][:1])
        and base != torch.int32
        and a_dtype == b_dtype
        and a_dtype in (base, torch.float32)
        and type(asked["scaling"]) in (int, float)
        and asked["scaling"] == asked["scaling"]
        and asked["p"] in (0.0, 0.5, 1.0)
    )
    options = {"scaling": asked["scaling"], "dropout_p": asked["p"], "training": True}
    if fits:
        y = fastlora.lora_linear(x, w, a, b, bias, **options)
        assert y.shape == (*asked["x"][:-1], asked["w"][0]) and y.dtype == base
    else:
        with pytest.raises((TypeError, ValueError)) as error:
            fastlora.lora_linear(x, w, a, b, bias, **options)
        named = ("x", "weight", "lora_A", "lora_B", "bias", "scaling", "dropout_p")
        assert str(error.value).startswith(named), "the message names no argument"
