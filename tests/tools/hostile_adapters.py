# SPDX-License-Identifier: Apache-2.0
"""Adapters that somebody might send: what takes the place of a file of a good one, and the refusal.

The good one is for `tiny_models.mlp`, rank 3 on "2" and "head" with a copy of "1". What would run
code or fill a disk (pickles, large files) is made inside of the tests.
"""

import json
import math
import struct

import torch
from safetensors.torch import save

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
P = "base_model.model."
KEY = f"{P}head.lora_A.weight"
SHAPES = {
    f"{P}1.bias": (8,),
    f"{P}1.weight": (8,),
    f"{P}2.lora_A.weight": (3, 8),
    f"{P}2.lora_B.weight": (8, 3),
    KEY: (3, 8),
    f"{P}head.lora_B.weight": (5, 3),
}


def config(**changes) -> bytes:
    good = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "modules_to_save": ["1"]}
    return json.dumps({**good, "target_modules": ["2", "head"], **changes}, indent=1).encode()


def weights(**changes) -> bytes:
    """Return a file of 0.5 everywhere, but for ``changes``: tensors, None to leave one out."""
    tensors = {key: torch.full(shape, 0.5) for key, shape in SHAPES.items()} | changes
    return save({key: tensor for key, tensor in tensors.items() if tensor is not None})


def framed(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


INT = "must be an int from 1 to 4096, got "
FINITE = "must be a number that is finite in float32, got "
FROZEN = "overwrite frozen weights of the model: "
BROKEN = "not a whole safetensors file"
# Of a config that is good but for this.
CONFIGS = [
    ({"r": 4097}, f"r {INT}4097"),
    ({"r": 0}, f"r {INT}0"),
    ({"r": True}, f"r {INT}True"),
    ({"r": None}, f"r {INT}None"),
    ({"r": 6}, "r=6 for 'head' is more than 5, the smaller side of its weight; .*trusted"),
    ({"r": 4}, r"lora_A.weight must be \[4, 8\], as model and config say, got \[3, 8\]"),
    ({"rank_pattern": {"2": 10**12}}, rf"rank_pattern\['2'\] {INT}1000000000000"),
    ({"rank_pattern": {"head": 2}}, r"head.lora_A.weight must be \[2, 8\]"),
    ({"rank_pattern": ["head"]}, "rank_pattern must be a dict"),
    ({"lora_alpha": math.nan}, "holds NaN, and numbers must be finite"),
    ({"eva_config": {"rho": -math.inf}}, "holds -Infinity, and numbers"),
    ({"lora_alpha": 10**400}, f"lora_alpha {FINITE}1000"),
    ({"lora_alpha": "8"}, f"lora_alpha {FINITE}'8'"),
    ({"alpha_pattern": {"head": -1e39}}, rf"alpha_pattern\['head'\] {FINITE}-1e"),
    ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and less than 1, got 1.0"),
    ({"lora_dropout": -0.5}, "lora_dropout must be at least 0 and less than 1, got -0.5"),
    ({"use_rslora": "yes"}, "use_rslora must be True or False"),
    ({"init_lora_weights": "pissa"}, "must be one of .* frozen weights, got 'pissa'"),
    ({"init_lora_weights": 1}, "must be one of .* frozen weights, got 1"),
    ({"bias": ["all"]}, "bias must be 'none'"),
    ({"bias": "all"}, "would overwrite|tensors missing|PEFT does not take it"),
    ({"layers_to_transform": [-1]}, "layers_to_transform must be a layer's index or a list"),
    ({"layers_to_transform": {"a": [1]}}, "layers_to_transform must be a layer's index or a list"),
    ({"trainable_token_indices": {"1": [-1]}}, "trainable_token_indices must be token ids, in"),
    ({"trainable_token_indices": {"1": 5}}, "trainable_token_indices must be token ids, in"),
    ({"trainable_token_indices": {"a" * 301: [5]}}, "trainable_token_indices must be token ids"),
    ({"trainable_token_indices": 5}, "trainable_token_indices must be token ids, in"),
    ({"trainable_token_indices": [1]}, "PEFT does not take it"),
    ({"alora_invocation_tokens": "1"}, "alora_invocation_tokens must be a list of token ids"),
    ({"alora_invocation_tokens": 1}, "alora_invocation_tokens must be a list of token ids"),
    ({"use_dora": True}, r"2 tensors missing \(.*2.lora_magnitude_vector"),
    ({"peft_type": "XLORA"}, "peft_type must be one of LORA, .*, got 'XLORA'"),
    ({"peft_type": "LOKR"}, "unexpected keyword .*lora_alpha"),
    ({"task_type": "ANYTHING"}, "PEFT does not take it"),
    ({"layer_replication": [[0, 10**9]]}, "not support layer_replication="),
    ({"megatron_core": "antigravity", "megatron_config": {"a": 1}}, "not support megatron_config="),
    ({"run_this": ["rm"]}, "not support run_this="),
    ({f"key{i}": 1 for i in range(999)}, "not support key0=1, key100=1"),
    ({"\x1b[2J": 1}, r"not support '\\x1b\[2J'=1"),
    ({"auto_mapping": {"parent_library": "antigravity"}, "r": 4}, r"must be \[4, 8\]"),
    ({"target_modules": ["0", "2", "head"]}, "2 tensors missing"),
    ({"target_modules": ["2"]}, r"0 tensors missing \(none\), 2 unexpected \(.*head.lora_A"),
    ({"target_modules": None}, "PEFT does not take it"),
    ({"target_modules": 7}, "target_modules must be a pattern or a list"),
    ({"target_modules": "(("}, r"target_modules: '\(\(' is not a regular expression"),
    ({"target_modules": "(?\x1b[2J"}, r"not a regular expression: 'unknown extension \?\\x1b"),
    ({"target_modules": ["a." * 1000]}, "must be .* names of at most 300 characters"),
    ({"target_modules": [f"a{i}" for i in range(9999)]}, "at most 4096 names"),
    ({"modules_to_save": None}, f"{FROZEN}.*1.bias, "),
    ({"modules_to_save": ["0"]}, f"{FROZEN}.*1.bias|PEFT does not"),
]
# Of a file of good weights but for this.
TENSORS = [
    ({KEY: torch.full((3, 8), math.nan)}, "holds NaN or infinity in .*head.lora_A.weight"),
    ({KEY: torch.full((3, 8), 1e300, dtype=torch.float64)}, "NaN or infinity in .*head.lora_A"),
    ({f"{P}1.weight": torch.full((8,), -math.inf)}, "infinity in .*1.weight"),
    ({KEY: None}, r"1 tensors missing \(.*head.lora_A.weight\), 0 unexpected \(none\)"),
    (dict.fromkeys(SHAPES), r"6 tensors missing \(.* and 3 more\), 0 unexpected"),
    ({f"{P}0.weight": torch.zeros(8, 6)}, rf"{FROZEN}\S*0.weight"),
    ({"0.weight": torch.zeros(8, 6)}, f"{FROZEN}0.weight"),
    ({f"{P}1.original_module.bias": torch.ones(8)}, FROZEN),
    ({f"{P}head.base_layer.weight": torch.zeros(5, 8)}, rf"{FROZEN}\S*head.base_layer"),
    ({f"{P}0.lora_A.weight": torch.zeros(3, 6)}, "1 unexpected"),
    ({f"{P}1.modules_to_save.bias": torch.zeros(8)}, "1 unexpected"),
    ({KEY + "\n\x1b[2J": torch.zeros(1)}, "1 unexpected"),
    ({KEY: torch.zeros(3, 9)}, r"must be \[3, 8\], as model and config say, got \[3, 9\]"),
    ({KEY: torch.zeros(3, 8, dtype=torch.int64)}, "must be .* or torch.float64, got torch.int64"),
    ({KEY: torch.zeros(3, 8, dtype=torch.float8_e4m3fn)}, "got torch.float8_e4m3fn"),
    ({KEY: torch.zeros(3, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, "got torch.float4"),
]
NOTHING_BEHIND = (
    b'{"%s": {"dtype": "F32", "shape": [3, 8], "data_offsets": [0, 96]}}' % KEY.encode()
)
HUGE = b'{"a": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 0]}}'
OVERLAP = (
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
    b'"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}'
)
FILES = [
    (CONFIG, b"", "refused"),
    (CONFIG, config()[:40], "refused"),
    (CONFIG, b"\xff\xfe" + config(), "refused"),
    (CONFIG, b'["LORA"]', "must hold an object, not a list"),
    (CONFIG, b"[" * 100_000, "refused"),
    (CONFIG, b'{"peft_type": "LORA", "a": ' + b"[" * 900 + b"]" * 900 + b"}", "refused"),
    (CONFIG, config().replace(b": 6", b": 1e999"), "holds 1e999, and numbers must be finite"),
    (CONFIG, config().replace(b": 6", b": 1" + b"0" * 5000), "refused"),
    (CONFIG, config().replace(b": 3", b': 3, "r": 4000'), "'r' more than once"),
    (CONFIG, config(rank_pattern={"a": 1}).replace(b": 1", b': 1, "a": 2'), "'a' more than once"),
    (CONFIG, config() + b" " * (1 << 20), "larger than 1,048,576 bytes"),
    (WEIGHTS, b"\0" * 7, BROKEN),
    (WEIGHTS, weights()[:90], BROKEN),
    (WEIGHTS, weights()[:-9], BROKEN),
    (WEIGHTS, framed(b'{"a": '), BROKEN),
    (WEIGHTS, framed(NOTHING_BEHIND), BROKEN),
    (WEIGHTS, framed(HUGE), BROKEN),
    (WEIGHTS, struct.pack("<Q", 1 << 60) + b"{}", BROKEN),
    (WEIGHTS, framed(OVERLAP) + b"\0" * 12, BROKEN),
]
# File, content, what the refusal says.
ATTACKS = [
    *((CONFIG, config(**changes), why) for changes, why in CONFIGS),
    *((WEIGHTS, weights(**changes), why) for changes, why in TENSORS),
    *FILES,
]
