# SPDX-License-Identifier: Apache-2.0
"""The kernels on a real GPU: the acceptance rule at real sizes, every config, the CUDA runtime.

In the order in which a run that is cut off teaches most: a tiny case of every kernel, every config,
larger problems, the runtime, and last, in processes of their own, what might never end.
"""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fastlora_kernels
import pytest
import test_joint_kernels as joint_kernels
import torch
import triton
from acceptance import Case, run, small_cases, verify, verify_exactly
from fastlora_kernels import configs
from fastlora_kernels.joint import stacked

import fastlora
from fastlora.operator import blocks, library, measured, plans, tuning
from fastlora.operator.dropout import keep_mask

pytestmark = pytest.mark.gpu
large = pytest.mark.large
# The plain formula is IEEE float32, whatever the environment asks for.
torch.set_float32_matmul_precision("highest")

BODIES = {"triton": fastlora_kernels, "blocks": blocks, "library": library}
# The package's own attributes of these names are the launchers.
MODULES = {
    name: importlib.import_module(f"fastlora_kernels.{name}")
    for name in ("product", "persistent", "shrink", "columns")
}
# What cases call the kinds that configs are for.
NAMED = {"16": "bf16", "fp16": "fp16", "mixed": "bf16-fp32", "32": "fp32"}
NEEDS_TMA = "needs tensor memory access: compute capability 9.0 or later"


def on_gpu(case: Case):
    return case.tensors("cuda")


def this_chip() -> configs.Chip:
    return configs.Chip.of(torch.device("cuda"))


def form(config: configs.Config) -> str:
    """Return how a product runs with ``config``: "portable", or as `persistent.py` calls it."""
    return config.low_rank if config.tma else "portable"


def with_configs(chosen: Mapping[str, configs.Config]):
    return SimpleNamespace(
        forward=functools.partial(fastlora_kernels.forward, configs=chosen),
        backward=functools.partial(fastlora_kernels.backward, configs=chosen),
    )


def candidates(launcher: str, kind: str, ranks: Iterable[int], p: float, chip: configs.Chip):
    """Return the configs that the tuner may try for projections of these ``ranks``, 0: frozen."""
    there = [r for r in ranks if r]
    if launcher not in configs.LIKE:
        dropout = p > 0 and launcher in configs.DROPPING
        return configs.candidates(configs.KERNEL_OF[launcher], kind, *there, dropout, chip)
    rank = max(there) if launcher.startswith("product") else stacked(there)
    return configs.candidates(launcher, kind, rank, p > 0, chip)


def first_of(asked: str, kind: str, p: float, launchers: Iterable[str]):
    """Return by launcher the first config of the form that is ``asked`` for, at rank 16."""
    found = {}
    for launcher in launchers:
        tried = candidates(launcher, kind, (16,), p, this_chip())
        of_form = [config for config in tried if form(config) == asked and not config.early]
        if of_form:
            found[launcher] = of_form[0]
    return found or pytest.skip(NEEDS_TMA)


FORMS = [("portable", kind, 0.0) for kind in ("16", "32", "mixed")] + [("portable", "16", 0.1)]
FORMS += [("first", "16", 0.0), ("first", "16", 0.1), ("first", "mixed", 0.0), ("fold", "16", 0.0)]


@pytest.mark.parametrize(
    ("asked", "kind", "p"), [*FORMS, ("after", "16", 0.0), ("recompute", "16", 0.0)]
)
def test_first_contact(asked, kind, p):
    chosen = first_of(asked, kind, p, ("product", "dx"))
    case = Case(80, 48, 96, 16, kind=NAMED[kind], dropout_p=p)
    verify(with_configs(chosen), case, on_gpu(case))


@pytest.mark.parametrize(("asked", "kind", "p"), FORMS)
def test_first_contact_of_several_projections(asked, kind, p):
    chosen = first_of(asked, kind, p, ("product_all", "product_sum"))
    shape = 80, 96, (48, 32, 48), (16,) * 3, NAMED[kind]
    joint = joint_kernels.Joint(*shape, scaling=0.5, dropout_p=(p,) * 3)
    joint_kernels.verify(fastlora_kernels, joint, "cuda", chosen)


def test_first_contact_of_a_gated_mlp():
    joint_kernels.test_gated("silu", torch.bfloat16, (32, 512), "cuda")


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


# Of the small problems one for each mix of dtypes, with all four shapes among them. Programs are
# the same in all modes, and many in two bodies: what shares them is apart, so that it finds them.
SOME = (0, 5, 10, 15, 17)
MODES = ("both", "low_rank", "base")
CASES = [
    (body, case)
    for mode, body in itertools.product(MODES, BODIES)
    for case in small_cases()
    if case.mode == mode and case.seed in SOME
]


@pytest.mark.parametrize(("body", "case"), CASES, ids=str)
def test_acceptance_rule(body, case):
    verify(BODIES[body], case, on_gpu(case))


# Ranks that other tests lack: the lowest, one between the tiles, one above the largest.
RANKS = {"fp32": (512,), "bf16": (1, 33), "fp16": (512,), "bf16-fp32": (512,)}


@pytest.mark.parametrize(("kind", "r"), [(kind, r) for kind, ranks in RANKS.items() for r in ranks])
def test_ranks(kind, r):
    case = Case(304, 272, 208, r, kind=kind, dropout_p=0.1)
    verify(fastlora_kernels, case, on_gpu(case))


@pytest.mark.parametrize("kind", ["bf16", "bf16-fp32"])
def test_small_integers_are_exact(kind):
    class OnGpu:
        """Takes CPU tensors, so that the exact oracle stays on the CPU."""

        @staticmethod
        def forward(*args):
            moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
            return [t.cpu() for t in fastlora_kernels.forward(*moved)]

        @staticmethod
        def backward(*args):
            moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
            return [t.cpu() for t in fastlora_kernels.backward(*moved)]

    verify_exactly(OnGpu, Case(144, 70, 90, 6, kind=kind, dropout_p=0.5))


def turned(t: torch.Tensor) -> torch.Tensor:
    return t.t().contiguous().t()


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """Return ``t`` as it is, amid NaN and one element off in rows of odd length."""
    padded = t.new_full((t.shape[0], t.shape[1] + 3), torch.nan)
    padded[:, 1:-2] = t
    return padded[:, 1:-2]


@pytest.mark.parametrize(
    ("lie", "names"),
    [(misaligned, "w"), (misaligned, "x w a b dy"), (turned, "x w a b dy")],
)
def test_strides_and_misaligned_rows(lie, names):
    case = Case(96, 80, 112, 16, kind="bf16", dropout_p=0.1)
    t = on_gpu(case)
    verify(fastlora_kernels, case, t | {name: lie(t[name]) for name in names.split()})


# Where nothing is too large: some of it may still be for other chips.
ANY = configs.Chip((9, 0), 1 << 30, 132)
# Ranks and dropout of the problem that a config runs: the first that it can.
TURNS = list(itertools.product([(16,), (64,), (128,)], (0.0, 0.1)))
JOINT_TURNS = list(itertools.product([(16,) * 3, (64,) * 3, (128,) * 3, (16, 0, 0)], (0.0, 0.1)))


def every_config(launchers: Iterable[str], turns: list) -> list[tuple[str, str, configs.Config]]:
    """Return a launcher, the kind that a config is for and the config, of all that may run."""
    found = {}
    for launcher, kind, turn in itertools.product(launchers, NAMED, turns):
        for config in candidates(launcher, kind, *turn, ANY):
            if not config.early:
                found[launcher, kind, config] = None
    return list(found)


def turn_of(launcher: str, kind: str, config: configs.Config, turns: list):
    for turn in turns:
        if config in candidates(launcher, kind, *turn, this_chip()):
            return turn
    pytest.skip("configs for other chips")


def brief(value) -> str | None:
    """Return how a config is called in a test's name; pytest names the rest."""
    if not isinstance(value, configs.Config):
        return None
    tiles = f"{value.block_m}x{value.block_n}x{value.block_k}-r{value.block_r}"
    early = "-early" if value.early else ""
    return f"{form(value)}-{tiles}-w{value.num_warps}-s{value.num_stages}{early}"


# Sizes at which a pipeline goes round more than once, and a persistent program has several tiles.
@pytest.mark.parametrize(
    ("launcher", "kind", "config"), every_config(configs.KERNEL_OF, TURNS), ids=brief
)
def test_every_config(launcher, kind, config):
    """Each shipped config gives right results wherever it is valid on this chip."""
    (r,), p = turn_of(launcher, kind, config, TURNS)
    case = Case(10_000, 1104, 1040, r, kind=NAMED[kind], dropout_p=p)
    verify(with_configs({launcher: config}), case, on_gpu(case))


@pytest.mark.parametrize(
    ("launcher", "kind", "config"), every_config(configs.LIKE, JOINT_TURNS), ids=brief
)
def test_every_config_of_several_projections(launcher, kind, config):
    ranks, p = turn_of(launcher, kind, config, JOINT_TURNS)
    shape = 4000, 784, (336, 208, 176), ranks, NAMED[kind]
    joint = joint_kernels.Joint(*shape, scaling=0.5, dropout_p=(p,) * 3)
    joint_kernels.verify(fastlora_kernels, joint, "cuda", {launcher: config})


LLAMA = [
    joint_kernels.Joint(4000, 4096, (4096, 1024, 1024), (16,) * 3, "bf16", dropout_p=(0.1,) * 3),
    joint_kernels.Joint(2000, 4096, (14336, 14336), (128,) * 2, "bf16-fp32"),
]


# Three mixes of dtypes and three shapes: the others are those of every config.
JOINTS = [joint for joint in joint_kernels.joints() if joint.seed in (0, 10, 17)]
JOINTS += [pytest.param(LLAMA[0], marks=large)]


@pytest.mark.parametrize("joint", JOINTS, ids=str)
def test_several_projections(joint):
    joint_kernels.verify(fastlora_kernels, joint, "cuda")


@large
@pytest.mark.parametrize("joint", LLAMA, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_several_projections_as_layers_run_them(joint, p):
    """With one scaling, as in a model: from Hopper on everything wide then goes by TMA."""
    joint = replace(joint, scaling=0.5, dropout_p=(p,) * len(joint.sizes))
    joint_kernels.verify(fastlora_kernels, joint, "cuda", how=joint_kernels.run_layers)


SIZES = [(4000, 4096, 4096, 16), (2000, 1024, 4096, 128)]


@pytest.mark.parametrize(
    ("shape", "kind"),
    [*itertools.product(SIZES, ("bf16", "bf16-fp32")), (SIZES[0], "fp16")],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
def test_real_sizes(mode, shape, kind):
    case = Case(*shape, kind=kind, mode=mode, dropout_p=0.05)
    verify(fastlora_kernels, case, on_gpu(case))


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        ("silu", torch.bfloat16),
        ("gelu", torch.float32),
        ("gelu", torch.float16),
        ("gelu_tanh", torch.float32),
    ],
)
def test_gated(activation, dtype):
    joint_kernels.test_gated(activation, dtype, (2000, 14336), "cuda")


@large
def test_rows_past_two_billion_elements():
    """The last rows of a tensor of more than 2³¹ elements come out as those of a short one."""
    k = 4096
    m = 2**31 // k + 256
    x = torch.empty(m, k, device="cuda", dtype=torch.bfloat16).normal_()
    w = torch.randn(k, k, device="cuda", dtype=torch.bfloat16) / 64
    a = torch.randn(16, k, device="cuda", dtype=torch.bfloat16) / 64
    b = torch.randn(k, 16, device="cuda", dtype=torch.bfloat16) / 4
    last = slice(m - 128, m)
    y, s = fastlora_kernels.forward(x, w, a, b, None, None, 0.5, 0.0)
    y_last, s_last = fastlora_kernels.forward(x[last], w, a, b, None, None, 0.5, 0.0)
    assert torch.equal(y[last], y_last) and torch.equal(s[last], s_last)
    dx, _, _ = fastlora_kernels.backward(y, x, w, a, b, s, None, 0.5, 0.0, (True, True, True))
    dx_last, _, _ = fastlora_kernels.backward(
        y_last, x[last], w, a, b, s_last, None, 0.5, 0.0, (True, True, True)
    )
    assert torch.equal(dx[last], dx_last)


@pytest.mark.parametrize("kind", ["bf16", "bf16-fp32", "fp32"])
def test_a_hundred_runs_are_identical(kind):
    case = Case(1040, 512, 768, 16, kind=kind, dropout_p=0.1)
    t = on_gpu(case)
    first = run(fastlora_kernels, case, t)
    for _ in range(99):
        again = run(fastlora_kernels, case, t)
        assert all(torch.equal(first[n], again[n]) for n in first)


@large
def test_a_hundred_runs_of_several_projections_are_identical():
    joint = replace(LLAMA[0], scaling=0.5)
    ts = joint.tensors("cuda")
    first, dx = joint_kernels.run_layers(fastlora_kernels, joint, ts)
    for _ in range(99):
        results, dx_again = joint_kernels.run_layers(fastlora_kernels, joint, ts)
        assert torch.equal(dx, dx_again)
        for one, other in zip(first, results, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_mask_is_that_of_the_cpu():
    seed = torch.tensor([123456789])
    assert torch.equal(
        keep_mask(seed.cuda(), range(70), 130, 0.3).cpu(), keep_mask(seed, range(70), 130, 0.3)
    )
    s = fastlora_kernels.shrink(
        torch.ones(70, 128, device="cuda"),
        torch.eye(128, device="cuda"),
        seed.cuda(),
        dropout_p=0.3,
    )
    assert torch.equal(s.cpu() != 0, keep_mask(seed, range(70), 128, 0.3))


def layer(dropout=0.0):
    torch.manual_seed(0)
    layer = fastlora.LoRALinear(
        512,
        384,
        r=16,
        lora_dropout=dropout,
        init_lora_weights=False,
        device="cuda",
        dtype=torch.bfloat16,
    )
    return layer, torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)


def test_auto_takes_the_kernels():
    chosen = fastlora.explain(layer()[0], 256)
    (both,) = chosen.plans.values()
    for plan in both.values():
        assert plan.impl == "library"


def test_inductor():
    module, x = layer()
    expected = module(x)
    result = torch.compile(module, fullgraph=True)(x)
    assert torch.equal(result, expected)
    result.float().sum().backward()
    assert module.lora_A.grad.isfinite().all()


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


def test_a_cold_kernel_is_refused_while_a_graph_is_captured():
    """With words, and before anything is launched; the same call works once it has run."""
    layer = fastlora.LoRALinear(144, 80, r=3, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(48, 144, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    for module in MODULES.values():
        for kernel in vars(module).values():
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
    for op in measured.OPS:
        assert found[op].seconds.keys() == {"blocks", "library", "triton"}
        plan = plans.choose(op, "auto", problem, device)
        assert plan.why == "measured on this machine"
        fastest = min(found[op].seconds, key=found[op].seconds.get)
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


def alone(call: str) -> None:
    """Run a function of this file in a process of its own, ended where it waits in vain."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", f"import test_gpu; test_gpu.{call}"]
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert run.returncode == 0, run.stderr[-3000:]


def where_valid(config: configs.Config, r: int) -> dict[str, configs.Config]:
    """Return ``config`` for each of the two products that can run with it on this chip."""
    rest = "16", r, False, this_chip()
    return {name: config for name in ("product", "dx") if configs.is_valid(config, name, *rest)}


EARLY = [c for c in configs.DEFAULTS["product", "16"] if c.early]
SHAPES = [(4000, 272, 208, 8), (4000, 1024, 4096, 8), (2000, 4096, 1024, 8)]


@pytest.mark.parametrize("config", EARLY, ids=brief)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_early_products_wait_for_what_they_read(config, shape):
    if not where_valid(config, shape[3]):
        pytest.skip(NEEDS_TMA)
    alone(f"run_early({EARLY.index(config)}, {shape})")


def run_early(which: int, shape: tuple[int, ...]) -> None:
    """A hundred runs with memory changing hands between them: a race would show in the bits."""
    case, body = Case(*shape, kind="bf16"), with_configs(where_valid(EARLY[which], shape[3]))
    t = on_gpu(case)
    verify(body, case, t)
    first = run(body, case, t)
    for i in range(100):
        rubbish = torch.full((shape[0] * (i % 7 + 1), 333), torch.nan, device="cuda")
        del rubbish
        again = run(body, case, t)
        assert all(torch.equal(first[n], again[n]) for n in first)


@pytest.mark.parametrize("which", range(len(configs.EXPERIMENTAL)))
def test_specialised_warps_end(which):
    if not where_valid(configs.EXPERIMENTAL[which], 16):
        pytest.skip("needs compute capability 9.0")
    alone(f"run_experimental({which})")


def run_experimental(which: int) -> None:
    chosen = where_valid(configs.EXPERIMENTAL[which], 16)
    for shape in ((304, 272, 208, 16), (4000, 4096, 4096, 16), (144, 64, 64, 16)):
        case = Case(*shape, kind="bf16")
        verify(with_configs(chosen), case, on_gpu(case))
