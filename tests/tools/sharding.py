# SPDX-License-Identifier: Apache-2.0
"""What this PyTorch's sharding can do without a GPU."""

import torch

AVERAGES = not torch.__version__.startswith("2.8.")
WHY_NOT = "PyTorch 2.8 adds gradients of FSDP2 up on gloo, where it has to average them"
