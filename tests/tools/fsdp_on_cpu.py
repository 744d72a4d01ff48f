# SPDX-License-Identifier: Apache-2.0
"""``python -m fastlora`` where Accelerate shards on a CPU, which it does on accelerators alone.

For test_launch.py: the rest of the way is the one of a machine with GPUs. Each checkpoint is kept,
under its step's number.
"""

import shutil

from accelerate.state import DistributedType, PartialState

from fastlora.__main__ import main
from fastlora.commands import checkpoint
from fastlora.commands.processes import leave


def save(path, state, own=checkpoint.save):
    own(path, state)
    shutil.copy(path, path.with_name(f"{path.name}.{state['progress']['step']}"))


if __name__ == "__main__":
    checkpoint.save = save
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    leave(main())
