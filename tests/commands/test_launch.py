# SPDX-License-Identifier: Apache-2.0
"""`accelerate launch -m fastlora finetune`: two processes come to what one comes to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny_chat
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from sharding import AVERAGES, WHY_NOT

from fastlora.__main__ import main
from fastlora.commands import finetune
from fastlora.commands.finetune_data import UserError
from fastlora.commands.processes import Processes

TESTS = Path(__file__).parents[1] / "tools"
CONFIG = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2}
CONFIG |= {"mixed_precision": "no", "use_cpu": True}
DATA_PARALLEL = {**CONFIG, "distributed_type": "MULTI_GPU"}
FSDP2 = {
    **CONFIG,
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
    },
}


def options(folder, output, **changes):
    given = {"steps": 12, "lr": 0.01, "dtype": "fp32", "dropout": 0, "r": 4, "save-every": 4}
    given |= {"model": folder / "model", "data": folder / "sums.jsonl", "output": output, **changes}
    words = [f"--{name}={value}" for name, value in given.items()]
    return ["finetune", "--ask", "what is one plus two", *words]


def launch(config, folder, program, arguments):
    """Run it as its user does; two processes that wait for each other for ever are an error."""
    (folder / "accelerate.yaml").write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(folder / "accelerate.yaml"), *program, *arguments]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=240
    )


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def agree(one, several):
    expected, found = metrics(one), metrics(several)
    for name in ("losses", "gradient_norms"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name
    assert found["held_out_after"] == pytest.approx(expected["held_out_after"], rel=1e-4)
    assert found["answer_after"] == expected["answer_after"]
    assert found["tokens"] == expected["tokens"]
    assert (expected["processes"], found["processes"]) == (1, 2)
    left, right = (load_file(f / "adapter/adapter_model.safetensors") for f in (one, several))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("launch")
    tiny_chat.model(path / "model")
    tiny_chat.sums(path / "sums.jsonl")
    return path


@pytest.fixture(scope="module")
def sharded(folder):
    """One process, stopped in its sixth step; two with FSDP2 that go on from its checkpoint.

    Returns the folder of one that was not stopped, that of the two, and what they printed.
    """
    if not AVERAGES:
        pytest.skip(WHY_NOT)
    assert main(options(folder, folder / "whole")) == 0

    class Stopped(finetune._Run):
        def _step(self, step):
            if step == 5:
                raise KeyboardInterrupt
            return super()._step(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "_Run", Stopped)
        assert main(options(folder, folder / "sharded")) == 130
    arguments = options(folder, folder / "sharded")
    run = launch(FSDP2, folder, [str(TESTS / "fsdp_on_cpu.py")], arguments)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder / "whole", folder / "sharded", run.stdout


def test_sharded_processes_go_on_from_one(sharded):
    whole, found, printed = sharded
    assert "fp32 on 2 processes (FSDP2, cpu)" in printed
    assert printed.count("resumed   after step 4 of 12") == 1
    agree(whole, found)


def test_two_processes_go_on_from_shards(folder, sharded):
    whole, before, _ = sharded
    (folder / "replicas").mkdir()
    shutil.copy(before / "checkpoint.pt.8", folder / "replicas" / "checkpoint.pt")
    arguments = options(folder, folder / "replicas")
    run = launch(DATA_PARALLEL, folder, ["-m", "fastlora"], arguments)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "fp32 on 2 processes (data-parallel, cpu)" in run.stdout
    assert run.stdout.count("resumed   after step 8 of 12") == 1
    assert "loaded again, its outputs are identical" in run.stdout
    agree(whole, folder / "replicas")


def test_several_processes_take_no_device(folder, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(options(folder, folder / "out", device="cpu")) == 2
    error = "error: --device cpu: several processes get theirs from accelerate\n"
    assert capsys.readouterr().err == error and not (folder / "out").exists()


def test_a_mistake_names_the_process(folder, monkeypatch, capsys):
    """It may be of its machine alone, such as a file that is not there."""
    monkeypatch.setenv("RANK", "1")
    assert main(options(folder, folder / "out", data="nowhere.jsonl")) == 2
    error = "process 1: error: --data nowhere.jsonl: No such file or directory\n"
    assert capsys.readouterr() == ("", error)


def test_a_batch_is_shared_evenly(folder, monkeypatch, capsys):
    monkeypatch.setattr(
        finetune, "Processes", lambda device: types.SimpleNamespace(count=3, device=device)
    )
    assert main(options(folder, folder / "out")) == 2
    assert "--batch-size 8 must be a multiple of the 3 processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "environment", "problem"),
    [
        ("MULTI_CPU", {"ACCELERATE_USE_FSDP": "true"}, "accelerate shards on GPUs only, and there"),
        ("FSDP", {}, "fsdp_version is 1 in accelerate's configuration; 2 is supported"),
        ("DEEPSPEED", {}, "accelerate's DEEPSPEED is not supported; data-parallel processes and"),
    ],
)
def test_what_accelerate_can_but_this_cannot(kind, environment, problem, monkeypatch):
    state = {"distributed_type": DistributedType[kind], "is_fsdp2": False}
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: types.SimpleNamespace(**state))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=problem):
        Processes(None)
