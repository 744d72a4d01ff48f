# SPDX-License-Identifier: Apache-2.0
"""The command line that fine-tunes: losses, files, resuming, refusals, and what is learnt from."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_chat
import torch

import fastlora
from fastlora import files
from fastlora.__main__ import main
from fastlora.commands import checkpoint, finetune, finetune_model
from fastlora.commands import finetune_data as data

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
# A run in another process, or of a fixture of the module, is to give the same numbers.
pytestmark = pytest.mark.usefixtures("few")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_chat.model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    return tiny_chat.sums(tmp_path_factory.mktemp("data") / "sums.jsonl")


def arguments(folder: Path, lines: Path, output: Path, **changes) -> list[str]:
    values = {"model": folder, "data": lines, "output": output, "dtype": "fp32", "device": "cpu"}
    values |= {"steps": 60, "batch-size": 4, "lr": 0.01, "r": 4, "save-every": 8, "dropout": 0.1}
    values |= {"ask": "what is one plus two"} | changes
    return ["finetune", *(w for name, value in values.items() for w in (f"--{name}", str(value)))]


def metrics(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text(encoding="utf-8"))


def numbers(output: Path) -> list:
    found = metrics(output)
    return [found[name] for name in ("losses", "held_out_before", "held_out_after", "answer_after")]


@pytest.fixture(scope="module")
def finished(folder, lines, tmp_path_factory) -> Path:
    """The output of one uninterrupted run, which other runs must equal."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert main(arguments(folder, lines, output)) == 0
    return output


def test_a_run_learns_and_leaves_its_files(finished):
    found = metrics(finished)
    assert found["held_out_after"] < 0.5 * found["held_out_before"]
    assert len(found["losses"]) == 60
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    assert found["answer_before"] != found["answer_after"]
    names = ["adapter", "loss_curve.png", "metrics.json"]
    assert sorted(path.name for path in finished.iterdir()) == names
    config = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["r"] == 4
    assert (finished / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"


def test_peft_loads_the_adapter_with_the_same_outputs(folder, finished):
    peft = pytest.importorskip("peft")
    ids = torch.arange(4, 14)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(theirs, finished / "adapter").eval()
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    bare = ours(ids).logits
    fastlora.load_adapter(ours, finished / "adapter")
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert (ours(ids).logits - bare).abs().max() > 0.1


def test_a_killed_run_goes_on_to_the_same_numbers(folder, lines, finished, tmp_path, capsys):
    command = arguments(folder, lines, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "fastlora", *command], stdout=subprocess.DEVNULL
    )
    saved, deadline = tmp_path / "checkpoint.pt", time.monotonic() + 120
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert saved.exists() and not (tmp_path / "metrics.json").exists()
    assert main(command) == 0
    assert "resumed   after step " in capsys.readouterr().out
    assert numbers(tmp_path) == numbers(finished)
    assert not saved.exists()


def test_ctrl_c_leaves_a_run_that_goes_on(folder, lines, finished, tmp_path, capsys, monkeypatch):
    whole_step = finetune._Run._step

    def interrupted(run, step):
        if step == 21:
            raise KeyboardInterrupt
        return whole_step(run, step)

    command = arguments(folder, lines, tmp_path)
    monkeypatch.setattr(finetune._Run, "_step", interrupted)
    assert main(command) == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    monkeypatch.undo()
    torch.manual_seed(123)
    assert main(command) == 0
    assert "after step 16 of 60" in capsys.readouterr().out
    assert numbers(tmp_path) == numbers(finished)


def test_a_finished_run_says_so_and_refuses_other_settings(folder, lines, finished, capsys):
    before = (finished / "metrics.json").stat().st_mtime_ns
    assert main(arguments(folder, lines, finished)) == 0
    assert "holds this run already; --restart" in capsys.readouterr().out
    assert main(arguments(folder, lines, finished, lr=0.02, seed=3)) == 2
    error = capsys.readouterr().err
    assert "seed: 0 there, 3 asked for" in error and "lr: 0.01 there, 0.02 asked for" in error
    assert (finished / "metrics.json").stat().st_mtime_ns == before


def test_a_checkpoint_of_other_settings_is_refused_until_restart(folder, lines, tmp_path, capsys):
    state = {"format": checkpoint.FORMAT, "progress": {"settings": {"r": 99}}}
    torch.save(state, tmp_path / "checkpoint.pt")
    assert main(arguments(folder, lines, tmp_path, steps=2)) == 2
    assert "r: 99 there, 4 asked for" in capsys.readouterr().err
    assert main([*arguments(folder, lines, tmp_path, steps=2), "--restart"]) == 0
    assert len(metrics(tmp_path)["losses"]) == 2


def test_a_damaged_checkpoint_is_refused(folder, lines, tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"half a file")
    assert main(arguments(folder, lines, tmp_path)) == 2
    assert "checkpoint.pt is not a readable checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("held", ["{", "[]", "{}"])
def test_damaged_metrics_are_refused(folder, lines, tmp_path, capsys, held):
    (tmp_path / "metrics.json").write_text(held)
    assert main(arguments(folder, lines, tmp_path)) == 2
    assert "metrics.json is damaged; --restart begins again" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(folder, lines, tmp_path, capsys):
    command = arguments(folder, lines, tmp_path, steps=2)
    checkpoint.save(tmp_path / "checkpoint.pt", {"progress": {"no": "settings"}})
    assert main(command) == 2
    assert "--restart begins again" in capsys.readouterr().err
    assert main([*command, "--restart"]) == 0
    settings = metrics(tmp_path)["settings"]
    (tmp_path / "metrics.json").unlink()
    state = {"parameters": {"other": torch.ones(1)}, "optimizer": {}}
    checkpoint.save(
        tmp_path / "checkpoint.pt", {**state, "progress": {"step": 1, "settings": settings}}
    )
    assert main(command) == 2
    error = "error: the checkpoint holds other parameters than the model trains; --restart begins"
    assert error in capsys.readouterr().err


def test_a_run_that_diverges_says_so(folder, lines, tmp_path, capsys):
    assert main(arguments(folder, lines, tmp_path, lr=1e30, steps=8)) == 2
    error = capsys.readouterr().err
    assert re.search(r"error: the loss is nan at step \d: --lr 1e\+30 is too high; --rest", error)
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "metrics.json").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.replace_file(path, fail)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a", "response": ', "not JSON"),
        ('["a"]', "got a list"),
        ('{"prompt": "a"}', 'no "response"'),
        ('{"prompt": "a", "response": 3}', '"response" must be a string, got int'),
        ('{"prompt": "a", "response": " "}', '"response" is empty'),
        ('{"text": "a", "prompt": "b"}', '"text" beside "prompt"'),
        (b'{"text": "\xff"}', "not JSON"),
        (r'{"prompt": "\ud800", "response": "a"}', '"prompt" is not Unicode text'),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named(folder, tmp_path, capsys, line, problem):
    path = tmp_path / "bad.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"text": "one"}\n\n' + line + b"\n")
    assert main(arguments(folder, path, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert f"{path}, line 3: " in error and problem in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"batch-size": -1}, "--batch-size must be at least 1"),
        ({"held-out": 1.0}, "--held-out must be between 0 and 1"),
        ({"lr": "nan"}, "--lr must be above 0, got nan"),
        ({"dropout": 1}, "--dropout must be at least 0 and below 1"),
        ({"data": "nowhere.jsonl"}, "--data nowhere.jsonl: No such file"),
        ({"data": os.devnull}, "holds no examples"),
        ({"device": "abacus"}, "--device abacus cannot be used"),
        ({"model": "nowhere/at/all"}, "--model nowhere/at/all cannot be loaded"),
        ({"target-modules": "q_proy"}, "q_proy"),
        ({"seq-len": 3}, "--seq-len 3 leaves no token of any response"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    folder, lines, tmp_path, capsys, change, problem
):
    assert main(arguments(folder, lines, tmp_path / "out", **change)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and problem in error and len(error.splitlines()) == 1


def test_a_missing_dependency_says_what_to_install(folder, lines, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(arguments(folder, lines, tmp_path)) == 2
    error = capsys.readouterr().err
    assert error == 'error: tqdm not installed: pip install "fastlora-kernels[finetune]"\n'


def test_the_package_does_not_import_what_only_finetuning_needs():
    code = "import sys, fastlora; print({'transformers', 'matplotlib', 'peft'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_a_hub_id_is_taken_from_the_cache(folder, lines, tmp_path):
    """As after a download: the hub's folders, and no network."""
    cached = tmp_path / "hub" / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123abc")
    shutil.copytree(folder, cached / "snapshots" / "0123abc")
    command = arguments("someone/tiny", lines, tmp_path / "out", steps=2)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "fastlora", *command], env=environment, check=True)
    assert len(metrics(tmp_path / "out")["losses"]) == 2
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny"


def test_only_the_response_is_learnt(tokenizer):
    encoded = data.encode(tokenizer, data.Example("what is one", "the sum of two"), 100)
    text = tokenizer.decode(encoded.ids)
    assert text == "<user> what is one <eos> <assistant> the sum of two <eos>"
    learnt = encoded.labels != data.IGNORED
    assert tokenizer.decode(encoded.ids[learnt]) == "the sum of two <eos>"
    assert torch.equal(encoded.labels[learnt], encoded.ids[learnt])


def test_without_a_chat_template_prompt_and_newline_come_first(tokenizer):
    tokenizer.chat_template = None
    encoded = data.encode(tokenizer, data.Example("what is one", "two"), 100)
    assert tokenizer.decode(encoded.ids) == "what is one two <eos>"
    assert (encoded.labels == data.IGNORED).tolist() == [True, True, True, False, False]


def test_a_text_is_learnt_whole_and_cut_at_the_length(tokenizer):
    encoded = data.encode(tokenizer, data.Example(None, "one two three four"), 3)
    assert tokenizer.decode(encoded.ids) == "one two three"
    assert torch.equal(encoded.labels, encoded.ids)
    assert data.encode(tokenizer, data.Example("what is one", "two"), 6) is None


def test_the_loss_is_that_of_all_logits(folder, tokenizer):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    examples = [data.Example("what is one", "two"), data.Example("what", "the sum of two")]
    batch = data.collate([data.encode(tokenizer, e, 100) for e in examples], 0)
    loss, count = finetune_model.response_loss(model, batch)
    assert count == 2 + 5
    torch.testing.assert_close(loss / count, model(**batch).loss)


def test_the_order_is_a_function_of_seed_and_step():
    steps = [data.batch_indices(10, 4, seed=1, step=s) for s in range(5)]
    flat = [i for step in steps for i in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    data._shuffled.cache_clear()
    assert data.batch_indices(10, 4, seed=1, step=3) == steps[3]
    assert data.batch_indices(10, 4, seed=2, step=3) != steps[3]


def test_answers_to_one_prompt_stay_on_one_side():
    examples = [data.Example(f"q{i // 3}", f"a{i}") for i in range(60)]
    training, held_out = data.split(examples, 0.1, seed=0, at_most=256)
    assert len(held_out) == 6 and len(training) == 54
    assert not {e.prompt for e in training} & {e.prompt for e in held_out}


def test_the_schedule_warms_up_and_ends_near_zero():
    rates = [finetune.schedule(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert finetune.schedule(0, 1) == 1.0
