# SPDX-License-Identifier: Apache-2.0
"""The search for a rank: when it stops, what it says, what it writes, and that it goes on."""

from __future__ import annotations

import gc
import json
import re
import weakref
from pathlib import Path

import pytest
import tiny_chat
import transformers

from fastlora.__main__ import main
from fastlora.commands import models, pictures, ranks, trainer
from fastlora.commands.rank_search import Trial, reason, search, table, taken
from fastlora.commands.shared import UserError

QV, ATTENTION, ALL = ("q_proj", "v_proj"), ("q_proj", "v_proj", "k_proj", "o_proj"), "all-linear"
SETS = (QV, ATTENTION, ALL)


def searched(losses: dict, max_r=64, sets=(QV,), wanted=0.01) -> list[Trial]:
    """Search on made-up losses, by rank on q and v or by wider targets: a number or one a seed."""

    def train(r, targets):
        loss = losses[r if targets == QV else targets]
        return Trial(r, targets, loss if isinstance(loss, tuple) else (loss,), 4.0, 100 * r, 1.5)

    return search(train, max_r, sets, wanted)


WIDER = {1: 3.0, 2: 2.7, 4: 2.69, ATTENTION: 2.68, ALL: 2.5}
FEW = {1: 3.0, 2: 2.9, 4: 2.8}
MORE = FEW | {8: 2.79, 16: 2.789}
APART = {1: (2.0, 4.0), 2: (1.9, 3.8), 4: (1.9, 3.8)}  # each has other examples held out
UNLIKE = {1: (2.0, 2.0), 2: (1.8, 2.04)}
UNDER = "under the 1.00% asked for"
NOTHING = f"r = 4 gains 0.00% over r = 2 on QV, {UNDER}; but untrained the model is no worse"


@pytest.mark.parametrize(
    ("losses", "options", "tried", "best", "why"),
    [
        # It stops where the gain levels off, and the gain asked for decides where that is.
        (MORE, {}, [1, 2, 4, 8], 4, f"r = 8 gains 0.36% over r = 4 on QV, {UNDER}"),
        (MORE, {"wanted": 0.002}, [1, 2, 4, 8, 16], 8, "r = 16 gains"),
        (FEW, {"wanted": 0.034}, [1, 2], 1, "r = 2 gains 3.33% over r = 1 on QV, under the 3.40%"),
        # It never levels off; a larger rank is worse.
        (FEW, {"max_r": 7}, [1, 2, 4], 4, "r = 4 gains 3.45% over r = 2 on QV, and --max-r 7 ends"),
        ({1: 3.0, 2: 2.7, 4: 2.835}, {}, [1, 2, 4], 2, "r = 4 gains -5.00% over r = 2 on QV"),
        # More layers, at the smallest good rank, beside what was taken and not what was tried.
        (
            *(WIDER, {"sets": SETS}, [1, 2, 4, 2, 2], 2),
            f"r = 4 gains 0.37% over r = 2 on QV, {UNDER}; QV, k_proj, o_proj gains 0.74% over "
            f"r = 2 on QV, {UNDER}; all-linear gains 7.41% over r = 2 on QV",
        ),
        # Seeds are compared one by one.
        (APART, {}, [1, 2, 4], 2, "r = 4 gains 0.00%"),
        (UNLIKE, {}, [1, 2], 1, "r = 2 gains 4.00% over r = 1 on QV, no more than seeds differ by"),
        # Nothing helped.
        ({1: 4.5, 2: 4.4, 4: 4.4}, {}, [1, 2, 4], 2, NOTHING),
    ],
)
def test_what_is_tried_and_taken_and_why(losses, options, tried, best, why):
    trials = searched(losses, **options)
    assert [trial.r for trial in trials] == tried and taken(trials).r == best
    said = reason(trials, options.get("wanted", 0.01), options.get("max_r", 64))
    on = "all-linear" if ALL in losses else "QV"
    assert said.replace("q_proj, v_proj", "QV").startswith(f"take r = {best} on {on}: {why}")
    assert ("untrained" in said) == (why == NOTHING)


def test_the_table_marks_what_is_taken():
    lines = table(searched({1: 3.0, 2: 2.9, 4: 2.91})).splitlines()
    assert [line.split() for line in lines] == [
        ["r", "targets", "trainable", "held-out", "loss", "gain", "seconds"],
        ["untrained", "0", "4.000"],
        ["1", "q_proj,", "v_proj", "100", "3.000", "2"],
        ["2", "q_proj,", "v_proj", "200", "2.900", "3.33%", "2", "taken"],
        ["4", "q_proj,", "v_proj", "400", "2.910", "-0.34%", "2"],
    ]
    assert len({len(line.partition("%")[0]) for line in lines[3:]}) == 1  # numbers are aligned
    assert "5.00% ± 0.00%" in table(searched(APART))


def test_the_picture_shows_every_trial_and_the_one_taken(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, _: drawn.append(figure))
    trials = searched(WIDER | {ATTENTION: 2.65, ALL: 2.64}, sets=SETS)
    pictures.rank_curve(tmp_path / "p.png", trials, taken(trials), "a title", "a subtitle")
    (axes,) = drawn[0].axes
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert points == {
        "q_proj, v_proj": [[100, 3.0], [200, 2.7], [400, 2.69]],
        "r = 2 on q_proj, v_proj, k_proj, o_proj": [[200, 2.65]],
        "r = 2 on all-linear": [[200, 2.64]],
        "taken": [[200, 2.65]],
    }
    assert axes.get_xscale() == "log"
    assert {"r = 1", "r = 2", "r = 4", "a subtitle"} <= {text.get_text() for text in axes.texts}


@pytest.mark.parametrize(
    ("config", "start", "expected"),
    [
        ("Llama", (), [QV, ATTENTION, ALL]),
        ("Llama", ("v_proj",), [("v_proj",), ATTENTION, ALL]),
        ("Llama", ("up_proj",), [("up_proj",), ALL]),
        ("Llama", r".*\.1\..*q_proj", [r".*\.1\..*q_proj", ATTENTION, ALL]),
        ("Llama", ALL, [ALL]),
        ("GPT2", (), [("c_attn",), ("c_attn", "attn.c_proj"), ALL]),
        ("OPT", (), [QV, (*QV, "k_proj", "out_proj"), ALL]),
        ("Phi3", (), [("qkv_proj",), ("qkv_proj", "o_proj"), ALL]),
        ("GPTNeoX", (), [("query_key_value",), ("query_key_value", "dense"), ALL]),
        ("Mamba", ("in_proj",), [("in_proj",)]),
        ("CTRL", ("Wq",), [("Wq",), ALL]),
        ("CTRL", (), r"must say where to start: this model has 0, 2, Wk, Wq, Wv, dense"),
    ],
)
def test_where_a_search_starts_and_what_is_wider(tmp_path, config, start, expected):
    """The folder holds no weights: the config is enough."""
    getattr(transformers, f"{config}Config")(num_hidden_layers=2).save_pretrained(tmp_path)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            ranks.target_sets(str(tmp_path), start)
    else:
        assert ranks.target_sets(str(tmp_path), start) == expected


# With training.


def run(tiny, output: Path, *more: str, **changes) -> int:
    own = {"model": tiny.model, "data": tiny.data, "output": output, "steps": 6, "max-r": 2}
    return main([*tiny_chat.command("ranks", **own, **{"save-every": 2} | changes), *more])


@pytest.fixture(scope="module")
def loaded():
    """Weak references to the models that training has loaded."""
    found, own = [], models.load_model

    def load_model(*arguments):
        assert not any(model() for model in found), "two models in memory at once"
        model, tokenizer = own(*arguments)
        found.append(weakref.ref(model))
        return model, tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load_model", load_model)
        gc.disable()  # it would free a model now and then
        yield found
        gc.enable()


@pytest.fixture(scope="module")
def finished(tiny, loaded, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "finished"
    before = len(loaded)
    assert run(tiny, output) == 0
    assert len(loaded) == before + 4
    return output


def found(output: Path) -> dict:
    return json.loads((output / "ranks.json").read_text(encoding="utf-8"))


def test_the_json_is_what_the_trials_measured(finished):
    took, trials = found(finished)["take"]["r"], found(finished)["trials"]
    names = ["r1-q_proj,v_proj", "r2-q_proj,v_proj"]
    names += [f"r{took}-{','.join(ATTENTION)}", f"r{took}-{ALL}"]
    for name, trial in zip(names, trials, strict=True):
        measured = tiny_chat.numbers(finished / f"{name}-seed0")
        assert trial["losses"] == [measured["held_out_after"]]
        assert trial["before"] == measured["held_out_before"]
        assert trial["trainable"] == measured["trainable"]
        adapter = finished / f"{name}-seed0" / "adapter" / "adapter_config.json"
        config = json.loads(adapter.read_text())
        assert config["r"] == trial["r"] and config["lora_alpha"] == 32
    assert trials[1]["gains"] == [1 - trials[1]["losses"][0] / trials[0]["losses"][0]]


def test_the_same_command_says_it_again_without_training(tiny, finished, loaded, capsys):
    before, picture, count = found(finished), (finished / "ranks.png").read_bytes(), len(loaded)
    (finished / "ranks.png").unlink()
    assert run(tiny, finished) == 0
    assert len(loaded) == count and found(finished) == before
    assert picture[:4] == b"\x89PNG" and (finished / "ranks.png").read_bytes() == picture
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == before["why"] and said[-1].startswith("take r = ")
    assert "one seed" in said[-3]
    assert sum(line.split()[:2] == ["r", "targets"] for line in said) == 1


def test_an_interrupted_search_goes_on(tiny, loaded, tmp_path, capsys, monkeypatch):
    own, steps, count = trainer.response_loss, [], len(loaded)

    def response_loss(model, batch):
        steps.append(1)
        if len(steps) == 10:  # the fourth step of the second trial
            raise KeyboardInterrupt
        return own(model, batch)

    monkeypatch.setattr(trainer, "response_loss", response_loss)
    more = ["--target-modules", ALL, "--seeds", "0", "1"]
    assert run(tiny, tmp_path, *more) == 130
    assert len(loaded) == count + 2 and not (tmp_path / "ranks.json").exists()
    assert run(tiny, tmp_path, *more) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'r1-all-linear-seed0'} holds this run already" in said
    assert "resumed   after step 2 of 6" in said
    assert len(loaded) == count + 5 and len(steps) - 10 == 4 + 6 + 6  # from step 2 on
    trials = found(tmp_path)["trials"]
    assert [trial["r"] for trial in trials] == [1, 2] and len(trials[0]["losses"]) == 2
    assert trials[0]["losses"][0] != trials[0]["losses"][1]
    assert "± is the standard deviation over seeds 0, 1" in said


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("--max-r 1", "--max-r must be at least 2, to compare two ranks, got 1"),
        ("--gain nan", "--gain must be above 0 and below 1 (0.01 is 1%), got nan"),
        ("--seeds 3 1 3", "--seeds must be different ones, got [3, 1, 3]"),
        ("--target-modules q_proy", "--target-modules: Target modules {'q_proy'} not found"),
        ("--model nowhere/at/all", "--model nowhere/at/all cannot be read"),
        ("--data nowhere.jsonl", "--data nowhere.jsonl: No such file"),
        ("--lr 1e30", "the loss is nan at step "),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tiny, tmp_path, capsys, more, problem):
    assert run(tiny, tmp_path / "out", *more.split()) == 2
    error = capsys.readouterr().err.splitlines()
    assert re.match("error: ", error[-1]) and problem in error[-1]
    assert sum(line.startswith("error") for line in error) == 1
    assert not (tmp_path / "out" / "ranks.json").exists()
