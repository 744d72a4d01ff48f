# SPDX-License-Identifier: Apache-2.0
"""What the tuner measures, on first use and by its command, and what it says."""

from __future__ import annotations

import json

import pytest
import torch
from measuring import CPU, GROUP, PROBLEM, SMALL, chosen, operands, timings
from tiny_models import llama

import fastlora
from fastlora.__main__ import main
from fastlora.operator import library, measured, plans, tuning

pytestmark = pytest.mark.usefixtures("empty_cache")


def tune_one(say=lambda text: None, problem=SMALL):
    ((_, found, _),) = tuning.tune([problem], CPU, say, seconds=0.0)
    return found


def test_the_tuner_measures_every_implementation_and_keeps_it():
    state = torch.get_rng_state()
    found = tune_one(problem=SMALL._replace(M=12, dropout=True))
    assert torch.equal(torch.get_rng_state(), state)
    for op, names in (("forward", {"shrink", "product"}), ("backward", {"ds_db", "da", "dx"})):
        assert found[op].seconds.keys() == {"blocks", "library", "triton"}
        assert all(0 < seconds < 60 for seconds in found[op].seconds.values())
        assert found[op].configs.keys() == names
    assert measured.find(SMALL._replace(M=16, dropout=True), CPU) == found
    assert json.loads(measured.path_of(CPU).read_text())["problems"][0]["M"] == 16


def test_a_config_that_fails_is_left_out_and_named_once(monkeypatch):
    """Too much shared memory, out of memory, a compiler's error: measured with the others."""
    import fastlora_kernels

    right, said = fastlora_kernels.shrink, []

    def shrink(*args, config=None, **rest):
        if config is not None and config.num_warps == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return right(*args, config=config, **rest)

    monkeypatch.setattr(fastlora_kernels, "shrink", shrink)
    problem = SMALL._replace(adapter=torch.bfloat16)
    for _ in range(2):
        found = tune_one(said.append, problem)
    assert found["forward"].configs["shrink"]["num_warps"] != 8
    assert len(said) == 1
    assert said[0].startswith("left out shrink with Config(") and "not enough memory" in said[0]


def test_an_implementation_that_fails_is_left_out(monkeypatch):

    def fails(*args, **rest):
        raise RuntimeError("out of resource: shared memory\nand more")

    said = []
    monkeypatch.setattr(library, "forward_all", fails)
    found = tune_one(said.append)
    assert found["forward"].seconds.keys() == {"blocks", "triton"}
    assert said == [f"left out library, {SMALL}: out of resource: shared memory"]


def test_a_problem_that_does_not_fit_is_left_out(monkeypatch, empty_cache):
    said = []
    assert tune_one(said.append, SMALL._replace(M=1 << 45)) is None
    assert len(said) == 1 and "left out" in said[0] and not empty_cache.exists()


def test_autocast_does_not_change_what_is_measured():
    said = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tune_one(said.append)["forward"].seconds.keys() == {"blocks", "library", "triton"}
    assert not said


def test_a_problem_that_fails_is_tried_once(monkeypatch, capsys):
    tries = []
    monkeypatch.setattr(plans, "TUNE", True)
    monkeypatch.setattr(tuning, "_measure", lambda problem, *_: tries.append(problem))
    x, w, a, b = operands()
    for r in (16, 12, 9):
        fastlora.lora_linear(x, w, a[:r].requires_grad_(), b[:, :r]).sum().backward()
    assert tries == [PROBLEM] and len(capsys.readouterr().err.splitlines()) == 1


def test_tuning_on_first_use(monkeypatch, capsys):
    monkeypatch.setattr(plans, "TUNE", True)
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    x, w, a, b = operands()
    fastlora.explain((48, 32), 64, device="cpu")
    assert measured.find(PROBLEM, CPU) is None
    state, before, results = torch.get_rng_state(), [t.clone() for t in (x, w, a, b)], []
    for _ in range(2):
        a.grad = None
        y = fastlora.lora_linear(x, w, a.requires_grad_(), b)
        y.sum().backward()
        results.append((y.detach(), a.grad))
    assert all(map(torch.equal, *results)) and all(map(torch.equal, before, (x, w, a, b)))
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        capsys.readouterr().err == f"fastlora: measuring {PROBLEM} on first use (FASTLORA_TUNE=1)\n"
    )
    assert measured.find(PROBLEM, CPU) is not None
    fastlora.lora_linear(x, w, a, b, impl="blocks")


def test_few_tokens_are_timed_with_the_host_too(monkeypatch):
    """Both times are kept, and the one that holds what the host takes chooses."""
    assert not any(timing.with_host for timing in tune_one().values())
    own, said = tuning.interleaved, []

    def interleaved(steps, device, seconds, **options):
        said.append(options)
        slow = {impl: 5.0 - i if options else 1.0 + i for i, impl in enumerate(steps)}
        if steps.keys() <= {"blocks", "library", "triton"}:
            return {impl: [(t, t)] for impl, t in slow.items()}
        return own(steps, device, seconds, **options)

    monkeypatch.setattr(tuning, "interleaved", interleaved)
    monkeypatch.setattr(tuning, "host_counts", lambda tokens, device: tokens <= 16)
    for problem, best in ((SMALL, "triton"), (SMALL._replace(M=32), "blocks")):
        found = tune_one(problem=problem)
        assert bool(found["forward"].with_host) == (problem is SMALL)
        measured._loaded.clear()  # as another process reads it
        assert measured.find(problem, CPU) == found
        assert chosen(problem=problem) == best
    assert {"with_host": True} in said
    text = str(fastlora.explain(SMALL, device="cpu"))
    assert "triton 3e+03 ms (with the host 3e+03)" in text, text


def test_the_tuner_measures_projections_together():
    for dropout in (False, True):
        found = tune_one(problem=GROUP._replace(dropout=dropout))
        for op in ("forward", "backward"):
            assert found[op].seconds.keys() == {"blocks", "library", "triton"}
            assert found[op].configs == {}
    measured._loaded.clear()  # as another process reads it
    known = measured._known(CPU)
    assert {p.others for p in known} == {((8, 16), (32, 0))} and len(known) == 2
    assert measured.find(GROUP, CPU) is not None and measured.find(SMALL, CPU) is None


# The command


def run_tune(*options):
    return main(["tune", *options, "--seconds", "0.001", "--tokens", "16", "--r", "4"])


def test_the_command_measures_shapes(capsys):
    assert run_tune("--shapes", "48x32", "--dropout", "off") == 0
    printed = capsys.readouterr().out
    problem = PROBLEM._replace(M=16)
    assert f"{problem}, forward: torch, " in printed and ", as by default" in printed
    assert "1 problems, forward and backward: " in printed and "(1.00x)" in printed
    assert f"kept in {measured.path_of(CPU)}" in printed
    assert measured.find(problem, CPU) is not None


def test_the_command_says_what_is_gained(capsys, monkeypatch):
    monkeypatch.setattr(tuning, "_measure", lambda *_: timings())
    assert run_tune("--shapes", "48x32", "--dropout", "both") == 0
    printed = capsys.readouterr().out
    assert ": triton, 1 ms, 3.00x the speed of torch, the default" in printed
    assert (
        "2 problems, forward and backward: 4.00 ms as chosen, 12.00 ms by default (3.00x)"
        in printed
    )


def test_the_command_reads_a_model(capsys, monkeypatch, tmp_path):
    llama().config.save_pretrained(tmp_path)
    monkeypatch.setattr(tuning, "_measure", lambda *_: timings())
    pattern = r"model\.layers\.\d+\.self_attn\.[qk]_proj"  # names as in finetune's model
    assert run_tune("--model", str(tmp_path), "--target-modules", pattern) == 0
    known = measured._known(CPU)
    alone = [p for p in known if not p.others]
    assert {(p.N, p.K) for p in alone} == {(16, 16), (8, 16)} and len(alone) == 4
    # q and k with v, which is frozen, of one x.
    together = [p for p in known if p.others]
    assert {(p.N, p.R, p.others) for p in together} == {(16, 16, ((8, 16), (8, 0)))}
    assert len(together) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--shapes", "48"], "--shapes takes NxK, such as 14336x4096, got '48'"),
        (["--shapes", "8x8", "--r", "0"], "--r must be positive, got 0"),
        (["--shapes", "8x8", "--adapter-dtype", "fp16"], "--adapter-dtype must be bf16 or fp32"),
        (["--shapes", "8x8", "--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--model", "no/such/folder"], "--model no/such/folder cannot be read"),
        (["--model", "FOLDER"], "--model FOLDER cannot be read"),
        (["--model", "GGUF"], "--model GGUF cannot be read"),
    ],
)
def test_the_command_names_what_is_wrong(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    folders = {"FOLDER": str(tmp_path), "GGUF": str(tmp_path / "gguf")}
    assert main(["tune", *(folders.get(option, option) for option in options)]) == 2
    for name, folder in folders.items():
        message = message.replace(name, folder)
    assert f"error: {message}" in capsys.readouterr().err


def test_the_command_where_there_is_nothing_to_choose(capsys, monkeypatch):
    monkeypatch.setattr(plans, "triton_unusable", lambda device: "no GPU.")
    assert run_tune("--shapes", "48") == 2
    assert "--shapes takes NxK" in capsys.readouterr().err
    assert run_tune("--shapes", "48x32") == 0
    said = capsys.readouterr().out
    assert said == "nothing to choose on cpu: only 'blocks' runs there. no GPU.\n"


def test_a_forced_choice_leaves_nothing_to_tune(capsys, monkeypatch):
    monkeypatch.setattr(plans, "FORCED", "reference")
    assert run_tune("--shapes", "48x32") == 2
    assert "FASTLORA_IMPL=reference leaves nothing to choose" in capsys.readouterr().err


def test_the_command_does_not_say_kept_when_it_is_not(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tuning, "_measure", lambda *_: timings())
    with pytest.warns(UserWarning, match="cannot be kept in"):
        assert run_tune("--shapes", "48x32") == 0
    assert "not kept: it held for this process only" in capsys.readouterr().out


def test_nothing_could_be_measured(capsys, monkeypatch):
    monkeypatch.setattr(tuning, "_measure", lambda *_: None)
    assert run_tune("--shapes", "48x32") == 2
    assert "nothing could be measured on cpu" in capsys.readouterr().err
