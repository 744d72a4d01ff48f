# SPDX-License-Identifier: Apache-2.0
"""The kernels on a real GPU: the acceptance rule at real sizes, every config, the CUDA runtime."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fastlora_kernels
import pytest
import test_joint_kernels as joint_kernels
import torch
import triton
from acceptance import KINDS, Case, run, small_cases, verify, verify_exactly
from fastlora_kernels import configs

import fastlora
from fastlora import library_impl, measured, plans, torch_impl, tuner
from fastlora.dropout import keep_mask

pytestmark = pytest.mark.gpu
BODIES = {"triton": fastlora_kernels, "library": library_impl, "torch": torch_impl}
# The package's own attributes of these names are the launchers.
MODULES = {
    name: importlib.import_module(f"fastlora_kernels.{name}")
    for name in ("product", "persistent", "shrink", "columns")
}
each_body = pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)


def on_gpu(case: Case):
    return case.tensors("cuda")


@each_body
@pytest.mark.parametrize("case", small_cases(), ids=str)
def test_acceptance_rule(body, case):
    verify(body, case, on_gpu(case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [1, 7, 16, 33, 128, 512])
def test_ranks(kind, r):
    case = Case(300, 272, 208, r, kind=kind, dropout_p=0.1)
    verify(fastlora_kernels, case, on_gpu(case))


@pytest.mark.parametrize("kind", ["bf16", "fp16", "bf16-fp32"])
@pytest.mark.parametrize("mode", ["base", "low_rank", "both"])
@pytest.mark.parametrize("shape", [(4096, 4096, 4096, 16), (2000, 1024, 4096, 128)], ids=str)
def test_real_sizes(shape, mode, kind):
    case = Case(*shape, kind=kind, mode=mode, dropout_p=0.05)
    verify(fastlora_kernels, case, on_gpu(case))


@pytest.mark.parametrize("kind", KINDS)
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

    verify_exactly(OnGpu, Case(130, 70, 90, 6, kind=kind, dropout_p=0.5))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    "kernel, kind", [key for key in configs.DEFAULTS if key[0] not in configs.LIKE], ids=str
)
def test_every_config(kernel, kind, p):
    """Each shipped config gives right results wherever it is valid on this chip."""
    used = 0
    for config in configs.DEFAULTS[kernel, kind]:
        for r in (16, 32, 128):
            chosen = where_valid(config, kernel, kind, r, p > 0)
            used += len(chosen)
            name = {"mixed": "bf16-fp32", "32": "fp32"}.get(kind, "bf16")
            case = Case(500, 336, 272, r, kind=name, dropout_p=p)
            verify(with_configs(chosen), case, on_gpu(case))
    assert used, "no config of this kernel is valid here"


def where_valid(config, kernel, kind, r, dropout):
    """Return ``config`` for each launcher of ``kernel`` that can run with it on this chip."""
    chip = configs.Chip.of(torch.device("cuda"))
    chosen = {}
    for launcher, of in configs.KERNEL_OF.items():
        rest = "16" if kind == "unaligned" else kind, r, dropout and launcher in configs.DROPPING
        if {"dx": "product"}.get(of, of) == kernel and configs.is_valid(config, of, *rest, chip):
            chosen[launcher] = config
    return chosen


def with_configs(chosen):
    return SimpleNamespace(
        forward=functools.partial(fastlora_kernels.forward, configs=chosen),
        backward=functools.partial(fastlora_kernels.backward, configs=chosen),
    )


LLAMA = [
    joint_kernels.Joint(4096, 4096, (4096, 1024, 1024), (16,) * 3, "bf16", dropout_p=(0.1,) * 3),
    joint_kernels.Joint(2000, 4096, (14336, 14336), (128,) * 2, "bf16-fp32"),
]


@pytest.mark.parametrize("joint", [*joint_kernels.joints(), *LLAMA], ids=str)
def test_several_projections(joint):
    joint_kernels.verify(fastlora_kernels, joint, "cuda")


@pytest.mark.parametrize("joint", LLAMA, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_several_projections_as_layers_run_them(joint, p):
    """With one scaling, as in a model: from Hopper on everything wide then goes by TMA."""
    joint = dataclasses.replace(joint, scaling=0.5, dropout_p=(p,) * len(joint.sizes))
    joint_kernels.verify(fastlora_kernels, joint, "cuda", how=joint_kernels.run_layers)


def test_a_hundred_runs_of_several_projections_are_identical():
    shape = 1000, 768, (512, 256, 256), (16,) * 3, "bf16"
    joint = joint_kernels.Joint(*shape, scaling=0.5, dropout_p=(0.1, 0.0, 0.1))
    ts = joint.tensors("cuda")
    first, dx = joint_kernels.run_layers(fastlora_kernels, joint, ts)
    for _ in range(99):
        results, dx_again = joint_kernels.run_layers(fastlora_kernels, joint, ts)
        assert torch.equal(dx, dx_again)
        for one, other in zip(first, results, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_small_cases_of_every_kernel():
    """What `test_compute_sanitizer` looks at."""
    for kind in ("bf16", "bf16-fp32", "fp32"):
        case = Case(70, 48, 72, 16, kind=kind, dropout_p=0.1)
        verify(fastlora_kernels, case, on_gpu(case))
        ragged = dataclasses.replace(case, N=41, K=67)
        verify(fastlora_kernels, ragged, on_gpu(ragged))
        for p in (0.0, 0.1):
            shape = 70, 72, (48, 24, 40), (16, 0, 8), kind
            joint = joint_kernels.Joint(*shape, scaling=0.5, dropout_p=(p,) * 3)
            joint_kernels.verify(fastlora_kernels, joint, "cuda", how=joint_kernels.run_layers)
    for config in configs.candidates("dx", "16", 16, False, configs.Chip.of(torch.device("cuda"))):
        case = Case(200, 264, 136, 16, kind="bf16")
        verify(with_configs({"product": config, "dx": config}), case, on_gpu(case))
    joint_kernels.test_gated("silu", torch.bfloat16, (33, 45), "cuda")


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer, a part of the CUDA toolkit, is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    command += [sys.executable, "-m", "pytest", "-q", "-m", "gpu", __file__]
    command += ["-k", "test_small_cases_of_every_kernel"]
    # Every tensor in an allocation of its own: a read past its end is then one.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert "1 passed" in run.stdout, "the tool looked at nothing: " + run.stdout[-1000:]


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


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("kernel", configs.LIKE)
def test_every_config_of_several_projections(kernel, p):
    chip = configs.Chip.of(torch.device("cuda"))
    for kind, r in itertools.product(("bf16", "bf16-fp32", "fp32"), (16, 128)):
        sizes = (336, 128, 48)
        shape = 500, 272, sizes, (r,) * 3, kind
        joint = joint_kernels.Joint(*shape, dropout_p=(p,) * 3, scaling=0.5)
        rank = r if kernel.startswith("product") else 3 * r
        kept = configs.kind_of(*KINDS[kind]), rank, p > 0, chip
        tried = configs.candidates(kernel, *kept)
        assert tried, "no config of this kernel is valid here"
        for config in tried:
            joint_kernels.verify(fastlora_kernels, joint, "cuda", {kernel: config})


@pytest.mark.parametrize("activation", joint_kernels.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gated(activation, dtype):
    joint_kernels.test_gated(activation, dtype, (2000, 14336), "cuda")


EARLY = [c for c in configs.DEFAULTS["product", "16"] if c.early]


@pytest.mark.parametrize("config", EARLY, ids=str)
@pytest.mark.parametrize(
    "shape", [(300, 272, 208, 16), (4096, 1024, 4096, 16), (512, 4096, 1024, 8)]
)
def test_early_products_wait_for_what_they_read(config, shape):
    """A hundred runs with memory changing hands between them: a race would show in the bits."""
    chosen = where_valid(config, "product", "16", shape[3], False)
    if not chosen:
        pytest.skip("needs tensor memory access: compute capability 9.0 or later")
    case, body = Case(*shape, kind="bf16"), with_configs(chosen)
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
    """In a process of its own, which is ended if they wait for each other in vain."""
    config = configs.EXPERIMENTAL[which]
    if not where_valid(config, "product", "16", 16, False):
        pytest.skip("needs compute capability 9.0")
    code = f"import test_gpu; test_gpu.run_experimental({which})"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=180)


def run_experimental(which):
    chosen = where_valid(configs.EXPERIMENTAL[which], "product", "16", 16, False)
    for shape in ((300, 272, 208, 16), (4096, 4096, 4096, 16), (130, 64, 64, 16)):
        case = Case(*shape, kind="bf16")
        verify(with_configs(chosen), case, on_gpu(case))


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
    case = Case(1000, 512, 768, 16, kind=kind, dropout_p=0.1)
    t = on_gpu(case)
    first = run(fastlora_kernels, case, t)
    for _ in range(99):
        again = run(fastlora_kernels, case, t)
        assert all(torch.equal(first[n], again[n]) for n in first)


def test_strides_and_misaligned_rows():
    case = Case(96, 80, 112, 8, kind="bf16", dropout_p=0.25)
    t = on_gpu(case)
    for name in ("x", "w", "a", "b", "dy"):
        padded = torch.full((t[name].shape[0], t[name].shape[1] + 3), torch.nan, device="cuda")
        padded = padded.to(t[name].dtype)
        padded[:, 1:-2] = t[name]
        for other in (t[name].t().contiguous().t(), padded[:, 1:-2]):
            verify(fastlora_kernels, case, {**t, name: other})


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
        assert plan.impl in ("library", min(plan.predicted, key=plan.predicted.get, default=""))


def test_inductor():
    module, x = layer()
    expected = module(x)
    result = torch.compile(module, fullgraph=True)(x)
    assert torch.equal(result, expected)
    result.float().sum().backward()
    assert module.lora_A["default"].grad.isfinite().all()


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
    assert not torch.equal(first, y) and y.isfinite().all()
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
    problem = plans.Problem(512, 1024, 768, 16, torch.bfloat16, torch.float32, True)
    device = torch.device("cuda", torch.cuda.current_device())
    ((_, found, kept),) = tuner.tune([problem], device, said.append, seconds=0.1)
    assert not said and kept == measured.path_of(device) and kept.exists()
    for op in measured.OPS:
        assert found[op].seconds.keys() == {"torch", "library", "triton"}
        plan = plans.choose(op, "auto", problem, device)
        assert plan.why == "measured on this machine"
        fastest = min(found[op].seconds, key=found[op].seconds.get)
        expected = min(plan.predicted, key=plan.predicted.get, default="library")
        assert plan.impl in (fastest, "library", expected)
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
