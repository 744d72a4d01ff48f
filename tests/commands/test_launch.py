# SPDX-License-Identifier: Apache-2.0
"""`accelerate launch -m fastlora finetune`: two processes come to what one comes to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_chat
import torch
from safetensors.torch import load_file
from sharding import AVERAGES, WHY_NOT

from fastlora.__main__ import main

FSDP_ON_CPU = Path(__file__).parents[1] / "tools" / "fsdp_on_cpu.py"
CONFIG = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2}
CONFIG |= {"mixed_precision": "no", "use_cpu": True}
DATA_PARALLEL = {**CONFIG, "distributed_type": "MULTI_GPU"}
FSDP = {"version": 2, "cpu_ram_efficient_loading": True, "reshard_after_forward": True}
FSDP |= {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"}
FSDP2 = {**CONFIG, "distributed_type": "FSDP"}
FSDP2["fsdp_config"] = {f"fsdp_{name}": value for name, value in FSDP.items()}


def words(tiny, output, **changes):
    own = {"model": tiny.model, "data": tiny.data, "output": output, "steps": 12, "r": 4}
    own |= {"save-every": 4, "dropout": 0, "ask": "what is one plus two"} | changes
    return [w for w in tiny_chat.command("finetune", **own) if w not in ("--device", "cpu")]


def launch(config, folder, program, arguments):
    """Run it as its user does; two processes that wait for each other for ever are an error."""
    (folder / "accelerate.yaml").write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(folder / "accelerate.yaml"), *program, *arguments]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def agree(one, several):
    expected, found = map(tiny_chat.numbers, (one, several))
    for name in ("losses", "gradient_norms"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name
    assert found["held_out_after"] == pytest.approx(expected["held_out_after"], rel=1e-4)
    for name in ("answer_before", "answer_after", "tokens"):
        assert found[name] == expected[name]
    left, right = (load_file(f / "adapter/adapter_model.safetensors") for f in (one, several))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("launch") / "whole"
    assert main(words(tiny, output)) == 0
    return output


def test_two_processes_go_on_from_one(tiny, whole, tmp_path):
    output = tmp_path / "out"
    with tiny_chat.interrupted(6):
        assert main(words(tiny, output)) == 130
    printed = launch(DATA_PARALLEL, tmp_path, ["-m", "fastlora"], words(tiny, output))
    assert "fp32 on cpu, 2 processes (data-parallel)" in printed
    assert printed.count("resumed   after step 4 of 12") == 1
    assert "loaded again, its outputs differ by at most 0\n" in printed
    agree(whole, output)


@pytest.mark.skipif(not AVERAGES, reason=WHY_NOT)
def test_sharded_processes_come_to_what_one_comes_to(tiny, whole, tmp_path):
    output = tmp_path / "out"
    printed = launch(FSDP2, tmp_path, [str(FSDP_ON_CPU)], words(tiny, output))
    assert "fp32 on cpu, 2 processes (FSDP2)" in printed
    agree(whole, output)


@pytest.mark.parametrize(
    ("name", "value", "more", "problem"),
    [
        # A mistake may be of one machine alone, such as a file that is not there.
        ("RANK", "1", ["--data", "nowhere"], "process 1: error: --data nowhere: No such file"),
        ("WORLD_SIZE", "3", [], "--batch-size must be a multiple of 3 processes, got 4"),
        ("ACCELERATE_USE_DEEPSPEED", "true", [], "must be data-parallel, or FSDP2 on GPUs"),
        ("ACCELERATE_USE_FSDP", "true", [], "must be data-parallel, or FSDP2 on GPUs"),
    ],
)
def test_what_several_processes_cannot_do(
    tiny, tmp_path, monkeypatch, capsys, name, value, more, problem
):
    monkeypatch.setenv(name, value)
    assert main([*words(tiny, tmp_path / "out"), *more]) == 2
    said, error = capsys.readouterr()
    assert "error: " in error and problem in error and len(error.splitlines()) == 1
    assert not said and not (tmp_path / "out").exists()
