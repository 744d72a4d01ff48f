# SPDX-License-Identifier: Apache-2.0
"""The search for a rank: when it stops, what it says, what it writes, and that it goes on."""

import gc
import json
import weakref
from argparse import Namespace
from pathlib import Path

import pytest
import tiny_chat
import transformers

from fastlora.__main__ import main
from fastlora.commands import models, pictures, ranks
from fastlora.commands.shared import UserError

QV, ALL = ["q_proj", "v_proj"], ["all-linear"]
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
NEOX = ["attention.query_key_value", "attention.dense"]
SETS = (QV, ATTENTION, ALL)


def searched(losses: dict, max_r=64, sets=(QV,), wanted=0.01):
    """Search on made-up losses, by rank on q and v or by wider targets: a number or one a seed."""

    def train(r, targets):
        loss = losses[r if targets == QV else targets[-1]]
        by_seed = loss if isinstance(loss, list) else [loss]
        return ranks.Trial(r, targets, by_seed, 4.0, 100 * r, 1.5)

    return ranks.search(train, max_r, sets, wanted)


WIDER = {1: 3.0, 2: 2.7, 4: 2.69, ATTENTION[-1]: 2.68, "all-linear": 2.5}
FEW = {1: 3.0, 2: 2.9, 4: 2.8}
MORE = FEW | {8: 2.79, 16: 2.789}
APART = {1: [2.0, 4.0], 2: [1.9, 3.8], 4: [1.9, 3.8]}  # each has other examples held out
UNLIKE = {1: [2.0, 2.0], 2: [1.8, 2.04]}
UNDER = "under the 1.00% asked for"
NOTHING = f"r = 4 on QV gains 0.00% over r = 2 on QV, {UNDER}; but untrained the model is no worse"


@pytest.mark.parametrize(
    ("losses", "options", "tried", "best", "why"),
    [
        # It stops where the gain levels off, and the gain asked for decides where that is.
        (MORE, {}, [1, 2, 4, 8], 4, f"r = 8 on QV gains 0.36% over r = 4 on QV, {UNDER}"),
        (MORE, {"wanted": 0.002}, [1, 2, 4, 8, 16], 8, "r = 16 on QV gains"),
        (FEW, {"wanted": 0.034}, [1, 2], 1, "r = 2 on QV gains 3.33% over r = 1 on QV, under the"),
        # It never levels off; a larger rank is worse.
        (FEW, {"max_r": 7}, [1, 2, 4], 4, "r = 4 on QV gains 3.45% over r = 2 on QV; --max-r 7 en"),
        ({1: 3.0, 2: 2.7, 4: 2.835}, {}, [1, 2, 4], 2, "r = 4 on QV gains -5.00% over r = 2 on QV"),
        (FEW, {"max_r": 1}, [1], 1, "--max-r 1 ends there"),
        # More layers, at the smallest good rank, beside what was taken and not what was tried.
        (
            *(WIDER, {"sets": SETS}, [1, 2, 4, 2, 2], 2),
            f"r = 4 on QV gains 0.37% over r = 2 on QV, {UNDER}; r = 2 on {', '.join(ATTENTION)} "
            f"gains 0.74% over r = 2 on QV, {UNDER}; r = 2 on all-linear gains 7.41% over",
        ),
        # Seeds are compared one by one.
        (APART, {}, [1, 2, 4], 2, "r = 4 on QV gains 0.00%"),
        (UNLIKE, {}, [1, 2], 1, "r = 2 on QV gains 4.00% over r = 1 on QV, no more than seeds di"),
        # Nothing helped.
        ({1: 4.5, 2: 4.4, 4: 4.4}, {}, [1, 2, 4], 2, NOTHING),
    ],
)
def test_what_is_tried_and_taken_and_why(losses, options, tried, best, why):
    trials, taken, said = searched(losses, **options)
    assert [trial.r for trial in trials] == tried and taken.r == best
    on = "all-linear" if losses is WIDER else "QV"
    assert said.replace("q_proj, v_proj", "QV").startswith(f"take r = {best} on {on}: {why}")
    assert ("untrained" in said) == (why == NOTHING)


def test_the_table_marks_what_is_taken():
    lines = ranks.table(*searched({1: 3.0, 2: 2.9, 4: 2.91})[:2]).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "r trainable held-out loss gain seconds targets",
        "0 4.000 untrained",
        "1 100 3.000 2 q_proj, v_proj",
        "2 200 2.900 3.33% 2 taken q_proj, v_proj",
        "4 400 2.910 -0.34% 2 q_proj, v_proj",
    ]
    assert len({len(line.partition("%")[0]) for line in lines[3:]}) == 1  # numbers are aligned
    assert "5.00% ± 0.00%" in ranks.table(*searched(APART)[:2])


def test_the_picture_shows_every_trial_and_the_one_taken(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, _: drawn.append(figure))
    trials, taken, _ = searched(WIDER | {ATTENTION[-1]: 2.65, "all-linear": 2.64}, sets=SETS)
    pictures.rank_curve(tmp_path / "p.png", trials, taken, "a title", "a subtitle")
    (axes,) = drawn[0].axes
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert points == {
        "q_proj, v_proj": [[100, 3.0], [200, 2.7], [400, 2.69]],
        f"r = 2 on {', '.join(ATTENTION)}": [[200, 2.65]],
        "r = 2 on all-linear": [[200, 2.64]],
        "taken": [[200, 2.65]],
    }
    assert {"r = 1", "r = 2", "r = 4", "a subtitle"} <= {text.get_text() for text in axes.texts}


@pytest.mark.parametrize(
    ("config", "start", "expected"),
    [
        ("Llama", [], [QV, ATTENTION, ALL]),
        ("Llama", ["v_proj"], [["v_proj"], ATTENTION, ALL]),
        ("Llama", ["up_proj"], [["up_proj"], MLP, ALL]),
        ("Llama", [r".*\.1\..*q_proj"], [[r".*\.1\..*q_proj"], ATTENTION, ALL]),
        ("Llama", ALL, [ALL]),
        ("GPT2", [], [["c_attn"], ["attn.c_attn", "attn.c_proj"], ALL]),
        ("Phi3", [], [["qkv_proj"], ["self_attn.o_proj", "self_attn.qkv_proj"], ALL]),
        ("GPTNeoX", [], [["query_key_value"], NEOX, ALL]),
        ("Mamba", ["in_proj"], [["in_proj"]]),
        ("CTRL", [], r"must say where to start, of 0, 2, Wk, Wq, Wv, dense"),
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


def run(tiny, output: Path, *more: str, **changes) -> int:
    own = {"model": tiny.model, "data": tiny.data, "output": output, "steps": 6, "max-r": 2}
    return main([*tiny_chat.command("ranks", **own | {"save-every": 2} | changes), *more])


def found(output: Path) -> dict:
    return json.loads((output / "ranks.json").read_text(encoding="utf-8"))


@pytest.fixture
def loaded(monkeypatch):
    """Weak references to the models that training has loaded."""
    found, own = [], models.load_model

    def load_model(*arguments):
        assert not any(model() for model in found), "two models in memory at once"
        model, tokenizer = own(*arguments)
        found.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(models, "load_model", load_model)
    gc.disable()  # it would free a model now and then
    yield found
    gc.enable()


def test_a_search_says_what_its_trials_measured_and_says_it_again(tiny, loaded, tmp_path, capsys):
    assert run(tiny, tmp_path) == 0
    assert len(loaded) == 4 and capsys.readouterr().out.count("held-out loss") == 9
    first, picture = found(tmp_path), (tmp_path / "ranks.png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    r, trials = first["take"]["r"], first["trials"]
    names = ["r1-q_proj,v_proj", "r2-q_proj,v_proj", f"r{r}-{','.join(ATTENTION)}"[:63]]
    for name, trial in zip([*names, f"r{r}-all-linear"], trials, strict=True):
        (folder,) = tmp_path.glob(f"{name}-*-seed0")
        measured = tiny_chat.numbers(folder)
        assert trial["losses"] == [measured["held_out_after"]]
        assert trial["before"] == measured["held_out_before"]
        assert trial["trainable"] == measured["trainable"]
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert config["r"] == trial["r"] and config["lora_alpha"] == 32
    assert trials[1]["gain"] == 1 - trials[1]["losses"][0] / trials[0]["losses"][0]
    # Again, without training.
    assert run(tiny, tmp_path) == 0
    assert len(loaded) == 4 and found(tmp_path) == first
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == first["why"] and "one seed" in said[-3]


def test_every_trial_has_a_folder_of_its_own(monkeypatch):
    outputs, names = [], [f"self_attn.{name}_proj_with_a_long_name" for name in "abcd"]
    measured = {"held_out_before": 1, "held_out_after": 1, "trainable": 1, "seconds": 1}
    monkeypatch.setattr(ranks.finetune, "run", lambda s: outputs.append(s.output) or measured)
    for targets in (names[:3], names, ["q|v"], ["q,v"]):
        ranks._train(Namespace(seeds=[0, 1], output="out"), 4, targets)
    assert len({*outputs}) == len(outputs) == 8


def test_an_interrupted_search_goes_on(tiny, loaded, tmp_path, capsys):
    assert run(tiny, tmp_path, "--target-modules", *ALL, **{"max-r": 1}) == 0
    more = ["--target-modules", *ALL, "--seeds", "0", "1"]
    with tiny_chat.interrupted(4):
        assert run(tiny, tmp_path, *more) == 130
    assert run(tiny, tmp_path, *more) == 0
    said = capsys.readouterr().out
    (first,) = tmp_path.glob("r1-all-linear-*-seed0")
    assert f"{first} holds this run already" in said
    assert "resumed   after step 2 of 6" in said and len(loaded) == 1 + 1 + 3
    trials = found(tmp_path)["trials"]
    assert [trial["r"] for trial in trials] == [1, 2] and len(trials[0]["losses"]) == 2
    assert trials[0]["losses"][0] != trials[0]["losses"][1]
    assert "± is the standard deviation over seeds" in said


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("--seeds 3 1 3", "--seeds must be different ones, got [3, 1, 3]"),
        ("--target-modules q_proy", "--target-modules: Target modules {'q_proy'} not found"),
        ("--model nowhere/at/all", "--model nowhere/at/all cannot be read"),
        ("--gain 0", "argument --gain: must be above 0 and below 1, got 0"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tiny, tmp_path, capsys, more, problem):
    assert run(tiny, tmp_path / "out", *more.split()) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: ") and problem in error[-1]
    assert sum(line.startswith("error") for line in error) == 1
    assert not (tmp_path / "out" / "ranks.json").exists()
