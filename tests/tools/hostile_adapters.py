# SPDX-License-Identifier: Apache-2.0
"""Adapters that somebody might send: a file for each attack, in tests/tools/hostile.

python tests/tools/hostile_adapters.py    # write them again

Each replaces a file of a good adapter of `tiny_models.mlp`, rank 3 on "2" and "head" with a copy
of "1". What would run code or fill a disk (pickles, large files) is made inside of the tests.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

FOLDER = Path(__file__).parent / "hostile"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GOOD_CONFIG = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 6,
    "target_modules": ["2", "head"],
    "modules_to_save": ["1"],
}
P = "base_model.model."
SHAPES = {
    f"{P}1.bias": (8,),
    f"{P}1.weight": (8,),
    f"{P}2.lora_A.weight": (3, 8),
    f"{P}2.lora_B.weight": (8, 3),
    f"{P}head.lora_A.weight": (3, 8),
    f"{P}head.lora_B.weight": (5, 3),
}


def config(**changes) -> bytes:
    return json.dumps({**GOOD_CONFIG, **changes}, indent=1).encode()


def weights(shapes: dict | None = None, dtype: str = "F32", value: float = 0.5) -> bytes:
    """Return a safetensors file of ``shapes``, every element ``value`` in float32."""
    header, data = {}, b""
    for key, shape in (SHAPES if shapes is None else shapes).items():
        count = 1
        for size in shape:
            count *= size
        offsets = [len(data), len(data) + 4 * count]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += struct.pack("<f", value) * count
    return framed(json.dumps(header).encode()) + data


def framed(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


FROZEN = "overwrite frozen weights of the model"
BROKEN = "not a whole safetensors file"
# Of a config that is good but for one key, and of a file's tensors: name: (what, the refusal).
CONFIGS = {
    "rank-of-a-billion": ({"r": 10**9}, "r must be an int from 1 to 4096"),
    "rank-zero": ({"r": 0}, "r must be an int from 1 to 4096, got 0"),
    "rank-pattern-of-a-trillion": (
        {"rank_pattern": {"2": 10**12}},
        r"rank_pattern\['2'\] must be an int from 1 to 4096",
    ),
    "dropout-of-one": ({"lora_dropout": 1.0}, "lora_dropout must be"),
    "another-method": ({"peft_type": "XLORA"}, "peft_type must be one of LORA, "),
    "another-method-s-key": ({"peft_type": "LOKR"}, "unexpected keyword .*lora_alpha"),
    "dora": ({"use_dora": True}, r"2 tensors missing \(.*2.lora_magnitude_vector"),
    "changes-frozen-weights": (
        {"init_lora_weights": "pissa"},
        "init_lora_weights must be one of .* frozen weights, got 'pissa'",
    ),
    "changes-the-model": ({"layer_replication": [[0, 10**9]]}, "not support layer_replication="),
    "another-module-to-import": (
        {"megatron_core": "antigravity", "megatron_config": {"a": 1}},
        "not support megatron_config=",
    ),
    "a-name-of-many-parts": (
        {"target_modules": ["a." * 1000]},
        "target_modules must be .* names of at most 300 characters",
    ),
    "a-switch-of-the-future": ({"run_this": ["rm"]}, "not support run_this="),
    "terminal-codes": ({"\x1b[2J": 1}, r"not support '\\x1b\[2J'=1"),
    "terminal-codes-in-a-pattern": (
        {"target_modules": "(?\x1b[2J"},
        r"not a regular expression: 'unknown extension \?\\x1b",
    ),
    "code-to-import": (
        {"auto_mapping": {"parent_library": "antigravity"}, "r": 4},
        r"must be \[4, 8\]",
    ),
    "everything-is-a-target": ({"target_modules": ["0", "2", "head"]}, "2 tensors missing"),
}
TENSORS = {
    "overwrites-a-frozen-weight": ({f"{P}head.base_layer.weight": (5, 8)}, FROZEN),
    "overwrites-another-layer": ({f"{P}0.weight": (8, 6)}, FROZEN),
    "another-shape": ({f"{P}head.lora_A.weight": (3, 9)}, r"must be \[3, 8\]"),
}
HUGE = b'{"a": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 0]}}'
OVERLAP = (
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
    b'"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}'
)
# name: (file, content, what the refusal says)
ATTACKS: dict[str, tuple[str, bytes, str]] = {
    **{name: (CONFIG, config(**changes), why) for name, (changes, why) in CONFIGS.items()},
    **{name: (WEIGHTS, weights(SHAPES | more), why) for name, (more, why) in TENSORS.items()},
    "alpha-not-a-number": (CONFIG, config().replace(b": 6", b": NaN"), "holds NaN"),
    "alpha-infinite": (CONFIG, config().replace(b": 6", b": 1e999"), "holds 1e999"),
    "a-key-twice": (CONFIG, config().replace(b": 3", b': 3, "r": 4000'), "'r' more than once"),
    "cut-off": (CONFIG, config()[:40], "refused"),
    "not-utf-8": (CONFIG, b"\xff\xfe" + config(), "refused"),
    "nested": (CONFIG, b"[" * 100_000, "nested too deeply"),
    "a-tensor-missing": (
        WEIGHTS,
        weights({k: v for k, v in SHAPES.items() if "head.lora_A" not in k}),
        "1 tensors missing",
    ),
    "weights-not-a-number": (WEIGHTS, weights(value=float("nan")), "holds NaN or infinity"),
    "integers": (WEIGHTS, weights(dtype="I32"), "got I32"),
    "says-it-is-huge": (WEIGHTS, framed(HUGE), BROKEN),
    "header-beyond-the-end": (WEIGHTS, struct.pack("<Q", 1 << 60) + b"{}", BROKEN),
    "tensors-that-overlap": (WEIGHTS, framed(OVERLAP) + b"\0" * 12, BROKEN),
}


def main() -> None:
    for name, (file, content, _) in ATTACKS.items():
        path = FOLDER / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    print(f"{len(ATTACKS)} in {FOLDER}")


if __name__ == "__main__":
    main()
