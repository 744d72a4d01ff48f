# SPDX-License-Identifier: Apache-2.0
"""`LoRAConfig`: PEFT's fields and files, every value checked, nothing ignored."""

import dataclasses
import json
import math
import pickle

import pytest
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, TaskType

from fastlora import LoRAConfig

FIELDS = [f.name for f in dataclasses.fields(LoRAConfig)]


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_has_its_name_and_default_from_peft(name):
    assert getattr(LoRAConfig(), name) == getattr(PeftLoraConfig(), name)


FULL = {
    "r": 4,
    "target_modules": ("q", "v"),
    "lora_alpha": 3.5,
    "lora_dropout": 0.25,
    "exclude_modules": r".*\.0\..*",
    "use_rslora": True,
    "init_lora_weights": "gaussian",
    "bias": "lora_only",
    "modules_to_save": ("score",),
    "rank_pattern": {"q": 2},
    "alpha_pattern": {"v": 1.5},
    "layers_to_transform": (0, 2),
    "layers_pattern": "layers",
    "fan_in_fan_out": True,
    "task_type": "SEQ_CLS",
    "base_model_name_or_path": "here",
}


def test_every_field_survives_a_file():
    assert FULL.keys() == set(FIELDS)
    config = LoRAConfig(**FULL)
    assert dataclasses.asdict(config) == FULL
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_peft_reads_what_is_written(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(LoRAConfig(**FULL).to_dict()))
    theirs = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, PeftLoraConfig)
    for name, value in FULL.items():
        wanted = list(value) if isinstance(value, tuple) else value
        read = getattr(theirs, name)
        assert (sorted(read) if isinstance(read, set) else read) == wanted, name


def test_what_peft_writes_is_read(tmp_path):
    for values in ({"target_modules": ["q"]}, {"target_modules": ".*q", "modules_to_save": ["s"]}):
        theirs = PeftLoraConfig(**values, task_type=TaskType.SEQ_CLS, use_rslora=True)
        theirs.save_pretrained(tmp_path)
        ours = LoRAConfig.from_dict(json.loads((tmp_path / "adapter_config.json").read_text()))
        assert ours == LoRAConfig(**values, task_type=TaskType.SEQ_CLS, use_rslora=True)
        assert ours.task_type == "SEQ_CLS"


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True},
        {"use_qalora": True},
        {"lora_bias": True},
        {"layer_replication": [[0, 2]]},
        {"loftq_config": {"loftq_bits": 4}},
        {"megatron_config": {"tp": 2}},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["experts"]},
        {"ensure_weight_tying": True},
        {"eva_config": {"rho": 2.0}},
        {"not_invented_yet": 1},
        {"not_invented_yet": "soft"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_what_is_not_supported_is_refused_by_name(values):
    (name,) = values
    with pytest.raises(TypeError, match=rf"not support {name}.* supports r, target_modules"):
        LoRAConfig(**values)
    with pytest.raises(ValueError, match=rf"not support {name}=.* supports r, target_modules"):
        LoRAConfig.from_dict({"peft_type": "LORA", **values})


def test_keys_that_change_nothing_are_taken():
    inert = {"use_dora": False, "loftq_config": {}, "eva_config": None, "not_invented_yet": None}
    beside = {"megatron_core": "megatron.core", "qalora_group_size": 16, "peft_version": "9"}
    values = {"peft_type": "LORA", "r": 2, **inert, **beside, "inference_mode": True}
    assert LoRAConfig.from_dict(values) == LoRAConfig(r=2)


@pytest.mark.parametrize("peft_type", ["IA3", None, "lora", 1])
def test_other_methods_are_refused(peft_type):
    with pytest.raises(ValueError, match="peft_type must be 'LORA'"):
        LoRAConfig.from_dict({"peft_type": peft_type})
    with pytest.raises(ValueError, match="peft_type must be 'LORA'"):
        LoRAConfig.from_dict({"r": 8})


INVALID = [
    ("r", 0, ValueError),
    ("r", -1, ValueError),
    ("r", 8.0, TypeError),
    ("r", True, TypeError),
    ("r", "8", TypeError),
    ("lora_alpha", math.nan, ValueError),
    ("lora_alpha", math.inf, ValueError),
    ("lora_alpha", 10**400, ValueError),
    ("lora_alpha", -1e299, ValueError),
    ("lora_alpha", "16", TypeError),
    ("lora_alpha", None, TypeError),
    ("lora_dropout", 1.0, ValueError),
    ("lora_dropout", -0.1, ValueError),
    ("lora_dropout", math.nan, ValueError),
    ("lora_dropout", False, TypeError),
    ("use_rslora", 1, TypeError),
    ("fan_in_fan_out", None, TypeError),
    ("init_lora_weights", "pissa", ValueError),
    ("init_lora_weights", None, ValueError),
    ("bias", "some", ValueError),
    ("bias", None, ValueError),
    ("target_modules", [], ValueError),
    ("target_modules", "", ValueError),
    ("target_modules", [1], TypeError),
    ("target_modules", [""], TypeError),
    ("target_modules", 3, TypeError),
    ("target_modules", {"q": 1}, TypeError),
    ("exclude_modules", 3, TypeError),
    ("modules_to_save", "score", TypeError),
    ("modules_to_save", [None], TypeError),
    ("rank_pattern", ["q"], TypeError),
    ("rank_pattern", {"q": 0}, ValueError),
    ("rank_pattern", {"q": 1.5}, TypeError),
    ("rank_pattern", {"q": True}, TypeError),
    ("rank_pattern", {1: 1}, TypeError),
    ("alpha_pattern", {"q": math.nan}, ValueError),
    ("alpha_pattern", {"q": 4e38}, ValueError),
    ("alpha_pattern", {"q": None}, TypeError),
    ("layers_to_transform", -1, TypeError),
    ("layers_to_transform", [0, "1"], TypeError),
    ("layers_to_transform", True, TypeError),
    ("layers_pattern", 5, TypeError),
    ("task_type", "CHAT", ValueError),
    ("task_type", ["SEQ_CLS"], ValueError),
    ("base_model_name_or_path", 3, TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), INVALID, ids=lambda v: str(v)[:20])
def test_a_bad_value_is_refused_by_its_field(name, value, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        LoRAConfig(**{"target_modules": ["q"], name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": ".*", "layers_to_transform": 1}, "layers_to_transform .* '\\.\\*'"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern needs"),
        ({"r": 4, "init_lora_weights": "orthogonal", "rank_pattern": {"q": 3}}, "even r, got 3"),
    ],
)
def test_fields_that_do_not_go_together(values, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**values)


def test_a_config_is_not_changed_after_it_was_checked():
    given = {"q": 2}
    config = LoRAConfig(rank_pattern=given)
    given["q"] = -1
    assert config.rank_pattern == {"q": 2}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 0
