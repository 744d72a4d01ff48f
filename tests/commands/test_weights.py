# SPDX-License-Identifier: Apache-2.0
"""Which weights ``tune`` measures; what it does with them is in operator/."""

from __future__ import annotations

import pytest
import transformers

from fastlora.commands import tune
from fastlora.commands.shared import UserError

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ALONE = [((16, 16, True),), ((8, 16, True),), ((24, 16, True),), ((16, 24, True),)]
TOGETHER = [((16, 16, True), (8, 16, True), (8, 16, True)), ((24, 16, True), (24, 16, True))]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ALONE + TOGETHER),
        (("o_proj",), ALONE[:1]),
        (("v_proj",), [ALONE[1], ((16, 16, False), (8, 16, False), (8, 16, True))]),
    ],
)
def test_weights_are_measured_alone_and_with_those_that_read_the_same(tmp_path, targets, expected):
    """Of a model without weights; a frozen one of several has no adapter."""
    transformers.LlamaConfig(**SIZES, **HEADS).save_pretrained(tmp_path)
    assert tune._of_model(str(tmp_path), targets) == expected


def test_either_a_model_or_shapes_is_asked_for():
    for both in ({}, {"model": "a", "shapes": ["8x8"]}):
        with pytest.raises(UserError, match="give either --model or --shapes"):
            tune.TuneSettings(**both)
