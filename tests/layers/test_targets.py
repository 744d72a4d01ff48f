# SPDX-License-Identifier: Apache-2.0
"""Which modules a config selects: the same ones as in PEFT, and in bounded time."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from fastlora import LoRAConfig, targets

NAMES = [
    "foo",
    "foobar",
    "block.foo",
    "block.foobar",
    "barfoo",
    "block.barfoo",
    "model.embed",
    "model.layers.0.attn.q_proj",
    "model.layers.1.attn.q_proj",
    "model.layers.10.attn.q_proj",
    "model.layers.1.experts.0.q_proj",
    "model.layers.1.experts.7.v_proj",
    "layers.2.q_proj",
    "h.3.v_proj",
    "model.h.3.v_proj",
    "score",
    "score.dense",
    "model.pre_score",
    "lm_head",
]

CASES = [
    {"target_modules": ["foo"]},
    {"target_modules": ["foobar"]},
    {"target_modules": {"q_proj", "v_proj"}},
    {"target_modules": ["attn.q_proj", "block.foo"]},
    {"target_modules": "foo"},
    {"target_modules": r".*q_proj"},
    {"target_modules": r".*\.(q|v)_proj|lm_head"},
    {"target_modules": ["model.layers.1.attn.q_proj", "foo"]},
    {"target_modules": ["q_proj", "foo"], "exclude_modules": ["foo"]},
    {"target_modules": ["q_proj"], "exclude_modules": r".*experts.*"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": 0},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 3, 10]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "layers"},
    {"target_modules": ["v_proj"], "layers_to_transform": [3, 7], "layers_pattern": ["h"]},
    {"target_modules": ["v_proj"], "layers_to_transform": 7, "layers_pattern": ["h", "experts"]},
    {"target_modules": ["v_proj"], "layers_to_transform": 3, "layers_pattern": "h|layers"},
    # A name in full is taken whatever its layer is.
    {"target_modules": ["model.layers.1.attn.q_proj"], "layers_to_transform": [0]},
    {"target_modules": ["dense", "foo", "score"], "modules_to_save": ["score"]},
    {"target_modules": r".*", "modules_to_save": ["layers", "pre_.*"]},
]


def in_peft(config: PeftLoraConfig, names=NAMES):
    layers = {}
    for name in names:
        if check_target_module_exists(config, name):
            rank = get_pattern_key(config.rank_pattern, name)
            alpha = get_pattern_key(config.alpha_pattern, name)
            layers[name] = [
                config.rank_pattern.get(rank, config.r),
                config.alpha_pattern.get(alpha, config.lora_alpha),
            ]
    return layers


def selected(config: LoRAConfig, names=NAMES):
    return targets.select(config.selection(), names)["layers"]


def named(case) -> str:
    """A case in a test's name, the same in every process: its sets are sorted."""
    return json.dumps(case, default=sorted)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_the_same_modules_as_in_peft(case):
    assert selected(LoRAConfig(**case)) == in_peft(PeftLoraConfig(**case))


def test_the_table_selects_something_and_not_everything():
    found = [len(selected(LoRAConfig(**case))) for case in CASES]
    assert sum(n == 0 for n in found) <= 1 and max(found) < len(NAMES), found


PATTERNS = [
    {"q_proj": 4},
    {"proj": 4},
    {"layers.1.attn.q_proj": 4, "q_proj": 2},
    {"q_proj": 2, "layers.1.attn.q_proj": 4},
    {"^model.layers.1.*": 4},
    {r"layers\.\d.attn\.q_proj": 4, "experts.0.(q|v)_proj": 16},
    {"foo": 4, "foobar": 2},
    {"nothing": 4},
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_same_rank_and_alpha_as_in_peft(pattern):
    values = {
        "target_modules": ["foo", "foobar", "q_proj"],
        "r": 32,
        "lora_alpha": 7,
        "rank_pattern": pattern,
        "alpha_pattern": {key: value / 2 for key, value in pattern.items()},
    }
    assert selected(LoRAConfig(**values)) == in_peft(PeftLoraConfig(**values))


part = st.sampled_from(["foo", "foobar", "layers", "h", "0", "1", "12", "q", "q_proj", "a+b"])
name = st.lists(part, min_size=1, max_size=5).map(".".join)
word = st.sampled_from(["foo", "q", "q_proj", "layers.1.q", "1.foo", "h.0", r"l.*s", r"\d+", "a+b"])
pattern = st.sampled_from([r".*q", r".*(foo|h\.1).*", "foo", r"[^.]*\.\d+\..*", r".*proj$"])
values = st.fixed_dictionaries(
    {"target_modules": st.lists(word, min_size=1, max_size=3) | pattern},
    optional={
        "exclude_modules": st.lists(word, max_size=2) | pattern,
        "modules_to_save": st.lists(st.sampled_from(["foo", "h", r"\d+"]), max_size=2),
        "layers_to_transform": st.integers(0, 2) | st.lists(st.integers(0, 12), max_size=2),
        "layers_pattern": st.sampled_from(["layers", "h", ["h", "foo"], r"l\w+s"]),
        "rank_pattern": st.dictionaries(word, st.integers(1, 9), max_size=3),
        "alpha_pattern": st.dictionaries(word, st.integers(1, 9), max_size=3),
    },
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(values, st.lists(name, unique=True, max_size=12))
def test_any_config_selects_as_in_peft(values, names):
    if isinstance(values["target_modules"], str):
        values = {k: v for k, v in values.items() if not k.startswith("layers_")}
    if "layers_to_transform" not in values:
        values = {k: v for k, v in values.items() if k != "layers_pattern"}
    theirs = in_peft(PeftLoraConfig(**values), names)
    assert selected(LoRAConfig(**values), names) == theirs


# Patterns from files


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_process_gives_the_same_answer(case, monkeypatch):
    spec = LoRAConfig(**case).selection()
    monkeypatch.setattr(targets, "_harmless", lambda spec: False)
    assert targets.select_within(spec, NAMES, 30) == targets.select(spec, NAMES)


EVIL = r"(\w+)+!"
LONG = ["model." + "a" * 60]


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": r"(\w+\.?)+!"},
        {"target_modules": ["x"], "exclude_modules": r"(\w+\.?)+!"},
        {"target_modules": ["a" * 60], "rank_pattern": {EVIL: 4}},
        {"target_modules": ["a" * 60], "alpha_pattern": {EVIL: 4}},
        {"target_modules": ["x"], "modules_to_save": [EVIL]},
    ],
    ids=lambda values: list(values)[-1],
)
def test_a_pattern_that_never_ends_is_stopped(values):
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"{list(values)[-1]}.* took more than 0.5 s"):
        targets.select_within(LoRAConfig(**values).selection(), LONG, 0.5)
    assert time.monotonic() - start < 10


def test_a_pattern_that_never_ends_is_stopped_without_anybody_waiting():
    """The one who waits may have been killed."""
    pytest.importorskip("resource", reason="the system limits no process's time")
    spec = LoRAConfig(target_modules=r"(a+)+b", lora_alpha=8).selection()
    question = json.dumps({"spec": spec, "names": ["a" * 60], "seconds": 0.5})
    command = [sys.executable, "-I", targets.__file__]
    run = subprocess.run(command, input=question, text=True, timeout=30, stdout=subprocess.DEVNULL)
    assert run.returncode < 0  # by a signal
    # A lower limit of the system's stays.
    limited = ["sh", "-c", 'ulimit -t 1; exec "$@"', "sh", *command]
    run = subprocess.run(limited, input=question.replace("(a+)+b", "a+"), text=True, timeout=30)
    assert run.returncode == 0


def test_only_a_few_names_need_no_process(monkeypatch):
    def run(*args, **kwargs):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", run)
    config = LoRAConfig(
        target_modules=r"model\.layers\.1\.attn.q_proj",
        exclude_modules=["bar"],
        modules_to_save=["score"],
        rank_pattern={"layers.1.attn.q_proj": 3},
    )
    assert targets.select_within(config.selection(), NAMES, 1)["layers"] == {
        "model.layers.1.attn.q_proj": [3, 8],
    }
    for many in (
        {"modules_to_save": ["a|b"]},
        {"alpha_pattern": {f"x{i}": 1 for i in range(65)}},
        {"rank_pattern": {"." * 2049: 1}},
        {"target_modules": "q_proj$"},
    ):
        config = LoRAConfig(**{"target_modules": ["foo"], **many})
        with pytest.raises(AssertionError, match="process was started"):
            targets.select_within(config.selection(), NAMES, 1)


def test_many_alternatives_are_stopped():
    pattern = "|".join(["..." + "Z"] * 240)
    config = LoRAConfig(
        target_modules=["q_proj"], modules_to_save=[f"{pattern}{i}" for i in range(900)]
    )
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"modules_to_save took more than 0\.5 s"):
        targets.select_within(config.selection(), NAMES * 10, 0.5)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("select", [targets.select, lambda s, n: targets.select_within(s, n, 30)])
@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("target_modules", "(q_proj"),
        ("exclude_modules", "*q"),
        ("modules_to_save", ["a["]),
        ("rank_pattern", {"q(": 2}),
        ("alpha_pattern", {"[": 2}),
        ("target_modules", "(" * 5000 + ")" * 5000),
    ],
)
def test_a_pattern_that_is_none_is_refused_by_its_field(select, field, bad):
    config = LoRAConfig(**{"target_modules": ["q_proj"], field: bad})
    with pytest.raises(ValueError, match=rf"^{field}: .* is not a regular expression"):
        select(config.selection(), NAMES)


def test_the_script_imports_no_torch():
    code = f"import runpy, sys; runpy.run_path({targets.__file__!r}); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
    source = Path(targets.__file__).read_text()
    assert not re.search(r"^(import|from) (torch|fastlora)", source, re.M)
