# SPDX-License-Identifier: Apache-2.0
"""What asks a GPU its first questions runs without one: on a CPU, and in the interpreter."""

import json
import os
from pathlib import Path

import first_minute
import pytest
import torch
from fastlora_kernels.configs import Chip, candidates
from measuring import run_python


@pytest.fixture
def tiny(monkeypatch):
    small = {"SIZE": 64, "CALLS": 1, "ROUNDS": 1, "ceilings": lambda device, dtype: {}}
    for name, value in small.items():
        monkeypatch.setattr(first_minute, name, value)


def run(path, tokens=16):
    first_minute.main(["--tokens", str(tokens), "--seconds", "0", "--output", str(path)])
    return json.loads(path.read_text())


def test_every_part_in_the_interpreter(tiny, tmp_path, capsys):
    found = run(tmp_path / "found.json")
    layers = {row["way"]: row for row in found["layers, 16 tokens"]}
    assert {"frozen", "blocks", "library", "triton"} < layers.keys()
    portable = [way for way in layers if way.startswith("portable, 128 x 256 x 64")]
    assert portable
    for row in (*layers.values(), *found["products alone, 16 tokens"], *found["one tile"]):
        assert all(t > 0 for t in row["seconds"]), row
    assert layers["frozen"]["rate_by_frozen"] == [1.0, 1.0]
    assert {"torch.mm", "shrink, one launch", "triton, forward and backward"} <= {
        row["way"] for row in found["host"]
    }
    assert found["machine"]["device"] and portable[0] in capsys.readouterr().out


def test_every_config_runs_where_it_is_measured(tiny, monkeypatch):
    """A config's name says which it is, and each direction gets the config that it can run with."""
    ran = []

    def tried(kernel, _):
        return candidates(kernel, "16", 16, False, Chip((9, 0), 232448, 132))

    monkeypatch.setattr(first_minute, "tried", tried)
    for name in ("forward", "backward"):
        monkeypatch.setattr(first_minute.steps, name, lambda *arguments: ran.append(arguments[-1]))
    t = torch.ones(16, 64, dtype=torch.bfloat16)
    ways = first_minute.layers(t, t, t[:, :64].expand(16, 64), t, t[:, :16])
    configs = tried("outputs", t)
    assert len(ways) == 4 + len(configs)
    assert {w.partition(",")[0] for w in ways} >= {"fold", "first", "portable"}
    for config in configs:
        ran.clear()
        list(ways[first_minute.named(config)]())
        fits = config in tried("input_grad", t)
        names = ("outputs", "input_grad") if fits else ("outputs",)
        assert ran == [dict.fromkeys(names, config)] * 2


def test_what_was_measured_outlives_what_fails(tiny, tmp_path, monkeypatch):
    def fails(device):
        raise RuntimeError("the driver is gone")

    def step():
        raise torch.OutOfMemoryError("CUDA out of memory.")
        yield

    monkeypatch.setattr(first_minute, "host", fails)
    monkeypatch.setattr(first_minute, "products", lambda x, w: {"frozen": step, "it": step})
    with pytest.raises(RuntimeError, match="the driver is gone"):
        run(tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["layers, 16 tokens"][0]["seconds"]
    said = "OutOfMemoryError: CUDA out of memory."
    assert [row["error"] for row in found["one tile"]] == [said, said]


def test_on_a_plain_cpu(tmp_path):
    path = tmp_path / "found.json"
    program = f"import first_minute as f; f.main('--tokens 2 --seconds 0 --output {path}'.split())"
    paths = f"{Path(first_minute.__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    run_python(program, TRITON_INTERPRET="0", PYTHONPATH=paths)
    found = json.loads(path.read_text())
    assert [row["way"] for row in found["layers, 2 tokens"]] == ["frozen", "blocks"]
    assert "one tile" not in found and found["ceilings"]["copy_bytes_s"] > 0
