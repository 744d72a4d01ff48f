# SPDX-License-Identifier: Apache-2.0
"""The kernels on a real GPU: the acceptance rule at real sizes, every config, the CUDA runtime.

In the order in which a run that is cut off teaches most: what `executed` has run on a CPU, a tiny
case of every kernel, every config, larger problems, the runtime, and last, in processes of their
own, what might never end.
"""

import copy
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import executed
import fastlora_kernels
import joints
import pytest
import test_four_bits
import test_gated_kernels
import torch
import triton
from fastlora_kernels import configs
from fastlora_kernels.lists import stacked
from joints import Joint, run, same, verify

import fastlora
from fastlora.operator import blocks, library, measured, plans, tuning
from fastlora.operator.dropout import keep_mask
from fastlora.operator.weights import Quantised

pytestmark = pytest.mark.gpu
large = pytest.mark.large
# The plain formula is IEEE float32, whatever the environment asks for.
torch.set_float32_matmul_precision("highest")

BODIES = {
    "triton": fastlora_kernels,
    "blocks": SimpleNamespace(steps=blocks),
    "library": SimpleNamespace(steps=library),
}
# What cases call the kinds that configs are for.
NAMED = {"16": "bf16", "fp16": "fp16", "mixed": "bf16-fp32", "32": "fp32"}
MODES = ("both", "low_rank", "base")
PRODUCTS = ("outputs", "input_grad")
ALL = [name for names in configs.LAUNCHERS.values() for name in names]


def this_chip() -> configs.Chip:
    return configs.Chip.of(torch.device("cuda"))


def form(config: configs.Config) -> str:
    """Return how a product runs with ``config``: "portable", or when the low-rank one joins it."""
    return config.low_rank if config.tma else "portable"


def candidates(launcher: str, kind: str, ranks: Iterable[int], p: float, chip: configs.Chip):
    """Return the configs that the tuner may try for projections of these ``ranks``, 0: frozen."""
    there, dropout = [r for r in ranks if r], p > 0 and launcher in configs.DROPPING
    rank = stacked(there) if launcher in ("shrink", "da") else max(there)
    count = len(ranks) if launcher in PRODUCTS else len(there)
    return configs.candidates(launcher, kind, rank, dropout, chip, count)


# What runs without a GPU from its compiled programs, each for all chips.
EXECUTED = [case for case in executed.drawn() if isinstance(case, executed.Case)]
EXECUTED = dict.fromkeys(replace(case, capability=0, processors=0) for case in EXECUTED)


@pytest.mark.parametrize("case", EXECUTED, ids=repr)
def test_first_contact_repeats_what_was_executed(case):
    asked = case.configs() if this_chip().capability >= (9, 0) else None
    verify(case.kernels(), case.joint(), "cuda", asked, case.tensors("cuda"))


FORMS = [("portable", kind, 0.0) for kind in ("16", "32", "mixed")] + [("portable", "16", 0.1)]
FORMS += [("first", "16", 0.0), ("first", "16", 0.1), ("first", "mixed", 0.0), ("fold", "16", 0.0)]


@pytest.mark.parametrize("sizes", [(48,), (48, 32, 48)])
@pytest.mark.parametrize(("asked", "kind", "p"), FORMS)
def test_first_contact(asked, kind, p, sizes):
    """With the first config of the form that is asked for."""
    ranks, chosen = (16,) * len(sizes), {}
    for launcher in PRODUCTS:
        tried = candidates(launcher, kind, ranks, p, this_chip())
        if of_form := [config for config in tried if form(config) == asked]:
            chosen[launcher] = of_form[0]
    if not chosen:
        pytest.skip("needs tensor memory access: compute capability 9.0 or later")
    joint = Joint(80, 96, sizes, ranks, NAMED[kind], scaling=0.5, dropout_p=(p,) * 3)
    verify(fastlora_kernels, joint, "cuda", chosen)


def test_first_contact_of_a_gated_mlp():
    test_gated_kernels.test_gated("silu", torch.bfloat16, (32, 512), "cuda")


@pytest.mark.parametrize("nested", [False, True])
def test_first_contact_of_a_weight_of_4_bits(nested):
    test_four_bits.test_the_formula((64, 512), nested, "cuda")


# The second does not know what tensor memory access waits for.
SANITIZED = {"memcheck": "first_contact", "racecheck": "first_contact and (portable or gated)"}


@pytest.mark.skipif(
    "COMPUTE_SANITIZER" not in os.environ, reason="slow; make gpu ARGS=--sanitizer runs it"
)
@pytest.mark.parametrize("tool", SANITIZED)
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer, a part of the CUDA toolkit, is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    command += ["--target-processes", "application-only"]  # not the compilers
    command += [sys.executable, "-m", "pytest", "-q", "-m", "gpu", __file__, "-k", SANITIZED[tool]]
    # Every tensor in an allocation of its own: a read past its end is then one.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert re.search(r"\d passed", run.stdout), "it looked at nothing: " + run.stdout[-1000:]


# Three mixes of dtypes, one projection and several. Programs are the same in all modes, and many in
# two bodies: what shares them is apart, so that it finds them.
SMALL = [
    Joint(97, 170, (50,), (5,)),
    Joint(130, 36, (40,), (33,), "fp16", dropout_p=(0.3,)),
    Joint(130, 36, (40,), (33,), "bf16"),
    Joint(33, 270, (50, 20, 33), (5, 5, 5), "fp16-fp32", dropout_p=(0.3, 0.1, 0.5)),
    Joint(64, 128, (96, 32), (16, 16), "bf16-fp32", dropout_p=(0.0, 0.4)),
]
CASES = [
    (body, replace(joint, mode=mode, seed=i))
    for mode, body in itertools.product(MODES, BODIES)
    for i, joint in enumerate(SMALL)
]
# Ranks that other tests lack: the lowest, one between the tiles, one above the largest.
RANKS = ("fp32", 512), ("bf16", 1), ("bf16", 33), ("fp16", 512), ("bf16-fp32", 512)
CASES += [("triton", Joint(304, 208, (272,), (r,), kind, dropout_p=(0.1,))) for kind, r in RANKS]
CUT = Joint(1000, 152, (144,), (16,), "bf16", dropout_p=(0.1,), ends=(0, 7, 500, 500, 1000))
EXPERTS = replace(CUT, experts=True)
CASES += list(itertools.product(("triton", "library"), (CUT, EXPERTS)))


@pytest.mark.parametrize(("body", "joint"), CASES, ids=str)
def test_acceptance_rule(body, joint):
    verify(BODIES[body], joint, "cuda")


@pytest.mark.parametrize("kind", ["bf16", "bf16-fp32"])
def test_small_integers_are_exact(kind):
    joint = Joint(144, 90, (70,), (6,), kind, dropout_p=(0.5,))
    joints.verify_exactly(joint, device="cuda")


def turned(t: torch.Tensor) -> torch.Tensor:
    return t.t().contiguous().t()


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """Return ``t`` as it is, amid NaN and one element off in rows of odd length."""
    padded = t.new_full((t.shape[0], t.shape[1] + 3), torch.nan)
    padded[:, 1:-2] = t
    return padded[:, 1:-2]


@pytest.mark.parametrize(
    ("lie", "names"),
    [(misaligned, "w"), (misaligned, "x w a b dy"), (turned, "x w a b dy"), (turned, "w")],
)
def test_strides_and_misaligned_rows(lie, names):
    joint = Joint(96, 112, (80,), (16,), "bf16", dropout_p=(0.1,))
    (t,) = joint.tensors("cuda")
    verify(fastlora_kernels, joint, ts=[t | {name: lie(t[name]) for name in names.split()}])


# Where nothing is too large: some of it may still be for other chips.
ANY = configs.Chip((9, 0), 1 << 30, 132)
# Ranks and dropout of the problem that a config runs: the first that it can.
TURNS = {
    1: list(itertools.product([(16,), (64,), (128,)], (0.0, 0.1))),
    3: list(itertools.product([(16,) * 3, (64,) * 3, (128,) * 3, (16, 0, 0)], (0.0, 0.1))),
}


def every_config() -> list[tuple[int, str, str, configs.Config]]:
    """Return how many projections, a launcher, a kind and a config for it, of all that may run."""
    found = {}
    for count, launcher, kind in itertools.product(TURNS, ALL, NAMED):
        if count == 1 or launcher != "ds_db":  # a launch for each
            for turn in TURNS[count]:
                for config in candidates(launcher, kind, *turn, ANY):
                    found[count, launcher, kind, config] = None
    return list(found)


def brief(value) -> str | None:
    """Return how a config is called in a test's name; pytest names the rest."""
    if not isinstance(value, configs.Config):
        return None
    tiles = f"{value.block_m}x{value.block_n}x{value.block_k}-r{value.block_r}"
    return f"{form(value)}-{tiles}-w{value.num_warps}-s{value.num_stages}"


# Sizes at which a pipeline goes round more than once, and a persistent program has several tiles.
@pytest.mark.parametrize(("count", "launcher", "kind", "config"), every_config(), ids=brief)
def test_every_config(count, launcher, kind, config):
    """Each shipped config gives right results wherever it is valid on this chip."""
    for ranks, p in TURNS[count]:
        if config in candidates(launcher, kind, ranks, p, this_chip()):
            break
    else:
        pytest.skip("configs for other chips")
    shape = (10_000, 1040, (1104,)) if count == 1 else (4000, 784, (336, 208, 176))
    joint = Joint(*shape, ranks, NAMED[kind], scaling=0.5, dropout_p=(p,) * 3)
    verify(fastlora_kernels, joint, "cuda", {launcher: config})


# With one scaling, as in a model: from Hopper on everything wide then goes by TMA.
LLAMA = [
    Joint(4000, 4096, (4096, 1024, 1024), (16,) * 3, "bf16", scaling=0.5),
    Joint(2000, 4096, (14336, 14336), (128,) * 2, "bf16-fp32", scaling=0.5),
]
SIZES = [(4000, 4096, (4096,), (16,)), (2000, 4096, (1024,), (128,))]
REAL = [
    (Joint(*shape, kind, mode), 0.05)
    for mode in MODES
    for shape, kind in [*itertools.product(SIZES, ("bf16", "bf16-fp32")), (SIZES[0], "fp16")]
]
REAL += [pytest.param(joint, p, marks=large) for joint in LLAMA for p in (0.0, 0.1)]


@pytest.mark.parametrize(("joint", "p"), REAL, ids=str)
def test_real_sizes(joint, p):
    verify(fastlora_kernels, replace(joint, dropout_p=(p,) * len(joint.sizes)), "cuda")


@pytest.mark.parametrize(("kind", "p"), [("bf16", 0.0), ("bf16-fp32", 0.1), ("fp16", 0.0)])
@pytest.mark.parametrize("body", ["triton", "library"])
def test_scales_at_real_sizes(body, kind, p):
    joint = Joint(4000, 2048, (2048, 512), (16, 16), kind, dropout_p=(p, p), scaled=True)
    verify(BODIES[body], joint, "cuda")


# As of a mixture of experts, of which two have no rows and one has half of them.
ENDS = 0, 0, *range(1, 2000, 70), 2000, 4000, 4000
ROUTED = Joint(4000, 2048, (1536,), (16,), biases=(False,), scaling=0.5, ends=ENDS, experts=True)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize(("kind", "p"), [("bf16", 0.0), ("bf16-fp32", 0.1), ("fp16", 0.0)])
@pytest.mark.parametrize("body", ["triton", "library"])
def test_experts_at_real_sizes(body, kind, p, by_columns):
    joint = replace(ROUTED, kind=kind, dropout_p=(p,))
    (t,) = joint.tensors("cuda")
    w = t["w"].mT.contiguous().mT if by_columns else t["w"]
    verify(BODIES[body], joint, ts=[t | {"w": w}])


@pytest.mark.parametrize(("kind", "p", "by_columns"), [("16", 0.0, False), ("mixed", 0.1, True)])
def test_experts_by_tma(kind, p, by_columns):
    """The persistent programs, which with segments nobody has measured: no default takes them."""
    joint, asked = replace(ROUTED, kind=NAMED[kind], dropout_p=(p,)), {}
    for step in PRODUCTS:
        for config in candidates(step, kind, (16,), p, this_chip()):
            if config.tma and config.low_rank == "first":
                asked[step] = config
    if not asked:
        pytest.skip("configs for other chips")
    (t,) = joint.tensors("cuda")
    w = t["w"].mT.contiguous().mT if by_columns else t["w"]
    verify(fastlora_kernels, joint, configs=asked, ts=[t | {"w": w}])


GATED = [("silu", torch.bfloat16), ("gelu", torch.float32), ("gelu", torch.float16)]


@pytest.mark.parametrize(("activation", "dtype"), [*GATED, ("gelu_tanh", torch.float32)])
def test_gated_at_real_sizes(activation, dtype):
    test_gated_kernels.test_gated(activation, dtype, (2000, 14336), "cuda")


@large
def test_rows_past_two_billion_elements():
    """The last rows of a tensor of more than 2³¹ elements come out as those of a short one."""
    joint, m = Joint(128, 4096, (4096,), (16,), "bf16"), 2**31 // 4096 + 256
    (t,) = joint.tensors("cuda")
    x, last = torch.empty(m, joint.K, device="cuda", dtype=torch.bfloat16).normal_(), m - 128
    parts = x, x[last:]
    found = [run(fastlora_kernels, joint, [t | {"x": part, "dy": part}]) for part in parts]
    (((long,), long_dx), ((short,), short_dx)) = found
    assert torch.equal(long_dx[last:], short_dx)
    assert all(torch.equal(long[name][last:], short[name]) for name in "ys")


@large
def test_experts_past_two_billion_elements():
    """The last of more than 2³¹ elements of weights are read as those of a small stack are."""
    joint = Joint(256, 4096, (4096,), (16,), "bf16", ends=(0, 100, 256), experts=True)
    (t,), many, stacked = joint.tensors("cuda"), 2**31 // 4096**2 + 2, ("w", "a", "b", "bias")
    of = {n: t[n].new_empty(many, *t[n].shape[1:]) for n in stacked}
    for name, whole in of.items():
        whole[-2:] = t[name]
    long = replace(joint, ends=(*(0,) * (many - 1), 100, 256))
    ((expected,), dx), ((found,), long_dx) = (
        run(fastlora_kernels, *case) for case in ((joint, [t]), (long, [t | of]))
    )
    assert torch.equal(long_dx, dx)
    for name, value in found.items():
        assert torch.equal(value[-2:] if name.startswith("lora") else value, expected[name])


HUNDRED = [
    *(Joint(1040, 768, (512,), (16,), k, dropout_p=(0.1,)) for k in ("bf16", "bf16-fp32", "fp32")),
    replace(ROUTED, kind="bf16", dropout_p=(0.1,)),
    pytest.param(replace(LLAMA[0], dropout_p=(0.1,) * 3), marks=large),
]


@pytest.mark.parametrize("joint", HUNDRED, ids=str)
def test_a_hundred_runs_are_identical(joint):
    ts = joint.tensors("cuda")
    first = run(fastlora_kernels, joint, ts)
    for _ in range(99):
        same(run(fastlora_kernels, joint, ts), first)


def test_a_prepared_launch_is_triton_s_own(monkeypatch):
    """The first call of a problem goes by Triton, the others to the program that it found."""
    joint = Joint(96, 112, (80, 48), (16, 8), "bf16", scaling=0.5, dropout_p=(0.1,))
    ts = joint.tensors("cuda")
    prepared = [run(fastlora_kernels, joint, ts) for _ in range(2)][1]
    monkeypatch.setattr(fastlora_kernels.launch, "_no_hooks", lambda: False)  # all go by Triton
    same(prepared, run(fastlora_kernels, joint, ts))


def test_mask_is_that_of_the_cpu():
    seed = torch.tensor([123456789])
    assert torch.equal(
        keep_mask(seed.cuda(), range(70), 130, 0.3).cpu(), keep_mask(seed, range(70), 130, 0.3)
    )
    eye = torch.eye(128, device="cuda")
    of = [(eye, eye, eye, None, seed.cuda(), 1.0, 0.3)]
    (s,), _ = fastlora_kernels.steps.shrink(torch.ones(70, 128, device="cuda"), of)
    assert torch.equal(s.cpu() != 0, keep_mask(seed, range(70), 128, 0.3))


def layer(dropout=0.0):
    torch.manual_seed(0)
    about = {"r": 16, "lora_dropout": dropout, "init_lora_weights": False}
    layer = fastlora.LoRALinear(512, 384, **about, device="cuda", dtype=torch.bfloat16)
    return layer, torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)


def test_auto_takes_the_kernels():
    (both,) = fastlora.explain(layer()[0], 256).plans.values()
    assert all(plan.impl == "library" for plan in both.values())


def test_inductor():
    module, x = layer()
    expected = module(x)
    result = torch.compile(module, fullgraph=True)(x)
    assert torch.equal(result, expected)
    result.float().sum().backward()
    assert module.lora_A.grad.isfinite().all()


def test_a_quantised_weight_is_as_its_dense_self():
    """Also the second time, when launches are known."""
    module, x = layer()
    w, factors, found = module.weight.detach(), (module.lora_A, module.lora_B), []
    for weight in (w, Quantised(w, w.shape, w.dtype, torch.clone)) * 2:
        (y,) = fastlora.lora_linears(x, [fastlora.Projection(weight, *factors)])
        found.append([y, *torch.autograd.grad(y.float().square().sum(), factors)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_cuda_graph_replays_with_fresh_dropout():
    module, x = layer(dropout=0.5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        module(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert (first != y).any() and y.isfinite().all()
    module.eval()
    torch.testing.assert_close(y.float().mean(), module(x).float().mean(), rtol=0.5, atol=0.05)


def test_dora_as_peft_computes_it():
    """In training, and in evaluation also from a CUDA graph, in which norms are made anew."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(512, 384)).to("cuda", torch.bfloat16)
    about = {"r": 16, "target_modules": ["0"], "use_dora": True, "init_lora_weights": False}
    model = peft.get_peft_model(base, peft.LoraConfig(**about))
    x, found = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16), []
    for patched in (False, True):
        if patched:
            assert fastlora.patch_peft(model).not_fused == []
        model.zero_grad()
        y = model(x)
        y.float().square().mean().backward()
        found.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.01)
    with torch.no_grad():
        model.eval()(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        graph.replay()
        torch.testing.assert_close(y, found[1][0], rtol=0.05, atol=0.01)


def test_a_cold_kernel_is_refused_while_a_graph_is_captured():
    """With words, and before anything is launched; the same call works once it has run."""
    layer = fastlora.LoRALinear(144, 80, r=3, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(48, 144, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    for name, module in list(sys.modules.items()):
        for kernel in vars(module).values() if name.startswith("fastlora_kernels.") else ():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()
    with (
        pytest.raises(RuntimeError, match="run the same forward and backward once before"),
        torch.cuda.graph(graph),
    ):
        layer(x)
    torch.cuda.synchronize()
    assert layer(x).isfinite().all()


def test_tuning(tmp_path, monkeypatch):
    """Every implementation is measured, kept, and then taken; nothing is left out."""
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "_loaded", {})
    plans.forget()
    said = []
    problem = plans.Problem(8192, 768, 1536, 16, torch.bfloat16, torch.float32)
    device = torch.device("cuda", torch.cuda.current_device())
    ((_, found, kept),) = tuning.tune([problem], device, said.append, seconds=0.1)
    assert not said and kept == measured.path_of(device) and kept.exists()
    for op in ("forward", "backward"):
        assert found[op].keys() == {"blocks", "library", "triton"}
        plan = plans.choose(op, "auto", problem, device)
        assert plan.why == "measured on this machine"
        fastest = min(found[op], key=found[op].get)
        assert plan.impl in (fastest, "library")
    plans.forget()


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bytes_kept_for_backward(p):
    """x is shared; s and a seed are all that is added to it."""
    module, x = layer(dropout=p)
    module(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = module(x)
    kept = torch.cuda.memory_allocated() - before - y.numel() * y.itemsize
    assert kept <= 256 * 16 * 4 + 1024


def test_convergence_beside_peft(monkeypatch):
    """200 steps of a small decoder, its layers patched and not: the same losses by the kernels."""
    pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    import long_run

    monkeypatch.setattr(plans, "FORCED", "triton")
    plans.forget()
    (plain, _), (fused, _) = (long_run.losses(f, 200, "cuda") for f in (False, True))
    assert plain[-1] < plain[0]
    torch.testing.assert_close(torch.tensor(fused), torch.tensor(plain), rtol=5e-3, atol=1e-4)
    plans.forget()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current():
    module, x = layer()
    expected = (y := module.to("cuda:0")(x)).detach()
    y.float().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    other = copy.deepcopy(module).to("cuda:1")
    other.zero_grad()
    (y := other(x.to("cuda:1"))).float().sum().backward()
    torch.cuda.synchronize(1)
    assert y.device.index == 1 and torch.equal(y.detach().to("cuda:0"), expected)
    for name, gradient in gradients.items():
        assert torch.equal(other.get_parameter(name).grad.to("cuda:0"), gradient)
