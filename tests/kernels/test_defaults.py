# SPDX-License-Identifier: Apache-2.0
"""Few tokens take small tiles of the wide products, so that they fill the chip."""

import pytest
import torch
from aot import CHIPS
from fastlora_kernels import steps
from recorder import recording


@pytest.mark.parametrize(
    ("rows", "tile"),
    [(1, (64, 64)), (100, (64, 64)), (256, (64, 128)), (512, (128, 128)), (513, (128, 256))],
)
def test_tiles_follow_the_number_of_rows(rows, tile):
    """All numbers of rows up to the next power of two take the same."""

    def empty(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    of = [(empty(4096, 4096), empty(16, 4096), empty(4096, 16), None, None, 1.0, 0.0)]
    with recording(CHIPS[90]) as calls:
        (y,) = steps.outputs(empty(rows, 4096), of, [empty(rows, 16)])
        steps.input_grad([y], of, [empty(rows, 16)])
    assert [(call.config.block_m, call.config.block_n) for call in calls] == [tile] * 2
