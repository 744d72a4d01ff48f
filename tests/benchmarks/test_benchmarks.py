# SPDX-License-Identifier: Apache-2.0
"""What a run of the benchmarks measures, and the files that it writes."""

import dataclasses
import gc
import json
import re
import shutil
import sys
import weakref
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import decoder_layer
import dora_layer
import end_to_end
import experts_block
import machine
import measure
import mixed_layer
import mixed_model
import pictures as pictures_of
import predict
import problems
import pytest
import report
import run
import torch
from baselines import WAYS, Problem
from test_baselines import DECODERS, EAGER, PROBLEM, assert_shared

from fastlora.files import replace_file

Figure = pytest.importorskip("matplotlib.figure").Figure
RESULTS = Path(run.__file__).parent / "results"
PAINT = Figure.savefig
ERROR = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError(f"{ERROR.partition(': ')[2]}\nMore lines follow.")


def test_rows_say_what_was_measured():
    assert measure.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2.0
    for row in measure.measure(PROBLEM, EAGER, 0.0):
        assert row["rounds"] >= 3 and row["both"]["median_s"] > 0
        assert row["way"] != "frozen" or row["both"]["ratio"] == 1
    rows = measure.measure(Problem("small", 300, 40, 64, R=4, p=0.05), EAGER, 0.0)
    kept = {row["way"]: row["kept_bytes"] for row in rows}
    assert kept["frozen"] == 0
    # x in bfloat16, s, and the seed; PEFT also keeps what it dropped and the mask.
    assert kept["fastlora blocks"] == 300 * 64 * 2 + 300 * 4 * 2 + 8
    assert kept["PEFT"] > 1.9 * kept["fastlora blocks"]
    # The mask is drawn in memory for the rows there are, not for a whole block of them.
    few, ways = Problem("few", 8, 256, 256, R=4, p=0.05), ["frozen", "fastlora blocks"]
    frozen, mine = (row["peak_bytes"] for row in measure.measure(few, ways, 0.0))
    assert mine < frozen + 64 * 1024


def test_predictions_stand_beside_measurements(monkeypatch):
    monkeypatch.setattr(measure, "machine_of", lambda device: machine.H100)
    rows = {row["way"]: row for row in measure.measure(PROBLEM, EAGER, 0.0)}
    assert rows["PEFT"]["predicted_s"] is None
    for way in ("frozen", "fastlora blocks"):
        found = rows[way]["predicted_s"]
        assert 0 < found["forward"] < found["both"] == found["forward"] + found["backward"] < 1e-3
    ceilings = {str(PROBLEM.dtype): {"copy_bytes_s": 1e10, "matrix_flops_s": 1e12}}
    posed = [{**run.described(PROBLEM), "rows": list(rows.values())}]
    result = {"machine": {"device": "some"}, "ceilings": ceilings, "problems": posed}
    table = report.markdown(result)
    assert "| predicted |" in table
    (blocks,), (peft,) = line_of(table, "fastlora blocks"), line_of(table, "PEFT")
    assert re.fullmatch(r"0\.0\d \(\+\d+%\) \|", blocks[-1]) and peft[-1] == " |"


def test_the_predicted_table_has_a_row_for_every_problem(capsys):
    predict.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.count("|") == 8
    assert len(rows) == len(list(problems.problems("cuda")))
    assert all(float(row.split("|")[-4]) > 1 for row in rows)  # "triton", by the frozen layer


def test_rows_of_decoder_layers(small_decoders):
    rows = []
    for problem in decoder_layer.problems("cpu"):
        problem = dataclasses.replace(problem, tokens=20)
        rows.append({row["way"]: row for row in decoder_layer.measure(problem, DECODERS, 0.0)})
    assert [len(row) for row in rows] == [5, 4, 5, 4]  # by hand there is no dropout
    plain = rows[0]
    assert plain["frozen"]["both"]["ratio"] == 1 and plain["frozen"]["launches"] >= 7
    kept = {way: row["kept_bytes"] for way, row in plain.items()}
    # x, q, o, gate and up, and an s of 16 for each layer: less than the frozen layer keeps.
    assert kept["fastlora, siblings"] == 2 * 20 * (3 * 32 + 2 * 48 + 7 * 16)
    assert kept["fastlora, siblings"] < min(kept["fastlora"], kept["PEFT"])


@pytest.fixture
def tiny(monkeypatch, small_decoders):
    """A whole run, every way but the compiled one, takes a second: its pictures are not painted."""
    layers = [dataclasses.replace(PROBLEM, name="layer", M=m) for m in (300, 20)]
    model = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    model |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Figure, "savefig", lambda self, file, format: file.write(b"a picture"))
    for module in (run, measure, end_to_end):
        monkeypatch.setattr(module, "free_memory", lambda: None)
    monkeypatch.setattr(run, "problems", lambda device: layers)
    monkeypatch.setattr(run, "ceilings", lambda *_: {"copy_bytes_s": 1e10, "matrix_flops_s": 1e12})
    for name, value in {"COMPILED_PROBLEMS": 0, "TIMED": 0.0, "LEAST_SECONDS": 0.0}.items():
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(decoder_layer, "ON_CPU", ("plain",))
    monkeypatch.setattr(decoder_layer, "TOKENS", {"cpu": 20})
    monkeypatch.setattr(end_to_end, "MODELS", {"model": model})
    monkeypatch.setattr(end_to_end, "ON_CPU", ("model",))
    monkeypatch.setattr(end_to_end, "BATCHES", (1, 2))
    monkeypatch.setattr(end_to_end, "TOKENS", {"cpu": 8})
    layer = {"SIZES": {"cpu": (32, 2)}, "SAMPLES": 4, "ADAPTERS": (4,), "SOME": 2}
    steps = {"MODELS": {"cpu": "model"}, "BATCH": 2, "ADAPTERS": (2, 1), "NAMES": ["a", "b"]}
    experts = {"SIZES": {"cpu": ((3, 2, 16, 8),)}, "TOKENS": {"cpu": 8}}
    dora = {"SIZES": {"cpu": (32, (20,))}}
    own = {mixed_layer: layer, mixed_model: steps, experts_block: experts, dora_layer: dora}
    for module, sizes in own.items():
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)


PICTURES = ("ratio", "tokens", "roofline", "decoder", "memory", "mixed", "experts")


def made(folder, *arguments):
    """Run with ``arguments``; return what was measured, the report and the pictures' names."""
    run.main(["--output", str(folder), *arguments])
    return written(folder)


def written(folder):
    (path,) = folder.glob("*.json")
    assert path.with_suffix(".md").exists() and not list(folder.glob(".*"))
    pictures = {p.stem.removeprefix(f"{path.stem}-") for p in folder.glob("*.png")}
    return json.loads(path.read_text()), path.with_suffix(".md").read_text(), pictures


def test_a_run_writes_all_that_it_measures(tiny, tmp_path, capsys, monkeypatch):
    """Each file by `replace_file` alone, so that it is whole or as it was, whatever ends a run."""
    replacing = Mock(wraps=replace_file)
    for module in (run, report, pictures_of):
        monkeypatch.setattr(module, "replace_file", replacing)
    monkeypatch.setattr(Figure, "savefig", PAINT)
    result, table, pictures = made(tmp_path)
    replaced = {of.args[0] for of in replacing.mock_calls}
    assert replaced == set(tmp_path.iterdir()) and len(replaced) == 9
    assert pictures == set(PICTURES) and result["left_out"] == []
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in tmp_path.glob("*.png"))
    assert [len(p["rows"]) for p in result["problems"]] == [6, 6]
    assert [len(p["rows"]) for p in result["decoder_layers"]] == [5, 4]
    assert [(r["way"], r["batch"]) for r in result["end_to_end"]] == [
        (way, batch) for batch in (1, 2) for way in end_to_end.WAYS
    ]
    for section, count in (("experts", 2), ("dora_layers", 4)):
        ways = [[r["way"] for r in p["rows"]] for p in result[section]]
        assert ways == [["frozen", "fastlora", "PEFT"]] * count
    listed = ("problems", "decoder_layers", "experts", "dora_layers")
    rows = [r for s in listed for p in result[s] for r in p["rows"]]
    assert all(row["rounds"] >= 3 for row in (*rows, *result["end_to_end"]))
    assert "error" not in json.dumps(result) and "with host" not in table
    assert set(result["ceilings"]) == {"torch.float32"}
    unmeasured = "PEFT compiled, fastlora eager, fastlora library, fastlora triton"
    assert f"Not measured on this machine: {unmeasured}." in table
    said = capsys.readouterr().out.splitlines()
    assert "layers: 2 problems, about 3.9 min" in said
    assert any(re.fullmatch(r"decoder layers: 2 problems, about 2.\d min", line) for line in said)
    assert said[-1].partition(": ")[2].startswith(str(tmp_path))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_the_committed_report_is_that_of_its_json_file(path, tmp_path):
    shutil.copy(path, tmp_path)
    report.write(tmp_path / path.name, pictures=False)
    own, again = (
        [line for line in p.read_text().splitlines() if not line.startswith("Not measured")]
        for p in (path.with_suffix(".md"), tmp_path / path.with_suffix(".md").name)
    )
    assert own == again  # but for ways that were written since


def line_of(table, *names):
    """Return the cells of the lines that begin with ``names``."""
    head = "| " + " | ".join(names) + " | "
    return [x.removeprefix(head).split(" | ") for x in table.splitlines() if x.startswith(head)]


@pytest.mark.parametrize("when", ["made", "first", "timed"])
@pytest.mark.parametrize("broken", ["PEFT", "frozen"])
def test_too_little_memory_costs_one_way(when, broken, tiny, tmp_path, monkeypatch, capsys):
    """Whether its layers cannot be made, or a step fails, the first or a later one."""

    def failing(make):
        def layer_of(*posed):
            layer = make(*posed)
            forward, works = layer.forward, iter([True] * (3 if when == "timed" else 0))
            layer.forward = lambda *args, **options: (
                forward(*args, **options) if next(works, False) else out_of_memory()
            )
            return layer

        return out_of_memory if when == "made" else layer_of

    for ways in (WAYS, decoder_layer.WAYS, end_to_end.WAYS):
        if broken in ways:
            monkeypatch.setitem(ways, broken, failing(ways[broken]))
    result, table, pictures = made(tmp_path)
    assert pictures == set(PICTURES)
    assert f"left out {broken}: {ERROR}" in capsys.readouterr().out.splitlines()
    layers = [p["rows"] for p in (*result["problems"], *result["decoder_layers"])]
    for rows in (*layers, result["end_to_end"]):
        for row in rows:
            assert row.get("error") == (ERROR if row["way"] == broken else None)
            assert ("rounds" in row) == (row["way"] != broken)
    lines = line_of(table, broken)
    assert len(lines) == 4 and all(cells[0] == ERROR for cells in lines)
    assert not any("".join(cells[1:]).strip(" |") for cells in lines)
    if broken == "frozen":  # times without ratios are shown
        assert [line[1::2][:3] for line in line_of(table, "PEFT")] == [["–"] * 3] * 4
        return
    assert line_of(table, "model", "2", "PEFT")[0][:3] == ["8", ERROR, ""]
    assert line_of(table, "model", "2", "fastlora")[0][2] == "–"  # no PEFT to compare with


def test_a_problem_that_cannot_be_posed_is_said(tiny, tmp_path, monkeypatch):
    """Its inputs, its weights or its model: the others are measured."""
    inputs, layer = Problem.inputs, decoder_layer.Layer

    def fails_if(condition, of):
        return lambda problem: out_of_memory() if condition(problem) else of(problem)

    monkeypatch.setattr(Problem, "inputs", fails_if(lambda p: p.M == 300, inputs))
    monkeypatch.setattr(decoder_layer, "Layer", fails_if(lambda p: not p.p, layer))
    monkeypatch.setattr(end_to_end, "make", out_of_memory)
    result, table, pictures = made(tmp_path)
    for section in ("problems", "decoder_layers"):
        failed, fine = result[section]
        assert (failed["rows"], failed["error"]) == ([], ERROR)
        assert fine["rows"] and "error" not in fine
    failed = {"model": "model", "tokens": 8, "error": ERROR}
    assert result["end_to_end"] == [{**failed, "batch": batch} for batch in (1, 2)]
    assert table.count(f"dropout 0\n\n{ERROR}\n") == 2
    assert line_of(table, "model", "1", "")[0][:2] == ["8", ERROR]
    assert pictures == {"ratio", "tokens", "roofline", "decoder", "mixed", "experts"}
    assert [row["error"] for row in result["mixed_models"]] == [ERROR] * 2


def test_what_was_timed_stays_where_memory_is_not_found(tiny, tmp_path, monkeypatch):
    for module in (measure, decoder_layer):
        monkeypatch.setattr(module, "kept_bytes", out_of_memory)
    monkeypatch.setattr(end_to_end, "_flops", out_of_memory)
    result, table, pictures = made(tmp_path)
    layers = [p["rows"] for p in (*result["problems"], *result["decoder_layers"])]
    for row in (row for rows in layers for row in rows):
        assert row["error"] == ERROR and row["both"]["ratio"] > 0 and "kept_bytes" not in row
    for row in result["end_to_end"]:
        assert row["error"] == ERROR and row["step_s"] > 0 and row["peak_bytes"] > 0
    cells = line_of(table, "PEFT")
    assert [c.index(ERROR) for c in cells] == [8, 8, 6, 6] and float(cells[0][0]) > 0
    assert pictures == set(PICTURES)


def test_what_a_failed_way_held_is_free_before_the_next(monkeypatch):
    """Also what only garbage collection frees: memory can go back to the GPU then."""
    held, alive = [], []
    own = WAYS["fastlora blocks"].forward

    def fails(self, x):
        large, self.circle = x.detach().clone(), [self]
        held.extend(weakref.ref(t) for t in (large, self))
        out_of_memory()

    def look(self, x):
        alive.append([ref() is not None for ref in held])
        return own(self, x)

    monkeypatch.setattr(WAYS["loralib"], "forward", fails)
    monkeypatch.setattr(WAYS["fastlora blocks"], "forward", look)
    gc.disable()
    try:
        measure.measure(PROBLEM, ["frozen", "loralib", "fastlora blocks"], 0.0)
    finally:
        gc.enable()
    assert alive[0] == [False, False]


def test_an_interrupted_section_keeps_its_problems(tiny, tmp_path, monkeypatch):
    found, inputs = [], Problem.inputs

    def stopped(problem):
        if problem.M == 20:
            found.append(written(tmp_path))
            raise KeyboardInterrupt
        return inputs(problem)

    monkeypatch.setattr(Problem, "inputs", stopped)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path)
    ((before, table, _),) = found
    assert len(before["problems"]) == 1 and "## layer: 300 x 40 x 64" in table
    assert written(tmp_path)[2] == {"ratio", "tokens", "roofline"}


def test_pictures_that_cannot_be_drawn_cost_themselves_alone(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures_of, "draw_tokens", lambda *_: 1 / 0)
    assert made(tmp_path, "--only", "layer")[2] == {"ratio", "roofline"}
    assert "no picture of tokens: ZeroDivisionError" in capsys.readouterr().err
    for name in ["matplotlib", *(n for n in sys.modules if n.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    result, table, pictures = made(tmp_path / "without", "--only", "layer")
    assert result["problems"] and "| fastlora blocks |" in table and not pictures
    assert "no pictures: import of matplotlib" in capsys.readouterr().err


LAYERS = {"ratio", "tokens", "roofline"}
SECTIONS = ("problems", "decoder_layers", "end_to_end", "mixed_layers", "mixed_models")
SECTIONS += ("experts", "dora_layers")


@pytest.mark.parametrize(
    ("arguments", "sections", "drawn"),
    [
        (["--only", "layer"], ["problems"], LAYERS),
        (["--only", "plain"], ["decoder_layers"], {"decoder"}),
        (["--only", "model"], ["end_to_end", "mixed_models"], {"memory"}),
        (["--only", "mixed"], ["mixed_layers", "mixed_models"], {"mixed"}),
        (["--only", "experts"], ["experts"], {"experts"}),
        (["--only", "DoRA"], ["dora_layers"], set()),
        (["--minutes", "0"], [], set()),
    ],
)
def test_what_is_asked_for_is_measured_in_its_time(
    arguments, sections, drawn, tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(measure, "_ceilings", out_of_memory)
    monkeypatch.setattr(run, "ceilings", measure.ceilings)
    result, table, pictures = made(tmp_path, *arguments)
    assert [s for s in SECTIONS if result[s]] == sections
    assert pictures == drawn
    said = capsys.readouterr().out
    # What is measured outlives the ceilings.
    failed = {"torch.float32": {"error": ERROR}} if sections in ([], ["problems"]) else {}
    assert result["ceilings"] == failed
    assert (f"Measured ceilings, fp32: {ERROR}" in table) == bool(failed)
    if sections:
        assert "about 9.7 min" in said or len(sections) > 1  # all of it is for the one section
    else:
        names = [f"layer: {m}x40x64 r=4 float32/float32 dropout=0" for m in (300, 20)]
        names += ["plain, 20 tokens, dropout 0", "plain, 20 tokens, dropout 0.05"]
        names += ["model, batch 1", "model, batch 2"]
        for module in (mixed_layer, mixed_model, experts_block, dora_layer):
            names += map(str, module.problems("cpu"))
        assert result["left_out"] == names
        assert f"Left out, as the time was over: {'; '.join(names)}." in table
        assert f"left out, as the time was over: {'; '.join(names[2:4])}" in said
    for lacking in [*sections, "left_out"]:  # as in a file of before
        del result[lacking]
        (tmp_path / "cpu.json").write_text(json.dumps(result))
        report.write(tmp_path / "cpu.json", pictures=False)


def test_a_name_that_nothing_has_is_refused(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        made(tmp_path / "none", "--only", "Llama-9")
    said = "--only 'Llama-9' is in no name; there are: layer; plain; model; mixed adapters; model, "
    said += "mixed adapters; experts; DoRA"
    assert said in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_sections_share_the_time_that_is_left(tmp_path, monkeypatch):
    """Of 100 s a problem of the first takes 40: it has 50, the other what is left then."""
    taken, given = [], []
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: sum(taken)))
    monkeypatch.setattr(run, "machine", lambda device: {})
    monkeypatch.setattr(report, "write", lambda *_: None)

    def section(name, takes, count):
        def measure(problem, ways, seconds):
            given.append(seconds)
            taken.append(takes)
            return []

        posed = [decoder_layer.Problem(f"{name}{i}") for i in range(count)]
        return run.Section(name, name, 0.5, posed, [], measure, lambda *_: [])

    chosen = [section("decoder_layers", 40.0, 3), section("end_to_end", 1.0, 2)]
    run.run(chosen, torch.device("cpu"), 100.0, tmp_path / "cpu.json")
    (left_out,) = json.loads((tmp_path / "cpu.json").read_text())["left_out"]
    assert left_out.startswith("decoder_layers2, ")
    assert given == pytest.approx([run.TIMED * s for s in (50 / 3, 10 / 2, 20 / 2, 19)])


def test_few_tokens_on_a_gpu_are_timed_with_the_host_too(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "host_counts", lambda tokens, device: tokens == 20)
    recorded = Mock(wraps=measure.interleaved)
    monkeypatch.setattr(measure, "interleaved", recorded)
    measure.measure(dataclasses.replace(PROBLEM, M=20), ["frozen"], 0.02)
    assert [of.args[2] for of in recorded.mock_calls] == [0.01, 0.01]  # both in the time of one
    recorded.reset_mock()
    result, table, _ = made(tmp_path)
    with_host = [of.kwargs["with_host"] for of in recorded.mock_calls]
    sections = [False] * 2, [True] * 2, [False] * 5, [True] * 2, [False] * (2 + 4)
    assert with_host == [False, False, True, *chain(*sections)]
    many, few = (p["rows"] for p in result["problems"])
    for phase in measure.PHASES:
        assert all(row[phase]["with_host_s"] > 0 < row[phase]["with_host_ratio"] for row in few)
        assert not any("with_host_s" in row[phase] for row in many)
    heads = [x for x in table.splitlines() if x.startswith("| | forward | ratio")]
    columns = " | forward with host | backward with host | both with host |"
    assert [head.endswith(columns) for head in heads[:2]] == [False, True]
    assert re.fullmatch(r"[\d.]+ \(1.00\)", line_of(table, "frozen")[1][-3])
    assert "*with host*" in table and "Steps begin on an idle GPU" not in table
    result["machine"]["cuda"] = "13.0"
    assert "Steps begin on an idle GPU" in report.markdown(result)


@pytest.mark.parametrize("name", ["model", "model, NF4", "model, DoRA"])
def test_models_share_their_frozen_weights(name, tiny, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    monkeypatch.setattr(end_to_end, "MODELS", {name: end_to_end.MODELS["model"]})
    monkeypatch.setattr(end_to_end, "ON_CPU", (name,))
    bases, make = [], end_to_end.make
    monkeypatch.setattr(end_to_end, "make", lambda *of: bases.append(make(*of)) or bases[-1])
    measuring, ways, models = end_to_end.Measure(), list(end_to_end.WAYS), set()
    for problem in end_to_end.problems("cpu"):
        rows = measuring(problem, ways, 0.0)
        assert [row["way"] for row in rows] == ways and all("step_s" in row for row in rows)
        models |= set(measuring.models.values())
    (base,) = bases
    assert len(models) == len(ways)  # they served both batch sizes
    assert_shared(base, models)
    assert all(m.get_output_embeddings().weight is base.lm_head.weight for m in models)
    assert ("4bit" in str(base.model)) == ("NF4" in name) == ("4bit" in repr(models))
    assert ("DoraLinearLayer" in repr(models)) == ("DoRA" in name)
    fresh = make(name, torch.device("cpu")).state_dict()
    assert all(torch.equal(t, fresh[name]) for name, t in base.state_dict().items())


@pytest.mark.parametrize("adapters", [1, 2])
def test_adapters_get_the_same_gradients_together_and_in_turn(adapters, tiny, monkeypatch):
    monkeypatch.setitem(end_to_end.LORA, "lora_dropout", 0.0)
    monkeypatch.setitem(end_to_end.LORA, "init_lora_weights", False)
    measuring, found, own = mixed_model.Measure(), {}, torch.autograd.grad
    problem = mixed_model.Problem("model", 2, adapters=adapters)
    measuring._take(problem.model, torch.device("cpu"))
    ids = torch.arange(16).reshape(2, 8)
    for way in mixed_model.WAYS:
        step, found[way] = measuring.step(way, problem, ids), []
        with torch.no_grad():
            for i, p in enumerate(measuring._model(way).parameters()):
                if p.dtype == torch.float32:  # of an adapter
                    p.copy_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p) * (i % 3 + 1))
        with monkeypatch.context() as patch:
            grads = found[way]
            patch.setattr(torch.autograd, "grad", lambda *of, g=grads: g.extend(own(*of)) or g)
            list(step())
    together, *others = found.values()
    assert len(together) == adapters * 7 * 2 and all(g.abs().max() > 0 for g in together)
    for other in others:
        for mine, theirs in zip(together, other, strict=True):
            assert (mine - theirs).norm() < 0.1 * theirs.norm()  # of bfloat16 layers
