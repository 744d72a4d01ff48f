# SPDX-License-Identifier: Apache-2.0
"""The benchmarks measure what they say: every way on a small problem, and the files of a run."""

import copy
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import decoder_layer
    import lorafusion
    import measure
    import predict
    import problems
    import report
    import run
    from baselines import WAYS, Problem, cannot
finally:
    sys.path.remove(str(BENCHMARKS))

from fastlora_kernels import machine  # noqa: E402

from fastlora.timing import interleaved, ratio  # noqa: E402

EAGER = [way for way in WAYS if way != "PEFT compiled"]
PROBLEM = Problem("small", 300, 40, 64, R=4, dtype=torch.float32, adapter=torch.float32)


def outputs(problem, ways=EAGER):
    x, dy = problem.inputs()
    found = {}
    for way in ways:
        if cannot(way, problem) is None:
            layer = WAYS[way](problem)
            trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
            y = layer(x)
            found[way] = (y, *torch.autograd.grad(y, trained, dy))
    return found


@pytest.mark.usefixtures("few")
def test_all_ways_compute_the_same_layer():
    found = outputs(PROBLEM)
    assert found.keys() == set(EAGER) - {"fastlora library", "fastlora triton"}
    frozen = found.pop("frozen")
    assert len(frozen) == 2
    for way, mine in found.items():
        for one, other in zip(mine, found["PEFT"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=way)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("shape", [(300, 136, 72, 8), (64, 256, 128, 16)], ids=str)
def test_lorafusion_kernels(shape, dropped):
    """In the interpreter, as they run on a GPU: what the formulas give."""
    M, N, K, R = shape
    dy, w, a, b, s = (torch.randn(d) for d in ((M, N), (N, K), (R, K), (N, R), (M, R)))
    keep = torch.rand(M, K) > 0.5 if dropped else None
    ds, db = lorafusion.ds_db(dy, s, b, 0.5)
    dx = lorafusion.dx(dy, w, ds, a, keep, 2.0)
    torch.testing.assert_close(ds, 0.5 * dy @ b, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(db, 0.5 * dy.t() @ s, rtol=1e-4, atol=1e-3)
    low_rank = ds @ a * (2.0 * keep if dropped else 1.0)
    torch.testing.assert_close(dx, dy @ w + low_rank, rtol=1e-4, atol=1e-3)


def test_rows_say_what_was_measured(tmp_path):
    dropped = Problem("small", 300, 40, 64, R=4, p=0.05)
    posed = [PROBLEM, Problem("small", 600, 40, 64, R=4), dropped]
    rows = [measure.measure(p, EAGER, 0.0) for p in posed]
    for row in rows[0]:
        assert row["rounds"] >= 5 and row["both"]["median_s"] > 0
        assert row["way"] != "frozen" or row["both"]["ratio"] == 1
    kept = {row["way"]: row["kept_bytes"] for row in rows[2]}
    assert kept["frozen"] == 0
    # x in bfloat16, s, and the seed; PEFT also keeps what it dropped and the mask.
    assert kept["fastlora torch"] == 300 * 64 * 2 + 300 * 4 * 2 + 8
    assert kept["PEFT"] > 1.9 * kept["fastlora torch"]
    result = {
        "machine": run.machine(torch.device("cpu")),
        "ceilings": {str(p.dtype): {"copy_bytes_s": 1e10, "matrix_flops_s": 1e12} for p in posed},
        "problems": [{**run.described(p), "rows": r} for p, r in zip(posed, rows, strict=True)],
        "end_to_end": [],
    }
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(result))
    report.write(path)
    table = path.with_suffix(".md").read_text()
    assert "| fastlora torch |" in table
    unmeasured = "PEFT compiled, fastlora library, fastlora plain, fastlora triton"
    assert f"Not measured on this machine: {unmeasured}." in table
    pictures = {p.name for p in tmp_path.glob("*.png")}
    assert pictures == {"cpu-ratio.png", "cpu-tokens.png", "cpu-roofline.png"}


def test_predictions_stand_beside_measurements(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "machine_of", lambda device: machine.H100)
    rows = {row["way"]: row for row in measure.measure(PROBLEM, EAGER, 0.0)}
    assert rows["PEFT"]["predicted_s"] is None
    for way in ("frozen", "fastlora torch"):
        found = rows[way]["predicted_s"]
        assert 0 < found["forward"] < found["both"] == found["forward"] + found["backward"] < 1e-3
    ceiling = {"copy_bytes_s": 1e10, "matrix_flops_s": 1e12}
    result = {
        "machine": run.machine(torch.device("cpu")),
        "ceilings": {str(PROBLEM.dtype): ceiling},
        "problems": [{**run.described(PROBLEM), "rows": list(rows.values())}],
        "end_to_end": [],
    }
    table = report.markdown(result)
    assert "| predicted |" in table
    line = next(line for line in table.splitlines() if line.startswith("| fastlora torch |"))
    assert re.search(r"\| 0\.0\d \(\+\d+%\) \|$", line), line
    assert next(x for x in table.splitlines() if x.startswith("| PEFT |")).endswith("|  |")


def test_the_predicted_table_has_a_row_for_every_problem(capsys):
    predict.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.count("|") == 8
    assert len(rows) == len(list(problems.problems("cuda")))
    assert all(float(row.split("|")[-4]) > 1 for row in rows)  # "triton", by the frozen layer


@pytest.fixture
def small_decoders(monkeypatch):
    sizes = {"plain": (32, 16, 48, False), "biased": (32, 16, 48, True)}
    monkeypatch.setattr(decoder_layer, "SIZES", sizes)
    monkeypatch.setattr(decoder_layer, "ON_CPU", tuple(sizes))


@pytest.mark.parametrize("name", ["plain", "biased"])
def test_all_ways_compute_the_same_decoder_layer(name, small_decoders):
    problem = decoder_layer.Problem(name, dtype=torch.float32, tokens=10)
    frozen = decoder_layer.Layer(problem)
    x = torch.randn(10, 32, requires_grad=True)
    dys = [torch.randn(10, n) for n in (32, 16, 16)]
    found = {}
    for way, make in decoder_layer.WAYS.items():
        if way in ("frozen", "PEFT compiled"):
            continue
        layer = make(problem, copy.deepcopy(frozen))
        trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        assert len(trained) == 14
        with torch.no_grad():  # PEFT's names sort as ours
            for i, key in enumerate(sorted(trained, key=lambda n: n.replace(".weight", ""))):
                generator = torch.Generator().manual_seed(i)
                trained[key].copy_(torch.randn(trained[key].shape, generator=generator) / 6)
        ys = layer(x)
        found[way] = [*ys, *torch.autograd.grad(ys, [x], dys)]
    expected = found.pop("PEFT")
    assert len(found) == 3
    for way, mine in found.items():
        for one, other in zip(mine, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=way)


def test_rows_of_decoder_layers(small_decoders):
    ways = [way for way in decoder_layer.WAYS if way != "PEFT compiled"]
    rows, problems = [], []
    for problem in decoder_layer.problems("cpu"):
        problem = dataclasses.replace(problem, tokens=20)
        rows.append({row["way"]: row for row in decoder_layer.measure(problem, ways, 0.0)})
        described = {**run.described(problem), "tokens": problem.rows}
        problems.append({**described, "rows": list(rows[-1].values())})
    assert [len(row) for row in rows] == [5, 4, 5, 4]  # by hand there is no dropout
    plain = rows[0]
    assert plain["frozen"]["both"]["ratio"] == 1 and plain["frozen"]["launches"] >= 7
    kept = {way: row["kept_bytes"] for way, row in plain.items()}
    # x, q, o, gate and up, and an s of 16 for each layer: less than the frozen layer keeps.
    assert kept["fastlora, siblings"] == 2 * 20 * (3 * 32 + 2 * 48 + 7 * 16)
    assert kept["fastlora, siblings"] < min(kept["fastlora"], kept["PEFT"])
    table = "\n".join(report.decoders(problems))
    assert "### plain, 20 tokens, dropout 0.05" in table and "| fastlora, siblings |" in table


def test_a_way_that_fails_has_no_row(monkeypatch, capsys):
    def fails(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(WAYS["loralib"], "forward", fails)
    rows = measure.measure(PROBLEM, ["frozen", "loralib", "fastlora torch"], 0.0)
    assert [row["way"] for row in rows] == ["frozen", "fastlora torch"]
    said = "left out loralib: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    assert said in capsys.readouterr().out.splitlines()
    monkeypatch.setattr(WAYS["frozen"], "forward", fails)
    assert measure.measure(PROBLEM, ["frozen", "fastlora torch"], 0.0) == []


def test_ways_take_turns():
    order = []

    def step(name):
        def run():
            order.append(name)
            yield
            yield

        return run

    rounds = interleaved({"a": step("a"), "b": step("b")}, torch.device("cpu"), 0.0, least=3)
    # Once before anything is timed, then each round begins with another.
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(times) for times in rounds["a"]] == [2, 2, 2]
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2.0


def test_few_rows_with_dropout_take_little_memory():
    """The mask is drawn in memory for the rows there are, not for a whole block of them."""
    rows = measure.measure(
        Problem("few", 8, 256, 256, R=4, p=0.05), ["frozen", "fastlora torch"], 0.0
    )
    frozen, mine = (row["peak_bytes"] for row in rows)
    assert mine < frozen + 64 * 1024
